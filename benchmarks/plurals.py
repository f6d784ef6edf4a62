"""What folding plurals, or stemming, would change in the clean open scores: of real answers and of blind ones.

    python benchmarks/plurals.py [--answers NAME=FILE ...] [--json FILE]    (- prints)

Needs VQA-RAD and SLAKE in ../shared/data. FILE as for `verdict.py`. "other number" answers every question with its
reference in the other number, singular for plural: what a perfect model loses that differs in nothing else.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import write
from nltk.stem import PorterStemmer, SnowballStemmer
from verdict import lines, official, training

from stllava_eval.scoring import image_blind
from stllava_eval.scoring.image_blind import commonest_words
from stllava_eval.scoring.metrics import exact_match, f1, recall
from stllava_eval.scoring.words import folded_words, singular

FOLDINGS: dict[str, Callable[[str], str]] = {
    "none (v1)": str,
    "plurals (v2)": singular,
    "Porter": PorterStemmer().stem,
    "Snowball": SnowballStemmer("english").stem,
}
METRICS = (recall, f1, exact_match)


def other_number(text: str) -> str:
    """The last word of `text` as a plural where it is a singular, and the other way round."""
    words = text.split()
    last = words[-1]
    single = singular(last.lower())
    if single != last.lower():
        words[-1] = single
    elif re.fullmatch(r"[A-Za-z]{3,}", last):
        words[-1] = f"{last}es" if last.lower().endswith(("s", "x", "ch", "sh")) else f"{last}s"
    return " ".join(words)


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The mean of each metric in %, by folding."""
    found = {}
    for name, fold in FOLDINGS.items():

        def words(text: str, fold: Callable[[str], str] = fold) -> tuple[str, ...]:
            return tuple(fold(word) for word in folded_words(text))

        values = {of: [of(row["answer"], row["reference"], words) for row in rows] for of in METRICS}
        found[name] = {of.__name__: round(100 * sum(each) / len(each), 2) for of, each in values.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="-", metavar="FILE", help="where the figures go (default: printed)")
    parser.add_argument("--answers", action="append", default=[], metavar="NAME=FILE", help="a run's answers")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    for given in arguments.answers:
        name, _, file = given.partition("=")
        figures[name] = means([row for row in lines(Path(file)) if row["kind"] == "open"])
    for name in ("vqarad", "slake"):
        train = training(name)
        rows = [row for row in official(name) if row["kind"] == "open" and folded_words(row["reference"])]
        answers = list(train.kinds["open"].elements())
        given = {
            f"{count} commonest words": {row["id"]: commonest_words(answers, count) for row in rows}
            for count in image_blind.WORD_COUNTS
        }
        given |= {
            image_blind.PRIOR: train.commonest(rows),
            "other number": {row["id"]: other_number(row["reference"]) for row in rows},
        }
        for label, of in given.items():
            figures[f"{name}, {label}"] = means([row | {"answer": of[row["id"]]} for row in rows])
    write(figures, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
