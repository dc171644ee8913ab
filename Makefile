# Everything runs in .venv, made on first use from constraints.txt. Another Python: `make PYTHON=python3.12 demo`.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
INSTALLED := .venv/installed
PYTEST := pytest --numprocesses 2 --dist loadgroup

.PHONY: demo test test-fast lint bench app mlflow world clean help
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("Bestiary needs Python 3.11 to 3.13; choose one with make PYTHON=python3.12 ...")'
	@echo "Installing into .venv (about 3 minutes, 2 GB) ..."
	@$(PYTHON) -m venv --clear .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[app,dev]'
	@touch $@

demo: $(INSTALLED)  ## the whole pipeline on the embedded sample, and what came out
	@dvc repro
	@bestiary results

test: $(INSTALLED)  ## the whole test suite
	@$(PYTEST)

test-fast: $(INSTALLED)  ## the tests that take seconds
	@$(PYTEST) -m 'not slow'

lint: $(INSTALLED)  ## format, lint and types
	@ruff format --check .
	@ruff check .
	@mypy

bench: $(INSTALLED)  ## speed, side by side (a quarter of an hour, 8 GB of memory)
	@python benchmarks

app: $(INSTALLED)  ## the web page
	@bestiary app

mlflow: $(INSTALLED)  ## the MLflow UI on this project's database
	@mlflow ui --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}"

world: $(INSTALLED)  ## draw the sample and train the embedded models again (hours)
	@python tools/make_samples.py && torchrun --nproc-per-node 2 tools/make_world.py

clean:  ## remove what the pipeline made (the environment and MLflow's runs stay)
	@rm -rf build data models/adapter reports .cache/encode .cache/train .cache/evaluate
