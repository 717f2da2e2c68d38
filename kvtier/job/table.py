"""The result of the main job for the terminal: tables of tiers, links and times, the verdict below."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text


def print_result(console: Console, result: dict[str, Any]) -> None:
    """Everything a person wants to know after a run."""
    size, model = result["size"], result["model"]
    console.print(
        f"\n[bold]{model['name']}[/]: {size['sessions']} sessions x {size['turns']} turns, {size['tokens']:,} tokens = "
        f"{mib(size['kv_bytes'])} of KV, device holds {share(result, size)}. Policy {result['policy']}.\n",
        highlight=False,
    )
    console.print(Group(tiers(result), links(result), times(result), quality(result)))
    console.print(verdict(result))


def tiers(result: dict[str, Any]) -> RenderableType:
    """Pages per tier and why they left."""
    table = _table("tier", "format", "pages in", "served", "hit tokens", "in use", "evicted (why)")
    for name, tier in result["tiers"].items():
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(tier["evicted"].items())) or "-"
        used = f"{mib(tier['bytes_used'])} of {mib(tier['capacity_bytes'])}"
        table.add_row(name, tier["format"], f"{tier['pages_in']:,}", f"{tier['pages_served']:,}", f"{tier['hit_tokens']:,}", used, why)
    return table


def links(result: dict[str, Any]) -> RenderableType:
    """What crossed each link, and how much of the prefetched was there in time."""
    table = _table("link", "pages", "moved", "GB/s", "prefetched in time")
    hints = result["prefetch"]
    for name, link in result["links"].items():
        upwards = name.endswith("->device")
        in_time = f"{hints['in_time']:,} of {hints['issued']:,} (all links)" if upwards and hints["issued"] else "-"
        table.add_row(name, f"{link['pages']:,}", mib(link["bytes"]), f"{link['gb_per_s']:.2f}", in_time)
    return table


def times(result: dict[str, Any]) -> RenderableType:
    """Time to first token of returning sessions."""
    ttft = result["ttft_ms"]
    table = _table("time to first token, returning sessions", "median", "p95", "turns")
    for label, key in (
        ("recomputed", "recomputed"),
        ("restored", "restored"),
        ("  of these announced to the cache", "restored_hinted"),
        ("  of these by surprise", "restored_unhinted"),
    ):
        table.add_row(label, f"{ttft[key]['p50']:,.0f} ms", f"{ttft[key]['p95']:,.0f} ms", str(ttft[key]["count"]))
    table.add_row("restored is faster by (median of turns)", f"{ttft['speedup_p50']:.1f}x", "", "")
    return table


def quality(result: dict[str, Any]) -> RenderableType:
    """What the formats did to the model."""
    measured = result["quality"]
    table = _table("against the untiered run", "KL (nats)", "top-1 agreement", "perplexity", "tokens scored")
    table.add_row(
        "configured formats",
        f"{measured['kl']:.5f}",
        f"{measured['top1_agreement']:.1%}",
        f"{measured['perplexity_change']:+.2%}",
        f"{measured['scored_tokens']:,}",
    )
    same = "every generated token identical" if result["tokens_identical"] else "GENERATED TOKENS DIFFER"
    table.add_row("lossless formats", same, "", "", "")
    return table


def verdict(result: dict[str, Any]) -> RenderableType:
    """One line per check."""
    text = Text()
    for item in result["checks"]:
        text.append("  ok    " if item["passed"] else "  FAILED", style="green" if item["passed"] else "bold red")
        text.append(f"  {item['name']}", style="bold")
        text.append(f": {item['detail']}\n")
    text.append(f"  {result['seconds']:.0f} s on {result['machine']['cpu']}, {result['machine']['cores']} cores\n", style="dim")
    return text


def mib(size: float) -> str:
    """Bytes as MiB."""
    return f"{size / 2**20:,.1f} MiB"


def share(result: dict[str, Any], size: dict[str, Any]) -> str:
    """How much of the working set the device holds."""
    return f"{result['tiers']['device']['capacity_bytes'] / size['kv_bytes']:.0%}"


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 1, 0), collapse_padding=True)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="left" if "why" in name else "right")
    return table
