"""What the cache costs work that never finds anything in it.

The same stream of requests with and without the cache, taking turns: a prompt nobody sent before is computed at once, then new tokens one
by one. With the cache, each request looks its prompt up, appends the prompt's KV and that of each new token, and lets go. The tiers are
full from the start, so every page that is committed pushes another one from the device to the host, and one from there to the disk, in the
background, as the default write policies have it; time goes on until that is done.

The engine is synthetic: the matrix products of a model of SmolLM2-135M's size with random weights, per token and layer, in fp32 on CPUs;
KV comes out as bf16. Or, with a model, transformers computes, and the cache holds KV in the model's own dtype and gets it at the end of
each request.

- `no-reuse.overhead`: time with the cache over time without, less 1; 0.03 is 3 %. Median of the pairs of turns that were next to each
  other.
- `no-reuse.overhead.cpu`: the same of the CPU seconds of all threads. An engine that uses all cores waits for the core that the cache
  takes, spinning, so this may be more than what the cache's own threads took: `no-reuse.cache_cpu`, as a share of the CPU seconds without.
- `no-reuse.seconds`, `no-reuse.cpu_seconds`: of one request with the cache; the ceiling is without it; less is better.
- `no-reuse.caller`: share of the time that the engine's own thread spends in calls of the cache (0 with a model: it cannot be told apart).
- `no-reuse.pages.TIER`: pages that came into a tier per request, so that one sees that work was done.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from kvtier.cache import TieredKVCache
from kvtier.errors import KVTierError, ModelError
from kvtier.layout import PageLayout

from .codecs import LAYOUTS
from .measure import Row, Run
from .rig import TINY_LAYOUT, Room, device, made_kv, open_cache, token_ids

SYNTHETIC = "synthetic"
HIDDEN, INTERMEDIATE, VOCABULARY = 576, 1536, 49152
"""SmolLM2-135M's."""
TINY_VOCABULARY = 512
REQUESTS_PER_TURN = 2
DEVICE_REQUESTS, HOST_REQUESTS, DISK_REQUESTS = 4, 8, 16
"""How many requests' pages each tier holds."""


@dataclass
class Spent:
    """What a turn took, per request, in seconds.

    `caller_s`: in calls of the cache on the engine's thread. `cache_cpu_s`: CPU of the cache's own threads.
    """

    wall_s: float
    cpu_s: float
    caller_s: float
    cache_cpu_s: float


class Engine(Protocol):
    """Computes requests, with a cache or without."""

    layout: PageLayout

    def play(self, request: int, cache: TieredKVCache | None) -> float:
        """Compute one request; seconds spent in calls of the cache, as far as the engine can tell."""


def measure(run: Run, model: str = SYNTHETIC, prompt_tokens: int = 512, new_tokens: int = 32, path: Path | None = None) -> list[Row]:
    """The rows. `model`: "synthetic", "packaged" (SmolLM2-135M-Instruct) or a Hugging Face folder; files go into `path`.

    KVTierError for too few tokens, ModelError for a folder that is no model, MissingExtra without what a model needs.
    """
    if run.tiny:
        prompt_tokens, new_tokens = min(prompt_tokens, 64), min(new_tokens, 20)
    if prompt_tokens < 1 or new_tokens < 1:
        raise KVTierError(f"--prompt-tokens {prompt_tokens} --new-tokens {new_tokens}: expected at least 1 of each")
    run.expect(run.repeats + 2)
    run.step("preparing the engine")
    engine = _engine(model, prompt_tokens, new_tokens, run.tiny)
    layout = engine.layout
    tokens = (prompt_tokens + new_tokens) // layout.page_tokens * layout.page_tokens
    pages = max(1, tokens // layout.page_tokens)
    room = Room(DEVICE_REQUESTS * pages + 1, host=HOST_REQUESTS * pages, disk=DISK_REQUESTS * pages)
    options = {"mover__clean_pressure": 0.7, "mover__queue_bytes": "256MiB", "policy__cleanup_interval": 60.0, "model__name": "no-reuse"}
    with open_cache(layout, room, path, **options) as cache:
        kv = made_kv(layout, pages * layout.page_tokens)
        for number in range(DEVICE_REQUESTS + HOST_REQUESTS + DISK_REQUESTS):
            cache.put(token_ids(-number & 0xFFFFFFFF, pages * layout.page_tokens), kv)
        cache.settle()
        turns = Turns(engine, cache)
        turns.play(None)
        turns.play(cache)
        before = _pages_in(cache)
        pairs = []
        for number in range(run.repeats):
            run.step("requests with and without the cache")
            first, second = (None, cache) if number % 2 else (cache, None)
            pair = {given is not None: turns.play(given) for given in (first, second)}
            pairs.append((pair[True], pair[False]))
        came = {tier: pages - before[tier] for tier, pages in _pages_in(cache).items()}
    return _rows(pairs, came)


@dataclass
class Turns:
    """Plays turns of requests that no turn played before."""

    engine: Engine
    cache: TieredKVCache
    played: int = field(default=1 << 32)

    def play(self, cache: TieredKVCache | None) -> Spent:
        """One turn with `cache` or without; what is moved because of it has arrived at the end."""
        wall, cpu, cache_cpu, caller = time.perf_counter(), time.process_time(), _cache_cpu_s(), 0.0
        for _ in range(REQUESTS_PER_TURN):
            self.played += 1
            caller += self.engine.play(self.played, cache)
        if cache is not None:
            cache.settle()
        count = REQUESTS_PER_TURN
        ends = time.perf_counter() - wall, time.process_time() - cpu, caller, _cache_cpu_s() - cache_cpu
        return Spent(*(each / count for each in ends))


def _rows(pairs: list[tuple[Spent, Spent]], came: dict[str, int]) -> list[Row]:
    def median(of: Callable[[Spent, Spent], float]) -> float:
        return statistics.median([of(*pair) for pair in pairs])

    return [
        Row("no-reuse.overhead", median(lambda has, bare: has.wall_s / bare.wall_s - 1), "share"),
        Row("no-reuse.overhead.cpu", median(lambda has, bare: has.cpu_s / bare.cpu_s - 1), "share"),
        Row("no-reuse.cache_cpu", median(lambda has, bare: has.cache_cpu_s / bare.cpu_s), "share"),
        Row("no-reuse.caller", median(lambda has, _: has.caller_s / has.wall_s), "share"),
        Row("no-reuse.seconds", median(lambda has, _: has.wall_s), "s", median(lambda _, bare: bare.wall_s)),
        Row("no-reuse.cpu_seconds", median(lambda has, _: has.cpu_s), "s", median(lambda _, bare: bare.cpu_s)),
        *(Row(f"no-reuse.pages.{tier}", pages / len(pairs) / REQUESTS_PER_TURN, "pages") for tier, pages in came.items()),
    ]


def _pages_in(cache: TieredKVCache) -> dict[str, int]:
    return {name: int(tier["pages_in"]) for name, tier in cache.stats()["tiers"].items()}


def _cache_cpu_s() -> float:
    """CPU seconds of the cache's own threads so far."""
    own = [thread.ident for thread in threading.enumerate() if thread.ident is not None and thread.name.startswith("kvtier")]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(thread)) for thread in own)


def _engine(model: str, prompt_tokens: int, new_tokens: int, tiny: bool) -> Engine:
    if model == SYNTHETIC:
        return SyntheticEngine(
            TINY_LAYOUT if tiny else LAYOUTS["smollm2"], prompt_tokens, new_tokens, TINY_VOCABULARY if tiny else VOCABULARY
        )
    folder = None if model == "packaged" else Path(model)
    if folder is not None and not folder.is_dir():
        raise ModelError(f"--model {model}: expected {SYNTHETIC}, packaged or the folder of a Hugging Face model")
    return ModelEngine(folder, prompt_tokens, new_tokens)


class SyntheticEngine:
    """The matrix products of one model per token, without attention: it would add work that the cache does not touch."""

    def __init__(self, layout: PageLayout, prompt_tokens: int, new_tokens: int, vocabulary: int) -> None:
        self.layout = layout
        self._prompt_tokens, self._new_tokens = prompt_tokens, new_tokens
        self._kv_width = layout.planes * layout.kv_heads * layout.head_dim
        generator = torch.Generator().manual_seed(0)
        dtype = torch.bfloat16 if device().type == "cuda" else torch.float32

        def weights(*shape: int) -> torch.Tensor:
            made: torch.Tensor = torch.randn(shape, generator=generator) * shape[-2] ** -0.5
            return made.to(device=device(), dtype=dtype)

        layers = layout.layers
        self._attention_in = weights(layers, HIDDEN, HIDDEN + self._kv_width)
        self._attention_out = weights(layers, HIDDEN, HIDDEN)
        self._up = weights(layers, HIDDEN, 2 * INTERMEDIATE)
        self._down = weights(layers, INTERMEDIATE, HIDDEN)
        self._head = weights(HIDDEN, vocabulary)

    @torch.inference_mode()
    def play(self, request: int, cache: TieredKVCache | None) -> float:
        """The prompt at once, then token by token. With a cache, seconds in its calls."""
        ids = token_ids(request, self._prompt_tokens + self._new_tokens)
        prompt = ids[: self._prompt_tokens]
        if cache is None:
            self._compute(len(prompt))
            for _ in range(self._new_tokens):
                self._compute(1)
            return 0.0
        start = time.perf_counter()
        with cache.acquire(cache.lookup(prompt)) as lease:
            lease.wait()
            if lease.tokens:
                raise KVTierError(f"{lease.tokens} tokens of a request that is new were found; these figures would mean nothing")
            spent = time.perf_counter() - start
            for first, stop in [(0, len(prompt)), *((place, place + 1) for place in range(len(prompt), len(ids)))]:
                kv = self._compute(stop - first)
                start = time.perf_counter()
                if cache.append(lease, ids[first:stop], kv) < stop - first:
                    raise KVTierError("the device had no room for one request; these figures would mean nothing")
                spent += time.perf_counter() - start
            start = time.perf_counter()
        return spent + time.perf_counter() - start

    def _compute(self, tokens: int) -> torch.Tensor:
        """One step over `tokens` tokens; their KV, `[layers, planes, tokens, kv_heads, head_dim]`."""
        layout = self.layout
        kv = torch.empty(
            (layout.layers, layout.planes, tokens, layout.kv_heads, layout.head_dim), dtype=layout.torch_dtype, device=device()
        )
        state = torch.ones((tokens, HIDDEN), dtype=self._head.dtype, device=self._head.device)
        for layer in range(layout.layers):
            fresh = state @ self._attention_in[layer]
            kv[layer] = fresh[:, HIDDEN:].reshape(tokens, layout.planes, layout.kv_heads, layout.head_dim).transpose(0, 1)
            state = torch.tanh(state + fresh[:, :HIDDEN] @ self._attention_out[layer])
            gate, up = (state @ self._up[layer]).chunk(2, -1)
            state = torch.tanh(state + (torch.nn.functional.silu(gate) * up) @ self._down[layer])
        int((state[-1] @ self._head).argmax())  # a step ends when its token is known
        return kv


class ModelEngine:
    """A model of transformers; what the cache's calls take cannot be told apart from what the model takes."""

    def __init__(self, folder: Path | None, prompt_tokens: int, new_tokens: int) -> None:
        from kvtier.engines.models import load_model
        from kvtier.engines.transformers import layout_of

        self._model: Any = load_model(folder).model
        self.layout = layout_of(self._model)
        self._prompt_tokens, self._new_tokens = prompt_tokens, new_tokens

    def play(self, request: int, cache: TieredKVCache | None) -> float:
        """Greedy tokens after a random prompt."""
        from transformers import DynamicCache

        from kvtier.job.play import greedy, tiered

        vocabulary = int(self._model.config.get_text_config().vocab_size)
        prompt = np.random.default_rng(request).integers(0, vocabulary, self._prompt_tokens).tolist()
        if cache is None:
            greedy(self._model, prompt, DynamicCache(), self._new_tokens)
        else:
            tiered(self._model, cache, prompt, self._new_tokens, [], "")
        return 0.0
