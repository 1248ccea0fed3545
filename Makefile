# Every target works alone on a fresh clone: it makes .venv and installs first, and a stamp makes that quick later.
#   PYTHON=python3.12 make test     another interpreter
#   LEVELS="AVX2 AMX" make test-cpus   some kinds of CPU
#   PIP_FLAGS=... make demo         more flags for pip (an index with CPU-only torch wheels saves 2 GB on machines without a GPU)

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.base
DEV := $(VENV)/.dev

export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help setup demo test test-distributed test-cpus slow gpu lint format bench clean
help:
	@echo "make demo    a video from the embedded model"
	@echo "make test    the quick tests        make slow | gpu | test-distributed | test-cpus    the others"
	@echo "             (test-cpus: the quick tests of all that computes, as other kinds of CPU run them)"
	@echo "make lint    style, layers, types   make format        rewrite in that style"
	@echo "make bench   the numbers of the README, as JSON in benchmarks/results"
	@echo "make clean   remove what was made here, .venv included"

setup: $(DEV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Kinetoscope needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(BASE): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable '.[dev]'
	@touch $(BASE) $@

demo: $(BASE)
	$(BIN)/kinetoscope generate

# One process a core, one thread each: two processes with two threads each make each other many times slower.
test: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical -m "not slow and not gpu and not distributed"

# Several processes a test, so one test after another.
test-distributed: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m distributed

# The kernels of lower kinds of CPU, by the libraries' own switches, and the choices of higher ones: see tests/cpus.py.
test-cpus: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python tests/cpus.py $(LEVELS)

slow: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "slow and not gpu and not distributed"

gpu: $(DEV)
	$(BIN)/python -m pytest -q -m gpu

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python -m lint.bare_random src tests benchmarks lint
	$(BIN)/lint-imports
	$(BIN)/python -m lint.measure
	$(BIN)/pyright

format: $(DEV)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(DEV)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache .hypothesis .import_linter_cache src/*.egg-info outputs
	find src tests benchmarks lint -name __pycache__ -type d -prune -exec rm -rf {} +
