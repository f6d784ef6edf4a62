"""Score one final answer against its reference: between the answers of a run and the means of the leaderboard.

There are two families, and both are always computed: `*_llavamed` repeats the published scoring script bug for bug, so
that its numbers compare with published tables; the other scores are what their names say. `SCORES` lists them all, and
`score` computes them.

Source of the published family: LLaVA-Med v1.0.0 (github.com/microsoft/LLaVA-Med, `llava/eval/run_eval.py`,
`run_eval_batch.py` and `eval_metrics/`), whose licence is for research only. This is written from a description of
what it computes and held to its outputs on 620 cases.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from stllava_eval.errors import InputError
from stllava_eval.scoring import verdict_v1
from stllava_eval.scoring.final_answer import FinalAnswer, is_failed_request
from stllava_eval.scoring.llavamed import (
    bleu,
    bleu_llavamed,
    closed_llavamed,
    closed_llavamed_batch,
    exact_match_llavamed,
    f1_llavamed,
    harmonic_mean,
    open_accuracy_llavamed_batch,
    precision_llavamed,
    recall_llavamed,
)
from stllava_eval.scoring.verdict import choices, chosen, is_refusal, verdict
from stllava_eval.scoring.words import folded_words, remembered, singular_words, wanted_words

__all__ = ["SCORES", "choices", "chosen", "folded_words", "is_refusal", "score", "score_replies", "verdict"]


# ---------------------------------------------------------------------------------------------------------------------
# Clean family


Words = Callable[[str], tuple[str, ...]]
"""Splits a text into words: `singular_words` today, `folded_words` in version 1, which keeps plurals apart."""


def _wanted(reference: str, words: Words) -> tuple[str, ...]:
    return words(reference) or wanted_words(reference)  # which raises


@remembered
def _found(answer: str, reference: str, words: Words) -> int:
    """Count the reference's words that the answer has; a repeated word counts as often as the reference repeats it."""
    wanted = Counter(_wanted(reference, words))
    return sum(min(count, wanted[word]) for word, count in Counter(words(answer)).items() if word in wanted)


def recall(answer: str, reference: str, words: Words = singular_words) -> float:
    """Return the share of the reference's words that the answer has, in [0, 1].

    Each word counts as often as the reference has it. A long answer loses nothing for its extra words: read it beside
    `precision` and `words`.

    Raises:
        InputError: The reference has no words.

    >>> recall("lung lung lung", "right lungs")
    0.5
    """
    return _found(answer, reference, words) / len(_wanted(reference, words))


def precision(answer: str, reference: str, words: Words = singular_words) -> float:
    """Return the share of the answer's words that the reference has, in [0, 1]; 0 for an answer without words.

    Raises:
        InputError: The reference has no words.

    >>> precision("a mass in the lung", "lung")  # mass, in, lung
    0.3333333333333333
    """
    return _found(answer, reference, words) / max(1, len(words(answer)))


def f1(answer: str, reference: str, words: Words = singular_words) -> float:
    """Return the harmonic mean of `precision` and `recall`, in [0, 1]; 0 where both are 0.

    Source: the F1 of SQuAD (arXiv:1606.05250), with the words of `singular_words`.

    Raises:
        InputError: The reference has no words.
    """
    return harmonic_mean(precision(answer, reference, words), recall(answer, reference, words))


def exact_match(answer: str, reference: str, words: Words = singular_words) -> float:
    """Return 1 where answer and reference are the same words in the same order, else 0.

    Raises:
        InputError: The reference has no words.
    """
    return float(words(answer) == _wanted(reference, words))


def bleu1(answer: str, reference: str, words: Words = singular_words) -> float:
    """Return BLEU of single words, in [0, 1]: `precision`, times a penalty for an answer shorter than its reference.

    The penalty is exp(1 - reference words / answer words). References have two or three words, too few for the longer
    n-grams of the usual BLEU-4.

    Source: Papineni et al. (ACL 2002), with N = 1.

    Raises:
        InputError: The reference has no words.
    """
    return bleu(words(answer), _wanted(reference, words), (1,))


def closed_accuracy(answer: str, reference: str, question: str = "") -> float:
    """Return 1 where `verdict` is "right", else 0; an unparsed answer is not right.

    Raises:
        InputError: The reference has no words.
    """
    return float(verdict(answer, reference, question) == "right")


def closed_accuracy_v1(answer: str, reference: str, question: str = "") -> float:
    """Return 1 where the verdict of version 1 is "right", else 0: what `closed_accuracy` was until 2026-11-30.

    Raises:
        InputError: The reference has no words.
    """
    return float(verdict_v1.verdict(answer, reference, question) == "right")


def unparsed(answer: str, reference: str, question: str = "") -> float:
    """Return 1 where `verdict` is "unparsed", else 0. Read its mean beside `closed_accuracy`; lower is better.

    Raises:
        InputError: The reference has no words.
    """
    return float(verdict(answer, reference, question) == "unparsed")


# ---------------------------------------------------------------------------------------------------------------------
# What the answer is like, whatever the reference


def words(answer: str) -> int:
    """Return the length of the answer in words, which white space separates."""
    return len(answer.split())


# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """A number that every question of its kind gets."""

    name: str
    kind: Literal["open", "closed", "both"]
    signature: str
    """Name and version of the definition; values compare only where it is equal."""
    published: bool
    """Repeats a published script, so it may stand beside published tables."""
    function: Callable[[str, str, str], float]
    """(answer, reference, question) -> the score, in [0, 1] but for `words`."""


# `_published_scores` and `_word_scores` make the entries of SCORES with a function of three arguments.


def _published_scores(kind: Literal["open", "closed"], *functions: Callable[[str, str], float]) -> list[Score]:
    def without_question(function: Callable[[str, str], float]) -> Callable[[str, str, str], float]:
        return lambda answer, reference, question: function(answer, reference)

    return [
        Score(function.__name__, kind, f"{function.__name__}|v1", True, without_question(function))
        for function in functions
    ]


def _word_scores(words_of: Words, version: str, suffix: str = "") -> list[Score]:
    def of_question(function: Callable[[str, str, Words], float]) -> Callable[[str, str, str], float]:
        return lambda answer, reference, question: function(answer, reference, words_of)

    return [
        Score(f"{function.__name__}{suffix}", "open", f"{function.__name__}|{version}", False, of_question(function))
        for function in (recall, precision, f1, exact_match, bleu1)
    ]


SCORES: dict[str, Score] = {
    entry.name: entry
    for entry in (
        *_published_scores(
            "open",
            recall_llavamed,
            precision_llavamed,
            f1_llavamed,
            exact_match_llavamed,
            open_accuracy_llavamed_batch,
            bleu_llavamed,
        ),
        *_word_scores(singular_words, "v2"),
        *_word_scores(folded_words, "v1", "_v1"),
        *_published_scores("closed", closed_llavamed, closed_llavamed_batch),
        Score("closed_accuracy", "closed", "closed_accuracy|v2", False, closed_accuracy),
        Score("closed_accuracy_v1", "closed", "closed_accuracy|v1", False, closed_accuracy_v1),
        Score("unparsed", "closed", "unparsed|v2", False, unparsed),
        Score("words", "both", "words|v1", False, lambda answer, reference, question: float(words(answer))),
        Score("refused", "both", "refused|v2", False, lambda answer, reference, question: float(is_refusal(answer))),
        # an answer that is there was not cut; `score` says where there is none
        Score("cut", "both", "cut|v1", False, lambda answer, reference, question: 0.0),
    )
}
"""Every score by its name; `unparsed`, `words`, `refused` and `cut` describe answers rather than rank them."""


def score(answer: str, reference: str, kind: str, question: str, cut: bool = False) -> dict[str, float]:
    """Compute every score of a question, by name.

    Against a reference without words, such as "-", only the published scores exist: a share of no words means nothing.

    Args:
        answer: The final answer. A failed request is no answer: see `is_failed_request`.
        reference: The gold.
        kind: "open" or "closed".
        question: What was asked: a closed question offers the options that `verdict` looks for.
        cut: The reply stopped inside its thought, so there is no answer: every score is 0, but `cut` is 1, and
            `unparsed` too. (The published scores would credit an empty answer where the reference has no words.)

    Raises:
        InputError: `kind` is neither.
    """
    if kind not in ("open", "closed"):
        raise InputError(f"kind {kind!r}: a question is 'open' or 'closed'. Correct the data set's kinds.")
    has_words = bool(folded_words(reference))
    scores: dict[str, float] = {}
    for entry in SCORES.values():
        if entry.kind not in ("both", kind):
            continue
        if entry.kind == kind and not (entry.published or has_words):
            continue  # our own scores are shares of the reference's words
        if cut:
            scores[entry.name] = float(entry.name in ("cut", "unparsed"))
        else:
            scores[entry.name] = entry.function(answer, reference, question)
    if scores.get("unparsed") == 0:
        scores["refused"] = 0.0  # "I'm not a doctor, but yes" has answered
    return scores


def score_replies(finals: Sequence[FinalAnswer], reference: str, kind: str, question: str) -> dict[str, float]:
    """Compute every score of a question as its mean over the replies; empty where every request failed.

    Args:
        finals: The final answer of each reply: one where the model answers greedily, several where it is sampled.
        reference: See `score`.
        kind: See `score`.
        question: See `score`.

    Raises:
        InputError: See `score`.
    """
    answered = [final for final in finals if not is_failed_request(final.answer)]
    if not answered:
        return {}
    by_reply = [score(final.answer, reference, kind, question, final.cut) for final in answered]
    return {name: math.fsum(scores[name] for scores in by_reply) / len(by_reply) for name in by_reply[0]}
