"""The grammar of format names: texts and specifications are the same thing, and what is wrong is said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import ConfigError
from kvtier.format_spec import CODECS, FORCE, NOT_FOR_KEYS, STAGES, FormatSpec, LayerRange, parse_format

KEYS = [name + FORCE if name in NOT_FOR_KEYS else name for name in CODECS]


@st.composite
def specifications(draw: st.DrawFn) -> FormatSpec:
    bounds = sorted(draw(st.sets(st.integers(0, 99), max_size=6)))
    ranges = [
        LayerRange(first, draw(st.sampled_from([first, last])), draw(st.sampled_from(KEYS)), draw(st.sampled_from(CODECS)))
        for first, last in zip(bounds[::2], bounds[1::2], strict=False)
    ]
    stage = draw(st.sampled_from([None, *STAGES]))
    return FormatSpec(draw(st.sampled_from(KEYS)), draw(st.sampled_from(CODECS)), tuple(ranges), stage)


@given(specifications())
def test_a_name_says_all_and_is_the_only_one_of_its_specification(spec: FormatSpec) -> None:
    assert parse_format(spec.name) == spec
    assert parse_format(spec.name).name == spec.name
    assert parse_format(spec) is spec


@given(specifications(), st.randoms())
def test_a_mapping_says_the_same_as_the_text(spec: FormatSpec, random) -> None:
    layers = {f"{part.first}-{part.last}": {"k": part.keys, "v": part.values} for part in spec.layers}
    items = list(layers.items())
    random.shuffle(items)
    assert parse_format({"k": spec.keys, "v": spec.values, "layers": dict(items), "stage": spec.stage}) == spec


@pytest.mark.parametrize(
    ("given_text", "name"),
    [
        ("q4/q4", "q4"),
        ("q4;3-3:q8", "q4;3:q8"),
        ("q4;7:q8;0-1:q6/q4", "q4;0-1:q6/q4;7:q8"),
        ("q4; 0-1 :q8", "q4;0-1:q8"),
        ("q8/sparse24!", "q8/sparse24"),
        ("sparse24!/sparse24", "sparse24!"),
        ("sparse24!/sparse24!", "sparse24!"),
        ("q8!", "q8"),
    ],
)
def test_other_ways_to_write_it_have_the_same_name(given_text: str, name: str) -> None:
    assert parse_format(given_text).name == name


def test_layers_in_a_mapping_may_be_texts_and_numbers() -> None:
    assert parse_format({"k": "q8", "v": "q4", "layers": {0: "raw", "2-3": "q8/q6"}, "stage": "zstd"}).name == "q8/q4;0:raw;2-3:q8/q6+zstd"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("q5", "'q5' is no codec; did you mean 'q"),
        ("q8/q9", "'q9' is no codec; did you mean 'q"),
        ("q4;0:sparse", "'sparse' is no codec; did you mean 'sparse24'"),
        ("Q8_0", "did you mean 'q8_0'"),
        ("nope", "'nope' is no codec. Known: raw, fp8, q8"),
        ("raw+lz5", "no byte stage is called 'lz5'; known: lz4, zstd"),
        ("raw+", "no byte stage is called ''"),
        ("raw+lz4+zstd", "no byte stage is called 'lz4+zstd'"),
        ("q4;0-1", "should read LAYER:FORMAT"),
        ("q4;2-1:q8", "'2-1' is no range of layers"),
        ("q4;-1:q8", "'-1' is no range of layers"),
        ("q4;0-3:q8;3:raw", "layer 3 is named twice"),
        ("", "page format '': it is empty; known: raw, fp8, q8"),
        ("q8/", "a codec is missing; known: raw, fp8"),
        ("q4;0:", "a codec is missing; known: raw, fp8"),
        ("q8/q4/q3", "'q4/q3' is no codec"),
        (8, "expected a name such as"),
        (None, "expected a name such as"),
        ({"k": "q8"}, "expected the keys k and v"),
        ({"k": "q8", "v": "q4", "w": "q3"}, "expected the keys k and v"),
        ({"k": "q8", "v": "q4", "layers": ["q8"]}, "expected a mapping"),
        ({"k": "q8", "v": "q4", "layers": {0: {"k": "q8"}}}, "expected the keys k and v"),
        ({"k": "", "v": "q4"}, "a codec is missing; known: raw, fp8"),
        ({"k": "q8;0:q4", "v": "q4"}, "k is 'q8;0:q4'; expected the name of one codec"),
        ({"k": "q8/q4", "v": "q4"}, "k is 'q8/q4'; expected the name of one codec"),
        ({"k": "q8", "v": "q4+zstd"}, "v is 'q4+zstd'; expected the name of one codec"),
        ({"k": "q8", "v": None}, "v is None; expected the name of one codec"),
        ({"k": "q8", "v": "q4", "layers": {0: {"k": "q8", "v": "q4;1:q3"}}}, "v is 'q4;1:q3'; expected the name of one codec"),
        ({"k": "q8", "v": "q4", "layers": {0: "q8;1:q3"}}, "layers 0 is 'q8;1:q3'; expected a codec"),
        ({"k": "q8", "v": "q4", "layers": {0: "q8+zstd"}}, "layers 0 is 'q8+zstd'; expected a codec"),
        ({"k": "q8", "v": "q4", "layers": {"0:raw;1": "q8"}}, "layers names '0:raw;1'; expected a number"),
        ({"k": "q8", "v": "q4", "stage": "gzip"}, "no byte stage is called 'gzip'"),
    ],
)
def test_what_is_wrong_is_said(wrong: object, message: str) -> None:
    with pytest.raises(ConfigError, match=r"page format") as caught:
        parse_format(wrong)
    assert message in str(caught.value)


@pytest.mark.parametrize("wrong", ["sparse24", "sparse24/q4", "q4;0-1:sparse24", "sparse24+zstd"])
def test_sparse_keys_are_refused_with_what_they_cost_and_how_to_have_them_nevertheless(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"ruins keys .*0\.43 nats of KL.*30 to 50 times.*write 'sparse24!'"):
        parse_format(wrong)


@pytest.mark.parametrize("name", ["q8/sparse24", "sparse24!", "sparse24!/q4", "q4;0-1:q8/sparse24"])
def test_sparse_values_and_forced_sparse_keys_are_formats(name: str) -> None:
    assert parse_format(name).name == name
