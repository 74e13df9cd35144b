# The same few commands for people and for CI. Every target sets up what it needs and is quick when nothing has changed.

PYTHON ?= python3
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet --no-deps
REQUIREMENTS := deployments/requirements-cpu.txt deployments/requirements-dev.txt
TORCH := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' deployments/requirements-cpu.txt)

.DEFAULT_GOAL := help
.PHONY: help setup check test test-fast demo bench chaos clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.ready ## make .venv with the pinned requirements and this package

.venv/.ready: $(REQUIREMENTS) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "rlhf_ray needs Python 3.11 or newer, and $(PYTHON) is not: say which to use, as in 'make setup PYTHON=python3.12'."; exit 1; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || { \
	    echo "Making .venv with $$($(PYTHON) --version)."; $(PYTHON) -m venv --clear .venv; }
	@echo "Installing $(TORCH) (about 200 MB)."
	@$(PIP) $(TORCH) > .venv/torch.log 2>&1 || { \
	    echo "The configured package indexes do not have it (.venv/torch.log); asking $(TORCH_INDEX)."; \
	    $(PIP) --index-url $(TORCH_INDEX) $(TORCH); }
	@echo "Installing $$(cat $(REQUIREMENTS) | grep -c '^[[:alnum:]]') pinned packages (about 1 GB; a minute or two)."
	@$(PIP) $(REQUIREMENTS:%=-r %)
	@$(PIP) --no-build-isolation --editable .
	@touch $@
	@echo "Ready: $(BIN)/rlhf-ray"

check: setup ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test: setup ## all tests
	$(BIN)/python -m pytest

test-fast: setup ## the tests that start neither Ray nor vLLM
	$(BIN)/python -m pytest -m "not ray and not vllm and not serve and not slow"

demo: setup ## the whole of RLHF on a small language model, without a GPU
	$(BIN)/rlhf-ray demo --overwrite

bench: setup ## PPO beside TRL, the learner alone, the reward service beside its peers
	$(BIN)/python tests/bench/learner.py
	$(BIN)/python tests/bench/ppo_throughput.py --trl
	$(BIN)/python tests/bench/reward_service.py

chaos: setup ## kill a PPO run's processes at random, scale it, kill and resume it; see that it keeps its promises
	$(BIN)/python tests/chaos/kills.py
	$(BIN)/python tests/chaos/kills.py --elastic
	$(BIN)/python tests/chaos/resume_cycles.py

clean: ## remove .venv, builds and caches; runs/ stays
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find rlhf_ray tests -name __pycache__ -type d -prune -exec rm -rf {} +
