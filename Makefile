PYTHON ?= python
SMOKE ?= runs/smoke
SMOKE_RUN = $(PYTHON) train.py --config=configs/debug.py --workdir=$(SMOKE)

.PHONY: help setup lint format test test-slow smoke

help:
	@echo "make setup | lint | format | test | test-slow | smoke"

setup:  ## everything that the tests and the linter need
	$(PYTHON) -m pip install -r requirements-dev.txt

lint:
	ruff check .
	ruff format --check .

format:
	ruff check --fix .
	ruff format .

test:  ## minutes
	$(PYTHON) -m pytest -q

test-slow:  ## the long tests, notebooks among them
	$(PYTHON) -m pytest -q -m slow

smoke:  ## 10 steps, resume to 20, evaluate
	rm -rf $(SMOKE)
	$(SMOKE_RUN) --config.train.steps=10
	$(SMOKE_RUN) --config.train.steps=20
	$(PYTHON) eval.py --workdir=$(SMOKE)
