# `make demo` and `make test` work on a machine that has Python and make: each makes a virtual environment, fills it and runs.
# A second run installs nothing unless pyproject.toml has changed. `make help` lists the rest.

VENV ?= .venv
PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
# Passed on to pytest and to the demo, for example: make test PYTEST_ARGS='-k ring', make demo DEMO_ARGS='--world-size 4'
PYTEST_ARGS ?=
# Test files run side by side in so many processes; 0 runs them one after the other.
WORKERS ?= 2
DEMO_ARGS ?=
# Of make test-long: programs whose ranks are threads, programs whose ranks are processes, the first seed, and --fresh or --explain SEED.
COUNT ?= 10000
REAL ?= 500
SEED ?= 0
LONG_ARGS ?=

# Only when nobody chose a PYTHON, versions with their own names are tried after it.
PYTHON_CANDIDATES := $(PYTHON) $(if $(filter file,$(origin PYTHON)),python3.11 python3.12 python3.13 python3.14)

BIN := $(VENV)/bin
RUN := $(BIN)/python -m
PIP_INSTALL := $(RUN) pip install --no-input --disable-pip-version-check
TORCH := torch==$(TORCH_VERSION)
TORCH_STAMP := $(VENV)/.installed-torch-$(TORCH_VERSION)
DEMO_STAMP := $(VENV)/.installed-demo
TEST_STAMP := $(VENV)/.installed-test
TYPES := build/types

# A type checker cannot follow an editable install that maps folders to package names, so it is shown the package as it is
# installed: a tree under build/ whose files are links to ours (links to folders it would pass over).
define LINT
echo "ruff:"; $(RUN) ruff check . || status=$$?; \
rm -rf $(TYPES); \
for file in $$(find autoseq passes runtime -name '*.py'); do \
  link=$(TYPES)/autoseq/$${file#autoseq/}; \
  mkdir -p "$${link%/*}" && ln -s "$(CURDIR)/$$file" "$$link" || exit 1; \
done; \
echo "pyright:"; PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(RUN) pyright --pythonpath $(BIN)/python || status=$$?
endef

.PHONY: demo test test-long browser lint fix gpu-test clean help
.DEFAULT_GOAL := help

demo: $(DEMO_STAMP)  ## Train a small Llama on 2 ranks beside the same training on one device
	$(BIN)/autoseq demo $(DEMO_ARGS)

# Without the last, Inductor starts a pool of workers, which import torch once more for each rank and serve Triton alone.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TORCH_WARM_POOL=0

# Both parts always run, so that one push shows every failure; pytest comes last, so its closing line is the last word on the tests.
test: $(TEST_STAMP)  ## Lint, check types, run the test suite
	@status=0; $(LINT); \
	echo "pytest:"; $(TEST_ENV) $(RUN) pytest -q -n $(WORKERS) --dist worksteal $(PYTEST_ARGS) || status=$$?; \
	if [ $$status -ne 0 ]; then echo "make test: FAILED (lint or tests, see above)" >&2; fi; \
	exit $$status

# An installation that cannot be is no failure. Its time is bounded, and what apt-get prints is shown only where it did not help.
HAS_BROWSER := command -v chromium || command -v chromium-browser || command -v google-chrome
APT_GET := apt-get -q -o Acquire::Retries=1 -o Acquire::http::Timeout=30 -o DPkg::Lock::Timeout=60

browser:  ## Install Chromium, in which the HTML report is tested, where it is missing and apt-get can (as root)
	@if ! { $(HAS_BROWSER); } >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing Chromium"; export DEBIAN_FRONTEND=noninteractive; \
	  said=$$( (timeout 120 $(APT_GET) update && timeout 480 $(APT_GET) install -y chromium) 2>&1 </dev/null) || echo "$$said" | tail -n 3; \
	fi; \
	{ $(HAS_BROWSER); } || echo "no browser is here and none can be installed: the tests in a browser will be skipped"

lint: $(TEST_STAMP)  ## Lint and check types, nothing else
	@status=0; $(LINT); exit $$status

fix: $(TEST_STAMP)  ## Apply the repairs that ruff is sure of
	$(RUN) ruff check --fix .

gpu-test: $(TEST_STAMP)  ## Run the tests that need a GPU, and only those
	HF_HUB_OFFLINE=1 $(RUN) pytest -q -m gpu $(PYTEST_ARGS)

test-long: $(TEST_STAMP)  ## Run thousands of random programs (COUNT, SEED, REAL; resumable), on ranks that are threads and on real ones
	$(TEST_ENV) $(BIN)/python tests/long_run.py --count $(COUNT) --real $(REAL) --seed $(SEED) $(LONG_ARGS)

clean:  ## Remove everything that make and the tests have made, the environment too
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

# torch goes in by itself and first: left to a range, pip would take the newest build, with gigabytes of CUDA packages.
$(TORCH_STAMP):
	@python=; \
	for candidate in $(PYTHON_CANDIDATES); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "autoseq needs Python 3.11 or later, and '$(PYTHON)' is $$("$(PYTHON)" --version 2>/dev/null || echo 'not there')." >&2; \
	  echo "Install a later Python, or name one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; \
	  exit 1; \
	fi; \
	echo "making $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv $(VENV) || { echo "Python's venv module failed; Debian and Ubuntu have it in the package python3-venv." >&2; exit 1; }
	$(PIP_INSTALL) $(TORCH)
	@touch $@

# torch is named again so that no dependency can replace it.
$(VENV)/.installed-%: pyproject.toml | $(TORCH_STAMP)
	$(PIP_INSTALL) --editable '.[$*]' $(TORCH)
	@touch $@
