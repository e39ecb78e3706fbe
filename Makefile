# Every target sets itself up: Python 3.11 or newer is all that has to be there.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
SEED ?= 0
OUT ?= runs/demo-seed$(SEED)

.PHONY: help install demo test slow test-kill mutation lint format clean

help:
	@echo "make demo       train the pico base with GRPO, about two minutes; SEED=1 for another seed"
	@echo "make test       the tests"
	@echo "make slow       longer checks        make test-kill  random kills and resumption"
	@echo "make lint       ruff and pyright     make install    .venv with pinned versions"
	@echo "make mutation   breaks credit and objective in every small way; the tests must notice"

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mulligan needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	$(BIN)/mulligan train recipes/demo.toml --seed $(SEED) --out $(OUT)

test: install
	$(BIN)/python -m pytest -q --durations=10

slow: install
	$(BIN)/python -m pytest -q -m slow

test-kill: install
	$(BIN)/python -m pytest -q -m kill

mutation: install
	$(BIN)/python -m tests.mutation.run

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
