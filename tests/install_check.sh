#!/usr/bin/env bash
# Does what a user does first: builds the wheel, installs it without pins into a fresh environment, prepares the sample sets, and
# runs the bare command, from a folder that is not the checkout and with an empty home. Ends with 0 if that left scores.
set -euo pipefail
tree=$(cd "$(dirname "$0")/.." && pwd)
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
mkdir "$fresh/home" "$fresh/elsewhere"
began=$SECONDS
said() { echo "install-check: $1 ($((SECONDS - began)) s)"; }

"${PYTHON:-python3}" -m venv "$fresh/env"
export PATH="$fresh/env/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=2
export PIP_CONSTRAINT=/dev/null  # a machine's own, which a user has not
git -C "$tree" ls-files -z | (cd "$tree" && xargs -0 cp --parents -t "$fresh/elsewhere")  # what git tracks, and no build of before
pip wheel --no-deps --wheel-dir "$fresh" "$fresh/elsewhere"
rm -rf "$fresh/elsewhere" && mkdir "$fresh/elsewhere"
pip install "$(echo "$fresh"/stllava_med-*.whl)[sample]"
said "installed $(cd "$fresh" && echo stllava_med-*.whl)"

cd "$fresh/elsewhere"
unset PYTHONPATH STLLAVA_HOME STLLAVA_RUN VIRTUAL_ENV
export HOME=$fresh/home HF_HUB_OFFLINE=1
python -c 'from importlib.metadata import version as v; print(*(f"{n} {v(n)}" for n in ("lmms-eval", "transformers", "torch", "trl", "peft", "openai")), sep=", ")'
stllava-eval prepare --sample
said "prepared the sample sets"
# `stllava-train tiny` with a thirtieth of its steps: nobody reads these answers
python - "$fresh/start" << 'END'
import sys
from pathlib import Path

from stllava_eval.data.catalog import DATASETS
from stllava_eval.data.splits import read_rows
from stllava_train.tiny import write_start

write_start({name: read_rows(name, "train") for name in DATASETS}, Path(sys.argv[1]), effort=0.03, progress=False)
END
said "made a checkpoint"
export STLLAVA_CHECKPOINT=$fresh/start
lmms-eval --model stllava_med --tasks vqarad,slake,pathvqa  # it ends with 0 whatever happens to it
scores=$(echo "$HOME"/.cache/stllava-med/runs/*/scores.json)
[ -f "$scores" ] || { echo "install-check: FAILED, the bare command has left no scores; what it said is above" >&2; exit 1; }
python - "$scores" << 'END'
import json, sys

found = {row["task"] for row in json.load(open(sys.argv[1]))["scores"] if row["value"] is not None}
sys.exit(f"no scores of {missing}" if (missing := {"vqarad", "slake", "pathvqa"} - found) else 0)
END
said "scored three sets"
