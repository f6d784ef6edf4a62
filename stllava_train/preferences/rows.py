"""Define a candidate, a question with its sampled answers, and read files of candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from stllava_eval.errors import InputError
from stllava_eval.scoring.words import folded_words
from stllava_eval.storage import has_lone_surrogate
from stllava_train.resumable import read_rows

# Why a question, or the answers to one, are left out
SKIP_REASONS = ("no question", "repeat", "near repeat", "answers alike", "answers without end")


@dataclass(frozen=True)
class Candidate:
    """A question about an image, and two or more answers, of which a judge is to say which is better.

    Attributes:
        id: `IMAGE#N`, the number from 0 of the question among those drawn about the image.
        image: The image's file, relative to the folder of images.
        image_sha256: `pixel_hash` of it.
    """

    id: str
    image: str
    image_sha256: str
    question: str
    answers: tuple[str, ...]


def count(rows: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Count images, questions and candidates in rows, and questions that were skipped by reason."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts["images"] += 1
        counts["images that cannot be decoded"] += "broken" in row
        counts["questions"] += len(row["questions"])
        counts["candidates"] += sum(question["left_out"] is None for question in row["questions"])
        counts.update(question["left_out"] for question in row["questions"] if question["left_out"])
    return counts


def read_candidates(path: Path) -> list[Candidate]:
    """Read the candidates in a file that `write_candidates` wrote.

    Raises:
        InputError: It cannot be read, or a row is none of candidates.
    """
    found: list[Candidate] = []
    known: set[str] = set()
    for number, row in enumerate(read_rows(path), 1):
        try:
            for question in row["questions"]:
                if question["left_out"] is None:
                    candidate = Candidate(
                        str(question["id"]),
                        str(row["image"]),
                        str(row["image_sha256"]),
                        question["question"],
                        tuple(question["answers"]),
                    )
                    texts = (row["image"], row["image_sha256"], candidate.question, *candidate.answers)
                    if len(candidate.answers) < 2 or not all(isinstance(text, str) for text in texts):
                        raise TypeError("a text is missing, or an answer")
                    if any(map(has_lone_surrogate, texts)):
                        raise TypeError("half a character")
                    if (
                        "\0" in candidate.image
                        or PurePosixPath(candidate.image).is_absolute()
                        or ".." in PurePosixPath(candidate.image).parts
                    ):
                        raise TypeError(f"image {candidate.image} lies outside the folder of images")
                    if candidate.id in known:
                        raise TypeError(f"id {candidate.id} appears twice")
                    known.add(candidate.id)
                    found.append(candidate)
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{path}:{number}: no row of candidates ({error}). Pass what `stllava-train candidates` wrote."
            ) from error
    return found


def rouge_l(one: str, other: str) -> float:
    """Return ROUGE-L F1 of two texts by `folded_words`, in [0, 1]: 1 where both have the same words in the same order.

    Source: Lin (2004), beta 1; rapidfuzz's Indel is it, twice the longest common subsequence by the sum of the lengths.
    """
    from rapidfuzz.distance import Indel

    return float(Indel.normalized_similarity(folded_words(one), folded_words(other)))
