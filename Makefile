# `make demo` does the main job on the sample data, `make test` passes the tests; each starts from nothing.
PYTHON ?= python3
BIN := .venv/bin
export STLLAVA_HOME ?= $(HOME)/.cache/stllava-med
RUNS := $(STLLAVA_HOME)/runs/demo
START := $(STLLAVA_HOME)/checkpoints/tiny-start
TINY := $(STLLAVA_HOME)/checkpoints/tiny
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

# conversations -> stage 1 -> checkpoint; images + questions -> answers -> scores: with a network trained from scratch
demo: .venv/installed
	rm -rf $(RUNS) $(TINY)
	$(BIN)/stllava-eval prepare --sample
	$(BIN)/stllava-train data vqarad slake pathvqa --out $(TRAINING)
	$(BIN)/stllava-train tiny --out $(START)
	$(BIN)/stllava-train sft --recipe tiny --data $(TRAINING)/vqarad.json --data $(TRAINING)/slake.json \
		--data $(TRAINING)/pathvqa.json --out $(TINY) --default start=$(START)
	STLLAVA_RUN=$(RUNS)/tiny $(BIN)/lmms-eval --model stllava_med --tasks vqarad,slake,pathvqa
	STLLAVA_RUN=$(RUNS)/tiny-shown-other-images $(BIN)/lmms-eval --model stllava_med --tasks vqarad,slake,pathvqa \
		--model_args images=other
	$(BIN)/stllava-eval leaderboard $(RUNS)/tiny $(RUNS)/tiny-shown-other-images

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
