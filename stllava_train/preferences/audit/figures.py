"""Compute the figures of an audit: how far to trust the judges, what the data is like, what it cost.

Candidates + verdicts -> figures -> `page`, which shows them, and `warnings`, which says what stands out.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.errors import InputError
from stllava_eval.images import open_image, pixel_hash
from stllava_eval.scoring.metrics import words
from stllava_eval.scoring.words import folded_words
from stllava_eval.storage import home
from stllava_train.preferences.audit.judges import (
    QuestionKey,
    agreement,
    cases_of,
    clustered_mean,
    judging,
    known_verdicts,
    none,
    percentiles,
)
from stllava_train.preferences.audit.page import OTHER_EXAMPLES, PASS_IMAGES
from stllava_train.preferences.audit.warnings import checks
from stllava_train.preferences.rows import SKIP_REASONS, Candidate, count
from stllava_train.preferences.verdicts import Preference, Rule, Verdict, count_outcomes, preferences
from stllava_train.resumable import Row

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Tables = NDArray[np.float64]  # (..., 3, 3)


BLEU_QUESTIONS = 500  # our choice: time grows with the square, and these take 4 s
NEAR_QUESTIONS = 2000  # our choice: 32 MB of similarities
NEAR = 0.7  # ROUGE-L from which Self-Instruct (arXiv:2212.10560, section 2.2) takes an instruction for a repeat
# First words of a question. Those of the first group can be answered by yes or no
TYPES = {
    "yes/no": "is are was were does do did has have had can could will would should isn't aren't doesn't don't",
    "what": "what what's",
    "which": "which",
    "where": "where",
    "how": "how",
}


def read_references(paths: Sequence[Path], candidates: Sequence[Candidate]) -> dict[QuestionKey, str]:
    """Read what the conversations in these files answer about the candidates' images.

    A conversation is about an image if its image's file has the name of a candidate's and the same pixels. A question
    with two answers in different words is left out, and so is an answer without words.

    Args:
        paths: As `stllava-train data` writes them.
        candidates: Whose questions may be among them.

    Raises:
        InputError: A file cannot be read or holds an unsound record, or an image cannot be decoded.
    """
    from stllava_train.data.conversations import read_conversations

    names = {Path(candidate.image).name for candidate in candidates}
    hashes = {candidate.image_sha256 for candidate in candidates}
    pixels = cache(lambda file: pixel_hash(open_image(file, PASS_IMAGES)))
    by_question: dict[QuestionKey, dict[tuple[str, ...], str]] = defaultdict(dict)  # -> words -> answer
    for path in paths:
        conversations, problems = read_conversations(path)
        if problems:
            raise InputError(f"{problems[0]} `stllava-train check {path}` names all {len(problems)} problems.")
        for conversation in conversations:
            image = conversation.image
            if image is None or image.name not in names or pixels(image) not in hashes:
                continue
            for index, (question, answer) in enumerate(conversation.rounds):
                if folded_words(answer) and conversation.learns(index):  # one that is not learnt may be wrong
                    by_question[pixels(image), folded_words(question)].setdefault(folded_words(answer), answer)
    return {key: next(iter(answers.values())) for key, answers in by_question.items() if len(answers) == 1}


def audit(
    candidates: Sequence[Candidate],
    verdicts: Iterable[Verdict],
    images: Path,
    rule: Rule,
    references: Mapping[QuestionKey, str] | None = None,
    seed: int = 0,
    *,
    rows: Sequence[Row] = (),
    judges: Sequence[str] = (),
    blind: Mapping[str, str] | None = None,
    note: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """Compute every figure of the page, as JSON holds it: equal for equal input and seed, whatever the verdicts' order.

    A share or mean is an `Estimate`: value, n, clusters (images of different pixels), and a 95 % interval that allows
    for what questions about one image share. Where there is no value, `why` says what was missing.

    Args:
        candidates: What was judged.
        verdicts: On them; of several with one key the last counts, as a call that was resumed after a kill leaves them.
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
    by_id = {candidate.id: candidate for candidate in candidates}
    latest = {verdict.key: verdict for verdict in verdicts}
    known = known_verdicts(latest.values(), by_id)
    by_judge: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in known:
        by_judge[verdict.judge].append(verdict)
    names = sorted(by_judge)
    pairs = preferences(candidates, known, rule, judges)
    preferred = [pair for pair in pairs if pair.outcome == "preferred"]
    figures: dict[str, Any] = {
        "format": 1,
        "note": note,
        "seed": seed,
        "rule": asdict(rule),
        "judges": [name for name in names if not judges or name in judges],
        "verdicts": {"on these candidates": len(known), "on others": len(latest) - len(known)},
        "preferences": _preferences(pairs, by_id, seed),
        **_judges({name: by_judge[name] for name in names}, by_id, rule, references, seed),
        "data": _data(candidates, preferred, by_id, rows, seed),
        "leaks": _leaks(candidates, images, progress),
        "blind": _blind(preferred, by_id, blind),
        "cost": {name: _cost(by_judge[name]) for name in names},
    }
    return figures | {"checks": checks(figures)}


def _judges(
    by_judge: Mapping[str, Sequence[Verdict]],
    by_id: Mapping[str, Candidate],
    rule: Rule,
    references: Mapping[QuestionKey, str] | None,
    seed: int,
) -> dict[str, Any]:
    """Return how each judge judges, and how every two of them agree."""
    cases = {name: cases_of(verdicts, by_id, rule) for name, verdicts in by_judge.items()}
    agreements = []
    for first, second in combinations(by_judge, 2):
        agreements.append({"judges": [first, second], **agreement(cases[first], cases[second], seed)})
    return {
        "judging": {name: judging(cases[name], by_id, rule, references, seed) for name in by_judge},
        "agreement": agreements,
    }


# --- data -------------------------------------------------------------------------------------------------------------


def _preferences(pairs: Sequence[Preference], of: Mapping[str, Candidate], seed: int) -> dict[str, Any]:
    preferred = [pair for pair in pairs if pair.outcome == "preferred"]
    margins = [pair.margin for pair in preferred]
    return {
        "pairs": len(pairs),
        "fates": {
            name: {"count": times, **clustered_mean(((pair.outcome == name, of[pair.id]) for pair in pairs), "no pair")}
            for name, times in count_outcomes(pairs).items()
        },
        "margin": clustered_mean(((pair.margin, of[pair.id]) for pair in preferred), "no pair is preferred", seed),
        "margin_quartiles": percentiles(margins),
        "prefers_lower_place": clustered_mean(
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
            "left out": {name: counts[name] for name in SKIP_REASONS},
        },
        "types": {
            name: clustered_mean(((types[candidate.id] == name, candidate) for candidate in candidates), "no candidate")
            for name in (*TYPES, "other")
        },
        "variety": {
            "questions": _variety([candidate.question for candidate in candidates]),
            "chosen": _variety([text for text, _ in chosen]),
            "rejected": _variety([text for text, _ in rejected]),
        },
        "self_bleu": _self_bleu(candidates, seed),
        "near_repeats": _near_repeats(candidates, seed),
        "repeats": clustered_mean(again, "no candidate"),
        "words": {
            name: clustered_mean(((words(text), about) for text, about in texts), why, seed)
            | {"quartiles": percentiles([words(text) for text, _ in texts])}
            for name, texts in (("chosen", chosen), ("rejected", rejected))
        },
        "words_more": clustered_mean(
            ((words(one) - words(other), about) for (one, about), (other, _) in zip(chosen, rejected, strict=True)),
            why,
            seed,
        ),
    }


def _text(pair: Preference, index: int | None, of: Mapping[str, Candidate]) -> str:
    """Return the answer at `index`, the chosen or the rejected one, of a pair's candidate."""
    if index is None:
        raise ValueError(f"{pair.id}: a pair whose outcome is {pair.outcome!r} has no chosen answer")
    return of[pair.id].answers[index]


def _type(question: str) -> str:
    first = folded_words(question)[:1]
    return next((name for name, known in TYPES.items() if {*first} & {*known.split()}), "other")


def _variety(texts: Sequence[str]) -> dict[str, Any]:
    """Return the shares of texts, of words and of pairs of words that are distinct, in [0, 1]; None of nothing.

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
    """Return how well the other questions of a sample foretell a question: mean BLEU-4, in [0, 1], low if varied.

    The interval tells how it varies from image to image against these other questions; a larger sample raises it.

    Source: Texygen's self-BLEU (arXiv:1802.01886); smoothing 1 of Chen and Cherry (2014), as there.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    sample = [candidate for candidate in _sampled(candidates, BLEU_QUESTIONS, seed) if folded_words(candidate.question)]
    texts = [folded_words(candidate.question) for candidate in sample]
    if len(texts) < 2:
        return none("fewer than two questions")
    smoothing = SmoothingFunction().method1

    @cache
    def foretold(text: tuple[str, ...]) -> float:
        others = list(texts)
        others.remove(text)
        return float(sentence_bleu(others, text, smoothing_function=smoothing))

    scores = [(foretold(text), candidate) for text, candidate in zip(texts, sample, strict=True)]
    return clustered_mean(scores, "no question")


def _near_repeats(candidates: Sequence[Candidate], seed: int) -> dict[str, Any]:
    """Return the share of a sample of questions with a `rouge_l` of `NEAR` or more with another one of it."""
    from rapidfuzz import process
    from rapidfuzz.distance import Indel

    sample = _sampled(candidates, NEAR_QUESTIONS, seed)
    texts = [folded_words(candidate.question) for candidate in sample]
    # (questions, questions): `rouge_l` of every two. Each question is 1 to itself, so that a near repeat makes two
    alike = process.cdist(texts, texts, scorer=Indel.normalized_similarity, dtype="float64")
    return clustered_mean(zip((alike >= NEAR).sum(1) > 1, sample, strict=True), "no question")


def _sampled(candidates: Sequence[Candidate], most: int, seed: int) -> list[Candidate]:
    if len(candidates) <= most:
        return list(candidates)
    indices = random.Random(seed).sample(range(len(candidates)), most)
    return [candidates[index] for index in sorted(indices)]


def _leaks(candidates: Sequence[Candidate], images: Path, progress: bool) -> dict[str, Any]:
    """Return what of the candidates is in a prepared test split: images by their pixels, questions by their words.

    Raises:
        InputError: An image cannot be read, or has other pixels than the candidates say.
    """
    from stllava_eval.data.catalog import DATASETS
    from stllava_eval.data.splits import read_manifest, read_split
    from stllava_train.data.leaks import ImageRef, screen_images

    about = {candidate.image: candidate for candidate in candidates}
    seen = screen_images([ImageRef(str(images / name), name, images / name) for name in about], progress)
    if seen.broken:
        raise InputError(f"{seen.broken[0].what} Pass the folder of the candidates' images with --images.")
    for candidate in candidates:
        if seen.pixels[file := images / candidate.image] != candidate.image_sha256:
            raise InputError(f"{file}: not the image that {candidate.id} is about. Pass its folder (--images).")
    prepared = [name for name in DATASETS if (home() / "data" / name / "test.json").exists()]
    compared = {
        "prepared": prepared,
        "not_prepared": [name for name in DATASETS if name not in prepared],
        "samples": [name for name in prepared if read_manifest(name, "test").sample],
    }
    if not prepared:
        why = "no test split is prepared (`stllava-eval prepare`)"
        return {**compared, "images": none(why), "questions": none(why), "both": none(why), "examples": []}
    asked: set[QuestionKey] = set()
    for name in prepared:
        split = read_split(name, "test", images=False)
        for pixels, question in zip(split["image_sha256"], split["question"], strict=True):
            asked.add((pixels, folded_words(question)))
    questions = {question for _, question in asked}
    leaking = {problem.id for problem in seen.leaks}
    each = {candidate.image_sha256: candidate for candidate in candidates}
    hashes = {about[name].image_sha256 for name in leaking}
    folded = [(candidate, folded_words(candidate.question)) for candidate in candidates]
    return {
        **compared,
        "images": clustered_mean(((pixels in hashes, one) for pixels, one in each.items()), "no image"),
        "questions": clustered_mean(((text in questions, one) for one, text in folded), "no question"),
        "both": clustered_mean((((one.image_sha256, text) in asked, one) for one, text in folded), "no question"),
        "examples": [f"{problem.id}: {problem.what}" for problem in seen.leaks[:OTHER_EXAMPLES]],
    }


def _blind(
    preferred: Sequence[Preference], of: Mapping[str, Candidate], blind: Mapping[str, str] | None
) -> dict[str, Any]:
    """Return the share of preferred pairs whose chosen answer the model gives, in the same words, without the image."""
    if blind is None:
        return none("no answers without the image were given")
    same = []
    for pair in preferred:
        if pair.id in blind:
            chosen = folded_words(_text(pair, pair.chosen, of))
            same.append((folded_words(blind[pair.id]) == chosen, of[pair.id]))
    return clustered_mean(same, "no preferred pair has an answer without the image")


def _cost(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return tokens and USD of one judge's verdicts; those without a count or a price are counted beside."""
    tokens = [verdict.tokens for verdict in verdicts if verdict.tokens is not None]
    prices = [verdict.cost for verdict in verdicts if verdict.cost is not None]
    dates = sorted(verdict.date for verdict in verdicts if verdict.date is not None)
    return {
        "verdicts": len(verdicts),
        "models": sorted({verdict.model or "" for verdict in verdicts} - {""}),
        "first": dates[0] if dates else None,
        "last": dates[-1] if dates else None,
        "prompt_tokens": sum(prompt for prompt, _ in tokens),
        "reply_tokens": sum(reply for _, reply in tokens),
        "tokens_unknown": len(verdicts) - len(tokens),
        "usd": math.fsum(prices) if prices else None,
        "price_unknown": len(verdicts) - len(prices),
    }
