"""How often `stllava-eval gate` errs: simulated runs with a known true change -> type1, power, coverage.

    python benchmarks/gate_simulation.py --json FILE [--quick]
    python benchmarks/gate_simulation.py --margins      # the rule behind the margins of reports/gate.yaml

Questions lie on images as in the official test splits (VQA-RAD exactly, from tasks/vqarad/test_ids.csv; SLAKE and
PathVQA with the official numbers of questions and images, dealt at random). Two systems' scores have a correlation of
about 0.5, as of unlike systems (our choice), so that differences are noisy; a tenth of the variance of
everything that decides an answer, of what the systems share and of what they do not, is the image's.

type1     share of comparisons without any true change that are failed; at most alpha
power     share of comparisons that are failed where one set's open or closed scores have truly lost twice the margin:
          of the six cases the worst
coverage  share of the 95 % intervals, of all checks, that hold the true change
compare_type1, mcnemar_type1  share of the tests of `compare` that find a difference at 5 % where there is none: signs
          flipped by image, and McNemar's, which takes questions as independent
bootstrap_coverage  share of the 95 % intervals of `compare` (recall, F1; VQA-RAD and SLAKE) that hold the true change
passed_*  share of comparisons that pass: without any change, of such systems and of two as alike as checkpoints of one
          training (correlation about 0.85); and where one set has truly lost its margin, at most alpha
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from figures import write
from scipy.special import ndtri
from scipy.stats import t as student

from stllava_eval.reports.compare import METRICS, Paired
from stllava_eval.reports.gate import decide
from stllava_eval.reports.gate_policy import Policy, read_policy
from stllava_eval.scoring.statistics import bootstrap_clustered, mcnemar, mean_clustered, sign_flip

SIZES = {"slake": (96, 645, 416), "pathvqa": (858, 3370, 3391)}  # images, open and closed questions
# mean and spread as in reported tables: shares of answers with all words and with half of them; right closed answers
OPEN = {"vqarad": (0.27, 0.20), "slake": (0.37, 0.20), "pathvqa": (0.06, 0.12)}
CLOSED = {"vqarad": 0.60, "slake": 0.58, "pathvqa": 0.53}
SHARED, ALIKE = 0.7, 0.97  # of the variance of what decides an answer; correlations of scores: 0.5, 0.85
IMAGE = 0.1
UNPARSED, BOTH = 0.03, 0.02  # shares of closed answers without a verdict, and with two
CHECKS = 18


def designs() -> dict[tuple[str, str], np.ndarray]:
    """The image of each question, by set and kind."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    with (Path(__file__).parents[1] / "tasks" / "vqarad" / "test_ids.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found["vqarad", row["kind"]].append(row["image_name"])
    made = {key: np.unique(images, return_inverse=True)[1] for key, images in found.items()}
    random = np.random.default_rng(0)
    for name, (images, open_n, closed_n) in SIZES.items():
        made[name, "open"], made[name, "closed"] = (
            random.integers(images, size=open_n),
            random.integers(images, size=closed_n),
        )
    return made


def latent(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """(questions,) standard normal, of which `IMAGE` is the image's."""
    return math.sqrt(IMAGE) * random.standard_normal(images.max() + 1)[images] + math.sqrt(
        1 - IMAGE
    ) * random.standard_normal(len(images))


def two(images: np.ndarray, random: np.random.Generator, shared: float) -> tuple[np.ndarray, np.ndarray]:
    """What decides the answers of two systems."""
    common = math.sqrt(shared) * latent(images, random)
    first, second = (common + math.sqrt(1 - shared) * latent(images, random) for _ in range(2))
    return first, second


def recall(values: np.ndarray, task: str, loss: float) -> np.ndarray:
    """1, 0.5 or 0, with a mean that is smaller by `loss`: shares of both kinds fall alike."""
    whole, half = (share * (1 - loss / mean(task)) for share in OPEN[task])
    return np.select([values > -ndtri(whole), values > -ndtri(whole + half)], [1.0, 0.5], 0.0)


def mean(task: str) -> float:
    return OPEN[task][0] + OPEN[task][1] / 2


def simulate(
    seed: int,
    layout: Mapping[tuple[str, str], np.ndarray],
    losses: Mapping[tuple[str, str], float],
    shared: float = SHARED,
) -> dict[tuple[str, str], Paired]:
    """What the gate is given; `losses` by set and kind, shares."""
    random = np.random.default_rng(seed)
    made: dict[tuple[str, str], Paired] = {}
    words: dict[str, list[np.ndarray]] = defaultdict(list)
    for (task, kind), images in layout.items():
        names = images.astype(str).tolist()
        loss = losses.get((task, kind), 0.0)
        first, second = two(images, random, shared)
        if kind == "open":
            before, after = recall(first, task, 0.0), recall(second, task, loss)
            made[task, "recall"] = Paired(before.tolist(), after.tolist(), names)
            precision = [0.8 + 0.2 * random.random(len(images)) for _ in range(2)]
            made[task, "f1"] = Paired((before * precision[0]).tolist(), (after * precision[1]).tolist(), names)
        else:
            share = CLOSED[task]
            before, after = (first > -ndtri(share)) * 1.0, (second > -ndtri(share - loss)) * 1.0
            made[task, "closed_accuracy"] = Paired(before.tolist(), after.tolist(), names)
            one, other = two(images, random, shared)
            unparsed = [(values > -ndtri(UNPARSED)) * 1.0 for values in (one, other)]
            format_ = [(values <= -ndtri(UNPARSED + BOTH)) * 1.0 for values in (one, other)]
            made[task, "unparsed"] = Paired(unparsed[0].tolist(), unparsed[1].tolist(), names)
            made[task, "closed_format"] = Paired(format_[0].tolist(), format_[1].tolist(), names)
        words[task].append(np.stack([np.round(10 * np.exp(0.4 * values)) for values in two(images, random, shared)]))
    for task, parts in words.items():
        first, second = np.concatenate(parts, axis=1)
        images = [name for kind in ("open", "closed") for name in layout[task, kind].astype(str).tolist()]
        made[task, "words"] = Paired(first.tolist(), second.tolist(), images)
    return {key: made[key] for key in sorted(made)}


def truth(task: str, score: str, losses: Mapping[tuple[str, str], float]) -> float:
    """The true change of a score."""
    if score == "f1":
        return -0.9 * losses.get((task, "open"), 0.0)
    kind = {"recall": "open", "closed_accuracy": "closed"}.get(score, "")
    return -losses.get((task, kind), 0.0)


def batch(work: tuple[range, Policy, dict[tuple[str, str], float], float]) -> Counter[str]:
    """Verdicts, and how many intervals hold the truth, over some seeds."""
    seeds, policy, losses, shared = work
    layout = designs()
    counts: Counter[str] = Counter()
    for seed in seeds:
        checks = decide(simulate(seed, layout, losses, shared), policy)
        verdicts = {check.verdict for check in checks}
        counts["fail" if "lost" in verdicts else "cannot decide" if "too few" in verdicts else "pass"] += 1
        for check in checks:
            if check.low is not None and check.high is not None:  # none where no answer differs
                counts["intervals"] += 1
                counts["covering"] += check.low <= truth(check.task, check.score, losses) <= check.high
    return counts


def scenario(
    pool: ProcessPoolExecutor,
    policy: Policy,
    losses: dict[tuple[str, str], float],
    times: int,
    shared: float = SHARED,
) -> Counter[str]:
    parts = pool.map(batch, [(range(start, times, 8), policy, losses, shared) for start in range(8)])
    return sum(parts, Counter())


def comparing(seeds: range) -> Counter[str]:
    """What `compare` says of systems without a true difference."""
    layout = designs()
    counts: Counter[str] = Counter()
    for seed in seeds:
        made = simulate(seed, layout, {})
        for (task, score), both in made.items():
            if score not in METRICS:
                continue
            counts["tests"] += 1
            counts["found"] += sign_flip(both.changes, both.images) < 0.05
            if score == "closed_accuracy":
                counts["closed"] += 1
                counts["mcnemar"] += mcnemar(both.first, both.second) < 0.05
            elif task != "pathvqa" and seed < 400:
                estimate = bootstrap_clustered(both.changes, both.images)
                assert estimate.low is not None
                assert estimate.high is not None
                counts["intervals"] += 1
                counts["covering"] += estimate.low <= 0 <= estimate.high
    return counts


def share(count: int, of: int) -> list[float]:
    """A share with its 95 % interval (Wilson)."""
    p, z = count / of, 1.96
    middle, reach = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    return [round(value, 4) for value in (p, (middle - reach) / (1 + z * z / of), (middle + reach) / (1 + z * z / of))]


def margins(policy: Policy, times: int = 100) -> dict[str, dict[str, float]]:
    """Half of the loss that one of `CHECKS` tests finds in 80 % of cases, rounded up to half a point.

    The test flips the signs of images' whole differences, so a loss widens what it is held against: by the loss, times
    the root of the sum of squares of the images' shares of the questions.
    """
    layout = designs()
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    shares: dict[tuple[str, str], np.ndarray] = {}
    for seed in range(times):
        for key, both in simulate(seed, layout, {}).items():
            if key[1] in ("recall", "f1", "closed_accuracy"):
                errors[key].append(mean_clustered(both.changes, both.images).standard_error or 0.0)
                shares[key] = np.array(list(Counter(both.images).values())) / len(both.images)
    made: dict[str, dict[str, float]] = defaultdict(dict)
    for (task, score), found in errors.items():
        critical, power = student.ppf([1 - policy.alpha / CHECKS, 0.8], len(shares[task, score]) - 1)
        error, loss = float(np.mean(found)), 0.0
        for _ in range(50):  # it settles after five
            loss = critical * math.hypot(error, loss * math.sqrt((shares[task, score] ** 2).sum())) + power * error
        made[task][score] = math.ceil(100 * loss) / 2
        print(f"{task} {score}: standard error {100 * error:.2f}, a loss of {100 * loss:.2f} shows", file=sys.stderr)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", default="-", help="where the figures go (default: -, stdout)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the comparisons")
    parser.add_argument("--margins", action="store_true", help="print the margins that the rule gives instead")
    arguments = parser.parse_args()
    policy = read_policy()
    if arguments.margins:
        print(json.dumps(margins(policy), indent=1))
        return
    times = 200 if arguments.quick else 2000
    with ProcessPoolExecutor(2) as pool:
        null = scenario(pool, policy, {}, times)
        compared = sum(pool.map(comparing, [range(start, times, 8) for start in range(8)]), Counter())
        alike = scenario(pool, policy, {}, times // 4, ALIKE)
        cases = {}
        at_margin = Counter()
        coverage = Counter(null)
        for task, kind in designs():
            margin = policy.margins[task]["recall" if kind == "open" else "closed_accuracy"] / 100
            lost = scenario(pool, policy, {(task, kind): 2 * margin}, times // 4)
            cases[f"{task} {kind}"] = share(lost["fail"], times // 4)
            coverage += lost
            at_margin += scenario(pool, policy, {(task, kind): margin}, times // 4)
            print(f"{task} {kind} loses {200 * margin:g} points: {dict(lost)}", file=sys.stderr)
    worst = min(cases, key=lambda name: cases[name])
    figures = {
        "type1": share(null["fail"], times),
        "power": cases[worst],
        "power_worst_case": worst,
        "power_by_case": cases,
        "coverage": share(coverage["covering"], coverage["intervals"]),
        "compare_type1": share(compared["found"], compared["tests"]),
        "mcnemar_type1": share(compared["mcnemar"], compared["closed"]),
        "bootstrap_coverage": share(compared["covering"], compared["intervals"]),
        "passed_without_change": share(null["pass"], times),
        "passed_without_change_alike": share(alike["pass"], times // 4),
        "failed_without_change_alike": share(alike["fail"], times // 4),
        "passed_at_margin": share(at_margin["pass"], 6 * (times // 4)),
        "comparisons": times,
        "alpha": policy.alpha,
        "margins": {task: dict(of) for task, of in policy.margins.items()},
    }
    write(figures, arguments.json)


if __name__ == "__main__":
    main()
