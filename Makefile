# `make demo` and `make test` need only Python >= 3.11 and make; everything else goes into .venv.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
# Further arguments of pytest (`make test ARGS="tests/stacks -x"`), the demo and the benchmark.
ARGS ?=
# A checkout of facebookresearch/optimizers, for `make test-meta` without `make install-meta`.
META ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
META_READY := $(VENV)/.ready-meta
CLIENTS_READY := $(VENV)/.ready-clients
DOCS_READY := $(VENV)/.ready-docs
PIP := $(BIN)/python -m pip
# One thread per worker: two workers with two threads each are slower than one on two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs bench wheel test-wheel install-meta test-meta test-meta-suite test-clients clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY)  ## train a small model with several optimizers and draw the comparison into demo/
	$(BIN)/python -m experiments demo $(ARGS)

test: $(READY)  ## the tests and doctests, on Meta's package if it is importable, else on the embedded base
	$(PYTEST) $(ARGS)

lint: $(READY)  ## ruff (lint and format) and mypy, without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS_READY)  ## the documentation into site/; a reference that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict $(ARGS)

bench: $(READY)  ## time an optimizer step against the base's own sequential list
	$(BIN)/python benchmarks/step_time.py $(ARGS)

wheel: $(READY)  ## build the wheel into dist/
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist

test-wheel: wheel  ## install the built wheel into an environment of its own and use it there
	PYTHON="$(PYTHON)" bash tests/packaging/install_and_use.sh dist/*.whl

install-meta: $(META_READY)  ## install Meta's Distributed Shampoo from GitHub (dependency group `meta`)

test-meta: $(READY)  ## the tests on Meta's package: installed, or META=path of a checkout
	@PYTHONPATH="$(META)" $(BIN)/python -c "import distributed_shampoo" || \
		{ echo "Meta's package is not importable: 'make install-meta', or 'make test-meta META=/path/of/its/checkout'."; exit 1; }
	PYTHONPATH="$(META)" DASH_SHAMPOO_BASE=meta $(PYTEST) $(ARGS)

test-meta-suite: $(READY)  ## Meta's own tests with DashShampoo in place of DistributedShampoo; META=path of a checkout
	@test -n "$(META)" || { echo "make test-meta-suite META=/path/of/a/checkout/of/facebookresearch/optimizers"; exit 1; }
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python tests/meta/suite.py "$(META)" $(ARGS)

test-clients: $(CLIENTS_READY)  ## transformers, accelerate, lightning, peft: installed from PyPI and trained with
	HF_HUB_OFFLINE=1 $(PYTEST) tests/clients $(ARGS)

clean:  ## remove .venv and everything that was built
	rm -rf $(VENV) dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "dash_shampoo needs Python >= 3.11, and $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Pinned through constraints.txt: without it pip takes the newest torch and gigabytes of CUDA with it.
$(READY): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# pip knows --group since 25.1.
$(META_READY): pyproject.toml | $(READY)
	$(PIP) install --quiet 'pip>=25.1'
	$(PIP) install --quiet -c constraints.txt --group meta
	touch $@

$(CLIENTS_READY): pyproject.toml | $(READY)
	$(PIP) install --quiet 'pip>=25.1'
	$(PIP) install --quiet -c constraints.txt --group clients
	touch $@

$(DOCS_READY): pyproject.toml constraints.txt | $(READY)
	$(PIP) install --quiet 'pip>=25.1'
	$(PIP) install --quiet -c constraints.txt --group docs
	touch $@
