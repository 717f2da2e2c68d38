"""Byte sizes: what is written is what is meant, and nothing else is accepted."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.config import BYTE_UNITS, format_bytes, load_config, parse_bytes
from kvtier.errors import ConfigError

sizes = st.integers(0, 2**63 - 1)


@given(sizes)
def test_every_size_survives_being_written(size):
    assert parse_bytes(format_bytes(size)) == parse_bytes(size) == parse_bytes(str(size)) == size


@given(st.integers(0, 2**20), st.sampled_from(list(BYTE_UNITS.items())), st.sampled_from(["", " ", "  "]), st.booleans())
def test_units_in_any_case_and_spacing(count, unit, space, lower):
    name, factor = unit
    assert parse_bytes(f" {count}{space}{name.lower() if lower else name} ") == count * factor


@given(st.decimals(0, 1000, places=3, allow_nan=False), st.sampled_from(list(BYTE_UNITS.items())))
def test_fractions_only_where_they_are_whole_bytes(number, unit):
    exact = Fraction(number) * unit[1]
    if exact.denominator == 1:
        assert parse_bytes(f"{number}{unit[0]}") == exact
    else:
        with pytest.raises(ValueError, match="not a whole number of bytes"):
            parse_bytes(f"{number}{unit[0]}")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("-1", "negative"),
        ("-8GiB", "negative"),
        (-1, "negative"),
        ("1.0001KiB", "whole number"),
        ("8GiBB", "unknown unit 'GiBB', expected one of B, kB"),
        ("8G", "unknown unit 'G'"),
        ("GiB", "expected"),
        ("", "expected"),
        ("1e9", "expected|unknown"),
        ("８GiB", "expected"),
        ("9" * 5000, "expected"),
        (1.5, "expected"),
        (True, "expected"),
        (None, "expected"),
        (2**63, "larger"),
        ("9999999TiB", "larger"),
    ],
)
def test_anything_else_is_an_error_that_names_key_and_cause(text, why):
    with pytest.raises(ConfigError, match=rf"host\.capacity_bytes is .*({why})"):
        load_config(env={}, overrides={"host.capacity_bytes": text})


def test_an_empty_tier_is_refused_but_no_prefetching_is_fine():
    with pytest.raises(ConfigError, match=r"host\.capacity_bytes is 0; expected .*above 0"):
        load_config(env={}, overrides={"host.capacity_bytes": 0})
    assert load_config(env={}, overrides={"mover.prefetch_budget_bytes": 0}).mover.prefetch_budget_bytes == 0
