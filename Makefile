# Everything here sets itself up: Python 3.11 or newer and make are enough. `make` lists the targets.

SHELL := bash
.DEFAULT_GOAL := help
.NOTPARALLEL:

# The Python that makes .venv; by default the first of these that is new enough.
PYTHONS := python3.13 python3.12 python3.11 python3 python
PYTHON ?=
CONFIG ?= examples/heart_disease.yaml
# By file, so that a server or a model that tests of a file share is made once; conftest.py puts the longest first.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
BENCH_ARGS ?=
# With a thread for each core in each of two processes, the threads wait for each other, which costs 8 %.
test test-ci test-all: export OMP_NUM_THREADS := 1

VENV := .venv
BIN := $(VENV)/bin
LOG := $(VENV)/install.log
SERVER := $(VENV)/.installed-server
DEV := $(VENV)/.installed-dev

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

# $(call pip_install,EXTRA): pip with a dot for every few packages; all that it says goes to $(LOG).
# torch first and exact: left to a range, pip may choose a release that brings gigabytes of CUDA.
define pip_install
@set -o pipefail; start=$$SECONDS; : > $(LOG); \
dots() { n=0; while read -r line; do case $$line in \
	Collecting*|Obtaining*|Requirement*) n=$$((n + 1)); if [ $$((n % 8)) = 1 ]; then printf .; fi ;; \
	Installing\ collected*) printf ' writing files' ;; esac; done; echo; }; \
run() { printf '  %s ' "$$1"; shift; $(BIN)/python -m pip install --progress-bar off -c constraints.txt "$$@" 2>&1 \
	| tee -a $(LOG) | dots || { tail -n 15 $(LOG); echo "Installing failed. All that pip said is in $(LOG)."; exit 1; }; }; \
echo "Installing fedrounds[$(1)] into $(VENV): about 3 minutes and 2 GB the first time."; \
run 'PyTorch        ' torch==2.13.0; \
run 'all the others ' -e '.[$(1)]'; \
echo "Installed in $$((SECONDS - start)) s."
endef

.PHONY: help
help:  ## List these targets
	@awk -F ':.*##' '/^[a-z-]+:.*##/ {printf "  make %-10s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: train
train: $(SERVER)  ## Train on the example (CONFIG=FILE for another configuration)
	$(BIN)/fedrounds train $(CONFIG)

.PHONY: ui
ui: $(SERVER)  ## Serve the Prefect and MLflow pages of your runs until Ctrl-C
	$(BIN)/fedrounds ui

.PHONY: test
test: $(DEV)  ## Run the quick tests (PYTEST_ARGS="..." replaces "-n 2" and how tests are dealt out)
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

.PHONY: test-ci
test-ci: $(DEV)  ## Run a chosen part of the slow tests
	$(BIN)/python -m pytest -m "ci or browser" $(PYTEST_ARGS)

.PHONY: test-all
test-all: $(DEV)  ## Run all tests, every generated case and the slow ones too
	$(BIN)/python -m pytest $(PYTEST_ARGS)

.PHONY: check
check: $(DEV)  ## Check style, types and the layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

.PHONY: bench
bench: $(SERVER)  ## Time fedrounds beside its peers on MNIST (BENCH_ARGS="--quick" for a short run)
	$(BIN)/python -m benchmarks.peers.bench $(BENCH_ARGS)

.PHONY: install
install: $(SERVER)  ## Make .venv with fedrounds in it, and no more
	@echo "Ready: $(BIN)/fedrounds --help"

.PHONY: clean
clean:  ## Remove .venv and what the tools left here; your runs (in ~/.fedrounds) stay
	rm -rf $(VENV) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find fl_components tasks flows deployments tests -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@python=; for name in $(or $(PYTHON),$(PYTHONS)); do \
		if "$$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
			python=$$name; break; fi; done; \
	if [ -z "$$python" ]; then \
		echo "fedrounds needs Python 3.11 or newer with its venv module, and none of these is: $(or $(PYTHON),$(PYTHONS))."; \
		echo "Install one (on Debian and Ubuntu: apt-get install python3 python3-venv), or name it: make PYTHON=/path/to/python3"; \
		exit 1; fi; \
	echo "Making $(VENV) with $$("$$python" --version)."; \
	"$$python" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(SERVER): pyproject.toml constraints.txt | $(BIN)/python
	$(call pip_install,server)
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(call pip_install,dev)
	@touch $(SERVER) $@
