"""Reproduce the published scores of LLaVA-Med's evaluation scripts, bug for bug.

`metrics.py` lists these scores beside our strict ones, and its docstring names the scripts' commit and licence.
"""

import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from stllava_eval.errors import InputError
from stllava_eval.scoring.words import ARTICLES, DIGITS, NUMBERS, remembered

# ---------------------------------------------------------------------------------------------------------------------
# Published family

_PUNCTUATION = frozenset(';/[]"{}()=+\\_-><@`,?!')
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD_BEFORE_NO_DIGIT = re.compile(r"\.(?!\d)")
_PERIODS_REMOVED_PER_PASS = 32  # the script hands re.UNICODE (= 32) to `sub` where the count belongs
_DIGITS_LLAVAMED = {word: DIGITS[word] for word in NUMBERS[:11]} | {"none": "0"}


def _without_one_apostrophe(contractions: str) -> dict[str, str]:
    """Return the contraction of each spelling that leaves out exactly one of its apostrophes."""
    contraction_of = {}
    for word in contractions.split():
        for mark in re.finditer("'", word):
            contraction_of[word[: mark.start()] + word[mark.end() :]] = word
    return contraction_of


# What the VQA v2 normalisation puts right. Its I'm, I've and I'd've are not here: they never match lower-case text.
_CONTRACTIONS = _without_one_apostrophe(
    """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
    not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""
) | {"somebody'd": "somebodyd"}  # the one pair that the original has the wrong way round


@remembered
def normalize_llavamed(text: str) -> str:
    """Return `text` as the published script sees it after one pass of its normalisation.

    What surprises:
    - A mark such as `-` becomes a space, but is deleted everywhere if it stands next to a space somewhere in `text`
      or if `text` has a comma between digits: "x-ray" -> "x ray", "x-ray - chest" -> "xray chest".
    - `:` `'` `%` and all marks outside ASCII stay glued to their word.
    - Only the first 32 periods go, so a second pass can change the result. Recall, precision, F1 and exact match look
      at two passes, BLEU and the contains rules at one.
    - "none" and "zero" are both "0"; "a", "an" and "the" vanish, also from "vitamin A".

    >>> normalize_llavamed("The T2-weighted MRI shows two lesions.")
    't2 weighted mri shows 2 lesions'
    """
    text = text.lower()
    digit_comma_digit = _DIGIT_COMMA_DIGIT.search(text) is not None
    replacements = {
        ord(mark): "" if digit_comma_digit or f"{mark} " in text or f" {mark}" in text else " "
        for mark in _PUNCTUATION.intersection(text)
    }
    text = _PERIOD_BEFORE_NO_DIGIT.sub("", text.translate(replacements), count=_PERIODS_REMOVED_PER_PASS)
    words = (_DIGITS_LLAVAMED.get(word, word) for word in text.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@remembered
def _counts_llavamed(text: str) -> Counter[str]:
    return Counter(normalize_llavamed(normalize_llavamed(text)).split())


@remembered
def _hits_llavamed(answer: str, reference: str) -> int:
    """Count the words of the answer that are in the reference: each repetition is one more hit."""
    wanted = _counts_llavamed(reference)
    return sum(count for word, count in _counts_llavamed(answer).items() if word in wanted)


def recall_llavamed(answer: str, reference: str) -> float:
    """Return the published "recall" of open questions, in [0, 1]: hits / (hits + reference words not in the answer).

    A hit is a word of the *answer*, so saying it again raises the score. 0 where either side has no words.

    Source: `calculate_f1score` in LLaVA-Med v1.0.0; "proportion of correctly predicted words" of STLLaVA-Med's Table 2.

    >>> recall_llavamed("lung lung lung", "right lung")  # 3 hits, "right" missing
    0.75
    """
    hits = _hits_llavamed(answer, reference)
    counts = _counts_llavamed(answer)
    missing = sum(count for word, count in _counts_llavamed(reference).items() if word not in counts)
    return hits / (hits + missing) if hits else 0.0


def precision_llavamed(answer: str, reference: str) -> float:
    """Return the share of the answer's words, repetitions included, that are in the reference; 0 for no words.

    Source: `calculate_f1score` in LLaVA-Med v1.0.0.

    >>> precision_llavamed("bad bad bad lung", "lung")
    0.25
    """
    hits = _hits_llavamed(answer, reference)
    return hits / _counts_llavamed(answer).total() if hits else 0.0


def f1_llavamed(answer: str, reference: str) -> float:
    """Return the harmonic mean of `precision_llavamed` and `recall_llavamed`, in [0, 1]; 0 where both are 0.

    Source: `calculate_f1score` in LLaVA-Med v1.0.0; the F1 of STLLaVA-Med's Table 2.
    """
    return harmonic_mean(precision_llavamed(answer, reference), recall_llavamed(answer, reference))


def exact_match_llavamed(answer: str, reference: str) -> float:
    """Return distinct reference words in the answer / words of the answer, in [0, 1]: a precision, not an exact match.

    Source: `calculate_exactmatch` in LLaVA-Med v1.0.0, printed as "exact match score".

    >>> exact_match_llavamed("CT", "CT scan")
    1.0
    """
    counts = _counts_llavamed(answer)
    return len(counts.keys() & _counts_llavamed(reference).keys()) / counts.total() if counts else 0.0


def bleu_llavamed(answer: str, reference: str, n: Literal[1, 2, 3] | None = None) -> float:
    """Return BLEU as the published script computes it with nltk, in [0, 1].

    Without `n`, 1- to 4-grams count equally; with it, only n-grams do (not 1- to n-grams). No smoothing: an order
    without a match counts as 2.2e-308, so most short answers score about 1e-154 or 1e-231 rather than 0, and a right
    answer of two words does not score 1. It is 0 where not one word matches.

    Source: nltk 3.10.4 `sentence_bleu` with its default smoothing, which LLaVA-Med v1.0.0 calls. Computed here because
    nltk warns on such answers and takes a second to import.
    """
    return bleu(
        normalize_llavamed(answer).split(), normalize_llavamed(reference).split(), (1, 2, 3, 4) if n is None else (n,)
    )


def open_accuracy_llavamed_batch(answer: str, reference: str) -> float:
    """Return 1 where the reference is a substring of the answer, else 0; an empty reference is in every answer.

    Source: `run_eval_batch.py` in LLaVA-Med v1.0.0.
    """
    return float(normalize_llavamed(reference) in normalize_llavamed(answer))


def open_accuracy_llavamed(answer: str, reference: str, candidates: Sequence[str]) -> float:
    """Return 1 where, of all `candidates`, the reference is the first with the most of its words in the answer.

    The order of `candidates` decides ties, an answer without any hit names the first, and a reference that is not
    among them cannot be hit.

    Args:
        answer: What the model said.
        reference: The gold.
        candidates: The open answers of the training set. The authors never released their list.

    Source: `run_eval.py` in LLaVA-Med v1.0.0.

    Raises:
        InputError: There are no candidates.
    """
    if not candidates:
        raise InputError("open_accuracy_llavamed: no candidates. Pass the open answers of the training set.")
    answer_words = _counts_llavamed(answer).keys()

    def share_found(candidate: str) -> float:
        wanted = _counts_llavamed(candidate).keys()
        return len(wanted & answer_words) / len(wanted) if wanted else 0.0

    return float(normalize_llavamed(max(candidates, key=share_found)) == normalize_llavamed(reference))


def closed_llavamed(answer: str, reference: str) -> float:
    """Return 1 where the answer holds the letters of "yes" or "no" and those of the reference, else 0.

    Letters, not words: "normal" and "cannot" hold "no", "eyes" holds "yes", and "yes and no" is right for either
    reference. A choice such as "left" scores only where some word of the answer holds "no" or "yes".

    Source: `run_eval.py` in LLaVA-Med since commit b9a98a7 (2023-12-11).

    >>> closed_llavamed("The heart is normal in size.", "no"), closed_llavamed("left", "left")
    (1.0, 0.0)
    """
    text = normalize_llavamed(answer)
    return float(("yes" in text or "no" in text) and normalize_llavamed(reference) in text)


def closed_llavamed_batch(answer: str, reference: str) -> float:
    """Return 1 where the answer holds the letters of the reference, else 0.

    Differs from `closed_llavamed` on references other than yes and no only.

    Source: `run_eval_batch.py` in LLaVA-Med v1.0.0; the numbers in its notebook come from it.
    """
    return float(normalize_llavamed(reference) in normalize_llavamed(answer))


def closed_llavamed_before_fix(answer: str, reference: str) -> float | None:
    """Return `closed_llavamed` as before commit b9a98a7; None where the old script left the question out of its mean.

    It left out every answer with "yes" or "no" that did not hold the reference, that is, nearly every wrong one. For
    reading tables made before 2023-12-11; not in `SCORES`.
    """
    text = normalize_llavamed(answer)
    if "yes" not in text and "no" not in text:
        return 0.0
    return 1.0 if normalize_llavamed(reference) in text else None


def harmonic_mean(precision: float, recall: float) -> float:
    """Return the harmonic mean of precision and recall; 0 where both are 0."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def bleu(answer: Sequence[str], reference: Sequence[str], orders: tuple[int, ...]) -> float:
    """Return the geometric mean of the answer's n-gram precisions of these orders, times BLEU's brevity penalty.

    Source: Papineni et al. (ACL 2002), in the form of nltk: an order without a match counts as the
    smallest normal float instead of 0, whose logarithm does not exist.
    """
    if not set(answer) & set(reference):
        return 0.0
    logarithms = []
    for n in orders:
        answer_ngrams = Counter(zip(*(answer[i:] for i in range(n)), strict=False))
        wanted = Counter(zip(*(reference[i:] for i in range(n)), strict=False))
        # the modified n-gram precision (Papineni et al.): a match counts at most as often as wanted
        matches = sum(min(count, wanted[gram]) for gram, count in answer_ngrams.items() if gram in wanted)
        logarithms.append(math.log(matches / answer_ngrams.total() if matches else sys.float_info.min) / len(orders))
    penalty = min(1.0, math.exp(1 - len(reference) / len(answer)))
    return penalty * math.exp(math.fsum(logarithms))
