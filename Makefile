# Everything is set up from Python and make alone; a second run installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints-cpu.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench gpu-check test-oldest test-triton test-week train clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(VENV)/.runtime ## See a small VLM answer with its visual tokens dense, removed and rerouted
	$(BIN)/reroute demo

test: $(VENV)/.dev ## Run all tests
	$(BIN)/python -m pytest

lint: $(VENV)/.dev ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev ## Measure prefill, decode and memory on this machine
	$(BIN)/python -m bench

gpu-check: $(VENV)/.dev ## With a GPU: kernel tests, sanitizers, CUDA graph, micro-benchmarks; one table
	$(BIN)/python -m bench.gpu_check

test-oldest: .venv-oldest/.dev ## Run the tests that touch Transformers on the oldest release supported
	.venv-oldest/bin/python -m pytest tests/routing tests/golden tests/embedded

test-triton: .venv-triton/.dev ## Run the kernel tests on the newest release of Triton supported
	.venv-triton/bin/python -m pytest tests/kernels

test-week: $(VENV)/.dev ## Run over 10 000 random kernel cases in the interpreter: seven seeds, one for each day of a week
	for day in 1 2 3 4 5 6 7; do $(BIN)/python -m pytest tests/kernels -k test_any_ \
		--executor interpreter --examples 480 --hypothesis-seed $$day || exit; done

train: $(VENV)/.dev ## Train the embedded model from scratch (about an hour on two cores)
	$(BIN)/python -m reroute.embedded.train --out runs/embedded

clean: ## Remove the environments and all caches
	rm -rf $(VENV) .venv-oldest .venv-triton .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml constraints-cpu.txt | $(BIN)/python
	$(PIP) -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints-cpu.txt | $(BIN)/python
	$(PIP) -e '.[dev]'
	touch $(VENV)/.runtime $@

.venv-oldest/.dev: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip --disable-pip-version-check install --quiet -c constraints-cpu.txt \
		-e . transformers==5.20.* pytest hypothesis
	touch $@

.venv-triton/.dev: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv .venv-triton
	.venv-triton/bin/python -m pip --disable-pip-version-check install --quiet -c constraints-cpu.txt \
		-e . pytest hypothesis
	# Past pip's resolver: CUDA builds of torch want the one triton that they were released with.
	.venv-triton/bin/python -m pip --disable-pip-version-check install --quiet --no-deps triton==3.9.*
	touch $@
