# What each target does is in the Snakefile, the package and pyproject.toml; `make` lists them.
PYTHON ?= python3
BIN := .venv/bin
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo)
WORKFLOW := $(BIN)/snakemake --profile params/profiles/local
UV := $(BIN)/uv pip
unexport PYTHONDONTWRITEBYTECODE  # each of many short processes would compile all that it imports anew
QUIET := $(shell test -t 2 || echo --quiet)  # bars on a screen; no list of packages in a log

.PHONY: help lock study test test-browser audit reproduce tables readme 04_tables report verify lab bench
help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

.venv/ready: pyproject.toml requirements.lock
	@echo 'Setting up .venv with the versions of requirements.lock: some 3 GB the first time, else seconds'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep -o '^uv==[^ ;]*' requirements.lock)"
	$(UV) sync $(QUIET) --python $(BIN)/python --require-hashes requirements.lock
	$(UV) install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

LOCK := $(UV) compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header

lock: .venv/ready  ## requirements*.lock as pyproject.toml asks now; all of it anew: make lock UPGRADE=--upgrade
	$(LOCK) $(UPGRADE) --extra study --extra test --extra slurm --output-file requirements.lock pyproject.toml
	$(LOCK) $(UPGRADE) --extra peers --constraint requirements.lock --output-file requirements-peers.lock pyproject.toml

study: .venv/ready  ## the whole study on the embedded digits: a few minutes
	@echo 'Two networks trained on digits, pruned in two ways, fine-tuned, measured; then one from outside the study.'
	@echo 'About six minutes on two cores. Interrupt it at will; the same command goes on where it was.'
	$(WORKFLOW) study
	@$(BIN)/explib report results/report-digits.html --dataset digits >/dev/null
	@printf '\n%s\n' 'The study is done. To look at:'
	@printf '  %-27s %s\n' results/report-digits.html 'its figures and tables as a page, numbers linked to their records' \
		results/notebooks/digits/ 'every notebook as it ran' \
		'make lab' 'the notebooks in JupyterLab, from their start page'

test: .venv/ready  ## lint and tests
	$(BIN)/ruff check && $(BIN)/ruff format --check
	$(BIN)/lint-imports --no-logo && $(BIN)/mypy
	$(BIN)/pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder -rs

test-browser: .venv/ready  ## every notebook run in JupyterLab in Chromium; installs it on Debian
	@command -v chromium >/dev/null || { test -x /usr/bin/apt-get && { test $$(id -u) = 0 || command -v sudo >/dev/null; }; } || \
		{ echo 'test-browser: no chromium here and no apt-get as root to install it; install chromium'; exit 1; }
	@command -v chromium >/dev/null || { $(AS_ROOT) apt-get update -qq && $(AS_ROOT) apt-get install -qq -y chromium >/dev/null; }
	$(BIN)/pytest -m browser tests/system/test_browser.py

audit: .venv/ready  ## known vulnerabilities of the packages installed, where the database can be reached
	$(BIN)/pytest -m 'audit or not browser' -rs tests/system/test_security.py

reproduce: .venv/ready  ## the twelve published rows on CIFAR-10, anew, in reproduced/: many hours without a GPU
	@echo 'Twelve fine-tunes and a VGG-16 from scratch: about a day on a few CPU cores. Interrupt it at will; it goes on where it was.'
	$(WORKFLOW) reproduce --config results_dir=reproduced

tables: .venv/ready  ## every table and figure, and what the pages quote, from the records: seconds
	@$(MAKE) --no-print-directory --jobs 2 readme 04_tables

readme: .venv/ready
	$(BIN)/explib tables --readme --no-figures

04_tables: .venv/ready
	$(BIN)/papermill --no-progress-bar --log-level WARNING notebooks/04_tables.ipynb results/notebooks/cifar10/04_tables.ipynb

report: tables  ## the study as one HTML page, results/report.html: seconds
	$(BIN)/explib report

verify: .venv/ready  ## the shipped networks' accuracy, measured anew, in torch and in the engine: minutes
	$(BIN)/explib verify

lab: .venv/ready  ## JupyterLab on the start page of the notebooks
	$(BIN)/jupyter lab --LabApp.default_url='/lab/tree/notebooks/README.md?factory=Markdown%20Preview'

bench: .venv/ready  ## how fast this machine scores, trains, evaluates and runs what is left: minutes
	$(BIN)/explib bench scoring
	$(BIN)/explib bench training
	$(BIN)/explib bench processes
	$(BIN)/explib bench inference --sweep
	$(BIN)/explib bench runtime
