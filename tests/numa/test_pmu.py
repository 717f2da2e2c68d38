"""Laws checked: counters count where the kernel allows it and say why where it does not; uncore events are read as sysfs describes them."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

import pytest

from kvtier.numa import pmu
from kvtier.numa.pmu import NODE_LOAD_MISSES, NODE_LOADS, PAGE_FAULTS, Counters, remote_share, uncore_events
from tests.numa.machines import write


def test_counting_works_or_says_why_not():
    with Counters([PAGE_FAULTS, NODE_LOADS]) as counters:
        fresh = mmap.mmap(-1, 64 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        fresh.madvise(mmap.MADV_NOHUGEPAGE)
        for page in range(64):
            fresh[page * mmap.PAGESIZE] = 1
        counts = counters.read()
    assert set(counts) | set(counters.refused) == {"page-faults", "node-loads"}
    if "page-faults" in counts:
        assert counts["page-faults"] >= 64
    else:
        assert "not allowed" in counters.refused["page-faults"]
    assert counters.read() == {}


@pytest.mark.parametrize(("code", "words"), [(errno.EACCES, "perf_event_paranoid"), (errno.ENOENT, "does not count it")])
def test_refusals_leave_the_others_counting(monkeypatch, code, words):
    file = os.open("/dev/zero", os.O_RDONLY)

    def opened(event, cpu):
        if event is NODE_LOADS:
            raise OSError(code, os.strerror(code))
        return os.dup(file)

    monkeypatch.setattr(pmu, "_perf_event_open", opened)
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: 0)
    with Counters([NODE_LOADS, NODE_LOAD_MISSES]) as counters:
        assert counters.read() == {"node-load-misses": 0}
        assert words in counters.refused["node-loads"]
    os.close(file)


def test_uncore_events_are_found_as_sysfs_describes_them(tmp_path):
    devices = tmp_path / "sys/bus/event_source/devices"
    imc, upi = devices / "uncore_imc_0", devices / "uncore_upi_1"
    for unit, number in ((imc, 13), (upi, 21)):
        write(unit / "type", number)
        write(unit / "cpumask", "0,24")
        write(unit / "format/event", "config:0-7")
        write(unit / "format/umask", "config:8-15")
    write(imc / "events/cas_count_read", "event=0x04,umask=0x03")
    write(imc / "events/cas_count_read.scale", "6.103515625e-5")
    write(imc / "events/cas_count_read.unit", "MiB")
    write(upi / "events/upi_data_bandwidth_tx", "event=0x2,umask=0xf")
    write(imc / "events/cas_count_write", "event=0x05,mystery=0x03")
    reads, flits = uncore_events(tmp_path)
    assert (reads.name, reads.type, reads.config, reads.cpus, reads.unit) == ("memory reads (uncore_imc_0)", 13, 0x0304, (0, 24), "MiB")
    assert reads.scale == pytest.approx(2**-14)
    assert (flits.name, flits.config) == ("link flits (uncore_upi_1)", 0xF02)
    assert uncore_events(tmp_path / "nothing") == []


def test_the_remote_share_is_told_only_where_both_were_counted():
    assert remote_share({"node-loads": 8, "node-load-misses": 2}) == 0.25
    assert remote_share({"node-loads": 8}) is None
    assert remote_share({"node-loads": 0, "node-load-misses": 0}) is None
