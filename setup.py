"""What pyproject.toml cannot say: the benchmarks are installed as `kvtier.bench`."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["kvtier*"]), "kvtier.bench"], package_dir={"kvtier.bench": "benchmarks"})
