"""Replays and traces for people: tables, and plots where matplotlib is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from kvtier.errors import KVTierError, needing
from kvtier.policy import LRU
from kvtier.replay.optimum import OPTIMUM
from kvtier.replay.runs import Row
from kvtier.replay.stats import Percentiles, TraceStats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def print_capacities(console: Console, rows: Sequence[Row]) -> None:
    """Per trace, policies by capacity: token hit ratios, and the share of the gap between LRU and the optimum that is closed."""
    for trace in _each(row.trace for row in rows):
        own = [row for row in rows if row.trace == trace]
        capacities = _each(row.capacity for row in own)
        at = {(row.policy, row.capacity): row for row in own}
        slowest = {name: min(row.accesses_per_s for row in own if row.policy == name) for name in _each(row.policy for row in own)}
        _heading(console, f"{trace}: token hit ratio; below, % of the gap from LRU to the optimum")
        table = _table(*capacities, "M/s")
        for name, speed in slowest.items():
            ratios = [_ratio(at[name, capacity].token_hit_ratio) for capacity in capacities]
            table.add_row(name, *ratios, f"{speed / 1e6:.3g}", style="bold" if name == OPTIMUM else "")
        compared = [name for name in slowest if name not in (LRU.name, OPTIMUM)]
        if compared:
            table.add_section()
        for name in compared:
            table.add_row(name, *(_percent(at[name, capacity].gap_closed) for capacity in capacities))
        console.print(table)
    console.print("M/s: million pages per second, harness and policy, at the slowest capacity", style="dim")


def print_tiers(console: Console, rows: Sequence[Row]) -> None:
    """Per trace and layout, policies by tier: where tokens were found, what moved, and what look-ahead brings in time."""
    for trace, capacity in _each((row.trace, row.capacity) for row in rows):
        own = [row for row in rows if (row.trace, row.capacity) == (trace, capacity)]
        names = [tier.name for tier in own[0].tiers]
        _heading(console, f"{trace}, {capacity}: token hit ratio")
        hits = _table(*names, "all", "gap %", "M/s")
        for row in own:
            ratios = [_ratio(tier.token_hit_ratio) for tier in row.tiers]
            hits.add_row(row.policy, *ratios, _ratio(row.token_hit_ratio), _percent(row.gap_closed), f"{row.accesses_per_s / 1e6:.3g}")
        console.print(hits)
        _heading(console, "moved")
        moved = _table("from", "to", "pages", "GB", "evicted")
        for row in own:
            evicted = {tier.name: tier.evicted_pages for tier in row.tiers}
            for move in row.moved:
                gone = f"{evicted[move.source]:,}" if names.index(move.source) < names.index(move.target) else ""
                moved.add_row(row.policy, move.source, move.target, f"{move.pages:,}", f"{move.bytes / 1e9:,.0f}", gone)
        console.print(moved)
        regretted = [(row, row.regret) for row in own if row.regret is not None]
        _heading(console, "worth a write down, or not; in brackets the pages that left and had to be computed again")
        regrets = _table("written", "refused", "left for room")
        for row, regret in regretted:
            refused, pushed_out = f"{regret.refused:,} ({regret.refused_wanted:,})", f"{regret.evicted:,} ({regret.evicted_wanted:,})"
            regrets.add_row(row.policy, f"{regret.admitted:,}", refused, pushed_out)
        console.print(regrets)
        timed = [(row, tier, tier.link) for row in own for tier in row.tiers if tier.link is not None]
        if timed:
            aheads = [f"{ahead:g}" for ahead in timed[0][2].in_place]
            _heading(console, "share of the bytes in place in time, by milliseconds of look-ahead")
            table = _table("from", "use", "stall ms", *aheads)
            for row, tier, link in timed:
                stall = "" if link.stall_ms is None else f"{link.stall_ms:.1f}"
                table.add_row(row.policy, tier.name, _ratio(link.use), stall, *map(_ratio, link.in_place.values()))
                table.add_row("  with the prefetcher's budget", "", "", "", *map(_ratio, link.prefetched.values()))
            console.print(table)
    console.print("gap %: of the way from one LRU tier of the same size to the optimum; M/s: million pages per second", style="dim")


def print_stats(console: Console, all_stats: Sequence[TraceStats]) -> None:
    """The figures of traces, a column each."""
    table = _table(*(stats.name for stats in all_stats))
    lines: list[tuple[str, list[str]]] = [
        ("requests", [f"{stats.requests:,}" for stats in all_stats]),
        ("span, s", [f"{stats.span_s:,.0f}" for stats in all_stats]),
        ("page accesses / distinct", [f"{stats.accesses:,} / {stats.distinct_pages:,}" for stats in all_stats]),
        ("infinite cache: token hit ratio", [_ratio(stats.infinite_token_hit_ratio) for stats in all_stats]),
        ("pages never reused", [f"{stats.never_reused_share:.1%}" for stats in all_stats]),
        ("most pages alive at once", [_share(stats.working_set.peak_pages, stats.distinct_pages) for stats in all_stats]),
    ]
    for label, field, places in (
        ("input tokens", "input_length", 0),
        ("output tokens", "output_length", 0),
        ("reuse distance, pages", "reuse_distance", 0),
        ("reuse gap, s", "reuse_gap_s", 1),
    ):
        values: list[Percentiles] = [getattr(stats, field) for stats in all_stats]
        for key in ("mean", "p10", "p50", "p90", "p99"):
            lines.append((f"{label}: {key}", [f"{own[key]:,.{places}f}" if own else "" for own in values]))
    for label, texts in lines:
        table.add_row(label, *texts)
    console.print(table)


def plot_capacities(rows: Sequence[Row], path: Path) -> None:
    """Token hit ratio over capacity, a line per policy, a panel per trace."""
    traces = _each(row.trace for row in rows)
    figure, panels = new_figure(len(traces), 4.2)
    for axes, trace in zip(panels, traces, strict=True):
        for name in _each(row.policy for row in rows):
            own = sorted((row.capacity_pages, row.token_hit_ratio) for row in rows if (row.trace, row.policy) == (trace, name))
            style = _PLOT_STYLES.get(name, {})
            axes.plot(*zip(*own, strict=True), marker=".", label=name, **style)
        axes.set(xscale="log", xlabel="capacity, pages (logarithmic)", ylabel="token hit ratio", title=trace)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    save_figure(figure, path)


def plot_tiers(rows: Sequence[Row], path: Path) -> None:
    """Where tokens were found: a bar per choice of policies, a colour per tier, a panel per trace and layout."""
    kinds = _each((row.trace, row.capacity) for row in rows)
    figure, panels = new_figure(len(kinds), 1.2 + 0.3 * len(_each(row.policy for row in rows)))
    for axes, (trace, capacity) in zip(panels, kinds, strict=True):
        own = [row for row in rows if (row.trace, row.capacity) == (trace, capacity)]
        left = [0.0] * len(own)
        for place, tier in enumerate(own[0].tiers):
            widths = [row.tiers[place].token_hit_ratio for row in own]
            axes.barh([row.policy for row in own], widths, left=left, label=tier.name)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.set(xlabel="token hit ratio", title=f"{trace}, {capacity}")
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)


def plot_stats(all_stats: Sequence[TraceStats], path: Path) -> None:
    """Pages named and alive over time, a panel per trace."""
    figure, panels = new_figure(len(all_stats), 3.2)
    for axes, stats in zip(panels, all_stats, strict=True):
        work = stats.working_set
        axes.plot(work.at_s, work.live_pages, label="alive: will be used again")
        axes.plot(work.at_s, work.named_pages, label=f"named in {work.step_s:.3g} s")
        axes.set(xlabel="seconds", ylabel="pages", title=stats.name, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    save_figure(figure, path)


_PLOT_STYLES: dict[str, dict[str, Any]] = {
    OPTIMUM: {"color": "black", "linestyle": "--"},
    LRU.name: {"color": "black", "linewidth": 2.0},
}


def _each(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _heading(console: Console, text: str) -> None:
    console.print(text, style="bold", soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold cyan")
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:+.0f}"


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})"


def new_figure(panels: int, height: float) -> tuple[Figure, list[Axes]]:
    with needing("report", "--plot", "matplotlib"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(8, height * panels), layout="constrained")
    return figure, list(figure.subplots(panels, squeeze=False)[:, 0])


def save_figure(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path)
    except OSError as error:
        raise KVTierError(f"--plot {path}: {error.strerror}; the rows are above") from None
