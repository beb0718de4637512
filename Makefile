# Two commands: `make demo` and `make test`. Both make .venv and install by themselves. `make quick` while you work.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-oracle quick exhaustive lint clean

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
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
