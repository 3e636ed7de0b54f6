# Every target sets up what it needs; the first one takes some minutes to install.
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format bench clean

help:  ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

$(SETUP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; say which one: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(SETUP)  ## Prepare, train, export, evaluate and serve on two CPU cores, 6 to 23 minutes
	$(BIN)/jit demo

test: $(SETUP)  ## Run the tests that take seconds
	$(BIN)/pytest -q -m "not slow"

test-slow: $(SETUP)  ## Run the tests that take minutes: kills, real `ray up`, speed of preparation
	$(BIN)/pytest -q -m slow

lint: $(SETUP)  ## Check style, types and which module may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(SETUP)  ## Mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(SETUP)  ## Measure speed side by side: a table, and JSON under bench/
	$(BIN)/python tests/bench $(WHAT)

clean:  ## Delete the environment and everything that was generated
	rm -rf .venv demo bench build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
