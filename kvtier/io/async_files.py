"""The engine on aiofiles: asyncio through and through, portable, and the slowest (two hops between threads and a seek per request).

State: an event loop on a thread of its own, started with the first batch, and for each file the aiofiles handles that idle between
requests, which belong to that loop. Calls that are no batch are plain system calls, as in `buffered`. Neither is there in a forked child.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

import aiofiles
from aiofiles.threadpool.binary import AsyncFileIO

from kvtier.forked import LeftBehind, tell_children
from kvtier.io.files import Outcomes, Request
from kvtier.io.pool import stay_on
from kvtier.io.pooled import DEPTH, PooledEngine

Work = Callable[[AsyncFileIO, Request], Awaitable[int]]
Done = SimpleQueue[tuple[int, int | OSError] | None]


class AsyncFilesEngine(PooledEngine):
    """aiofiles on at most `depth` threads, buffers of any alignment."""

    name = "aiofiles"
    native = False

    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__(depth)
        self._threads = ThreadPoolExecutor(depth, f"kvtier-{self.name}", initializer=lambda: stay_on(self.cpus))
        self._room = asyncio.Semaphore(depth)
        self._idle: dict[int, list[AsyncFileIO]] = {}
        self._starting = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._runner: threading.Thread | None = None
        self._left_behind: LeftBehind | None = None
        tell_children(self)

    def after_fork_in_child(self) -> None:
        """There is no loop from now on."""
        self._left_behind = LeftBehind(f"this {self.name} engine")
        self._loop = self._runner = None
        self._idle = {}

    def close(self, file: int) -> None:
        handles = self._idle.pop(file, [])
        if self._loop is not None and handles:
            asyncio.run_coroutine_threadsafe(_close(handles), self._loop).result()
        super().close(file)

    def stop(self) -> None:
        self._stopped = True
        if self._loop is not None and self._runner is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._runner.join()
            self._loop.close()
            self._loop = None
        if self._left_behind is None:
            self._threads.shutdown()
        super().stop()

    def _carry(self, requests: Sequence[Request], writing: bool, helping: bool) -> Outcomes:  # noqa: ARG002 - the loop's work
        self._check_running()
        self._check_here()
        work = _write if writing else _read
        done: Done = SimpleQueue()
        withdrawn = threading.Event()
        all_ended: Future[None] = asyncio.run_coroutine_threadsafe(self._carry_out(work, requests, done, withdrawn), self._running_loop())
        try:
            while (outcome := done.get()) is not None:
                yield outcome
                self._check_here()
        finally:
            withdrawn.set()
            if self._left_behind is None:
                all_ended.result()

    def _check_here(self) -> None:
        if self._left_behind is not None:
            self._left_behind.refuse()

    async def _carry_out(self, work: Work, requests: Sequence[Request], done: Done, withdrawn: threading.Event) -> None:
        async def carry_out(index: int, request: Request) -> None:
            async with self._room:
                if not withdrawn.is_set():
                    done.put((index, await self._attempt(work, request)))

        try:
            async with asyncio.TaskGroup() as group:
                for index, request in enumerate(requests):
                    group.create_task(carry_out(index, request))
        finally:
            done.put(None)

    async def _attempt(self, work: Work, request: Request) -> int | OSError:
        idle = self._idle.setdefault(request.file, [])
        handle = None
        try:
            # Each has a position of its own, so that requests on one file do not meet.
            handle = idle.pop() if idle else await self._open(request.file)
            return await work(handle, request)
        except OSError as error:
            return error
        finally:
            if handle is not None:
                idle.append(handle)

    async def _open(self, file: int) -> AsyncFileIO:
        handle = await aiofiles.open(f"/proc/self/fd/{file}", "r+b", buffering=0, executor=self._threads)
        if not isinstance(handle, AsyncFileIO):
            raise OSError(errno.EINVAL, "aiofiles gave no unbuffered file")
        return handle

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._runner = threading.Thread(target=self._loop.run_forever, name=f"kvtier-{self.name}-loop", daemon=True)
                self._runner.start()
            return self._loop


async def _read(handle: AsyncFileIO, request: Request) -> int:
    await handle.seek(request.offset)
    view, done = request.buffer.data, 0
    while done < len(view):
        count = await handle.readinto(view[done:])
        if not count:
            break
        done += count
    return done


async def _write(handle: AsyncFileIO, request: Request) -> int:
    await handle.seek(request.offset)
    view = request.buffer.data
    while len(view) > 0:
        count = await handle.write(view)
        if not count:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        view = view[count:]
    return request.buffer.nbytes


async def _close(handles: Sequence[AsyncFileIO]) -> None:
    for handle in handles:
        await handle.close()
