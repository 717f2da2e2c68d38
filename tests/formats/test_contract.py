"""Every built-in format against the contract that third parties use too."""

from __future__ import annotations

from typing import ClassVar

import pytest

from kvtier.format_spec import CODECS, STAGES
from kvtier.formats import FORMAT_NAMES, get_format
from kvtier.testing.formats import FormatContract


class TestRaw(FormatContract):
    format_name = "raw"


class TestRawLZ4(FormatContract):
    format_name = "raw+lz4"


class TestRawZstd(FormatContract):
    format_name = "raw+zstd"


class TestFP8(FormatContract):
    format_name = "fp8"
    gaussian_error = 0.0262
    outlier_error = 0.0255


class TestFP8LZ4(TestFP8):
    format_name = "fp8+lz4"


class TestQ8(FormatContract):
    format_name = "q8"
    gaussian_error = 0.007
    outlier_error = 0.007


class TestQ8Zstd(TestQ8):
    format_name = "q8+zstd"


class TestQ6(FormatContract):
    format_name = "q6"
    gaussian_error = 0.028
    outlier_error = 0.028


class TestQ4(FormatContract):
    format_name = "q4"
    gaussian_error = 0.1
    outlier_error = 0.116


class TestQ4Zstd(TestQ4):
    format_name = "q4+zstd"


class TestQ3(FormatContract):
    format_name = "q3"
    gaussian_error = 0.192
    outlier_error = 0.22


class TestQ8Zero(FormatContract):
    format_name = "q8_0"
    gaussian_error = 0.0059
    outlier_error = 0.0095
    head_dims = (64, 96, 128)


class TestQ4Zero(FormatContract):
    format_name = "q4_0"
    gaussian_error = 0.089
    outlier_error = 0.147
    head_dims = (64, 96, 128)


class TestQ8K(FormatContract):
    format_name = "q8_k"
    gaussian_error = 0.0076
    outlier_error = 0.0122
    block_multiple = 256


class TestQ8KLZ4(TestQ8K):
    format_name = "q8_k+lz4"


class TestQ4K(FormatContract):
    format_name = "q4_k"
    gaussian_error = 0.075
    outlier_error = 0.113
    block_multiple = 256


class TestQ4KLZ4(TestQ4K):
    format_name = "q4_k+lz4"


class TestSparse24(FormatContract):
    format_name = "sparse24!"
    gaussian_error = 0.37
    outlier_error = 0.19
    tiny = 8e-5


class TestQ8Sparse24(TestSparse24):
    format_name = "q8/sparse24"


class TestQ8Q4(TestQ4):
    format_name = "q8/q4"


class TestLayersThatDiffer(TestQ4):
    format_name = "q4;0:q8/q6+zstd"


CONTRACTS = [each for each in globals().values() if isinstance(each, type) and issubclass(each, FormatContract) and each.format_name]


class TestEveryFormatIsHere:
    names: ClassVar = [contract.format_name for contract in CONTRACTS]

    def test_contracts_cover_every_codec_and_stage(self) -> None:
        assert set(FORMAT_NAMES) | {"sparse24!"} <= set(self.names)
        assert {name.removesuffix("!") for name in self.names} >= set(CODECS)
        assert {name.partition("+")[2] for name in self.names} == {"", *STAGES}

    @pytest.mark.parametrize("name", names)
    def test_only_raw_is_lossless_and_only_formats_without_stage_have_a_fixed_size(self, name: str) -> None:
        assert get_format(name).lossless == name.startswith("raw")
        assert get_format(name).fixed_size == ("+" not in name)
