"""A run folder: what was asked and answered, by what, and how it scored; written, read and re-scored.

`run.json` says what decided the answers, `answers.jsonl` holds one line per reply (of sampled runs several per
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
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from stllava_eval.errors import InputError
from stllava_eval.extract import (
    FINAL,
    NONE,
    SIGNATURES,
    Final,
    final_answer,
    finals,
    with_opened_thoughts,
)
from stllava_eval.home import expanded, hold, home, loads, read_bytes, read_json, read_text, whole_file, write_json
from stllava_eval.replies import CUT

if TYPE_CHECKING:
    from stllava_eval.answer_files import AnswerFile
    from stllava_eval.answering import Answer
    from stllava_eval.server import Failure

log = logging.getLogger("stllava_eval")

FORMAT = 1
NOT_RECORDED = "not recorded"
"""The prompt or the images of answers from elsewhere, where nobody says."""
PACKAGES = ("stllava-med", "lmms-eval", "torch", "transformers", "tokenizers", "pillow", "nltk", "numpy")
NOT_ASKED = "[LMMS_EVAL_REQUEST_FAILED after 0 attempts]"
"""What begins the place of a reply to a question that a file of answers lacks: nobody can say that it was asked."""
FIXED_FIELDS = ("id", "image_id", "image_sha256", "image", "question", "reference", "kind")  # the rest are categories


@dataclass(frozen=True)
class ScoreRow:
    """One mean: of which score, over which questions, with its 95 % interval clustered by image.

    `category` is `all`, `field=value` with a field of the data set, or `asks=...` (`categories.ASKS`); `value`, `low`,
    `high` are in the score's own unit (shares in [0, 1], words in words) and None where there is nothing to say (no
    question; one image has no interval).
    """

    task: str
    metric: str
    signature: str
    category: str
    value: float | None
    n: int
    images: int
    low: float | None
    high: float | None


@dataclass(frozen=True)
class QuestionScores:
    """Of one answered question: its image, and every score by name."""

    image_id: str
    scores: dict[str, float]


@dataclass(frozen=True)
class Scored:
    """The score table of one task, and what it is made of."""

    rows: list[ScoreRow]
    unanswered: list[str]
    """Ids of questions without an answer: they are in no mean."""
    questions: dict[str, QuestionScores]
    """Of the answered ones by id, in the split's order."""
    empty: int = 0
    """Replies whose final answer is empty, but for those that were cut in their thought."""
    doubts: str = ""
    """Why the means may say little about the model: half of its replies or more are empty, cut or refusals."""


Replies = Mapping[str, str | Sequence[Final]]
"""By question id: the final answer of each reply, or one plain answer."""


@dataclass(frozen=True)
class RunTask:
    """What a run folder holds of one task."""

    edition: str
    sha256_rows: str
    sha256_pixels: str
    prompt: str
    not_asked: int
    """Questions of the split that the run left out (`--limit`)."""
    replies: dict[str, tuple[Final, ...]]
    """By question id, the final answer of each reply: one, or as many as were sampled."""
    texts: dict[str, str]
    """What the model saw, by question id; only of a custom prompt."""
    settings: dict[str, Any]
    """What else decides the final answers, by the names of `DECIDING`; of an older run, what it says."""
    at_limit: int | None
    """Replies that were stopped at their limit of new tokens; None where nobody says."""

    @property
    def answers(self) -> dict[str, str]:
        """Return the final answer of the first reply by question id, for people to read."""
        return {name: of[0].answer for name, of in self.replies.items()}


DECIDING = (
    *("extract", "images", "decoding", "draws", "max_new_tokens", "until"),
    *("system", "enable_thinking", "min_pixels", "max_pixels"),
)
"""What decides the answers of given weights to given questions; in every score's signature, compared by `compare` and
`gate`."""


_PAPER = ("vqarad", "slake", "pathvqa")  # the order of the paper's tables


def _order(task: str) -> tuple[int, str]:
    name = dataset_of(task)
    return (_PAPER.index(name) if name in _PAPER else len(_PAPER)), task


@dataclass(frozen=True)
class Run:
    """A run folder, read."""

    folder: Path
    manifest: dict[str, Any]
    """Of run.json."""
    tasks: dict[str, RunTask]
    """By name, in the order of the paper's tables."""


def dataset_of(task: str) -> str:
    """`vqarad_short` -> `vqarad`: the data set that a task asks about."""
    return task.split("_")[0]


def answered(
    task: str,
    doc: Mapping[str, Any],
    text: str | None,
    final: Final,
    generated: Answer | Failure | None = None,
    extract: str = SIGNATURES[FINAL],
    draw: int = 0,
) -> dict[str, Any]:
    """Return one line of `answers.jsonl`: the question's row, the text that the model saw, its reply and its answer.

    Args:
        task: Which was asked.
        doc: The question's row.
        text: What the model saw; None where nobody says.
        final: The final answer in its reply, or the failure text of a request.
        generated: The reply's tokens, and whether it ended by itself, where that is known.
        extract: The signature of the rule that took the answer out of the reply.
        draw: The number of the sample, where several replies are sampled.
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
    """Write a run folder.

    Args:
        rows: Of `answered`, of several tasks, in any order, padding repeats included.
        decided_by: What decided the answers.
        asked_with: By task, `max_new_tokens` and `until` of its questions, where they are known.
        answering: `questions` that the first process answered, not counting what a stopped run had left, and the
            `seconds` it took.
        folder: Default: `$STLLAVA_RUN`, else a new one under `$STLLAVA_HOME/runs`.

    Raises:
        InputError: The folder cannot be written.
    """
    from stllava_eval.metrics import is_failed_request

    by_task: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        by_task[row["task"]][row["id"]][row["draw"]] = row
    tasks = {}
    doubts: list[str] = []
    scores: list[ScoreRow] = []
    ordered: list[Mapping[str, Any]] = []
    for task in sorted(by_task):
        manifest, split_rows = _prepared(dataset_of(task))
        of_task = by_task[task]
        if unknown := sorted(of_task.keys() - {row["id"] for row in split_rows}):
            raise InputError(
                f"{task}: {len(unknown)} questions that were asked are not in the {manifest['edition']}, which was "
                f"prepared meanwhile ({some(unknown)}). Prepare the split that was asked, and run again."
            )
        asked = [row for row in split_rows if row["id"] in of_task]
        lines = [of_task[row["id"]][draw] for row in asked for draw in sorted(of_task[row["id"]])]
        preset = prompt_preset(lines)
        tasks[task] = {
            "data": {
                name: manifest[name] for name in ("edition", "official", "sample", "sha256_rows", "sha256_pixels")
            },
            "prompt": preset,
            "questions": len(asked),
            "of": len(split_rows),
            "draws": max(map(len, of_task.values())),
            "extract": lines[0]["extract"],
            **(asked_with or {}).get(task, {}),
            "cut": sum(line["ended"] is False for line in lines),
            "cut_thoughts": sum(line["cut"] for line in lines),
            "unanswered": [
                row["id"] for row in asked if all(is_failed_request(of["answer"]) for of in of_task[row["id"]].values())
            ],
            "failed_requests": sum(is_failed_request(line["answer"]) for line in lines),
        }
        replies = {name: tuple(map(_final, _in_order(of))) for name, of in of_task.items()}
        settings = _settings(decided_by, tasks[task])
        scored = _score(task, asked, replies, manifest, preset, settings)
        doubts += [f"{task}: {scored.doubts}"] if scored.doubts else []
        scores += scored.rows
        ordered += lines
    deciding = {**decided_by, "tasks": tasks}
    fingerprint = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
    folder = folder or _new_folder(str(decided_by["checkpoint"]["name"]))  # now that nothing is left to fail
    with whole_file(folder / "answers.jsonl") as unfinished:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ordered)
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")  # an escape that JSON reads
    write_json(folder / "scores.json", {"format": FORMAT, "scores": [asdict(row) for row in scores]})
    write_json(  # last: a folder with run.json is whole
        folder / "run.json",
        {
            "format": FORMAT,
            "command": shlex.join(sys.argv),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "fingerprint": fingerprint,
            "versions": {name: version(name) for name in PACKAGES} | {"python": sys.version.split()[0]},
            "commit": commit(),
            "answering": answering,
            **deciding,
        },
    )
    if doubts:
        log.warning("%s: %s", folder, " ".join(doubts))
    return folder


def _in_order(of_question: Mapping[int, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [of_question[draw] for draw in sorted(of_question)]


def _final(line: Mapping[str, Any]) -> Final:
    """The final answer in a line of `answers.jsonl`. An older line holds the raw reply as its answer."""
    if "reply" not in line:
        return finals([line["answer"]], str(line.get("text") or ""), FINAL)[0]
    return Final(line["answer"], line["cut"], tuple(line["forms"]), line["reply"])


def _settings(manifest: Mapping[str, Any], of_task: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `DECIDING` that a run.json holds, for one of its tasks; an older run was read by today's rule."""
    held = {"extract": SIGNATURES[FINAL], **manifest, **of_task}
    return {name: held[name] for name in DECIDING if name in held}


def read_run(folder: Path) -> dict[str, RunTask]:
    """The tasks of a run folder, by name; see `open_run`."""
    return open_run(folder).tasks


def open_run(folder: Path) -> Run:
    """What a run folder holds.

    Raises:
        InputError: It is not a run folder.
    """
    try:
        manifest = read_json(folder / "run.json")
        text = read_text(folder / "answers.jsonl")
        rows = [loads(line) for line in text.split("\n") if line]  # an answer may hold other line separators
        keys = [(row["task"], row["id"], row.get("draw", 0)) for row in rows]
        texts = [row[key] for row in rows for key in ("id", "answer", *(["reply"] if "reply" in row else []))]
        if len(set(keys)) < len(keys) or not all(isinstance(text, str) for text in texts):
            raise ValueError("an id of answers.jsonl comes twice, or an id, answer or reply is not text")
        _check_manifest(manifest)
        for row in rows:
            _check_line(row, manifest["tasks"].get(row["task"], {}))
        replies = _by_task_and_id(rows)
        tasks = {
            task: RunTask(
                **{name: of["data"][name] for name in ("edition", "sha256_rows", "sha256_pixels")},
                prompt=of["prompt"] if of["prompt"] != "custom" else _custom(task, rows),
                not_asked=of["of"] - of["questions"],
                replies=replies.get(task, {}),
                texts={
                    row["id"]: row["text"]
                    for row in rows
                    if row["task"] == task and of["prompt"] == "custom" and row["text"] is not None
                },
                settings=_settings(manifest, of),
                at_limit=of.get("cut"),
            )
            for task, of in sorted(manifest["tasks"].items(), key=lambda one: _order(one[0]))
        }
        for task, of in tasks.items():
            if len(of.replies) != manifest["tasks"][task]["questions"]:
                raise ValueError(
                    f"{len(of.replies)} answers of {task}, {manifest['tasks'][task]['questions']} were asked"
                )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{folder} is not a run folder ({error!r}). Pass one that `stllava-eval run` wrote."
        ) from error
    return Run(folder, manifest, tasks)


def _check_line(row: Mapping[str, Any], of_task: Mapping[str, Any]) -> None:
    """Raises ValueError where a line of an answers.jsonl, besides its texts, is not as `answered` makes it, or by
    another rule than the run.json names."""
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


def ended(row: Mapping[str, Any]) -> bool | None:
    """Return whether a row's reply ended by itself, not at its limit of tokens; None where the row does not say."""
    said, reason = row.get("ended"), row.get("finish_reason")
    if isinstance(said, str):  # a CSV has texts alone
        said = {"true": True, "false": False}.get(said.strip().lower())
    if said is None and isinstance(reason, str) and reason.strip():
        return reason.strip().lower() not in CUT
    return said if isinstance(said, bool) else None


def _by_task_and_id(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, tuple[Final, ...]]]:
    """The final answers in lines of `answers.jsonl`, in the order of their draws.

    Of an older run, whose lines hold raw replies alone, opened thoughts are marked here, as `read_answers` does.
    """
    from stllava_eval.metrics import is_failed_request

    found: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        found[row["task"]][row["id"]][row.get("draw", 0)] = row
    for of_task in found.values():
        old = [row for of in of_task.values() for row in of.values() if "reply" not in row]
        asked = [row for row in old if not is_failed_request(row["answer"])]
        marked = with_opened_thoughts([row["answer"] for row in asked], [ended(row) for row in asked])
        for row, reply in zip(asked, marked, strict=True):
            of_task[row["id"]][row.get("draw", 0)] = {**row, "answer": reply}
    return {
        task: {name: tuple(map(_final, _in_order(of))) for name, of in of_task.items()}
        for task, of_task in found.items()
    }


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raises ValueError, KeyError, TypeError or AttributeError where a run.json is not as `write_run` writes it."""
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
    for of in manifest["tasks"].values():
        texts = of["prompt"], *(of["data"][name] for name in ("edition", "sha256_rows", "sha256_pixels"))
        if not all(isinstance(one, str) and one for one in texts):
            raise ValueError(f"{texts!r} are not all texts")
        if not all(type(of[name]) is int for name in ("questions", "of")) or not 0 <= of["questions"] <= of["of"]:
            raise ValueError(f"{of['questions']!r} of {of['of']!r} questions cannot have been asked")


def refuse_other_split(task: str, run: RunTask, folder: Path) -> None:
    """A run is scored against the split that it was asked.

    Raises:
        InputError: What is prepared now has other rows or images, or an answer is to none of its questions.
    """
    from stllava_eval.datasets import how_to_use, prepared_editions

    prepared, rows = _prepared(dataset_of(task))
    if (run.sha256_rows, run.sha256_pixels) != (prepared["sha256_rows"], prepared["sha256_pixels"]):
        asked = (run.sha256_rows, run.sha256_pixels)
        kept = [of for of in prepared_editions(dataset_of(task), "test") if (of.sha256_rows, of.sha256_pixels) == asked]
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
            f"({some(unknown)}). Run again."
        )


def _custom(task: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """`custom` and a hash of what the model was asked."""
    texts = sorted({(row["id"], row["text"]) for row in rows if row["task"] == task and row["text"] is not None})
    return f"custom {hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]}"


def labels(folders: Sequence[Path]) -> list[str]:
    """A name for each run: its folder's, with as many of those above as it takes to tell them apart.

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
    """The data sets that a checkpoint of `stllava-train` has learnt from (`slake`, `slake sample`); None if it does not
    say."""
    try:
        found = read_json(Path(checkpoint) / "run.json")["trained_on"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return [str(name) for name in found] if isinstance(found, list) else None


def prompt_preset(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which preset of `questions.PROMPTS` gives the text of every row that has one; else `custom`, or not recorded."""
    from stllava_eval.questions import PROMPTS, text

    asked = [row for row in rows if row["text"] is not None]
    if not asked:
        return NOT_RECORDED
    for preset in PROMPTS:
        if all(row["text"] == text(row, {"prompt": preset}) for row in asked):
            return preset
    return "custom"


def prompt_of(task: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """As `prompt_preset`, with a hash of the texts behind `custom`, which tells two such prompts apart."""
    preset = prompt_preset(rows)
    return preset if preset != "custom" else _custom(task, rows)


def data_hashes() -> dict[str, str]:
    """Per prepared data set, the hash of its test split's rows and decoded images."""
    from stllava_eval.datasets import DATASETS, read_manifest

    hashes = {}
    for name in DATASETS:
        try:
            manifest = read_manifest(name, "test")
        except InputError:  # not prepared, so no answer of it can be in a cache or a run
            continue
        hashes[name] = f"{manifest.sha256_rows} {manifest.sha256_pixels}"
    return hashes


def score_table(
    task: str,
    answers: Replies,
    prompt: str = NOT_RECORDED,
    settings: Mapping[str, Any] = MappingProxyType({}),
    split: str = "test",
) -> Scored:
    """Score final answers, by question id, against a prepared split of `task`.

    Failed requests of API adapters and missing ids are unanswered: counted and listed, in no mean. Of several replies
    to a question its score is their mean; the interval, over images, then holds both sources of spread, that of the
    questions and that of sampling (Miller, arXiv:2411.00640, section 3.1). Each draw's own means have the category
    `draw=N`.

    Args:
        task: Which was asked.
        answers: By question id.
        prompt: The preset that was asked, for the signature.
        settings: Those of `DECIDING` that are known, for the signature.
        split: Which was asked.

    Raises:
        InputError: The split is not prepared, or an id is not of it.
    """
    from stllava_eval.datasets import numbered_edition

    manifest, rows = _prepared(dataset_of(task), split)
    unknown = sorted(set(answers) - {row["id"] for row in rows})
    if unknown:
        counted = {str(number) for number in range(len(answers))}
        hint = " They look like row numbers, 0 to n-1." if answers.keys() == counted else ""
        raise InputError(
            f"{task}: {len(unknown)} unknown ids ({some(unknown)}).{hint} Ids are the data set's own, as in "
            f"{manifest['dataset']} {manifest['split']} ({manifest['edition']}), for example {rows[0]['id']}; "
            "--ignore-unknown leaves out those of other splits."
        )
    other = numbered_edition(dataset_of(task), manifest["split"], answers)
    if other is not None and other.name != manifest["edition"] and not manifest["sample"]:
        raise InputError(
            f"{task}: the {len(answers)} ids are the row numbers of the {other.name}, 0 to {other.rows - 1}, and "
            f"the {manifest['edition']} is asked, whose numbers are other questions. Prepare that edition; its "
            f"ids are {other.prefix}0 to {other.prefix}{other.rows - 1}."
        )
    return _score(task, rows, answers, manifest, prompt, settings)


def categories_of(row: Mapping[str, Any]) -> list[str]:
    """Those that a question is counted in: `field=value` of its data set, and `asks=...`."""
    from stllava_eval.categories import asks

    fields = [f"{name}={row[name]}" for name in row if name not in FIXED_FIELDS and row[name]]
    return fields + [f"asks={what}" for what in asks(row["question"])]


def question_scores(name: str, answers: Replies) -> dict[str, QuestionScores]:
    """Of each answered question of the prepared test split of data set `name`, by id, in the split's order.

    Raises:
        InputError: The split is not prepared.
    """
    return _question_scores(_prepared(name)[1], answers)


def _finals(given: str | Sequence[Final]) -> Sequence[Final]:
    return [Final(given)] if isinstance(given, str) else given


def _question_scores(rows: Iterable[Mapping[str, Any]], answers: Replies) -> dict[str, QuestionScores]:
    from stllava_eval.metrics import score_replies

    found = {}
    for row in rows:
        if (given := answers.get(row["id"])) is not None:
            scores = score_replies(_finals(given), row["reference"], row["kind"], row["question"])
            if scores:  # else every request failed
                found[row["id"]] = QuestionScores(row["image_id"], scores)
    return found


def _score(
    task: str,
    rows: Sequence[Mapping[str, Any]],
    answers: Replies,
    manifest: Mapping[str, Any],
    prompt: str,
    settings: Mapping[str, Any],
) -> Scored:
    from stllava_eval.metrics import SCORES
    from stllava_eval.statistics import mean_clustered

    questions = _question_scores(rows, answers)
    cells: dict[tuple[str, str], tuple[list[float], list[str]]] = defaultdict(lambda: ([], []))

    def count(group: str, of: QuestionScores) -> None:
        for metric, value in of.scores.items():
            values, images = cells[metric, group]
            values.append(value)
            images.append(of.image_id)

    for row in rows:
        if row["id"] in questions:
            for group in ["all", *categories_of(row)]:
                count(group, questions[row["id"]])
    draws = max((len(_finals(given)) for given in answers.values()), default=1)
    for draw in range(draws if draws > 1 else 0):
        alone = {name: _finals(given)[draw : draw + 1] for name, given in answers.items()}
        for of in _question_scores(rows, alone).values():
            count(f"draw={draw}", of)
    data = f"{manifest['dataset']} {manifest['split']} {manifest['edition']}"
    known = {"extract": SIGNATURES[FINAL], **settings}
    asked = "".join(
        f"|{name} {json.dumps(known[name]) if name == 'until' else known[name]}"
        for name in DECIDING
        if known.get(name) not in (None, []) and (name, known[name]) != ("draws", 1)
    )
    table = []
    for (metric, group), (values, images) in cells.items():
        estimate = mean_clustered(values, images)
        signature = f"{SCORES[metric].signature}|{data}|prompt {prompt}{asked}"
        table.append(
            ScoreRow(
                task,
                metric,
                signature,
                group,
                estimate.value,
                estimate.n,
                estimate.clusters,
                estimate.low,
                estimate.high,
            )
        )
    order = list(SCORES)
    table.sort(key=lambda row: (row.category != "all", row.category, order.index(row.metric)))
    unanswered = [row["id"] for row in rows if row["id"] not in questions]
    replies = [of for given in answers.values() for of in _finals(given)]
    return Scored(table, unanswered, questions, sum(map(_is_empty, replies)), _doubts(replies))


def _is_empty(final: Final) -> bool:
    """Return whether a reply ended and has no answer; one that was cut in its thought is counted apart."""
    return not final.cut and not final.answer.strip()


def _doubts(replies: Sequence[Final]) -> str:
    """A sentence where half of the replies or more (our choice) are empty, cut in their thought, or refusals."""
    from stllava_eval.metrics import is_failed_request, is_refusal

    asked = [final for final in replies if not is_failed_request(final.answer)]
    cut = sum(final.cut for final in asked)
    empty = sum(map(_is_empty, asked))
    refused = sum(is_refusal(final.answer) for final in asked)
    if not asked or 2 * (cut + empty + refused) < len(asked):
        return ""
    parts = [(cut, "cut in their thought"), (empty, "empty"), (refused, "refusals")]
    told = ", ".join(f"{count} {what}" for count, what in parts if count)
    return (
        f"of {len(asked)} replies {told}: these scores may say little about the model. Look at `reply` in "
        "answers.jsonl; a longer max_new_tokens lets a thought end."
    )


def _prepared(name: str, split: str = "test") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The manifest and the rows, without images, of a prepared split."""
    from stllava_eval.datasets import read_manifest, read_split

    return asdict(read_manifest(name, split)), read_split(name, split, images=False).to_list()


def split_rows(name: str, split: str = "test") -> list[dict[str, Any]]:
    """The rows of a prepared split, without images, in its order.

    Raises:
        InputError: The split is not prepared.
    """
    return _prepared(name, split)[1]


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
        told = ", ".join(f"{images} for {task}" for task, images in shown.items())
        raise InputError(f"{folder}: one run is of one kind of images, not of {told}. Score them into two folders.")
    hold(folder)
    refuse_old_folder(folder)  # another process may have written it before it let go
    rows = []
    for task, of_task in answers.items():
        lacking = final_answer(f"{NOT_ASKED} {files[task].name} has no answer", rule=NONE)
        rows += [
            answered(task, row, of_task.texts.get(row["id"]), final, extract=of_task.settings["extract"], draw=draw)
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
    for of in known.values():
        for name in ("extract", "images", "draws"):
            of.pop(name, None)
    return write_run(rows, decided_by, folder=folder, asked_with=known)


def refuse_old_folder(folder: Path | None = None) -> None:
    """Called before any answer is made: the folder (default: `$STLLAVA_RUN`) must be a place for a new run.

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
    """A folder for one run, held until this process ends: `$STLLAVA_RUN`, else one that nobody else has made.

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
    """Of an installed package; None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of our own checkout, with `+changes` if files differ from it; None for an installed wheel."""
    top = Path(__file__).resolve().parent.parent
    if not (top / ".git").exists():
        return None
    try:
        head = subprocess.run(["git", "-C", top, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "-C", top, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def some(ids: Sequence[str]) -> str:
    """The first ten ids, and how many more there are."""
    return ", ".join(id if len(id) <= 80 else f"{id[:77]}..." for id in ids[:10]) + (
        f" and {len(ids) - 10} more" if len(ids) > 10 else ""
    )
