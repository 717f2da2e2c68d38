"""Law checked with a real seccomp filter, as container runtimes install it: CPUs are still bound, memory is had
from whoever touches first, and every report says so."""

from __future__ import annotations

import json
import subprocess
import sys

_FILTERED = """
import ctypes, errno, json, logging, struct
from kvtier.numa import syscalls
from kvtier.numa.binding import bind_thread_to_numa_node, this_machine
from kvtier.numa.capabilities import probe
from kvtier.numa.memory import NodeMemory
from kvtier.numa.syscalls import MemoryPolicy, Mode

this_machine()
step = lambda code, jump_true, jump_false, k: struct.pack("HBBI", code, jump_true, jump_false, k)
program = [step(0x20, 0, 0, 0)]  # load the number of the call
for name in ("mbind", "set_mempolicy", "move_pages", "migrate_pages"):
    program += [step(0x15, 0, 1, syscalls._numbers[name]), step(0x06, 0, 0, 0x00050000 | errno.EPERM)]
program.append(step(0x06, 0, 0, 0x7FFF0000))  # allow
code = ctypes.create_string_buffer(b"".join(program))
libc = ctypes.CDLL(None, use_errno=True)
header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, header, 0, 0) == 0, ctypes.get_errno()

node = this_machine().memory_nodes[0]
bound = bind_thread_to_numa_node(node)
memory = NodeMemory(1 << 20, MemoryPolicy(Mode.BIND, (node,)))
memory.view[-1] = 1
states = {capability.name: [capability.state, capability.errno] for capability in probe(this_machine())}
print(json.dumps({"cpus": bound.cpus, "memory": bound.memory, "why": bound.why, "bound": memory.bound, "states": states, "node": node}))
"""


def test_under_a_filter_that_forbids_policies():
    done = subprocess.run([sys.executable, "-c", _FILTERED], capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    assert seen["cpus"]
    assert not seen["memory"]
    assert not seen["bound"]
    assert "Operation not permitted" in seen["why"]
    assert seen["states"]["CPU binding"][0] == "available"
    assert seen["states"]["thread memory policy"] == ["unavailable", 1]
    assert seen["states"][f"memory on node {seen['node']}"] == ["unavailable", 1]
    assert done.stderr.count("NUMA:") == 2
