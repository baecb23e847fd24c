# make demo and make test each set everything up from a fresh clone: Python 3.11 and nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test benchmarks-quick lint types setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/dyncompress demo --out runs/demo --overwrite

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

test: lint types
	$(BIN)/python -m pytest -n 2

benchmarks-quick: setup
	$(BIN)/python -m pytest tests/cli/test_benchmarks.py -m '' -vv -rs --durations=0

.PHONY: wheel-test
wheel-test: setup
	$(BIN)/python -m pytest tests/cli/test_wheel.py -m ''

clean:
	rm -rf .venv build dist *.egg-info
