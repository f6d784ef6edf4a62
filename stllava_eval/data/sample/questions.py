"""Make small question sets about real medical images that installed packages ship; every answer is known.

The answers come from DICOM tags, package documentation, affines, masks, measurements, and from what was done to the
image here (a cross drawn, a bar laid over one side, a flip). Nobody looked at an image to answer. docs/start/data.md
lists the images, their licences and what each answer rests on.

Three things keep the splits honest. Volumes are cut into slabs with a gap between (`_slab`), single images into regions
with a gap between (`REGIONS`), and some images appear in the test split alone: `categories["origin"]` tells which.
Slices of different planes of one volume cross in a line; nothing else is shared. Each question has wordings that
training never sees.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from stllava_eval.data.catalog import Row
from stllava_eval.data.sample.concepts import PATHOLOGY, RADIOLOGY, Concept
from stllava_eval.data.sample.pictures import (
    SEED,
    SETS,
    SPLITS,
    Picture,
    edited,
    encoded,
    seen_pictures,
    unseen_pictures,
)
from stllava_eval.errors import InputError

if TYPE_CHECKING:
    import numpy as np


ORIGINS = {"train": "training region", "validation": "validation region", "test": "held-out region"}
NEW_WORDING = 0.35  # share of validation and test questions in a wording that training never shows. Our choice
# Open questions, and as many yes/no ones, asked about one concept in one set: at most this share of the split's images.
# Training asks about every image; the test splits cap each concept, so that rare ones count as much. Our choice
ASKED_SHARE = {"train": 1.0, "validation": 0.4, "test": 0.4}


def sample_rows(name: str, split: str) -> list[Row]:
    """Return the rows of one split of a sample set, the same bytes every time.

    Args:
        name: vqarad, slake or pathvqa: whose shape the rows take.
        split: train, validation or test. `categories["origin"]` of a test row is "held-out region" (another part of a
            volume or image that training uses) or "unseen volume" (a patient or slide that training never shows).

    Raises:
        InputError: Name or split is unknown, or a package that ships images is missing.
    """
    return _rows_and_facts(name, split)[0]


def sample_facts(name: str, split: str) -> dict[str, dict[str, str]]:
    """What is known of every image of a sample set: image id -> concept -> its value. An image's rows ask part of it.

    Makes the images again (seconds for a test split).

    Raises:
        InputError: As `sample_rows`.
    """
    return _rows_and_facts(name, split)[1]


def true_answers(name: str, facts: dict[str, str]) -> dict[str, str]:
    """Every question, in every wording of the set, that these facts answer -> its answer.

    Questions about what the image does not have ("Where is the blue bar?" without a bar) and those whose answer is in
    doubt ("Is the chest shown?" of a heart) are left out, as the rows leave them out.
    """
    answers: dict[str, str] = {}
    for concept in _concepts(name):
        if (value := facts.get(concept.name)) is None:
            continue
        for question, asked in _texts(concept):
            if asked is None and value in concept.values:
                answers[question] = value
            elif asked is not None and (value == asked or _excludes(concept, value, asked)):
                answers[question] = "yes" if value == asked else "no"
    return answers


def all_questions(name: str) -> set[str]:
    """Every question that the set can ask of some image, in every wording: those of all splits, and more."""
    return {question for concept in _concepts(name) for question, _ in _texts(concept)}


def _concepts(name: str) -> tuple[Concept, ...]:
    return PATHOLOGY if name == "pathvqa" else RADIOLOGY


def _texts(concept: Concept) -> Iterator[tuple[str, str | None]]:
    """Every question about a concept, and the value that it asks about; None for an open one."""
    for wording in concept.open:
        yield wording, None
    for value, named in concept.values.items():
        for wording in concept.closed:
            yield wording.format(named), value


def _rows_and_facts(name: str, split: str) -> tuple[list[Row], dict[str, dict[str, str]]]:
    """The rows of a split, and the facts of each of its images by image id, also of an image that no row asks about."""
    import numpy as np

    if name not in SETS:
        raise InputError(f"sample set {name!r} is unknown. A sample set is one of {', '.join(SETS)}.")
    if split not in SPLITS:
        raise InputError(f"split {split!r} is unknown. A split is one of {', '.join(SPLITS)}.")
    rng = np.random.default_rng([SEED, SETS.index(name), SPLITS.index(split)])
    groups = [(ORIGINS[split], seen_pictures(name, split, rng))]
    if split == "test":
        groups.append(("unseen volume", unseen_pictures(name, rng)))
    concepts = _concepts(name)
    rows: list[Row] = []
    facts: dict[str, dict[str, str]] = {}
    for origin, cuts in groups:
        pictures = [edited(picture, rng) for picture in cuts]
        files = [encoded(picture.pixels) for picture in pictures]
        ids = [
            f"{name}-sample-{split}-{origin.split()[0]}-{index:03d}-{picture.source}"
            for index, picture in enumerate(pictures)
        ]
        facts |= {image_id: picture.facts for image_id, picture in zip(ids, pictures, strict=True)}
        for index, concept, value, asked in _questions(pictures, concepts, ASKED_SHARE[split], rng):
            wording, is_new = _wording(concept.open if asked is None else concept.closed, split, rng)
            rows.append(
                Row(
                    id=f"{name}-sample-{split}-{len(rows):04d}",
                    image=files[index],
                    image_id=ids[index],
                    question=wording if asked is None else wording.format(concept.values[asked]),
                    reference=value if asked is None else ("yes" if value == asked else "no"),
                    kind="open" if asked is None and not concept.choice else "closed",
                    categories=_categories(name, split, concept.name, pictures[index].facts, is_new)
                    | {"origin": origin},
                )
            )
    return rows, facts


def _categories(name: str, split: str, concept: str, facts: dict[str, str], is_new: bool) -> dict[str, str]:
    """Return a row's categories, named as the set names its own."""
    organ, modality = facts.get("organ", "not recorded"), facts.get("modality", "not recorded")
    if name == "vqarad":
        phrase = ("test_" if split == "test" else "") + ("para" if is_new else "freeform")
        return {"organ": organ, "question_type": concept, "phrase_type": phrase}
    if name == "slake":
        return {"modality": modality, "location": organ, "content_type": concept, "base_type": "vqa", "language": "en"}
    return {"question_type": concept}


# --- what is asked ----------------------------------------------------------------------------------------------------


def _questions(
    pictures: list[Picture], concepts: tuple[Concept, ...], share: float, rng: np.random.Generator
) -> list[tuple[int, Concept, str, str | None]]:
    """What to ask: (place of the picture, concept, its value there, value asked about or None for an open question).

    For every value asked about, "yes" and "no" are right equally often, so that the question alone tells nothing; the
    values of an open question come up equally often as far as there are pictures. Pictures asked little come first.
    """
    asked_so_far: Counter[int] = Counter()
    questions: list[tuple[int, Concept, str, str | None]] = []

    def take(places: list[int], count: int) -> list[int]:
        places = [places[i] for i in rng.permutation(len(places))]
        taken = sorted(places, key=asked_so_far.__getitem__)[:count]
        asked_so_far.update(taken)
        return taken

    for concept in concepts:
        values = {index: p.facts[concept.name] for index, p in enumerate(pictures) if concept.name in p.facts}
        for asked in concept.values:
            yes = [index for index, value in values.items() if value == asked]
            no = [index for index, value in values.items() if _excludes(concept, value, asked)]
            count = min(len(yes), len(no), round(share * len(pictures) / len(concept.values) / 2))
            for index in take(yes, count) + take(no, count):
                questions.append((index, concept, values[index], asked))
            if concept.open:
                for index in take(yes, round(share * len(pictures) / len(concept.values))):
                    questions.append((index, concept, values[index], None))
    return sorted(questions, key=lambda question: question[0])


def _excludes(concept: Concept, value: str, asked: str) -> bool:
    """Return whether an image of `value` certainly does not show `asked`: it is another one, and not part of it."""
    return value != asked and not {(value, asked), (asked, value), (value, "*")} & concept.overlap


def _wording(wordings: tuple[str, ...], split: str, rng: np.random.Generator) -> tuple[str, bool]:
    """One of a question's wordings, and whether it is one that training never shows."""
    own = {"train": None, "validation": wordings[-2], "test": wordings[-1]}[split]
    if own and rng.random() < NEW_WORDING:
        return own, True
    return wordings[rng.integers(len(wordings) - 2)], False
