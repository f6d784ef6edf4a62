"""Find which question each row of a file of answers is about, and refuse rows about another one."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from stllava_eval.data.readers import data_rad_ids
from stllava_eval.data.splits import numbered_edition, read_manifest
from stllava_eval.errors import InputError
from stllava_eval.runs.answer_fields import (
    ANSWER_FIELDS,
    CONTENT_FIELDS,
    ID_FIELDS,
    IMAGE_FIELDS,
    MOST_AMBIGUOUS,
    PROMPT_FIELDS,
    QUESTION_FIELDS,
    REFERENCE_FIELDS,
    Reading,
    log,
)
from stllava_eval.runs.answer_layouts import single_item
from stllava_eval.runs.scores import dataset_of
from stllava_eval.scoring.final_answer import (
    FinalAnswer,
)


@dataclass(frozen=True)
class RecordedReply:
    """The reply in one row of a file of answers, and what the row says about it."""

    reply: str
    asked: str | None = None
    """The text that the model was asked; None if the row does not have it."""
    ended: bool | None = None
    """Whether the reply ended by itself; None if the row does not say."""
    final: FinalAnswer | None = None
    """The final answer, if the row is of a run folder."""
    extract: str = ""
    """The signature of the rule that extracted it."""
    is_marked: bool = False
    """Whether opened thoughts are marked in the reply already, as in a run folder or in lmms-eval's samples."""


def lacks_field(location: str, row: Mapping[str, Any], what: str, names: Sequence[str]) -> str:
    """Say that a row has no id or no answer (`what`), where it is read from (`names`), and what the row has instead."""
    seen = ", ".join(map(str, list(row)[:12]))
    kind = "a text or a number" if what == "id" else "a text"
    return (
        f"{location}: no {what}. It must be {kind} in {'the field' if len(names) == 1 else 'one of the fields'} "
        f"{', '.join(names)}; this row has the fields {seen}. Pass --{what}-field with the right name."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Files without ids


ContentKey = tuple[str, str | None]
"""A folded question and its folded reference, if there is one: what identifies a row of a file without ids."""


def folded_text(text: object) -> str:
    """Return a text in lower case with single spaces and none before a mark; copies of a data set differ in these."""
    return re.sub(r" (?=[?.,;:!])", "", " ".join(str(text).lower().split()))


def question_and_reference(location: str, row: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the folded question, or the prompt around it, and the folded reference, if any, of a row without an id."""
    question = next((row[name] for name in QUESTION_FIELDS if isinstance(row.get(name), str)), None)
    if question is None:
        raise InputError(lacks_field(location, row, "id", ID_FIELDS))
    references = [*REFERENCE_FIELDS, *(["answer"] if sum(name in row for name in ANSWER_FIELDS) > 1 else [])]
    reference = next((row[name] for name in references if isinstance(row.get(name), str | int | float)), None)
    return folded_text(question), None if reference is None else folded_text(reference)


def ids_by_content(
    file: Path, rows: Sequence[tuple[str, Mapping[str, Any]]], split: Sequence[Mapping[str, Any]], reading: Reading
) -> list[str]:
    """Find the id of each row of a file without ids by its question and reference.

    If all rows have the questions and references of the split in the split's order, starting at its first row, they
    get the split's ids in order. Otherwise each row gets the id of the question with its text and reference. If
    several images share both, the rows get their ids in order. No mean over all questions depends on this, but
    intervals, categories and paired comparisons do, so at most the share `MOST_AMBIGUOUS` of the rows may be such.

    Returns:
        One id per row.

    Raises:
        InputError: A row has no question, the split does not have its question, or too many rows are ambiguous.
    """
    keys = [question_and_reference(location, row) for location, row in rows]
    with_reference = all(reference is not None for _, reference in keys)
    keys = keys if with_reference else [(question, None) for question, _ in keys]
    asked = [(folded_text(row["question"]), folded_text(row["reference"]) if with_reference else None) for row in split]
    by = "question and reference" if with_reference else "question"
    if _has_order_of_split([row for _, row in rows], keys, asked):
        log.warning("%s: it has no ids; its rows have the split's order, by %s.", file, by)
        return [row["id"] for row in split[: len(keys)]]
    waiting: dict[ContentKey, list[str]] = defaultdict(list)  # the ids that no row has got yet
    for key, row in zip(asked, split, strict=True):
        waiting[key].append(row["id"])
    ambiguous = {key for key, names in waiting.items() if len(names) > 1}
    _refuse_several_references([location for location, _ in rows], keys, waiting, split)
    count = sum(key in ambiguous for key in keys)
    if count > MOST_AMBIGUOUS * len(keys):
        raise InputError(
            f"{file}: no ids, and {count} of {len(keys)} rows have the same question and reference as rows about "
            "other images, in another order than the prepared split's. Keep the order in which the questions were "
            "asked, pass --id-field with the field of the ids, or prepare the copy of the data set that was asked."
        )
    ids = _assigned_ids([location for location, _ in rows], keys, waiting, reading)
    shared = "both" if with_reference else "it"
    log.warning(
        "%s: it has no ids; its rows are identified by %s.%s",
        *(file, by),
        f" {count} of {len(keys)} rows share {shared} with a row about another image; they are assigned in order, "
        "which does not change any mean over all questions."
        if count
        else "",
    )
    return ids


def _has_order_of_split(
    rows: Sequence[Mapping[str, Any]], keys: Sequence[ContentKey], asked: Sequence[ContentKey]
) -> bool:
    """Return whether the rows are the split's first questions, in its order.

    Args:
        rows: The rows of the file.
        keys: The question and reference of each row.
        asked: The question and reference of each row of the split.
    """
    if len(keys) > len(asked):
        return False
    for row, (question, reference), (own_question, own_reference) in zip(rows, keys, asked, strict=False):
        field = next(name for name in QUESTION_FIELDS if isinstance(row.get(name), str))
        has_question = question == own_question or (field in PROMPT_FIELDS and own_question in question)
        if reference != own_reference or not has_question:
            return False
    return True


def _refuse_several_references(
    locations: Sequence[str],
    keys: Sequence[ContentKey],
    ids: Mapping[ContentKey, Sequence[str]],
    split: Sequence[Mapping[str, Any]],
) -> None:
    """Raise InputError for a row without a reference whose question has different references in the split."""
    references = {row["id"]: (folded_text(row["reference"]), row["kind"]) for row in split}
    for location, key in zip(locations, keys, strict=True):
        if len({references[name] for name in ids.get(key, ())}) > 1:
            raise InputError(
                f"{location}: no id and no reference, and it asks {key[0][:80]!r}, which several images of the "
                "prepared split are asked with different references, in another order than the split's. Add the ids or "
                "the references, or keep the order in which they were asked."
            )


def _assigned_ids(
    locations: Sequence[str], keys: Sequence[ContentKey], waiting: Mapping[ContentKey, list[str]], reading: Reading
) -> list[str]:
    """Return the id of each row, taking the ids of equal questions in the split's order out of `waiting`.

    Raises:
        InputError: The split does not have a row's question, or has it less often than the file.
    """
    known = set(waiting)
    ids = []
    for location, key in zip(locations, keys, strict=True):
        if waiting.get(key):
            ids.append(waiting[key].pop(0))
        elif reading.ignore_unknown:
            ids.append(f"{location}, a question of another split")
        else:
            counted = "which the prepared split does not have with this reference"
            if key in known:
                counted = "more often than the prepared split does"
            raise InputError(
                f"{location}: no id, and it asks {key[0][:80]!r}, {counted}. Prepare the copy of the data set that was "
                "asked; --ignore-unknown leaves out the rows of other splits."
            )
    return ids


# ---------------------------------------------------------------------------------------------------------------------
# Each row must match the question with its id


def fields_by_content(
    rows: Sequence[Mapping[str, Any]], split: Sequence[Mapping[str, Any]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the fields that have a row's question, and those that have its image's name.

    If a file has none of the known names, a field is taken if most of its texts are questions, or images, of the split.
    """
    questions = {folded_text(row["question"]) for row in split}
    pictures = {PurePosixPath(row["image_id"]).parts[-2:] for row in split if PurePosixPath(row["image_id"]).suffix}
    texts: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            if isinstance(held := single_item(value), str) and held.strip():
                texts[name].append(held)

    def mostly(known_names: Sequence[str], is_one: Callable[[str], bool]) -> tuple[str, ...]:
        others = [name for name, held in texts.items() if 2 * sum(map(is_one, held)) > len(held)]
        return tuple(known_names) if texts.keys() & set(known_names) else (*known_names, *others)

    return (
        mostly(QUESTION_FIELDS, lambda held: folded_text(held) in questions),
        mostly(IMAGE_FIELDS, lambda held: any(path_of(held).parts[-depth:] in pictures for depth in (1, 2))),
    )


def path_of(name: str) -> PurePosixPath:
    """Return an image's name as a path, whichever slash it was written with."""
    return PurePosixPath(name.replace("\\", "/"))


def refuse_another_question(
    location: str,
    name: str,
    row: Mapping[str, Any],
    known: Mapping[str, Any],
    reading: Reading,
    held_to: tuple[tuple[str, ...], tuple[str, ...]],
) -> None:
    """Check that a row's question, reference and image name match the question with its id.

    A prompt may have words around the question, and an image name may have folders before it. White space and letter
    case are ignored.

    Raises:
        InputError: One of them does not match.
    """
    answer_field = reading.answer_field

    def refuse(field: str, has: str) -> None:
        raise InputError(
            f"{location}: {field} of id {name} is {str(row[field])[:80]!r}, but the prepared {reading.split} split has "
            f"{has!r}. The ids seem to be of another edition or split: prepare that one, or pass the ids of this one. "
            f"If {field} holds something else, leave it out."
        )

    for name_of in held_to[0]:
        held = single_item(row.get(name_of))
        if isinstance(held, str) and held.strip() and folded_text(known["question"]) not in folded_text(held):
            refuse(name_of, known["question"])
    gold = {*REFERENCE_FIELDS, *(("answer",) if answer_field else ())} - {answer_field}
    for name_of in [name for name in (*REFERENCE_FIELDS, "answer") if name in gold]:
        held = row.get(name_of)
        if (
            isinstance(held, str | int | float)
            and str(held).strip()
            and folded_text(held) != folded_text(known["reference"])
        ):
            refuse(name_of, known["reference"])
    own = PurePosixPath(known["image_id"])
    for name_of in held_to[1]:
        held = single_item(row.get(name_of))
        if not isinstance(held, str) or not own.suffix:  # the prepared copy has no names of image files
            continue
        path = path_of(held)
        depth = min(len(path.parts), len(own.parts))
        if path.suffix and path.parts[-depth:] != own.parts[-depth:]:
            refuse(name_of, known["image_id"])


def ids_of_data_rad(task: str, names: Sequence[str | None], split: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the public VQA-RAD ids by data_RAD's ids, if every id of the file is one of data_RAD's; else nothing.

    59 of data_RAD's ids are also public ids, but of other questions, so a single id does not show which ones are meant.
    """
    if dataset_of(task) != "vqarad":
        return {}
    known = {row["id"] for row in split}
    public = {data_rad_id: public_id for data_rad_id, public_id in data_rad_ids().items() if public_id in known}
    given = {name.removeprefix("data_RAD-") for name in names if name is not None}
    if not given or not given <= public.keys():
        return {}
    if given <= known:
        log.warning(
            "%s: each of its ids is a public one of VQA-RAD and one of data_RAD's files, of another question. They are "
            "taken as public ones.",
            task,
        )
        return {}
    log.warning("%s: the ids are those of data_RAD's files; they are converted to VQA-RAD's public ids.", task)
    return {
        spelt: public_id
        for data_rad_id, public_id in public.items()
        for spelt in (data_rad_id, f"data_RAD-{data_rad_id}")
    }


def numbers_of_its_edition(
    task: str, names: Sequence[str | None], split: str, rows: Sequence[tuple[str, Mapping[str, Any]]]
) -> dict[str, str]:
    """Return the ids by row number, if the file numbers all rows of the prepared edition of PathVQA; else nothing."""
    carried = any(name in row for _, row in rows for name in CONTENT_FIELDS)
    numbers = {name for name in names if name is not None}
    prepared = read_manifest(dataset_of(task), split)
    if dataset_of(task) == "pathvqa" and not carried and not numbered_edition("pathvqa", prepared.split, numbers):
        log.warning(
            "%s: the ids are row numbers, PathVQA has two editions, and no row has a question, a reference or an image "
            "name to check. The ids are assumed to be those of the %s.",
            task,
            prepared.edition,
        )
    edition = numbered_edition(dataset_of(task), prepared.split, numbers)
    if edition is None or edition.name != prepared.edition:
        return {}
    return {number: edition.prefix + number for number in numbers}
