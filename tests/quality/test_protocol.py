"""Laws checked: the shares of the protocol are those of its documentation, and sizes that cannot be are named with one that can."""

from __future__ import annotations

import re

import pytest

from kvtier.errors import ConfigError
from kvtier.quality.protocol import Protocol


def test_the_default_is_the_protocol_of_the_documents():
    protocol = Protocol()
    assert (protocol.context_tokens, protocol.scored_tokens, protocol.repeated_tokens) == (1536, 320, 128)
    assert protocol.as_json(8)["recall_scored_tokens"] == 119


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"tokens": 128}, "--tokens is 128; expected at least 256"),
        ({"page_tokens": 0}, "--page-tokens is 0"),
        ({"tokens": 2050}, "multiple of 64, such as 2048"),
        ({"tokens": 260, "page_tokens": 100}, "multiple of 400, such as 400"),
    ],
)
def test_impossible_sizes_are_refused(sizes, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        Protocol(**sizes)
