"""How the two versions of the strict verdict agree with a reader, and what they give real answers and blind ones.

    python benchmarks/verdict.py [--answers NAME=FILE ...] [--json FILE]    (- prints)

Needs VQA-RAD and SLAKE in ../shared/data (or $STLLAVA_SHARED/data) for the blind rows. FILE holds JSON lines with
`question`, `reference`, `kind` and `answer` of a real run and, where a person has read them, `reading`: yes, no, an
option, unparsed or refusal.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import write

from stllava_eval.errors import InputError
from stllava_eval.scoring import image_blind, verdict_v1
from stllava_eval.scoring.image_blind import commonest_words
from stllava_eval.scoring.metrics import closed_accuracy, closed_accuracy_v1, score, unparsed
from stllava_eval.scoring.verdict import chosen

HERE = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("STLLAVA_SHARED") or HERE.parent / "shared")
LONGER_CONSTANTS = ("The image is abnormal.", "There is no abnormality.")


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def first_version(answer: str, reference: str, question: str) -> str | None:
    """What the first version reads, as `chosen` says it: None for none and for more than one."""
    named = verdict_v1.options_named(answer, reference, question)
    return named.pop() if len(named) == 1 else None


def agreement(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of how many answers each version reads what the reader read."""

    def agreed(version: Callable[[str, str, str], str | None]) -> int:
        hits = 0
        for row in rows:
            wanted = None if row["reading"] in ("unparsed", "refusal") else row["reading"]
            options = row.get("options") or ["yes"]
            read = version(row["answer"], row.get("reference") or options[0], row["question"])
            hits += ("1" if read == "just" else read) == wanted  # what the first version calls the option "just 1"
        return hits

    return {"n": len(rows), "v1": agreed(first_version), "v2": agreed(chosen)}


def accuracy(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Closed accuracy by both versions, and the share without a verdict, in %."""

    def percent(metric: Callable[[str, str, str], float]) -> float:
        return round(100 * sum(metric(row["answer"], row["reference"], row["question"]) for row in rows) / len(rows), 2)

    refused = sum(score(row["answer"], row["reference"], "closed", row["question"])["refused"] for row in rows)
    return {
        "n": len(rows),
        "v1": percent(closed_accuracy_v1),
        "v2": percent(closed_accuracy),
        "unparsed v2": percent(unparsed),
        "refused": round(100 * refused / len(rows), 2),
    }


def official(name: str) -> list[dict[str, Any]]:
    """The test rows of a data set, English ones."""
    file = SHARED / "data" / name / ("testset.json" if name == "vqarad" else "test.json")
    rows = [row for row in json.loads(file.read_text(encoding="utf-8")) if row.get("q_lang", "en") == "en"]
    return [
        {
            "id": str(place),
            "question": " ".join(row["question"].split()),
            "reference": str(row["answer"]).strip(),
            "kind": row["answer_type"].strip().lower(),
        }
        for place, row in enumerate(rows)
    ]


def training(name: str) -> image_blind.TrainingAnswers:
    """The answer counts of the official training split."""
    counts = image_blind.shipped_answers(name)
    if counts is None:
        raise InputError(f"{name}: no counts of its training answers come with the package.")
    return counts


def blind_rows(name: str) -> dict[str, dict[str, Any]]:
    train, closed = training(name), [row for row in official(name) if row["kind"] == "closed"]
    open_answers = list(train.kinds["open"].elements())
    constants = {f'always "{one}"': one for one in (*image_blind.CONSTANTS, *LONGER_CONSTANTS)}
    constants |= {f"{count} commonest words": commonest_words(open_answers, count) for count in image_blind.WORD_COUNTS}
    answers = {label: {row["id"]: one for row in closed} for label, one in constants.items()}
    answers[image_blind.PRIOR] = train.commonest(closed)
    return {label: accuracy([row | {"answer": given[row["id"]]} for row in closed]) for label, given in answers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="-", metavar="FILE", help="where the figures go (default: printed)")
    parser.add_argument("--answers", action="append", default=[], metavar="NAME=FILE", help="a run's answers")
    arguments = parser.parse_args()
    files = ("hand_read_verdicts.jsonl", "independent_read_verdicts.jsonl")
    read = [row for file in files for row in lines(HERE / "tests" / file)]
    figures: dict[str, Any] = {
        "agreement": {
            half: agreement([row for row in read if row["half"] == half])
            for half in dict.fromkeys(row["half"] for row in read)
        },
        "runs": {},
    }
    for given in arguments.answers:
        name, _, file = given.partition("=")
        rows = [row for row in lines(Path(file)) if row["kind"] == "closed"]
        figures["runs"][name] = accuracy(rows)
        if all("reading" in row for row in rows):
            figures["agreement"][name] = agreement(rows)
    figures["blind"] = {name: blind_rows(name) for name in ("vqarad", "slake")}
    write(figures, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
