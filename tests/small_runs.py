"""Answers -> a run folder of the small prepared sets, as the harness writes it."""

from collections.abc import Callable, Mapping
from pathlib import Path

from stllava_eval.runs.folder import answer_row, write_run
from stllava_eval.runs.scores import dataset_of, split_rows
from stllava_eval.scoring.final_answer import final_answers

Say = Callable[[Mapping[str, str]], str | None]


def small_run(
    folder: Path,
    say: Say,
    tasks: tuple[str, ...] = ("vqarad",),
    asked: dict[str, object] | None = None,
    **decided: object,
) -> Path:
    """`say` gives the reply to a row of the test split, or None for a question that was not asked."""
    rows = [
        answer_row(task, row, row["question"], final, extract=str((asked or {}).get("extract", "final-v1")))
        for task in tasks
        for row in split_rows(dataset_of(task))
        if (answer := say(row)) is not None
        for final in final_answers([answer], row["question"], "final")
    ]
    checkpoint = {"name": f"checkpoints/{folder.name}", "sha256": folder.name * 4, "trained_on": None}
    decided = {"model": "stllava_med", "checkpoint": checkpoint, "images": "own", "decoding": "greedy", **decided}
    answering = {"questions": len(rows), "seconds": 2.0}
    asked_with = {task: asked or {} for task in tasks}
    return write_run(rows, decided, answering=answering, folder=folder, asked_with=asked_with)


def right(row: Mapping[str, str]) -> str:
    """The reference."""
    return row["reference"]


def always(answer: str) -> Say:
    """The same to every question."""
    return lambda row: answer
