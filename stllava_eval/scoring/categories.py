"""Sort questions by what they ask about, and pair those whose answers must agree or differ, by declared rules.

The questions of a split come in; `inspect_run` and `compare` break the scores of `metrics.py` down by what comes out.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from importlib import resources
from itertools import combinations

_IMAGE = r"(?:ct|mri?|x-?rays?|cxr|radiographs?|ultrasound|pet|t1|t2|flair|dwi|angiogram|tomography|resonance|mra|cta)"
_RULES = {  # our choice; how far they agree with the data sets' own question types is in docs/results.md
    "negation": (
        r"\b(?:no|not|none|without|absen(?:t|ce)|free of|lack(?:s|ing)?|missing|rul(?:e|ed|ing) out)\b",
        r"n't\b",
    ),
    "laterality": (
        r"\b(?:left|right|(?:bi|uni)lateral(?:ly)?|both (?:sides|lungs|kidneys)|(?:which|what) side)\b",
        r"\b(?:hemithorax|ipsilateral|contralateral)\b",
    ),
    "counting": (
        r"\bhow many\b",
        r"\bnumber of\b",
        r"\bmore than (?:one|two|three|\d+)\b",
        r"\bmultiple\b",
        r"[<>]\s*\d",
    ),
    "size": (
        r"\b(?:sizes?|larger?|largest|enlarge(?:d|ment)|small(?:er|est)?(?! (?:bowel|bubbles))|big(?:ger|gest)?)\b",
        r"\b(?:wide[rn]?|widen(?:ing|ed)|width|diameter|length|long(?:er|est)?|thick(?:er|ened|ness|ening)?)\b",
        r"\b(?:dilat|narrow|hyperinflat|hypertroph|atroph)\w*|\bcardiomegaly\b",
    ),
    "modality": (
        r"\bmodalit(?:y|ies)\b",
        r"\b(?:what|which) (?:type|kind|sort) of (?:\w+ )?(?:image|imaging|scan|mri?|ct)\b",
        rf"\b(?:is|was|are|were) (?:this|that|it|these|the (?:image|picture|scan|film)) .*\b{_IMAGE}\b",
        r"\b(?:imag\w*|scan|picture) .*\b(?:technique|weighted)\b",
        r"\bweighting\b|\bsequence of\b",
        r"\bhow (?:is|was) (?:this|the) (?:image|scan|picture) (?:taken|acquired|obtained)\b",
    ),
    "plane": (
        r"\b(?:planes?|axial|coronal|sagittal|transverse|cross[- ]section(?:al)?)\b",
        r"\b(?:ap|pa|lateral|oblique) (?:view|film|x-?ray|projection|image)\b",
        r"\b(?:what|which) (?:view|orientation)\b",
    ),
}
ASKS = {name: re.compile("|".join(patterns), re.IGNORECASE) for name, patterns in _RULES.items()}
"""What a question asks about -> the words that show it. A question may ask about several things, or none of these."""


@cache
def asks(question: str) -> tuple[str, ...]:
    """Return the names in `ASKS` whose words the question has.

    >>> asks("Is there no fracture of the left ribs?"), asks("Where is the lesion?")
    (('negation', 'laterality'), ())
    """
    return tuple(name for name, pattern in ASKS.items() if pattern.search(question))


def paraphrases(name: str, rows: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """Return pairs of ids of test questions that ask the same in other words; only VQA-RAD has any.

    They are those that its public file links (`qid_linked_id`), of the same kind and with the same reference: 136
    pairs in the official test. It has 148 groups of linked questions, but 21 ask different things ("Is there a
    pneumothorax?" beside "Are lung markings present?").
    """
    if name != "vqarad":
        return []
    by_id = {row["id"]: row for row in rows}
    linked = defaultdict(list)
    for id, group in _linked().items():
        if id in by_id:
            linked[group].append(id)
    pairs = []
    for ids in linked.values():
        in_order = sorted(ids, key=lambda id: (len(id), id))  # ids are numbers, so the shorter is the smaller
        for first, second in combinations(in_order, 2):
            if _answer(by_id[first]) == _answer(by_id[second]):
                pairs.append((first, second))
    return pairs


def opposites(rows: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """Return pairs of ids of questions on one image that differ in one word: one is answered yes, the other no.

    A system that says the same to both has not understood the word, or has not seen what it names.
    """
    by_image = defaultdict(list)
    for row in rows:
        if row["kind"] == "closed" and _words(row["reference"]) in (["yes"], ["no"]):
            by_image[row["image_id"]].append((_words(row["question"]), row))
    pairs = []
    for questions in by_image.values():
        for (words, first), (other_words, second) in combinations(questions, 2):
            contrary = _words(first["reference"]) != _words(second["reference"])
            if contrary and _differ_in_one_word(words, other_words):
                pairs.append((first["id"], second["id"]))
    return pairs


def _differ_in_one_word(words: Sequence[str], others: Sequence[str]) -> bool:
    if len(words) != len(others):
        return False
    return sum(word != other for word, other in zip(words, others, strict=True)) == 1


def _answer(row: Mapping[str, str]) -> tuple[str, list[str]]:
    return row["kind"], _words(row["reference"])


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@lru_cache(maxsize=1)
def _linked() -> dict[str, str]:
    """Return the group of each linked question in the official test split of VQA-RAD, by the question's id."""
    text = resources.files("stllava_eval.tasks").joinpath("vqarad", "paraphrases.csv").read_text(encoding="utf-8")
    return {row["qid"]: row["group"] for row in csv.DictReader(text.splitlines())}
