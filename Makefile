# Sets up .venv from the lock, then reproduces the figures or runs the tests.

# PYTHON is the interpreter that .venv is made with; an empty TIER leaves the tier to config/config.yaml.
PYTHON ?= python3
TIER ?=

# Both stamps are written last, so a half-built .venv is never taken for done. Their names hold the folder's
# path, because a .venv that was moved or copied still points to where it was made.
PLACE := $(shell pwd -P | cksum | cut -d' ' -f1)
LOCKED := .venv/.locked-$(PLACE)
INSTALLED := .venv/.installed-$(PLACE)

# With a wheelhouse/ beside this file, nothing is asked of the network.
PIP := .venv/bin/python -m pip
SOURCE := $(if $(wildcard wheelhouse),--no-index --find-links wheelhouse)
RUN := PATH="$(CURDIR)/.venv/bin:$$PATH"
CONFIG := $(if $(TIER),--config tier=$(TIER))

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# papermill must find .venv's kernel before one that the user has at home.
export JUPYTER_PREFER_ENV_PATH := 1
# Packages come from .venv alone.
unexport PYTHONPATH PYTHONHOME

.PHONY: help setup reproduce test lint docs gpu lock wheelhouse clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1: /p' Makefile | awk -F': ' '{ printf "make %-11s %s\n", $$1, $$2 }'
	@echo "Set PYTHON=python3.12 to choose the interpreter, TIER=smoke, quick, long, paper, auto, or a file of your own in config/, for the tier."

reproduce: setup  ## run the experiments and make the report
	$(RUN) snakemake reproduce $(CONFIG)
	@$(RUN) python -m skipfold.replication where $(if $(TIER),--tier $(TIER))

# Two processes of one thread each; a file's tests stay in one, since they share what was made.
test: lint  ## lint, then run the whole test suite
	$(RUN) OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup  ## check the style of Python, notebooks and rules
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) snakefmt --check Snakefile workflow
	$(RUN) snakemake --lint

gpu: setup  ## where a GPU is: CUDA tests, engine benchmark, paper tier, one log
	$(RUN) python benchmarks/gpu.py

docs: setup  ## make the API reference from the docstrings, in docs/api
	$(RUN) python -m pdoc skipfold '!skipfold.__main__' '!skipfold.replication.__main__' -o docs/api

setup: $(INSTALLED)  ## create .venv from the lock

# The package itself is linked, not copied: edits under src/ need no new set-up.
$(INSTALLED): pyproject.toml $(LOCKED)
	$(PIP) install --quiet --no-build-isolation --no-deps --no-index --editable .
	@touch $@

$(LOCKED): requirements/bootstrap.txt requirements/lock.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { echo >&2 \
		"error: $(PYTHON) is not Python 3.11, 3.12 or 3.13; install one and name it: make PYTHON=python3.12"; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo >&2 \
		"error: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	rm -rf .venv
	"$(PYTHON)" -m venv .venv
	$(PIP) install --quiet $(SOURCE) --require-hashes -r requirements/bootstrap.txt
	@echo "Installing the locked packages into .venv (about 5.5 GB, some minutes) ..."
	$(PIP) install --quiet $(SOURCE) --require-hashes --no-build-isolation -r requirements/lock.txt
	@touch $@

lock: setup  ## write the locks and environment.yml for the dependencies of pyproject.toml
	$(RUN) python requirements/lock.py

wheelhouse: setup  ## download the locked packages for a machine like this one without a network
	rm -rf wheelhouse.part
	$(PIP) download --quiet --require-hashes --no-build-isolation -d wheelhouse.part \
		-r requirements/bootstrap.txt -r requirements/lock.txt
	rm -rf wheelhouse && mv wheelhouse.part wheelhouse

clean:  ## remove .venv and the caches
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
