# make test      set up .venv and pass the tests (minutes)        make test-slow   the tests that take longer
# make lint      style and types
PYTHON ?= python3
BIN := .venv/bin

.PHONY: test test-slow lint
test: .venv/ready
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and alone: the rest builds against it. constraints.txt holds what CI runs; on a cluster install requirements.txt beside
# the torch that fits its driver.
.venv/ready: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --requirement requirements-dev.txt
	touch $@
