# One command each; .ci/run calls the same ones. Needs Python 3.11 or newer and make; a C compiler
# is used when there is one.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PACKAGES := base adapters service training
INSTALLED := $(VENV)/.stamp
INSTALLED_DEV := $(VENV)/.stamp-dev
ARGS ?=

.PHONY: help serve install dev test test-all lint format bench samples clean

help:
	@echo "make serve     install what is missing, then serve on http://127.0.0.1:8080"
	@echo "make test      the tests but the slow ones      make test-all  all tests"
	@echo "make lint      ruff and mypy                    make format    let ruff rewrite"
	@echo "make bench     measure on this machine          make samples   train the sample adapters"
	@echo "make clean     remove the environment and everything that was built"
	@echo "ARGS=\"...\" is handed on: make serve ARGS=\"--port 9000\""

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt $(wildcard setup.py base/kernels/build.py base/kernels/csrc/*) | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt setuptools
	$(PIP) install --progress-bar off -c constraints.txt --no-build-isolation -e .
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(PIP) install --quiet --progress-bar off -c constraints.txt --no-build-isolation -e '.[dev,rag]'
	@touch $@

install: $(INSTALLED)
dev: $(INSTALLED_DEV)

serve: $(INSTALLED)
	@exec $(BIN)/nibble serve $(ARGS)

test: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: $(INSTALLED_DEV)
	$(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict $(PACKAGES)

format: $(INSTALLED_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/nibble bench $(ARGS)

samples: $(INSTALLED)
	$(BIN)/nibble train samples $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f base/kernels/_native.*
	find $(PACKAGES) tests -name __pycache__ -type d -prune -exec rm -rf {} +
