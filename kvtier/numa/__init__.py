"""NUMA for serving stacks, usable for itself: what is where (`topology`, `devices`, `allowed`), binding (`binding`, `policy`), memory
(`memory`, `pages_at`), plans for groups of processes (`plan`, `apply`, `verify`), models and counters.

Reads /sys and /proc, calls the kernel directly, needs neither libnuma nor numactl, and imports no tensor library.
"""
