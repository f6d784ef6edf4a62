"""Run folders -> a table of their scores beside image-blind baselines, every mean with n and its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stllava_eval.errors import InputError, printable
from stllava_eval.runs import Scored, ScoreRow, dataset_of, read_run, score_table

OPEN = ("recall_llavamed", "f1_llavamed", "recall", "f1")
CLOSED = ("closed_llavamed", "closed_llavamed_batch", "closed_accuracy")
NOTICE = "Research only; not for clinical use."


@dataclass(frozen=True)
class BoardRow:
    """One system on one task: its scores over all questions, by metric."""

    task: str
    system: str
    blind: bool
    data: str  # "official", "sample", or the edition's name
    scores: dict[str, ScoreRow]
    unanswered: int


def board(runs: Sequence[Path], tasks: Sequence[str] | None = None) -> list[BoardRow]:
    """The rows of each task: the runs in the order given, then the image-blind baselines.

    A run that did not ask every question of a task (`--limit`) is scored on those it asked, so its n is smaller.

    Raises:
        InputError: A folder is no run, or a task's test split is not prepared or has changed since the run.
    """
    from stllava_eval.blind import blind_answers
    from stllava_eval.datasets import DATASETS, read_manifest

    read = [(folder, read_run(folder)) for folder in runs]
    if tasks is None:
        tasks = list(dict.fromkeys(task for _, run in read for task in run))
    if not tasks:
        tasks = [name for name in DATASETS if _is_prepared(name)]
    if not tasks:
        raise InputError("no data is prepared. Run `stllava-eval prepare --sample`, or prepare an official split.")
    rows = []
    for task in tasks:
        prepared = read_manifest(dataset_of(task), "test")
        data = "sample" if prepared.sample else "official" if prepared.official else prepared.edition
        for folder, run in read:
            if task not in run:
                continue
            of = run[task]
            if (of.sha256_rows, of.sha256_pixels) != (prepared.sha256_rows, prepared.sha256_pixels):
                raise InputError(
                    f"{folder}: its {task} is {of.edition}, but {prepared.edition} is prepared now, with other rows or "
                    "images. Prepare the run's split again, or run again."
                )
            scored = score_table(task, of.answers, of.prompt)
            rows.append(_row(task, folder.name, False, data, scored, len(scored.unanswered) - of.not_asked))
        for label, blind in blind_answers(dataset_of(task)).items():
            rows.append(_row(task, label, True, data, score_table(task, blind), 0))
    return rows


def board_text(rows: Sequence[BoardRow]) -> str:
    """The board for a terminal, one table a task, scores x100."""
    from tabulate import tabulate

    parts = []
    for task in dict.fromkeys(row.task for row in rows):
        of_task = [row for row in rows if row.task == task]
        head, *_ = of_task
        open_n, closed_n = _count(of_task, "recall"), _count(of_task, "closed_accuracy")
        images = max((score.images for row in of_task for score in row.scores.values()), default=0)
        title = f"{printable(task)} ({head.data}): {open_n} open + {closed_n} closed questions, {images} images"
        if head.data == "sample":
            title += "\nSAMPLE DATA: these scores say nothing about the official data set."
        columns = [*OPEN, "words", *CLOSED, "unparsed"]
        heads = ["", *(name.replace("_", "\n", 1) for name in columns)]  # two lines each, or the table is too wide
        body = [
            [
                printable(row.system) + (" (blind)" if row.blind else ""),
                *(_cell(row.scores.get(name)) for name in columns),
            ]
            for row in of_task
        ]
        parts.append(f"{title}\n\n{tabulate(body, heads, tablefmt='simple', disable_numparse=True, stralign='right')}")
        if short := [row for row in of_task if _n(row) < open_n + closed_n or row.unanswered]:
            parts.append(
                "\n".join(
                    f"{printable(row.system)}: scored on {_n(row)} of {open_n + closed_n} questions, "
                    f"{row.unanswered} unanswered"
                    for row in short
                )
            )
    note = "Scores x100 with 95 % intervals clustered by image; words: mean per answer; unparsed: % of closed."
    return "\n\n".join([*parts, f"{note}\n{NOTICE}"])


def score_text(scored: Scored) -> str:
    """One task's scores for a terminal: overall, then by category."""
    from tabulate import tabulate

    body = [[printable(row.category), row.metric, _cell(row), row.n, row.images] for row in scored.rows]
    table = tabulate(
        body, ["questions", "score", "value [95 %]", "n", "images"], tablefmt="simple", disable_numparse=True
    )
    return f"{table}\n\nunanswered: {len(scored.unanswered)}\n{NOTICE}"


def _is_prepared(name: str) -> bool:
    from stllava_eval.datasets import read_manifest

    try:
        read_manifest(name, "test")
    except InputError:
        return False
    return True


def _row(task: str, system: str, blind: bool, data: str, scored: Scored, unanswered: int) -> BoardRow:
    overall = {row.metric: row for row in scored.rows if row.category == "all"}
    return BoardRow(task, system, blind, data, overall, unanswered)


def _n(row: BoardRow) -> int:
    return sum(row.scores[name].n for name in ("recall", "closed_accuracy") if name in row.scores)


def _count(rows: Sequence[BoardRow], metric: str) -> int:
    return max((row.scores[metric].n for row in rows if metric in row.scores), default=0)


def _cell(score: ScoreRow | None) -> str:
    if score is None or score.value is None:
        return "-"
    if score.metric == "words":
        return f"{score.value:.1f}"
    if score.low is None or score.high is None or score.metric == "unparsed":
        return f"{100 * score.value:.2f}"
    return f"{100 * score.value:.2f} [{100 * score.low:.0f}, {100 * score.high:.0f}]"
