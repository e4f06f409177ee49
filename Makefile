# make reproduce | test | lint | bench | lab | docs | render | clean | help
# Every target sets up its own virtual environment first; only Python 3.11 or newer has to be there.

VENV    ?= .venv
PYTHON  ?= python3
PROFILE ?= smoke
# LOCKED=1 installs exactly the versions in requirements.lock instead of the newest ones in range
LOCKED  ?=

# notebooks run in their own folders, where a relative path would mean something else
ifdef COVIDSEV_DATA
override export COVIDSEV_DATA := $(shell cd "$(COVIDSEV_DATA)" 2> /dev/null && pwd || printf '%s' "$(COVIDSEV_DATA)")
endif

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
# JupyterLab opens notebooks in the environment made here, not in a kernel that is registered under the same name
export JUPYTER_PREFER_ENV_PATH = 1
.DEFAULT_GOAL := help
.PHONY: reproduce test lint bench lab docs render outputs readme pictures clean help

reproduce: $(STAMP) ## run every experiment and draw the tables: PROFILE=smoke (phantom, minutes), cpu or paper (real data)
	@$(BIN)/covidsev reproduce --profile $(PROFILE)

test: export OMP_NUM_THREADS = 1
test: export COVIDSEV_QUIET = 1
test: export MPLBACKEND = agg
test: $(STAMP) ## run the tests in the notebooks, then the others; real-data tests run if COVIDSEV_DATA is set
	@$(BIN)/nbdev_test --n_workers 2
	@$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder tests  # three on two cores: many tests wait for another process

lint: $(STAMP) ## say what is wrong with the style (ruff.toml), and how large the house is; nothing is changed
	@$(BIN)/ruff check --quiet --output-format concise .
	@$(BIN)/python tests/measure.py

bench: $(STAMP) ## measure our training step, evaluation and severity of a scan against plain ones, as ratios
	@$(BIN)/covidsev bench

# a notebook as argument would make its folder the root, and results and figures could not be opened
lab: $(STAMP) ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab --config=docs/jupyter_config.py --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/nbs/index.ipynb

docs: $(VENV)/.docs-installed ## build the site of notebooks, results and reference into _docs/html; look for dead links
	@$(BIN)/python docs/book.py _docs/source
	@rm -rf _docs/html
	@$(BIN)/sphinx-build -q -E -j auto -W --keep-going -b html -c docs -d _docs/doctrees _docs/source _docs/html
	@$(BIN)/python docs/check.py _docs/html
	@echo "Open _docs/html/index.html"

render: $(STAMP) ## draw tables and figures again from results that are there: PROFILE=smoke, cpu or paper
	@$(BIN)/covidsev render --profile $(PROFILE)

outputs: $(STAMP) ## run again what notebooks show of results that changed, then write README.md and its pictures
	@$(BIN)/python docs/outputs.py
	@$(MAKE) --no-print-directory readme pictures

# The front door is a notebook; links that are relative to nbs/ become relative to the top.
README ?= README.md
readme: $(STAMP) ## write README.md from nbs/index.ipynb
	@$(BIN)/jupyter nbconvert --log-level=ERROR --to markdown --no-input --stdout nbs/index.ipynb \
	  | sed -E 's#\]\(\.\./#](#g; s#\]\(([0-9a-z_/]+\.ipynb|experiments)\)#](nbs/\1)#g' | cat -s > $(README)

# What README and the site show, from the results that are here; docs/pictures.txt says which.
pictures: $(STAMP) ## copy the pictures that README shows from figures/ and results/ to docs/
	@while read -r from to; do cp -v "$$from" "$$to"; done < docs/pictures.txt

clean: ## remove the virtual environment and caches; data, checkpoints, results and figures stay
	@rm -rf $(VENV) covidsev.egg-info build _docs .pytest_cache .hypothesis .ruff_cache
	@find covidsev tests nbs \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z]+):.*## /  make \1|/' | column -t -s '|' || true

# Made again when the dependencies change; not when the code does, because the installation is editable.
$(STAMP): settings.ini setup.py
	@command -v $(PYTHON) > /dev/null || { echo "covidsev needs Python 3.11 or newer; there is no '$(PYTHON)'. Name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "covidsev needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Setting up $(VENV): once, and again when settings.ini changes. This takes a few minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(LOCKED),-c requirements.lock) -e '.[dev]'
	@touch $@

# What the site needs, and only the site.
$(VENV)/.docs-installed: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $@
