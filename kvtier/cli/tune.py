"""`kvtier tune`: searches the keys that replay can judge; writes a configuration only if it is better on requests it was not chosen on."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvtier.cli.app import app
from kvtier.cli.output import JsonOption, check_json_target, check_not_read, check_writable, human_console, write_json
from kvtier.cli.reading import BlockTokensOption, PlotOption, TracesArgument, progress_bar, read_traces
from kvtier.errors import KVTierError

if TYPE_CHECKING:
    from kvtier.config import Config
    from kvtier.replay.trace import Trace
    from kvtier.tune.rooms import Room
    from kvtier.tune.space import Raw

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
    from kvtier.replay.show import check_plot_target
    from kvtier.tune.annotated import commented_yaml, require_ruamel
    from kvtier.tune.evidence import Evidence, heading, plot_trials, print_evidence, write_whole
    from kvtier.tune.judge import Judge, check_replayable, mean_first
    from kvtier.tune.search import StudyFile, require_optuna
    from kvtier.tune.space import Space

    require_optuna()
    require_ruamel()
    target = _target(out, config)
    limit_s = _seconds(time_limit)
    names = check_policies(policy.split(","))
    check_json_target(json, [*traces, *([config] if config else []), target])
    check_not_read("--out", target, traces)
    check_plot_target(plot)
    check_writable("--plot", plot)
    given = load_config(config, env={})
    console = human_console(json)
    _one_way_to_size(capacity, tiers, page_bytes)
    loaded = read_traces(console, traces, block_tokens)
    rooms = _rooms(given, loaded, capacity, tiers or [], page_bytes)
    space = Space.of(given, names, rooms[0].names[1:])
    check_replayable(given, rooms)
    judge = Judge(loaded, rooms)

    def candidate(raw: Raw) -> Config:
        return load_config(config, env={}, overrides=space.values(raw))

    named = "the defaults" if config is None else config.name
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
        bar(0, trials, f"replaying {named}")
        before = judge.both_halves(given)
        compared = mean_first(before)

        def progress(done: int, share: float, best: float | None) -> None:
            leads = "" if best is None else f"best {best:.4f}, "
            bar(int((done + share) * BAR_STEPS), trials * BAR_STEPS, f"trial {done + 1}: {leads}{named} {compared:.4f}")

        def replay(raw: Raw, step: Callable[[float], None]) -> float:
            return judge.first_half(candidate(raw), lambda requests: step(requests / judge.requests))

        try:
            found = file.search(space, space.first_points(given), replay, trials, limit_s, progress)
        except KeyboardInterrupt:
            human_console("-").print(f"interrupted: {len(file.trials())} trials are in {kept}; the same command goes on from there")
            raise
        best = found.best
        bar(1, 1, "checking on the second half")
        tuned = candidate(best.raw)
        after = judge.both_halves(tuned)
    if abs(mean_first(after) - best.ratio) > 1e-9:
        again = f"{best.ratio:.6f} in {kept}, {mean_first(after):.6f} now"
        raise KVTierError(f"the best trial does not come out again ({again}): kvtier has changed since; remove {kept} to start anew")
    values = space.values(best.raw)
    evidence = Evidence(
        config=named,
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
        plot_trials([trial.ratio for trial in found.trials], compared, plot)
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
    from kvtier.config.units import parse_bytes
    from kvtier.tune.rooms import room_implied, rooms_given

    if page_bytes is None:
        return rooms_given(given, capacity, tiers)
    try:
        size = parse_bytes(page_bytes)
    except ValueError as error:
        raise KVTierError(f"--page-bytes {page_bytes}: {error}") from None
    if not size:
        raise KVTierError(f"--page-bytes {page_bytes}: expected more than 0")
    return [room_implied(given, loaded, size)]


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
