"""A run -> where it errs: by what is asked, between questions that must agree, and beside answers without an image."""

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
from stllava_eval.scoring.image_blind import PRIOR
from stllava_eval.scoring.statistics import bootstrap_clustered

INSPECTED = ("recall", "f1", "closed_accuracy", "unparsed", "cut")


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
    """Share of pairs in which both answers are right; of open questions: have all the reference's words."""


@dataclass(frozen=True)
class BlindShare:
    """How much of a score answers without an image reach, on the questions that the run answered."""

    metric: str
    value: float
    best: float
    best_of: str
    """The image-blind answers that reach most."""
    prior: float | None
    """What the commonest training answer to each question reaches; None where no training split is at hand."""


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
    """How many replies were stopped at their limit of new tokens, and what makes the means doubtful; empty if none."""


def inspect(rows: Sequence[BoardRow]) -> list[Inspection]:
    """Return an inspection of each measured row of a board: of each run and task that was shown its own images.

    Raises:
        InputError: A split is not prepared.
    """
    made = []
    for row in rows:
        if row.kind != "measured" or row.scored is None:
            continue
        blind = [
            one
            for one in rows
            if one.kind == "blind"
            and one.task == row.task
            and one.about.get("sha256") in (None, row.about.get("sha256"))
        ]
        made.append(
            Inspection(
                row.task,
                row.system,
                row.data,
                {metric: row.scores[metric] for metric in INSPECTED if metric in row.scores},
                [one for one in row.scored.rows if one.category != "all" and one.metric in INSPECTED],
                _consistency(
                    row.task, {id: said for id, said in row.answers.items() if not _is_cut(questions(row).get(id))}
                ),
                [of for metric in INSPECTED[:3] if metric in row.scores for of in _share(row, metric, blind)],
                " ".join(reply_remarks(row)),
            )
        )
    return made


def _is_cut(of: QuestionScores | None) -> bool:
    return of is not None and of.scores["cut"] > 0


def _share(row: BoardRow, metric: str, blind: Sequence[BoardRow]) -> list[BlindShare]:
    """Return the image-blind share of one score; empty if no image-blind answers are on the board."""
    asked = [id for id, of in questions(row).items() if metric in of.scores]
    values = {
        one.system: math.fsum(questions(one)[id].scores[metric] for id in asked) / len(asked)
        for one in blind
        if all(id in questions(one) for id in asked)
    }
    if not values:
        return []
    best_of = max(values, key=lambda name: values[name])
    return [BlindShare(metric, row.scores[metric].value or 0.0, values[best_of], best_of, values.get(PRIOR))]


def _consistency(task: str, answers: Mapping[str, str]) -> list[Consistency]:
    from stllava_eval.scoring import final_answer, metrics, verdict, words

    rows = {
        row["id"]: row
        for row in split_rows(dataset_of(task))
        if row["id"] in answers
        and not final_answer.is_failed_request(answers[row["id"]])
        and words.folded_words(row["reference"])
    }

    def chosen(id: str) -> str | None:
        return verdict.chosen(answers[id], rows[id]["reference"], rows[id]["question"])

    def right(id: str) -> bool:
        row = rows[id]
        if row["kind"] == "closed":
            return verdict.verdict(answers[id], row["reference"], row["question"]) == "right"
        return metrics.recall(answers[id], row["reference"]) == 1

    def alike(one: str, other: str) -> float:
        if rows[one]["kind"] == "closed":
            return float(chosen(one) == chosen(other) is not None)
        if not words.folded_words(answers[other]):
            return float(not words.folded_words(answers[one]))
        return metrics.f1(answers[one], answers[other])

    def apart(one: str, other: str) -> float:
        return float(None not in (chosen(one), chosen(other)) and chosen(one) != chosen(other))

    restated = paraphrases(dataset_of(task), list(rows.values()))
    by_kind = {kind: [pair for pair in restated if rows[pair[0]]["kind"] == kind] for kind in ("closed", "open")}
    made = []
    for what, pairs, score in (
        ("paraphrases, closed: the same option", by_kind["closed"], alike),
        ("paraphrases, open: F1 of one answer to the other", by_kind["open"], alike),
        ("opposites: one yes, one no", opposites(list(rows.values())), apart),
    ):
        if not pairs:
            continue
        values = [score(*pair) for pair in pairs]
        estimate = bootstrap_clustered(values, [rows[one]["image_id"] for one, _ in pairs])
        both = sum(right(one) and right(other) for one, other in pairs) / len(pairs)
        value = math.fsum(values) / len(values)
        made.append(Consistency(what, value, estimate.low, estimate.high, len(pairs), estimate.clusters, both))
    return made


def is_worse(row: ScoreRow, overall: Mapping[str, ScoreRow]) -> bool:
    """Return whether a category's whole interval is worse than the overall mean."""
    whole = overall[row.metric].value
    if whole is None or row.low is None or row.high is None:
        return False
    return row.low > whole if row.metric in ("unparsed", "cut") else row.high < whole


def inspect_text(found: Sequence[Inspection]) -> str:
    """Return the inspections as tables for a terminal."""
    from tabulate import tabulate

    def table(body: Iterable[Sequence[Any]], heads: Sequence[str]) -> str:
        return tabulate(list(body), heads, tablefmt="simple", disable_numparse=True)

    parts = []
    for one in found:
        parts.append(
            f"{printable(one.task)} ({one.data}): {printable(one.run)}"
            + (f"\n{SAMPLE}" if one.data == "sample" else "")
            + (f"\n{printable(one.stopped)}" if one.stopped else "")
        )
        cells: dict[str, dict[str, ScoreRow]] = {}
        for row in one.categories:
            cells.setdefault(row.category, {})[row.metric] = row
        metrics = [metric for metric in INSPECTED if metric in one.overall]
        body = [["all", *(_cell(one.overall.get(metric), one) for metric in metrics)]]
        body += [[printable(name), *(_cell(of.get(metric), one) for metric in metrics)] for name, of in cells.items()]
        parts.append(table(body, ["questions", *metrics]))
        if one.consistency:
            body = [
                [
                    of.what,
                    f"{share_text(of.value)}{interval_text(of.low, of.high)}",
                    share_text(of.both_right),
                    str(of.pairs),
                    str(of.images),
                ]
                for of in one.consistency
            ]
            parts.append(table(body, ["pairs of questions", "consistent [95 %]", "both right", "pairs", "images"]))
        body = [
            [
                of.metric,
                share_text(of.value),
                "" if of.prior is None else share_text(of.prior),
                share_text(of.best),
                printable(of.best_of),
            ]
            for of in one.blind
        ]
        parts.append(table(body, ["score", "this run", "commonest answer", "best without the image", "which is"]))
    how = (
        "Scores x100 with 95 % intervals clustered by image, and n. < marks a category whose whole interval is "
        "worse than the mean, not adjusted for the number of categories."
    )
    return "\n\n".join([*parts, f"{how}\n{NOTICE}"])


def _cell(row: ScoreRow | None, of: Inspection) -> str:
    if row is None or row.value is None:
        return ""
    text = f"{share_text(row.value)}{interval_text(row.low, row.high)} n {row.n}"
    return f"{text} <" if is_worse(row, of.overall) else text


def share_text(value: float) -> str:
    """Return a share as `leaderboard.mean_text` shows it: x100 with two decimals."""
    return f"{100 * value:.2f}"


def interval_text(low: float | None, high: float | None) -> str:
    """Return an interval of shares as every board, file and page shows it: x100, whole; nothing where there is none."""
    return "" if low is None or high is None else f" [{100 * low:.0f}, {100 * high:.0f}]"
