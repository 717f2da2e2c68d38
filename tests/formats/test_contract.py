"""Every built-in format against the contract that third parties use too."""

from __future__ import annotations

from typing import ClassVar

import pytest

from kvtier.formats import FORMAT_NAMES, get_format
from kvtier.testing.formats import FormatContract


class TestRaw(FormatContract):
    format_name = "raw"


class TestRawLZ4(FormatContract):
    format_name = "raw+lz4"


class TestFP8(FormatContract):
    format_name = "fp8"
    gaussian_error = 0.027
    outlier_error = 0.027


class TestFP8LZ4(TestFP8):
    format_name = "fp8+lz4"


class TestQ8(FormatContract):
    format_name = "q8"
    gaussian_error = 0.0075
    outlier_error = 0.0075


class TestQ8LZ4(TestQ8):
    format_name = "q8+lz4"


class TestQ4(FormatContract):
    format_name = "q4"
    gaussian_error = 0.102
    outlier_error = 0.12


class TestQ4LZ4(TestQ4):
    format_name = "q4+lz4"


class TestEveryFormatIsHere:
    contracts: ClassVar = [TestRaw, TestRawLZ4, TestFP8, TestFP8LZ4, TestQ8, TestQ8LZ4, TestQ4, TestQ4LZ4]

    def test_contract_covers_the_registry(self) -> None:
        assert {contract.format_name for contract in self.contracts} == set(FORMAT_NAMES)

    @pytest.mark.parametrize("name", FORMAT_NAMES)
    def test_only_raw_is_lossless_and_only_plain_formats_have_a_fixed_size(self, name: str) -> None:
        assert get_format(name).lossless == name.startswith("raw")
        assert get_format(name).fixed_size == ("+" not in name)
