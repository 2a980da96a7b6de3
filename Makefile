# One command each; .ci/run calls the same ones. Needs Python 3.11 or newer and make; a C compiler
# is used when there is one.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PACKAGES := base adapters service training
CLIENTS := .venv-clients
INSTALLED := $(VENV)/.stamp
INSTALLED_DEV := $(VENV)/.stamp-dev
INSTALLED_ALL := $(VENV)/.stamp-all
ARGS ?=

.PHONY: help serve venv install dev test test-all clients deploy-tools test-deploy test-image load load-tools lint format bench samples console clean

help:
	@echo "make serve     install what is missing, then serve on http://127.0.0.1:8080"
	@echo "make test      the tests but the slow ones      make test-all  all tests"
	@echo "make clients   what others wrote, against our server (a part of test-all)"
	@echo "make test-deploy  the chart and manifests; make deploy-tools fetches what they need"
	@echo "make test-image  the image, built and run   make load      a load test with a report"
	@echo "make lint      ruff and mypy                    make format    let ruff rewrite"
	@echo "make bench     measure on this machine          make samples   train the sample adapters"
	@echo "make docs      build the documentation, to read it in a browser"
	@echo "make console   build the page at / again, after a change of its sources; needs Node"
	@echo "make clean     remove the environment and everything that was built"
	@echo "ARGS=\"...\" is handed on: make serve ARGS=\"--port 9000\""

# One that outlived its Python (a system's upgrade), or that its Python could not finish.
venv:
	@test ! -e $(VENV) || $(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "$(VENV) has no pip for its Python, or that is gone or older than 3.11: \`make clean\`, then again" >&2; exit 1; }

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt $(wildcard setup.py base/kernels/build.py base/kernels/csrc/* service/net/csrc/*) | venv $(BIN)/python
	$(PIP) install --quiet -c constraints.txt setuptools
	$(PIP) install --progress-bar off -c constraints.txt --no-build-isolation -e .
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(PIP) install --quiet --progress-bar off -c constraints.txt --no-build-isolation -e '.[dev,otel,postgres,rag,redis]'
	@touch $@

# Triton runs in its interpreter there: 700 MB, which the quick tests go without.
$(INSTALLED_ALL): $(INSTALLED_DEV)
	$(PIP) install --quiet --progress-bar off -c constraints.txt --no-build-isolation -e '.[cuda]'
	@touch $@

install: $(INSTALLED)
dev: $(INSTALLED_DEV)

serve: $(INSTALLED)
	@exec $(BIN)/nibble serve $(ARGS)

# A file on each core, at most four at once: each loads torch, and none needs more than one thread.
test: $(INSTALLED_DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile $(ARGS)

test-all: $(INSTALLED_ALL)
	$(BIN)/python -m pytest $(ARGS)
	$(MAKE) clients

# An environment over the other one: some clients want older versions of what the project has.
$(CLIENTS)/.stamp: $(INSTALLED_DEV) tests/clients/constraints.txt
	$(BIN)/python -m venv --clear $(CLIENTS)
	echo "$(abspath $(VENV))/lib/python$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')/site-packages" \
	  > $$($(CLIENTS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/under.pth
	$(CLIENTS)/bin/python -m pip --disable-pip-version-check install --quiet --progress-bar off \
	  -c tests/clients/constraints.txt \
	  $$($(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['clients'])")
	@touch $@

clients: $(CLIENTS)/.stamp
	$(CLIENTS)/bin/python -m pytest -o asyncio_mode=auto \
	  -o asyncio_default_fixture_loop_scope=function -W ignore \
	  --timeout 1800 tests/clients $(ARGS)

# A server of its own with memory for some of its adapters; the report goes to build/load.
load: $(INSTALLED)
	$(BIN)/python -m deploy.load $(ARGS)

# What others measure with, over the project's environment as `clients` is. inference-perf says that it
# wants Python 3.12 and one version of transformers; it reads its files and runs without them.
load-tools: $(INSTALLED)
	$(BIN)/python -m venv --clear .venv-load
	echo "$(abspath $(VENV))/lib/python$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')/site-packages" \
	  > $$(.venv-load/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/under.pth
	.venv-load/bin/python -m pip --disable-pip-version-check install --quiet --progress-bar off \
	  -c deploy/load/constraints.txt guidellm locust aiofiles av boto3 google-cloud-storage tiktoken
	.venv-load/bin/python -m pip --disable-pip-version-check install --quiet --progress-bar off \
	  -c deploy/load/constraints.txt --no-deps --ignore-requires-python inference-perf

# helm, kubectl, promtool, Kubernetes' schemas and Ray; without them the tests that need them are
# skipped.
deploy-tools: $(INSTALLED_DEV)
	$(PIP) install --quiet --progress-bar off -c constraints.txt --no-build-isolation -e '.[deploy,ray]'
	deploy/tools.sh

# The Dockerfile, built by buildah over a Debian of mmdebstrap's making, and run; as root.
test-image: $(INSTALLED_DEV)
	deploy/image.sh

test-deploy: $(INSTALLED_DEV)
	$(BIN)/python -m pytest tests/deploy $(ARGS)

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict $(PACKAGES)

format: $(INSTALLED_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/nibble bench $(ARGS)

# Warnings are errors, mkdocs.yml says; the site lies in build/site and needs no network.
docs: $(INSTALLED_DEV)
	$(PIP) install --quiet --progress-bar off -c constraints.txt --no-build-isolation -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/python -m mkdocs build --quiet $(ARGS)
	@echo "open build/site/index.html"

samples: $(INSTALLED)
	$(BIN)/nibble train samples $(ARGS)

console:
	cd service/console && npm ci --no-fund --no-audit && npm run build

clean:
	rm -rf $(VENV) $(CLIENTS) .venv-load service/console/node_modules build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f base/kernels/_native.* service/net/_net.*
	find $(PACKAGES) tests -name __pycache__ -type d -prune -exec rm -rf {} +
