.DEFAULT_GOAL := help
.PHONY: help setup test test-full quickstart lint format

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## make or update .venv
	@scripts/setup.sh

test:  ## set up and run the fast tests
	@scripts/test.sh

test-full:  ## set up and run all tests, the slow ones too
	@scripts/test.sh --full

quickstart:  ## train the small testbed model with DARTS
	@scripts/quickstart.sh

lint: setup  ## check style
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .

format: setup  ## repair style
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .
