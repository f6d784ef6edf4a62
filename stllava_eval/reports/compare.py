"""Compare runs on the same questions: by how much each differs from the first, and whether that is more than chance.

The scores are those of `runs.scores`, the tests those of `scoring.statistics`; `gate.py` decides with the same pairs.
"""

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

# The clean scores (our choice): the published scores can be reached without looking at an image.
METRICS = ("recall", "f1", "closed_accuracy")


@dataclass(frozen=True)
class Difference:
    """The difference of two runs in one score of one task, over the questions that both answered.

    `value` is the run's mean less the first run's; it, `low` and `high` are shares in [-1, 1]. The 95 % interval is a
    bootstrap over images with 10,000 samples. `p` is the p-value of a test that flips the sign of images' differences,
    and `p_holm` is adjusted for all the tests of one comparison. For closed questions with one reply each, `p_mcnemar`
    is that of the exact test, which takes questions as independent.
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
    """The standard error of `value`, clustered by image."""


@dataclass(frozen=True)
class Comparison:
    """Several runs, each compared with the first of them."""

    runs: list[str]
    differences: list[Difference]
    notes: dict[str, list[str]]
    """Remarks by run: how many questions only one of the two runs answered, and which settings differ."""


@dataclass(frozen=True)
class Paired:
    """One score of the questions that two runs answered, in the split's order."""

    first: list[float]
    second: list[float]
    images: list[str]

    @property
    def changes(self) -> list[float]:
        """Return the second run's score less the first run's, for each question."""
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
    differences: list[Difference] = []
    notes = {}
    for name, run, of_run in zip(names[1:], others, scored[1:], strict=True):
        made = []
        for task in (task for task in first.tasks if task in run.tasks):
            for metric in METRICS:
                pair = paired(scored[0][task], of_run[task], metric)
                if pair.images:  # a task may have questions of one kind only
                    made.append(_difference(task, metric, names[0], name, pair))
        if not made:
            raise InputError(
                f"{first.folder} and {run.folder}: no question is answered in both. Run the same questions with both."
            )
        differences += made
        notes[name] = _partial(first, scored[0], of_run) + setting_differences(first, run)
    adjusted = holm([difference.p for difference in differences])
    return Comparison(
        names, [replace(difference, p_holm=p) for difference, p in zip(differences, adjusted, strict=True)], notes
    )


def setting_differences(first: Run, second: Run) -> list[str]:
    """Return a line for each setting in which two runs differ."""
    lines = []
    for name in ("images", "prompt", "image_preprocessing", "decoding", "dtype", "four_bit"):
        if first.manifest.get(name) != second.manifest.get(name):
            lines.append(f"{name} differs: {first.manifest.get(name)!r} and {second.manifest.get(name)!r}")
    of_task = [name for name in DECIDING if name not in ("images", "decoding")]  # these two are settings of whole runs
    for task in (task for task in first.tasks if task in second.tasks):
        for name in of_task:
            early, late = (_setting_text(run.tasks[task].settings, name) for run in (first, second))
            if early != late:
                lines.append(f"{task}: {name} differs: {early} and {late}")
    return lines


def _setting_text(settings: Mapping[str, Any], name: str) -> str:
    return repr(settings[name]) if name in settings else "not recorded"


def differing_setting(task: str, baseline: Run, other: Run) -> tuple[str, Any, Any] | None:
    """Return the first setting that decides the answers to a task and differs, with both values; None if none does.

    A setting that one of the runs does not record (answers from elsewhere, older runs) cannot be compared.
    """
    first, second = (run.tasks[task].settings for run in (baseline, other))
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
        if (shared := len(of_first[task].keys() & of_other[task].keys())) < every:
            notes.append(f"{task}: compared on {shared} of {every} questions; the rest are not answered in both.")
    return notes


def check_comparable(task: str, first: RunTask, second: RunTask, first_folder: Path, second_folder: Path) -> None:
    """Check that two runs of a task have the same questions, images and prompt.

    Raises:
        InputError: One of these differs; the line says which.
    """
    for field, name in (
        ("edition", "split"),
        ("sha256_rows", "hash of the questions"),
        ("sha256_pixels", "hash of the images"),
        ("prompt", "prompt"),
    ):
        if field == "prompt" and first.texts and second.texts:
            # the hash of a custom prompt is over all texts of a run, so it differs if one run asked fewer questions
            is_same = all(second.texts.get(id, text) == text for id, text in first.texts.items())
        else:
            is_same = getattr(first, field) == getattr(second, field)
        if not is_same:
            early, late = getattr(first, field)[:16], getattr(second, field)[:16]
            raise InputError(
                f"{task}: {name} is {early} in {first_folder} and {late} in {second_folder}. "
                "Only runs on the same questions, images and prompt can be compared: run one again."
            )


def paired(first: dict[str, QuestionScores], second: dict[str, QuestionScores], metric: str) -> Paired:
    """Return both runs' values of a score, on the questions that both answered and that have this score."""
    shared = [id for id, question in first.items() if id in second and metric in question.scores]
    early, late = ([scores[id].scores[metric] for id in shared] for scores in (first, second))
    return Paired(early, late, [first[id].image_id for id in shared])


def _scores(run: Run) -> dict[str, dict[str, QuestionScores]]:
    """Return the scores of each task; raise InputError if the prepared split is not the one that was asked."""
    for task, run_task in run.tasks.items():
        refuse_other_split(task, run_task, run.folder)
    return {task: question_scores(dataset_of(task), run_task.replies) for task, run_task in run.tasks.items()}


def _right_or_wrong(pair: Paired) -> bool:
    """Return whether every score is 0 or 1, as McNemar's test needs; means over sampled replies are not."""
    return set(pair.first) | set(pair.second) <= {0, 1}


def _difference(task: str, metric: str, baseline: str, run: str, pair: Paired) -> Difference:
    estimate = bootstrap_clustered(pair.changes, pair.images)
    return Difference(
        task,
        metric,
        baseline,
        run,
        first=math.fsum(pair.first) / estimate.n,
        second=math.fsum(pair.second) / estimate.n,
        value=sum(pair.changes) / estimate.n,
        low=estimate.low,
        high=estimate.high,
        n=estimate.n,
        images=estimate.clusters,
        p=sign_flip(pair.changes, pair.images),
        p_holm=1.0,
        p_mcnemar=mcnemar(pair.first, pair.second) if metric == "closed_accuracy" and _right_or_wrong(pair) else None,
        standard_error=mean_clustered(pair.changes, pair.images).standard_error,
    )


@dataclass(frozen=True)
class Power:
    """The smallest difference in one score of one task, a share, that a comparison detects.

    It is detected with a power of 80 % by a test at the level 5 %.
    """

    task: str
    metric: str
    run: str | None
    """The run that is compared with the first; None if there is one run only."""
    correlation: float | None
    """The assumed correlation of the two systems' scores; None if their differences were measured."""
    n: int
    images: int
    alone: float
    """The difference that a single test detects."""
    with_holm: float
    """The difference that the first test under Holm's rule detects, which has the strictest level."""


# Correlations of two systems' scores on the same questions. Our choice: 0.5 for unrelated systems, 0.8 for
# siblings such as checkpoints of one training.
CORRELATIONS = (0.5, 0.8)


def power(folders: Sequence[Path]) -> list[Power]:
    """Return the smallest differences that the questions can show, from one run's scores or several runs' differences.

    Raises:
        InputError: See `compare`.
    """
    if len(folders) > 1:
        differences = compare(folders).differences
        if all(difference.standard_error is None for difference in differences):
            raise InputError(f"{folders[0]}: its answers are about one image, which shows nothing. Ask more questions.")
        return [
            _power(
                difference.task,
                difference.metric,
                difference.run,
                None,
                difference.n,
                difference.images,
                difference.standard_error,
                len(differences),
            )
            for difference in differences
            if difference.standard_error is not None
        ]
    cells = []
    for task, questions in _scores(open_run(folders[0])).items():
        for metric in METRICS:
            estimate = _mean(questions, metric)
            if estimate.standard_error is not None:
                cells.append((task, metric, estimate))
    if not cells:
        raise InputError(
            f"{folders[0]}: its answers are about one image, or none, and show nothing. Ask more questions."
        )
    made = []
    for task, metric, estimate in cells:
        for correlation in CORRELATIONS:
            # Var(x - y) = Var x + Var y - 2 Cov(x, y), which is 2 (1 - correlation) Var x if both have one variance
            error = (estimate.standard_error or 0) * math.sqrt(2 * (1 - correlation))
            made.append(_power(task, metric, None, correlation, estimate.n, estimate.clusters, error, len(cells)))
    return made


def _mean(questions: dict[str, QuestionScores], metric: str) -> Estimate:
    asked = [question for question in questions.values() if metric in question.scores]
    return mean_clustered([question.scores[metric] for question in asked], [question.image_id for question in asked])


def _power(
    task: str, metric: str, run: str | None, correlation: float | None, n: int, images: int, error: float, tests: int
) -> Power:
    alone, with_holm = (detectable(error, images, alpha) for alpha in (0.05, 0.05 / tests))
    return Power(task, metric, run, correlation, n, images, alone, with_holm)


def compare_text(comparison: Comparison) -> str:
    """Return the differences for a terminal, x100, as one table per run that is compared with the first."""
    from tabulate import tabulate

    baseline, *others = comparison.runs
    parts = []
    for name in others:
        body = [
            [
                printable(difference.task),
                difference.metric,
                f"{100 * difference.first:.1f}",
                f"{100 * difference.second:.1f}",
                f"{100 * difference.value:+.1f}{_interval(difference)}",
                _p(difference.p),
                _p(difference.p_holm) + (" *" if difference.p_holm < 0.05 else ""),
                "" if difference.p_mcnemar is None else _p(difference.p_mcnemar),
                difference.n,
                difference.images,
            ]
            for difference in comparison.differences
            if difference.run == name
        ]
        heads = ["", "score", printable(baseline), printable(name), "difference [95 %]"]
        heads += ["p", "p, Holm", "McNemar", "n", "images"]
        parts.append(tabulate(body, heads, tablefmt="simple", disable_numparse=True))
        if comparison.notes[name]:
            parts.append("\n".join(map(printable, comparison.notes[name])))
    tests = len(comparison.differences)
    parts.append(
        "Scores x100. Intervals: draws of images; p: signs of images' differences flipped; Holm: over the "
        f"{tests} tests shown, * below 0.05; McNemar: exact, takes questions as independent.\n{NOTICE}"
    )
    return "\n\n".join(parts)


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 else "<0.001"


def power_text(powers: Sequence[Power]) -> str:
    """Return the smallest differences that can be shown, in points, as a table for a terminal."""
    from tabulate import tabulate

    body = [
        [
            printable(power.task),
            power.metric,
            f"{power.correlation} assumed" if power.run is None else f"as measured, {printable(power.run)}",
            f"{100 * power.alone:.1f}",
            f"{100 * power.with_holm:.1f}",
            power.n,
            power.images,
        ]
        for power in powers
    ]
    heads = ["", "score", "correlation", "one test", "with Holm", "n", "images"]
    table = tabulate(body, heads, tablefmt="simple", disable_numparse=True)
    what = "Points that a comparison on these questions finds in 80 % of cases at 5 %, images being what is drawn."
    return f"{table}\n\n{what} Smaller differences need more questions.\n{NOTICE}"


def _interval(difference: Difference) -> str:
    return (
        ""
        if difference.low is None or difference.high is None
        else f" [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
    )
