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
OPENVINO := .venv/openvino-installed
# On Linux, torch comes from PyPI with CUDA. `make TORCH=cpu demo` takes the far smaller build for machines without a GPU.
TORCH ?=
TORCH_INDEX ?= https://download.pytorch.org/whl/$(TORCH)
define CUDA_NOTE
PyPI's torch includes CUDA: 3.1 GB to download, 6.5 GB of disk. Without an NVIDIA GPU, stop this with Ctrl-C and type
`make TORCH=cpu demo`, which needs 0.5 GB and 2.5 GB.
endef
export CUDA_NOTE
PORT ?= 5000
PIP := python -m pip install --quiet --disable-pip-version-check --use-pep517
PYTEST := pytest --numprocesses 2 --dist loadgroup

.PHONY: demo fast test test-fast test-gpu lint bench app mlflow world clean help
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("Bestiary needs Python 3.11 to 3.13. Choose one, for example: make PYTHON=python3.12 demo")'
	@echo "Installing into .venv: a few minutes."
	@$(if $(TORCH),,[ "$$(uname)" != Linux ] || echo "$$CUDA_NOTE")
	@$(PYTHON) -m venv --clear .venv
	@$(if $(TORCH),.venv/bin/$(PIP) --no-deps --index-url $(TORCH_INDEX) torch)
	@.venv/bin/$(PIP) --editable '.[app,dev]'
	@touch $@

# A second engine. Only `make fast`, the tests and the benchmarks use it. They skip it where it cannot be installed.
$(OPENVINO): $(INSTALLED)
	@echo "Installing OpenVINO into .venv. This takes about a minute."
	@.venv/bin/$(PIP) --editable '.[openvino]' || echo "OpenVINO cannot be installed here."
	@touch $@

demo: $(INSTALLED)  ## run the whole pipeline on the bundled sample and show the results
	@echo "The pipeline has $$(grep -c '^    cmd:' dvc.yaml) stages. The first run takes about 6 minutes on two idle CPU cores, most of it"
	@echo "in train and evaluate. A later run repeats only what has changed."
	@dvc repro
	@bestiary results

fast: $(INSTALLED) $(OPENVINO)  ## distil, export and judge the fast variant of the trained adapter (after `make demo`)
	@dvc repro fast/dvc.yaml
	@bestiary results

test: $(INSTALLED) $(OPENVINO)  ## run the whole test suite
	@$(PYTEST)

test-fast: $(INSTALLED) $(OPENVINO)  ## run the tests that take seconds
	@$(PYTEST) -m 'not slow'

test-gpu: $(INSTALLED)  ## run the tests that need a GPU
	@BESTIARY_TEST_GPU=1 pytest tests/gpu

lint: $(INSTALLED)  ## check format, lint, imports and types
	@ruff format --check .
	@ruff check .
	@lint-imports --no-cache --no-logo
	@mypy

bench: $(INSTALLED) $(OPENVINO)  ## measure speed side by side (more than 15 minutes, 8 GB of memory)
	@python benchmarks

app: $(INSTALLED)  ## start the web page
	@bestiary app

mlflow: $(INSTALLED)  ## open MLflow's page on this project's runs (PORT=5001: at another port)
	@bestiary tracking ui --port $(PORT)

world: $(INSTALLED)  ## draw the sample and train the bundled models from scratch (hours)
	@python tools/make_samples.py && torchrun --nproc-per-node 2 tools/make_world.py

clean:  ## remove the pipeline's outputs; keep .venv, MLflow's runs and everything that Git tracks
	@rm -rf build/* data models/adapter reports/*.json .cache/encode .cache/train .cache/distill .cache/evaluate
	@rm -rf reports/clean reports/train reports/evaluate reports/operating_point reports/benchmark
