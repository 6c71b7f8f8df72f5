# `make demo` and `make test` set up .venv on their first call and use it again afterwards.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: venv demo test test-slow check bench clean

venv: $(VENV)/installed

$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,bench]'
	touch $@

demo: venv
	$(BIN)/python -m launcher.demo

test: check
	$(BIN)/python -m pytest -m "not slow"

test-slow: venv
	$(BIN)/python -m pytest -m slow

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: venv
	$(BIN)/python -m benchmarks.scoring
	$(BIN)/python -m benchmarks.tuning
	$(BIN)/python -m benchmarks.finetune
	$(BIN)/python -m benchmarks.data_prep
	$(BIN)/python -m benchmarks.report
	$(BIN)/python -m benchmarks.zero

clean:
	rm -rf $(VENV) build *.egg-info
