# make quickstart   from nothing to a trained model and its report
# make test         the default test suite
# make check        style, types and the house rules

PYTHON ?= python3
BIN := .venv/bin
SAMPLE := data_shards/samples/emoji
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: quickstart test test-all check clean

quickstart: .venv/installed
	mmfuse shards index $(SAMPLE)
	launch/train.sh "$$(launch/quickstart_strategy.sh)" quickstart

# Two processes, each a file at a time: the tests of a file share their runs.
test: .venv/installed
	OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile

test-all: .venv/installed
	OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile -m "slow or not slow"

check: .venv/installed
	ruff check .
	ruff format --check .
	pyright

# Made again whenever the dependencies change.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("mmfuse needs Python 3.11 or newer; try: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache
