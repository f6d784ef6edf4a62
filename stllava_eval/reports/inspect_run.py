"""Show where a run errs: by what is asked, between questions that must agree, and beside answers without an image.

It takes the rows of a board (`board_rows.py`); the page shows the same tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stllava_eval.errors import printable
from stllava_eval.reports.board_rows import BoardRow, questions
from stllava_eval.reports.cells import NOTICE
from stllava_eval.reports.leaderboard import SAMPLE, reply_remarks
from stllava_eval.runs.scores import QuestionScores, ScoreRow, dataset_of, split_rows
from stllava_eval.scoring.categories import opposites, paraphrases
from stllava_eval.scoring.final_answer import is_failed_request
from stllava_eval.scoring.image_blind import PRIOR
from stllava_eval.scoring.metrics import f1, recall
from stllava_eval.scoring.statistics import bootstrap_clustered
from stllava_eval.scoring.verdict import chosen, verdict
from stllava_eval.scoring.words import folded_words

INSPECTED = ("recall", "f1", "closed_accuracy", "unparsed", "cut")  # the clean scores, and what goes wrong without one


@dataclass(frozen=True)
class Consistency:
    """How often the answers to two questions fit each other; shares in [0, 1], interval clustered by image."""

    what: str
    value: float
    low: float | None
    high: float | None
    pairs: int
    images: int
    both_right: float
    """Share of pairs in which both answers are right; an open answer is if it has all the reference's words."""


@dataclass(frozen=True)
class BlindShare:
    """How much of a score answers without an image reach, on the questions that the run answered."""

    metric: str
    value: float
    best: float
    best_of: str
    """The image-blind answers with the highest score."""
    prior: float | None
    """What the commonest training answer to each question reaches; None if no training split is prepared."""


@dataclass(frozen=True)
class Inspection:
    """Where one run errs on one task."""

    task: str
    run: str
    data: str
    overall: dict[str, ScoreRow]
    categories: list[ScoreRow]
    consistency: list[Consistency]
    blind: list[BlindShare]
    stopped: str
    """A remark on replies that were stopped at their limit of new tokens, and on doubtful means; may be empty."""


def inspect(rows: Sequence[BoardRow]) -> list[Inspection]:
    """Return an inspection of each measured row of a board: of each run and task that was shown its own images.

    Raises:
        InputError: A split is not prepared.
    """
    made = []
    for row in rows:
        if row.kind != "measured" or row.scored is None:
            continue
        blind = [other for other in rows if _is_blind_to(other, row)]
        # an answer that was cut off in its thought says nothing about consistency
        whole = {id: answer for id, answer in row.answers.items() if not _is_cut(questions(row).get(id))}
        shares = []
        for metric in INSPECTED[:3]:
            if metric in row.scores:
                shares += _share(row, metric, blind)
        made.append(
            Inspection(
                row.task,
                row.system,
                row.data,
                {metric: row.scores[metric] for metric in INSPECTED if metric in row.scores},
                [score for score in row.scored.rows if score.category != "all" and score.metric in INSPECTED],
                _consistency(row.task, whole),
                shares,
                " ".join(reply_remarks(row)),
            )
        )
    return made


def _is_blind_to(other: BoardRow, row: BoardRow) -> bool:
    """Return whether a row is image-blind answers that `row` is compared with: a baseline, or of the same weights."""
    has_weights = other.about.get("sha256") in (None, row.about.get("sha256"))
    return other.kind == "blind" and other.task == row.task and has_weights


def _is_cut(scored: QuestionScores | None) -> bool:
    return scored is not None and scored.scores["cut"] > 0


def _share(row: BoardRow, metric: str, blind: Sequence[BoardRow]) -> list[BlindShare]:
    """Return the image-blind share of one score; empty if no image-blind answers are on the board."""
    asked = [id for id, scored in questions(row).items() if metric in scored.scores]
    values = {
        blind_row.system: math.fsum(questions(blind_row)[id].scores[metric] for id in asked) / len(asked)
        for blind_row in blind
        if all(id in questions(blind_row) for id in asked)
    }
    if not values:
        return []
    best_of = max(values, key=lambda name: values[name])
    return [BlindShare(metric, row.scores[metric].value or 0.0, values[best_of], best_of, values.get(PRIOR))]


def _consistency(task: str, answers: Mapping[str, str]) -> list[Consistency]:
    """Return how often answers fit each other: to paraphrases of one question, and to opposite questions.

    Questions without an answer, and those whose reference has no words, are left out.
    """
    rows = {
        row["id"]: row
        for row in split_rows(dataset_of(task))
        if row["id"] in answers and not is_failed_request(answers[row["id"]]) and folded_words(row["reference"])
    }

    def option(id: str) -> str | None:
        return chosen(answers[id], rows[id]["reference"], rows[id]["question"])

    def right(id: str) -> bool:
        row = rows[id]
        if row["kind"] == "closed":
            return verdict(answers[id], row["reference"], row["question"]) == "right"
        return recall(answers[id], row["reference"]) == 1

    def agree(first: str, second: str) -> float:
        if rows[first]["kind"] == "closed":
            return float(option(first) == option(second) is not None)
        if not folded_words(answers[second]):  # F1 is undefined without words in its reference
            return float(not folded_words(answers[first]))
        return f1(answers[first], answers[second])

    def contradict(first: str, second: str) -> float:
        return float(None not in (option(first), option(second)) and option(first) != option(second))

    restated = paraphrases(dataset_of(task), list(rows.values()))
    by_kind = {kind: [pair for pair in restated if rows[pair[0]]["kind"] == kind] for kind in ("closed", "open")}
    made = []
    for what, pairs, score in (
        ("paraphrases, closed: the same option", by_kind["closed"], agree),
        ("paraphrases, open: F1 of one answer to the other", by_kind["open"], agree),
        ("opposites: one yes, one no", opposites(list(rows.values())), contradict),
    ):
        if not pairs:
            continue
        values = [score(*pair) for pair in pairs]
        estimate = bootstrap_clustered(values, [rows[first]["image_id"] for first, _ in pairs])
        both_right = sum(right(first) and right(second) for first, second in pairs) / len(pairs)
        value = math.fsum(values) / len(values)
        made.append(Consistency(what, value, estimate.low, estimate.high, len(pairs), estimate.clusters, both_right))
    return made


def is_worse(row: ScoreRow, overall: Mapping[str, ScoreRow]) -> bool:
    """Return whether a category's whole interval is worse than the overall mean."""
    whole = overall[row.metric].value
    if whole is None or row.low is None or row.high is None:
        return False
    return row.low > whole if row.metric in ("unparsed", "cut") else row.high < whole


def inspect_text(inspections: Sequence[Inspection]) -> str:
    """Return the inspections as tables for a terminal."""
    from tabulate import tabulate

    def table(body: Iterable[Sequence[Any]], heads: Sequence[str]) -> str:
        return tabulate(list(body), heads, tablefmt="simple", disable_numparse=True)

    parts = []
    for inspection in inspections:
        parts.append(
            f"{printable(inspection.task)} ({inspection.data}): {printable(inspection.run)}"
            + (f"\n{SAMPLE}" if inspection.data == "sample" else "")
            + (f"\n{printable(inspection.stopped)}" if inspection.stopped else "")
        )
        cells: dict[str, dict[str, ScoreRow]] = {}
        for row in inspection.categories:
            cells.setdefault(row.category, {})[row.metric] = row
        metrics = [metric for metric in INSPECTED if metric in inspection.overall]
        body = [["all", *(_cell(inspection.overall.get(metric), inspection) for metric in metrics)]]
        body += [
            [printable(name), *(_cell(scores.get(metric), inspection) for metric in metrics)]
            for name, scores in cells.items()
        ]
        parts.append(table(body, ["questions", *metrics]))
        if inspection.consistency:
            body = [consistency_cells(consistency) for consistency in inspection.consistency]
            parts.append(table(body, ["pairs of questions", "consistent [95 %]", "both right", "pairs", "images"]))
        body = [
            [
                share.metric,
                share_text(share.value),
                "" if share.prior is None else share_text(share.prior),
                share_text(share.best),
                printable(share.best_of),
            ]
            for share in inspection.blind
        ]
        parts.append(table(body, ["score", "this run", "commonest answer", "best without the image", "which is"]))
    how = (
        "Scores x100 with 95 % intervals clustered by image, and n. < marks a category whose whole interval is "
        "worse than the mean, not adjusted for the number of categories."
    )
    return "\n\n".join([*parts, f"{how}\n{NOTICE}"])


def consistency_cells(consistency: Consistency) -> list[str]:
    """Return the cells of the table of consistency, as text."""
    return [
        consistency.what,
        share_text(consistency.value) + interval_text(consistency.low, consistency.high),
        share_text(consistency.both_right),
        str(consistency.pairs),
        str(consistency.images),
    ]


def _cell(row: ScoreRow | None, inspection: Inspection) -> str:
    if row is None or row.value is None:
        return ""
    text = f"{share_text(row.value)}{interval_text(row.low, row.high)} n {row.n}"
    return f"{text} <" if is_worse(row, inspection.overall) else text


def share_text(value: float) -> str:
    """Return a share as `leaderboard.mean_text` shows it: x100 with two decimals."""
    return f"{100 * value:.2f}"


def interval_text(low: float | None, high: float | None) -> str:
    """Return an interval of shares as every board, file and page shows it: x100, whole; nothing where there is none."""
    return "" if low is None or high is None else f" [{100 * low:.0f}, {100 * high:.0f}]"
