# `make run` and `make test` do everything on a fresh machine; uv is used where it is installed.
PYTHON ?= python3
BIN := .venv/bin
UV := $(shell command -v uv 2>/dev/null)

.PHONY: run test long slow lint docs clean

run: .venv/installed
	$(BIN)/python train.py experiment=first_run

test: .venv/installed
	$(BIN)/python -m pytest

long: .venv/installed
	$(BIN)/python -m pytest -m long

slow: .venv/installed
	$(BIN)/python -m pytest -m slow -s

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/docs
	$(BIN)/python -m sphinx --quiet --fresh-env --fail-on-warning --keep-going docs docs/_build/html

.venv/installed: pyproject.toml
ifdef UV
	uv venv --allow-existing .venv
	uv pip install --python $(BIN)/python -e '.[dev]'
else
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[dev]'
endif
	touch $@

.venv/docs: .venv/installed
ifdef UV
	uv pip install --python $(BIN)/python -e '.[docs]'
else
	$(BIN)/python -m pip install --quiet -e '.[docs]'
endif
	touch $@

clean:
	rm -rf .venv build docs/_build *.egg-info
