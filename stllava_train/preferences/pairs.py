"""Make preference pairs of verdicts: a chosen and a rejected answer to a question about an image.

Candidates + verdicts -> pairs -> DPO; `pair_selection` chooses among them, and `pair_formats` writes them.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Any

from stllava_eval.errors import InputError
from stllava_eval.storage import has_lone_surrogate
from stllava_train.data.conversations import ROLE, SPECIAL
from stllava_train.data.records import tags
from stllava_train.preferences.rows import Candidate
from stllava_train.preferences.verdicts import Rule, Verdict, preferences
from stllava_train.resumable import Row, read_rows


@dataclass(frozen=True)
class Pair:
    """Two answers to a question about an image, of which one is to become likelier than the other.

    Of an image-contrast pair the two answers are about two images, and are one text as a rule; see `contrast`.

    Attributes:
        id: Of the candidate; with the indexes of the two answers where it has more than two, `a.png#0:0-2`.
        image: The image's file, relative to the folder of images.
        image_sha256: `pixel_hash` of it.
        question, chosen, rejected: Stripped, without the image's tag.
        margin: Score of the chosen less that of the rejected, in points of 10, at least 0; None where no scores are
            known, as in the authors' files.
        judges: Who prefer the chosen, sorted; empty where not known.
        weight: Of its loss beside those of the file's other pairs, finite and 0 or more, such as MMedPO's clinical
            relevance from 0 to 1; None where its file has no weights, and all pairs count alike.
        rejected_image, rejected_image_sha256: What the rejected answer is about, where that is another image than
            `image`; else None.
    """

    id: str
    image: str
    image_sha256: str
    question: str
    chosen: str
    rejected: str
    margin: float | None
    judges: tuple[str, ...]
    weight: float | None = None
    rejected_image: str | None = None
    rejected_image_sha256: str | None = None

    @property
    def images(self) -> tuple[str, str]:
        """Return the image of the chosen and that of the rejected answer."""
        return self.image, self.rejected_image or self.image

    @property
    def pictures(self) -> dict[str, str]:
        """Return the file of each different image -> its hash."""
        other = {self.rejected_image: self.rejected_image_sha256 or ""} if self.rejected_image else {}
        return {self.image: self.image_sha256} | other


OPTIONAL = ("weight", "rejected_image", "rejected_image_sha256")
KEYS = tuple(field.name for field in fields(Pair) if field.name not in OPTIONAL)


def row_of(pair: Pair) -> Row:
    """Return the row that a file holds: its keys, and of the optional ones those that the pair has."""
    return {key: value for key, value in asdict(pair).items() if key in KEYS or value is not None}


@dataclass(frozen=True)
class PairSet:
    """Pairs, and how many are left out by why."""

    pairs: list[Pair]
    skipped: dict[str, int]


def make_pairs(
    candidates: Sequence[Candidate], verdicts: Iterable[Verdict], rule: Rule, judges: Sequence[str] = ()
) -> PairSet:
    """Make a pair of every two answers of which one is preferred, in the order of the candidates.

    Every two answers of every candidate are either a pair or skipped once, by one of `verdicts.PAIR_OUTCOMES` or by
    `pair_problem`.

    Args:
        candidates: What was judged.
        verdicts: On them alone.
        rule: How verdicts become preferences.
        judges: Whose verdicts count (default: all that occur).

    Raises:
        InputError: A verdict is on no candidate, or a judge has none.
    """
    verdicts = list(verdicts)
    by_id = {candidate.id: candidate for candidate in candidates}
    for verdict in verdicts:
        judged = by_id.get(verdict.id)
        both = min(verdict.shown), max(verdict.shown)
        if (
            judged is None
            or both not in combinations(range(len(judged.answers)), 2)
            or verdict.image_sha256 != judged.image_sha256
        ):
            raise InputError(
                f"{verdict.id}: {verdict.judge} judged answers {verdict.shown[0]} and {verdict.shown[1]} about image "
                f"{verdict.image_sha256[:12]}, which are no candidate's. Pass the candidates that were judged."
            )
    known = {verdict.judge for verdict in verdicts}
    if strangers := sorted({*judges} - known):
        raise InputError(f"--judge {strangers[0]}: no verdict is its. There are those of {', '.join(sorted(known))}.")
    names = sorted({*judges} or known)
    pairs: list[Pair] = []
    skipped: Counter[str] = Counter()
    for preference in preferences(candidates, verdicts, rule, names):
        if preference.chosen is None or preference.rejected is None:
            skipped[preference.outcome] += 1
            continue
        candidate = by_id[preference.id]
        chosen, rejected = candidate.answers[preference.chosen], candidate.answers[preference.rejected]
        texts = candidate.question.strip(), chosen.strip(), rejected.strip()
        if why := pair_problem(*texts):
            skipped[why] += 1
            continue
        id = candidate.id
        if len(candidate.answers) > 2:
            id += f":{preference.answers[0]}-{preference.answers[1]}"
        pairs.append(Pair(id, candidate.image, candidate.image_sha256, *texts, preference.margin, preference.judges))
    return PairSet(pairs, dict(skipped))


def pair_problem(question: str, chosen: str, rejected: str, two_images: bool = False) -> str | None:
    """Return why these stripped texts make no pair; None where they do.

    Args:
        question, chosen, rejected: The texts.
        two_images: The answers are about two images, and may be one text.

    >>> pair_problem("Where?", "Left.</s>", "Right.")
    '</s> in chosen'
    """
    for name, text in (("question", question), ("chosen", chosen), ("rejected", rejected)):
        if not text:
            return f"empty {name}"
        if marks := [mark for mark in (*SPECIAL, "<image>") if mark in text] + ROLE.findall(text) + tags(text):
            return f"{marks[0]} in {name}"
        if has_lone_surrogate(text):
            return f"half a character in {name}"
    return "chosen equals rejected" if chosen == rejected and not two_images else None


def read_pairs(path: Path) -> list[Pair]:
    """Read the pairs of a file, each of them checked.

    Raises:
        InputError: It cannot be read or holds none, or a row is no pair.
    """
    found: dict[str, Pair] = {}
    for number, row in enumerate(read_rows(path), 1):
        try:
            pair = pair_of(row)
            if pair.id in found:
                raise ValueError(f"id {pair.id} appears twice. Give each pair one of its own.")
        except ValueError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        found[pair.id] = pair
    if not found:
        raise InputError(f"{path}: it holds no pair. Pass what `stllava-train pairs` wrote.")
    check_weights(path, list(found.values()))
    return list(found.values())


def check_weights(path: Path, pairs: Sequence[Pair]) -> None:
    """Raise InputError where some pairs have a weight and others have none, or all weights are 0."""
    weights = [pair.weight for pair in pairs]
    if None in weights and any(weight is not None for weight in weights):
        without = next(pair.id for pair in pairs if pair.weight is None)
        raise InputError(f"{path}: {without}: it has no weight, and others have one. Give each pair a weight, or none.")
    if weights and not any(weight is None or weight > 0 for weight in weights):
        raise InputError(f"{path}: the weight of every pair is 0, so nothing would be learnt. Raise some.")


def relative_weights(pairs: Sequence[Pair]) -> list[float]:
    """Return the weight of each pair divided by the mean weight of them all; none where the pairs have no weights.

    MMedPO (arXiv:2412.06141) multiplies the loss of a pair by its clinical relevance, from 0 to 1, and takes the mean
    over the batch (`dpo_trainer_weighted.py` in aiming-lab/MMedPO). That the weights are divided by their mean before
    is our choice: what counts is how they compare, equal weights train as none do, and learning rate and gradient
    clipping keep their meaning. Over an epoch it is the weighted mean of the losses.
    """
    weights = [pair.weight for pair in pairs if pair.weight is not None]
    if not weights:
        return []
    most = max(weights)
    shares = [weight / most for weight in weights]  # their sum is finite, however large the weights are
    mean = math.fsum(shares) / len(shares)
    return [share / mean for share in shares]


def weights_in_words(pairs: Sequence[Pair]) -> list[str]:
    """Return a line about the weights; none where there are none."""
    weights = [pair.weight for pair in pairs if pair.weight is not None]
    if not weights:
        return []
    mean = math.fsum(weight / len(weights) for weight in weights)
    return [f"weights from {min(weights):g} to {max(weights):g}; in the loss each is divided by their mean, {mean:.4g}"]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_inside(value: Any) -> bool:
    """Return whether a value names a file inside the folder that it is relative to."""
    if not isinstance(value, str) or value == "" or "\0" in value:
        return False
    return not PurePosixPath(value).is_absolute() and ".." not in PurePosixPath(value).parts


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value))


def _is_margin(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value < math.inf)


# What a row holds -> whether a value is right, and what would be
CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "id": (lambda value: isinstance(value, str) and value != "", "a text"),
    "image": (is_inside, "a file's name relative to the folder of images"),
    "image_sha256": (_is_hash, "64 hex digits"),
    "question": (_is_text, "a text"),
    "chosen": (_is_text, "a text"),
    "rejected": (_is_text, "a text"),
    "margin": (_is_margin, "a number from 0 on, or null"),
    "judges": (lambda value: isinstance(value, list) and all(map(_is_text, value)), "a list of names"),
    "weight": (_is_margin, "a number from 0 on"),
    "rejected_image": (is_inside, "a file's name relative to the folder of images"),
    "rejected_image_sha256": (_is_hash, "64 hex digits"),
}


def pair_of(row: Row) -> Pair:
    """Return the pair that a row of a file holds.

    Raises:
        ValueError: It is none; the message says why.
    """
    form = f"A pair has {', '.join(KEYS)}; see docs/preferences/pairs.md."
    form += " `stllava-train pairs --from` reads other layouts."
    if missing := [key for key in KEYS if key not in row]:
        raise ValueError(f"no {missing[0]}. {form}")
    if others := [key for key in row if key not in CHECKS]:
        raise ValueError(f"{others[0]} is no key of a pair. {form}")
    for key, (is_right, right) in CHECKS.items():
        if key in row and not is_right(row[key]):
            raise ValueError(f"{key} is {json.dumps(row[key])[:60]}, not {right}. Fix the line, or delete it.")
    texts = {key: row[key].strip() for key in ("question", "chosen", "rejected")}
    two_images = "rejected_image" in row
    if two_images != ("rejected_image_sha256" in row):
        raise ValueError("rejected_image and rejected_image_sha256 go together. Give both, or neither.")
    if two_images and row["rejected_image_sha256"] == row["image_sha256"]:
        raise ValueError("image and rejected_image have the same pixels. Name another one, or delete the line.")
    if why := pair_problem(**texts, two_images=two_images):
        raise ValueError(f"{why}. Fix the line, or delete it.")
    return Pair(**row | texts | {"judges": tuple(row["judges"])})
