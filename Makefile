# `make demo` and `make test` do all their set-up themselves; `make help` lists the rest.
SHELL := /bin/bash

# What may be given on the command line, as in `make demo DEMO_DIR=/data/demo SEED=7`:
DEMO_DIR ?= demo
SEED ?=
DEMO_ARGS ?=
TEST_ARGS ?=
TEST_PROCESSES ?= 2
COMPAT_VERSIONS ?=

VENV := .venv
SHELL_FILES := $(wildcard *.sh */*.sh benchmarks/quality/manuals/*.sh) .ci/run
# The tools of the environment first; setup_env.sh keeps the caller's PATH.
IN_VENV := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
# Nothing is downloaded after the set-up, and no result is sent anywhere.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=offline

# Dozens of processes import the same packages: compiled modules are kept.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test compat lint format lock clean distclean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo 'Variables: DEMO_DIR=demo SEED= DEMO_ARGS= TEST_ARGS= (of the demo and pytest) TEST_PROCESSES=2; for the set-up: ./setup_env.sh --help'

setup:  ## make .venv from requirements.lock, if it is not there yet
	@VENV=$(VENV) ./setup_env.sh

demo: setup  ## the whole pipeline on drawn sample data, into DEMO_DIR
	@$(IN_VENV) $(OFFLINE) python -m dct_qwen2vl.toy.demo --output-dir "$(DEMO_DIR)" $(if $(SEED),--seed $(SEED)) $(DEMO_ARGS)

test: lint  ## lint, then all tests; TEST_ARGS="tests/repository/test_setup.py -k lock" for some
	$(IN_VENV) $(OFFLINE) python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

compat: setup  ## the same logits in other versions of transformers? Fetches two (70 MB each)
	@$(IN_VENV) python -m benchmarks.compat.compare_versions $(COMPAT_VERSIONS)

lint: setup  ## ruff, shellcheck, hadolint
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) shellcheck $(SHELL_FILES)
	$(IN_VENV) hadolint Dockerfile

format: setup  ## bring the Python files into ruff's format
	$(IN_VENV) ruff check --fix .
	$(IN_VENV) ruff format .

# Needs uv. Keeps the versions that are locked already where requirements.txt allows them; delete the lock to renew all.
# sed takes out the condition that every line would repeat, [tool.uv] environments of pyproject.toml, and PyPy.
PLATFORM := platform_machine == 'x86_64' and sys_platform == 'linux'
lock:  ## make requirements.lock from requirements.txt
	UV_CUSTOM_COMPILE_COMMAND='make lock' uv pip compile --quiet --universal --python-version 3.10 \
	  --fork-strategy fewest --annotation-style line requirements.txt --output-file requirements.lock
	sed -i -E -e "s/ and $(PLATFORM)//" \
	  -e "s/ ; python_full_version < '3.13'( and implementation_name != 'PyPy')?  #/  #/" requirements.lock

clean:  ## remove what demo and test made
	rm -rf demo .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## remove .venv, too
	rm -rf "$(VENV)" "$(VENV).old" "$(VENV).uv" .compat
