# Two commands: `make demo` and `make test`. Both make .venv and install by themselves. `make quick` while you work.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
GPU_VENV := .venv-gpu
GPU_PYTHON ?= $(PYTHON)

.PHONY: demo test test-oracle test-gpu-compile quick exhaustive lint clean

demo: $(VENV)/.runtime
	$(BIN)/python -m gt_jax.demo --output demo

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# At most two minutes on two cores: what fails on most mistakes (tests/conftest.py names it).
quick: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --quick

# Every case of what the suite samples.
exhaustive: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m exhaustive -o timeout=1800

# Public families against transformers and PyTorch, installed for it alone (a wheel for CPUs will do: PIP_EXTRA_INDEX_URL).
test-oracle: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[oracle]'
	$(BIN)/python -m pytest -m oracle tests/oracle -rs

# The Hopper kernels, compiled for a card that is not here and interpreted. Their JAX needs Python 3.12 and has its own
# environment; the interpreter waits for ever with fewer threads than a block has warpgroups.
test-gpu-compile: $(GPU_VENV)/.installed
	NPROC=16 PJRT_NPROC=16 timeout 5400 $(GPU_VENV)/bin/python -m pytest -rs -o timeout=1800 \
	  tests/kernels/test_gated_delta_rule_choice.py tests/kernels/test_gated_delta_rule_gpu.py \
	  tests/kernels/test_gpu_compile.py tests/kernels/test_grouped_product_gpu.py

$(GPU_VENV)/.installed: pyproject.toml
	$(GPU_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "the JAX of the GPU kernels needs Python 3.12 or newer; name one with: make GPU_PYTHON=python3.12 test-gpu-compile")'
	$(GPU_PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,gpu-compile]'
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check gt_jax pallas_kernels experiments tests
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gt_jax needs Python 3.11 or newer; name one with: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(STAMP): $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(GPU_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
