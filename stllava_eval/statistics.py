"""Scores of questions that share images -> their mean with an interval.

Questions on one image are right or wrong together (VQA-RAD: 451 questions on 203 images, SLAKE: 1061 on 96), so images,
not questions, are what was drawn independently.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stllava_eval.errors import InputError


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
    """Mean score with a confidence interval in which questions on one image may depend on each other in any way.

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
    value = float(sums.sum() / n)
    if g < 2:
        return Estimate(value, n, g, None, None, None)
    deviations = sums - counts * value
    error = float(np.sqrt(g / (g - 1) * np.square(deviations).sum()) / n)
    are_shares = min(scores) >= 0 and max(scores) <= 1
    if error <= 1e-12 * max(1.0, abs(value)):  # 0 but for rounding
        low, high = _clopper_pearson(value, g, level) if are_shares else (None, None)
        return Estimate(value, n, g, low, high, 0.0)
    reach = float(stdtrit(g - 1, (1 + level) / 2)) * error
    low, high = value - reach, value + reach
    if are_shares:
        low, high = max(0.0, low), min(1.0, high)
    return Estimate(value, n, g, low, high, error)


def bootstrap_clustered(
    scores: Sequence[float], clusters: Sequence[str], draws: int = 10_000, seed: int = 0
) -> Estimate:
    """Mean score with a 95 % percentile interval over `draws` samples of images, drawn with replacement.

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
        drawn = random.integers(g, size=(min(500, draws - start), g))
        means[start : start + len(drawn)] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    error = float(means.std(ddof=1))
    if error <= 1e-12 * max(1.0, abs(value)):
        return Estimate(value, n, g, None, None, 0.0)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(value, n, g, float(low), float(high), error)


def sign_flip(differences: Sequence[float], clusters: Sequence[str], draws: int = 10_000, seed: int = 0) -> float:
    """p of the hypothesis that two systems are equal: two-sided, in (0, 1].

    If they are, each image's difference could as well have the other sign, whatever the questions on it have to do with
    each other. The share of `draws` drawn signs whose sum is as far from 0 as the one that was found, with the found
    one counted among them, so that p is never 0.

    Args:
        differences: Of the two systems' scores, one per question.
        clusters: The question's image, in the same order.
        draws: Of signs.
        seed: Same seed, same p.

    Source: Fisher's randomisation test for pairs, with whole clusters flipped; (1 + b) / (1 + draws) as in Phipson and
    Smyth (Stat. Appl. Genet. Mol. Biol. 2010).

    Raises:
        InputError: Not one cluster per difference, or one is not finite.
    """
    sums, _ = _per_cluster(differences, clusters)
    sums = sums[sums != 0]
    if not len(sums):
        return 1.0
    random = np.random.default_rng(seed)
    found = abs(sums.sum()) * (1 - 1e-12)  # equal sums may differ by rounding
    as_far = 0
    for start in range(0, draws, 1000):
        signs = random.integers(0, 2, size=(min(1000, draws - start), len(sums)), dtype=np.int8) * 2.0 - 1
        as_far += int((np.abs(signs @ sums) >= found).sum())
    return (1 + as_far) / (1 + draws)


def holm(ps: Sequence[float]) -> list[float]:
    """Each p adjusted so that of all tests together one in twenty at 5 % is falsely found, in the order given.

    Source: Holm (Scand. J. Stat. 1979).
    """
    order = sorted(range(len(ps)), key=lambda place: ps[place])
    adjusted = [0.0] * len(ps)
    worst = 0.0
    for rank, place in enumerate(order):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = worst
    return adjusted


def _per_cluster(scores: Sequence[float], clusters: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(clusters,) sums of scores and counts of questions, clusters by name."""
    if len(scores) != len(clusters):
        raise InputError(f"{len(scores)} scores, {len(clusters)} clusters: each score needs the image it belongs to.")
    values = np.asarray(scores, dtype=float)
    if not np.isfinite(values).all():
        place = int(np.flatnonzero(~np.isfinite(values))[0])
        raise InputError(f"score {place} is {values[place]}: leave out what could not be scored, and count it.")
    names, of_cluster, counts = np.unique(np.asarray(clusters, dtype=str), return_inverse=True, return_counts=True)
    order = np.lexsort((values, of_cluster))  # sums of floats depend on their order, so that must not be the rows'
    return np.bincount(of_cluster[order], weights=values[order], minlength=len(names)), counts


def _clopper_pearson(share: float, trials: int, level: float) -> tuple[float, float]:
    """The exact binomial interval of share * trials successes, which need not be a whole number."""
    from scipy.special import betaincinv

    successes, tail = share * trials, (1 - level) / 2
    low = float(betaincinv(successes, trials - successes + 1, tail)) if successes > 0 else 0.0
    high = float(betaincinv(successes + 1, trials - successes, 1 - tail)) if successes < trials else 1.0
    return low, high
