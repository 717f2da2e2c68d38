"""What pyproject.toml cannot say: the benchmarks are installed as `kvtier.bench`, and the native codecs, loops, file threads and the walk
that measures memory latency are compiled where that works.

Without a C compiler the extensions are left out: everything runs on torch, NumPy and Python threads, and latencies are not measured.
Nothing is compiled for this machine's CPU in particular: the sources hold kernels for several instruction sets and choose when they are
loaded.
"""

from pathlib import Path

from setuptools import Extension, find_packages, setup

NATIVE = Path("kvtier/formats/native")
COLUMNS = Path("kvtier/columns")

codecs = Extension(
    "kvtier.formats.native._codecs",
    sources=sorted(map(str, NATIVE.glob("*.c"))),
    depends=sorted(map(str, NATIVE.glob("*.h"))),
    # Every rounding is part of the format: no fused multiply-adds that the sources do not ask for.
    extra_compile_args=["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-g0"],
    define_macros=[("Py_LIMITED_API", "0x030B0000")],
    py_limited_api=True,
    optional=True,
)

loops = Extension(
    "kvtier.columns._loops",
    sources=sorted(map(str, COLUMNS.glob("*.c"))),
    depends=sorted(map(str, COLUMNS.glob("*.h"))),
    # What is learned must be the same as with NumPy: no fused multiply-adds here either.
    extra_compile_args=["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-g0"],
    define_macros=[("Py_LIMITED_API", "0x030B0000")],
    py_limited_api=True,
    optional=True,
)

requests = Extension(
    "kvtier.io._requests",
    sources=["kvtier/io/requests.c"],
    extra_compile_args=["-std=c11", "-O2", "-g0", "-pthread"],
    extra_link_args=["-pthread"],
    define_macros=[("Py_LIMITED_API", "0x030B0000")],
    py_limited_api=True,
    optional=True,
)

chase = Extension(
    "kvtier.numa._chase",
    sources=["kvtier/numa/chase.c"],
    extra_compile_args=["-std=c11", "-O2", "-g0"],
    define_macros=[("Py_LIMITED_API", "0x030B0000")],
    py_limited_api=True,
    optional=True,
)

setup(
    packages=[*find_packages(include=["kvtier*"]), "kvtier.bench"],
    package_dir={"kvtier.bench": "benchmarks"},
    ext_modules=[codecs, loops, requests, chase],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
