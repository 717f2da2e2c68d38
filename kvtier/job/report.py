"""The result of the main job as one self-contained HTML page: figures, captions, tables.

The frame of the page, with its style, is page.html beside this file; the figures are drawn in plots.py, tables made in markup.py.
"""

from __future__ import annotations

import importlib.util
import json
from datetime import datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from kvtier.errors import KVTierError, MissingExtra
from kvtier.job.markup import html_card, html_figure, html_table
from kvtier.job.plots import arrow, look, plot_links, plot_residency, plot_speed
from kvtier.job.table import count, data, decimal, milliseconds, percent, prefetched, reasons, room, share

Result = dict[str, Any]


def check_writable(path: Path) -> None:
    """Find out before a long run whether its report can be written. MissingExtra without matplotlib, KVTierError for an unusable path."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("the report draws its figures with matplotlib, which is not installed; pip install 'kvtier[report]'")
    new = not path.exists()
    try:
        with path.open("ab"):
            pass
        if new:
            path.unlink()
    except OSError as error:
        raise _unwritable(path, error) from None


def write_report(result: Result, path: Path) -> None:
    """Write the page for `result` (see `kvtier.job.job`) to `path`, over what is there. Raises as `check_writable`."""
    check_writable(path)
    frame = Template((files("kvtier.job") / "page.html").read_text(encoding="utf-8"))
    with look():
        page = frame.substitute(_head(result) | _sections(result))
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> KVTierError:
    return KVTierError(f"the report cannot be written to {path}: {error.strerror}; name a file in a directory that exists and is yours")


# -- the parts of the page -------------------------------------------------------------------------------------------------------------


def _head(result: Result) -> dict[str, str]:
    size, ttft, measured = result["size"], result["ttft_ms"], result["quality"]
    failed = [item["name"] for item in result["checks"] if not item["passed"]]
    total = len(result["checks"])
    word = f'<span class="verdict good">Passed: all {total} checks</span>'
    if failed:
        word = f'<span class="verdict bad">Failed: {len(failed)} of {total} checks</span>'
    lead = f"{data(size['kv_bytes'])} of KV went through a device that holds {data(result['tiers']['device']['capacity_bytes'])}. "
    cards = [("KV against device", data(size["kv_bytes"]), f"{share(result)} fits the device")]
    if ttft["restored"]["count"]:
        factor = decimal(ttft["speedup_p50"], 1)
        lead += f"A returning session had its first token {factor} times sooner restored than recomputed (median of the turns)."
        cards.append(("First token, restored", milliseconds(ttft["restored"]["p50"]), f"p95 {milliseconds(ttft['restored']['p95'])}"))
        cards.append(("First token, recomputed", milliseconds(ttft["recomputed"]["p50"]), f"p95 {milliseconds(ttft['recomputed']['p95'])}"))
    if failed:
        lead += f" Not met: {', '.join(failed)}."
    change = percent(measured["perplexity_change"], 2, "+")
    cards.append(("Perplexity change", change, f"{count(measured['scored_tokens'])} tokens scored"))
    return {
        "title": escape(result["model"]["name"]),
        "verdict": word,
        "lead": escape(lead),
        "cards": '<dl class="cards">' + "".join(html_card(*card) for card in cards) + "</dl>",
        "footer": escape(f"Written by kvtier run on {datetime.now():%Y-%m-%d %H:%M}. The run took {result['seconds']:.0f} s."),
        "json": escape(json.dumps(result, indent=1)),
    }


def _sections(result: Result) -> dict[str, str]:
    return (
        _speed(result)
        | _residency(result)
        | _links(result)
        | {
            "tiers_table": _tiers(result),
            "quality_text": escape(_quality_text(result)),
            "quality_table": _quality(result),
            "checks_table": _checks(result),
            "turns_table": _turns(result),
            "machine_table": _machine(result),
        }
    )


def _speed(result: Result) -> dict[str, str]:
    turns, ttft = _returning(result), result["ttft_ms"]
    if not turns:
        return {"speed_text": "No session returned in this run, so there is nothing to compare.", "speed_figure": ""}
    text = (
        "When a session comes back, its KV is either brought up from the tiers or computed again from its tokens. Each of the "
        f"{len(turns)} returning turns was timed both ways, one right after the other."
    )
    caption = (
        "Time to first token of each returning turn, in the order played; shorter is better. Dashed lines are medians, dotted lines 95th "
        f"percentiles. Restored: {_middle(ttft['restored'])}. Recomputed: {_middle(ttft['recomputed'])}. "
    )
    hinted, surprise = ttft["restored_hinted"], ttft["restored_unhinted"]
    if hinted["count"] and surprise["count"]:
        caption += (
            f"Turns announced to the cache beforehand (filled dots): {_middle(hinted)}. Turns that came by surprise (hollow dots): "
            f"{_middle(surprise)}. "
        )
    caption += f"Restored through lossless formats: {_middle(ttft['lossless'])}."
    return {"speed_text": text, "speed_figure": html_figure("speed", plot_speed(turns, ttft), "Time to first token", caption)}


def _residency(result: Result) -> dict[str, str]:
    samples, names = result["timeline"], list(result["tiers"])
    text = "A page may be in several tiers at once: a copy further down lets the one above leave without moving bytes."
    if not samples:
        return {"residency_text": "Nothing was sampled in this run.", "residency_figure": ""}
    last = ", ".join(f"{count(samples[-1]['pages'][name])} on {name}" for name in names)
    firsts = sum(not row["turn"] for row in result["turns"])
    caption = f"Pages in each tier after each turn. At the end: {last}."
    if 0 < firsts < len(result["turns"]):
        caption += f" Up to turn {firsts} sessions are new and fill the tiers from the top down; from then on they return."
    rows = [[str(item["turn"] + 1), decimal(item["seconds"], 1), *(count(item["pages"][name]) for name in names)] for item in samples]
    table = html_table("Pages in each tier after each turn", ["turn", "seconds", *names], rows)
    figure = html_figure("residency", plot_residency(samples, names, firsts), "Pages per tier over the run", caption)
    return {"residency_text": text, "residency_figure": f"{figure}<details><summary>These figures as a table</summary>{table}</details>"}


def _links(result: Result) -> dict[str, str]:
    links, page_bytes = result["links"], result["model"]["page_bytes"]
    if not links:
        return {"links_text": "No page crossed a link in this run.", "links_figure": "", "links_table": ""}
    moved = sum(link["bytes"] for link in links.values())
    raw = sum(link["pages"] for link in links.values()) * page_bytes
    caption = f"Bytes that crossed each link, and what the same pages would weigh raw. All together {data(moved)} instead of {data(raw)}."
    rows = [
        [
            arrow(name),
            count(link["transfers"]),
            count(link["pages"]),
            data(link["bytes"]),
            data(link["pages"] * page_bytes),
            f"{decimal(link['seconds'], 2)} s",
            f"{decimal(link['gb_per_s'], 3)} GB/s",
        ]
        for name, link in links.items()
    ]
    head = ["link", "transfers", "pages", "moved", "as raw pages", "worker time", "speed"]
    note = "Speed is encoded bytes per second of worker time: reading, verifying, coding and writing included."
    return {
        "links_text": escape(f"Pages travel in the format of the colder tier. {prefetched(result)}"),
        "links_figure": html_figure("links", plot_links(links, page_bytes), "Bytes per link", caption),
        "links_table": html_table(note, head, rows),
    }


def _tiers(result: Result) -> str:
    rows = [
        [
            name,
            tier["format"],
            room(tier),
            count(tier["pages"]),
            count(tier["pages_in"]),
            count(tier["pages_served"]),
            count(tier["hit_tokens"]),
            reasons(tier["evicted"]) or "none",
            reasons(tier["refused"]) or "none",
        ]
        for name, tier in result["tiers"].items()
    ]
    note = f"Served: pages a request found in, or got from, this tier. Eviction policy: {result['policy']}."
    head = ["tier", "format", "in use", "pages", "pages in", "served", "hit tokens", "evicted", "refused"]
    return html_table(note, head, rows, text=("format", "evicted", "refused"))


def _quality_text(result: Result) -> str:
    turns = len(result["turns"])
    if result["tokens_identical"]:
        return f"Through lossless formats, every token generated in all {turns} turns equals that of the untiered run."
    differing = sum(not row["identical"] for row in result["turns"])
    return f"Through lossless formats, the tokens generated in {differing} of {turns} turns differ from the untiered run's. They must not."


def _quality(result: Result) -> str:
    measured = result["quality"]
    rows = [
        ["KL divergence of the next-token distribution", f"{decimal(measured['kl'], 5)} nats"],
        ["Same most likely token", percent(measured["top1_agreement"], 2)],
        ["Perplexity, untiered", decimal(measured["perplexity_untiered"], 3)],
        ["Perplexity, change", percent(measured["perplexity_change"], 3, "+")],
        ["Log-likelihood lost per token", f"{decimal(measured['delta_nll'], 5)} nats"],
        ["Tokens scored", count(measured["scored_tokens"])],
    ]
    return html_table(
        "The configured formats, on real text after each returning turn, against the untiered run.", ["measure", "value"], rows
    )


def _checks(result: Result) -> str:
    rows = [["ok" if item["passed"] else "FAILED", item["name"], item["detail"]] for item in result["checks"]]
    return html_table("", ["", "check", "what was seen"], rows, text=("check", "what was seen"))


def _turns(result: Result) -> str:
    turns = _returning(result)
    if not turns:
        return "<p>No session returned.</p>"
    rows = [
        [
            f"session {row['session']}, turn {row['turn'] + 1}",
            count(row["prompt_tokens"]),
            f"{count(row['restored_tokens'])} of {count(row['expected_tokens'])}",
            "yes" if row["hinted"] else "no",
            milliseconds(row["ttft_restored_ms"]),
            milliseconds(row["ttft_lossless_ms"]),
            milliseconds(row["ttft_recomputed_ms"]),
            f"{decimal(row['ttft_recomputed_ms'] / row['ttft_restored_ms'], 1)}x",
            "yes" if row["identical"] else "NO",
        ]
        for row in turns
    ]
    head = ["turn", "prompt", "tokens kept", "hint", "restored", "lossless", "recomputed", "faster", "identical"]
    note = (
        "Tokens kept: restored, of those computed before. Hint: the cache was told beforehand. Times are to the first token. Lossless: the "
        "same tiers with formats that give every bit back, whose tokens must be identical to those of the untiered run."
    )
    return html_table(note, head, rows)


def _machine(result: Result) -> str:
    machine, size, model = result["machine"], result["size"], result["model"]
    values = machine | {"memory_bytes": data(machine["memory_bytes"]), "gpus": ", ".join(machine["gpus"]) or "none"}
    rows = [[_words(key), str(value)] for key, value in values.items()]
    rows += [["page layout", model["layout"]], ["page size", data(model["page_bytes"])]]
    rows += [[_words(key), data(value) if key.endswith("_bytes") else str(value)] for key, value in size.items()]
    for name, tier in result["tiers"].items():
        achieved = [f"{_words(key)} {value}" for key, value in tier["achieved"].items() if isinstance(value, bool | str)]
        rows.append([f"{name} tier", ", ".join(achieved)])
    return html_table("", ["what", "value"], rows, text=("value",))


def _returning(result: Result) -> list[Result]:
    return [row for row in result["turns"] if row["turn"]]


def _middle(times: Result) -> str:
    return f"median {milliseconds(times['p50'])}, p95 {milliseconds(times['p95'])}"


def _words(key: str) -> str:
    return key.removesuffix("_bytes").replace("_", " ")
