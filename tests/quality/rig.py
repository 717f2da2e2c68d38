"""A tiny random model whose predictions hang on its context, documents for it, and page formats that nobody registered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import LlamaForCausalLM

from kvtier.formats import Format, Payload
from kvtier.layout import PageLayout
from tests.engines.rig import SIZES, llama

VOCABULARY: int = SIZES["vocab_size"]


def make_model() -> LlamaForCausalLM:
    """Large weights: with the usual ones a random model predicts the same after every context."""
    return llama(3, initializer_range=0.15)


def make_documents(count: int = 2, tokens: int = 256) -> list[list[int]]:
    return torch.randint(VOCABULARY, (count, tokens), generator=torch.Generator().manual_seed(1)).tolist()


class Research(Format):
    """Pages as fp32 bytes, after `change`, which subclasses define."""

    name = "research"
    lossless = False
    fixed_size = True

    def change(self, pages: torch.Tensor) -> torch.Tensor:
        return pages

    def payload_bytes(self, layout):
        return layout.values * 4

    def encode(self, pages, layout, rows=None, out=None, first=()):
        return [page.numpy().reshape(-1).view(np.uint8) for page in self.change(pages.float()).contiguous()]

    def decode(self, payloads: Sequence[Payload], layout: PageLayout, layers=slice(None), out=None, rows=None):
        pages = [torch.from_numpy(payload.view(np.float32).copy()).view(layout.shape) for payload in payloads]
        return torch.stack(pages).to(layout.torch_dtype)


class Zeros(Research):
    name = "zeros"

    def change(self, pages):
        return torch.zeros_like(pages)


class ZeroValues(Research):
    name = "zero values"

    def change(self, pages):
        return pages * torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)


@dataclass(frozen=True)
class Noise(Research):
    """Each number is off by up to `share` of itself."""

    share: float

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"noise {self.share}"

    def change(self, pages):
        generator = torch.Generator().manual_seed(2)
        return pages * (1 + self.share * (2 * torch.rand(pages.shape, generator=generator) - 1))


@dataclass(frozen=True)
class Watching(Research):
    """Remembers the pages it was given, and which were marked as the first of a sequence."""

    seen: list[torch.Tensor] = field(default_factory=list)
    first: list[tuple[int, ...]] = field(default_factory=list)

    def encode(self, pages, layout, rows=None, out=None, first=()):
        self.seen.append(pages)
        self.first.append(tuple(first))
        return super().encode(pages, layout)


class Varying(Research):
    """Page i of a call takes i bytes more than its numbers."""

    name = "varying"
    fixed_size = False

    def payload_bytes(self, layout):
        return layout.values * 4 + 1000

    def encode(self, pages, layout, rows=None, out=None, first=()):
        return [np.concatenate((payload, np.zeros(extra, np.uint8))) for extra, payload in enumerate(super().encode(pages, layout))]

    def unpack(self, payloads, layout):
        return [payload[: layout.values * 4] for payload in payloads]
