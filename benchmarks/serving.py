"""Serving engines and cache servers as processes: how they are started, asked, measured and stopped. What `engines.py` compares.

Each has a session of its own, so that its children are counted and stopped with it, and nobody else's; all of them end when the benchmark
is killed (`leash.py`). All engines get the same number of threads, given: left to itself, vLLM takes one fewer in some configurations than
in others. All processes allocate from huge pages: in small ones, two starts of the same engine differ by more than what is compared.
State: the processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtier.errors import KVTierError

from .contestants import GIB, LAYOUT, PASSED_OVER, SYSTEMS, Place
from .leash import leashed

HUGE_PAGES = "glibc.malloc.hugetlb=1"
START_S, ANSWER_S, STOP_S = 180.0, 300.0, 60.0
"""How long a process may take to be up, an engine to answer, a process to stop."""
LOOK_S, AT_REST, SETTLE_S = 0.2, 0.1, 5.0
"""A system is at rest when it took less than this share of one core for so long; how long that is waited for."""


@dataclass(frozen=True)
class Answer:
    """One request: seconds from giving it to the engine, the prompt's tokens that came from a cache, and tokens that it made.

    `missed`: it should have been found, and was not; its seconds are those of computing it again.
    """

    first_s: float
    total_s: float
    cached_tokens: int
    new_tokens: int
    missed: bool = False


@dataclass(frozen=True)
class EngineSetUp:
    """The engine itself: arguments of `vllm.LLM`, GiB that its cache may take, the processor cores of its compute threads."""

    arguments: dict[str, Any]
    cache_gib: int
    cores: Sequence[int]


class Process:
    """A process with a session of its own; `log` gets what it says on standard error, in the folder of all files of this run."""

    def __init__(self, name: str, command: Sequence[str], variables: dict[str, str], log: Path) -> None:
        self.name, self.log = name, log
        held, self._leash = os.pipe()
        try:
            with log.open("ab") as errors:
                self.child = subprocess.Popen(
                    leashed(held, log.parent, command),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=os.environ | {"GLIBC_TUNABLES": with_huge_pages(os.environ.get("GLIBC_TUNABLES", ""))} | variables,
                    start_new_session=True,
                    pass_fds=(held,),
                )
        except BaseException:
            os.close(self._leash)
            raise
        finally:
            os.close(held)

    def cpu_s(self) -> float:
        """CPU seconds that the living processes of this session took so far."""
        ticks = 0
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # processes end meanwhile
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.child.pid:
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def failed(self, why: str) -> KVTierError:
        """An error with the end of what the process said."""
        said = self.log.read_text(errors="replace").splitlines()[-15:]
        return KVTierError(f"{self.name} {why}; the last it said:\n" + "\n".join(said))

    def stop(self) -> None:
        """Ask it to end, and its children if it does not. Also ends those that it left behind."""
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.child.stdin.close()
        self.ask_to_end()
        try:
            self.child.wait(STOP_S)
        except subprocess.TimeoutExpired:
            raise self.failed(f"did not stop within {STOP_S:.0f} s") from None
        finally:
            self.end()
            self.child.stdout.close()

    def end(self) -> None:
        """End it and all that it started, now."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._leash, b".")
        self.child.wait()
        os.close(self._leash)  # not before: that means that nobody is left

    def ask_to_end(self) -> None:
        """Beyond the end of its standard input."""


class Server(Process):
    """An LMCache server on a free port, up when this returns. With `store`, its files are there."""

    def __init__(self, chunk_tokens: int, store: Path | None, memory_pages: int, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = int(free.getsockname()[1])
        command = [sys.executable, "-m", "lmcache.v1.multiprocess.server", "--host", "localhost", "--port", str(self.port)]
        command += [
            "--chunk-size",
            str(chunk_tokens),
            "--l1-size-gb",
            str(memory_pages * LAYOUT.page_bytes / GIB),
            "--eviction-policy",
            "LRU",
        ]
        command += ["--disable-observability", "--supported-transfer-mode", "engine_driven", "--shm-name", f"kvtier-bench-{os.getpid()}"]
        if store is not None:
            command += ["--l2-adapter", json.dumps({"type": "fs", "base_path": str(store)})]
        super().__init__("the LMCache server", command, {"LMCACHE_TRACK_USAGE": "false"}, log)
        until = time.monotonic() + START_S
        while not self._listens():
            if self.child.poll() is not None or time.monotonic() > until:
                error = self.failed("did not start")
                self.stop()
                raise error
            time.sleep(0.1)

    def _listens(self) -> bool:
        with contextlib.closing(socket.socket()) as probe:
            return probe.connect_ex(("localhost", self.port)) == 0

    def ask_to_end(self) -> None:
        """It does not look at its standard input."""
        self.child.terminate()


class Engine(Process):
    """A vLLM engine (`engine_process.py`), up when this returns."""

    def __init__(self, name: str, set_up: EngineSetUp, connector: dict[str, Any] | None, log: Path) -> None:
        variables = {
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(core) for core in set_up.cores),
            "VLLM_CPU_KVCACHE_SPACE": str(set_up.cache_gib),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "LMCACHE_TRACK_USAGE": "false",
        }
        settings = json.dumps({"engine": set_up.arguments, "connector": connector})
        super().__init__(f"the engine of {name}", [sys.executable, "-m", "kvtier.bench.engine_process", settings], variables, log)
        try:
            self._hear(START_S)
        except BaseException:
            self.end()
            raise

    def ask(self, prompt: Sequence[int], new_tokens: int, passed_over: bool = False) -> Answer:
        """Have a prompt answered, neither stored nor looked up beyond the engine's own cache if it is to be `passed_over`.

        KVTierError if that takes longer than `ANSWER_S`, or the engine ended.
        """
        assert self.child.stdin is not None
        try:
            asked = {"prompt": list(prompt), "new_tokens": new_tokens, "limits": PASSED_OVER if passed_over else None}
            self.child.stdin.write(json.dumps(asked).encode() + b"\n")
            self.child.stdin.flush()
        except BrokenPipeError:
            raise self.failed("ended") from None
        return Answer(**self._hear(ANSWER_S), new_tokens=new_tokens)

    def _hear(self, seconds: float) -> dict[str, Any]:
        assert self.child.stdout is not None
        if not select.select([self.child.stdout], [], [], seconds)[0]:
            raise self.failed(f"said nothing for {seconds:.0f} s")
        line = self.child.stdout.readline()
        if not line:
            raise self.failed("ended")
        heard: dict[str, Any] = json.loads(line)
        return heard


@dataclass
class Serving:
    """An engine and the server it needs, if any."""

    engine: Engine
    server: Server | None

    def cpu_s(self) -> float:
        """CPU seconds of both so far."""
        return self.engine.cpu_s() + (self.server.cpu_s() if self.server is not None else 0.0)

    def settle(self) -> None:
        """Wait until what goes on behind the last answer (stores, mostly) is done, or for `SETTLE_S`: others are not asked beside it."""
        until, before = time.monotonic() + SETTLE_S, self.cpu_s()
        while time.monotonic() < until:
            time.sleep(LOOK_S)
            now = self.cpu_s()
            if now - before <= AT_REST * LOOK_S:
                return
            before = now


def with_huge_pages(tunables: str) -> str:
    """`tunables` of glibc with transparent huge pages for what it allocates, unless they say something of these already."""
    return tunables if "glibc.malloc.hugetlb" in tunables else ":".join(filter(None, (tunables, HUGE_PAGES)))


@contextlib.contextmanager
def serving(name: str, set_up: EngineSetUp, memory_pages: int, disk_pages: int, room: Path) -> Iterator[Serving]:
    """System `name` with memory for so many pages beside the engine's own cache and its files in `room/name`, stopped at the end.

    KVTierError if something does not start, answer or stop.
    """
    system, log = SYSTEMS[name], room / f"{name}.log"
    store = stored_in(room, name)
    with contextlib.ExitStack() as stack:
        server, connector = None, None
        if system.chunk_tokens:
            server = Server(system.chunk_tokens, store if system.durable else None, memory_pages, room / f"{name}-server.log")
            stack.callback(server.stop)
        if system.connector is not None:
            connector = system.connector(Place(store, server.port if server is not None else 0, memory_pages, disk_pages))
        engine = Engine(name, set_up, connector, log)
        stack.callback(engine.stop)
        yield Serving(engine, server)


def stored_in(room: Path, name: str) -> Path:
    """Where system `name` keeps its files."""
    return room / name


def bytes_on_disk(store: Path) -> int:
    """Bytes that the files under `store` occupy, once that has not changed for a second; waits a minute at most."""
    before, since, until = -1, time.monotonic(), time.monotonic() + 60
    while time.monotonic() < until:
        now = 0
        for path in store.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # names of files on their way
                now += path.stat().st_blocks * 512
        if now != before:
            before, since = now, time.monotonic()
        elif time.monotonic() - since > 1:
            return now
        time.sleep(0.1)
    raise KVTierError(f"{store} still grows after a minute; the figures of a disk that lags so far behind would say nothing")


def drop_from_page_cache(store: Path) -> None:
    """Have the kernel forget the contents of the files under `store`, which are written out first."""
    for path in store.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
