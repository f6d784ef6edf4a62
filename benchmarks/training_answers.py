"""The prepared official training splits of VQA-RAD and SLAKE -> stllava_eval/scoring/training_answers.json.

    stllava-eval prepare vqarad --split train --from DIR && stllava-eval prepare slake --split train --from DIR
    python benchmarks/training_answers.py

PathVQA's counts are not shipped: its training split was not at hand.
"""

import json
from pathlib import Path
from typing import Any

from stllava_eval.data.catalog import DATASETS
from stllava_eval.data.splits import read_manifest
from stllava_eval.errors import InputError
from stllava_eval.scoring.image_blind import prepared_answers

FILE = Path(__file__).resolve().parents[1] / "stllava_eval" / "scoring" / "training_answers.json"
ABOUT = (
    "How often each answer comes in the official training splits, in lower case: by question text and by kind of "
    "question. Counted from the data sets named here by benchmarks/training_answers.py."
)


def counted(name: str) -> dict[str, Any]:
    """Return what the file holds of one data set."""
    manifest, answers = read_manifest(name, "train"), prepared_answers(name)
    if not manifest.official or answers is None:
        raise InputError(f"{name} train ({manifest.edition}) is not the official split. Prepare that one.")
    return {
        "title": DATASETS[name].title,
        "source": DATASETS[name].citation,
        "licence": manifest.licence,
        "edition": manifest.edition,
        "rows": manifest.counts["rows"],
        "sha256_rows": manifest.sha256_rows,
        "kinds": {kind: _sorted(counts) for kind, counts in sorted(answers.kinds.items())},
        "questions": {question: _sorted(counts) for question, counts in sorted(answers.questions.items())},
    }


def _sorted(counts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def text() -> str:
    """Return the file: a line for each question, so that a change can be read."""
    parts = []
    for name in ("vqarad", "slake"):
        of = counted(name)
        questions = ",\n".join(f"   {_json(key)}: {_json(value)}" for key, value in of.pop("questions").items())
        head = ",\n".join(f"   {_json(key)}: {_json(value)}" for key, value in of.items())
        parts.append(f' {_json(name)}: {{\n{head},\n   "questions": {{\n{questions}\n   }}\n }}')
    sets = ",\n".join(parts)
    return f'{{\n"about": {_json(ABOUT)},\n"sets": {{\n{sets}\n}}\n}}\n'


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    print(f"{FILE}: {FILE.stat().st_size} bytes")
