"""Block ids for prompts that are made up or converted: an id stands for everything from the start of the prompt to the block's end."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from kvtier.policy import ROOT


class BlockIds:
    """Hands out 0, 1, 2, ...: one for each content after each prefix."""

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self._ids: dict[tuple[int, Hashable], int] = {}

    def after(self, before: int, content: Hashable) -> int:
        """The id of the block with `content` after the block `before` (ROOT for none)."""
        return self._ids.setdefault((before, content), len(self._ids))

    def chain(self, contents: Sequence[Hashable]) -> list[int]:
        """The ids of a whole prompt, given what each of its blocks holds."""
        ids: list[int] = []
        before = ROOT
        for content in contents:
            before = self.after(before, content)
            ids.append(before)
        return ids


class Prompt:
    """A prompt that grows by pieces of texts. A text is only a number and counts as so many tokens; equal numbers, equal text."""

    def __init__(self, blocks: BlockIds) -> None:
        self.tokens = 0
        self._blocks = blocks
        self._full: list[int] = []
        self._open: list[tuple[int, int, int]] = []
        """What the last block holds so far: (text, first token of it, tokens)."""

    def add(self, text: int, tokens: int) -> Prompt:
        """Append the first `tokens` tokens of `text`."""
        first = 0
        while first < tokens:
            size = self._blocks.block_tokens
            taken = min(tokens - first, size - self.tokens % size)
            self._open.append((text, first, taken))
            first += taken
            self.tokens += taken
            if self.tokens % size == 0:
                self._full.append(self._blocks.after(self._full[-1] if self._full else ROOT, tuple(self._open)))
                self._open.clear()
        return self

    def ids(self) -> list[int]:
        """The ids of its blocks, the last of which may be partial."""
        if not self._open:
            return list(self._full)
        return [*self._full, self._blocks.after(self._full[-1] if self._full else ROOT, tuple(self._open))]
