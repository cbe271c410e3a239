# `make chat` and `make test` set everything up on a fresh machine and run.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TRITON := $(VENV)/.triton
OLDEST := .venv-oldest

.PHONY: help install chat test soak test-oldest lint wheel-test gpu-kit gpu-check clients clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

install: $(INSTALLED) ## Make the virtual environment and install vkv into it

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "vkv needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# A gigabyte that only tests want, to interpret kernels; PyTorch for CUDA has brought it already.
# No version is pinned, since that PyTorch names its own.
$(TRITON): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt 'triton>=3.5,<4'
	@touch $@

chat: $(INSTALLED) ## Chat with the built-in tiny model, on the CPU
	@$(BIN)/vkv chat --device cpu $(ARGS)

# In several processes (tests/conftest.py says how many). They share the processors, so a thread that
# waits for another must not keep one busy.
test: $(TRITON) ## Run the test suite; ARGS goes to pytest
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

soak: $(INSTALLED) ## Soak everything at once, ten minutes; ARGS goes to `vkv soak`
	OMP_WAIT_POLICY=passive $(BIN)/vkv soak --minutes 10 $(ARGS)

# The same pins, but for what must be as old: that transformers wants a huggingface_hub below 2.
$(OLDEST)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -vE '^(transformers|huggingface_hub)==' constraints.txt >$(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt \
	  transformers==5.17.0 torch==2.13.0 -e '.[dev]'
	@touch $@

test-oldest: $(OLDEST)/.installed ## Run what meets transformers with the oldest version that vkv takes
	$(OLDEST)/bin/python -m pytest tests/runtime/virtual_cache tests/runtime/model \
	  tests/runtime/engine/test_engine.py $(ARGS)

# The type checker sees the folders as they are once installed, in one namespace: linked, not copied.
lint: $(TRITON) ## Lint, check the format and the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/types && mkdir -p build/types/vkv
	@cp -rl vmem allocator attention_backends quant runtime examples/tiny_chat build/types/vkv/
	@cp -rl benchmarks/harness build/types/vkv/bench
	@cp -l runtime/facade/__init__.py build/types/vkv/
	$(BIN)/pyright

wheel-test: $(INSTALLED) ## Build the wheel, install it into a clean environment and chat from there
	PYTHON=$(PYTHON) BUILDER=$(BIN)/python tests/wheel_smoke.sh

gpu-kit: $(INSTALLED) ## Gather what a bare machine with a GPU lacks into gpu-kit/
	$(BIN)/python benchmarks/gpu/gpu_kit.py $(ARGS)

gpu-check: $(INSTALLED) ## Rehearse on the CPU what `gpu_check.py` does on such a machine
	$(BIN)/python benchmarks/gpu/gpu_check.py --device cpu --out build/gpu-check $(ARGS)

clients: $(INSTALLED) ## Run clients as their users install them against a server; ARGS names some
	$(BIN)/python tests/attacks/clients.py $(ARGS)

clean: ## Remove the virtual environment and what builds leave behind
	rm -rf $(VENV) $(OLDEST) build dist gpu-kit *.egg-info .pytest_cache .ruff_cache .hypothesis
