"""A file of answers that others wrote -> the final answer to each question, checked against the prepared split.

Such files differ in the names of their fields, in their ids, and in whether they have ids at all. A field that could
mean two things is refused. If a row has a question, a reference or an image name, it must match the question with the
row's id, because ids of another edition are often valid here too, but belong to other questions. If the file names
neither the prompt nor the images, they are called "not recorded".
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from stllava_eval.answer_layouts import rows_of
from stllava_eval.datasets import DATASETS, numbered_edition, read_manifest
from stllava_eval.errors import InputError
from stllava_eval.extract import FINAL, SIGNATURES, Final, finals, opened, unsealed, with_opened_thoughts
from stllava_eval.metrics import is_failed_request
from stllava_eval.questions import PROMPTS, text
from stllava_eval.runs import NOT_RECORDED, dataset_of, ended, open_run, prompt_of, some, split_rows

log = logging.getLogger("stllava_eval")

IDS = ("id", "question_id", "qid")
ANSWERS = (
    *("answer", "text", "model_answer", "response", "prediction", "pred", "output", "generated_text"),
    *("model_output", "model_response", "predicted_answer", "generation", "completion", "hypothesis", "predict"),
)
"""Fields in which files of answers hold what the model said."""
QUESTIONS = ("question", "query", "prompt", "input")
PROMPTED = ("prompt", "input")  # these may have words around the question; `input` is in lmms-eval's samples
REFERENCES = ("reference", "gt_ans", "gt_answer", "ground_truth", "gold", "target", "label", "labels")
PICTURES = ("image_name", "img_name", "image")
IMAGE_MARK = "<image>"  # which the LLaVA family writes into its prompts
LANGUAGES = ("q_lang", "lang")  # SLAKE's own field, and MedEvalKit's
# Largest share of rows in a file without ids that several questions fit (our choice). VQA-RAD's hub copy has 26 such
# rows of 451, and SLAKE 751 of 1,061.
INDISTINCT = 0.1


@dataclass(frozen=True)
class AnswerFile:
    """What a file of answers holds for one task."""

    replies: dict[str, tuple[Final, ...]]
    """The final answers of each question's replies by question id, in the order in which they were sampled."""
    settings: dict[str, Any]
    """`extract`, `images`, and each other setting of `runs.DECIDING` that is known."""
    prompt: str = NOT_RECORDED
    """The preset of `questions.PROMPTS` that was asked, `custom` with a hash, or `NOT_RECORDED`."""
    texts: dict[str, str] = field(default_factory=dict)
    """What the model was asked, by question id; empty if it is not recorded."""
    left_out: int = 0
    """Number of rows that were ignored because the split does not have their questions."""

    @property
    def answers(self) -> dict[str, str]:
        """Return the final answer of each question's first reply, by question id."""
        return {name: of[0].answer for name, of in self.replies.items()}


@dataclass(frozen=True)
class Reading:
    """What the user says about a file of answers: the options of `stllava-eval score`."""

    extract: str | None = None
    """The rule that extracts the final answer from each reply. None keeps the answers of a run folder and applies
    `final` to all other rows."""
    answer_field: str | None = None
    """The field with the model's answer; None finds it, if only one field can be meant."""
    id_field: str | None = None
    """The field with the question's id; None finds it."""
    ignore_unknown: bool = False
    """Whether to leave out rows whose question the split does not have, as in files that hold more than one split."""
    split: str = "test"
    """The prepared split that was asked."""
    prompt: str | None = None
    """The preset of `questions.PROMPTS` that was asked, if neither the file nor the task's name says it."""
    images: str | None = None
    """The images that were shown (own, other, black), if the file does not say it."""


@dataclass(frozen=True)
class _Said:
    """The reply in one row of a file of answers, and what the row says about it."""

    reply: str
    asked: str | None = None
    """The text that the model was asked; None if the row does not have it."""
    ended: bool | None = None
    """Whether the reply ended by itself; None if the row does not say."""
    final: Final | None = None
    """The final answer, if the row is of a run folder."""
    extract: str = ""
    """The signature of the rule that extracted it."""
    ours: bool = False
    """Whether the row is of a run folder or of lmms-eval, where opened thoughts are marked already."""


def read_answers(file: Path, task: str, reading: Reading = Reading()) -> AnswerFile:
    """Read the final answers in a file: JSON lines, a JSON array, CSV, TSV, Parquet or an Excel sheet.

    A row is ours (`id`, `answer`; in a run folder also `reply`), of the LLaVA family (`question_id`, `text`), of
    lmms-eval's samples of our tasks, or has its answer in one of the fields `ANSWERS`. Rows of another task are left
    out. A file without ids, such as those of MedEvalKit and VLMEvalKit, is read by its questions and references.

    Args:
        file: The file.
        task: The task that was answered. If its name contains a prompt (`vqarad_short`), this is what was asked.
        reading: What the user says about the file.

    Raises:
        InputError: The file cannot be read or is empty, a row has no id or no answer or several fields that may be
            its answer, an id appears twice, a row is about another question than its id, the answers were extracted
            by different rules, or `reading` contradicts the file about the prompt or the images.
    """
    split = split_rows(dataset_of(task), reading.split)
    known = {row["id"]: row for row in split}
    rows = _rows_of_task(file, task)
    has_ids = reading.id_field or any("doc_id" in row or _id(row, None) is not None for _, row in rows)
    if has_ids:
        given = [_id(row, reading.id_field) for _, row in rows]
        renamed = _data_rad_ids(task, given, split) or _numbers_of_its_edition(task, given, reading.split, rows)
        named = [_id_and_reply(place, row, split, known, reading) for place, row in rows]
        named = [(renamed.get(name, name), said) for name, said in named]
    else:
        ids = _ids_by_content(file, rows, split, reading)
        named = [
            (name, _reply(place, row, name, known, reading, ids=False))
            for name, (place, row) in zip(ids, rows, strict=True)
        ]
    found: dict[tuple[str, int], _Said] = {}
    repeated, left_out = [], 0
    for (place, row), (name, said) in zip(rows, named, strict=True):
        if reading.ignore_unknown and name not in known:
            left_out += 1
            continue
        if name in known:
            _refuse_another_question(place, name, row, known[name], reading.answer_field, reading.split)
        draw = row.get("draw", 0)
        draw = int(draw) if isinstance(draw, str) and draw.isdecimal() else draw
        if type(draw) is not int or draw < 0:
            raise InputError(f"{place}: draw {draw!r}. It must be the number of a sampled reply: 0, 1, ...")
        if (name, draw) in found:
            repeated.append(name)
        found[name, draw] = said
    if repeated:
        raise InputError(
            f"{file}: {len(repeated)} ids appear twice ({some(repeated)}). Keep one answer for each question."
        )
    if not found:
        raise InputError(f"{file}: none of its {left_out} ids is an id of {task}, for example {split[0]['id']}.")
    read = _with_prompt(file, task, _answer_file(file, task, found, known, reading), found, known, reading.prompt)
    _warn_of_references(file, read, known)
    return replace(read, left_out=left_out)


def _rows_of_task(file: Path, task: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows about the task, without those of our other tasks and of SLAKE's Chinese half.

    Raises:
        InputError: No row is left.
    """
    every = rows_of(file)
    rows = [
        (place, row)
        for place, row in every
        if (named := str(row.get("task", task))) == task or dataset_of(named) not in DATASETS
    ]
    if dataset_of(task) == "slake":  # our SLAKE is the English half, as in the papers
        spoken = [next((str(row[name]) for name in LANGUAGES if row.get(name)), "en") for _, row in rows]
        rows = [row for row, language in zip(rows, spoken, strict=True) if language.lower() == "en"]
        if other := len(spoken) - len(rows):
            log.warning("%s: %d rows in languages other than English are left out.", file, other)
    if not rows:
        said = sorted({str(row["task"]) for _, row in every if "task" in row})
        hint = f" Its rows are about {some(said)}." if said else ""
        raise InputError(f"{file}: no answers to {task}.{hint} Each row needs an id and an answer.")
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Fields


def _id(row: Mapping[str, Any], id_field: str | None) -> str | None:
    """Return a row's id as a text, or None; pandas turns whole numbers into floats, so 12.0 becomes "12"."""
    names = (id_field,) if id_field else IDS
    value = next((row[name] for name in names if row.get(name) not in (None, "")), None)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = None if value is None or isinstance(value, dict | list) else str(value).strip()
    return text[:-2] if text and text.endswith(".0") and text[:-2].isdecimal() else text


def _id_and_reply(
    place: str,
    row: Mapping[str, Any],
    split: Sequence[Mapping[str, Any]],
    known: Mapping[str, Mapping[str, Any]],
    reading: Reading,
) -> tuple[str, _Said]:
    """Return a row's id and reply.

    Raises:
        InputError: The row has no id or no reply, or several fields that may be its answer.
    """
    if "doc_id" in row and not reading.answer_field:
        return _sample(place, row, split)
    name = _id(row, reading.id_field)
    if name is None:
        raise InputError(_lacks(place, row, "id", (reading.id_field,) if reading.id_field else IDS))
    return name, _reply(place, row, name, known, reading)


def _reply(
    place: str,
    row: Mapping[str, Any],
    name: str,
    known: Mapping[str, Mapping[str, Any]],
    reading: Reading,
    ids: bool = True,
) -> _Said:
    """Return what a row says that the model replied to the question with id `name`.

    Args:
        place: The row's place in the file, for messages.
        row: Its fields.
        name: The id of its question.
        known: The split's rows by id.
        reading: What the user says about the file.
        ids: Whether the file has ids.

    Raises:
        InputError: The row has no reply, or several fields that may be its reply.
    """
    answer_field = reading.answer_field
    if "reply" in row and "extract" in row and not answer_field:  # a run folder's
        if not all(isinstance(row[key], str) for key in ("reply", "answer", "extract")):
            raise InputError(
                f"{place}: no answer. A line of a run folder has reply, answer and extract, and each is a text."
            )
        forms, was_cut = row.get("forms", []), row.get("cut", False)
        if not isinstance(forms, list) or not isinstance(was_cut, bool):
            raise InputError(
                f"{place}: forms {forms!r} or cut {was_cut!r} is not what a run writes. Copy the line from the run."
            )
        final = Final(row["answer"], was_cut, tuple(map(str, forms)), row["reply"])
        asked = row["text"] if isinstance(row.get("text"), str) else None
        return _Said(row["reply"], asked, ended(row), final, row["extract"], ours=True)
    question = str(known[name]["question"]) if name in known else ""
    chosen = answer_field or _answer_field(place, row, question, ids)
    if not isinstance(row.get(chosen), str):
        raise InputError(_lacks(place, row, "answer", (answer_field,) if answer_field else ANSWERS))
    asked = next((row[key] for key in ("prompt", "text") if key != chosen and isinstance(row.get(key), str)), None)
    return _Said(row[chosen], asked if asked and _folded(question) in _folded(asked) else None, ended(row))


def _sample(place: str, row: Mapping[str, Any], split: Sequence[Mapping[str, Any]]) -> tuple[str, _Said]:
    """Return the id and the reply of one of lmms-eval's samples; its id is in each score's record.

    Without such a record, the split's row with the number `doc_id` is meant.

    Raises:
        InputError: It has no id or no reply.
    """
    records = [value for value in row.values() if isinstance(value, dict) and "image_id" in value and "id" in value]
    ids = [record["id"] for record in records if isinstance(record["id"], str)]
    number = row["doc_id"]
    fallback = split[number]["id"] if type(number) is int and 0 <= number < len(split) else None
    reply = row.get("filtered_resps", row.get("resps"))
    while isinstance(reply, list) and reply:
        reply = reply[0]
    name = ids[0] if ids else fallback
    if name is None or not isinstance(reply, str):
        raise InputError(f"{place}: no {'answer' if name else 'id'}. Pass the samples that lmms-eval wrote.")
    asked = row.get("input")
    return name, _Said(reply, asked if isinstance(asked, str) and asked else None, ours=True)


def _answer_field(place: str, row: Mapping[str, Any], question: str, ids: bool) -> str:
    """Return the name of the one field that may hold the model's answer.

    In a file without ids, `answer` beside another such field is the reference, by which the row's id was found.

    Raises:
        InputError: Several fields may hold it.
    """
    held = [name for name in ANSWERS if name in row]
    if not ids and len(held) > 1 and "answer" in held:
        held.remove("answer")
    if {"text", "answer"} <= row.keys() and question and _folded(question) in _folded(row["text"]):
        held.remove("text")  # it is what was asked, as in a line of an older run folder
    if len(held) > 1:
        raise InputError(
            f"{place}: {' and '.join(held)} could each be the model's answer, and one of them may be the reference. "
            "Pass --answer-field with the name of the field that has the model's answer."
        )
    return held[0] if held else "answer"


def _lacks(place: str, row: Mapping[str, Any], what: str, names: Sequence[str]) -> str:
    """Say that a row has no id or no answer (`what`), where it is read from (`names`), and what the row has instead."""
    seen = ", ".join(map(str, list(row)[:12]))
    kind = "a text or a number" if what == "id" else "a text"
    return (
        f"{place}: no {what}. It must be {kind} in {'the field' if len(names) == 1 else 'one of the fields'} "
        f"{', '.join(names)}; this row has the fields {seen}. Pass --{what}-field with the right name."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Files without ids


def _folded(text: object) -> str:
    """Return a text in lower case with single spaces and none before a mark; copies of a data set differ in these."""
    return re.sub(r" (?=[?.,;:!])", "", " ".join(str(text).lower().split()))


def _asked_and_reference(place: str, row: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the folded question, or the prompt around it, and the folded reference, if any, of a row without an id."""
    question = next((row[name] for name in QUESTIONS if isinstance(row.get(name), str)), None)
    if question is None:
        raise InputError(_lacks(place, row, "id", IDS))
    references = [*REFERENCES, *(["answer"] if sum(name in row for name in ANSWERS) > 1 else [])]
    reference = next((row[name] for name in references if isinstance(row.get(name), str | int | float)), None)
    return _folded(question), None if reference is None else _folded(reference)


def _ids_by_content(
    file: Path, rows: Sequence[tuple[str, Mapping[str, Any]]], split: Sequence[Mapping[str, Any]], reading: Reading
) -> list[str]:
    """Find the id of each row of a file without ids by its question and reference.

    If all rows have the questions and references of the split in the split's order, starting at its first row, they
    get the split's ids in order. Otherwise each row gets the id of the question with its text and reference. If
    several images share both, the rows get their ids in order. No mean over all questions depends on this, but
    intervals, categories and paired comparisons do, so at most the share `INDISTINCT` of the rows may be such.

    Returns:
        One id per row.

    Raises:
        InputError: A row has no question, the split does not have its question, or too many rows are ambiguous.
    """
    keys = [_asked_and_reference(place, row) for place, row in rows]
    with_reference = all(reference is not None for _, reference in keys)
    keys = keys if with_reference else [(question, None) for question, _ in keys]
    asked = [(_folded(row["question"]), _folded(row["reference"]) if with_reference else None) for row in split]
    whole = [next(name for name in QUESTIONS if isinstance(row.get(name), str)) not in PROMPTED for _, row in rows]
    if len(keys) <= len(asked) and all(
        reference == own[1] and (question == own[0] or (not alone and own[0] in question))
        for (question, reference), own, alone in zip(keys, asked, whole, strict=False)
    ):
        log.warning(
            "%s: it has no ids; its questions and references are those of the split, in the split's order.", file
        )
        return [row["id"] for row in split[: len(keys)]]
    waiting: dict[tuple[str, str | None], list[str]] = defaultdict(list)
    for key, row in zip(asked, split, strict=True):
        waiting[key].append(row["id"])
    several = {key for key, names in waiting.items() if len(names) > 1}
    indistinct = sum(key in several for key in keys)
    if indistinct > INDISTINCT * len(keys):
        raise InputError(
            f"{file}: no ids, and {indistinct} of {len(keys)} rows have the same question and reference as rows about "
            "other images, in another order than the prepared split's. Keep the order in which the questions were "
            "asked, pass --id-field with the field of the ids, or prepare the copy of the data set that was asked."
        )
    found = []
    for (place, _), key in zip(rows, keys, strict=True):
        if waiting[key]:
            found.append(waiting[key].pop(0))
        elif reading.ignore_unknown:
            found.append(f"{place}, a question of another split")
        else:
            counted = (
                "more often than the prepared split does"
                if key in several or key in asked
                else ("which the prepared split does not have with this reference")
            )
            raise InputError(
                f"{place}: no id, and it asks {key[0][:80]!r}, {counted}. Prepare the copy of the data set that was "
                "asked; --ignore-unknown leaves out the rows of other splits."
            )
    log.warning(
        "%s: it has no ids; its rows are identified by question and reference.%s",
        file,
        f" {indistinct} of {len(keys)} rows share both with a row about another image; they are assigned in order, "
        "which does not change any mean over all questions."
        if indistinct
        else "",
    )
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Each row must match the question with its id


def _refuse_another_question(
    place: str, name: str, row: Mapping[str, Any], known: Mapping[str, Any], answer_field: str | None, split: str
) -> None:
    """Check that a row's question, reference and image name match the question with its id.

    A prompt may have words around the question, and an image name may have folders before it. White space and letter
    case are ignored.

    Raises:
        InputError: One of them does not match.
    """

    def refuse(field: str, has: str) -> None:
        raise InputError(
            f"{place}: {field} of id {name} is {str(row[field])[:80]!r}, but the prepared {split} split has {has!r}. "
            "The ids seem to be of another edition or split: prepare that one, or pass the ids of this one."
        )

    for name_of in QUESTIONS:
        held = row.get(name_of)
        if isinstance(held, str) and held.strip() and _folded(known["question"]) not in _folded(held):
            refuse(name_of, known["question"])
    gold = (*REFERENCES, "answer") if answer_field not in (None, "answer") else REFERENCES
    for name_of in gold:
        held = row.get(name_of)
        if isinstance(held, str | int | float) and _folded(held) != _folded(known["reference"]):
            refuse(name_of, known["reference"])
    own = PurePosixPath(known["image_id"])
    for name_of in PICTURES:
        held = row.get(name_of)
        if not isinstance(held, str) or not own.suffix:  # the prepared copy has no names of image files
            continue
        path = PurePosixPath(held.replace("\\", "/"))
        depth = min(len(path.parts), len(own.parts))
        if path.suffix and path.parts[-depth:] != own.parts[-depth:]:
            refuse(name_of, known["image_id"])


def _data_rad_ids(task: str, names: Sequence[str | None], split: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the public VQA-RAD ids by data_RAD's ids, if every id of the file is one of data_RAD's; else nothing.

    59 of data_RAD's ids are also public ids, but of other questions, so a single id does not show which ones are meant.
    """
    if dataset_of(task) != "vqarad":
        return {}
    from stllava_eval.datasets import data_rad_ids

    known = {row["id"] for row in split}
    public = {theirs: ours for theirs, ours in data_rad_ids().items() if ours in known}
    given = {name.removeprefix("data_RAD-") for name in names if name is not None}
    if not given or not given <= public.keys() or given <= known:
        return {}
    log.warning("%s: the ids are those of data_RAD's files; they are converted to VQA-RAD's public ids.", task)
    return {spelt: ours for theirs, ours in public.items() for spelt in (theirs, f"data_RAD-{theirs}")}


def _numbers_of_its_edition(
    task: str, names: Sequence[str | None], split: str, rows: Sequence[tuple[str, Mapping[str, Any]]]
) -> dict[str, str]:
    """Return the ids by row number, if the file numbers all rows of the prepared edition of PathVQA; else nothing."""
    carried = any(name in row for _, row in rows for name in (*QUESTIONS, *REFERENCES, *PICTURES))
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


def _warn_of_references(file: Path, read: AnswerFile, known: Mapping[str, Mapping[str, Any]]) -> None:
    """Warn if every answer equals its reference: the references may have been read instead of the answers."""
    answers = {name: answer for name, answer in read.answers.items() if name in known}
    if len(answers) > 1 and all(_folded(said) == _folded(known[name]["reference"]) for name, said in answers.items()):
        log.warning(
            "%s: every answer equals its reference. If the file has the model's answers in another field, pass "
            "--answer-field.",
            file,
        )


def _answer_file(
    file: Path,
    task: str,
    found: Mapping[tuple[str, int], _Said],
    known: Mapping[str, Mapping[str, Any]],
    reading: Reading,
) -> AnswerFile:
    """Extract the final answer of each row, and collect the settings that are known.

    Raises:
        InputError: The answers were extracted by different rules, or `reading` contradicts the run about the images.
    """
    extract = reading.extract
    rules = {said.extract or SIGNATURES[FINAL] for said in found.values()}
    if extract is None and len(rules) > 1:
        raise InputError(
            f"{file}: its answers were extracted from the replies by different rules ({', '.join(sorted(rules))}). "
            "Pass --extract with the rule to apply to all of them."
        )
    foreign = [key for key, said in found.items() if not said.ours and not is_failed_request(said.reply)]
    marked = with_opened_thoughts([found[key].reply for key in foreign], [found[key].ended for key in foreign])
    replies = {key: said.reply for key, said in found.items()} | dict(zip(foreign, marked, strict=True))
    by_id: dict[str, dict[int, Final]] = defaultdict(dict)
    for (name, draw), said in found.items():
        asked = said.asked if said.asked is not None else str(known[name]["question"]) if name in known else ""
        if extract is None:
            held = [said.final] if said.final is not None else opened(replies[name, draw], asked)
        else:
            held = finals(unsealed(replies[name, draw]), asked, extract)
        by_id[name].update(enumerate(held, draw))
    settings: dict[str, Any] = {"images": NOT_RECORDED}
    prompt = NOT_RECORDED
    if file.name == "answers.jsonl" and all(said.ours for said in found.values()):
        with suppress(InputError):  # it may be a copy outside its run folder
            of_task = open_run(file.parent).tasks.get(task)
            if of_task is not None:
                settings, prompt = settings | of_task.settings, of_task.prompt
    if reading.images is not None:
        if settings["images"] not in (NOT_RECORDED, reading.images):
            raise InputError(
                f"{file}: --images {reading.images}, but its run was shown {settings['images']} images. Leave the "
                "option out."
            )
        settings["images"] = reading.images
    settings = {**settings, "extract": SIGNATURES[extract] if extract else rules.pop()}
    return AnswerFile({name: tuple(of[draw] for draw in sorted(of)) for name, of in by_id.items()}, settings, prompt)


def _with_prompt(
    file: Path,
    task: str,
    read: AnswerFile,
    found: Mapping[tuple[str, int], _Said],
    known: Mapping[str, Mapping[str, Any]],
    given: str | None,
) -> AnswerFile:
    """Return the file with the prompt that was asked: from its rows, else from the task's name or --prompt (`given`).

    Raises:
        InputError: The two contradict each other.
    """
    of_task = next((preset for preset in PROMPTS if task == f"{dataset_of(task)}_{preset}"), None)
    preset = of_task or given
    asked = {name: said.asked for (name, _), said in found.items() if name in known}
    texts: dict[str, str] = {}
    if asked and all(held is not None for held in asked.values()):
        texts = {name: str(held).replace(IMAGE_MARK, "").strip() for name, held in asked.items()}
        texts = _spelt(texts, known)
    said = prompt_of(task, [{**known[name], "task": task, "text": held} for name, held in texts.items()])
    if read.prompt != NOT_RECORDED:  # of a run folder
        said = read.prompt
    if preset is not None:
        if said not in (NOT_RECORDED, preset):
            what = f"--task {task}" if of_task else f"--prompt {preset}"
            raise InputError(f"{file}: {what}, but its rows show that the prompt was {said}. Name that one.")
        said = preset
        texts = texts or {name: text(row, {"prompt": preset}) for name, row in known.items()}
    return replace(read, prompt=said, texts=texts)


def _spelt(texts: Mapping[str, str], known: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the texts in the spelling of the first preset that they equal up to white space; else unchanged."""
    for preset in PROMPTS:
        own = {name: text(known[name], {"prompt": preset}) for name in texts}
        if all(own[name].split() == held.split() for name, held in texts.items()):
            return own
    return dict(texts)
