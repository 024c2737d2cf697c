# Each target is one line; what it does is in the Snakefile, the package and pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help study test reproduce tables lab bench
help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv && $(BIN)/pip install --quiet --editable '.[test]' && touch $@

study: .venv/ready  ## the whole study on the embedded digits, a few minutes
	$(BIN)/snakemake study --cores all --quiet rules --rerun-triggers mtime --rerun-incomplete

test: .venv/ready  ## lint and tests
	$(BIN)/ruff check && $(BIN)/ruff format --check && $(BIN)/pytest

reproduce: .venv/ready  ## the twelve published CIFAR-10 rows: many hours without a GPU
	$(BIN)/snakemake reproduce --cores all --quiet rules --rerun-triggers mtime --rerun-incomplete

tables: .venv/ready  ## every table and figure from the committed records, seconds
	$(BIN)/papermill notebooks/04_tables.ipynb results/notebooks/cifar10/04_tables.ipynb

lab: .venv/ready  ## JupyterLab on the first notebook
	$(BIN)/jupyter lab notebooks/00_baseline.ipynb

bench: .venv/ready  ## how fast kernels are scored and masked on this machine
	$(BIN)/python -m explib.bench
