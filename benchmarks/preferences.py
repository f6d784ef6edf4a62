"""Does stage 2 help? Trainings on the same pairs with other settings, judges and controls, over seeds, each evaluated.

`python benchmarks/preferences.py DIR --start CHECKPOINT [--start ...] --images DIR --new-images DIR` takes stage-1
checkpoints of several seeds. For each it lets the checkpoint ask about 600 images, judges its answers by exact
knowledge, and trains every one of `VARIANTS` on the pairs by recipe tiny, all for the same number of steps; then
`lmms-eval` on the three sample tests. What is there already is not done again; `--seeds` shares the work out, a core
each. It prints a table: for every variant, over all three sets, F1 of open and accuracy of closed questions (x100), the
difference from stage 1 (mean over the seeds of each question, 95 % interval of draws of images, p of flipped signs),
how often yes is said to a yes-or-no question, and how often it is right where yes is and where no is; unparsed closed
answers and words an answer. Then, of each file of pairs and seed, how many there are, of how many of yes and no "no" is
chosen, and of how many the chosen answer was the likelier one before. About 15 minutes of one core for each seed.

`random judge` has the same pairs with chosen and rejected exchanged by a coin: it must not help. `SFT on chosen` learns
the chosen answers alone. `balanced` pairs have yes chosen as often as no (`pairs --balance-verdict`). `new images` are
those of the validation split, which stage 1 has not seen; all other pairs are about images that it was trained on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from stllava_eval.data.catalog import DATASETS
from stllava_eval.scoring.words import folded_words

SETS = tuple(DATASETS)
STEPS, BATCH = 100, 16
ASKED = ["describe=What modality is shown?", "describe_tokens=32", "question_tokens=64", "answer_tokens=32"]
SFT = ["loss=[sft]"]
BOTH = ["loss=[sigmoid, sft]", "loss_weights=[1.0, 1.0]"]
# label: (pairs, changes of the recipe)
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "DPO, beta 0.1": ("pairs", []),
    "DPO, beta 0.05": ("pairs", ["beta=0.05"]),
    "DPO, beta 0.3": ("pairs", ["beta=0.3"]),
    "DPO, 50 % of the pairs": ("half", []),
    "DPO, 25 % of the pairs": ("quarter", []),
    "DPO, authors' single order": ("authors", []),
    "DPO, random judge": ("random", []),
    "SFT on chosen": ("pairs", SFT),
    "DPO + SFT": ("pairs", BOTH),
    "DPO, new images": ("new", []),
    "SFT on chosen, new images": ("new", SFT),
    "DPO, balanced": ("balanced", []),
    "DPO, balanced, beta 0.3": ("balanced", ["beta=0.3"]),
    "SFT on chosen, balanced": ("balanced", SFT),
    "DPO + SFT, balanced": ("balanced", BOTH),
    "DPO, balanced, new images": ("new-balanced", []),
    "SFT on chosen, balanced, new images": ("new-balanced", SFT),
    "DPO, balanced, random judge": ("balanced-random", []),
}


def call(*command: str) -> None:
    subprocess.run([sys.executable, "-m", "stllava_train.cli", *command], check=True)


def draw_pairs(folder: Path, start: Path, images: Path, new_images: Path, seed: int) -> None:
    """`pairs.jsonl` and its kin in `folder`."""
    from stllava_train.data.encoding import uniform

    for name, source, options in (("pairs", images, ["--sample", "600"]), ("new", new_images, [])):
        if (folder / f"{'new-' * (name == 'new')}balanced.jsonl").exists():
            continue
        candidates, judged = folder / f"{name}-candidates.jsonl", folder / f"{name}-judged.jsonl"
        asked = ["--checkpoint", str(start), "--images", str(source), "--out", str(candidates), *options]
        call("candidates", *asked, *ASKED, f"seed={seed}")
        judge = ["judge", str(candidates), "--judge", "exact", "--out", str(judged)]
        subprocess.run([sys.executable, "-m", "stllava_train.cli", *judge])  # exit code 1: some truths are not known
        call("pairs", str(candidates), str(judged), "--out", str(folder / f"{name}.jsonl"))
        balanced = "balanced" if name == "pairs" else "new-balanced"
        call("pairs", str(candidates), str(judged), "--balance-verdict", "--out", str(folder / f"{balanced}.jsonl"))
        if name == "pairs":
            call("pairs", str(candidates), str(judged), "--rule", "authors", "--out", str(folder / "authors.jsonl"))
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    balanced = [json.loads(line) for line in (folder / "balanced.jsonl").read_text().splitlines()]
    exchanged = [
        [
            row | {"chosen": row["rejected"], "rejected": row["chosen"]}
            if uniform(seed, "coin", row["id"]) < 0.5
            else row
            for row in some
        ]
        for some in (rows, balanced)
    ]
    shares = {share: [row for row in rows if uniform(seed, "share", row["id"]) < share] for share in (0.25, 0.5)}
    written = {"random": exchanged[0], "balanced-random": exchanged[1], "half": shares[0.5], "quarter": shares[0.25]}
    for name, some in written.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


def evaluate(checkpoint: Path, folder: Path) -> None:
    if not (folder / "run.json").exists():
        command = ["-m", "lmms_eval", "--model", "stllava_med", "--tasks", ",".join(SETS)]
        where = {"STLLAVA_RUN": str(folder), "STLLAVA_CHECKPOINT": str(checkpoint)}  # --model_args splits at commas
        subprocess.run([sys.executable, *command], check=True, env=os.environ | where)


def run(folder: Path, start: Path, images: Path, new_images: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    evaluate(start, folder / "stage 1")
    draw_pairs(folder, start, images, new_images, seed)
    for label, (name, changes) in VARIANTS.items():
        pairs, out = folder / f"{name}.jsonl", folder / f"{label} run"
        count = len(pairs.read_text().splitlines())
        where = new_images if name.startswith("new") else images
        if not (out / "README.md").exists():
            files = ["--pairs", str(pairs), "--images", str(where), "--out", str(out)]
            resume = ["--resume"] if out.exists() else []
            epochs = STEPS * BATCH / count
            settings = [f"start={start}", f"seed={seed}", "evaluate_on=[]", f"epochs={epochs}", f"batch={BATCH}"]
            call("dpo", "--recipe", "tiny", *files, *resume, *settings, *changes)
        evaluate(out, folder / label)


def scores(folder: Path) -> dict[tuple[str, str], tuple[str, Mapping[str, float]]]:
    """(set, id of a question) -> (its image, its scores)."""
    from stllava_eval.runs.folder import read_run
    from stllava_eval.runs.scores import question_scores

    found = {}
    for name, of in read_run(folder).items():
        for id, asked in question_scores(name, of.answers).items():
            found[name, id] = f"{name}/{asked.image_id}", asked.scores
    return found


def row(label: str, folders: Sequence[Path]) -> list[Any]:
    """Of a variant, over seeds."""
    from stllava_eval.scoring.statistics import bootstrap_clustered, sign_flip

    of = [scores(folder / label) for folder in folders]
    starts = [scores(folder / "stage 1") for folder in folders]

    def mean(metric: str) -> float:
        values = [one[metric] for found in of for _, one in found.values() if metric in one]
        return sum(values) / len(values)

    cells: list[Any] = [label]
    for metric in ("f1", "closed_accuracy"):
        keys = [key for key, (_, one) in starts[0].items() if metric in one]
        changes = [
            sum(found[key][1][metric] - start[key][1][metric] for found, start in zip(of, starts, strict=True))
            / len(of)
            for key in keys
        ]
        images = [starts[0][key][0] for key in keys]
        cells.append(f"{100 * mean(metric):.1f}")
        if label == "stage 1":
            cells.append("")
            continue
        estimate = bootstrap_clustered(changes, images)
        by_seed = [
            sum(found[key][1][metric] - start[key][1][metric] for key in keys) / len(keys)
            for found, start in zip(of, starts, strict=True)
        ]
        low, high = estimate.low or 0.0, estimate.high or 0.0
        cells.append(
            f"{100 * (estimate.value or 0.0):+.1f} [{100 * low:+.1f}, {100 * high:+.1f}], "
            f"p {sign_flip(changes, images):.3f} ({' '.join(f'{100 * one:+.1f}' for one in by_seed)})"
        )
    said = [one for folder in folders for one in verdicts(folder / label)]
    right = {word: [answer for answer, reference in said if reference == word] for word in ("yes", "no")}
    shares = [sum(answer == "yes" for answer, _ in said) / len(said)]
    shares += [sum(answer == word for answer in answers) / len(answers) for word, answers in right.items()]
    return [
        *cells,
        " / ".join(f"{100 * one:.0f}" for one in shares),
        f"{100 * mean('unparsed'):.1f}",
        f"{mean('words'):.2f}",
    ]


def verdicts(folder: Path) -> list[tuple[str, str]]:
    """(first word of the answer, reference) of the questions whose reference is yes or no."""
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    words = [((folded_words(one["answer"]) or ("",))[0], one["reference"].lower()) for one in rows]
    return [(answer, reference) for answer, reference in words if reference in ("yes", "no")]


def pairs_row(name: str, folder: Path, start: Path) -> list[Any]:
    """Of a file of pairs, whose reference's log-probabilities the trainings have left in the cache."""
    from stllava_eval.network.checkpoint import open_checkpoint
    from stllava_eval.storage import home
    from stllava_train.preferences.pairs import read_pairs
    from stllava_train.resumable import read_manifest, read_rows
    from stllava_train.training.reference import reference_key

    sha256 = open_checkpoint(str(start)).sha256
    files = [file for file in (home() / "reference").glob("*.jsonl") if read_manifest(file)["start"] == sha256]
    known = {row["id"]: row["chosen"] > row["rejected"] for file in files for row in read_rows(file)}
    pairs = read_pairs(folder / f"{name}.jsonl")
    of = [one.chosen.lower() for one in pairs if one.chosen.lower() in ("yes", "no")]
    likelier = [known[key] for one in pairs if (key := reference_key(one, None)) in known]
    shares = of.count("no") / len(of), sum(likelier) / len(likelier)
    return [f"{name}, seed {folder.name}", len(pairs), *(f"{100 * share:.0f} %" for share in shares)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--start", type=Path, required=True, action="append", metavar="CHECKPOINT", help="one a seed")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="of `stllava-train data`")
    parser.add_argument("--new-images", type=Path, required=True, metavar="DIR", help="likewise, --split validation")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="places of the starts to run (default: all)")
    arguments = parser.parse_args()
    seeds = list(range(len(arguments.start))) if arguments.seeds is None else arguments.seeds
    for seed in seeds:
        run(arguments.folder / str(seed), arguments.start[seed], arguments.images, arguments.new_images, seed)
    folders = [arguments.folder / str(seed) for seed in seeds]
    heads = ["", "F1, open", "difference", "accuracy, closed", "difference", "yes: said / right / right on no"]
    heads += ["unparsed", "words"]
    rows = [row(label, folders) for label in ("stage 1", *VARIANTS)]
    print(tabulate(rows, heads, tablefmt="github", disable_numparse=True))
    names = ("pairs", "balanced", "new", "new-balanced")
    rows = [pairs_row(name, arguments.folder / str(seed), arguments.start[seed]) for name in names for seed in seeds]
    heads = ["", "pairs", '"no" chosen, of yes and no', "chosen answer likelier before"]
    print(tabulate(rows, heads, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
