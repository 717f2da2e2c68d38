"""Laws checked: texts are real, different and of the wanted length; files that cannot be played are named."""

from __future__ import annotations

import pytest

from kvtier.errors import ConfigError, KVTierError
from kvtier.quality.texts import beginnings, passages, read_texts


class Letters:
    """A token for every character."""

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


def test_passages_are_different_texts_of_prose_and_code():
    texts = passages(Letters(), 8, 2048)
    assert [len(text) for text in texts] == [2048] * 8
    assert len({tuple(text) for text in texts}) == 8
    words = ["".join(map(chr, text)) for text in texts]
    assert sum("self." in text for text in words[1::2]) > sum("self." in text for text in words[::2])
    assert passages(Letters(), 8, 2048) == texts


def test_more_text_than_there_is_is_an_error():
    with pytest.raises(KVTierError, match="too little text for 4 documents"):
        passages(Letters(), 4, 10**7)


def test_own_texts_are_cut_to_their_beginnings():
    assert beginnings(Letters(), ["abcdef", "ghijkl"], ["a", "b"], 3) == [[97, 98, 99], [103, 104, 105]]
    with pytest.raises(ConfigError, match=r"short\.txt has 2 tokens; expected at least 3"):
        beginnings(Letters(), ["abcdef", "gh"], ["long.txt", "short.txt"], 3)


def test_files_that_are_no_texts_are_named(tmp_path):
    (tmp_path / "good.txt").write_text("grün", encoding="utf-8")
    (tmp_path / "bad.bin").write_bytes(b"\xff\xfe\x00")
    assert read_texts([tmp_path / "good.txt"]) == ["grün"]
    for name, said in (("bad.bin", "not UTF-8"), ("missing.txt", "cannot be read"), (".", "cannot be read")):
        with pytest.raises(ConfigError, match=said):
            read_texts([tmp_path / name])
