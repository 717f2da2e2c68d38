"""`--profile FILE`: a trace of every Python call of every thread, for the commands that take long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from kvtier.cli.output import check_writable
from kvtier.errors import KVTierError, needing

ProfileOption = Annotated[
    Path | None, typer.Option(metavar="FILE.json", help="Record every call of every thread; ui.perfetto.dev opens the file. Slows the run.")
]


class Profile:
    """Whether the profile could be written in the end."""

    failure: KVTierError | None = None

    def check(self) -> None:
        """The KVTierError if it could not: to be called once the results are out, which are worth more."""
        if self.failure is not None:
            raise self.failure


@contextmanager
def profiled(target: Path | None) -> Iterator[Profile]:
    """Record what runs inside as a Chrome trace; MissingExtra without viztracer, KVTierError for a path that cannot be written."""
    profile = Profile()
    if target is None:
        yield profile
        return
    if target.suffix not in (".json", ".gz") or not target.parent.is_dir():
        raise KVTierError(f"--profile {target}: expected a .json or .json.gz file in an existing directory")
    with needing("profile", "--profile", "viztracer"):
        from viztracer import VizTracer
    check_writable("--profile", target)  # the tracer writes only at the end
    tracer = VizTracer(output_file=str(target), verbose=0, min_duration=5, ignore_frozen=True)
    tracer.start()
    try:
        yield profile
    finally:
        tracer.stop()
        try:
            tracer.save()
        except OSError as error:
            profile.failure = KVTierError(f"--profile {target}: {error.strerror}; the results are above")
        tracer.terminate()
