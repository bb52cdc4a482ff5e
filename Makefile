# Each target creates .venv and installs what it needs on first use, and again when
# pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test check docs bench tutorials

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/installed-demo ## train a small MoDA language model for two minutes; writes out/demo
	$(BIN)/python -m moda_ops demo

test: $(VENV)/installed-test ## run every test and every notebook
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --benchmark-disable \
		--nbval --nbval-current-env --nbval-sanitize-with tutorials/sanitize.cfg

check: $(VENV)/installed-dev ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed-docs ## build the documentation into docs/_build/html
	$(BIN)/sphinx-build --fail-on-warning --keep-going -b html docs docs/_build/html

tutorials: $(VENV)/installed-test ## execute the notebooks and write their outputs into them
	OMP_NUM_THREADS=1 $(BIN)/python tutorials/execute.py

bench: $(VENV)/installed-test ## time the operator beside its peers, and its host side; writes out/bench
	$(BIN)/python -m moda_ops bench
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$*]'
	@touch $@
