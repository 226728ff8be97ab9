# What a checkout can do. Needs python3 (3.10 to 3.13) with its venv module, and nothing else.
#
#   make demo     set up, then compress the demo model (SmolLM2-135M-Instruct, 30 layers) to 25 layers
#   make test     set up, then what to run before a commit: style, types, tests on six representative families
#   make test-all the same with every family, and with the browser, llama.cpp, mergekit and kill loops
#   make lint     style and types alone
#   make bench    the benchmarks by name: each is run by `python -m benchmarks NAME`
#   make clean    remove what the above made (also the virtual environment)
#
# PYTHON=python3.12 chooses the interpreter of a new environment; PIP_FLAGS goes to pip. LLAMA_CPP=no does not build
# llama.cpp, whose tests skip then.

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
LLAMA_CPP ?= yes
BIN := $(VENV)/bin

# Two cores are shared by two test processes: one thread each is faster than four that wait for one another.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

# pytest parses each module of the plugins it finds by itself when it is first imported, of Hypothesis in the midst of a
# test. Python before 3.11.8 fails where garbage is collected in a parse and a finalizer parses too, as asyncio's does to
# report a lost task's error (CPython issue 106905). Plugins that are named are left as they are.
PYTEST := PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(BIN)/python -m pytest -p xdist -p hypothesispytest
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt

.DEFAULT_GOAL := help

.PHONY: help demo test test-rest test-all lint bench clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
		|| { echo "Python 3.10 to 3.13 is needed; found $$($(PYTHON) --version). Set PYTHON=..."; exit 1; }
	@echo "making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# A stamp says that an installation with these requirements was completed.
$(VENV)/.stamp-demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing intarsia into $(VENV) (the first time this takes minutes: torch is large)"
	@$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing intarsia with its checks into $(VENV) (the first time this takes minutes: torch is large)"
	@$(PIP) -e '.[demo,dev]'
	@touch $@

# The runtime that exported files are tested with is built from source, which needs a C++ compiler. pip keeps what it
# built, so another checkout on this machine does not build it again.
$(VENV)/.stamp-llama: constraints.txt | $(VENV)/.stamp-dev
	@echo "building llama.cpp for the tests of exported files (once; minutes)"
	@$(PIP) llama-cpp-python >$(VENV)/llama-cpp.log 2>&1 || \
		echo "llama.cpp could not be built (see $(VENV)/llama-cpp.log): its tests will skip; rm $@ to try again"
	@touch $@

demo: $(VENV)/.stamp-demo
	$(BIN)/intarsia compress demo --layers 25 -o out/demo-25 --effort quick --calibration self --tokens 8192 --answers 16 --answer-tokens 32 --overwrite

test: lint
	$(TEST_ENV) $(PYTEST) -n 2 --dist worksteal -q

test-rest: $(VENV)/.stamp-dev $(if $(filter yes,$(LLAMA_CPP)),$(VENV)/.stamp-llama)
	$(TEST_ENV) $(PYTEST) -n 2 --dist worksteal -q --cases rest

test-all: test test-rest

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(TEST_ENV) $(BIN)/mypy

bench: $(VENV)/.stamp-dev
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) out dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find intarsia tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
