"""Candidates + verdicts -> figures and a page: how far to trust the judges, what the data is like, what it cost."""

from __future__ import annotations

import base64
import io
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.errors import InputError
from stllava_eval.home import home, json_text, write_together
from stllava_eval.images import decode, pixel_hash, read_image
from stllava_eval.metrics import choices, closed_accuracy, exact_match, folded_words, words
from stllava_eval.statistics import Estimate, bootstrap_clustered, mean_clustered
from stllava_train.candidates import WHYS, Candidate, count
from stllava_train.ledger import Row
from stllava_train.verdicts import FATES, OUTCOMES, Preference, Rule, Verdict, fates, judged, preferences

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Tables = NDArray[np.float64]  # (..., 3, 3)

Asked = tuple[str, tuple[str, ...]]
"""A question about an image: `pixel_hash` of the one, `folded_words` of the other."""

CLASSES = ("first", "second", "none")  # which of two answers a judge prefers, by their places in the candidate
DRAWS = 2000  # of a bootstrap; Efron and Tibshirani (1993) want 1,000 or more for percentiles
BLEU_QUESTIONS = 500  # our choice: time grows with the square, and these take 4 s
NEAR_QUESTIONS = 2000  # our choice: 32 MB of likenesses
NEAR = 0.7  # ROUGE-L from which Self-Instruct (arXiv:2212.10560, section 2.2) takes an instruction for a repeat
UNSCORED = 0.05  # share of a judge's verdicts without scores from which the page warns. Our choice
SLIGHT = 0.2  # agreement beyond chance up to which Landis and Koch (Biometrics 1977) call it slight
BLIND = 0.5  # share of chosen answers that come without the image from which the page warns. Our choice
EXAMPLES, OTHER_EXAMPLES = 24, 4  # preferred pairs to look at, and pairs of each other fate. Our choice
THUMBNAIL, QUALITY = 256, 80  # px of its longer side at most; of the JPEG. Our choice
# First words of a question. Those of the first group can be answered by yes or no
TYPES = {
    "yes/no": "is are was were does do did has have had can could will would should isn't aren't doesn't don't",
    "what": "what what's",
    "which": "which",
    "where": "where",
    "how": "how",
}


def read_references(paths: Sequence[Path], candidates: Sequence[Candidate]) -> dict[Asked, str]:
    """What the conversations in these files answer about the candidates' images.

    A conversation is about an image if its image's file has the name of a candidate's and the same pixels. A question
    with two answers in different words is left out, and so is an answer without words.

    Args:
        paths: As `stllava-train data` writes them.
        candidates: Whose questions may be among them.

    Raises:
        InputError: A file cannot be read or holds an unsound record, or an image cannot be decoded.
    """
    from stllava_train.conversations import read_conversations

    names = {Path(candidate.image).name for candidate in candidates}
    hashes = {candidate.image_sha256 for candidate in candidates}
    pixels = cache(lambda file: pixel_hash(_opened(file)))
    found: dict[Asked, dict[tuple[str, ...], str]] = defaultdict(dict)
    for path in paths:
        conversations, problems = read_conversations(path)
        if problems:
            raise InputError(f"{problems[0]} `stllava-train check {path}` names all {len(problems)} problems.")
        for one in conversations:
            if one.image is None or one.image.name not in names or pixels(one.image) not in hashes:
                continue
            for place, (question, answer) in enumerate(one.rounds):
                if folded_words(answer) and one.learns(place):  # an answer that is not learnt may be a wrong one
                    found[pixels(one.image), folded_words(question)].setdefault(folded_words(answer), answer)
    return {key: next(iter(answers.values())) for key, answers in found.items() if len(answers) == 1}


def audit(
    candidates: Sequence[Candidate],
    verdicts: Iterable[Verdict],
    images: Path,
    rule: Rule,
    references: Mapping[Asked, str] | None = None,
    seed: int = 0,
    *,
    rows: Sequence[Row] = (),
    judges: Sequence[str] = (),
    blind: Mapping[str, str] | None = None,
    note: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """Every figure of the page, as JSON holds it; equal for equal input and seed, whatever the verdicts' order.

    A share or mean is an `Estimate`: value, n, clusters (images of different pixels), and a 95 % interval that allows
    for what questions about one image share. Where there is no value, `why` says what was missing.

    Args:
        candidates: What was judged.
        verdicts: On them; of several with one key the last counts, as a call that went on after a kill leaves them.
            Those on other candidates are counted and passed over.
        images: The folder of the candidates' images.
        rule: How verdicts become preferences.
        references: Right answers; `read_references` reads them.
        seed: Of samples and bootstraps.
        rows: Of the file of candidates (`read_rows`), which know what was left out.
        judges: Whose verdicts make pairs (default: all that occur). The figures by judge are of all.
        blind: The same model's greedy answers to the candidates' questions before a black image, by candidate id.
        note: What readers must know of the data, for the page's head.
        progress: Whether to show a bar on stderr.

    Raises:
        InputError: There is no candidate, or an image is missing or is not what the candidates are about.
    """
    if not candidates:
        raise InputError("no candidates: there is nothing to audit. Pass a file that `stllava-train candidates` wrote.")
    of = {candidate.id: candidate for candidate in candidates}
    latest = {one.key: one for one in verdicts}
    known = _known(latest.values(), of)
    pairs = preferences(candidates, known, rule, judges)
    preferred = [pair for pair in pairs if pair.fate == "preferred"]
    names = sorted({one.judge for one in known})
    cases = {name: _cases([one for one in known if one.judge == name], of, rule) for name in names}
    figures: dict[str, Any] = {
        "format": 1,
        "note": note,
        "seed": seed,
        "rule": asdict(rule),
        "judges": [name for name in names if not judges or name in judges],
        "verdicts": {"on these candidates": len(known), "on others": len(latest) - len(known)},
        "preferences": _preferences(pairs, of, seed),
        "judging": {name: _judging(cases[name], of, rule, references, seed) for name in names},
        "agreement": [
            {"judges": list(both), **_agreement(cases[both[0]], cases[both[1]], seed)}
            for both in combinations(names, 2)
        ],
        "data": _data(candidates, preferred, of, rows, seed),
        "leaks": _leaks(candidates, images, progress),
        "blind": _blind(preferred, of, blind),
        "cost": {name: _cost([one for one in known if one.judge == name]) for name in names},
    }
    return figures | {"checks": _checks(figures)}


def _known(verdicts: Iterable[Verdict], of: Mapping[str, Candidate]) -> list[Verdict]:
    """Those on answers and images of the candidates, by their keys: sums of floats depend on their order."""
    return [
        one
        for one in sorted(verdicts, key=lambda one: one.key)
        if (candidate := of.get(one.id)) is not None
        and one.image_sha256 == candidate.image_sha256
        and 0 <= min(one.shown) < max(one.shown) < len(candidate.answers)
    ]


# --- estimates --------------------------------------------------------------------------------------------------------


def _mean(scores: Iterable[tuple[float, Candidate]], why: str, seed: int | None = None) -> dict[str, Any]:
    """The mean of scores, each with its candidate, whose image is the cluster.

    With a seed its interval is the bootstrap's, which differences need; without, `mean_clustered`'s.
    """
    scores = list(scores)
    values, clusters = [float(score) for score, _ in scores], [_cluster(candidate) for _, candidate in scores]
    if not values:
        return _none(why)
    if seed is None:
        return asdict(mean_clustered(values, clusters))
    return asdict(bootstrap_clustered(values, clusters, DRAWS, seed))


def _none(why: str) -> dict[str, Any]:
    return asdict(Estimate(None, 0, 0, None, None, None)) | {"why": why}


def _cluster(candidate: Candidate) -> str:
    return candidate.image_sha256[:16]  # 64 bits tell a million images apart, and the statistics hold many


def _percentiles(values: Sequence[float]) -> list[float] | None:
    """Lower quartile, median and upper quartile."""
    import numpy as np

    return [float(one) for one in np.quantile(values, [0.25, 0.5, 0.75])] if values else None


# --- judges -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """What one judge makes of two answers to a question."""

    candidate: Candidate
    answers: tuple[int, int]  # places, the lower one first
    verdicts: tuple[Verdict, ...]
    fate: str  # of `FATES`, all but "judges disagree"
    choice: str  # of `CLASSES`

    @property
    def chosen(self) -> str:
        return self.candidate.answers[self.answers[self.choice == "second"]]

    @property
    def rejected(self) -> str:
        return self.candidate.answers[self.answers[self.choice == "first"]]


def _cases(verdicts: Iterable[Verdict], of: Mapping[str, Candidate], rule: Rule) -> list[_Case]:
    """One judge's cases, in the order of its verdicts."""
    about: dict[tuple[str, tuple[int, int]], list[Verdict]] = defaultdict(list)
    for one in verdicts:
        about[one.id, (min(one.shown), max(one.shown))].append(one)
    found = []
    for (id, answers), some in about.items():
        fate, margin = judged(some, rule)
        choice = "none" if fate != "preferred" else "first" if margin > 0 else "second"
        found.append(_Case(of[id], answers, tuple(some), fate, choice))
    return found


def _judging(
    cases: Sequence[_Case], of: Mapping[str, Candidate], rule: Rule, references: Mapping[Asked, str] | None, seed: int
) -> dict[str, Any]:
    """How one judge judges.

    Sources: position consistency, preference by position and repetition stability are the three of Shi et al.
    (arXiv:2406.07791); the bias to length is read off as in Zheng et al. (arXiv:2306.05685) and AlpacaEval
    (arXiv:2404.04475). Theirs differ in detail: see each.
    """
    verdicts = [one for case in cases for one in case.verdicts]
    scored = [(one, one.scores, of[one.id]) for one in verdicts if one.scores is not None]
    decided = [case for case in cases if case.choice != "none"]
    all_scores = [score for _, scores, _ in scored for score in scores]
    by_length = [(words(case.chosen) - words(case.rejected), case.candidate) for case in decided]
    outcomes = Counter(one.outcome for one in verdicts)
    in_order = sum(one.shown[0] < one.shown[1] for one in verdicts)
    return {
        "verdicts": len(verdicts),
        "outcomes": {name: outcomes[name] for name in OUTCOMES},
        "scored": _mean(((one.scores is not None, of[one.id]) for one in verdicts), "no verdict"),
        "pairs": len(cases),
        "fates": {name: sum(case.fate == name for case in cases) for name in FATES if name != "judges disagree"},
        "orders": {"lower place first": in_order, "higher place first": len(verdicts) - in_order},
        "consistent": _mean(_consistency(cases), "no pair was scored in both orders"),
        # ties tell nothing; asked in both orders, an unbiased judge prefers the first in one half
        "prefers_first": _mean(
            ((scores[0] > scores[1], about) for _, scores, about in scored if scores[0] != scores[1]),
            "no verdict prefers an answer",
        ),
        "stable": _mean(_stability(cases), "nothing was asked twice in one order"),
        "prefers_longer": _mean(
            ((more > 0, about) for more, about in by_length if more), "no preferred pair has answers of unequal length"
        ),
        "equally_long": sum(more == 0 for more, _ in by_length),
        "words_more": _mean(by_length, "no pair is preferred", seed),
        "scores": {f"{score:g}": times for score, times in sorted(Counter(all_scores).items())},
        "score": _mean(((score, about) for _, both, about in scored for score in both), "no scores"),
        "score_quartiles": _percentiles(all_scores),
        **_truth(cases, references),
    }


def _consistency(cases: Iterable[_Case]) -> Iterable[tuple[float, Candidate]]:
    """1 where the same answer wins in both orders or both are ties, else 0, of pairs scored in both.

    Scores of repetitions are averaged. The margin plays no part.
    """
    for case in cases:
        wins: dict[bool, list[float]] = defaultdict(list)
        for one in case.verdicts:
            if one.scores is not None:
                in_order = one.shown == case.answers
                wins[in_order].append((one.scores[0] - one.scores[1]) * (1 if in_order else -1))
        if len(wins) == 2:
            yield float(_sign(sum(wins[True])) == _sign(sum(wins[False]))), case.candidate


def _stability(cases: Iterable[_Case]) -> Iterable[tuple[float, Candidate]]:
    """Share of two repetitions of one order that decide alike, in [0, 1], for each order of a pair asked repeatedly."""
    for case in cases:
        decisions: dict[bool, list[int]] = defaultdict(list)
        for one in case.verdicts:
            if one.scores is not None:
                decisions[one.shown == case.answers].append(_sign(one.scores[0] - one.scores[1]))
        for found in decisions.values():
            if len(found) > 1:
                equal = [one == other for one, other in combinations(found, 2)]
                yield sum(equal) / len(equal), case.candidate


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _truth(cases: Iterable[_Case], references: Mapping[Asked, str] | None) -> dict[str, Any]:
    """Which answer a judge prefers where exactly one of the two is right.

    `prefers_right` is of the pairs in which it prefers one, `right_of_all` of all it scored.
    """
    if references is None:
        why = "no references were given"
        return {"prefers_right": _none(why), "right_of_all": _none(why)}
    found: list[tuple[_Case, bool]] = []
    for case in cases:
        reference = references.get((case.candidate.image_sha256, folded_words(case.candidate.question)))
        if case.fate == "not scored" or reference is None or not folded_words(reference):
            continue
        right = [is_right(case.candidate.answers[place], reference, case.candidate.question) for place in case.answers]
        if right[0] != right[1]:
            found.append((case, case.choice == ("first" if right[0] else "second")))
    why = "no pair has exactly one answer that equals its reference"
    return {
        "prefers_right": _mean(((hit, case.candidate) for case, hit in found if case.choice != "none"), why),
        "right_of_all": _mean(((hit, case.candidate) for case, hit in found), why),
    }


def is_right(answer: str, reference: str, question: str) -> bool:
    """Is the answer right, by `closed_accuracy` where the reference is yes, no or a choice of the question's, else by
    `exact_match`?

    Raises:
        InputError: The reference has no words.
    """
    wanted = " ".join(folded_words(reference))
    if wanted in ("yes", "no", *choices(question)):
        return bool(closed_accuracy(answer, reference, question))
    return bool(exact_match(answer, reference))


# --- agreement --------------------------------------------------------------------------------------------------------


def cohen_kappa(tables: Tables) -> NDArray[np.float64]:
    """Cohen's kappa of each table of two judges' classes, at most 1; 0 is chance, NaN where all is one class to both.

    Args:
        tables: (..., classes, classes) counts.

    Source: Cohen (Educ. Psychol. Meas. 1960). Low despite much agreement where one class is common: read it beside
    `gwet_ac1`.
    """
    return _beyond_chance(tables, lambda rows, columns: (rows * columns).sum(-1))


def gwet_ac1(tables: Tables) -> NDArray[np.float64]:
    """Gwet's AC1 of each table of two judges' classes, at most 1; 0 is chance.

    Args:
        tables: (..., classes, classes) counts.

    Source: Gwet (Br. J. Math. Stat. Psychol. 2008), for two raters.
    """

    def by_chance(rows: NDArray[np.float64], columns: NDArray[np.float64]) -> NDArray[np.float64]:
        mean = (rows + columns) / 2
        return (mean * (1 - mean)).sum(-1) / (mean.shape[-1] - 1)

    return _beyond_chance(tables, by_chance)


def _beyond_chance(tables: Tables, by_chance: Callable[[Any, Any], Any]) -> NDArray[np.float64]:
    """(agreement - chance) / (1 - chance), of shares of rows and columns."""
    import numpy as np

    shares = np.asarray(tables, dtype=float)
    shares = shares / shares.sum((-2, -1), keepdims=True)
    chance = by_chance(shares.sum(-1), shares.sum(-2))
    room = 1 - chance
    agreed = np.trace(shares, axis1=-2, axis2=-1) - chance
    return np.divide(agreed, room, out=np.full_like(room, np.nan), where=room > 1e-12)


def _agreement(some: Sequence[_Case], others: Sequence[_Case], seed: int) -> dict[str, Any]:
    """Of two judges on the pairs that both scored: a 3 x 3 table of `CLASSES`, the first judge's in rows, and figures.

    The intervals are percentiles over samples of images; samples where a figure means nothing are passed over.
    """
    import numpy as np

    by_key = {(case.candidate.id, case.answers): case for case in others if case.fate != "not scored"}
    both = [
        (case, by_key[key])
        for case in some
        if case.fate != "not scored" and (key := (case.candidate.id, case.answers)) in by_key
    ]
    by_image: dict[str, Tables] = defaultdict(lambda: np.zeros((len(CLASSES), len(CLASSES))))
    for one, other in both:
        by_image[_cluster(one.candidate)][CLASSES.index(one.choice), CLASSES.index(other.choice)] += 1
    why = "they scored no pair in common"
    if not both:
        return {"table": None, "equal": _none(why), "kappa": _none(why), "ac1": _none(why)}
    tables = np.stack([by_image[name] for name in sorted(by_image)])
    return {
        "table": tables.sum(0).astype(int).tolist(),
        "equal": _mean(((one.choice == other.choice, one.candidate) for one, other in both), why),
        "kappa": _bootstrapped(tables, cohen_kappa, seed),
        "ac1": _bootstrapped(tables, gwet_ac1, seed),
    }


def _bootstrapped(tables: Tables, figure: Callable[[Tables], Any], seed: int) -> dict[str, Any]:
    """A figure of the sum of the images' tables; see `bootstrap_clustered`, which knows means alone."""
    import numpy as np

    n, images = int(tables.sum()), len(tables)
    value = float(figure(tables.sum(0)))
    if math.isnan(value):
        why = "both always say the same, so that chance would explain all of it"
        return asdict(Estimate(None, n, images, None, None, None)) | {"why": why}
    # images with equal tables are drawn together: there are few different ones, however many images there are
    kinds, times = np.unique(tables, axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(images, times / images, DRAWS)
    found = figure(np.tensordot(drawn.astype(float), kinds, 1))
    found = found[~np.isnan(found)]
    if images < 2 or len(found) < 2 or (error := float(found.std(ddof=1))) < 1e-12:
        return asdict(Estimate(value, n, images, None, None, None if images < 2 else 0.0))
    low, high = (float(one) for one in np.quantile(found, [0.025, 0.975]))
    return asdict(Estimate(value, n, images, low, high, error))


# --- data -------------------------------------------------------------------------------------------------------------


def _preferences(pairs: Sequence[Preference], of: Mapping[str, Candidate], seed: int) -> dict[str, Any]:
    preferred = [pair for pair in pairs if pair.fate == "preferred"]
    margins = [pair.margin for pair in preferred]
    return {
        "pairs": len(pairs),
        "fates": {
            name: {"count": times, **_mean(((pair.fate == name, of[pair.id]) for pair in pairs), "no pair")}
            for name, times in fates(pairs).items()
        },
        "margin": _mean(((pair.margin, of[pair.id]) for pair in preferred), "no pair is preferred", seed),
        "margin_quartiles": _percentiles(margins),
        "prefers_lower_place": _mean(
            ((pair.chosen == pair.answers[0], of[pair.id]) for pair in preferred), "no pair is preferred"
        ),
    }


def _data(
    candidates: Sequence[Candidate],
    preferred: Sequence[Preference],
    of: Mapping[str, Candidate],
    rows: Sequence[Row],
    seed: int,
) -> dict[str, Any]:
    counts = count(rows)
    types = {candidate.id: _type(candidate.question) for candidate in candidates}
    chosen = [(_text(pair, pair.chosen, of), of[pair.id]) for pair in preferred]
    rejected = [(_text(pair, pair.rejected, of), of[pair.id]) for pair in preferred]
    seen: set[Any] = set()
    again: list[tuple[float, Candidate]] = []
    for candidate in candidates:
        key = candidate.image_sha256, folded_words(candidate.question)
        again.append((key in seen, candidate))
        seen.add(key)
    why = "no pair is preferred"
    return {
        "images": len({candidate.image_sha256 for candidate in candidates}),
        "questions": len({folded_words(candidate.question) for candidate in candidates}),
        "candidates": len(candidates),
        "answers": sum(len(candidate.answers) for candidate in candidates),
        "asked": None
        if not rows
        else {
            "images": counts["images"],
            "images that cannot be decoded": counts["images that cannot be decoded"],
            "questions": counts["questions"],
            "left out": {name: counts[name] for name in WHYS},
        },
        "types": {
            name: _mean(((types[candidate.id] == name, candidate) for candidate in candidates), "no candidate")
            for name in (*TYPES, "other")
        },
        "variety": {
            "questions": _variety([candidate.question for candidate in candidates]),
            "chosen": _variety([text for text, _ in chosen]),
            "rejected": _variety([text for text, _ in rejected]),
        },
        "self_bleu": _self_bleu(candidates, seed),
        "near_repeats": _near_repeats(candidates, seed),
        "repeats": _mean(again, "no candidate"),
        "words": {
            name: _mean(((words(text), about) for text, about in texts), why, seed)
            | {"quartiles": _percentiles([words(text) for text, _ in texts])}
            for name, texts in (("chosen", chosen), ("rejected", rejected))
        },
        "words_more": _mean(
            ((words(one) - words(other), about) for (one, about), (other, _) in zip(chosen, rejected, strict=True)),
            why,
            seed,
        ),
    }


def _text(pair: Preference, place: int | None, of: Mapping[str, Candidate]) -> str:
    if place is None:
        raise ValueError(f"{pair.id}: a pair of fate {pair.fate} has no chosen answer")
    return of[pair.id].answers[place]


def _type(question: str) -> str:
    first = folded_words(question)[:1]
    return next((name for name, known in TYPES.items() if {*first} & {*known.split()}), "other")


def _variety(texts: Sequence[str]) -> dict[str, Any]:
    """Shares of the texts, of their words and of their pairs of words that are distinct, in [0, 1], None of nothing.

    They fall as texts are added, so compare equal numbers of them alone; for the same reason they have no interval.

    Source: distinct-1 and distinct-2 of Li et al. (NAACL 2016), over all texts together.
    """
    folded = [folded_words(text) for text in texts]
    parts: dict[str, list[Any]] = {
        "texts": folded,
        "words": [word for text in folded for word in text],
        "pairs": [pair for text in folded for pair in pairwise(text)],
    }
    return {"n": len(folded), "n_words": len(parts["words"])} | {
        f"distinct_{name}": len(set(part)) / len(part) if part else None for name, part in parts.items()
    }


def _self_bleu(candidates: Sequence[Candidate], seed: int) -> dict[str, Any]:
    """How well the other questions of a sample foretell a question, in [0, 1], lower is more varied: mean BLEU-4.

    The interval tells how it varies from image to image against these other questions; a larger sample raises it.

    Source: Texygen's self-BLEU (arXiv:1802.01886); smoothing 1 of Chen and Cherry (2014), as there.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    sample = [one for one in _sampled(candidates, BLEU_QUESTIONS, seed) if folded_words(one.question)]
    texts = [folded_words(one.question) for one in sample]
    if len(texts) < 2:
        return _none("fewer than two questions")
    smoothing = SmoothingFunction().method1

    @cache
    def foretold(text: tuple[str, ...]) -> float:
        others = list(texts)
        others.remove(text)
        return float(sentence_bleu(others, text, smoothing_function=smoothing))

    return _mean(((foretold(text), one) for text, one in zip(texts, sample, strict=True)), "no question")


def _near_repeats(candidates: Sequence[Candidate], seed: int) -> dict[str, Any]:
    """Share of a sample of questions whose `rouge_l` with another one of it, about any image, is `NEAR` or more."""
    from rapidfuzz import process
    from rapidfuzz.distance import Indel

    sample = _sampled(candidates, NEAR_QUESTIONS, seed)
    texts = [folded_words(one.question) for one in sample]
    alike = process.cdist(texts, texts, scorer=Indel.normalized_similarity, dtype="float64")  # `rouge_l` of every two
    return _mean(zip((alike >= NEAR).sum(1) > 1, sample, strict=True), "no question")


def _sampled(candidates: Sequence[Candidate], most: int, seed: int) -> list[Candidate]:
    if len(candidates) <= most:
        return list(candidates)
    places = random.Random(seed).sample(range(len(candidates)), most)
    return [candidates[place] for place in sorted(places)]


def _leaks(candidates: Sequence[Candidate], images: Path, progress: bool) -> dict[str, Any]:
    """What of the candidates is in a prepared test split: images by `check.looked_at`, questions by their words.

    Raises:
        InputError: An image cannot be read, or has other pixels than the candidates say.
    """
    from stllava_eval.datasets import read_manifest, read_split
    from stllava_train.check import SETS, looked_at
    from stllava_train.conversations import Conversation

    about = {candidate.image: candidate for candidate in candidates}
    seen = looked_at([Conversation(name, images / name, (), str(images / name)) for name in about], progress)
    if seen.broken:
        raise InputError(f"{seen.broken[0].what} Pass the folder of the candidates' images with --images.")
    for candidate in candidates:
        if seen.pixels[file := images / candidate.image] != candidate.image_sha256:
            raise InputError(f"{file}: not the image that {candidate.id} is about. Pass its folder (--images).")
    prepared = [name for name in SETS if (home() / "data" / name / "test.json").exists()]
    compared = {
        "prepared": prepared,
        "not_prepared": [name for name in SETS if name not in prepared],
        "samples": [name for name in prepared if read_manifest(name, "test").sample],
    }
    if not prepared:
        why = "no test split is prepared (`stllava-eval prepare`)"
        return {**compared, "images": _none(why), "questions": _none(why), "both": _none(why), "examples": []}
    asked: set[Asked] = set()
    for name in prepared:
        split = read_split(name, "test", images=False)
        asked |= {
            (pixels, folded_words(question))
            for pixels, question in zip(split["image_sha256"], split["question"], strict=True)
        }
    questions = {question for _, question in asked}
    leaking = {problem.id for problem in seen.leaks}
    each = {candidate.image_sha256: candidate for candidate in candidates}
    hashes = {about[name].image_sha256 for name in leaking}
    folded = [(candidate, folded_words(candidate.question)) for candidate in candidates]
    return {
        **compared,
        "images": _mean(((pixels in hashes, one) for pixels, one in each.items()), "no image"),
        "questions": _mean(((text in questions, one) for one, text in folded), "no question"),
        "both": _mean((((one.image_sha256, text) in asked, one) for one, text in folded), "no question"),
        "examples": [f"{problem.id}: {problem.what}" for problem in seen.leaks[:OTHER_EXAMPLES]],
    }


def _blind(
    preferred: Sequence[Preference], of: Mapping[str, Candidate], blind: Mapping[str, str] | None
) -> dict[str, Any]:
    """Share of preferred pairs whose chosen answer the model gives, by its folded words, without seeing the image."""
    if blind is None:
        return _none("no answers without the image were given")
    return _mean(
        (
            (folded_words(blind[pair.id]) == folded_words(_text(pair, pair.chosen, of)), of[pair.id])
            for pair in preferred
            if pair.id in blind
        ),
        "no preferred pair has an answer without the image",
    )


def _cost(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Tokens and USD of one judge's verdicts; those without a count or a price are counted beside."""
    tokens = [one.tokens for one in verdicts if one.tokens is not None]
    prices = [one.cost for one in verdicts if one.cost is not None]
    dates = sorted(one.date for one in verdicts if one.date is not None)
    return {
        "verdicts": len(verdicts),
        "models": sorted({one.model or "" for one in verdicts} - {""}),
        "first": dates[0] if dates else None,
        "last": dates[-1] if dates else None,
        "prompt_tokens": sum(prompt for prompt, _ in tokens),
        "reply_tokens": sum(reply for _, reply in tokens),
        "tokens_unknown": len(verdicts) - len(tokens),
        "usd": math.fsum(prices) if prices else None,
        "price_unknown": len(verdicts) - len(prices),
    }


# --- what stands out --------------------------------------------------------------------------------------------------


def _checks(figures: Mapping[str, Any]) -> list[dict[str, str]]:
    """What a reader should know first: `about`, `level` ("warning", "fine" or "not tested") and `text`, a sentence.

    A bias is warned of where its interval leaves out one half. With many judges, one in twenty is by chance.
    """
    found = [(name, *check) for name, one in figures["judging"].items() for check in _of_judge(one)]
    found += [(" and ".join(one["judges"]), *_of_two(one)) for one in figures["agreement"]]
    found += [("leaks", *check) for check in _of_leaks(figures["leaks"])]
    repeats, blind = figures["data"]["repeats"], figures["blind"]
    text = f"{_percent(repeats)} of the candidates repeat a question about their image."
    found.append(("data", "warning" if repeats["value"] else "fine", text))
    if blind["value"] is None:
        text = f"Whether questions can be answered without the image cannot be told: {blind['why']}."
        found.append(("data", "not tested", text))
    else:
        text = f"{_percent(blind)} of the chosen answers come without the image too."
        found.append(("data", "fine" if blind["value"] < BLIND else "warning", text))
    return [{"about": about, "level": level, "text": text} for about, level, text in found]


def _of_judge(one: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(level, text) of each check of one judge."""
    if (silent := 1 - one["scored"]["value"]) >= UNSCORED:
        yield "warning", f"{100 * silent:.1f} % of its verdicts have no scores. What it scored may be unlike the rest."
    if not all(one["orders"].values()):
        yield "not tested", "It saw each pair in one order: a bias to a position looks like a better answer."
    else:
        yield _of_half(
            one["prefers_first"], "a bias to a position", "the answer shown first", "the answer shown second"
        )
    yield _of_half(one["prefers_longer"], "a bias to length", "the longer answer", "the shorter answer")
    right = one["prefers_right"]
    if right["value"] is None:
        yield "not tested", f"Whether it prefers what is right cannot be told: {right['why']}."
    elif right["low"] is not None and right["low"] > 0.5:
        yield "fine", f"It prefers the right answer: {_percent(right)} where it prefers one."
    else:
        yield "warning", f"It is not shown to prefer the right answer: {_percent(right)} where it prefers one."


def _of_half(share: Mapping[str, Any], bias: str, above: str, below: str) -> tuple[str, str]:
    """(level, text) of a share that is one half where there is no bias."""
    if share["low"] is None:
        return "not tested", f"Whether it has {bias} cannot be told: {share.get('why', 'all is about one image')}."
    if share["low"] <= 0.5 <= share["high"]:
        return "fine", f"No sign of {bias}: {_percent(share)}, where one half is none."
    return "warning", f"It prefers {above if share['value'] > 0.5 else below}: {_percent(share)}, not one half."


def _of_two(one: Mapping[str, Any]) -> tuple[str, str]:
    """(level, text) of two judges: by the higher of the lower ends, since kappa fails where one class dominates."""
    lows = [one[name]["low"] for name in ("kappa", "ac1") if one[name]["low"] is not None]
    shown = f"kappa {_interval(one['kappa'])}, AC1 {_interval(one['ac1'])}"
    if one["equal"]["value"] == 1:
        return "fine", f"They agree on all {one['equal']['n']} pairs that both scored."
    if not lows:
        why = one["equal"].get("why", "all is about one image")
        return "not tested", f"Their agreement beyond chance cannot be told: {why}."
    if max(lows) > SLIGHT:
        return "fine", f"They agree beyond chance: {shown}."
    return "warning", f"They are not shown to agree more than slightly: {shown}."


def _of_leaks(leaks: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(level, text) of what is in test splits."""
    if not leaks["prepared"]:
        yield "not tested", f"{leaks['images']['why'].capitalize()}."
        return
    for share, text in (
        (leaks["images"], "of the images are, or look like, images of a test split"),
        (leaks["both"], "of the candidates ask what a test split asks about the same image"),
    ):
        yield "warning" if share["value"] else "fine", f"{_percent(share)} {text}."
    if leaks["not_prepared"]:
        yield "not tested", f"Not compared with {', '.join(leaks['not_prepared'])}: their test splits are not prepared."
    if leaks["samples"]:
        yield "not tested", f"Of {', '.join(leaks['samples'])} only the sample is prepared: compared with nothing else."


def _interval(figure: Mapping[str, Any]) -> str:
    value = _number(figure["value"], 2)
    return value if figure["low"] is None else f"{value} [{_number(figure['low'], 2)}, {_number(figure['high'], 2)}]"


def _percent(share: Mapping[str, Any]) -> str:
    value = f"{100 * share['value']:.1f} %"
    return value if share["low"] is None else f"{value} [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"


# --- the page ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """Two answers to look at, and all that judges said of them.

    Attributes:
        candidate: Their question and image.
        pair: What the verdicts come to.
        verdicts: On the two, sorted by judge, order and repetition.
        thumbnail: The image as a data URI, a JPEG of at most `THUMBNAIL` px a side.
    """

    candidate: Candidate
    pair: Preference
    verdicts: tuple[Verdict, ...]
    thumbnail: str


def examples(
    candidates: Sequence[Candidate],
    verdicts: Iterable[Verdict],
    images: Path,
    rule: Rule,
    number: int = EXAMPLES,
    seed: int = 0,
    *,
    judges: Sequence[str] = (),
) -> list[Example]:
    """Pairs drawn by the seed: `number` that are preferred, and up to `OTHER_EXAMPLES` of each other fate.

    Args:
        candidates, verdicts, images, rule, judges: As for `audit`.
        number: Of preferred pairs; the others are never more than this either.
        seed: Of the draw.

    Raises:
        InputError: An image cannot be read.
    """
    of = {candidate.id: candidate for candidate in candidates}
    known = _known({one.key: one for one in verdicts}.values(), of)
    about: dict[Any, list[Verdict]] = defaultdict(list)
    for one in known:
        about[one.id, (min(one.shown), max(one.shown))].append(one)
    pairs = preferences(candidates, known, rule, judges)
    thumbnail = cache(_thumbnail)
    found = []
    for fate in FATES:
        some = [pair for pair in pairs if pair.fate == fate]
        most = number if fate == "preferred" else min(number, OTHER_EXAMPLES)
        places = random.Random(f"{seed} {fate}").sample(range(len(some)), min(most, len(some)))
        for pair in (some[place] for place in sorted(places)):
            candidate = of[pair.id]
            shown = tuple(about[pair.id, pair.answers])
            found.append(Example(candidate, pair, shown, thumbnail(images / candidate.image)))
    return found


def _opened(file: Path) -> Any:
    try:
        return decode(read_image(file))
    except OSError as error:
        raise InputError(
            f"{file}: cannot be read ({error.strerror}). Pass the folder of the images with --images."
        ) from error


def _thumbnail(file: Path) -> str:
    picture = _opened(file)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"


def write_page(figures: Mapping[str, Any], examples: Sequence[Example], out: Path) -> None:
    """Write the figures to `audit.json` in the folder `out`, and figures and examples to `audit.html`.

    The page asks for nothing from elsewhere and runs no script. Whatever a model or a judge wrote is shown as text.

    Raises:
        InputError: The folder cannot be written; what was in it stays as it was.
    """
    html = page(figures, examples).encode(errors="replace")  # half a character has no UTF-8
    write_together(out, {"audit.json": json_text(figures), "audit.html": html})


def page(figures: Mapping[str, Any], examples: Sequence[Example]) -> str:
    """The page as HTML; see `write_page`."""
    import jinja2

    from stllava_eval.leaderboard import NOTICE

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent_or_dash, "number": _number, "signed": _signed}
    environment.globals |= {"reach": _reach, "columns": _columns, "words": words}
    source = files("stllava_train").joinpath("audit.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(figures=figures, examples=examples, notice=NOTICE, fates=FATES)


def _number(value: float | None, digits: int = 0) -> str:
    """`1,234`, or a dash for nothing."""
    return "–" if value is None else f"{value:z,.{digits}f}".replace("-", "−")


def _signed(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:+z,.{digits}f}".replace("-", "−")


def _percent_or_dash(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _reach(estimates: Iterable[Mapping[str, Any]]) -> float:
    """A round number that no estimate or end of an interval exceeds: half the width of an axis with 0 in its middle."""
    ends = [abs(one[end]) for one in estimates for end in ("value", "low", "high") if one[end] is not None]
    most = max(ends, default=0.0) or 1.0
    step = 10.0 ** math.floor(math.log10(most))
    return math.ceil(most / step) * step


def _columns(scores: Mapping[str, int]) -> list[tuple[int, int, float]]:
    """(score, times, height in [0, 1]) for 1 to 10; halves go to the higher, what is beyond to the nearest."""
    times: Counter[int] = Counter()
    for score, number in scores.items():
        times[min(10, max(1, math.floor(float(score) + 0.5)))] += number
    most = max(times.values(), default=1)
    return [(score, times[score], times[score] / most) for score in range(1, 11)]
