# The environment is .venv, made from requirements.lock. Another interpreter than
# python3 serves with, say, `make book PYTHON=python3.12`.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.DEFAULT_GOAL := help
.PHONY: help setup book test lint sync format bench bench-test clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

setup: $(READY)  ## make .venv with the pinned dependencies and the library

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, not " + sys.version)'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo "installing requirements.lock into .venv: a few minutes, once"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

book: $(READY)  ## execute what changed and render the book to build/site/_build/html
	$(BIN)/python tools/build_book.py

test: lint  ## lint, unit tests, pairs in step, every chapter with small parameters
	$(BIN)/python -m pytest

lint: $(READY)  ## check style, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check benchmarks lib tests tools

sync: $(READY)  ## derive each book/NN_name.ipynb from its .md
	$(BIN)/python tools/sync_twins.py

format: $(READY)  ## mend style where a program can
	$(BIN)/ruff check --fix benchmarks lib tests tools
	$(BIN)/ruff format benchmarks lib tests tools

BENCH := benchmarks/.venv
SECTIONS ?=

$(BENCH)/ready: benchmarks/requirements.lock pyproject.toml
	test -x $(BENCH)/bin/pip || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.lock
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

bench: $(BENCH)/ready  ## measure speed and memory beside the peers, in an environment of their own
	$(BENCH)/bin/python benchmarks/bench.py $(SECTIONS)

bench-test: $(BENCH)/ready  ## try the deblender inside BlendingToolKit, and scarlet2, in the same environment
	$(BENCH)/bin/python -m pytest benchmarks

clean:  ## remove what was built, but not .venv
	rm -rf build
