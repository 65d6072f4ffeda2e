# `make demo` and `make test` do all the set-up on a fresh machine; CI runs the same commands.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format wheel bench docs clean

demo: $(VENV)/.demo
	$(BIN)/diffaccel demo

# One thread a test process: two processes of two threads each only wait for one another on two cores.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/bin/python
	rm -rf dist
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

# The tables of the README: about half an hour on two cores.
bench: $(VENV)/.test
	$(BIN)/python benchmarks/solver_tables.py --prompts 32 --seeds 4 --guidance-scale 4 --steps 5 8 10

docs: $(VENV)/bin/python
	$(BIN)/pip install --quiet -e ".[docs]"
	$(BIN)/mkdocs build --strict

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -e .
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -e ".[test,oracles]"
	touch $@

clean:
	rm -rf $(VENV) dist site .pytest_cache .ruff_cache
