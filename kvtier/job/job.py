"""Runs the main job: every turn is played untiered, through lossless tiers and through the configured tiers, side by side.

Side by side, because times taken minutes apart on a busy machine say nothing. The result is one plain dict, documented in docs/cli.md,
that the table, the JSON and the HTML page are all made from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from kvtier.cache import TieredKVCache
from kvtier.config import Config, Resolved
from kvtier.engines.models import LoadedModel
from kvtier.engines.transformers import layout_of
from kvtier.errors import ConfigError, ModelError
from kvtier.formats import get_format
from kvtier.job.play import Played, Untiered, greedy, recompute, tiered
from kvtier.job.workload import Size, Turn, plan
from kvtier.layout import PageLayout
from kvtier.machine import describe_machine
from kvtier.quality.scoring import Quality

PERPLEXITY_BOUND = 0.01
"""A profile whose pages change the perplexity by more than this share fails the check."""

Result = dict[str, Any]
Progress = Callable[[int, int, str], None]
"""Called with turns done, turns in all, and what is going on."""


def run_job(loaded: LoadedModel, size: Size, resolved: Resolved, store: Path | str, progress: Progress) -> Result:
    """Play the workload and compare. `store` is a directory for the disk tiers of this run.

    `resolved` gives formats, policies and mover; tier capacities follow from `size` unless they were set as arguments or in the
    environment.
    """
    started, store = time.monotonic(), Path(store)
    model = loaded.model
    turns = plan(size, loaded.tokenizer)
    _check_model(model, turns, size)
    config = fit(resolved, size, layout_of(model, resolved.config.pages.page_tokens), loaded, store / "tiered")
    layout = layout_of(model, config.pages.page_tokens)
    untiered = Untiered(model, layout.page_tokens)
    quality, timeline, rows = Quality(), list[Result](), list[Result]()
    greedy(model, turns[0].user_ids[:32], _empty(), 2)  # the first steps of a process are slow; they are nobody's figure
    histories: dict[int, list[int]] = {}
    with ExitStack() as stack:
        exact = TieredKVCache(lossless(config, layout, store / "lossless"), layout)
        stack.callback(exact.close, flush=False)  # nobody comes back to these stores
        cache = TieredKVCache(config, layout)
        stack.callback(cache.close, flush=False)
        for number, turn in enumerate(turns):
            progress(number, len(turns), f"session {turn.session}, turn {turn.index + 1}")
            prompt = histories.get(turn.session, []) + turn.user_ids
            salt = f"session-{turn.session}"
            probe = turn.probe_ids if turn.returning else []
            hint = _hint(cache, turns, number, histories)

            reference = untiered.play(turn.session, prompt, size.new_tokens, probe)
            same = tiered(model, exact, prompt, size.new_tokens, [], salt)
            exact.settle()
            played = tiered(model, cache, prompt, size.new_tokens, probe, salt, reference.tokens, hint)
            timeline.append(_sample(cache, number, time.monotonic() - started))
            if turn.returning:
                cache.settle()
                recomputed = {"ttft_recomputed_ms": recompute(model, prompt)}
                rows.append(_returned(number, turn, len(prompt), reference, same, played) | recomputed)
                assert reference.probe_logits is not None
                assert played.probe_logits is not None
                quality.add(reference.probe_logits, played.probe_logits, probe)
            else:
                rows.append({"session": turn.session, "turn": 0, "identical": same.tokens == reference.tokens})
            histories[turn.session] = prompt + reference.tokens
        progress(len(turns), len(turns), "done")
        cache.settle()
        result = _result(rows, quality, cache, exact)
    result |= {
        "timeline": timeline,
        "turns": rows,
        "size": asdict(size) | {"tokens": size.tokens, "kv_bytes": size.tokens * layout.token_bytes},
        "model": {"name": loaded.name, "layout": str(layout), "page_bytes": layout.page_bytes},
        "machine": describe_machine(),
        "seconds": round(time.monotonic() - started, 1),
    }
    return result


def _returned(number: int, turn: Turn, prompt_tokens: int, reference: Played, same: Played, played: Played) -> Result:
    """What is told of the turn of a session that came back: untiered, through lossless tiers, through the configured ones."""
    return {
        "session": turn.session,
        "turn": turn.index,
        "prompt_tokens": prompt_tokens,
        "expected_tokens": reference.reused,
        "restored_tokens": played.reused,
        "hinted": _hinted(number),
        "ttft_restored_ms": played.ttft_ms,
        "ttft_lossless_ms": same.ttft_ms,
        "identical": same.tokens == reference.tokens and same.reused == reference.reused,
    }


# -- configuration ---------------------------------------------------------------------------------------------------------------------


def fit(resolved: Resolved, size: Size, layout: PageLayout, loaded: LoadedModel, path: Path) -> Config:
    """The configuration with tiers sized to the workload, so that it does not fit into device and host together."""
    config = resolved.config
    pages = -(-size.tokens // layout.page_tokens)
    derived = {"device.capacity_bytes": int(pages * size.device_share) * layout.page_bytes}
    if config.host is not None:
        derived["host.capacity_bytes"] = int(pages * size.host_share) * get_format(config.host.format).payload_bytes(layout)
    if config.disk is not None:
        derived["disk.capacity_bytes"] = pages * (get_format(config.disk.format).payload_bytes(layout) + 8192)
    given = {key for key, origin in resolved.origins.items() if origin.kind in ("argument", "environment")}
    changes: dict[str, object] = {key: value for key, value in derived.items() if key not in given}
    changes |= {"model.name": loaded.name, "model.revision": loaded.revision}
    if config.disk is not None and "disk.path" not in given:
        changes["disk.path"] = str(path)
    fitted = _changed(config, changes)
    if fitted.device.capacity_bytes < (size.session_tokens // layout.page_tokens + 1) * layout.page_bytes:
        raise ConfigError(
            f"device.capacity_bytes is {fitted.device.capacity_bytes}: not even one session of {size.session_tokens} tokens fits; "
            "give the device a larger share (--device-share), or play more sessions (--sessions), of all of which it is a share"
        )
    return fitted


def _check_model(model: Any, turns: list[Turn], size: Size) -> None:
    """ModelError if the model cannot read this workload: too long for its positions, or tokens its vocabulary lacks."""
    config = model.config.get_text_config()
    longest = size.session_tokens + size.probe_tokens
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise ModelError(f"sessions grow to {longest} tokens, but the model has {positions} positions; give fewer --context-tokens")
    largest = max(max(turn.user_ids + turn.probe_ids) for turn in turns)
    if largest >= config.vocab_size:
        raise ModelError(
            f"the tokenizer gives token {largest}, but the model's vocabulary has {config.vocab_size}; they do not belong together"
        )


def lossless(config: Config, layout: PageLayout, path: Path) -> Config:
    """The same tiers, holding as many pages, in formats that give every bit back."""
    changes: dict[str, object] = {}
    if config.host is not None:
        slots = config.host.capacity_bytes // get_format(config.host.format).payload_bytes(layout)
        changes |= {"host.format": "raw", "host.capacity_bytes": slots * layout.page_bytes}
    if config.disk is not None:
        record = get_format(config.disk.format).payload_bytes(layout) + 8192
        slots = config.disk.capacity_bytes // record
        changes |= {"disk.format": "raw+lz4", "disk.path": str(path), "disk.capacity_bytes": slots * (layout.page_bytes + 8192)}
    return _changed(config, changes)


def _changed(config: Config, changes: Mapping[str, object]) -> Config:
    values = config.model_dump()
    for key, value in changes.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        what = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in what["loc"])
        raise ConfigError(
            f"{key} comes to {what['input']!r} for this workload, which cannot be: {what['msg']}; give it more room"
        ) from None


# -- hints and samples -----------------------------------------------------------------------------------------------------------------


def _hinted(number: int) -> bool:
    """Every other turn is announced to the cache beforehand, as a scheduler would; the others come as a surprise."""
    return number % 2 == 1


def _hint(cache: TieredKVCache, turns: list[Turn], number: int, histories: dict[int, list[int]]) -> Callable[[], None]:
    """What the scheduler says when the first token of turn `number` is out: who is next."""

    def hint() -> None:
        session = turns[number + 1].session if number + 1 < len(turns) else None
        if _hinted(number + 1) and session in histories:
            cache.prefetch(histories[session], salt=f"session-{session}")

    return hint


def _sample(cache: TieredKVCache, turn: int, seconds: float) -> Result:
    tiers: Any = cache.stats()["tiers"]
    return {"turn": turn, "seconds": round(seconds, 2), "pages": {name: tier["pages"] for name, tier in tiers.items()}}


def _empty() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


# -- results ---------------------------------------------------------------------------------------------------------------------------


def _result(rows: list[Result], quality: Quality, cache: TieredKVCache, exact: TieredKVCache) -> Result:
    stats: Any = cache.stats()
    returning = [row for row in rows if row["turn"]]
    restored = [row["ttft_restored_ms"] for row in returning]
    recomputed = [row["ttft_recomputed_ms"] for row in returning]
    ttft: Result = {
        "restored": percentiles(restored),
        "recomputed": percentiles(recomputed),
        "restored_hinted": percentiles([row["ttft_restored_ms"] for row in returning if row["hinted"]]),
        "restored_unhinted": percentiles([row["ttft_restored_ms"] for row in returning if not row["hinted"]]),
        "lossless": percentiles([row["ttft_lossless_ms"] for row in returning]),
        "speedup_p50": float(np.median(np.array(recomputed) / np.array(restored))),
    }
    identical = all(row["identical"] for row in rows)
    measured = quality.result()
    idle = [name for name, tier in stats["tiers"].items() if not tier["pages_in"] or not tier["pages_served"]]
    short = [row for row in returning if row["restored_tokens"] < row["expected_tokens"]]
    refused = {name: tier["refused"] for name, tier in stats["tiers"].items() if tier["refused"]}
    checks = [
        check("lossless tokens identical", identical, "generated tokens through raw pages equal those of the untiered run"),
        check("every tier received and served pages", not idle, f"idle: {', '.join(idle)}" if idle else "none was idle"),
        check("every returning session came back whole", not short, f"{len(short)} of {len(returning)} turns restored less than was kept"),
        check("no page was refused", not refused, f"refused: {refused}" if refused else "all pages were stored and verified"),
        check(
            f"perplexity within {PERPLEXITY_BOUND:.0%} of untiered",
            abs(measured["perplexity_change"]) <= PERPLEXITY_BOUND,
            f"{measured['perplexity_change']:+.3%} over {measured['scored_tokens']} tokens",
        ),
        check(
            "restoring is faster than recomputing",
            ttft["restored"]["p50"] < ttft["recomputed"]["p50"],
            f"median {ttft['restored']['p50']:.0f} ms against {ttft['recomputed']['p50']:.0f} ms",
        ),
    ]
    return {
        "tiers": stats["tiers"],
        "links": stats["links"],
        "prefetch": stats["prefetch"],
        "policy": stats["policy"],
        "ttft_ms": ttft,
        "tokens_identical": identical,
        "quality": measured,
        "lossless": {key: exact.stats()[key] for key in ("tiers", "links")},
        "checks": checks,
        "passed": all(item["passed"] for item in checks),
    }


def check(name: str, passed: bool, detail: str) -> Result:
    """One line of the verdict."""
    return {"name": name, "passed": bool(passed), "detail": detail}


def percentiles(values: list[float]) -> dict[str, float]:
    """Median, 95th percentile and count, in the unit of the values; zeros for none."""
    if not values:
        return {"p50": 0.0, "p95": 0.0, "count": 0}
    return {"p50": float(np.percentile(values, 50)), "p95": float(np.percentile(values, 95)), "count": len(values)}
