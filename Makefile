# Everything is set up from Python and make alone; a second run installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints-cpu.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench gpu-check test-oldest test-triton test-week mutants train clean
# Releases of Triton that every kernel test runs on, in the interpreter and as code for sm_90, and one more that a sample
# of each runs on. The rest of the supported ones, 3.7, is the one of constraints-cpu.txt; code for sm_80 runs there.
TRITON_FULL := 3.6 3.9
TRITON_SAMPLE := 3.8

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(VENV)/.runtime ## See a small VLM answer with its visual tokens dense, removed and rerouted
	$(BIN)/reroute demo

test: $(VENV)/.dev ## Run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: $(VENV)/.dev ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev ## Measure prefill, decode and memory on this machine
	$(BIN)/python -m bench.end_to_end

gpu-check: $(VENV)/.dev ## With a GPU, in nine minutes: are the kernels right, and how fast are prefills and operations
	$(BIN)/python -m bench.gpu_check

test-oldest: .venv-oldest/.dev ## Run the tests that touch Transformers on the oldest release supported
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest tests/routing tests/golden tests/embedded

test-triton: $(TRITON_FULL:%=test-triton-%) $(TRITON_SAMPLE:%=test-triton-%) ## Run the kernel tests on the other releases of Triton supported

$(TRITON_FULL:%=test-triton-%): test-triton-%: $(VENV)/triton-%
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$< $(BIN)/python -m pytest tests/kernels \
		--deselect 'tests/kernels/test_executors.py::test_kernels[simt:80]'

$(TRITON_SAMPLE:%=test-triton-%): test-triton-%: $(VENV)/triton-%
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$< $(BIN)/python -m pytest tests/kernels --sample

test-week: $(VENV)/.dev ## Run over 10 000 random kernel cases in the interpreter: seven seeds, one for each day of a week
	for day in 1 2 3 4 5 6 7; do $(BIN)/python -m pytest tests/kernels -k test_any_ \
		--executor interpreter --examples 480 --hypothesis-seed $$day || exit; done

mutants: $(VENV)/.dev ## Plant faults in the kernels one by one, and see that a test notices each (hours)
	$(BIN)/python tests/mutants

train: $(VENV)/.dev ## Train the embedded model from scratch (about an hour on two cores)
	$(BIN)/python -m reroute.embedded.train --out runs/embedded

clean: ## Remove the environments and all caches
	rm -rf $(VENV) .venv-oldest .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

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
		-e . transformers==5.17.* pytest hypothesis
	touch $@

# A folder to put before the environment's own triton: a CUDA build of torch wants the one that it was released with.
$(VENV)/triton-%: | $(VENV)/.dev
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --target $@ triton==$*.*
