"""The result of the main job for the terminal, for 80 columns and more: tiers, links, times, quality, and the verdict below."""

from __future__ import annotations

import math
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Result = dict[str, Any]
ROUTES = (
    ("recomputed", "recomputed"),
    ("restored", "restored"),
    ("  announced to the cache", "restored_hinted"),
    ("  by surprise", "restored_unhinted"),
    ("restored, lossless formats", "lossless"),
)
"""How a returning session can get its first token, and the key of its times in the result."""


def print_result(console: Console, result: Result) -> None:
    """Everything a person wants to know after a run."""
    parts = (headline(result), tiers(result), links(result), times(result), quality(result), verdict(result))
    console.print(Group(*(Padding(part, (1, 1, 0, 1)) for part in parts), ""), highlight=False)


def headline(result: Result) -> RenderableType:
    """What was played, and how much of it the device could hold."""
    size = result["size"]
    text = Text(result["model"]["name"], style="bold")
    text.append(
        f"\n{size['sessions']} sessions x {size['turns']} turns, {count(size['tokens'])} tokens, policy {result['policy']}",
        style="not bold",
    )
    held = data(result["tiers"]["device"]["capacity_bytes"])
    text.append(f"\n{data(size['kv_bytes'])} of KV; the device holds {held} of it ({share(result)})", style="not bold")
    return text


def tiers(result: Result) -> RenderableType:
    """Pages per tier; why they left or were refused stands below."""
    table = _table("Tier", "format", "pages in", "served", "hit tokens", "evicted", "in use")
    for name, tier in result["tiers"].items():
        gone = count(sum(tier["evicted"].values())) if tier["evicted"] else "-"
        table.add_row(
            Text(name), tier["format"], count(tier["pages_in"]), count(tier["pages_served"]), count(tier["hit_tokens"]), gone, room(tier)
        )
    notes = Text()
    for key, verb, style in (("evicted", "evicted from", "dim"), ("refused", "REFUSED by", "bold red")):
        for name, tier in result["tiers"].items():
            if tier[key]:
                notes.append(f"{verb} {name}: {reasons(tier[key])}\n", style=style)
    notes.rstrip()
    return Group(table, notes) if notes else table


def links(result: Result) -> RenderableType:
    """What crossed each link, and what became of the prefetched pages."""
    table = _table("Link", "transfers", "pages", "moved", "as raw pages", "GB/s")
    for name, link in result["links"].items():
        raw = link["pages"] * result["model"]["page_bytes"]
        speed = decimal(link["gb_per_s"], 3)
        table.add_row(Text(name), count(link["transfers"]), count(link["pages"]), data(link["bytes"]), data(raw), speed)
    return Group(table, Text(prefetched(result), style="dim")) if result["links"] else Text("No page crossed a link.")


def times(result: Result) -> RenderableType:
    """Time to first token of returning sessions, and a bar of each median."""
    ttft = result["ttft_ms"]
    if not ttft["restored"]["count"]:
        return Text("No session returned: there are no times to compare.")
    table = _table("Time to first token", "median", "p95", "turns", "")
    slowest = max(ttft[key]["p50"] for _, key in ROUTES)
    for label, key in ROUTES:
        if ttft[key]["count"]:
            bar = ProgressBar(total=slowest, completed=ttft[key]["p50"], width=16, complete_style="cyan", finished_style="yellow")
            table.add_row(label, milliseconds(ttft[key]["p50"]), milliseconds(ttft[key]["p95"]), count(ttft[key]["count"]), bar)
    factor = Text.assemble(
        "Restoring was ", (f"{decimal(ttft['speedup_p50'], 1)}x", "bold green"), " faster (median over the returning turns)."
    )
    return Group(table, factor)


def quality(result: Result) -> RenderableType:
    """What the formats did to the model."""
    measured = result["quality"]
    table = _table("Against the untiered run", "KL (nats)", "same top token", "perplexity", "scored")
    table.add_row(
        "configured formats",
        decimal(measured["kl"], 5),
        percent(measured["top1_agreement"], 1),
        percent(measured["perplexity_change"], 2, "+"),
        f"{count(measured['scored_tokens'])} tokens",
    )
    if result["tokens_identical"]:
        return Group(table, Text("Through lossless formats every generated token was identical.", style="dim"))
    return Group(table, Text("Through lossless formats GENERATED TOKENS DIFFERED.", style="bold red"))


def verdict(result: Result) -> RenderableType:
    """One line per check, then the sum of them and the machine."""
    lines = Table.grid(padding=(0, 2, 0, 0))
    for item in result["checks"]:
        mark = Text("ok", style="green") if item["passed"] else Text("FAILED", style="bold red")
        lines.add_row(mark, Text.assemble((item["name"], "bold"), f": {item['detail']}"))
    failed = sum(not item["passed"] for item in result["checks"])
    total = len(result["checks"])
    style = "bold red" if failed else "bold green"
    summary = Text(f"FAILED: {failed} of {total} checks" if failed else f"PASSED: all {total} checks", style=style)
    machine = result["machine"]
    summary.append(f"   {result['seconds']:.0f} s on {machine['cpu']}, {machine['cores']} cores", style="not bold dim default")
    return Group(lines, "", summary)


# -- words and figures, also for the HTML page -----------------------------------------------------------------------------------------


def data(size: float) -> str:
    """Bytes in the largest binary unit that fits: 120913920 -> "115.3 MiB"."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size:,.0f} B"


def room(tier: Result) -> str:
    """Used and whole capacity of a tier, the unit said once where it is the same."""
    used, capacity = data(tier["bytes_used"]), data(tier["capacity_bytes"])
    number, _, unit = used.partition(" ")
    return f"{number} of {capacity}" if capacity.endswith(f" {unit}") else f"{used} of {capacity}"


def count(number: float) -> str:
    """A whole number with separators."""
    return f"{number:,.0f}"


def decimal(value: float, digits: int) -> str:
    """A number, or a dash for what could not be measured."""
    return f"{value:,.{digits}f}" if math.isfinite(value) else "-"


def percent(share: float, digits: int, sign: str = "") -> str:
    """A share as percent, or a dash for what could not be measured."""
    return f"{share:{sign}.{digits}%}" if math.isfinite(share) else "-"


def milliseconds(value: float) -> str:
    """A time in milliseconds."""
    return f"{decimal(value, 0 if value >= 10 else 2)} ms"


def reasons(counts: dict[str, int]) -> str:
    """Counts by reason, the most frequent first."""
    return ", ".join(f"{count(number)} {reason}" for reason, number in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def share(result: Result) -> str:
    """How much of the working set the device holds."""
    return percent(result["tiers"]["device"]["capacity_bytes"] / result["size"]["kv_bytes"], 0)


def prefetched(result: Result) -> str:
    """What became of the pages that hints asked for, as a sentence."""
    hints = result["prefetch"]
    if not hints["issued"] and not hints["over_budget"]:
        return "Nothing was prefetched."
    fates = f"{count(hints['in_time'])} in time, {count(hints['late'])} late, {count(hints['wasted'])} wasted"
    return f"Prefetched {count(hints['issued'])} pages: {fates} ({count(hints['over_budget'])} more over budget)."


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold cyan", border_style="dim")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="left" if name in ("", "format") else "right")
    return table
