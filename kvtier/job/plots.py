"""The figures of the report, by matplotlib, which is imported only when one is drawn.

Colours stand for CSS variables of the page (`VARIABLES`), so figures follow its light, dark and printed look. Palette after Okabe and Ito.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvtier.job.table import count, data

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Result = dict[str, Any]
INK, MUTED, LINE, CARD = "#1d2126", "#5c6570", "#dfe2e6", "#fefefe"
BLUE, ORANGE, GREEN, PINK = "#0072b2", "#c75000", "#00805f", "#a8558a"
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", CARD: "card", BLUE: "blue", ORANGE: "orange", GREEN: "green", PINK: "pink"}
TIER_STYLES = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PINK, "D"))
"""Colour and marker of the tiers from the warmest: either tells them apart without the other."""
WIDTH_INCHES = 6.6
MOST_LABELLED_TURNS = 40


def arrow(link: str) -> str:
    """A link's name, typeset."""
    return link.replace("->", " → ")


@contextmanager
def look() -> Iterator[None]:
    """How all figures look. Text stays text, and nothing in it is taken for a formula."""
    from matplotlib import rc_context

    colours = {"text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": LINE, "xtick.color": MUTED, "ytick.color": MUTED}
    grid = {"grid.color": LINE, "grid.linewidth": 0.8, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False}
    ticks = {"xtick.labelcolor": MUTED, "ytick.labelcolor": INK, "xtick.major.size": 0, "ytick.major.size": 0}
    fonts = {"font.size": 10.5, "font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": "kvtier", "text.parse_math": False}
    settings: dict[Any, Any] = {**colours, **grid, **ticks, **fonts}
    with rc_context(settings):
        yield


def _axes(height_inches: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    return figure, figure.subplots()


def plot_speed(turns: list[Result], ttft: Result) -> Figure:
    """Each returning turn, restored and recomputed, on one line; medians and 95th percentiles across."""
    labelled = len(turns) <= MOST_LABELLED_TURNS
    figure, axes = _axes(1.5 + (0.28 * len(turns) if labelled else 6.0))
    rows = list(range(len(turns)))
    restored = [row["ttft_restored_ms"] / 1000 for row in turns]
    recomputed = [row["ttft_recomputed_ms"] / 1000 for row in turns]
    axes.hlines(rows, restored, recomputed, color=LINE, linewidth=3)
    axes.scatter(recomputed, rows, s=42, marker="s", color=ORANGE, label="recomputed", zorder=3)
    for hinted, label in ((True, "restored, announced"), (False, "restored, by surprise")):
        chosen = [row for row in rows if bool(turns[row]["hinted"]) == hinted]
        if chosen:
            face = BLUE if hinted else CARD
            times = [restored[row] for row in chosen]
            axes.scatter(times, chosen, s=42, facecolors=face, edgecolors=BLUE, linewidths=2, label=label, zorder=3)
    for key, colour, height in (("restored", BLUE, 13), ("recomputed", ORANGE, 2)):
        for value, style, name in ((ttft[key]["p50"], "--", "median"), (ttft[key]["p95"], ":", "p95")):
            axes.axvline(value / 1000, color=colour, linestyle=style, linewidth=1.3, zorder=1)
            left = name == "median"
            at: dict[str, Any] = {"ha": "right" if left else "left", "va": "bottom", "fontsize": 9.5, "color": colour}
            offset = (-3 if left else 3, height)
            axes.annotate(name, (value / 1000, 1), offset, xycoords=axes.get_xaxis_transform(), textcoords="offset points", **at)
    axes.set_yticks(rows if labelled else [], [f"session {row['session']}, turn {row['turn'] + 1}" for row in turns] if labelled else [])
    axes.set_ylim(len(turns) - 0.4, -0.6)
    axes.set_xlim(0, max(*restored, *recomputed) * 1.06)
    axes.set_xlabel("seconds to first token")
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    figure.legend(loc="outside upper left", ncols=3, frameon=False)
    return figure


def plot_residency(samples: list[Result], names: list[str], firsts: int) -> Figure:
    """Pages per tier after each turn; sessions begin to return after `firsts` turns."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes(3.6)
    turns = [item["turn"] + 1 for item in samples]
    top = max([1, *(item["pages"][name] for item in samples for name in names)])
    ends = {}
    for index, name in enumerate(names):
        colour, marker = TIER_STYLES[index % len(TIER_STYLES)]
        pages = [item["pages"][name] for item in samples]
        axes.fill_between(turns, pages, color=colour, alpha=0.08, linewidth=0)
        axes.plot(turns, pages, color=colour, marker=marker, markersize=5, linewidth=2)
        ends[name] = (pages[-1], colour)
    for name, height in _apart({name: value / top for name, (value, _) in ends.items()}, 0.09).items():
        value, colour = ends[name]
        at: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "va": "center", "color": colour, "annotation_clip": False}
        axes.annotate(f"{name} {count(value)}", (1.015, height * top), **at)
    if 0 < firsts < len(samples):
        axes.axvline(firsts + 0.5, color=MUTED, linestyle="--", linewidth=1)
        for text, side, offset in (("new sessions", "right", -5), ("sessions return", "left", 5)):
            beside: dict[str, Any] = {"textcoords": "offset points", "ha": side, "va": "bottom", "color": MUTED, "fontsize": 9.5}
            axes.annotate(text, (firsts + 0.5, top * 1.03), (offset, 0), **beside)
    axes.set_xlim(turns[0] - 0.3, turns[-1] + 0.3)
    axes.set_ylim(0, top * 1.12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("turn")
    axes.set_ylabel("pages")
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    return figure


def _apart(heights: dict[str, float], least: float) -> dict[str, float]:
    """The same heights, pushed upwards where two would be closer than `least`."""
    placed: dict[str, float] = {}
    floor = 0.0
    for name in sorted(heights, key=lambda name: heights[name]):
        placed[name] = max(heights[name], floor)
        floor = placed[name] + least
    return placed


def plot_links(links: Result, page_bytes: int) -> Figure:
    """Bytes per link, inside what the same pages weigh raw."""
    figure, axes = _axes(1.3 + 0.55 * len(links))
    rows = list(range(len(links)))
    moved = [link["bytes"] / 2**20 for link in links.values()]
    raw = [link["pages"] * page_bytes / 2**20 for link in links.values()]
    axes.barh(rows, raw, height=0.62, facecolor="none", edgecolor=MUTED, linestyle="--", linewidth=1, label="the same pages raw")
    axes.barh(rows, moved, height=0.62, color=BLUE, label="moved")
    for row, link in zip(rows, links.values(), strict=True):
        text = f"{data(link['bytes'])}, raw {data(link['pages'] * page_bytes)}"
        axes.annotate(text, (max(moved[row], raw[row]), row), (6, 0), textcoords="offset points", va="center", color=INK)
    axes.set_yticks(rows, [arrow(name) for name in links])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, max([1e-9, *moved, *raw]) * 1.5)
    axes.set_xlabel("MiB")
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside upper left", ncols=2, frameon=False)
    return figure
