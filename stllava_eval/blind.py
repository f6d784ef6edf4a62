"""A data set's training answers -> answers that never look at an image: what any score must be read against."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from stllava_eval.errors import InputError

# the constants and word counts of the published metric's degenerate scores (docs/metrics.md)
CONSTANTS = ("yes", "no", "yes and no", "I do not know.", "The image is normal.")
WORD_COUNTS = (5, 10, 25, 50)
PRIOR = "commonest answer"  # the label of `prior`


def blind_answers(name: str) -> dict[str, dict[str, str]]:
    """Label -> the answers, by question id, of each image-blind baseline on the test split of data set `name`.

    The constants; and where the training split is prepared too, its k commonest open-answer words and its commonest
    answer to the very question (`prior`).

    Raises:
        InputError: The test split is not prepared.
    """
    from stllava_eval.datasets import read_split
    from stllava_eval.metrics import commonest_words

    test = read_split(name, "test", images=False).to_list()
    constants = {f'always "{constant}"': constant for constant in CONSTANTS}
    answers: dict[str, dict[str, str]] = {}
    try:
        train = read_split(name, "train", images=False).to_list()
    except InputError:
        train = []
    if train:
        references = [row["reference"] for row in train if row["kind"] == "open"]
        constants |= {f"{count} commonest words": commonest_words(references, count) for count in WORD_COUNTS}
        answers[PRIOR] = prior(train, test)
    return {label: {row["id"]: constant for row in test} for label, constant in constants.items()} | answers


def prior(train: Sequence[Mapping[str, str]], test: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The commonest training answer to each test question: to the same words, else among all of its kind.

    Ties go to the alphabetically first, so that the result does not depend on the rows' order.
    """
    by_question: dict[str, Counter[str]] = {}
    by_kind: dict[str, Counter[str]] = {"open": Counter(), "closed": Counter()}
    for row in train:
        by_question.setdefault(_words(row["question"]), Counter())[row["reference"].lower()] += 1
        by_kind[row["kind"]][row["reference"].lower()] += 1
    return {row["id"]: _commonest(by_question.get(_words(row["question"])) or by_kind[row["kind"]]) for row in test}


def _words(question: str) -> str:
    return " ".join(question.lower().split())


def _commonest(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer)) if counts else ""
