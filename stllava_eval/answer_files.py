"""A file of answers that others wrote -> the final answer to each question, after every line was held to its question.

What people send differs: in layout, in the names of its fields, in its ids. A name that could mean two things is
refused. Where a line carries its question, reference or image, these must be those of its id: ids of another edition
are often ids of this one too, of other questions.
"""

from __future__ import annotations

import csv
import io
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from stllava_eval.errors import InputError, one_line
from stllava_eval.extract import FINAL, SIGNATURES, Final, finals, opened, unsealed, with_opened_thoughts
from stllava_eval.home import loads, read_bytes, read_text
from stllava_eval.runs import dataset_of, ended, open_run, some, split_rows

log = logging.getLogger("stllava_eval")

IDS = ("id", "question_id", "qid")
ANSWERS = (
    *("answer", "text", "model_answer", "response", "prediction", "pred", "output", "generated_text"),
    *("model_output", "model_response", "predicted_answer", "generation", "completion", "hypothesis"),
)
"""Fields in which files of answers hold what the model said."""
QUESTIONS = ("question", "prompt", "query")
REFERENCES = ("reference", "gt_ans", "gt_answer", "ground_truth", "gold")
PICTURES = ("image_name", "img_name", "image")
PARQUET_BYTES = 2**30  # of a file of answers, unpacked (our choice): PathVQA's 6,761 answers of 4,096 tokens have 0.1


@dataclass(frozen=True)
class AnswerFile:
    """What a file of answers holds for one task."""

    replies: dict[str, tuple[Final, ...]]
    """By question id, in the order of their draws."""
    settings: dict[str, Any]
    """Those of `runs.DECIDING` that are known: `extract` always, the others of a run folder's answers."""
    prompt: str = "bare"
    """Of a run folder's answers, the preset that was asked."""
    left_out: int = 0
    """Lines about questions that the split does not have, where these are to be ignored."""

    @property
    def answers(self) -> dict[str, str]:
        """By question id, the final answer of the first reply."""
        return {name: of[0].answer for name, of in self.replies.items()}


@dataclass(frozen=True)
class _Said:
    """One row of a file of answers: the reply, and the other fields that we use."""

    reply: str
    asked: str | None = None
    """The text that was asked."""
    ended: bool | None = None
    final: Final | None = None
    """The final answer as a run folder holds it."""
    extract: str = ""
    """The signature of the rule that took it out."""
    ours: bool = False
    """The line is of a run folder or of lmms-eval, so opened thoughts are marked already."""


def read_answers(
    file: Path,
    task: str,
    extract: str | None = None,
    answer_field: str | None = None,
    id_field: str | None = None,
    ignore_unknown: bool = False,
) -> AnswerFile:
    """Read the final answers in a file: JSON lines, a JSON array, CSV, TSV or Parquet.

    Rows are ours (`id`, `answer`; of a run folder with `reply` too), of the LLaVA family (`question_id`, `text`), of
    lmms-eval's samples of our tasks, or name their answer by one of `ANSWERS`. Rows of another task are left out.

    Args:
        file: The file.
        task: Whose answers are wanted.
        extract: The rule that takes the final answer out of each reply. None takes the answers of a run folder as they
            stand there, and `final` for every other row.
        answer_field: The field that holds what the model said; None finds it, where only one field can be meant.
        id_field: The field that holds the question's id; None finds it.
        ignore_unknown: Leave out rows whose id the split does not have, as in files that hold more than one split.

    Raises:
        InputError: The file cannot be read or is empty, a row lacks an id or an answer or has several fields that may
            be its answer, an id comes twice, a row is about another question than its id, or the answers were taken out
            by different rules.
    """
    split = split_rows(dataset_of(task))
    rows = [(place, row) for place, row in _rows(file) if row.get("task", task) == task]
    if not rows:
        raise InputError(f"{file}: no answers of {task}. Each line is one object with id and answer.")
    renamed = _data_rad_ids(task, [_id(row, id_field) for _, row in rows], split)
    known = {row["id"]: row for row in split}
    questions = {name: str(row["question"]) for name, row in known.items()}
    found: dict[tuple[str, int], _Said] = {}
    repeated, left_out = [], 0
    for place, row in rows:
        name, said = _id_and_reply(place, row, split, questions, answer_field, id_field)
        name = renamed.get(name, name)
        if ignore_unknown and name not in known:
            left_out += 1
            continue
        if name in known:
            _refuse_another_question(place, name, row, known[name], answer_field)
        draw = row.get("draw", 0)
        draw = int(draw) if isinstance(draw, str) and draw.isdecimal() else draw
        if type(draw) is not int or draw < 0:
            raise InputError(f"{place}: draw {draw!r}. It is the number of a sampled reply, from 0 on.")
        if (name, draw) in found:
            repeated.append(name)
        found[name, draw] = said
    if repeated:
        raise InputError(
            f"{file}: {len(repeated)} ids come twice ({some(repeated)}). Keep one answer for each question."
        )
    if not found:
        raise InputError(f"{file}: none of its {left_out} ids is one of {task}, for example {split[0]['id']}.")
    read = _answer_file(file, task, found, questions, extract)
    _warn_of_references(file, read, known)
    return AnswerFile(read.replies, read.settings, read.prompt, left_out)


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


def _rows(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """The place, for messages, and the fields of each row."""
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return [(f"{file} row {number}", row) for number, row in enumerate(_parquet(file))]
    try:
        text = read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}). Pass a JSONL file of answers.") from error
    if suffix in (".csv", ".tsv"):
        table = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if suffix == ".tsv" else ",")
        try:
            return [(f"{file}:{table.line_num}", {str(name): cell for name, cell in row.items()}) for row in table]
        except csv.Error as error:
            raise InputError(f"{file}:{table.line_num}: no {suffix[1:].upper()} ({error}). Write it again.") from error
    if text.lstrip().startswith("["):
        return [(f"{file} item {number}", row) for number, row in enumerate(_array(file, text))]
    found = []
    for number, line in enumerate(text.split("\n"), 1):  # an answer may hold other line separators
        if not line.strip():
            continue
        try:
            row = loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{file}:{number}: not JSON ({error}). Each line is one object with id and answer."
            ) from error
        if not isinstance(row, dict):
            raise InputError(f"{file}:{number}: not an object. Each line is one object with id and answer.")
        found.append((f"{file}:{number}", row))
    return found


def _array(file: Path, text: str) -> list[dict[str, Any]]:
    try:
        rows = loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON ({error}). Pass a list of objects with id and answer.") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{file} item {number}: not an object. Each item is one object with id and answer.")
    return rows


def _parquet(file: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened_file = pq.ParquetFile(pa.BufferReader(read_bytes(file)))
        groups = range(opened_file.num_row_groups)
        if (size := sum(opened_file.metadata.row_group(number).total_byte_size for number in groups)) > PARQUET_BYTES:
            raise InputError(
                f"{file}: {size:,} bytes unpacked, and at most {PARQUET_BYTES:,} are read. Pass the answers."
            )
        names = [name for name in opened_file.schema_arrow.names if name != "image"]  # pictures are not looked at
        return opened_file.read(columns=names).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: no Parquet file ({one_line(error)}). Write it again.") from error


# ---------------------------------------------------------------------------------------------------------------------
# Fields


def _id(row: Mapping[str, Any], id_field: str | None) -> str | None:
    """A row's id as a text; pandas makes floats of whole numbers."""
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
    questions: Mapping[str, str],
    answer_field: str | None,
    id_field: str | None,
) -> tuple[str, _Said]:
    """A row's id and reply.

    Raises:
        InputError: It lacks one, or has several fields that may be its answer.
    """
    if "doc_id" in row and not answer_field:
        return _sample(place, row, split)
    name = _id(row, id_field)
    if name is None:
        raise InputError(_lacks(place, row, "id", (id_field,) if id_field else IDS))
    if "reply" in row and "extract" in row and not answer_field:  # a run folder's
        if not all(isinstance(row[key], str) for key in ("reply", "answer", "extract")):
            raise InputError(f"{place}: no answer. A line of a run folder has reply, answer and extract, all text.")
        forms, was_cut = row.get("forms", []), row.get("cut", False)
        if not isinstance(forms, list) or not isinstance(was_cut, bool):
            raise InputError(
                f"{place}: forms {forms!r} or cut {was_cut!r} is not as a run wrote it. Take it from the run."
            )
        final = Final(row["answer"], was_cut, tuple(map(str, forms)), row["reply"])
        asked = row["text"] if isinstance(row.get("text"), str) else None
        return name, _Said(row["reply"], asked, ended(row), final, row["extract"], ours=True)
    field = answer_field or _answer_field(place, row, questions.get(name, ""))
    if not isinstance(row.get(field), str):
        raise InputError(_lacks(place, row, "answer", (answer_field,) if answer_field else ANSWERS))
    asked = row.get("text" if field == "answer" else "prompt")
    return name, _Said(row[field], asked if isinstance(asked, str) else None, ended(row))


def _sample(place: str, row: Mapping[str, Any], split: Sequence[Mapping[str, Any]]) -> tuple[str, _Said]:
    """Of lmms-eval's samples the id is in each score's record, else the number of the row counts."""
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
    return name, _Said(reply, ours=True)


def _answer_field(place: str, row: Mapping[str, Any], question: str) -> str:
    """The one field that may hold what the model said.

    Raises:
        InputError: There are several.
    """
    held = [name for name in ANSWERS if name in row]
    if {"text", "answer"} <= row.keys() and question and _folded(question) in _folded(row["text"]):
        held.remove("text")  # what was asked, as in a line of an older run folder
    if len(held) > 1:
        raise InputError(
            f"{place}: {' and '.join(held)} could each be the model's answer, and one of them may be the reference. "
            "Pass --answer-field with the one that the model gave."
        )
    return held[0] if held else "answer"


def _lacks(place: str, row: Mapping[str, Any], what: str, names: Sequence[str]) -> str:
    seen = ", ".join(map(str, list(row)[:12]))
    return (
        f"{place}: no {what}. A line has id and answer, both text; known names are {', '.join(names)}, and the line "
        f"has {seen}. Name another one by --{what}-field."
    )


# ---------------------------------------------------------------------------------------------------------------------
# What a line carries must be its question's


def _folded(text: object) -> str:
    return " ".join(str(text).lower().split())


def _refuse_another_question(
    place: str, name: str, row: Mapping[str, Any], known: Mapping[str, Any], answer_field: str | None
) -> None:
    """Hold a row's question, reference and image to those of its id.

    A prompt may have words around the question, and an image's name folders before it. White space and letter case do
    not count.

    Raises:
        InputError: One is another.
    """

    def refuse(field: str, has: str) -> None:
        raise InputError(
            f"{place}: {field} of id {name} is {str(row[field])[:80]!r}, and the prepared split has {has!r}. "
            "The ids are those of another edition or split: prepare that one, or pass the ids of this one."
        )

    for field in QUESTIONS:
        told = row.get(field)
        if isinstance(told, str) and told.strip() and _folded(known["question"]) not in _folded(told):
            refuse(field, known["question"])
    gold = (*REFERENCES, "answer") if answer_field not in (None, "answer") else REFERENCES
    for field in gold:
        told = row.get(field)
        if isinstance(told, str | int | float) and _folded(told) != _folded(known["reference"]):
            refuse(field, known["reference"])
    own = PurePosixPath(known["image_id"])
    for field in PICTURES:
        told = row.get(field)
        if not isinstance(told, str) or not own.suffix:  # the copy that was prepared has no names of images
            continue
        path = PurePosixPath(told.replace("\\", "/"))
        depth = min(len(path.parts), len(own.parts))
        if path.suffix and path.parts[-depth:] != own.parts[-depth:]:
            refuse(field, known["image_id"])


def _data_rad_ids(task: str, names: Sequence[str | None], split: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Public VQA-RAD ids by the ids of data_RAD's own files, where every id of the file is one of theirs.

    59 of them are also public ids, of other questions, so one by one nothing could be said: all or nothing.
    """
    if dataset_of(task) != "vqarad":
        return {}
    from stllava_eval.datasets import data_rad_ids

    known = {row["id"] for row in split}
    public = {theirs: ours for theirs, ours in data_rad_ids().items() if ours in known}
    given = {name.removeprefix("data_RAD-") for name in names if name is not None}
    if not given or not given <= public.keys() or given <= known:
        return {}
    log.warning("%s: the ids are those of data_RAD's files; they are read as the public ones.", task)
    return {spelt: ours for theirs, ours in public.items() for spelt in (theirs, f"data_RAD-{theirs}")}


def _warn_of_references(file: Path, read: AnswerFile, known: Mapping[str, Mapping[str, Any]]) -> None:
    answers = {name: answer for name, answer in read.answers.items() if name in known}
    if len(answers) > 1 and all(_folded(said) == _folded(known[name]["reference"]) for name, said in answers.items()):
        log.warning(
            "%s: every answer equals its reference. Is it the model's? --answer-field names another field.", file
        )


def _answer_file(
    file: Path, task: str, found: Mapping[tuple[str, int], _Said], questions: Mapping[str, str], extract: str | None
) -> AnswerFile:
    """The final answer of each line, by the rule that is wanted."""
    rules = {said.extract or SIGNATURES[FINAL] for said in found.values()}
    if extract is None and len(rules) > 1:
        raise InputError(
            f"{file}: its answers were taken out of the replies by different rules ({', '.join(sorted(rules))}). "
            "Pass --extract with the one that is wanted."
        )
    from stllava_eval.metrics import is_failed_request

    foreign = [key for key, said in found.items() if not said.ours and not is_failed_request(said.reply)]
    marked = with_opened_thoughts([found[key].reply for key in foreign], [found[key].ended for key in foreign])
    replies = {key: said.reply for key, said in found.items()} | dict(zip(foreign, marked, strict=True))
    by_id: dict[str, dict[int, Final]] = defaultdict(dict)
    for (name, draw), said in found.items():
        asked = said.asked if said.asked is not None else questions.get(name, "")
        if extract is None:
            held = [said.final] if said.final is not None else opened(replies[name, draw], asked)
        else:
            held = finals(unsealed(replies[name, draw]), asked, extract)
        by_id[name].update(enumerate(held, draw))
    settings: dict[str, Any] = {}
    prompt = "bare"
    if file.name == "answers.jsonl" and all(said.ours for said in found.values()):
        with suppress(InputError):  # a copy that was taken out of its run folder
            of_task = open_run(file.parent).tasks.get(task)
            if of_task is not None:
                settings, prompt = of_task.settings, of_task.prompt
    settings = {**settings, "extract": SIGNATURES[extract] if extract else rules.pop()}
    return AnswerFile({name: tuple(of[draw] for draw in sorted(of)) for name, of in by_id.items()}, settings, prompt)
