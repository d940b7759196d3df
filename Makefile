# `make demo` and `make test` need nothing but Python 3.11 (or newer) and make: the environment makes itself.
#
# PIP_FLAGS is passed to pip, for a mirror or for the CPU build of torch, for example
#   make setup PIP_FLAGS="--extra-index-url <index of torch's CPU builds>"

PYTHON    ?= python3
PIP_FLAGS ?=
VENV      := .venv
BIN       := $(VENV)/bin
STAMP     := $(VENV)/.installed
PACKAGES  := backbone cli cloud edge emulator experiments kernels protocol

.PHONY: setup demo test lint format bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "isthmus needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip $(PIP_FLAGS)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable '.[dev]'
	mkdir -p .ns && ln -sfn .. .ns/isthmus
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/isthmus demo

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd .ns && MYPYPATH=. ../$(BIN)/mypy --config-file ../pyproject.toml $(foreach p,$(PACKAGES),-p isthmus.$(p))
	cd .ns && ../$(BIN)/lint-imports ../pyproject.toml

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The figures of docs/results.md. Takes about half an hour on two cores. E2E is where the E2E data set's train.csv lies.
E2E ?= ../shared/data/e2e/train.csv

bench: $(STAMP)
	$(BIN)/isthmus bench parity --model smollm2-135m --steps 10 --json
	$(BIN)/isthmus bench step --model smollm2-135m --json
	$(BIN)/isthmus bench step --model smollm2-135m --cloud-dtype bf16 --codec bf16 --json
	$(BIN)/isthmus bench step --model smollm2-135m --codec int8 --json
	$(BIN)/isthmus bench faults --json
	$(BIN)/isthmus bench curve --data $(E2E) --prompt-template 'Meaning: {mr}\nText:' --completion-template ' {ref}' \
	  --steps 200 --figure docs/figures/e2e-curve.png --json

clean:
	rm -rf $(VENV) .ns build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
