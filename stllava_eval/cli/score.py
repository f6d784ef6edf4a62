"""`stllava-eval score`: score answers that are in a file or in a run folder."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from stllava_eval.cli.options import (
    IMAGES,
    PROMPTS,
    TASKS,
    add_command,
    show,
    show_errors,
    show_json,
)
from stllava_eval.errors import InputError


def add_score(commands: Any) -> None:
    """Add `stllava-eval score` to the commands."""
    score = add_command(
        commands.add_parser,
        name="score",
        help="score a file of answers, without a model",
        description="Score a file of answers (JSON lines, a JSON array, CSV, TSV, Parquet, xlsx) against the prepared "
        "test split. A row has id and answer, or question_id and text (LLaVA family), or another known field of the "
        "answer; lmms-eval's samples are read too. Ids are the data set's own, and a question, reference or image in a "
        "row must match its id. MedEvalKit's and VLMEvalKit's files have no ids and are read by question and "
        "reference (docs/evaluate/answer-files.md).",
        examples=[
            "stllava-eval score --task vqarad --answers runs/a/answers.jsonl",
            "stllava-eval score --task slake --answers samples_slake.jsonl --json",
            "stllava-eval score --task vqarad --answers a.jsonl --task slake --answers b.jsonl --out runs/medvint",
        ],
    )
    score.add_argument(
        "--task",
        required=True,
        action="append",
        choices=TASKS[:-1],
        metavar="TASK",
        help="the task that was answered; may be given several times, each with a file of answers",
    )
    score.add_argument("--answers", required=True, action="append", type=Path, metavar="FILE", help="file of answers")
    _add_reading(score)
    _add_output(score)
    score.set_defaults(command=_score)


def _add_reading(score: argparse.ArgumentParser) -> None:
    """Add the options that say what a file of answers does not say by itself."""
    score.add_argument(
        "--extract",
        choices=("final", "none"),
        help="take the final answer out of each reply (thoughts, tags, boxes, ...; docs/evaluate/answers.md), or score "
        "replies as they are (default: final; of a run folder's answers, what the run did)",
    )
    score.add_argument(
        "--answer-field",
        metavar="NAME",
        help="field with the model's answer (default: the only one that can be meant)",
    )
    score.add_argument(
        "--id-field", metavar="NAME", help="field with the question's id (default: id, question_id, qid)"
    )
    score.add_argument(
        "--ignore-unknown",
        action="store_true",
        help="leave out rows whose question the split does not have (default: refuse them)",
    )
    score.add_argument(
        "--split",
        default="test",
        help="the prepared split that was asked; test@NAME is an edition that is not in use (default: test)",
    )
    score.add_argument(
        "--prompt",
        choices=PROMPTS,
        help="prompt that was asked, for the signature (default: what the file or the task's name says, else "
        '"not recorded")',
    )
    score.add_argument(
        "--images",
        choices=IMAGES,
        help="images that were shown: own, another question's, black (default: what a run folder says, else "
        '"not recorded")',
    )


def _add_output(score: argparse.ArgumentParser) -> None:
    """Add the options that say what is written and printed."""
    score.add_argument(
        "--out", type=Path, metavar="RUN", help="write a run folder too, for leaderboard, compare, inspect and gate"
    )
    score.add_argument(
        "--system",
        metavar="NAME",
        help="the system that gave the answers, as boards name it (default: the file's name)",
    )
    score.add_argument(
        "--details",
        action="store_true",
        help="print the scores of every category too (default: those over all questions)",
    )
    score.add_argument(
        "--json", action="store_true", help="print value, n, images, low and high of every score as JSON"
    )


def _score(arguments: argparse.Namespace) -> int:
    files = _files_by_task(arguments)
    from stllava_eval.reports.leaderboard import score_text  # with numpy
    from stllava_eval.runs.answer_fields import Reading
    from stllava_eval.runs.score_files import score_files  # with numpy

    reading = Reading(**{field.name: getattr(arguments, field.name) for field in fields(Reading)})
    scored = score_files(files, reading)
    for note in scored.notes(with_doubts=arguments.out is None):  # writing a run folder logs its doubts
        show_errors(note)
    if arguments.out is not None:
        show_errors(f"run folder: {scored.write_run(arguments.out, arguments.system)}")
    if arguments.json:
        show_json(scored.as_json())
    else:
        show("\n\n".join(score_text(table, arguments.details) for table in scored.tables.values()))
    return 0


def _files_by_task(arguments: argparse.Namespace) -> dict[str, Path]:
    """Return the file of answers of each task; raises InputError where the options do not fit each other."""
    tasks, files = arguments.task, arguments.answers
    if len(tasks) != len(files) or len(set(tasks)) < len(tasks):
        raise InputError(
            f"{len(tasks)} --task and {len(files)} --answers: name each task once, with its file of answers behind it."
        )
    if arguments.system and arguments.out is None:
        raise InputError("--system names a run folder's system. Pass --out too, or leave it out.")
    if arguments.out is not None and arguments.split != "test":
        raise InputError(f"--out with --split {arguments.split}: a run folder is of the test split. Leave --out out.")
    return dict(zip(tasks, files, strict=True))
