# make demo      see everything work on a CPU, in minutes           make test        set up .venv and pass the tests (minutes)
# make lint      style and types                                    make test-slow   the tests that take longer
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint
demo: .venv/ready
	$(BIN)/python -m tools.demo

test: .venv/ready-dev
	$(BIN)/python -m pytest -m "not slow" --numprocesses logical --maxprocesses 8 --dist loadfile

test-slow: .venv/ready-dev
	$(BIN)/python -m pytest -m slow --numprocesses 3 --dist loadfile --no-loadscope-reorder

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and alone: the rest builds against it. constraints.txt holds what CI runs; on a cluster install requirements.txt beside
# the torch that fits its driver, and then requirements-metrics.txt with --no-deps.
.venv/ready: requirements.txt requirements-metrics.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Earwitness needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": say which one to use, as in `make demo PYTHON=python3.12`")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --requirement requirements.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --requirement requirements-metrics.txt --no-deps
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --requirement requirements-dev.txt
	touch $@
