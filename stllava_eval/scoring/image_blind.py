"""Make answers that never look at an image, from a data set's training answers: the baselines of every leaderboard."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files

from stllava_eval.data.splits import is_prepared, read_manifest, read_split
from stllava_eval.scoring.llavamed import normalize_llavamed

# the constants and word counts of the published metric's degenerate scores (docs/evaluate/metrics.md)
CONSTANTS = ("yes", "no", "yes and no", "I do not know.", "The image is normal.")
WORD_COUNTS = (5, 10, 25, 50)
PRIOR = "commonest answer"  # the label of `TrainingAnswers.commonest`


@dataclass(frozen=True)
class TrainingAnswers:
    """How often each answer, in lower case, appears in a training split: by question, and by kind of question."""

    edition: str
    questions: Mapping[str, Counter[str]]
    """The counts of answers by the question's text, in lower case with single spaces."""
    kinds: Mapping[str, Counter[str]]
    """The counts of answers by kind of question, "open" and "closed"."""

    def commonest(self, test: Iterable[Mapping[str, str]]) -> dict[str, str]:
        """Return the commonest training answer to each test question, by the question's id.

        It is taken from training questions with the same text, or, if there are none, from all of the same kind.

        Ties go to the alphabetically first, so that the result does not depend on the rows' order.
        """
        return {
            row["id"]: _most(self.questions.get(_words(row["question"])) or self.kinds[row["kind"]]) for row in test
        }


@dataclass(frozen=True)
class ImageBlindAnswers:
    """The image-blind baselines of a test split."""

    answers: dict[str, dict[str, str]]
    """The answers by label; each is a dictionary from question id to answer."""
    note: str
    """A sentence that names the training split of the commonest words and answers, or says why they are missing."""


def image_blind_answers(name: str) -> ImageBlindAnswers:
    """Return the image-blind baselines of the prepared test split of data set `name`.

    They are the constants, the k commonest words of open training answers, and the commonest training answer to the
    same question (`PRIOR`). Training answers are counted in the prepared training split. If none is prepared, an
    official test split uses the counts that the package ships for data sets whose licence allows it. These counts are
    never used for a sample set or another edition.

    Raises:
        InputError: The test split is not prepared, or a prepared split is damaged.
    """
    test = read_split(name, "test", images=False).to_list()
    manifest = read_manifest(name, "test")
    constants = {f'always "{constant}"': constant for constant in CONSTANTS}
    train, from_where = prepared_answers(name, manifest.sample), "which is prepared"
    if train is None and manifest.official:
        train, from_where = shipped_answers(name), "with the counts that the package ships"
    if train is None:
        command = f"stllava-eval prepare {name} --sample" if manifest.sample else _PREPARE.format(name=name)
        note = (
            "The image-blind rows of the commonest training words and answers are missing: they need a training split "
            f"that belongs to the {manifest.edition}, and none is prepared. Run `{command}`."
        )
        return ImageBlindAnswers({label: _to_all(test, constant) for label, constant in constants.items()}, note)
    references = list(train.kinds["open"].elements())
    constants |= {f"{count} commonest words": commonest_words(references, count) for count in WORD_COUNTS}
    answers = {label: _to_all(test, constant) for label, constant in constants.items()}
    note = f"The commonest words and answers are those of the training split ({train.edition}), {from_where}."
    return ImageBlindAnswers(answers | {PRIOR: train.commonest(test)}, note)


_PREPARE = "stllava-eval prepare {name} --split train --from DIR"


def prepared_answers(name: str, sample: bool = False) -> TrainingAnswers | None:
    """Return the answer counts of the prepared training split; None if there is none, or if its `sample` differs.

    Raises:
        InputError: The split is damaged.
    """
    if not is_prepared(name, "train") or (manifest := read_manifest(name, "train")).sample is not sample:
        return None
    questions: dict[str, Counter[str]] = {}
    kinds: dict[str, Counter[str]] = {"open": Counter(), "closed": Counter()}
    for row in read_split(name, "train", images=False).to_list():
        questions.setdefault(_words(row["question"]), Counter())[row["reference"].lower()] += 1
        kinds[row["kind"]][row["reference"].lower()] += 1
    return TrainingAnswers(manifest.edition, questions, kinds)


def shipped_answers(name: str) -> TrainingAnswers | None:
    """Return the answer counts of the official training split that the package ships; None if it ships none.

    They are in training_answers.json, which `python benchmarks/training_answers.py` writes.
    """
    text = files("stllava_eval.scoring").joinpath("training_answers.json").read_text(encoding="utf-8")
    shipped = json.loads(text)["sets"].get(name)
    if shipped is None:
        return None
    questions = {question: Counter(counts) for question, counts in shipped["questions"].items()}
    kinds = {kind: Counter(counts) for kind, counts in shipped["kinds"].items()}
    return TrainingAnswers(shipped["edition"], questions, kinds)


def _to_all(rows: Iterable[Mapping[str, str]], answer: str) -> dict[str, str]:
    return {row["id"]: answer for row in rows}


def _words(question: str) -> str:
    return " ".join(question.lower().split())


def _most(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer)) if counts else ""


def commonest_words(references: Iterable[str], k: int) -> str:
    """Return the k most frequent words of `references`, as one answer that looks at no image; ties go by alphabet.

    Words are those of `normalize_llavamed`. Given the open answers of a training set, its `recall_llavamed` is what a
    model must beat: on SLAKE's English test 10 words get 42.0 (STLLaVA-Med without DPO: 40.13).

    >>> commonest_words(["Left lung", "right lung", "Right"], 2)
    'lung right'
    """
    counts = Counter(word for reference in references for word in normalize_llavamed(reference).split())
    return " ".join(sorted(counts, key=lambda word: (-counts[word], word))[:k])
