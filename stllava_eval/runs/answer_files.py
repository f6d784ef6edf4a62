"""Read files of answers that other programs wrote, and check each answer against the prepared split's questions.

Such files differ in the names of their fields, in their ids, and in whether they have ids at all. A field that could
mean two things is refused. If a row has a question, a reference or an image name, it must match the question with the
row's id, because ids of another edition are often valid here too, but belong to other questions. If the file names
neither the prompt nor the images, they are called "not recorded".
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stllava_eval.data.catalog import DATASETS
from stllava_eval.data.prompts import PROMPTS, text
from stllava_eval.errors import InputError
from stllava_eval.runs.answer_fields import (
    ANSWER_FIELDS,
    CONTENT_FIELDS,
    END_TOKEN,
    EQUAL_TO_REFERENCES,
    ID_FIELDS,
    IMAGE_MARK,
    LANGUAGE_FIELDS,
    NO_ANSWERS,
    REFERENCE_FIELDS,
    Reading,
    log,
)
from stllava_eval.runs.answer_ids import (
    RecordedReply,
    fields_by_content,
    folded_text,
    ids_by_content,
    ids_of_data_rad,
    lacks_field,
    numbers_of_its_edition,
    refuse_another_question,
)
from stllava_eval.runs.answer_layouts import asked_in, rows_of, single_item
from stllava_eval.runs.folder import (
    NOT_ASKED,
    answer_row,
    ended_by_itself,
    open_run,
    prompt_of,
    refuse_old_folder,
    write_run,
)
from stllava_eval.runs.scores import DECIDING, NOT_RECORDED, dataset_of, first_ids, split_rows
from stllava_eval.scoring.final_answer import (
    FINAL,
    NONE,
    SIGNATURES,
    FinalAnswer,
    final_answer,
    final_answers,
    is_failed_request,
    unpack_final_answers,
    unpack_replies,
    with_opened_thoughts,
)
from stllava_eval.storage import hold, read_bytes

BY_THE_FILE = Reading()  # nothing is said beside the file: its own fields decide


@dataclass(frozen=True)
class AnswerFile:
    """What a file of answers holds for one task."""

    replies: dict[str, tuple[FinalAnswer, ...]]
    """The final answers of each question's replies by question id, in the order in which they were sampled."""
    settings: dict[str, Any]
    """`extract`, `images`, and each other setting of `runs.scores.DECIDING` that is known."""
    prompt: str = NOT_RECORDED
    """The preset of `data.prompts.PROMPTS` that was asked, `custom` with a hash, or `NOT_RECORDED`."""
    texts: dict[str, str] = field(default_factory=dict)
    """What the model was asked, by question id; empty if it is not recorded."""
    skipped: int = 0
    """Number of rows that were ignored because the split does not have their questions."""

    @property
    def answers(self) -> dict[str, str]:
        """Return the final answer of each question's first reply, by question id."""
        return {name: finals[0].answer for name, finals in self.replies.items()}


def read_answers(file: Path, task: str, reading: Reading = BY_THE_FILE) -> AnswerFile:
    """Read the final answers in a file: JSON lines, a JSON array, CSV, TSV, Parquet or an Excel sheet.

    A row is ours (`id`, `answer`; in a run folder also `reply`), of the LLaVA family (`question_id`, `text`), of
    lmms-eval's samples of our tasks, or has its answer in one of the fields `ANSWER_FIELDS`. Rows of another task
    are left out. A file without ids, such as those of MedEvalKit and VLMEvalKit, is read by its questions and
    references.

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
    rows = [(location, _unfolded(row, reading)) for location, row in _rows_of_task(file, task)]
    has_ids = bool(reading.id_field) or any("doc_id" in row or _id(row, None) is not None for _, row in rows)
    identified = (_by_id if has_ids else _by_content)(file, task, rows, split, reading)
    replies, skipped = _replies_by_sample(file, rows, identified, split, reading)
    if not replies:
        raise InputError(f"{file}: none of its {skipped} ids is an id of {task}, for example {split[0]['id']}.")
    answers = _with_prompt(
        file, task, _answer_file(file, task, replies, known, reading), replies, known, reading.prompt
    )
    _warn_of_references(file, answers, known)
    _warn_of_no_answers(file, replies, known)
    _warn_of_other_text(file, replies, known)
    if skipped and has_ids and not any(name in row for _, row in rows for name in CONTENT_FIELDS):
        log.warning(
            "%s: %d of its %d ids are not %s's, and no row has a question, a reference or an image to hold the others "
            "to: row numbers and ids of another edition are ids of this one, too.",
            *(file, skipped, len(rows), task),
        )
    return replace(answers, skipped=skipped)


LocatedRows = Sequence[tuple[str, Mapping[str, Any]]]
"""The rows of a file, each with its location in the file for messages."""


def _by_id(
    file: Path, task: str, rows: LocatedRows, split: Sequence[Mapping[str, Any]], reading: Reading
) -> list[tuple[str, RecordedReply]]:
    """Return the question id and the reply of each row of a file with ids, converted to the ids of the split."""
    known = {row["id"]: row for row in split}
    ids = [_id(row, reading.id_field) for _, row in rows]
    renamed = ids_of_data_rad(task, ids, split) or numbers_of_its_edition(task, ids, reading.split, rows)
    identified = [_id_and_reply(location, row, split, known, reading) for location, row in rows]
    return [(renamed.get(name, name), reply) for name, reply in identified]


def _by_content(
    file: Path, task: str, rows: LocatedRows, split: Sequence[Mapping[str, Any]], reading: Reading
) -> list[tuple[str, RecordedReply]]:
    """Return the question id and the reply of each row of a file without ids, by its question and reference."""
    known = {row["id"]: row for row in split}
    ids = ids_by_content(file, rows, split, reading)
    return [
        (name, _reply(location, row, name, known, reading, ids=False))
        for name, (location, row) in zip(ids, rows, strict=True)
    ]


def _replies_by_sample(
    file: Path,
    rows: LocatedRows,
    identified: Sequence[tuple[str, RecordedReply]],
    split: Sequence[Mapping[str, Any]],
    reading: Reading,
) -> tuple[dict[tuple[str, int], RecordedReply], int]:
    """Return the replies by question id and number of the sampled reply, and how many rows were skipped.

    Raises:
        InputError: A row is about another question than its id, or two rows are about one reply.
    """
    known = {row["id"]: row for row in split}
    checked_fields = fields_by_content([row for _, row in rows], split)
    replies: dict[tuple[str, int], RecordedReply] = {}
    repeated, skipped = [], 0
    for (location, row), (name, reply) in zip(rows, identified, strict=True):
        if reading.ignore_unknown and name not in known:
            skipped += 1
            continue
        if name in known:
            refuse_another_question(location, name, row, known[name], reading, checked_fields)
        draw = row.get("draw", 0)
        draw = int(draw) if isinstance(draw, str) and draw.isdecimal() else draw  # a CSV has texts only
        if type(draw) is not int or draw < 0:
            raise InputError(f"{location}: draw {draw!r}. It must be the number of a sampled reply: 0, 1, ...")
        if (name, draw) in replies:
            repeated.append(name)
        replies[name, draw] = reply
    if repeated:
        raise InputError(
            f"{file}: {len(repeated)} ids appear twice ({first_ids(repeated)}). Keep one answer for each question."
        )
    return replies, skipped


def _rows_of_task(file: Path, task: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows about the task, without those of our other tasks and of SLAKE's Chinese half.

    Raises:
        InputError: No row is left.
    """
    every = rows_of(file)
    rows = [
        (location, row)
        for location, row in every
        if (named := str(row.get("task", task))) == task or dataset_of(named) not in DATASETS
    ]
    if dataset_of(task) == "slake":  # our SLAKE is the English half, as in the papers
        spoken = [next((str(row[name]) for name in LANGUAGE_FIELDS if row.get(name)), "en") for _, row in rows]
        rows = [row for row, language in zip(rows, spoken, strict=True) if language.lower() == "en"]
        if other := len(spoken) - len(rows):
            log.warning("%s: %d rows in languages other than English are left out.", file, other)
    if not rows:
        said = sorted({str(row["task"]) for _, row in every if "task" in row})
        hint = f" Its rows are about {first_ids(said)}." if said else ""
        raise InputError(f"{file}: no answers to {task}.{hint} Each row needs an id and an answer.")
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Fields


def _unfolded(row: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
    """Return a row with the fields about its question under our names: in lower case, and not nested.

    lmms-eval's older samples have the row of the data set in `doc`; ms-swift's and LLaVA's rows hold what was asked in
    a conversation. Names of answers are left alone: an `Answer` beside a model's is a reference.
    """
    fields = {name: single_item(value) if name in CONTENT_FIELDS else value for name, value in row.items()}
    spelt = {name.lower(): name for name in row if name not in (reading.answer_field, reading.id_field)}
    for name in (*ID_FIELDS, *CONTENT_FIELDS, *LANGUAGE_FIELDS):
        if name not in row and name in spelt:
            fields[name] = single_item(row[spelt[name]])
    doc = row.get("doc")
    if isinstance(doc, dict):
        held = {name: single_item(doc[name]) for name in CONTENT_FIELDS if name in doc}
        held |= (
            {"reference": single_item(doc["answer"])}
            if "answer" in doc and not held.keys() & set(REFERENCE_FIELDS)
            else {}
        )
        fields = held | fields
    asked = asked_in(row)
    return fields if asked is None else {"prompt": asked} | fields


def _id(row: Mapping[str, Any], id_field: str | None) -> str | None:
    """Return a row's id as a text, or None; pandas turns whole numbers into floats, so 12.0 becomes "12"."""
    names = (id_field,) if id_field else ID_FIELDS
    value = next((row[name] for name in names if row.get(name) not in (None, "")), None)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = None if value is None or isinstance(value, dict | list) else str(value).strip()
    return text[:-2] if text and text.endswith(".0") and text[:-2].isdecimal() else text


def _id_and_reply(
    location: str,
    row: Mapping[str, Any],
    split: Sequence[Mapping[str, Any]],
    known: Mapping[str, Mapping[str, Any]],
    reading: Reading,
) -> tuple[str, RecordedReply]:
    """Return a row's id and reply.

    Raises:
        InputError: The row has no id or no reply, or several fields that may be its answer.
    """
    if "doc_id" in row and not reading.answer_field:
        return _sample(location, row, split)
    name = _id(row, reading.id_field)
    if name is None:
        raise InputError(lacks_field(location, row, "id", (reading.id_field,) if reading.id_field else ID_FIELDS))
    return name, _reply(location, row, name, known, reading)


def _reply(
    location: str,
    row: Mapping[str, Any],
    name: str,
    known: Mapping[str, Mapping[str, Any]],
    reading: Reading,
    ids: bool = True,
) -> RecordedReply:
    """Return what a row says that the model replied to the question with id `name`.

    Args:
        location: The row's location in the file, for messages.
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
                f"{location}: no answer. A line of a run folder has reply, answer and extract, and each is a text."
            )
        forms, was_cut = row.get("forms", []), row.get("cut", False)
        if not isinstance(forms, list) or not isinstance(was_cut, bool):
            raise InputError(
                f"{location}: forms {forms!r} or cut {was_cut!r} is not what a run writes. Copy the line from the run."
            )
        final = FinalAnswer(row["answer"], was_cut, tuple(map(str, forms)), row["reply"])
        asked = row["text"] if isinstance(row.get("text"), str) else None
        return RecordedReply(row["reply"], asked, ended_by_itself(row), final, row["extract"], is_marked=True)
    question = str(known[name]["question"]) if name in known else ""
    chosen = answer_field or _answer_field(location, row, question, ids)
    if chosen in row and not isinstance(row[chosen], str):
        raise InputError(
            f"{location}: {chosen} is {str(row[chosen])[:80]}, and an answer is a text. Write it as one; where the "
            "model gave none, leave the row out: its question then counts as unanswered."
        )
    if chosen not in row:
        raise InputError(lacks_field(location, row, "answer", (answer_field,) if answer_field else ANSWER_FIELDS))
    asked = next((row[key] for key in ("prompt", "text") if key != chosen and isinstance(row.get(key), str)), None)
    return RecordedReply(
        row[chosen], asked if asked and folded_text(question) in folded_text(asked) else None, ended_by_itself(row)
    )


def _sample(location: str, row: Mapping[str, Any], split: Sequence[Mapping[str, Any]]) -> tuple[str, RecordedReply]:
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
    texts = [row[field] for field in CONTENT_FIELDS if isinstance(row.get(field), str)]
    if not ids and fallback and not any(text.strip() for text in texts):
        raise InputError(
            f"{location}: doc_id {number} is a row number, and neither input nor target says of which question. Pass "
            "the samples as lmms-eval wrote them."
        )
    name = ids[0] if ids else fallback
    if name is None or not isinstance(reply, str):
        raise InputError(f"{location}: no {'answer' if name else 'id'}. Pass the samples that lmms-eval wrote.")
    asked = row.get("input")
    return name, RecordedReply(reply, asked if isinstance(asked, str) and asked else None, is_marked=True)


def _answer_field(location: str, row: Mapping[str, Any], question: str, ids: bool) -> str:
    """Return the name of the one field that may hold the model's answer.

    In a file without ids, `answer` beside another such field is the reference, by which the row's id was found.

    Raises:
        InputError: Several fields may hold it.
    """
    held = [name for name in ANSWER_FIELDS if name in row]
    if not ids and len(held) > 1 and "answer" in held:
        held.remove("answer")
    if {"text", "answer"} <= row.keys() and question and folded_text(question) in folded_text(row["text"]):
        held.remove("text")  # it is what was asked, as in a line of an older run folder
    if len(held) > 1:
        raise InputError(
            f"{location}: {' and '.join(held)} could each be the model's answer, and one of them may be the reference. "
            "Pass --answer-field with the name of the field that has the model's answer."
        )
    return held[0] if held else "answer"


def _warn_of_references(file: Path, read: AnswerFile, known: Mapping[str, Mapping[str, Any]]) -> None:
    """Warn if every answer equals its reference: the references may have been read instead of the answers."""
    answers = {name: answer for name, answer in read.answers.items() if name in known}
    like = sum(folded_text(said) == folded_text(known[name]["reference"]) for name, said in answers.items())
    if len(answers) > 1 and like >= EQUAL_TO_REFERENCES * len(answers):
        many = "every answer equals its reference"
        if like < len(answers):
            many = f"{like} of {len(answers)} answers equal their references, letter for letter"
        log.warning(
            "%s: %s. If the file has the model's answers in another field, pass --answer-field.",
            *(file, many),
        )


def _warn_of_no_answers(
    file: Path, recorded: Mapping[tuple[str, int], RecordedReply], known: Mapping[str, Mapping[str, Any]]
) -> None:
    """Warn of empty answers: an empty cell of a table may be a missing answer, and is scored as the model's."""
    empty = [
        said.reply
        for (name, _), said in recorded.items()
        if said.final is None
        and said.reply.strip().lower() in NO_ANSWERS
        # SLAKE has "None" for a reference
        and not (name in known and folded_text(said.reply) == folded_text(known[name]["reference"]))
    ]
    if empty:
        spelt = first_ids(sorted({repr(reply.strip()) for reply in empty}))
        log.warning(
            "%s: %d answers are %s, which programs also write where there is none. They are scored as what the model "
            "said; leave out the rows that it gave no answer to.",
            *(file, len(empty), spelt),
        )


def _warn_of_other_text(
    file: Path, recorded: Mapping[tuple[str, int], RecordedReply], known: Mapping[str, Mapping[str, Any]]
) -> None:
    """Warn if most replies contain the prompt or a special token, whose words would be scored as the model's."""
    replies = [(said.reply, name) for (name, _), said in recorded.items() if name in known]
    repeat = sum(folded_text(known[name]["question"]) in folded_text(reply) for reply, name in replies)
    ends = sum(END_TOKEN.search(reply) is not None for reply, _ in replies)
    for many, what in ((repeat, "repeat their whole question"), (ends, "end with a special token")):
        if 2 * many > len(replies):
            log.warning(
                "%s: %d of %d answers %s, which is scored as what the model said. Pass the new text alone, decoded "
                "without special tokens.",
                *(file, many, len(replies), what),
            )


def _answer_file(
    file: Path,
    task: str,
    recorded: Mapping[tuple[str, int], RecordedReply],
    known: Mapping[str, Mapping[str, Any]],
    reading: Reading,
) -> AnswerFile:
    """Extract the final answer of each row, and collect the settings that are known.

    Raises:
        InputError: The answers were extracted by different rules, or `reading` contradicts the run about the images.
    """
    extract = reading.extract
    rules = {said.extract or SIGNATURES[FINAL] for said in recorded.values()}
    if extract is None and len(rules) > 1:
        raise InputError(
            f"{file}: its answers were extracted from the replies by different rules ({', '.join(sorted(rules))}). "
            "Pass --extract with the rule to apply to all of them."
        )
    foreign = [key for key, said in recorded.items() if not said.is_marked and not is_failed_request(said.reply)]
    marked = with_opened_thoughts([recorded[key].reply for key in foreign], [recorded[key].ended for key in foreign])
    replies = {key: said.reply for key, said in recorded.items()} | dict(zip(foreign, marked, strict=True))
    by_id: dict[str, dict[int, FinalAnswer]] = defaultdict(dict)
    for (name, draw), said in recorded.items():
        asked = said.asked if said.asked is not None else str(known[name]["question"]) if name in known else ""
        if extract is None:
            held = [said.final] if said.final is not None else unpack_final_answers(replies[name, draw], asked)
        else:
            held = final_answers(unpack_replies(replies[name, draw]), asked, extract)
        by_id[name].update(enumerate(held, draw))
    settings: dict[str, Any] = {"images": NOT_RECORDED}
    prompt = NOT_RECORDED
    if file.name == "answers.jsonl" and all(said.is_marked for said in recorded.values()):
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
    return AnswerFile(
        {name: tuple(finals[draw] for draw in sorted(finals)) for name, finals in by_id.items()}, settings, prompt
    )


def _with_prompt(
    file: Path,
    task: str,
    read: AnswerFile,
    recorded: Mapping[tuple[str, int], RecordedReply],
    known: Mapping[str, Mapping[str, Any]],
    given: str | None,
) -> AnswerFile:
    """Return the file with the prompt that was asked: from its rows, else from the task's name or --prompt (`given`).

    Raises:
        InputError: The two contradict each other.
    """
    of_task = next((preset for preset in PROMPTS if task == f"{dataset_of(task)}_{preset}"), None)
    preset = of_task or given
    asked = {name: said.asked for (name, _), said in recorded.items() if name in known}
    texts: dict[str, str] = {}
    if asked and all(held is not None for held in asked.values()):
        texts = {name: str(held).replace(IMAGE_MARK, "").strip() for name, held in asked.items()}
        texts = _spelt(texts, known)
    said = prompt_of(task, [{**known[name], "task": task, "text": held} for name, held in texts.items()])
    if read.prompt != NOT_RECORDED:  # a run folder records it
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


def write_answers(
    folder: Path, system: str | None, answers: Mapping[str, AnswerFile], files: Mapping[str, Path]
) -> Path:
    """Write a run folder of answers that were given elsewhere; its weights are the hash of the files.

    Args:
        folder: A new one.
        system: What gave the answers, which boards call its row; None takes the first file's name.
        answers: By task.
        files: By task; what they were read from.

    Raises:
        InputError: The folder holds a run already, a split is not prepared, or the files are of different images.
    """
    refuse_old_folder(folder)
    shown = {task: of_task.settings["images"] for task, of_task in answers.items()}
    if len(set(shown.values())) > 1:
        listed = ", ".join(f"{images} for {task}" for task, images in shown.items())
        raise InputError(f"{folder}: one run is of one kind of images, not of {listed}. Score them into two folders.")
    hold(folder)
    refuse_old_folder(folder)  # another process may have written it before it let go
    rows = []
    for task, of_task in answers.items():
        lacking = final_answer(f"{NOT_ASKED} {files[task].name} has no answer", rule=NONE)
        rows += [
            answer_row(task, row, of_task.texts.get(row["id"]), final, extract=of_task.settings["extract"], draw=draw)
            for row in split_rows(dataset_of(task))
            for draw, final in enumerate(of_task.replies.get(row["id"], (lacking,)))
        ]
    digest = hashlib.sha256(b"".join(read_bytes(files[task]) for task in sorted(files))).hexdigest()
    name = system or next(iter(files.values())).stem
    checkpoint = {"name": name, "sha256": digest, "trained_on": None}
    decided_by = {
        "model": "answers",
        "named": system,
        "checkpoint": checkpoint,
        "images": next(iter(shown.values())),
    }
    known = {  # write_run finds out about the others by itself
        task: {name: of_task.settings[name] for name in DECIDING if name in of_task.settings}
        for task, of_task in answers.items()
    }
    for settings in known.values():
        for name in ("extract", "images", "draws"):
            settings.pop(name, None)
    return write_run(rows, decided_by, folder=folder, asked_with=known)
