"""Write and read run folders: what was asked, by which model, how it was answered, and how the answers scored.

`run.json` records what decided the answers, `answers.jsonl` has one line per reply (of sampled runs several per
question) with the raw reply and the final answer in it, `scores.json` the means with their intervals. Scores never
depend on the run: `score_table` makes them from final answers and the prepared split alone.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import math
import os
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.data.catalog import DATASETS
from stllava_eval.data.prompts import PROMPTS
from stllava_eval.data.prompts import text as prompted_text
from stllava_eval.data.splits import how_to_use, prepared_editions, read_manifest
from stllava_eval.errors import InputError
from stllava_eval.inference.replies import CUT
from stllava_eval.runs.scores import (
    DECIDING,
    NOT_RECORDED,
    Scored,
    ScoreRow,
    dataset_of,
    first_ids,
    prepared_split,
    score_answers,
)
from stllava_eval.scoring.final_answer import (
    FINAL,
    SIGNATURES,
    FinalAnswer,
    final_answers,
    is_failed_request,
    with_opened_thoughts,
)
from stllava_eval.storage import expanded, hold, home, loads, read_json, read_text, whole_file, write_json

if TYPE_CHECKING:
    from stllava_eval.inference.replies import Failure
    from stllava_eval.inference.types import Answer


log = logging.getLogger("stllava_eval")

FORMAT = 1  # the version of the layout of run.json and scores.json
PACKAGES = ("stllava-med", "lmms-eval", "torch", "transformers", "tokenizers", "pillow", "nltk", "numpy")
NOT_ASKED = "[LMMS_EVAL_REQUEST_FAILED after 0 attempts]"
"""The beginning of the text that replaces a reply, if a file of answers has none: it may not have been asked for."""


@dataclass(frozen=True)
class RunTask:
    """What a run folder holds of one task."""

    edition: str
    sha256_rows: str
    sha256_pixels: str
    prompt: str
    not_asked: int
    """Number of questions of the split that the run was not asked (`--limit`)."""
    replies: dict[str, tuple[FinalAnswer, ...]]
    """The final answer of each reply by question id: one, or as many as were sampled."""
    texts: dict[str, str]
    """The text that the model saw, by question id; only for a custom prompt."""
    settings: dict[str, Any]
    """The other settings that decide the final answers, by the names of `DECIDING`; older runs record fewer."""
    at_limit: int | None
    """Number of replies that were stopped at their limit of new tokens; None if it is not recorded."""

    @property
    def answers(self) -> dict[str, str]:
        """Return the final answer of the first reply by question id, for people to read."""
        return {name: finals[0].answer for name, finals in self.replies.items()}


def _order(task: str) -> tuple[int, str]:
    """Return a key that sorts tasks as the paper's tables do, and tasks of other data sets behind them."""
    name = dataset_of(task)
    names = tuple(DATASETS)  # in the order of the paper's tables
    return (names.index(name) if name in names else len(names)), task


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    folder: Path
    manifest: dict[str, Any]
    """The content of run.json."""
    tasks: dict[str, RunTask]
    """By name, in the order of the paper's tables."""


def answer_row(
    task: str,
    doc: Mapping[str, Any],
    text: str | None,
    final: FinalAnswer,
    generated: Answer | Failure | None = None,
    extract: str = SIGNATURES[FINAL],
    draw: int = 0,
) -> dict[str, Any]:
    """Return one line of `answers.jsonl`: the question's row, the text that the model saw, its reply and its answer.

    Args:
        task: The task that was asked.
        doc: The question's row of the prepared split.
        text: The text that the model saw; None if it is not recorded.
        final: The final answer in its reply, or the failure text of a request.
        generated: The reply's tokens, and whether it ended by itself, if that is known.
        extract: The signature of the rule that extracted the answer from the reply.
        draw: The number of the sampled reply, from 0, if several replies are sampled.
    """
    return {
        "task": task,
        **{name: value for name, value in doc.items() if name != "image"},
        "draw": draw,
        "text": text,
        "reply": final.reply,
        "answer": final.answer,
        "extract": extract,
        "forms": list(final.forms),
        "cut": final.cut,
        "tokens": getattr(generated, "tokens", None),
        "ended": getattr(generated, "ended", None),
    }


def write_run(
    rows: Sequence[Mapping[str, Any]],
    decided_by: Mapping[str, Any],
    answering: Mapping[str, float] | None = None,
    folder: Path | None = None,
    asked_with: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Score the answers and write a run folder; return the folder.

    Args:
        rows: Rows of `answer_row`, of several tasks, in any order, possibly with repeats.
        decided_by: What decided the answers: checkpoint, dtype, images and the like.
        answering: The number of `questions` that the first process answered, without those that an earlier run had
            saved, and the `seconds` that it took.
        folder: The folder to write (default: `$STLLAVA_RUN`, or a new one under `$STLLAVA_HOME/runs`).
        asked_with: `max_new_tokens` and `until` of each task's questions, if they are known.

    Raises:
        InputError: The folder cannot be written.
    """
    tasks: dict[str, Any] = {}
    doubts: list[str] = []
    scores: list[ScoreRow] = []
    lines: list[Mapping[str, Any]] = []
    for task, by_question in sorted(_rows_by_question(rows).items()):
        part = _part_of_run(task, by_question, decided_by, (asked_with or {}).get(task, {}))
        tasks[task] = part.manifest
        doubts += [f"{task}: {part.scored.doubts}"] if part.scored.doubts else []
        scores += part.scored.rows
        lines += part.lines
    folder = folder or _new_folder(str(decided_by["checkpoint"]["name"]))  # now that nothing is left to fail
    with whole_file(folder / "answers.jsonl") as unfinished:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines)
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")  # an escape that JSON reads
    write_json(folder / "scores.json", {"format": FORMAT, "scores": [asdict(row) for row in scores]})
    write_json(folder / "run.json", _manifest({**decided_by, "tasks": tasks}, answering))  # last: it marks a whole run
    if doubts:
        log.warning("%s: %s", folder, " ".join(doubts))
    return folder


RowsByQuestion = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""The rows of one task by question id, and then by the number of the sampled reply."""


def _rows_by_question(rows: Iterable[Mapping[str, Any]]) -> dict[str, RowsByQuestion]:
    """Return the rows of each task; of repeated rows, as lmms-eval pads the processes with, the last one is kept."""
    by_task: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        by_task[row["task"]][row["id"]][row.get("draw", 0)] = row
    return {task: dict(by_question) for task, by_question in by_task.items()}


@dataclass(frozen=True)
class _PartOfRun:
    """One task of a run that is being written."""

    manifest: dict[str, Any]
    """What run.json says about the task."""
    lines: list[Mapping[str, Any]]
    """The task's lines of answers.jsonl, in the order of the split."""
    scored: Scored


def _part_of_run(
    task: str, by_question: RowsByQuestion, decided_by: Mapping[str, Any], asked_with: Mapping[str, Any]
) -> _PartOfRun:
    """Return what a run folder says about one task.

    Raises:
        InputError: A question that was asked is not in the prepared split.
    """
    prepared, split_rows = prepared_split(dataset_of(task))
    if unknown := sorted(by_question.keys() - {row["id"] for row in split_rows}):
        raise InputError(
            f"{task}: {len(unknown)} questions that were asked are not in the {prepared['edition']}, which was "
            f"prepared meanwhile ({first_ids(unknown)}). Prepare the split that was asked, and run again."
        )
    asked = [row for row in split_rows if row["id"] in by_question]
    lines = [line for row in asked for line in _in_order(by_question[row["id"]])]
    failed = [is_failed_request(line["answer"]) for line in lines]
    answered_ids = {line["id"] for line, has_failed in zip(lines, failed, strict=True) if not has_failed}
    preset = prompt_preset(lines)
    manifest = {
        "data": {name: prepared[name] for name in ("edition", "official", "sample", "sha256_rows", "sha256_pixels")},
        "prompt": preset,
        "questions": len(asked),
        "of": len(split_rows),
        "draws": max(map(len, by_question.values())),
        "extract": lines[0]["extract"],
        **asked_with,
        "cut": sum(line["ended"] is False for line in lines),
        "cut_thoughts": sum(line["cut"] for line in lines),
        "unanswered": [row["id"] for row in asked if row["id"] not in answered_ids],
        "failed_requests": sum(failed),
    }
    replies = {name: tuple(map(_final, _in_order(of_question))) for name, of_question in by_question.items()}
    settings = _settings(decided_by, manifest)
    return _PartOfRun(manifest, lines, score_answers(task, asked, replies, prepared, preset, settings))


def _manifest(deciding: Mapping[str, Any], answering: Mapping[str, float] | None) -> dict[str, Any]:
    """Return run.json: what decided the answers with its fingerprint, and the circumstances of the run."""
    return {
        "format": FORMAT,
        "command": shlex.join(sys.argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "fingerprint": hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest(),
        "versions": {name: version(name) for name in PACKAGES} | {"python": sys.version.split()[0]},
        "commit": commit(),
        "answering": answering,
        **deciding,
    }


def _in_order(of_question: Mapping[int, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of one question in the order in which its replies were sampled."""
    return [of_question[draw] for draw in sorted(of_question)]


def _final(line: Mapping[str, Any]) -> FinalAnswer:
    """Return the final answer in a line of `answers.jsonl`. An older line has the raw reply as its answer."""
    if "reply" not in line:
        return final_answers([line["answer"]], str(line.get("text") or ""), FINAL)[0]
    return FinalAnswer(line["answer"], line["cut"], tuple(line["forms"]), line["reply"])


def _settings(manifest: Mapping[str, Any], of_task: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of `DECIDING` that a run.json has for one of its tasks.

    An older run.json names no extraction rule; its raw replies are read by today's rule.
    """
    held = {"extract": SIGNATURES[FINAL], **manifest, **of_task}
    return {name: held[name] for name in DECIDING if name in held}


def read_run(folder: Path) -> dict[str, RunTask]:
    """Return the tasks of a run folder by name; raises what `open_run` raises."""
    return open_run(folder).tasks


def open_run(folder: Path) -> Run:
    """Read a run folder, and check that its files are whole and fit each other.

    Raises:
        InputError: It is not a run folder.
    """
    try:
        manifest = read_json(folder / "run.json")
        text = read_text(folder / "answers.jsonl")
        rows = [loads(line) for line in text.split("\n") if line]  # an answer may hold other line separators
        _check_keys_and_texts(rows)
        _check_manifest(manifest)
        for row in rows:
            _check_line(row, manifest["tasks"].get(row["task"], {}))
        replies = _replies_of(rows)
        tasks = {}
        for task in sorted(manifest["tasks"], key=_order):
            tasks[task] = _run_task(task, rows, replies.get(task, {}), manifest)
            if (count := len(tasks[task].replies)) != (asked := manifest["tasks"][task]["questions"]):
                raise ValueError(f"{count} answers of {task}, {asked} were asked")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{folder} is not a run folder ({error!r}). Pass one that `stllava-eval run` wrote."
        ) from error
    return Run(folder, manifest, tasks)


def _run_task(
    task: str,
    rows: Sequence[Mapping[str, Any]],
    replies: dict[str, tuple[FinalAnswer, ...]],
    manifest: Mapping[str, Any],
) -> RunTask:
    """Return what a run folder holds of one task, from its lines of answers.jsonl, their replies, and run.json."""
    of_task = manifest["tasks"][task]
    is_custom = of_task["prompt"] == "custom"
    texts = {}
    for row in rows:
        if is_custom and row["task"] == task and row["text"] is not None:
            texts[row["id"]] = row["text"]
    return RunTask(
        **{name: of_task["data"][name] for name in ("edition", "sha256_rows", "sha256_pixels")},
        prompt=_custom(task, rows) if is_custom else of_task["prompt"],
        not_asked=of_task["of"] - of_task["questions"],
        replies=replies,
        texts=texts,
        settings=_settings(manifest, of_task),
        at_limit=of_task.get("cut"),
    )


def _check_keys_and_texts(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError if two lines of an answers.jsonl are about one reply, or an id, answer or reply is not text."""
    keys = [(row["task"], row["id"], row.get("draw", 0)) for row in rows]
    texts = []
    for row in rows:
        texts += [row["id"], row["answer"], row.get("reply", "")]  # lines of older runs have no reply
    if len(set(keys)) < len(keys) or not all(isinstance(text, str) for text in texts):
        raise ValueError("an id of answers.jsonl comes twice, or an id, answer or reply is not text")


def _check_line(row: Mapping[str, Any], of_task: Mapping[str, Any]) -> None:
    """Raise ValueError if a line of an answers.jsonl is not as `answer_row` makes it.

    Its `extract` must be the rule that run.json names.
    """
    if type(row.get("draw", 0)) is not int or row.get("draw", 0) < 0:
        raise ValueError(f"draw {row['draw']!r} of {row['id']} is no number from 0 on")
    if "reply" not in row:
        return
    if type(row["cut"]) is not bool:
        raise ValueError(f"cut {row['cut']!r} of {row['id']} is neither true nor false")
    if not isinstance(row["forms"], list) or not all(isinstance(form, str) for form in row["forms"]):
        raise ValueError(f"forms {row['forms']!r} of {row['id']} is no list of texts")
    if (rule := row.get("extract")) != of_task.get("extract", rule):
        raise ValueError(f"extract {rule!r} of {row['id']} is not the run.json's {of_task['extract']!r}")


def ended_by_itself(row: Mapping[str, Any]) -> bool | None:
    """Return whether a row's reply ended by itself, not at its limit of tokens; None if the row does not say."""
    ended, reason = row.get("ended"), row.get("finish_reason")
    if isinstance(ended, str):  # the cells of a CSV are texts
        ended = {"true": True, "false": False}.get(ended.strip().lower())
    if ended is None and isinstance(reason, str) and reason.strip():
        return reason.strip().lower() not in CUT
    return ended if isinstance(ended, bool) else None


def _replies_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, tuple[FinalAnswer, ...]]]:
    """Return the final answers in lines of `answers.jsonl`, by task and question id, in the order of sampling.

    Lines of older runs have raw replies only; opened thoughts are marked here, as `read_answers` does.
    """
    replies: dict[str, dict[str, tuple[FinalAnswer, ...]]] = {}
    for task, by_question in _rows_by_question(rows).items():
        old = []
        for of_question in by_question.values():
            old += [row for row in of_question.values() if "reply" not in row and not is_failed_request(row["answer"])]
        marked = with_opened_thoughts([row["answer"] for row in old], [ended_by_itself(row) for row in old])
        answers = {(row["id"], row.get("draw", 0)): answer for row, answer in zip(old, marked, strict=True)}
        replies[task] = {}
        for name, of_question in by_question.items():
            lines = [
                {**of_question[draw], "answer": answers.get((name, draw), of_question[draw]["answer"])}
                for draw in sorted(of_question)
            ]
            replies[task][name] = tuple(map(_final, lines))
    return replies


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raise ValueError, KeyError, TypeError or AttributeError if a run.json is not as `write_run` writes it."""
    checkpoint, learnt = manifest["checkpoint"], manifest["checkpoint"].get("trained_on")
    if (
        not isinstance(checkpoint["name"], str)
        or not checkpoint["name"]
        or not (learnt is None or isinstance(learnt, list))
    ):
        raise ValueError("its checkpoint has no name, or trained_on is no list")
    answering = manifest.get("answering")
    if answering is not None and not all(
        type(answering[name]) in (int, float) and 0 <= answering[name] < math.inf for name in ("questions", "seconds")
    ):
        raise ValueError("answering has no number of questions and seconds")
    if not manifest["tasks"]:
        raise ValueError("it has no task")
    for task in manifest["tasks"].values():
        texts = task["prompt"], *(task["data"][name] for name in ("edition", "sha256_rows", "sha256_pixels"))
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"{texts!r} are not all texts")
        asked, every = task["questions"], task["of"]
        if type(asked) is not int or type(every) is not int or not 0 <= asked <= every:
            raise ValueError(f"{asked!r} of {every!r} questions cannot have been asked")


def refuse_other_split(task: str, run: RunTask, folder: Path) -> None:
    """Check that the prepared split is the one that a run was asked; a run is never scored against another one.

    Raises:
        InputError: What is prepared now has other rows or images, or an answer is to none of its questions.
    """
    prepared, rows = prepared_split(dataset_of(task))
    if (run.sha256_rows, run.sha256_pixels) != (prepared["sha256_rows"], prepared["sha256_pixels"]):
        asked = (run.sha256_rows, run.sha256_pixels)
        kept = [
            edition
            for edition in prepared_editions(dataset_of(task), "test")
            if (edition.sha256_rows, edition.sha256_pixels) == asked
        ]
        again = f"Run {how_to_use(kept[0])}" if kept else "Prepare the run's split again"
        raise InputError(
            f"{folder}: its {task} is {run.edition}, but {prepared['edition']} is prepared now, with other rows or "
            f"images. {again}, or run again."
        )
    if run.not_asked + len(run.replies) != len(rows):
        raise InputError(
            f"{folder}: its run.json tells of {run.not_asked + len(run.replies)} questions of {task}, the split has "
            f"{len(rows)}. Run again."
        )
    if unknown := sorted(run.replies.keys() - {row["id"] for row in rows}):
        raise InputError(
            f"{folder}: {len(unknown)} answers of {task} are to questions that its split does not have "
            f"({first_ids(unknown)}). Run again."
        )


def _custom(task: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """Return `custom` and the first 12 hexadecimal digits of a hash of what the model was asked."""
    texts = sorted({(row["id"], row["text"]) for row in rows if row["task"] == task and row["text"] is not None})
    return f"custom {hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]}"


def labels(folders: Sequence[Path]) -> list[str]:
    """Return a name for each run: its folder's, with as many parent folders as it takes to tell the runs apart.

    Raises:
        InputError: A folder is named twice.
    """
    whole = [folder.expanduser().resolve() for folder in folders]
    if twice := [given for given, folder in zip(folders, whole, strict=True) if whole.count(folder) > 1]:
        raise InputError(f"{twice[0]}: named twice. Name each run once.")
    for depth in range(1, max((len(folder.parts) for folder in whole), default=1) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in whole]
        if len(set(names)) == len(names):
            return names
    return names


def trained_on(checkpoint: str) -> list[str] | None:
    """Return the data sets that a checkpoint of `stllava-train` was trained on (`slake`, `slake sample`).

    None if its run.json does not say so, or if it has none.
    """
    try:
        names = read_json(Path(checkpoint) / "run.json")["trained_on"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def prompt_preset(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the preset of `data.prompts.PROMPTS` that gives the text of every row that has one.

    `custom` if no preset does, and `NOT_RECORDED` if no row has a text.
    """
    asked = [row for row in rows if row["text"] is not None]
    if not asked:
        return NOT_RECORDED
    for preset in PROMPTS:
        if all(row["text"] == prompted_text(row, {"prompt": preset}) for row in asked):
            return preset
    return "custom"


def prompt_of(task: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what `prompt_preset` returns, with a hash of the texts after `custom`, so that two prompts differ."""
    preset = prompt_preset(rows)
    return preset if preset != "custom" else _custom(task, rows)


def data_hashes() -> dict[str, str]:
    """Return, by prepared data set, the hashes of its test split's rows and of its decoded images."""
    hashes = {}
    for name in DATASETS:
        try:
            manifest = read_manifest(name, "test")
        except InputError:  # not prepared, so no answer of it can be in a cache or a run
            continue
        hashes[name] = f"{manifest.sha256_rows} {manifest.sha256_pixels}"
    return hashes


def refuse_old_folder(folder: Path | None = None) -> None:
    """Check, before any question is asked, that a new run can be written into a folder (default: `$STLLAVA_RUN`).

    Raises:
        InputError: It holds a run already, or is a file.
    """
    folder = folder or expanded("STLLAVA_RUN", os.environ.get("STLLAVA_RUN") or home() / "runs")
    try:
        taken = (folder / "run.json").exists() or (folder.exists() and not folder.is_dir())
    except OSError as error:
        raise InputError(f"{folder}: no run can be written there ({error.strerror}). Choose another folder.") from error
    if taken:
        raise InputError(f"{folder} holds a run already, or is a file. Choose another folder, or delete that one.")


def _new_folder(checkpoint: str) -> Path:
    """Return a folder for one run, locked until this process ends: `$STLLAVA_RUN`, or a new one.

    Raises:
        InputError: It holds a run already, another process is writing it, or it cannot be made.
    """
    if chosen := os.environ.get("STLLAVA_RUN"):
        folder = expanded("STLLAVA_RUN", chosen)
        hold(folder)
        if (folder / "run.json").exists():  # when this run began, there was none
            raise InputError(
                f"{folder}: another run has been written there meanwhile. Choose another folder, and run again: the "
                "answers are kept."
            )
        return folder
    runs = home() / "runs"
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    stem, number = f"{stamp}-{Path(checkpoint).name.encode()[:100].decode(errors='ignore')}", 1
    try:
        runs.mkdir(parents=True, exist_ok=True)
        while True:
            folder = runs / (stem if number == 1 else f"{stem}-{number}")
            with suppress(FileExistsError):
                folder.mkdir()
                break
            number += 1
    except OSError as error:
        raise InputError(
            f"{runs}: cannot be written ({error.strerror}). Set STLLAVA_HOME to another folder."
        ) from error
    hold(folder)
    return folder


def version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit of our own checkout, with `+changes` if files differ from it; None for an installed wheel."""
    top = Path(__file__).resolve().parents[2]
    if not (top / ".git").exists():
        return None
    try:
        head = subprocess.run(["git", "-C", top, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "-C", top, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")
