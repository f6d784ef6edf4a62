"""Measure judges: agreement with themselves, with each other and with references."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from stllava_eval.scoring.metrics import closed_accuracy, exact_match, words
from stllava_eval.scoring.statistics import Estimate, bootstrap_clustered, mean_clustered
from stllava_eval.scoring.verdict import choices
from stllava_eval.scoring.words import folded_words
from stllava_train.preferences.rows import Candidate
from stllava_train.preferences.verdicts import PAIR_OUTCOMES, VERDICT_OUTCOMES, Rule, Verdict, judged

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Tables = NDArray[np.float64]  # (..., 3, 3)


QuestionKey = tuple[str, tuple[str, ...]]

CLASSES = ("first", "second", "none")  # which of two answers a judge prefers, by their order in the candidate
DRAWS = 2000  # of a bootstrap; Efron and Tibshirani (1993) want 1,000 or more for percentiles


def known_verdicts(verdicts: Iterable[Verdict], by_id: Mapping[str, Candidate]) -> list[Verdict]:
    """Return the verdicts on answers and images of the candidates, sorted: sums of floats depend on their order."""
    known = []
    for verdict in sorted(verdicts, key=lambda verdict: verdict.key):
        candidate = by_id.get(verdict.id)
        if candidate is None or verdict.image_sha256 != candidate.image_sha256:
            continue
        if 0 <= min(verdict.shown) < max(verdict.shown) < len(candidate.answers):
            known.append(verdict)
    return known


# --- estimates --------------------------------------------------------------------------------------------------------


def clustered_mean(scores: Iterable[tuple[float, Candidate]], why: str, seed: int | None = None) -> dict[str, Any]:
    """Return the mean of scores, each with its candidate, whose image is the cluster.

    With a seed its interval is the bootstrap's, which differences need; without a seed it is that of `mean_clustered`.
    """
    scores = list(scores)
    values, clusters = [float(score) for score, _ in scores], [_cluster(candidate) for _, candidate in scores]
    if not values:
        return none(why)
    if seed is None:
        return asdict(mean_clustered(values, clusters))
    return asdict(bootstrap_clustered(values, clusters, DRAWS, seed))


def none(why: str) -> dict[str, Any]:
    """Return a figure without a value, and why it has none."""
    return asdict(Estimate(None, 0, 0, None, None, None)) | {"why": why}


def _cluster(candidate: Candidate) -> str:
    """Return the name of a candidate's image: 64 bits tell a million images apart, and the statistics hold many."""
    return candidate.image_sha256[:16]


def percentiles(values: Sequence[float]) -> list[float] | None:
    """Return the lower quartile, the median and the upper quartile; None of no values."""
    import numpy as np

    return [float(value) for value in np.quantile(values, [0.25, 0.5, 0.75])] if values else None


# --- judges -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """What one judge makes of two answers to a question."""

    candidate: Candidate
    answers: tuple[int, int]  # indexes in the candidate, the lower one first
    verdicts: tuple[Verdict, ...]
    outcome: str  # of `PAIR_OUTCOMES`, all but "judges disagree"
    choice: str  # of `CLASSES`

    @property
    def chosen(self) -> str:
        return self.candidate.answers[self.answers[self.choice == "second"]]

    @property
    def rejected(self) -> str:
        return self.candidate.answers[self.answers[self.choice == "first"]]


def cases_of(verdicts: Iterable[Verdict], by_id: Mapping[str, Candidate], rule: Rule) -> list[_Case]:
    """Return one judge's cases, in the order of its verdicts."""
    by_answers: dict[tuple[str, tuple[int, int]], list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        by_answers[verdict.id, (min(verdict.shown), max(verdict.shown))].append(verdict)
    cases = []
    for (id, answers), about_them in by_answers.items():
        outcome, margin = judged(about_them, rule)
        choice = "none" if outcome != "preferred" else "first" if margin > 0 else "second"
        cases.append(_Case(by_id[id], answers, tuple(about_them), outcome, choice))
    return cases


def judging(
    cases: Sequence[_Case],
    by_id: Mapping[str, Candidate],
    rule: Rule,
    references: Mapping[QuestionKey, str] | None,
    seed: int,
) -> dict[str, Any]:
    """Return the figures of how one judge judges.

    Sources: position consistency, preference by position and repetition stability are the three of Shi et al.
    (arXiv:2406.07791); the bias to length is read off as in Zheng et al. (arXiv:2306.05685) and AlpacaEval
    (arXiv:2404.04475). Theirs differ in detail: see each.
    """
    verdicts: list[Verdict] = []
    for case in cases:
        verdicts += case.verdicts
    scored = [(verdict, verdict.scores, by_id[verdict.id]) for verdict in verdicts if verdict.scores is not None]
    decided = [case for case in cases if case.choice != "none"]
    all_scores = [score for _, scores, _ in scored for score in scores]
    by_length = [(words(case.chosen) - words(case.rejected), case.candidate) for case in decided]
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    in_order = sum(verdict.shown[0] < verdict.shown[1] for verdict in verdicts)
    return {
        "verdicts": len(verdicts),
        "outcomes": {name: outcomes[name] for name in VERDICT_OUTCOMES},
        "scored": clustered_mean(
            ((verdict.scores is not None, by_id[verdict.id]) for verdict in verdicts), "no verdict"
        ),
        "pairs": len(cases),
        "fates": {
            name: sum(case.outcome == name for case in cases) for name in PAIR_OUTCOMES if name != "judges disagree"
        },
        "orders": {"lower place first": in_order, "higher place first": len(verdicts) - in_order},
        "consistent": clustered_mean(_consistency(cases), "no pair was scored in both orders"),
        # ties say nothing of a bias; asked in both orders, an unbiased judge prefers the first in one half
        "prefers_first": clustered_mean(
            ((scores[0] > scores[1], about) for _, scores, about in scored if scores[0] != scores[1]),
            "no verdict prefers an answer",
        ),
        "stable": clustered_mean(_stability(cases), "nothing was asked twice in one order"),
        "prefers_longer": clustered_mean(
            ((more > 0, about) for more, about in by_length if more), "no preferred pair has answers of unequal length"
        ),
        "equally_long": sum(more == 0 for more, _ in by_length),
        "words_more": clustered_mean(by_length, "no pair is preferred", seed),
        "scores": {f"{score:g}": times for score, times in sorted(Counter(all_scores).items())},
        "score": clustered_mean(((score, about) for _, both, about in scored for score in both), "no scores"),
        "score_quartiles": percentiles(all_scores),
        **_truth(cases, references),
    }


def _consistency(cases: Iterable[_Case]) -> Iterable[tuple[float, Candidate]]:
    """Yield for each pair scored in both orders 1 where the same answer wins in both, or both are ties, else 0.

    Scores of repetitions are averaged. The margin plays no part.
    """
    for case in cases:
        wins: dict[bool, list[float]] = defaultdict(list)
        for verdict in case.verdicts:
            if verdict.scores is not None:
                in_order = verdict.shown == case.answers
                wins[in_order].append((verdict.scores[0] - verdict.scores[1]) * (1 if in_order else -1))
        if len(wins) == 2:
            yield float(_sign(sum(wins[True])) == _sign(sum(wins[False]))), case.candidate


def _stability(cases: Iterable[_Case]) -> Iterable[tuple[float, Candidate]]:
    """Yield for each order of a pair asked repeatedly the share of two repetitions that decide alike, in [0, 1]."""
    for case in cases:
        decisions: dict[bool, list[int]] = defaultdict(list)
        for verdict in case.verdicts:
            if verdict.scores is not None:
                decisions[verdict.shown == case.answers].append(_sign(verdict.scores[0] - verdict.scores[1]))
        for signs in decisions.values():
            if len(signs) > 1:
                equal = [first == second for first, second in combinations(signs, 2)]
                yield sum(equal) / len(equal), case.candidate


def _sign(value: float) -> int:
    """Return -1, 0 or 1."""
    return (value > 0) - (value < 0)


def _truth(cases: Iterable[_Case], references: Mapping[QuestionKey, str] | None) -> dict[str, Any]:
    """Return how often a judge prefers the right answer, where exactly one of the two is right.

    `prefers_right` is over the pairs in which it prefers one, `right_of_all` over all that it scored.
    """
    if references is None:
        why = "no references were given"
        return {"prefers_right": none(why), "right_of_all": none(why)}
    hits: list[tuple[_Case, bool]] = []
    for case in cases:
        reference = references.get((case.candidate.image_sha256, folded_words(case.candidate.question)))
        if case.outcome == "not scored" or reference is None or not folded_words(reference):
            continue
        right = [is_right(case.candidate.answers[index], reference, case.candidate.question) for index in case.answers]
        if right[0] != right[1]:
            hits.append((case, case.choice == ("first" if right[0] else "second")))
    why = "no pair has exactly one answer that equals its reference"
    return {
        "prefers_right": clustered_mean(((hit, case.candidate) for case, hit in hits if case.choice != "none"), why),
        "right_of_all": clustered_mean(((hit, case.candidate) for case, hit in hits), why),
    }


def is_right(answer: str, reference: str, question: str) -> bool:
    """Return whether an answer is right.

    It is compared by `closed_accuracy` where the reference is yes, no or a choice of the question's, else by
    `exact_match`.

    Raises:
        InputError: The reference has no words.
    """
    wanted = " ".join(folded_words(reference))
    if wanted in ("yes", "no", *choices(question)):
        return bool(closed_accuracy(answer, reference, question))
    return bool(exact_match(answer, reference))


# --- agreement --------------------------------------------------------------------------------------------------------


def cohen_kappa(tables: Tables) -> NDArray[np.float64]:
    """Return Cohen's kappa of each table of two judges' classes, at most 1; 0 is chance.

    It is NaN where both judges put everything into one class: kappa is (p_o - p_e) / (1 - p_e), and p_e is then 1.

    Args:
        tables: (..., classes, classes) counts.

    Source: Cohen (Educ. Psychol. Meas. 1960). Low despite much agreement where one class is common: read it beside
    `gwet_ac1`.
    """
    return _beyond_chance(tables, lambda rows, columns: (rows * columns).sum(-1))


def gwet_ac1(tables: Tables) -> NDArray[np.float64]:
    """Return Gwet's AC1 of each table of two judges' classes, at most 1; 0 is chance.

    Args:
        tables: (..., classes, classes) counts.

    Source: Gwet (Br. J. Math. Stat. Psychol. 2008), for two raters.
    """

    def by_chance(rows: NDArray[np.float64], columns: NDArray[np.float64]) -> NDArray[np.float64]:
        mean = (rows + columns) / 2
        return (mean * (1 - mean)).sum(-1) / (mean.shape[-1] - 1)

    return _beyond_chance(tables, by_chance)


def _beyond_chance(tables: Tables, by_chance: Callable[[Any, Any], Any]) -> NDArray[np.float64]:
    """Return (agreement - chance) / (1 - chance) of each table; chance follows from the shares of rows and columns."""
    import numpy as np

    shares = np.asarray(tables, dtype=float)
    shares = shares / shares.sum((-2, -1), keepdims=True)
    chance = by_chance(shares.sum(-1), shares.sum(-2))
    room = 1 - chance
    agreed = np.trace(shares, axis1=-2, axis2=-1) - chance
    return np.divide(agreed, room, out=np.full_like(room, np.nan), where=room > 1e-12)


def agreement(some: Sequence[_Case], others: Sequence[_Case], seed: int) -> dict[str, Any]:
    """Return how two judges agree on the pairs that both scored.

    The intervals are percentiles over samples of images; samples where a figure means nothing are passed over.

    Returns:
        A 3 x 3 table of `CLASSES`, the first judge's in rows, and the share of equal choices, kappa and AC1.
    """
    import numpy as np

    by_key = {(case.candidate.id, case.answers): case for case in others if case.outcome != "not scored"}
    common: list[tuple[_Case, _Case]] = []
    for case in some:
        other_case = by_key.get((case.candidate.id, case.answers))
        if case.outcome != "not scored" and other_case is not None:
            common.append((case, other_case))
    by_image: dict[str, Tables] = defaultdict(lambda: np.zeros((len(CLASSES), len(CLASSES))))
    for case, other_case in common:
        by_image[_cluster(case.candidate)][CLASSES.index(case.choice), CLASSES.index(other_case.choice)] += 1
    why = "they scored no pair in common"
    if not common:
        return {"table": None, "equal": none(why), "kappa": none(why), "ac1": none(why)}
    tables = np.stack([by_image[name] for name in sorted(by_image)])  # (images, 3, 3)
    equal = [(case.choice == other_case.choice, case.candidate) for case, other_case in common]
    return {
        "table": tables.sum(0).astype(int).tolist(),
        "equal": clustered_mean(equal, why),
        "kappa": _bootstrapped(tables, cohen_kappa, seed),
        "ac1": _bootstrapped(tables, gwet_ac1, seed),
    }


def _bootstrapped(tables: Tables, figure: Callable[[Tables], Any], seed: int) -> dict[str, Any]:
    """Return a figure of the sum of the tables, with an interval; `bootstrap_clustered` does the same for means."""
    import numpy as np

    n, images = int(tables.sum()), len(tables)
    value = float(figure(tables.sum(0)))
    if math.isnan(value):
        why = "both always say the same, so that chance would explain all of it"
        return asdict(Estimate(None, n, images, None, None, None)) | {"why": why}
    # images with equal tables are drawn together: there are few different ones, however many images there are
    kinds, times = np.unique(tables, axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(images, times / images, DRAWS)  # (DRAWS, kinds)
    resampled = figure(np.tensordot(drawn.astype(float), kinds, 1))  # of (DRAWS, 3, 3) tables -> (DRAWS,)
    resampled = resampled[~np.isnan(resampled)]
    if images < 2 or len(resampled) < 2 or (error := float(resampled.std(ddof=1))) < 1e-12:
        return asdict(Estimate(value, n, images, None, None, None if images < 2 else 0.0))
    low, high = (float(end) for end in np.quantile(resampled, [0.025, 0.975]))
    return asdict(Estimate(value, n, images, low, high, error))
