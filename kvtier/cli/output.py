"""What commands print: people read stdout, programs read `--json FILE|-`. With `--json -` stdout belongs to the program."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvtier.errors import KVTierError, needing

if TYPE_CHECKING:
    from rich.console import Console

JsonOption = Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="Also write the result as JSON; - is stdout.")]
PLOT_KINDS = (".svg", ".png", ".pdf")


def human_console(json_target: str | None = None) -> Console:
    """Where text for people goes: stdout, or stderr when stdout carries JSON."""
    from rich.console import Console

    # Names of files and traces may look like markup; they are shown as they are.
    return Console(stderr=json_target == "-", highlight=False, markup=False)


def check_json_target(target: str | None) -> None:
    """KVTierError now, rather than after a long run, if `write_json` could not write to `target`. Leaves an existing file as it is."""
    if target is None or target == "-":
        return
    try:
        _try_writing(Path(target))
    except OSError as error:
        raise _cannot_write(target, error) from None


def check_writable(option: str, path: Path | None) -> None:
    """KVTierError now, rather than after a long run, if the file that `option` names cannot be written. Leaves all as it is."""
    if path is None:
        return
    try:
        _try_writing(path)
    except OSError as error:
        raise KVTierError(f"{option} {path}: {error.strerror}; give a file in a writable directory") from None


def check_plot_target(path: Path | None) -> None:
    """KVTierError now, rather than after a long run, if `--plot` could not be drawn to `path`; MissingExtra without matplotlib."""
    if path is None:
        return
    if path.suffix not in PLOT_KINDS or not path.parent.is_dir():
        raise KVTierError(f"--plot {path}: expected a .svg, .png or .pdf file in an existing directory")
    with needing("report", "--plot", "matplotlib"):
        import matplotlib.figure  # noqa: F401
    check_writable("--plot", path)


def _try_writing(path: Path) -> None:
    existed = path.exists()
    path.open("ab").close()
    if not existed:
        path.unlink()


def check_apart(outputs: Mapping[str, str | Path | None], inputs: Sequence[Path] = ()) -> None:
    """KVTierError if an option's file is one of `inputs`, or that of another option. `outputs`: the files by option; - is none."""
    options: dict[Path, str] = {}
    for option, target in outputs.items():
        if target is None or target == "-":
            continue
        path = Path(target)
        if path.exists() and any(each.exists() and path.samefile(each) for each in inputs):
            raise KVTierError(f"{option} {target} is what is read; name another file")
        other = options.setdefault(path.resolve(), option)
        if other != option:
            raise KVTierError(f"{option} {target} is what {other} writes; name another file")


def write_json(data: object, target: str | None) -> None:
    """Write `data` as JSON to the file `target`, to stdout for "-", nowhere for None. KVTierError if it cannot be written."""
    if target is None:
        return
    text = json.dumps(data, indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    path = Path(target)
    existed = path.exists()
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        if not existed:
            path.unlink(missing_ok=True)  # no half of it is left
        raise _cannot_write(target, error) from None


def _cannot_write(target: str, error: OSError) -> KVTierError:
    return KVTierError(f"cannot write {target}: {error.strerror}; give --json a file in an existing, writable directory")
