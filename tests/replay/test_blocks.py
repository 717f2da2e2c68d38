"""Block ids of growing prompts: equal exactly where everything up to the block's end is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvtier.replay.blocks import BlockIds, Prompt

pieces = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), min_size=1, max_size=6)


def spelled(said: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Every token of the prompt: (text, place in it)."""
    return [(text, place) for text, length in said for place in range(length)]


@given(one=pieces, other=pieces)
def test_ids_are_equal_where_the_tokens_up_to_there_are(one, other):
    blocks = BlockIds(4)
    prompts = [Prompt(blocks), Prompt(blocks)]
    for prompt, said in zip(prompts, (one, other), strict=True):
        for piece in said:
            prompt.add(*piece)
            prompt.ids()
    a, b = spelled(one), spelled(other)
    assert [prompt.tokens for prompt in prompts] == [len(a), len(b)]
    ids = [prompt.ids() for prompt in prompts]
    assert [len(own) for own in ids] == [-(-len(a) // 4), -(-len(b) // 4)]
    for place, (left, right) in enumerate(zip(*ids, strict=False)):
        if len(a) >= 4 * (place + 1) and len(b) >= 4 * (place + 1) and a[: 4 * (place + 1)] != b[: 4 * (place + 1)]:
            assert left != right
    if one == other:
        assert ids[0] == ids[1]


def test_a_text_that_goes_on_is_not_the_same_text_again():
    blocks = BlockIds(4)
    assert Prompt(blocks).add(7, 8).ids() != Prompt(blocks).add(7, 4).add(7, 4).ids()
