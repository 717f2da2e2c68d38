"""What pyproject.toml cannot say: the benchmarks are installed as `kvtier.bench`, and the native codecs, loops, file threads, copies
between layouts and the walk that measures memory latency are compiled where that works.

Without a C compiler the extensions are left out: everything runs on torch, NumPy and Python threads, and latencies are not measured.
Nothing is compiled for this machine's CPU in particular: the sources hold kernels for several instruction sets and choose when they are
loaded.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

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
    # What is learned must be the same as with NumPy: no fused multiply-adds here either. Calls from file to file are calls, not look-ups.
    extra_compile_args=["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-g0"],
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

strided = Extension(
    "kvtier.memory._strided",
    sources=["kvtier/memory/strided.c"],
    extra_compile_args=["-std=c11", "-O3", "-g0"],
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


class BuildOnce(build_ext):
    """Several environments share one source tree: an editable installation takes what an earlier one compiled from the same sources.

    What was compiled from others is removed first: sources that do not compile leave no older module in use.
    """

    def build_extensions(self) -> None:
        one_by_one = self.compiler.compile

        def side_by_side(sources: list[str], **options: object) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                compiled = pool.map(lambda source: one_by_one([source], **options), sources)
                return [each for objects in compiled for each in objects]

        self.compiler.compile = side_by_side
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        compiled = self.get_ext_filename(self.get_ext_fullname(ext.name))
        if not self.editable_mode or newer_group([*ext.sources, *ext.depends, __file__], compiled):
            if self.editable_mode:
                Path(compiled).unlink(missing_ok=True)
            super().build_extension(ext)
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(compiled, target)


setup(
    cmdclass={"build_ext": BuildOnce},
    packages=[*find_packages(include=["kvtier*"]), "kvtier.bench"],
    package_dir={"kvtier.bench": "benchmarks"},
    ext_modules=[codecs, loops, requests, strided, chase],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
