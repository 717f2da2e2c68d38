"""`kvtier numa plan|apply|verify|report|undo`: processes bound to sockets by a configuration. Only `apply --apply` changes anything."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvtier.cli.numa import app
from kvtier.cli.output import JsonOption, check_json_target, human_console, write_json
from kvtier.errors import NumaError

if TYPE_CHECKING:
    from rich.console import Console

    from kvtier.numa.plan import BindingPlan, Slot
    from kvtier.numa.topology import Topology

ConfigOption = Annotated[Path, typer.Option("--config", metavar="FILE", help="Patterns and policy, YAML or JSON; see configs/numa/.")]
UndoOption = Annotated[Path, typer.Option("--undo-file", metavar="FILE", help="What was before, so that it can be put back.")]
_UNDO_FILE = Path("numa_undo.json")


@app.command()
def plan(
    config: ConfigOption,
    start: Annotated[bool, typer.Option("--start", help="Only the commands that start services bound; none has to run.")] = False,
    json: JsonOption = None,
) -> None:
    """Which process and thread belongs where. Changes nothing."""
    from kvtier.numa.plan import make_slots
    from kvtier.numa.plan_config import load_plan_config
    from kvtier.numa.report import start_commands
    from kvtier.numa.topology import read_topology

    check_json_target(json)
    console = human_console(json)
    if start:
        slots = make_slots(load_plan_config(config), read_topology())
        for line in start_commands(slots):
            console.print(line, soft_wrap=True)
        write_json({"slots": [asdict(slot) for slot in slots], "commands": start_commands(slots)}, json)
        return
    made, _ = _planned(config)
    _show(console, made)
    write_json(_as_json(made), json)


@app.command()
def apply(
    config: ConfigOption,
    really: Annotated[bool, typer.Option("--apply", help="Do it; without this nothing is changed.")] = False,
    move_memory: Annotated[bool, typer.Option("--move-memory", help="Also move pages that exist already to the nodes planned.")] = False,
    undo_file: UndoOption = _UNDO_FILE,
    json: JsonOption = None,
) -> None:
    """Bind running processes as planned, each whole or not at all. Exit code 1 if one could not be."""
    from kvtier.numa.apply import apply_plan

    check_json_target(json)
    console = human_console(json)
    made, topology = _planned(config)
    _show(console, made)
    if not really:
        console.print("Dry run: nothing was changed. Add --apply to bind these processes.")
        write_json({**_as_json(made), "applied": None}, json)
        return
    outcomes = apply_plan(made, topology, undo_file, move_memory)
    for outcome in outcomes:
        left = f", {outcome.pages_left} pages could not be moved" if outcome.pages_left else ""
        console.print(f"process {outcome.pid}: {outcome.why or f'{outcome.threads} threads bound{left}'}")
    console.print(f"`kvtier numa undo --undo-file {undo_file}` puts back what was before; `kvtier numa verify` reads back what is now.")
    write_json({**_as_json(made), "applied": [asdict(outcome) for outcome in outcomes], "undo_file": str(undo_file)}, json)
    if any(outcome.why for outcome in outcomes):
        raise typer.Exit(1)


@app.command()
def verify(config: ConfigOption, json: JsonOption = None) -> None:
    """Read back affinities, memory policies and where pages are. Exit code 1 if anything is not as planned."""
    from kvtier.numa.verify import verify_plan

    check_json_target(json)
    console = human_console(json)
    made, _ = _planned(config)
    checked = verify_plan(made)
    for difference in checked.differences:
        console.print(f"differs: {difference}", soft_wrap=True)
    console.print(f"{checked.threads} threads of {checked.processes} processes looked at: {len(checked.differences)} differences.")
    write_json(asdict(checked), json)
    if checked.differences:
        raise typer.Exit(1)


@app.command()
def report(
    config: ConfigOption,
    output: Annotated[str | None, typer.Option(metavar="FILE|-", help="Where to write; default: `report` of the configuration.")] = None,
) -> None:
    """Plan, what was read back, and the commands that start services bound, as Markdown."""
    from kvtier.numa.report import markdown
    from kvtier.numa.verify import verify_plan

    made, topology = _planned(config)
    text = markdown(made, topology, verify_plan(made))
    target = output or made.config.report
    if target == "-":
        typer.echo(text, nl=False)
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        raise NumaError(f"cannot write the report {target}: {error.strerror}; name another file with --output") from None
    typer.echo(f"wrote {target}")


@app.command()
def undo(undo_file: UndoOption = _UNDO_FILE, json: JsonOption = None) -> None:
    """Put back the affinities of before `apply --apply`. Exit code 1 if one could not be. Pages that were moved stay."""
    from kvtier.numa.apply import undo as put_back

    check_json_target(json)
    outcomes = put_back(undo_file)
    console = human_console(json)
    for outcome in outcomes:
        console.print(f"process {outcome.pid}: {outcome.why or f'{outcome.threads} threads as before'}")
    write_json([asdict(outcome) for outcome in outcomes], json)
    if undo_file.exists():
        raise typer.Exit(1)


def _planned(config: Path) -> tuple[BindingPlan, Topology]:
    from kvtier.numa.allowed import read_allowed
    from kvtier.numa.plan import make_plan
    from kvtier.numa.plan_config import load_plan_config
    from kvtier.numa.processes import list_processes
    from kvtier.numa.topology import read_topology

    settings = load_plan_config(config)
    topology = read_topology()
    return make_plan(settings, topology, list_processes(), lambda pid: read_allowed(topology, pid=pid)), topology


def _show(console: Console, made: BindingPlan) -> None:
    from rich.markup import escape
    from rich.table import Table

    from kvtier.numa.ids import format_ids
    from kvtier.numa.verify import policy_text

    table = Table("slot", "socket", "pid", "threads", "CPUs", "memory", "command", box=None, header_style="bold")
    for process in made.processes:
        by_cpus = Counter(thread.cpus for thread in process.threads)
        table.add_row(
            process.slot.name,
            str(process.slot.socket),
            str(process.pid),
            " + ".join(str(count) for count in by_cpus.values()),
            " + ".join(format_ids(cpus) for cpus in by_cpus),
            policy_text(process.slot.memory),
            escape(process.command[:60]),
        )
    console.print(table)
    for note in made.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)


def _as_json(made: BindingPlan) -> dict[str, object]:
    from kvtier.numa.report import cpuset_commands, numactl_command

    def slot_json(slot: Slot) -> dict[str, object]:
        return {**asdict(slot), "name": slot.name, "numactl": numactl_command(slot), "cpuset": cpuset_commands(slot)}

    return {
        "processes": [asdict(process) for process in made.processes],
        "slots": [slot_json(slot) for slot in made.slots],
        "notes": list(made.notes),
    }
