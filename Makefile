# Everything is set up from Python and make alone; a second run installs nothing.
PYTHON ?= python3
MODEL ?= labels
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints-cpu.txt

.DEFAULT_GOAL := help
.PHONY: help demo check test lint bench accuracy gpu-check test-oldest test-triton weekly test-slow test-week interleavings \
	matrix mutants upstream train clean
# The release of Triton that a sample of each kernel test and the budgets run on before a merge: the oldest one.
# Those of `make test` run on the one of constraints-cpu.txt, and with `make weekly` all run on all of them.
TRITON_SAMPLE := 3.6
TRITON_ALL := 3.6 3.7 3.8 3.9
# What says no more of the oldest Transformers than other tests do, and is left to `make weekly`.
OLDEST := not flex_attention and not llava-gqa and not test_any_interleaving and (not qwen or golden)
XDIST := --numprocesses auto --maxprocesses 4 --dist worksteal
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=15 $(XDIST)

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(VENV)/.runtime ## See a small VLM answer with its visual tokens dense, removed and rerouted
	$(BIN)/reroute demo

check: lint ## While you work: style, types and the quick tests, on one model and one executor
	$(PYTEST) tests/unit tests/reference tests/golden tests/routing -m "not slow" -k "not qwen and not llava-gqa"
	$(PYTEST) tests/kernels --executor interpreter --sample

test: $(VENV)/.dev ## Run the tests
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.dev ## Run the tests that say little more than quicker ones (minutes)
	$(PYTEST) -m slow

lint: $(VENV)/.dev ## Check style, types and which part imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find tests -mindepth 2 -name conftest.py | xargs -n 1 $(BIN)/mypy  # one at a time: all of them are called conftest
	$(BIN)/lint-imports

bench: $(VENV)/.dev ## Measure prefill, decode and memory on this machine
	$(BIN)/python -m bench.end_to_end

accuracy: $(VENV)/.dev ## Every method, routed and removed, on 3000 questions, also under noise and clutter (hours; goes on)
	$(BIN)/python -m bench.accuracy $(ACCURACY)

gpu-check: $(VENV)/.dev ## With a GPU, in nine minutes: are the kernels right, and how fast are prefills and operations
	$(BIN)/python -m bench.gpu_check

test-oldest: .venv-oldest/.dev ## Run the tests that touch Transformers on the oldest release supported
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest --durations=15 $(XDIST) \
		tests/routing tests/golden tests/demo tests/training -m "not slow" -k "$(OLDEST)"

test-triton: $(TRITON_SAMPLE:%=test-triton-%) ## Run a sample of the kernel tests, and their budgets, on other releases of Triton

$(TRITON_ALL:%=test-triton-%): test-triton-%: $(VENV)/triton-%
	PYTHONPATH=$(CURDIR)/$< $(PYTEST) tests/kernels --sample

weekly: OLDEST :=
weekly: $(TRITON_ALL:%=all-triton-%) test-slow test-oldest test-week interleavings matrix mutants ## All executors and Tritons, random cases, mutants (hours)

$(TRITON_ALL:%=all-triton-%): all-triton-%: $(VENV)/triton-%
	PYTHONPATH=$(CURDIR)/$< $(PYTEST) tests/kernels --all-executors

test-week: $(VENV)/.dev ## Run over 10 000 random kernel cases in the interpreter: seven seeds, one for each day of a week
	for day in 1 2 3 4 5 6 7; do $(BIN)/python -m pytest tests/kernels -k test_any_ \
		--executor interpreter --examples 480 --hypothesis-seed $$day || exit; done

interleavings: $(VENV)/.dev ## Run 100 000 random steps of two threads that share a model (under an hour)
	INTERLEAVINGS=100000 $(PYTEST) tests/routing/test_interleavings.py

matrix: $(VENV)/.dev ## Run every type of model with every feature, against a dense oracle (minutes)
	MATRIX=all $(PYTEST) tests/families/test_matrix.py

mutants: $(VENV)/.dev ## Plant faults in the kernels one by one, and see that a test notices each (about an hour)
	$(BIN)/python tests/mutants

upstream: $(VENV)/.dev ## Run Transformers' own tests of models without routing and with it, TRANSFORMERS=checkout of what is installed
	$(BIN)/python tests/upstream/upstream.py $(TRANSFORMERS) --keep 1 0.75

train: $(VENV)/.dev ## Train a demo model from scratch, MODEL=labels or MODEL=text (an hour or two on two cores)
	$(BIN)/python -m training.tinyvlm.train --model $(MODEL) --out runs/$(MODEL)

clean: ## Remove the environments and all caches
	rm -rf $(VENV) .venv-oldest .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml constraints-cpu.txt | $(BIN)/python
	$(PIP) -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints-cpu.txt | $(BIN)/python
	$(PIP) -e '.[dev]'
	touch $(VENV)/.runtime $@

.venv-oldest/.dev: pyproject.toml constraints-cpu.txt Makefile
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip --disable-pip-version-check install --quiet -c constraints-cpu.txt \
		-e . transformers==5.17.* pytest pytest-xdist hypothesis
	touch $@

# A folder to put before the environment's own triton: a CUDA build of torch wants the one that it was released with.
$(VENV)/triton-%: | $(VENV)/.dev
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --target $@ triton==$*.*
