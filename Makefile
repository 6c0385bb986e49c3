# `make run` and `make test` do everything on a fresh machine; uv is used where it is installed.
PYTHON ?= python3
BIN := .venv/bin
UV := $(shell command -v uv 2>/dev/null)

.PHONY: run test slow lint clean

run: .venv/installed
	$(BIN)/python train.py optimizer=hebbian

test: .venv/installed
	$(BIN)/python -m pytest

slow: .venv/installed
	$(BIN)/python -m pytest -m slow -s

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml
ifdef UV
	uv venv --allow-existing .venv
	uv pip install --python $(BIN)/python -e '.[dev]'
else
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[dev]'
endif
	touch $@

clean:
	rm -rf .venv build *.egg-info
