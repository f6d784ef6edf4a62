"""Decide whether a candidate's run may replace a baseline's: pass, fail, or cannot decide.

It takes two run folders and a policy (`gate_policy.py`), and writes for people, for pull requests and for CI.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from stllava_eval.errors import InputError, printable
from stllava_eval.reports.cells import NOTICE, markdown
from stllava_eval.reports.compare import (
    METRICS,
    Paired,
    check_comparable,
    differing_setting,
    paired,
    setting_differences,
)
from stllava_eval.reports.gate_policy import GUARDS, Policy
from stllava_eval.runs.folder import NOT_ASKED, Run, RunTask, labels, open_run, refuse_other_split
from stllava_eval.runs.scores import NOT_RECORDED, QuestionScores, dataset_of, first_ids, question_scores, split_rows
from stllava_eval.scoring.final_answer import is_failed_request
from stllava_eval.scoring.statistics import holm, mean_clustered, noninferior, sign_flips
from stllava_eval.scoring.verdict_v1 import options_named

POWER = 0.8  # chance that the needed questions would decide; the usual convention (Cohen 1988)
Verdict = Literal["held", "lost", "too few"]


@dataclass(frozen=True)
class Check:
    """One score or guard of one task, the candidate against the baseline on the same questions.

    All figures are in the score's own unit, shares in [0, 1] or words. `change` is the candidate's mean less the
    baseline's, with the 95 % interval `low` to `high`, clustered by image. `limit` is the loss that is allowed; for
    `words` it is the change that is allowed in either direction.
    """

    task: str
    score: str
    guard: bool
    baseline: float
    candidate: float
    change: float
    low: float | None
    high: float | None
    limit: float
    n: int
    images: int
    p_loss: float
    """p-value of the hypothesis that nothing was lost: one-sided (two-sided for `words`), adjusted after Holm over all
    checks."""
    p_limit: float | None
    """p-value of the hypothesis that the limit or more was lost; None for a guard."""
    verdict: Verdict
    needed: int | None
    """Number of questions of this kind that would decide in 80 % of cases, if these are too few."""


@dataclass(frozen=True)
class Gate:
    """The verdict, and everything that it depends on."""

    verdict: Literal["pass", "fail", "cannot decide"]
    reasons: list[str]
    """A sentence for each thing that failed or could not be decided."""
    baseline: str
    candidate: str
    policy: Policy
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """Return the exit code of the command: 0 for pass, 1 for fail, 2 for cannot decide."""
        return {"pass": 0, "fail": 1, "cannot decide": 2}[self.verdict]


def gate(candidate: Path, baseline: Path, policy: Policy) -> Gate:
    """Decide whether the candidate may take the baseline's place.

    A score holds if the loss of its margin is ruled out at alpha; that all of them must hold needs no adjustment
    (Berger 1982). It is lost if some loss is certain at alpha after Holm, and the margin is not ruled out. Anything
    between is too few questions. A guard has lost if its limit is passed and some change is certain; speed if its
    limit is passed.

    Returns:
        The verdict; it is `cannot decide` for runs that cannot be compared, and if answers are missing.

    Raises:
        InputError: A folder is not a run folder, or its data is not prepared.
    """
    names = labels([baseline, candidate])
    runs = open_run(baseline), open_run(candidate)
    result = Gate("cannot decide", [], names[0], names[1], policy)
    try:
        _check_runs(*runs)
        checks = decide(_changes(*runs, policy), policy)
    except InputError as error:
        return replace(result, reasons=[str(error)])
    if not checks:
        return replace(result, reasons=["no question of the two runs has a score. Run the same questions with both."])
    slow, unclear = _speed([run.manifest for run in runs], policy)
    lost = [_sentence(check) for check in checks if check.verdict == "lost"] + slow
    few = [_sentence(check) for check in checks if check.verdict == "too few"] + unclear
    return replace(
        result,
        verdict="fail" if lost else "cannot decide" if few else "pass",
        reasons=lost or few,
        checks=checks,
        notes=_notes(*runs),
    )


def _check_runs(baseline: Run, candidate: Run) -> None:
    """Check that the candidate was asked the baseline's tasks, on the same splits and in the same way.

    Raises:
        InputError: A task is missing, or something that decides the answers differs.
    """
    for task, run_task in baseline.tasks.items():
        if task not in candidate.tasks:
            raise InputError(
                f"{candidate.folder}: its run lacks {task}, which {baseline.folder} has. Run the same tasks."
            )
        check_comparable(task, run_task, candidate.tasks[task], baseline.folder, candidate.folder)
        refuse_other_split(task, run_task, baseline.folder)
        refuse_other_split(task, candidate.tasks[task], candidate.folder)
    for task in baseline.tasks:
        if differing := differing_setting(task, baseline, candidate):
            name, before, after = differing
            raise InputError(
                f"{name} is {before!r} in {baseline.folder} and {after!r} in {candidate.folder}. Only runs that were "
                "answered the same way are compared: run one again."
            )


def _changes(baseline: Run, candidate: Run, policy: Policy) -> dict[tuple[str, str], Paired]:
    """Return both runs' values of each (task, score) that the policy checks, on the questions that both answered.

    Raises:
        InputError: More questions lack an answer than the policy allows, or no question is answered in both runs.
    """
    guards = [name for name in GUARDS if policy.guards.get(name) is not None]
    changes = {}
    for task in baseline.tasks:
        before, after = _scores(task, baseline.tasks[task]), _scores(task, candidate.tasks[task])
        asked = _asked(task, baseline.tasks[task], candidate.tasks[task])
        if len(lacking := sorted(asked - (before.keys() & after.keys()))) > policy.unanswered:
            raise InputError(
                f"{task}: {len(lacking)} of {len(asked)} questions that were asked are not answered in both runs "
                f"({first_ids(lacking)}), and the policy allows {policy.unanswered}. Run again, or raise `unanswered`."
            )
        if not asked & before.keys() & after.keys():
            raise InputError(f"{task}: no question is answered in both. Run the same questions with both.")
        for score in (*METRICS, *guards):
            changes[task, score] = paired(before, after, score)
    return changes


def decide(changes: Mapping[tuple[str, str], Paired], policy: Policy) -> list[Check]:
    """Return a check for each (task, score) that has questions.

    Raises:
        InputError: The policy has no margin for a score.
    """
    changes = {key: pair for key, pair in changes.items() if pair.images}
    worse = _p_losses(changes)
    adjusted = dict(zip(worse, holm(list(worse.values())), strict=True))
    return [
        _check(task, score, pair, adjusted[task, score], len(changes), policy)
        for (task, score), pair in changes.items()
    ]


def _p_losses(changes: Mapping[tuple[str, str], Paired]) -> dict[tuple[str, str], float]:
    """Return, not adjusted, the p-value of a loss of each (task, score).

    Scores of the same questions are tested together, with the same sign flips.
    """
    groups: dict[tuple[tuple[str, ...], bool], list[tuple[str, str]]] = {}
    for (task, score), pair in changes.items():
        groups.setdefault((tuple(pair.images), score == "words"), []).append((task, score))
    p_values: dict[tuple[str, str], float] = {}
    for (_, two_sided), keys in groups.items():
        columns = [[-x for x in changes[key].changes] if key[1] == "unparsed" else changes[key].changes for key in keys]
        p_values.update(zip(keys, sign_flips(columns, changes[keys[0]].images, one_sided=not two_sided), strict=True))
    return {key: p_values[key] for key in changes}


def _check(task: str, score: str, pair: Paired, p_loss: float, checks: int, policy: Policy) -> Check:
    """Return the check of one score of one task.

    Args:
        task: The task.
        score: A score of `METRICS`, or a guard.
        pair: Both runs' values.
        p_loss: See `Check`.
        checks: How many checks there are in all.
        policy: The margins, the guards' limits and alpha.
    """
    from scipy.special import stdtrit

    n = len(pair.images)
    before, after = math.fsum(pair.first) / n, math.fsum(pair.second) / n
    change = sum(pair.changes) / n
    images = len(set(pair.images))
    error = mean_clustered(pair.changes, pair.images).standard_error
    reach = None if not error else float(stdtrit(images - 1, 0.975)) * error
    made = Check(
        task,
        score,
        score in GUARDS,
        before,
        after,
        change,
        low=None if reach is None else change - reach,
        high=None if reach is None else change + reach,
        limit=0.0,
        n=n,
        images=images,
        p_loss=p_loss,
        p_limit=None,
        verdict="held",
        needed=None,
    )
    if score == "words":
        times = policy.guards["words"] or math.inf
        limit = before * (times - 1 if change > 0 else 1 - 1 / times)
        return replace(made, limit=limit, verdict="lost" if abs(change) > limit and p_loss < policy.alpha else "held")
    if score in GUARDS:
        limit = (policy.guards[score] or 0) / 100
        loss = change if score == "unparsed" else -change
        return replace(made, limit=limit, verdict="lost" if loss > limit and p_loss < policy.alpha else "held")
    limit = _margin(policy, task, score)
    p_limit = noninferior(pair.changes, pair.images, limit)
    if p_limit < policy.alpha:
        return replace(made, limit=limit, p_limit=p_limit)
    if p_loss < policy.alpha:
        return replace(made, limit=limit, p_limit=p_limit, verdict="lost")
    needed = _needed(change, error, n, images, limit, policy.alpha, checks)
    return replace(made, limit=limit, p_limit=p_limit, verdict="too few", needed=needed)


def _margin(policy: Policy, task: str, score: str) -> float:
    margins = policy.margins.get(dataset_of(task), {})
    if score not in margins:
        raise InputError(f"the policy has no margin for {score} of {dataset_of(task)}. Add it under `margins`.")
    return margins[score] / 100


def _needed(
    change: float, error: float | None, n: int, images: int, limit: float, alpha: float, checks: int
) -> int | None:
    """Return how many questions would decide in 80 % of cases if the observed loss is the true one (0 for a gain).

    A loss smaller than the limit takes enough questions to rule the limit out; any loss takes enough to be certain of,
    which is fewer once it is more than half of the limit. The smaller number counts.
    """
    from scipy.special import stdtrit

    if error is None:
        return None
    degrees = images - 1
    power = float(stdtrit(degrees, POWER))
    to_hold = float(stdtrit(degrees, 1 - alpha)) + power
    to_lose = float(stdtrit(degrees, 1 - alpha / checks)) + power
    loss = max(0.0, -change)
    shares = [(to_hold * error / (limit - loss)) ** 2] if loss < limit else []
    shares += [(to_lose * error / loss) ** 2] if loss > limit / 2 else []
    # With k images of which none lost anything, a loss of the limit is ruled out once (1 - limit)^k < alpha.
    least = (math.floor(math.log(alpha) / math.log(1 - limit)) + 1) * n / images
    return max(n + 1, math.ceil(least), math.ceil(n * min(shares)))


def _scores(task: str, run: RunTask) -> dict[str, QuestionScores]:
    """Return the scores of each answered question; `closed_format` is 1 if it has the words of exactly one option."""
    scored = question_scores(dataset_of(task), run.replies)
    for row in split_rows(dataset_of(task)):
        if row["kind"] == "closed" and row["id"] in scored and "closed_accuracy" in scored[row["id"]].scores:
            each = [
                float(len(options_named(final.answer, row["reference"], row["question"])) == 1)
                for final in run.replies[row["id"]]
                if not is_failed_request(final.answer)
            ]
            scored[row["id"]].scores["closed_format"] = math.fsum(each) / len(each)
    return scored


KINDS = {"open": "recall and f1", "closed": "closed_accuracy"}
"""The kinds of questions, and the scores that only they have."""


def _kinds(task: str, run: RunTask) -> dict[str, list[str]]:
    """Return the ids of the questions of each kind that a run was asked.

    A kind without any reply, answered or failed, was not asked. A file of answers does not say which questions were
    asked; if it has answers to a kind, the missing answers to that kind count as unanswered.
    """
    kinds: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for row in split_rows(dataset_of(task)):
        if row["id"] in run.replies:
            kinds[row["kind"]].append(row["id"])
    asked = {}
    for kind, ids in kinds.items():
        finals = [final for id in ids for final in run.replies[id]]
        if any(not final.answer.startswith(NOT_ASKED) for final in finals):
            asked[kind] = ids
    return asked


def _asked(task: str, baseline: RunTask, candidate: RunTask) -> set[str]:
    """Return the questions that both runs must have answered: those of either run, of the kinds that the baseline had.

    Raises:
        InputError: The candidate was not asked a kind that the baseline was asked, so it would escape its scores.
    """
    old, new = _kinds(task, baseline), _kinds(task, candidate)
    for kind in old.keys() - new.keys():
        raise InputError(
            f"{task}: the baseline was asked {len(old[kind])} {kind} questions, the candidate none, so "
            f"{KINDS[kind]} cannot be decided. Ask the candidate the same questions."
        )
    return {id for kind in old for id in (*old[kind], *new[kind])}


def _speed(manifests: Sequence[Mapping[str, Any]], policy: Policy) -> tuple[list[str], list[str]]:
    """Return why the candidate fails by its speed, and why that cannot be decided; each may be empty."""
    share = policy.guards.get("speed")
    if share is None:
        return [], []
    rates = []
    for manifest in manifests:
        took = manifest.get("answering") or {}
        if not took.get("seconds") or not took.get("questions"):
            return [], ["speed: a run does not say how long its answers took. Run it again without an answer cache."]
        rates.append(took["questions"] / took["seconds"])
    for name in ("device", "dtype", "processes"):
        values = [manifest.get(name) for manifest in manifests]
        if values[0] != values[1]:
            return [], [f"speed: {name} is {values[0]!r} and {values[1]!r}. Run both on one machine."]
    if rates[1] >= share * rates[0]:
        return [], []
    rates_text = f"It answers {rates[1]:.2f} questions a second, the baseline {rates[0]:.2f}"
    return [f"{rates_text}; allowed is {share:g} times that, or more."], []


def _notes(baseline: Run, candidate: Run) -> list[str]:
    notes = setting_differences(baseline, candidate)
    if (images := baseline.manifest.get("images")) == NOT_RECORDED:
        notes.append(
            "Neither run records which images it was shown. Score with --images own if they were the questions' own."
        )
    elif images not in (None, "own"):
        notes.append(f"Both runs were shown {images} images: this says nothing about what the images are worth.")
    for task, run_task in baseline.tasks.items():
        if run_task.not_asked:
            notes.append(f"{task}: {run_task.not_asked} questions of its split were not asked.")
        notes += [
            f"{task}: the baseline was asked no {kind} question, so {scores} {'is' if kind == 'closed' else 'are'} "
            "not looked at."
            for kind, scores in KINDS.items()
            if kind not in _kinds(task, run_task) and any(row["kind"] == kind for row in split_rows(dataset_of(task)))
        ]
    if more := [task for task in candidate.tasks if task not in baseline.tasks]:
        notes.append(f"Not looked at, since the baseline lacks it: {', '.join(more)}.")
    weights = [run.manifest["checkpoint"].get("sha256") for run in (baseline, candidate)]
    if weights[0] == weights[1]:
        notes.append("Both runs are of the same weights.")
    if any(manifest["data"].get("sample") for manifest in baseline.manifest["tasks"].values()):
        notes.append("SAMPLE DATA: this says nothing about the official data sets.")
    return notes


# --- for people and machines ------------------------------------------------------------------------------------------

TITLES = {
    "recall": "recall of open questions",
    "f1": "F1 of open questions",
    "closed_accuracy": "accuracy of closed questions",
    "unparsed": "closed answers without a verdict",
    "closed_format": "closed answers that name one option",
    "words": "words of an answer",
}


def _number(check: Check, value: float, sign: bool = False) -> str:
    form = "+.1f" if sign else ".1f"
    return f"{value if check.score == 'words' else 100 * value:{form}}"


def _sentence(check: Check) -> str:
    """Return a sentence that says why the check is not held."""
    unit = "words" if check.score == "words" else "points"
    before, after = _number(check, check.baseline), _number(check, check.candidate)
    change = f"went from {before} to {after} ({_number(check, check.change, True)} {unit}{_interval(check)})"
    what = f"{check.task}: {TITLES[check.score]} {change}"
    limit = f"{_number(check, check.limit)} {unit}"
    if check.verdict == "lost" and check.guard:
        return f"{what}: past the limit of {limit}, and some change is certain (p {check.p_loss:.2g})."
    if check.verdict == "lost":
        return f"{what}: a loss is certain (p {check.p_loss:.2g}), and one of {limit} is not ruled out."
    needed = "" if check.needed is None else f" About {check.needed} questions would decide."
    asked = f"{check.n} questions on {check.images} images"
    return f"{what}: {asked} can neither rule out a loss of {limit} nor make one certain.{needed}"


def _interval(check: Check) -> str:
    if check.low is None or check.high is None:
        return ""
    return f" [{_number(check, check.low, True)}, {_number(check, check.high, True)}]"


def gate_text(result: Gate) -> str:
    """Return the verdict, the reasons and the table for a terminal."""
    from tabulate import tabulate

    parts = [f"{result.verdict.upper()}: {printable(result.candidate)} against {printable(result.baseline)}"]
    parts += ["\n".join(f"- {printable(reason)}" for reason in result.reasons)] if result.reasons else []
    if result.checks:
        heads = ["", "score", "baseline", "candidate", "change [95 %]", "allowed", "verdict", "n", "images"]
        parts.append(tabulate(_rows(result), heads, tablefmt="simple", disable_numparse=True))
    parts += ["\n".join(map(printable, result.notes))] if result.notes else []
    held = f"held: a loss of the allowed size is ruled out at {result.policy.alpha:g}, or a guard's limit is kept"
    parts.append(f"Scores x100, changes in points; intervals clustered by image; {held}.\n{NOTICE}")
    return "\n\n".join(parts)


def _rows(result: Gate) -> list[list[str]]:
    return [
        [
            printable(check.task),
            check.score + (" (guard)" if check.guard else ""),
            _number(check, check.baseline),
            _number(check, check.candidate),
            _number(check, check.change, True) + _interval(check),
            {"words": "±", "unparsed": "+"}.get(check.score, "-") + _number(check, check.limit),
            check.verdict.upper() if check.verdict != "held" else "held",
            str(check.n),
            str(check.images),
        ]
        for check in result.checks
    ]


def gate_markdown(result: Gate) -> str:
    """Return the report as Markdown for a pull request."""
    from tabulate import tabulate

    sign = {"pass": "✅", "fail": "❌", "cannot decide": "⚠️"}[result.verdict]
    lines = [f"## {sign} Evaluation gate: {result.verdict}", ""]
    lines += [f"**{markdown(result.candidate)}** against **{markdown(result.baseline)}**", ""]
    lines += [f"- {markdown(reason)}" for reason in result.reasons] + ([""] if result.reasons else [])
    if result.checks:
        heads = ["set", "score", "baseline", "candidate", "change [95 %]", "allowed", "verdict", "n", "images"]
        body = [[markdown(cell) for cell in row] for row in _rows(result)]
        lines += [tabulate(body, heads, tablefmt="github", disable_numparse=True), ""]
    lines += [*(markdown(note) for note in result.notes), "", f"Scores x100. {NOTICE}", ""]
    return "\n".join(lines)


def gate_junit(result: Gate) -> str:
    """Return JUnit XML: one test case per check and one for the verdict; an undecided check is an error."""
    from xml.etree import ElementTree

    bad = {"lost": "failure", "too few": "error"}
    suite = ElementTree.Element("testsuite", name=f"gate {printable(result.candidate)}")
    overall = ElementTree.SubElement(suite, "testcase", classname="gate", name="verdict")
    counts = {"failure": 0, "error": 0}

    def report(case: ElementTree.Element, kind: str, texts: Iterable[str]) -> None:
        lines = [printable(text) for text in texts]
        ElementTree.SubElement(case, kind, message=lines[0] if lines else kind).text = "\n".join(lines)
        counts[kind] += 1

    for check in result.checks:
        case = ElementTree.SubElement(suite, "testcase", classname=f"gate.{printable(check.task)}", name=check.score)
        if check.verdict in bad:
            report(case, bad[check.verdict], [_sentence(check)])
    if result.verdict != "pass":
        report(overall, "failure" if result.verdict == "fail" else "error", result.reasons)
    suite.set("tests", str(len(result.checks) + 1))
    suite.set("failures", str(counts["failure"]))
    suite.set("errors", str(counts["error"]))
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def gate_json(result: Gate) -> dict[str, Any]:
    """Return every number, for a program."""
    return {"format": 1, **asdict(result), "exit_code": result.exit_code}
