# Every target makes .venv itself where it is missing or outdated (see .ci/make_env.sh, where the work is done: make
# itself cannot handle a path with spaces). PYTHON= picks the interpreter, PIP_ARGS= adds options to every pip install.

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
QUICKSTART_ARGS ?=
export PYTHON PIP_ARGS

.DEFAULT_GOAL := help
.PHONY: help env quickstart test lint clean

help: ## show this list
	@echo "make TARGET [PYTHON=python3.11] [PIP_ARGS='...']"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 14

env: ## make .venv with pinned versions, or bring it up to date
	@bash .ci/make_env.sh

quickstart: env ## the whole chain on demo speech, with a report (about 14 minutes on 2 cores)
	@.venv/bin/python -m s3distill.cli.main quickstart $(QUICKSTART_ARGS)

test: env ## every test, the short end-to-end chain included (PYTEST_ARGS= for options)
	@.venv/bin/python -m pytest $(PYTEST_ARGS)

lint: env ## ruff check, ruff format --check, mypy on the core
	@bash .ci/lint.sh

clean: ## remove .venv and caches; outputs/ stays
	rm -rf .venv build dist s3distill.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find s3distill tests -name __pycache__ -type d -prune -exec rm -rf {} +
