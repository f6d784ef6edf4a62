"""Two runs on the same questions -> by how much the second differs, and whether that is more than chance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stllava_eval.errors import InputError, printable
from stllava_eval.runs import dataset_of, question_scores, read_run
from stllava_eval.statistics import bootstrap_clustered, holm, sign_flip

METRICS = ("recall", "f1", "closed_accuracy")  # the clean family: the published scores can be had without an image


@dataclass(frozen=True)
class Difference:
    """Of one score of one task: the second run's mean less the first's, over the questions that both answered.

    `value`, `low`, `high` are shares in [-1, 1]; the 95 % interval is of 10,000 draws of images. `p` is that of a test
    that flips the sign of images' differences, `p_holm` the same adjusted for all the tests of one comparison.
    """

    task: str
    metric: str
    first: float
    second: float
    value: float
    low: float | None
    high: float | None
    n: int
    images: int
    p: float
    p_holm: float


def compare(first: Path, second: Path) -> list[Difference]:
    """The differences of every task that both runs have.

    Raises:
        InputError: A folder is no run, they share no task, or a task's questions, images or prompt differ.
    """
    runs = [read_run(folder) for folder in (first, second)]
    shared = [task for task in runs[0] if task in runs[1]]
    if not shared:
        raise InputError(f"{first} and {second}: no task is in both. Run the same tasks with both.")
    found = []
    for task in shared:
        one, other = (run[task] for run in runs)
        for what in ("sha256_rows", "sha256_pixels", "prompt"):
            if getattr(one, what) != getattr(other, what):
                raise InputError(
                    f"{task}: {what} is {getattr(one, what)[:16]} in {first} and {getattr(other, what)[:16]} in "
                    f"{second}. Only runs on the same questions, images and prompt can be compared: run one again."
                )
        of_one, of_other = (question_scores(dataset_of(task), run.answers) for run in (one, other))
        for metric in METRICS:
            both = [id for id, asked in of_one.items() if id in of_other and metric in asked.scores]
            if not both:
                continue  # a task may have questions of one kind alone
            before, after = ([of[id].scores[metric] for id in both] for of in (of_one, of_other))
            images = [of_one[id].image_id for id in both]
            changes = [late - early for early, late in zip(before, after, strict=True)]
            estimate = bootstrap_clustered(changes, images)
            found.append(
                Difference(
                    task,
                    metric,
                    first=sum(before) / len(both),
                    second=sum(after) / len(both),
                    value=sum(changes) / len(changes),
                    low=estimate.low,
                    high=estimate.high,
                    n=estimate.n,
                    images=estimate.clusters,
                    p=sign_flip(changes, images),
                    p_holm=1.0,
                )
            )
    if not found:
        raise InputError(f"{first} and {second}: no question is answered in both. Run the same questions with both.")
    adjusted = holm([one.p for one in found])
    return [Difference(**{**vars(one), "p_holm": p}) for one, p in zip(found, adjusted, strict=True)]


def compare_text(first: Path, second: Path, found: Sequence[Difference]) -> str:
    """The differences for a terminal, x100."""
    from tabulate import tabulate

    from stllava_eval.leaderboard import NOTICE

    body = [
        [
            printable(one.task),
            one.metric,
            f"{100 * one.first:.1f}",
            f"{100 * one.second:.1f}",
            f"{100 * one.value:+.1f}{_interval(one)}",
            f"{one.p:.3f}",
            f"{one.p_holm:.3f}",
            one.n,
            one.images,
        ]
        for one in found
    ]
    heads = [
        "",
        "score",
        printable(first.name),
        printable(second.name),
        "difference [95 %]",
        "p",
        "p, Holm",
        "n",
        "images",
    ]
    table = tabulate(body, heads, tablefmt="simple", disable_numparse=True)
    notes = "".join(f"{note}\n" for note in differences(first, second))
    how = "Intervals: draws of images; p: signs of images' differences flipped; Holm: over the"
    return f"{table}\n\n{notes}Scores x100. {how} {len(found)} tests shown.\n{NOTICE}"


def _interval(one: Difference) -> str:
    return "" if one.low is None or one.high is None else f" [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"


SETTINGS = ("images", "prompt", "image_preprocessing", "decoding", "dtype", "four_bit")


def differences(first: Path, second: Path) -> list[str]:
    """What a reader has to know besides: questions that only one run answers, settings in which they differ."""
    notes = []
    runs = [read_run(folder) for folder in (first, second)]
    for task in (task for task in runs[0] if task in runs[1]):
        one, other = (question_scores(dataset_of(task), run[task].answers).keys() for run in runs)
        every = len(runs[0][task].answers) + runs[0][task].not_asked
        if (both := len(one & other)) < every:
            notes.append(f"{printable(task)}: compared on {both} of {every} questions; the others lack in a run.")
    manifests = [json.loads((folder / "run.json").read_text(encoding="utf-8")) for folder in (first, second)]
    for name in SETTINGS:
        values = [manifest.get(name) for manifest in manifests]
        if values[0] != values[1]:
            notes.append(printable(f"{name} differs: {values[0]!r} and {values[1]!r}"))
    return notes
