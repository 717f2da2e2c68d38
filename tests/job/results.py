"""A small hand-made result of the main job, with figures that occur nowhere else, and its edge cases."""

from __future__ import annotations

import math
from typing import Any

Result = dict[str, Any]


def make_result() -> Result:
    """Three tiers, two sessions, two returning turns, one failed check."""
    turns = [
        {"session": 0, "turn": 0, "identical": True},
        {"session": 1, "turn": 0, "identical": True},
        _turn(1, True, 101.0, 111.0, 1515.0),
        _turn(0, False, 203.0, 213.0, 2436.0),
    ]
    return {
        "tiers": {
            "device": _tier("raw", 64 * 2**20, pages_in=2011, served=331, evicted={"room needed": 1789, "score under threshold": 7}),
            "host": _tier("q8", 16 * 2**20, pages_in=1223, served=457, evicted={"room needed": 877}),
            "disk": _tier("q4", 96 * 2**20, pages_in=1013, served=563, refused={"checksum": 3}),
        },
        "links": {
            "device->host": _link(61, 1223, 71 * 2**20, 0.611),
            "host->device": _link(29, 457, 37 * 2**20, 0.823),
            "host->disk": _link(67, 1013, 43 * 2**20, 0.127),
            "disk->device": _link(23, 563, 53 * 2**20, 0.359),
        },
        "prefetch": {"issued": 283, "in_time": 229, "late": 13, "wasted": 41, "over_budget": 17},
        "policy": "lru",
        "ttft_ms": {
            "restored": {"p50": 152.0, "p95": 198.0, "count": 2},
            "recomputed": {"p50": 1975.0, "p95": 2389.0, "count": 2},
            "restored_hinted": {"p50": 101.0, "p95": 103.0, "count": 1},
            "restored_unhinted": {"p50": 203.0, "p95": 207.0, "count": 1},
            "lossless": {"p50": 162.0, "p95": 208.0, "count": 2},
            "speedup_p50": 13.5,
        },
        "tokens_identical": True,
        "quality": {
            "scored_tokens": 1279,
            "kl": 0.00197,
            "delta_nll": 0.00241,
            "top1_agreement": 0.978,
            "perplexity_untiered": 8.957,
            "perplexity_change": 0.00243,
        },
        "lossless": {"tiers": {}, "links": {}},
        "checks": [
            {"name": "lossless tokens identical", "passed": True, "detail": "all equal"},
            {"name": "no page was refused", "passed": False, "detail": "refused: 3 checksum"},
        ],
        "passed": False,
        "timeline": [
            {"turn": number, "seconds": 1.5 * number, "pages": {"device": 59 + number, "host": 30 * number, "disk": 97 * number}}
            for number in range(len(turns))
        ],
        "turns": turns,
        "size": {"sessions": 2, "turns": 2, "context_tokens": 1400, "device_share": 0.25, "tokens": 4567, "kv_bytes": 256 * 2**20},
        "model": {"name": "Tiny-7M", "layout": "[4 layers, 2 planes, 16 tokens, 2 heads, 64] fp32", "page_bytes": 737280},
        "machine": {
            "cpu": "Abacus 9",
            "cores": 2,
            "memory_bytes": 3 * 2**30,
            "gpus": [],
            "system": "Linux 6",
            "python": "3.11.7",
            "torch": "2.9",
        },
        "seconds": 183.3,
    }


def with_tiers(*names: str) -> Result:
    """Only these tiers and the links between them."""
    result = make_result()
    result["tiers"] = {name: result["tiers"][name] for name in names}
    result["links"] = {name: link for name, link in result["links"].items() if set(name.split("->")) <= set(names)}
    for sample in result["timeline"]:
        sample["pages"] = {name: sample["pages"][name] for name in names}
    return result


def without_returning_turns() -> Result:
    """No session came back: nothing was timed, nothing scored."""
    result = make_result()
    result["turns"], result["timeline"] = result["turns"][:2], result["timeline"][:2]
    none = {"p50": 0.0, "p95": 0.0, "count": 0}
    result["ttft_ms"] = {key: dict(none) for key in result["ttft_ms"] if key != "speedup_p50"} | {"speedup_p50": math.nan}
    result["quality"] = dict.fromkeys(result["quality"], math.nan) | {"scored_tokens": 0}
    result["prefetch"] = dict.fromkeys(result["prefetch"], 0)
    return result


def _turn(session: int, hinted: bool, restored: float, lossless: float, recomputed: float) -> Result:
    return {
        "session": session,
        "turn": 1,
        "prompt_tokens": 1693,
        "expected_tokens": 1649,
        "restored_tokens": 1633,
        "hinted": hinted,
        "ttft_restored_ms": restored,
        "ttft_lossless_ms": lossless,
        "ttft_recomputed_ms": recomputed,
        "identical": True,
    }


def _tier(
    name: str, capacity: int, pages_in: int, served: int, evicted: dict[str, int] | None = None, refused: dict[str, int] | None = None
) -> Result:
    return {
        "format": name,
        "capacity_bytes": capacity,
        "bytes_used": capacity * 3 // 4,
        "pressure": 0.75,
        "pages": 167,
        "pages_in": pages_in,
        "pages_served": served,
        "hit_tokens": served * 16,
        "pages_recovered": 0,
        "evicted": evicted or {},
        "refused": refused or {},
        "achieved": {"place": "cpu", "mlock": True, "slots": 88},
    }


def _link(transfers: int, pages: int, moved: int, speed: float) -> Result:
    return {"transfers": transfers, "pages": pages, "bytes": moved, "seconds": moved / speed / 1e9, "gb_per_s": speed}
