"""Does stage 1 learn to answer and to ask? Trainings with several `sq_r` and seeds, each evaluated and asked.

`python benchmarks/stage1.py DIR --start CHECKPOINT --data FILE [--data FILE ...]` runs, for every `sq_r` and seed,
`stllava-train sft --recipe tiny`, `lmms-eval` on the three sample tests and `asking.py`, into DIR/SQ_R-SEED; what is
there already is not done again. It prints a table: for every `sq_r` the mean over the seeds with the least and the
greatest (x100; the two distinct-n as shares of words and of pairs). Answers are scored by `f1` of open and
`closed_accuracy` of closed questions; the rest is `asking.py`'s, of drawn questions. About 8 minutes of one core for
each training at three epochs; `--sq-r` and `--seeds` share the work out, a core each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from stllava_eval.data.catalog import DATASETS

HERE = Path(__file__).resolve().parent
SETS = tuple(DATASETS)


def run(folder: Path, start: Path, data: Sequence[Path], epochs: float, sq_r: str, seed: str) -> None:
    """Train, evaluate and ask, as far as it has not been done."""
    checkpoint = folder / "run"
    files = [part for file in data for part in ("--data", str(file))]
    changes = [f"start={start}", f"epochs={epochs:g}", f"sq_r={sq_r}", f"seed={seed}"]
    if not (checkpoint / "README.md").exists():
        command = ["-m", "stllava_train.cli", "sft", "--recipe", "tiny", *files, "--out", str(checkpoint)]
        resume = ["--resume"] if checkpoint.exists() else []
        subprocess.run([sys.executable, *command, *resume, *changes], check=True)
    if not (folder / "eval" / "run.json").exists():
        command = ["-m", "lmms_eval", "--model", "stllava_med", "--tasks", ",".join(SETS)]
        command += ["--model_args", f"pretrained={checkpoint}"]
        subprocess.run([sys.executable, *command], check=True, env=os.environ | {"STLLAVA_RUN": str(folder / "eval")})
    if not (folder / "asking.json").exists():
        command = [str(HERE / "asking.py"), str(checkpoint), "--json", str(folder / "asking.json")]
        subprocess.run([sys.executable, *command, "--images", "120", "--draws", "2"], check=True)


def figures(folder: Path) -> dict[str, float]:
    """One training's figures, by the name of the table's row."""
    scores = json.loads((folder / "eval" / "scores.json").read_text())["scores"]
    found = {(one["task"], one["metric"]): one["value"] for one in scores if one["category"] == "all"}
    (asked,) = json.loads((folder / "asking.json").read_text())["checkpoints"].values()
    drawn: dict[str, Any] = asked["drawn"]
    own = drawn["own_answers"]
    return {
        **{f"{name} F1": found[name, "f1"] for name in SETS},
        **{f"{name} closed": found[name, "closed_accuracy"] for name in SETS},
        "asked: well-formed": drawn["well_formed"]["value"],
        "asked: in no training row": drawn["new"]["value"],
        "asked: applicable to its image": drawn["applicable"]["value"],
        "asked: applicable to another image": drawn["applicable_shuffled"]["value"],
        "asked: what looking adds": (drawn["shown_another"]["difference"] or {}).get("value"),
        "own answer right, its image": (own["right_own_image"] or {}).get("value"),
        "own answer right, another in view": (own["right_another_image"] or {}).get("value"),
        "distinct-1": drawn["variety"]["distinct_words"],
        "distinct-2": drawn["variety"]["distinct_pairs"],
        "distinct-1 of training questions": drawn["variety_training"]["distinct_words"],
        "distinct-2 of training questions": drawn["variety_training"]["distinct_pairs"],
    }


def cell(values: Sequence[float | None]) -> str:
    there = [100 * value for value in values if value is not None]
    if not there:
        return "-"
    return f"{sum(there) / len(there):.1f} [{min(there):.1f}, {max(there):.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--start", type=Path, required=True, metavar="CHECKPOINT", help="of `stllava-train tiny`")
    parser.add_argument("--data", type=Path, required=True, action="append", metavar="FILE", help="conversations")
    parser.add_argument("--epochs", type=float, default=3.0, help="of each training (default: 3)")
    parser.add_argument("--sq-r", nargs="+", default=["0", "0.3", "0.5"], metavar="P")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"], metavar="N")
    arguments = parser.parse_args()
    by_share: dict[str, list[dict[str, float]]] = {}
    for sq_r in arguments.sq_r:
        for seed in arguments.seeds:
            folder = arguments.folder / f"{sq_r}-{seed}"
            run(folder, arguments.start, arguments.data, arguments.epochs, sq_r, seed)
            by_share.setdefault(sq_r, []).append(figures(folder))
    rows = [
        [name, *(cell([one[name] for one in of_share]) for of_share in by_share.values())]
        for name in next(iter(by_share.values()))[0]
    ]
    print(tabulate(rows, ["", *(f"sq_r {sq_r}" for sq_r in by_share)], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
