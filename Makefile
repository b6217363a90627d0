# Every target makes the virtual environment it needs, and installs only when pyproject.toml or constraints.txt changed.
#   PYTHON=python3.12    the interpreter to make environments with (3.11 or later)
#   PIP_ARGS="..."       passed on to pip, for example --find-links=DIR for a folder with a CPU build of torch
#   ARGS="..."           passed on to pytest, to the demo, or to a benchmark
PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=

PETALS := petals==2.2.0.post1
VENV := .venv
STAMP := $(VENV)/.installed
MANIFEST := pyproject.toml constraints.txt
MKDOCS_MATERIAL := 9.8.1
NO_LIVE := -m "not live" --ignore=tests/live --ignore=tests/interop
STOCK := tests/interop/stock

.DEFAULT_GOAL := help
.PHONY: help demo check format test test-live stock interop latest oldest soak docs constraints clean
.DELETE_ON_ERROR:

help:  ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP)  ## three block servers on this machine answer a question
	$(VENV)/bin/geopetals demo $(ARGS)

check: $(STAMP)  ## lint, formatting, types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP)  ## reformat the code and mend what ruff can mend
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .

test: $(STAMP)  ## all tests that need no live swarm
	$(VENV)/bin/pytest $(NO_LIVE) $(ARGS)

test-live: $(STAMP)  ## tests on real swarms of separate processes
	$(VENV)/bin/pytest -m live tests/live $(ARGS)

stock: .venv-stock/.installed  ## stock PETALS in an environment of its own, for comparisons

interop: $(STAMP) .venv-stock/.installed  ## stock PETALS and GeoPETALS in one swarm, on Llama and BLOOM
	$(VENV)/bin/pytest tests/interop $(ARGS)

latest: .venv-latest/.installed  ## the tests on the newest releases, without constraints
	.venv-latest/bin/pytest $(NO_LIVE) $(ARGS)

oldest: .venv-oldest/.installed  ## the tests on the lower bounds in pyproject.toml
	.venv-oldest/bin/pytest $(NO_LIVE) $(ARGS)

soak: $(STAMP)  ## ten minutes of mixed load on the HTTP API while servers are killed
	$(VENV)/bin/python benchmarks/gateway_soak.py $(ARGS)

docs: .venv-docs/.installed-$(MKDOCS_MATERIAL)  ## the documentation as a site, in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict $(ARGS)

bench-live: $(STAMP) .venv-stock/.installed  ## stock PETALS beside us on emulated hosts; ARGS="a0 --orders 3"
	$(VENV)/bin/python benchmarks/bench_live.py $(ARGS)

bench-fidelity: $(STAMP)  ## what the simulator predicted for those runs, against what was measured
	$(VENV)/bin/python benchmarks/bench_fidelity.py $(ARGS)

constraints: $(STAMP)  ## write down the versions in .venv as the tested ones
	$(VENV)/bin/python -m pip freeze --all --exclude-editable --exclude pip \
		| sed -E 's/\+[a-z0-9.]+$$//' > constraints.txt
	touch $(STAMP)

clean:  ## remove the environments and all caches
	rm -rf .venv .venv-latest .venv-oldest .venv-stock .venv-docs site
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(1) environment, $(2) what else pip is told
define install
	test -x $(1)/bin/pip || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(2) $(PIP_ARGS) --editable ".[dev]"
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(PETALS)
	touch $@
endef

$(STAMP): $(MANIFEST)
	@echo "Installing into $(VENV): this takes some minutes the first time."
	$(call install,$(VENV),--constraint constraints.txt)

# Rebuilt at each call: what is newest changes without any file here changing.
.PHONY: .venv-latest/.installed
.venv-latest/.installed:
	$(call install,.venv-latest,--upgrade --upgrade-strategy eager)

# Each dependency in pyproject.toml at its lower bound, what those need at its newest.
.venv-oldest/.installed: $(MANIFEST)
	rm -rf .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	sed -nE 's/^ +"([A-Za-z0-9_.-]+)>=([0-9.]+).*/\1==\2/p' pyproject.toml > .venv-oldest/constraints.txt
	$(call install,.venv-oldest,--constraint .venv-oldest/constraints.txt)

# Its name has the version, so that another one is installed. Kept up until May 2027; Zensical then reads the same file.
.venv-docs/.installed-$(MKDOCS_MATERIAL):
	test -x .venv-docs/bin/pip || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
		mkdocs-material==$(MKDOCS_MATERIAL)
	touch $@

# PETALS with its own model classes and the transformers release they are written for.
.venv-stock/.installed: $(STOCK)/requirements.txt $(STOCK)/requirements-petals.txt
	@echo "Installing into .venv-stock: this takes some minutes the first time."
	test -x .venv-stock/bin/pip || $(PYTHON) -m venv .venv-stock
	.venv-stock/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r $(STOCK)/requirements.txt
	.venv-stock/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		-r $(STOCK)/requirements-petals.txt
	touch $@
