"""Runs on the same questions -> by how much they differ from the first, and whether that is more than chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stllava_eval.errors import InputError, printable
from stllava_eval.reports.cells import NOTICE
from stllava_eval.runs.folder import Run, RunTask, labels, open_run, refuse_other_split
from stllava_eval.runs.scores import DECIDING, QuestionScores, dataset_of, question_scores
from stllava_eval.scoring.statistics import (
    Estimate,
    bootstrap_clustered,
    detectable,
    holm,
    mcnemar,
    mean_clustered,
    sign_flip,
)

METRICS = ("recall", "f1", "closed_accuracy")  # the clean family: the published scores can be had without an image


@dataclass(frozen=True)
class Difference:
    """Of one score of one task: a run's mean less the first run's, over the questions that both answered.

    `value`, `low`, `high` are shares in [-1, 1]; the 95 % interval is of 10,000 draws of images. `p` is that of a test
    that flips the sign of images' differences, `p_holm` the same adjusted for all the tests of one comparison. Of
    closed questions with one reply each, `p_mcnemar` is the exact test that takes questions as independent.
    """

    task: str
    metric: str
    baseline: str
    run: str
    first: float
    second: float
    value: float
    low: float | None
    high: float | None
    n: int
    images: int
    p: float
    p_holm: float
    p_mcnemar: float | None
    standard_error: float | None
    """Of `value`, clustered by image."""


@dataclass(frozen=True)
class Comparison:
    """Runs beside the first of them."""

    runs: list[str]
    differences: list[Difference]
    notes: dict[str, list[str]]
    """By run, what a reader has to know besides: questions that only one of the two answers, settings that differ."""


@dataclass(frozen=True)
class Paired:
    """One score of the questions that two runs answered, in the split's order."""

    first: list[float]
    second: list[float]
    images: list[str]

    @property
    def changes(self) -> list[float]:
        """Second less first."""
        return [late - early for early, late in zip(self.first, self.second, strict=True)]


def compare(folders: Sequence[Path]) -> Comparison:
    """Return the differences of every later run from the first, for every task that both have.

    Raises:
        InputError: A folder is no run, a run shares no task with the first, or a task's questions, images or prompt
            differ.
    """
    names = labels(folders)
    if len(folders) < 2:
        raise InputError(f"{', '.join(names) or 'no run'}: a comparison takes two runs or more.")
    first, *others = runs = [open_run(folder) for folder in folders]
    for run in others:
        if not (shared := first.tasks.keys() & run.tasks.keys()):
            raise InputError(f"{first.folder} and {run.folder}: no task is in both. Run the same tasks with both.")
        for task in shared:
            check_comparable(task, first.tasks[task], run.tasks[task], first.folder, run.folder)
    scored = [_scores(run) for run in runs]
    found: list[Difference] = []
    notes = {}
    for name, run, of_run in zip(names[1:], others, scored[1:], strict=True):
        made = [
            _difference(task, metric, names[0], name, both)
            for task in first.tasks
            if task in run.tasks
            for metric in METRICS
            # a task may have questions of one kind alone
            if (both := paired(scored[0][task], of_run[task], metric)).images
        ]
        if not made:
            raise InputError(
                f"{first.folder} and {run.folder}: no question is answered in both. Run the same questions with both."
            )
        found += made
        notes[name] = _partial(first, scored[0], of_run) + setting_differences(first, run)
    adjusted = holm([one.p for one in found])
    return Comparison(names, [replace(one, p_holm=p) for one, p in zip(found, adjusted, strict=True)], notes)


def setting_differences(one: Run, other: Run) -> list[str]:
    """Return a line for each setting in which two runs differ."""
    return [
        f"{name} differs: {one.manifest.get(name)!r} and {other.manifest.get(name)!r}"
        for name in ("images", "prompt", "image_preprocessing", "decoding", "dtype", "four_bit")
        if one.manifest.get(name) != other.manifest.get(name)
    ] + [
        f"{task}: {name} differs: {values[0]} and {values[1]}"
        for task in one.tasks
        if task in other.tasks
        for name in DECIDING
        if name not in ("images", "decoding")
        for values in [[_told(of.settings, name) for of in (one.tasks[task], other.tasks[task])]]
        if values[0] != values[1]
    ]


def _told(settings: Mapping[str, Any], name: str) -> str:
    return repr(settings[name]) if name in settings else "not recorded"


def differing_setting(task: str, one: Run, other: Run) -> tuple[str, Any, Any] | None:
    """Return the first setting that decides the answers to a task and differs, with both values; None if none does.

    What one of the runs does not say, of answers from elsewhere or of an older run, nobody can compare.
    """
    first, second = (run.tasks[task].settings for run in (one, other))
    for name in DECIDING:
        if name in first and name in second and name != "draws" and first[name] != second[name]:
            return name, first[name], second[name]
    return None


def _partial(
    first: Run, of_first: dict[str, dict[str, QuestionScores]], of_other: dict[str, dict[str, QuestionScores]]
) -> list[str]:
    notes = []
    for task in (task for task in first.tasks if task in of_other):
        every = len(first.tasks[task].replies) + first.tasks[task].not_asked
        if (both := len(of_first[task].keys() & of_other[task].keys())) < every:
            notes.append(f"{task}: compared on {both} of {every} questions; the rest are not answered in both.")
    return notes


def check_comparable(task: str, one: RunTask, other: RunTask, first: Path, second: Path) -> None:
    """Check that two runs of a task have the same questions, images and prompt.

    Raises:
        InputError: One of these differs; the line says which.
    """
    for what, name in (
        ("edition", "split"),
        ("sha256_rows", "hash of the questions"),
        ("sha256_pixels", "hash of the images"),
        ("prompt", "prompt"),
    ):
        if what == "prompt" and one.texts and other.texts:
            alike = all(other.texts.get(id, text) == text for id, text in one.texts.items())
        else:
            alike = getattr(one, what) == getattr(other, what)
        if not alike:
            raise InputError(
                f"{task}: {name} is {getattr(one, what)[:16]} in {first} and {getattr(other, what)[:16]} in {second}. "
                "Only runs on the same questions, images and prompt can be compared: run one again."
            )


def paired(one: dict[str, QuestionScores], other: dict[str, QuestionScores], metric: str) -> Paired:
    """Return both runs' values of a score, on the questions that both answered and that have this score."""
    both = [id for id, asked in one.items() if id in other and metric in asked.scores]
    first, second = ([of[id].scores[metric] for id in both] for of in (one, other))
    return Paired(first, second, [one[id].image_id for id in both])


def _scores(run: Run) -> dict[str, dict[str, QuestionScores]]:
    """Return the scores of each task; raise InputError if the prepared split is not the one that was asked."""
    for task, of in run.tasks.items():
        refuse_other_split(task, of, run.folder)
    return {task: question_scores(dataset_of(task), of.replies) for task, of in run.tasks.items()}


def _right_or_wrong(both: Paired) -> bool:
    """Return whether every score is 0 or 1, as McNemar's test needs; means over sampled replies are not."""
    return set(both.first) | set(both.second) <= {0, 1}


def _difference(task: str, metric: str, baseline: str, run: str, both: Paired) -> Difference:
    estimate = bootstrap_clustered(both.changes, both.images)
    return Difference(
        task,
        metric,
        baseline,
        run,
        first=math.fsum(both.first) / estimate.n,
        second=math.fsum(both.second) / estimate.n,
        value=sum(both.changes) / estimate.n,
        low=estimate.low,
        high=estimate.high,
        n=estimate.n,
        images=estimate.clusters,
        p=sign_flip(both.changes, both.images),
        p_holm=1.0,
        p_mcnemar=mcnemar(both.first, both.second) if metric == "closed_accuracy" and _right_or_wrong(both) else None,
        standard_error=mean_clustered(both.changes, both.images).standard_error,
    )


@dataclass(frozen=True)
class Power:
    """The least difference, a share, that a comparison of one score of one task finds in 80 % of cases at 5 %."""

    task: str
    metric: str
    run: str | None
    """The one that is compared with the first; None of one run alone."""
    correlation: float | None
    """Of the two systems' scores, assumed; None where their differences were at hand."""
    n: int
    images: int
    alone: float
    """For a single test."""
    with_holm: float
    """For the first of the comparison's tests under Holm's rule, the hardest to pass."""


CORRELATIONS = (0.5, 0.8)  # of two systems' scores on the same questions: our choice, unlike systems and siblings


def power(folders: Sequence[Path]) -> list[Power]:
    """Return the least differences that the questions can show, from one run's scores or several runs' differences.

    Raises:
        InputError: See `compare`.
    """
    if len(folders) > 1:
        found = compare(folders).differences
        if all(one.standard_error is None for one in found):
            raise InputError(f"{folders[0]}: its answers are about one image, which shows nothing. Ask more questions.")
        return [
            _power(one.task, one.metric, one.run, None, one.n, one.images, one.standard_error, len(found))
            for one in found
            if one.standard_error is not None
        ]
    cells = [
        (task, metric, estimate)
        for task, questions in _scores(open_run(folders[0])).items()
        for metric in METRICS
        if (estimate := _mean(questions, metric)).standard_error is not None
    ]
    if not cells:
        raise InputError(
            f"{folders[0]}: its answers are about one image, or none, and show nothing. Ask more questions."
        )
    return [
        # the variance of a difference is twice that of a score, less twice what the two have in common
        _power(
            task,
            metric,
            None,
            correlation,
            estimate.n,
            estimate.clusters,
            (estimate.standard_error or 0) * math.sqrt(2 * (1 - correlation)),
            len(cells),
        )
        for task, metric, estimate in cells
        for correlation in CORRELATIONS
    ]


def _mean(questions: dict[str, QuestionScores], metric: str) -> Estimate:
    asked = [one for one in questions.values() if metric in one.scores]
    return mean_clustered([one.scores[metric] for one in asked], [one.image_id for one in asked])


def _power(
    task: str, metric: str, run: str | None, correlation: float | None, n: int, images: int, error: float, tests: int
) -> Power:
    alone, with_holm = (detectable(error, images, alpha) for alpha in (0.05, 0.05 / tests))
    return Power(task, metric, run, correlation, n, images, alone, with_holm)


def compare_text(found: Comparison) -> str:
    """Return the differences for a terminal, x100, as one table per run that is compared with the first."""
    from tabulate import tabulate

    baseline, *others = found.runs
    parts = []
    for name in others:
        body = [
            [
                printable(one.task),
                one.metric,
                f"{100 * one.first:.1f}",
                f"{100 * one.second:.1f}",
                f"{100 * one.value:+.1f}{_interval(one)}",
                _p(one.p),
                _p(one.p_holm) + (" *" if one.p_holm < 0.05 else ""),
                "" if one.p_mcnemar is None else _p(one.p_mcnemar),
                one.n,
                one.images,
            ]
            for one in found.differences
            if one.run == name
        ]
        heads = ["", "score", printable(baseline), printable(name), "difference [95 %]"]
        heads += ["p", "p, Holm", "McNemar", "n", "images"]
        parts.append(tabulate(body, heads, tablefmt="simple", disable_numparse=True))
        if found.notes[name]:
            parts.append("\n".join(map(printable, found.notes[name])))
    parts.append(
        "Scores x100. Intervals: draws of images; p: signs of images' differences flipped; Holm: over the "
        f"{len(found.differences)} tests shown, * below 0.05; McNemar: exact, takes questions as independent.\n{NOTICE}"
    )
    return "\n\n".join(parts)


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 else "<0.001"


def power_text(found: Sequence[Power]) -> str:
    """Return the least differences that can be shown, in points, as a table for a terminal."""
    from tabulate import tabulate

    body = [
        [
            printable(one.task),
            one.metric,
            f"{one.correlation} assumed" if one.run is None else f"as measured, {printable(one.run)}",
            f"{100 * one.alone:.1f}",
            f"{100 * one.with_holm:.1f}",
            one.n,
            one.images,
        ]
        for one in found
    ]
    heads = ["", "score", "correlation", "one test", "with Holm", "n", "images"]
    table = tabulate(body, heads, tablefmt="simple", disable_numparse=True)
    what = "Points that a comparison on these questions finds in 80 % of cases at 5 %, images being what is drawn."
    return f"{table}\n\n{what} Smaller differences need more questions.\n{NOTICE}"


def _interval(one: Difference) -> str:
    return "" if one.low is None or one.high is None else f" [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"
