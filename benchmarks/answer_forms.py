"""Score a perfect answer to every official question in every form that models write: with the rule, and without.

    python benchmarks/answer_forms.py [--json FILE]

Needs the official VQA-RAD and SLAKE files of the team's reference data ($STLLAVA_SHARED, or ../shared). It prints
recall and F1 of open and accuracy of closed questions, x100, by form: of the raw reply, and of the answer in it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
METRICS = ("recall", "f1", "closed_accuracy")


def main() -> None:
    """Print the table."""
    from test_extract import FORMS, official_test

    from stllava_eval.scoring.final_answer import FINAL, NONE, final_answer
    from stllava_eval.scoring.metrics import score_replies

    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--json", metavar="FILE")
    given = options.parse_args()
    shared = Path(os.environ.get("STLLAVA_SHARED") or ROOT.parent / "shared")
    found = []
    for form, template in {"plain": "{}", **FORMS}.items():
        for name in ("vqarad", "slake"):
            for rule in (NONE, FINAL):
                scores = [
                    score_replies([final_answer(template.format(reference), question, rule)], reference, kind, question)
                    for question, reference, kind in official_test(shared, name)
                ]
                means = {}
                for metric in METRICS:
                    values = [of[metric] for of in scores if metric in of]
                    means[metric] = 100 * sum(values) / len(values)
                found.append({"form": form, "set": name, "extract": rule, **means})
    body = []
    for form in dict.fromkeys(of["form"] for of in found):
        cells = [form]
        for name in ("vqarad", "slake"):
            for rule in (NONE, FINAL):
                (of,) = [one for one in found if (one["form"], one["set"], one["extract"]) == (form, name, rule)]
                cells.append(" / ".join(f"{of[metric]:.1f}" for metric in METRICS))
        body.append(cells)
    heads = ["form", "VQA-RAD, raw", "VQA-RAD, final", "SLAKE, raw", "SLAKE, final"]
    print("recall / F1 / closed accuracy")
    print(tabulate(body, heads, tablefmt="github", disable_numparse=True))
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
