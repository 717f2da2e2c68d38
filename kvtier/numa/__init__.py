"""NUMA for serving stacks, usable for itself.

What is where: `topology`, `devices`, `allowed`. Binding threads and processes: `binding`. Memory, where it landed: `memory`, `placement`.
Threads that stay on their nodes, and who helps whom: `executor`, `queues`. Groups of processes: `plan`, `apply`, `verify`, `report`. What
distance costs, and whether binding pays: `model`, `counters`, `measure`, `choosing`. What the kernel allows: `capabilities`.

Reads /sys and /proc, calls the kernel directly, needs neither libnuma nor numactl, and imports no tensor library.
"""
