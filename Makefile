PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: test lint

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "== creating $(VENV) and installing lightning_soo with its test tools (minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

test: $(VENV)/.installed
	@echo "== running the tests"
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check lightning_soo callbacks tests
	$(BIN)/mypy
