# Every target runs in .venv, which the first one creates with the versions in constraints.txt.
# Choose another Python with `make PYTHON=python3.12 demo`.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
# Nothing that a target starts sends usage statistics; NO_TELEMETRY in src/bestiary/__init__.py has the reasons.
export DO_NOT_TRACK ?= true
export MLFLOW_DISABLE_TELEMETRY ?= true
export HF_HUB_DISABLE_TELEMETRY ?= true
export HF_HUB_DISABLE_UPDATE_CHECK ?= true
export DVC_NO_ANALYTICS ?= true
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1
INSTALLED := .venv/installed
PYTEST := pytest --numprocesses 2 --dist loadgroup

.PHONY: demo test test-fast lint bench app mlflow world clean help
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("Bestiary needs Python 3.11 to 3.13. Choose one, for example: make PYTHON=python3.12 demo")'
	@echo "Installing into .venv: about 3 minutes, 2 GB ..."
	@$(PYTHON) -m venv --clear .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[app,dev]'
	@touch $@

demo: $(INSTALLED)  ## run the whole pipeline on the bundled sample and show the results
	@dvc repro
	@bestiary results

test: $(INSTALLED)  ## run the whole test suite
	@$(PYTEST)

test-fast: $(INSTALLED)  ## run the tests that take seconds
	@$(PYTEST) -m 'not slow'

lint: $(INSTALLED)  ## check format, lint and types
	@ruff format --check .
	@ruff check .
	@mypy

bench: $(INSTALLED)  ## measure speed side by side (15 minutes, 8 GB of memory)
	@python benchmarks

app: $(INSTALLED)  ## start the web page
	@bestiary app

mlflow: $(INSTALLED)  ## open the MLflow UI on this project's runs
	@mlflow ui --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}"

world: $(INSTALLED)  ## draw the sample and train the bundled models from scratch (hours)
	@python tools/make_samples.py && torchrun --nproc-per-node 2 tools/make_world.py

clean:  ## remove the pipeline's outputs; keep .venv and MLflow's runs
	@rm -rf build data models/adapter reports .cache/encode .cache/train .cache/evaluate
