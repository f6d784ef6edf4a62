# `make demo` does the main job on the sample data, `make test` passes the tests; each starts from nothing.
# `make newest` passes tests with the newest release of everything; `make install-check` does what a user does first.
PYTHON ?= python3
BIN := .venv/bin
export STLLAVA_HOME ?= $(HOME)/.cache/stllava-med
RUNS := $(STLLAVA_HOME)/runs/demo
START := $(STLLAVA_HOME)/checkpoints/tiny-start
TRAINING := $(STLLAVA_HOME)/conversations
# these two keep two cores busy with work, not with waiting for each other
export KMP_BLOCKTIME := 0
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test newest install-check lint bench docs clean

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
	$(BIN)/python -m pytest -n 2 --dist worksteal

# whether a release has broken us: no pins, no upper bounds of ours, and none that the machine gives pip
newest:
	$(PYTHON) -m venv .venv-newest
	$(PYTHON) tests/newest.py > .venv-newest/requirements.txt
	PIP_CONSTRAINT=/dev/null .venv-newest/bin/python -m pip install -qq --disable-pip-version-check --upgrade \
		--upgrade-strategy eager -r .venv-newest/requirements.txt
	.venv-newest/bin/python -m pip install -qq --disable-pip-version-check --no-deps -e .
	PYTHONPATH=tests .venv-newest/bin/python -m pytest -W default -p newest \
		tests/eval/network/test_modeling.py tests/eval/inference/test_engine.py tests/eval/inference/test_server.py \
		tests/eval/lmms/test_model.py tests/train/training/test_sft.py tests/train/training/test_dpo.py

# builds the wheel, installs it as `pip install` does, and runs the bare command on the sample data, elsewhere
install-check:
	PYTHON=$(PYTHON) tests/install_check.sh

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python benchmarks/scoring.py --json -

# the pages of docs/ as a site in site/, in an environment of its own; a broken link fails
docs: .venv-docs/installed
	.venv-docs/bin/mkdocs build

.venv-docs/installed: docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	touch $@

clean:
	rm -rf .venv .venv-newest .venv-docs site build dist *.egg-info
