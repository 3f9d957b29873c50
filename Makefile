.PHONY: demo test quality style study

PYTHON ?= python3
BIN := .venv/bin
# The tests and the demo install the exact versions they were made with; leave CONSTRAINTS empty to take the newest.
CONSTRAINTS ?= -c constraints.txt
CODE := hf_adaprune tests examples

demo: .venv/demo
	$(BIN)/hf-adaprune demo

test: .venv/dev
	$(BIN)/python -m pytest -n auto

quality: .venv/dev
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

# GLUE: a folder with {task}/{train,validation}.parquet. Goes on where it was stopped.
study: .venv/dev
	$(BIN)/python examples/study/run.py --data_dir $(GLUE)
	$(BIN)/python examples/study/report.py

style: .venv/dev
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

.venv/bin/python:
	$(PYTHON) -m venv .venv

# A stamp for each set of extras: installed again when what is asked for changes.
.venv/%: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e ".[$*]"
	touch $@
