# `make demo` does the main job on the sample data, `make test` passes the tests; each starts from nothing.
PYTHON ?= python3
BIN := .venv/bin
export STLLAVA_HOME ?= $(HOME)/.cache/stllava-med
RUNS := $(STLLAVA_HOME)/runs/demo
START := $(STLLAVA_HOME)/checkpoints/tiny-start
TRAINING := $(STLLAVA_HOME)/conversations
# these two keep two cores busy with work, not with waiting for each other
export KMP_BLOCKTIME := 0
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test lint bench clean

.venv/installed: pyproject.toml constraints.txt setup.py stllava_med.pth
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# the whole of it with a network trained from scratch: conversations -> stage 1 -> questions, answers -> judge -> pairs ->
# DPO -> checkpoint -> evaluation. Called again, it does again what a change has reached.
demo: .venv/installed
	$(BIN)/stllava-eval prepare --sample
	$(BIN)/stllava-train data vqarad slake pathvqa --out $(TRAINING)
	$(BIN)/stllava-train tiny --out $(START)
	$(BIN)/stllava-train all --recipe tiny --data $(TRAINING)/vqarad.json --data $(TRAINING)/slake.json \
		--data $(TRAINING)/pathvqa.json --images $(TRAINING)/images --out $(RUNS) --default sft.start=$(START)

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python benchmarks/scoring.py --json -

clean:
	rm -rf .venv build dist *.egg-info
