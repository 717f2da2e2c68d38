"""`kvtier tune`: searches the keys that replay can judge; writes a configuration only if it is better on requests it was not chosen on."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvtier.cli.app import app
from kvtier.cli.output import JsonOption, check_apart, check_json_target, check_plot_target, human_console, write_json
from kvtier.cli.reading import BlockTokensOption, PlotOption, TracesArgument, progress_bar, read_traces
from kvtier.cli.values import parse_some
from kvtier.errors import KVTierError

if TYPE_CHECKING:
    from rich.console import Console

    from kvtier.config import Config
    from kvtier.replay.runs import Progress
    from kvtier.replay.trace import Trace
    from kvtier.tune.evidence import Evidence
    from kvtier.tune.judge import Cell, Judge
    from kvtier.tune.rooms import Room
    from kvtier.tune.search import Outcome, StudyFile
    from kvtier.tune.space import Raw, Space

BAR_STEPS = 100
"""Steps of the progress bar in one trial."""


@app.command()
def tune(
    traces: TracesArgument,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="The configuration to better. Default: all defaults.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The configuration to write, if it is better.")] = None,
    policy: Annotated[str, typer.Option(metavar="NAME,...", help="Eviction policies to choose from, or all.")] = "all",
    capacity: Annotated[
        str | None, typer.Option(metavar="SIZE,...", help="One tier: shares of the distinct pages or numbers of pages; their mean counts.")
    ] = None,
    tiers: Annotated[
        list[str] | None, typer.Option(metavar="NAME=SIZE,...", help="Several tiers, warmest first: device=1%,host=9%. Repeatable.")
    ] = None,
    page_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Raw bytes of a page of the trace: tiers hold what the configuration's bytes hold.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="How many configurations to replay in all.")] = 80,
    time_limit: Annotated[str, typer.Option(metavar="TIME", help="End the search after 90s, 5m, 1h; the check comes on top.")] = "10m",
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds make equal searches.")] = 0,
    study: Annotated[Path | None, typer.Option(metavar="FILE", help="Keeps the trials: a second run goes on. Default: OUT.study.")] = None,
    block_tokens: BlockTokensOption = 512,
    json: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Search for a better policy, its parameters and write policies on the first half of traces; check it on the second."""
    from kvtier import __version__
    from kvtier.config import load_config
    from kvtier.replay.capacities import check_policies
    from kvtier.tune.annotated import require_ruamel
    from kvtier.tune.evidence import Evidence, plot_trials, print_evidence
    from kvtier.tune.judge import Judge, check_replayable, mean_first
    from kvtier.tune.search import StudyFile, require_optuna
    from kvtier.tune.space import Space

    require_optuna()
    require_ruamel()
    target = _target(out, config)
    limit_s = _seconds(time_limit)
    names = check_policies(policy.split(","))
    check_apart({"--out": target, "--json": json, "--plot": plot}, traces)
    check_apart({"--json": json, "--plot": plot}, [config] if config else [])
    check_json_target(json)
    check_plot_target(plot)
    given = load_config(config, env={})
    console = human_console(json)
    _one_way_to_size(capacity, tiers, page_bytes)
    loaded = read_traces(console, traces, block_tokens)
    rooms = _rooms(given, loaded, capacity, tiers or [], page_bytes)
    space = Space.of(given, names, rooms[0].names[1:])
    check_replayable(given, rooms)
    wanted = _Wanted(config, given, space, Judge(loaded, rooms), trials, limit_s)
    question = {
        "traces": " ".join(trace.fingerprint for trace in loaded),
        "configuration": given.model_dump_json(),
        "rooms": repr([room.capacities for room in rooms]),
        "choices": repr(space),
        "seed": str(seed),
        "version": __version__,
    }
    kept = study or target.with_name(f"{target.name}.study")
    with progress_bar(console) as bar, StudyFile(kept, question, seed) as file:
        found, before, after = _search(wanted, file, bar)
    values = space.values(found.best.raw)
    evidence = Evidence(
        config=wanted.named,
        given=before,
        tuned=after,
        values=values,
        before={key: getattr(getattr(given, key.partition(".")[0]), key.partition(".")[2]) for key in values},
        trials=len(found.trials),
        seed=seed,
        ended=found.ended,
        command=_command(traces, config, out, policy, capacity, tiers or [], page_bytes, seed, block_tokens),
        version=__version__,
    )
    print_evidence(console, evidence)
    console.print(f"{len(found.trials)} trials, {found.replayed} of them now, in {kept}; ended by: {found.ended}", style="dim")
    if plot is not None:
        plot_trials([trial.ratio for trial in found.trials], mean_first(before), plot)
    _write(console, evidence, config, target, json)


@dataclass(frozen=True)
class _Wanted:
    """A search: the configuration to better and the file it is from, what may be chosen, what judges it, and how long."""

    config: Path | None
    given: Config
    space: Space
    judge: Judge
    trials: int
    limit_s: float

    @property
    def named(self) -> str:
        return "the defaults" if self.config is None else self.config.name

    def candidate(self, raw: Raw) -> Config:
        from kvtier.config import load_config

        return load_config(self.config, env={}, overrides=self.space.values(raw))


def _search(wanted: _Wanted, file: StudyFile, bar: Progress) -> tuple[Outcome, list[Cell], list[Cell]]:
    """What was tried; what the given configuration and the best one find on both halves. KVTierError if that is not what the study says."""
    from kvtier.tune.judge import mean_first

    judge, trials = wanted.judge, wanted.trials
    bar(0, trials, f"replaying {wanted.named}")
    before = judge.both_halves(wanted.given)
    compared = f"{wanted.named} {mean_first(before):.4f}"

    def progress(done: int, share: float, best: float | None) -> None:
        leads = "" if best is None else f"best {best:.4f}, "
        bar(int((done + share) * BAR_STEPS), trials * BAR_STEPS, f"trial {done + 1}: {leads}{compared}")

    def replay(raw: Raw, step: Callable[[float], None]) -> float:
        return judge.first_half(wanted.candidate(raw), lambda requests: step(requests / judge.requests))

    try:
        found = file.search(wanted.space, wanted.space.first_points(wanted.given), replay, trials, wanted.limit_s, progress)
    except KeyboardInterrupt:
        human_console("-").print(f"interrupted: {len(file.trials())} trials are in {file.path}; the same command goes on from there")
        raise
    best = found.best
    bar(1, 1, "checking on the second half")
    after = judge.both_halves(wanted.candidate(best.raw))
    if abs(mean_first(after) - best.ratio) > 1e-9:
        again = f"{best.ratio:.6f} in {file.path}, {mean_first(after):.6f} now"
        raise KVTierError(f"the best trial does not come out again ({again}): kvtier has changed since; remove {file.path} to start anew")
    return found, before, after


def _write(console: Console, evidence: Evidence, config: Path | None, target: Path, json: str | None) -> None:
    """Write the configuration and the JSON. Exit code 1 if there is no better configuration."""
    from kvtier.tune.annotated import commented_yaml
    from kvtier.tune.evidence import heading, write_whole

    if evidence.refusal is None:
        write_whole(target, commented_yaml(config, evidence.values, evidence.before, heading(evidence)))
        console.print(f"{target}: written")
    write_json(evidence.as_json(str(target)), json)
    if evidence.refusal is not None:
        human_console("-").print(f"nothing written: {evidence.refusal}", soft_wrap=True)
        raise typer.Exit(1)


def _target(out: Path | None, config: Path | None) -> Path:
    if out is None:
        raise KVTierError("nowhere to write: give --out FILE, the tuned configuration")
    if config is not None and out.exists() and out.samefile(config):
        raise KVTierError(f"--out {out} is the --config; name another file, so that both can be compared")
    if out.is_dir() or not out.parent.is_dir():
        raise KVTierError(f"--out {out}: expected a file in an existing directory")
    return out


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(s|m|h)?", text.strip())
    seconds = float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2] or "s"] if match else 0.0
    if not seconds:
        raise KVTierError(f"--time-limit {text}: expected a time above 0, like 90s, 5m or 1h")
    return seconds


def _one_way_to_size(capacity: str | None, tiers: list[str] | None, page_bytes: str | None) -> None:
    ways = {"--capacity": capacity, "--tiers": tiers, "--page-bytes": page_bytes}
    used = [option for option, value in ways.items() if value]
    if len(used) > 1:
        raise KVTierError(f"{' and '.join(used)} both say how much the tiers hold; give one of them")
    if not used:
        raise KVTierError(
            "how many pages of the trace do the tiers hold? give --capacity 5% (one tier), --tiers device=1%,host=9% (several), or "
            "--page-bytes 64MiB, what a page of the trace takes raw, from which the configuration's capacities follow"
        )


def _rooms(given: Config, loaded: list[Trace], capacity: str | None, tiers: list[str], page_bytes: str | None) -> list[Room]:
    from kvtier.tune.rooms import room_implied, rooms_given

    if page_bytes is None:
        return rooms_given(given, capacity, tiers)
    return [room_implied(given, loaded, parse_some("--page-bytes", page_bytes))]


def _command(
    traces: list[Path],
    config: Path | None,
    out: Path | None,
    policy: str,
    capacity: str | None,
    tiers: list[str],
    page_bytes: str | None,
    seed: int,
    block_tokens: int,
) -> str:
    """What makes the same search, as it would be typed."""
    options = {"--config": config, "--out": out, "--policy": policy, "--capacity": capacity, "--page-bytes": page_bytes}
    words = ["kvtier", "tune", *map(str, traces)]
    words += [word for option, value in options.items() if value is not None for word in (option, str(value))]
    words += [word for text in tiers for word in ("--tiers", text)]
    return shlex.join([*words, "--seed", str(seed), "--block-tokens", str(block_tokens)])
