# Everything that a person runs here. `make demo` and `make test` need Python 3.11 or newer and nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT ?= out
export OMP_NUM_THREADS ?= $(shell $(PYTHON) -c "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())")

.PHONY: setup demo test check engines bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: setup  ## make, verify, evaluate and card an NVFP4A16 release of the dense demo checkpoint
	$(BIN)/qwench demo --out $(OUT)/demo --force

check: setup  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check  ## style, types and all tests; those that need an absent engine skip and say so
	$(BIN)/python -m pytest

engines: setup  ## engines with pins of their own, each in its own environment in a cache folder outside the clone
	bash scripts/engines/make.sh all

bench: setup  ## quality of the bundled recipes, then time and memory on four layers of the 9B shape (see benchmarks/README.md)
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.scale tests/data/configs/qwen3.5-9b.json --layers 4 --work $(OUT)/bench

clean:
	rm -rf $(OUT) .pytest_cache .mypy_cache .ruff_cache
