"""Estimate means of scores with intervals, and test the difference of two systems, where questions share images.

The scores of `metrics.py` come in, one per question; the reports (leaderboard, compare, gate) print what comes out.

Questions on one image are right or wrong together (VQA-RAD: 451 questions on 203 images, SLAKE: 1061 on 96), so images,
not questions, are what was drawn independently.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from stllava_eval.errors import InputError

ROUNDING = 1e-12  # a standard error below this share of the mean is 0. Our choice: float64 rounds at 2e-16
TIES = 1e-9  # sums that differ by this share of all absolute differences are equal. Our choice, for the same reason


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and how far it can be trusted.

    `low`, `high` and `standard_error` are None where the data cannot tell, which is not the same as certainty.
    """

    value: float | None
    """Mean over the n questions, each counted once; None for no questions."""
    n: int
    clusters: int
    """How many images the questions are about."""
    low: float | None
    high: float | None
    standard_error: float | None


def mean_clustered(scores: Sequence[float], clusters: Sequence[str], level: float = 0.95) -> Estimate:
    """Return the mean score with a confidence interval that allows any dependence between questions on one image.

    The standard error is the root of G / (G - 1) * sum over images of (sum of the image's deviations from the mean)^2,
    divided by n. The interval is the mean -+ that times Student's t with G - 1 degrees of freedom.

    Scores that all lie in [0, 1] are taken as shares: their interval is cut to [0, 1]. Where their standard error is 0
    (all right, all wrong, or all images equally good) it is Clopper and Pearson's interval for G trials, as if each
    image were one question: 20 of 20 images right gives [0.83, 1]. Other scores (a count of words) with standard error
    0 get no interval. With fewer than 2 images there is none at all.

    Simulated coverage at 95 %, images of 1 to 20 questions, two of three right: 94 to 96 % with 96 or 203 images, 93 %
    with 20, 91 % with 10. It falls near the ends: 98 % right gives 92 % with 96 images, 88 % with 40.

    Not for differences of scores: those that happen to be all positive would be cut at 0. Use `bootstrap_clustered`.

    Args:
        scores: One per question.
        clusters: The question's image, in the same order. The order itself does not matter.
        level: Chance in (0, 1) that such an interval covers the mean over all images of the kind.

    Source: Miller, arXiv:2411.00640, equation 4; G / (G - 1) and t as in Liang and Zeger's estimator for a mean
    (Cameron and Miller, J. Human Resources 2015), without which few images give too short an interval.

    Raises:
        InputError: Not one cluster per score, or a score is not finite.
    """
    from scipy.special import stdtrit

    sums, counts = _per_cluster(scores, clusters)
    n, g = int(counts.sum()), len(counts)
    if n == 0:
        return Estimate(None, 0, 0, None, None, None)
    value = math.fsum(scores) / n  # exact, so that no order of the questions changes a digit
    if g < 2:
        return Estimate(value, n, g, None, None, None)
    error = _error(sums, counts)
    are_shares = min(scores) >= 0 and max(scores) <= 1
    if error <= ROUNDING * max(1.0, abs(value)):
        low, high = _clopper_pearson(value, g, level) if are_shares else (None, None)
        return Estimate(value, n, g, low, high, 0.0)
    # Student's t with G - 1 degrees of freedom: Cameron and Miller (2015), on few clusters
    reach = float(stdtrit(g - 1, (1 + level) / 2)) * error
    low, high = value - reach, value + reach
    if are_shares:
        low, high = max(0.0, low), min(1.0, high)
    return Estimate(value, n, g, low, high, error)


def bootstrap_clustered(
    scores: Sequence[float], clusters: Sequence[str], draws: int = 10_000, seed: int = 0
) -> Estimate:
    """Return the mean score with a 95 % percentile interval over `draws` samples of images, drawn with replacement.

    Also for differences of two systems' scores on the same questions. An image brings all its questions, so a sample
    can have more or fewer than n. The interval never leaves the range of the scores and is not cut further; where no
    draw differs from another it is None. It is somewhat short for few images: `mean_clustered` allows for that.

    Args:
        scores: One per question.
        clusters: The question's image, in the same order. The order itself does not matter.
        draws: Samples; at 10,000 an end moves by about 0.03 standard errors from seed to seed.
        seed: Same seed, same interval.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; whole clusters as in Cameron,
    Gelbach and Miller (Rev. Econ. Stat. 2008).

    Raises:
        InputError: Not one cluster per score, or a score is not finite.
    """
    sums, counts = _per_cluster(scores, clusters)
    n, g = int(counts.sum()), len(counts)
    if n == 0:
        return Estimate(None, 0, 0, None, None, None)
    value = float(sums.sum() / n)
    if g < 2:
        return Estimate(value, n, g, None, None, None)
    random = np.random.default_rng(seed)
    means = np.empty(draws)
    for start in range(0, draws, 500):  # 500 draws of 858 images are 3 MB at a time
        # (draws, images): which image takes each place of a sample
        drawn = random.integers(g, size=(min(500, draws - start), g))
        # (draws, images) -> (draws,): a ratio of sums, since images have different counts of questions
        means[start : start + len(drawn)] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    error = float(means.std(ddof=1))
    if error <= ROUNDING * max(1.0, abs(value)):
        return Estimate(value, n, g, None, None, 0.0)
    low, high = np.quantile(means, [0.025, 0.975])  # the percentile interval: Efron and Tibshirani
    return Estimate(value, n, g, float(low), float(high), error)


def sign_flip(
    differences: Sequence[float], clusters: Sequence[str], draws: int = 10_000, seed: int = 0, one_sided: bool = False
) -> float:
    """Return the p-value, in (0, 1], of the hypothesis that two systems are equal.

    If they are equal, each image's difference could as well have the other sign, however the questions on that image
    depend on each other. p is the share of `draws` random assignments of signs whose sum is as far from 0 as the
    observed sum. The observed assignment counts among them, so p is never 0.

    Args:
        differences: Of the two systems' scores, one per question.
        clusters: The question's image, in the same order.
        draws: How many assignments of signs are drawn.
        seed: The same seed gives the same p.
        one_sided: Count only sums as far below 0, which gives the p-value of the hypothesis that there is no loss.

    Source: Fisher's randomisation test for pairs, with whole clusters flipped; (1 + b) / (1 + draws) as in Phipson and
    Smyth (Stat. Appl. Genet. Mol. Biol. 2010).

    Raises:
        InputError: Not one cluster per difference, or one is not finite.
    """
    return sign_flips([differences], clusters, draws, seed, one_sided)[0]


def sign_flips(
    columns: Sequence[Sequence[float]],
    clusters: Sequence[str],
    draws: int = 10_000,
    seed: int = 0,
    one_sided: bool = False,
) -> list[float]:
    """Return `sign_flip` of each column: differences of several scores, all flipped with the same signs."""
    if not columns or not len(clusters):
        return [1.0] * len(columns)
    sums = np.stack([_per_cluster(column, clusters)[0] for column in columns], axis=1)  # (images, columns)
    observed = sums.sum(axis=0)  # (columns,)
    # sums that are equal by the definition may differ by rounding, which must not decide whether one counts as as far
    slack = TIES * np.abs(sums).sum(axis=0)
    bound = (-observed if one_sided else np.abs(observed)) - slack
    as_far = np.zeros(len(columns), dtype=int)
    signs = _signs(len(sums), draws, seed)
    for start in range(0, draws, 1000):
        # (draws, images) @ (images, columns) -> (draws, columns); 1,000 draws at a time keep the floats below 7 MB
        flipped = signs[start : start + 1000].astype(float) @ sums
        as_far += ((-flipped if one_sided else np.abs(flipped)) >= bound).sum(axis=0)
    # (b + 1) / (m + 1): Phipson and Smyth (2010), the p-value of a test with randomly drawn permutations
    return [(1 + int(count)) / (1 + draws) for count in as_far]


@lru_cache(maxsize=12)  # open, closed and all questions of three sets take nine
def _signs(clusters: int, draws: int, seed: int) -> np.ndarray:
    """Return random signs, -1 or 1, as (draws, clusters) of int8: 8.6 MB for 858 images, those of PathVQA's test."""
    return np.random.default_rng(seed).integers(0, 2, size=(draws, clusters), dtype=np.int8) * 2 - 1


def mcnemar(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the exact two-sided p-value, in (0, 1], of the hypothesis that two systems are right equally often.

    It takes questions as independent, which those on one image are not: read it beside `sign_flip`.

    Args:
        first: 1 where the first system is right, 0 where it is not, one per question.
        second: Likewise, in the same order.

    Source: McNemar (Psychometrika 1947), with the binomial distribution of the questions that one alone gets right.

    Raises:
        InputError: Not as many of one as of the other, or a score is neither 0 nor 1.
    """
    from scipy.stats import binomtest

    if len(first) != len(second) or not {*first, *second} <= {0.0, 1.0}:
        raise InputError("McNemar's test takes as many scores of one system as of the other, each 0 or 1.")
    only_first = sum(a > b for a, b in zip(first, second, strict=True))
    only_second = sum(a < b for a, b in zip(first, second, strict=True))
    return float(binomtest(only_first, only_first + only_second).pvalue) if only_first + only_second else 1.0


def noninferior(differences: Sequence[float], clusters: Sequence[str], margin: float) -> float:
    """Return the p-value, in [0, 1], of the hypothesis that a system has lost `margin` or more; small where it has not.

    The test is Student's t of the mean difference, with the standard error of `mean_clustered`. p is at least
    (1 - margin) to the power of the number of images, the chance that a sample of images shows no loss at all although
    the share `margin` of all images is lost. Without this bound, differences that are all 0 would prove anything.

    Args:
        differences: Of the scores, candidate less baseline, one per question, in [-1, 1].
        clusters: The question's image, in the same order.
        margin: The loss of the mean that is still acceptable, in (0, 1).

    Raises:
        InputError: Not one cluster per difference, or one is not finite.
    """
    from scipy.special import stdtr

    sums, counts = _per_cluster(differences, clusters)
    if len(counts) < 2:
        return 1.0
    value, error, g = float(sums.sum() / counts.sum()), _error(sums, counts), len(counts)
    least = (1 - margin) ** g  # the likelihood of g images without a loss, see above
    if error == 0:
        return least if value > -margin else 1.0
    return max(float(stdtr(g - 1, -(value + margin) / error)), least)


def detectable(standard_error: float, clusters: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the difference of two means that a two-sided test finds with this power, in the standard error's unit.

    It is the standard error times the sum of Student's t quantiles at 1 - alpha / 2 and at `power`, with clusters - 1
    degrees of freedom.

    Source: Bloom, "Minimum detectable effects" (Evaluation Review 19:547, 1995); clusters in the place of subjects are
    our choice.
    """
    from scipy.special import stdtrit

    return float(stdtrit(clusters - 1, 1 - alpha / 2) + stdtrit(clusters - 1, power)) * standard_error


def holm(ps: Sequence[float]) -> list[float]:
    """Return the p-values adjusted by Holm's step-down method, in the order given.

    With adjusted values compared at 5 %, the chance of even one false finding among all tests is at most 5 %.

    Source: Holm, "A simple sequentially rejective multiple test procedure" (Scand. J. Stat. 6:65, 1979).
    """
    order = sorted(range(len(ps)), key=lambda index: ps[index])
    adjusted = [0.0] * len(ps)
    worst = 0.0
    for rank, index in enumerate(order):
        # the smallest of m is multiplied by m, the next by m - 1, ...; none falls below a smaller one before it
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = worst
    return adjusted


def _per_cluster(scores: Sequence[float], clusters: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of scores and the counts of questions, each (clusters,), by the clusters' names."""
    if len(scores) != len(clusters):
        raise InputError(f"{len(scores)} scores, {len(clusters)} clusters: each score needs the image it belongs to.")
    values = np.asarray(scores, dtype=float)
    if not np.isfinite(values).all():
        index = int(np.flatnonzero(~np.isfinite(values))[0])
        raise InputError(f"score {index} is {values[index]}: leave out what could not be scored, and count it.")
    number_of = {name: number for number, name in enumerate(sorted(set(clusters)))}
    cluster = np.fromiter((number_of[name] for name in clusters), dtype=np.intp, count=len(clusters))  # (questions,)
    counts = np.bincount(cluster, minlength=len(number_of))
    order = np.lexsort((values, cluster))  # sums of floats depend on their order, so that must not be the rows'
    return np.bincount(cluster[order], weights=values[order], minlength=len(number_of)), counts


def _error(sums: np.ndarray, counts: np.ndarray) -> float:
    """Return the standard error of the mean over questions; see `mean_clustered`."""
    n, g = counts.sum(), len(counts)
    deviations = sums - counts * (sums.sum() / n)  # (images,) sums of each image's deviations from the mean
    # Miller, equation 4, whose double sum over the questions of one image is the square of this sum; G / (G - 1) is the
    # correction for few clusters of Cameron and Miller (2015)
    return math.sqrt(g / (g - 1) * float(np.square(deviations).sum())) / float(n)


def _clopper_pearson(share: float, trials: int, level: float) -> tuple[float, float]:
    """Return the exact binomial interval of share * trials successes, which need not be a whole number.

    Source: Clopper and Pearson (Biometrika 26:404, 1934), whose two tails are quantiles of beta distributions.
    """
    from scipy.special import betaincinv

    successes, tail = share * trials, (1 - level) / 2
    # the ends at 0 and at all successes are exact: no beta distribution has a parameter 0
    low = float(betaincinv(successes, trials - successes + 1, tail)) if successes > 0 else 0.0
    high = float(betaincinv(successes + 1, trials - successes, 1 - tail)) if successes < trials else 1.0
    return low, high
