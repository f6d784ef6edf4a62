"""One answer and its reference -> scores.

Two families, always both: `*_llavamed` repeats the published scoring script bug for bug, so that its numbers stand
beside published tables; the others say what their names say. `SCORES` lists what is computed, `score` computes it.

Source of the published family: LLaVA-Med v1.0.0 (github.com/microsoft/LLaVA-Med, `llava/eval/run_eval.py`,
`run_eval_batch.py` and `eval_metrics/`), whose licence is for research only. This is written from a description of
what it computes and held to its outputs on 620 cases.
"""

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from stllava_eval import verdict_v1
from stllava_eval.errors import InputError
from stllava_eval.extract import Final
from stllava_eval.verdict import choices, chosen, is_refusal, verdict
from stllava_eval.words import ARTICLES, DIGITS, NUMBERS, folded_words, remembered, singular_words, wanted_words

__all__ = ["SCORES", "choices", "chosen", "folded_words", "is_refusal", "score", "score_replies", "verdict"]

# ---------------------------------------------------------------------------------------------------------------------
# Published family

_PUNCTUATION = frozenset(';/[]"{}()=+\\_-><@`,?!')
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD_BEFORE_NO_DIGIT = re.compile(r"\.(?!\d)")
_PERIODS_REMOVED_PER_PASS = 32  # the script hands re.UNICODE (= 32) to `sub` where the count belongs
_DIGITS_LLAVAMED = {word: DIGITS[word] for word in NUMBERS[:11]} | {"none": "0"}


def _without_one_apostrophe(contractions: str) -> dict[str, str]:
    """Every spelling that leaves out exactly one apostrophe -> the contraction."""
    return {
        word[: mark.start()] + word[mark.end() :]: word
        for word in contractions.split()
        for mark in re.finditer("'", word)
    }


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
    """`text` as the published script sees it after one pass of its normalisation.

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
    """How many words of the answer are in the reference: each of its repetitions is one more hit."""
    wanted = _counts_llavamed(reference)
    return sum(count for word, count in _counts_llavamed(answer).items() if word in wanted)


def recall_llavamed(answer: str, reference: str) -> float:
    """The published "recall" of open questions, in [0, 1]: hits / (hits + reference words that the answer lacks).

    A hit is a word of the *answer*, so saying it again raises the score. 0 where either side has no words.

    Source: `calculate_f1score` in LLaVA-Med v1.0.0; "proportion of correctly predicted words" of STLLaVA-Med's Table 2.

    >>> recall_llavamed("lung lung lung", "right lung")  # 3 hits, "right" missing
    0.75
    """
    hits = _hits_llavamed(answer, reference)
    found = _counts_llavamed(answer)
    missing = sum(count for word, count in _counts_llavamed(reference).items() if word not in found)
    return hits / (hits + missing) if hits else 0.0


def precision_llavamed(answer: str, reference: str) -> float:
    """Share of the answer's words that are in the reference, repetitions included, in [0, 1]; 0 for no words.

    Source: `calculate_f1score` in LLaVA-Med v1.0.0.

    >>> precision_llavamed("bad bad bad lung", "lung")
    0.25
    """
    hits = _hits_llavamed(answer, reference)
    return hits / _counts_llavamed(answer).total() if hits else 0.0


def f1_llavamed(answer: str, reference: str) -> float:
    """Harmonic mean of `precision_llavamed` and `recall_llavamed`, in [0, 1]; 0 where both are.

    Source: `calculate_f1score` in LLaVA-Med v1.0.0; the F1 of STLLaVA-Med's Table 2.
    """
    return _harmonic_mean(precision_llavamed(answer, reference), recall_llavamed(answer, reference))


def exact_match_llavamed(answer: str, reference: str) -> float:
    """Distinct reference words found / words of the answer, in [0, 1]: a precision, not an exact match.

    Source: `calculate_exactmatch` in LLaVA-Med v1.0.0, printed as "exact match score".

    >>> exact_match_llavamed("CT", "CT scan")
    1.0
    """
    found = _counts_llavamed(answer)
    return len(found.keys() & _counts_llavamed(reference).keys()) / found.total() if found else 0.0


def bleu_llavamed(answer: str, reference: str, n: Literal[1, 2, 3] | None = None) -> float:
    """BLEU as the published script gets it from nltk, in [0, 1].

    Without `n`, 1- to 4-grams count equally; with it, only n-grams do (not 1- to n-grams). No smoothing: an order
    without a match counts as 2.2e-308, so most short answers score about 1e-154 or 1e-231 rather than 0, and a right
    answer of two words does not score 1. It is 0 where not one word matches.

    Source: nltk 3.10.4 `sentence_bleu` with its default smoothing, which LLaVA-Med v1.0.0 calls. Computed here because
    nltk warns on such answers and takes a second to import.
    """
    return _bleu(
        normalize_llavamed(answer).split(), normalize_llavamed(reference).split(), (1, 2, 3, 4) if n is None else (n,)
    )


def open_accuracy_llavamed_batch(answer: str, reference: str) -> float:
    """1 where the reference stands in the answer as a substring, else 0; an empty reference is in every answer.

    Source: `run_eval_batch.py` in LLaVA-Med v1.0.0.
    """
    return float(normalize_llavamed(reference) in normalize_llavamed(answer))


def open_accuracy_llavamed(answer: str, reference: str, candidates: Sequence[str]) -> float:
    """1 where, of all `candidates`, the reference is the first with the largest share of its words in the answer.

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
    found = _counts_llavamed(answer).keys()

    def share_found(candidate: str) -> float:
        wanted = _counts_llavamed(candidate).keys()
        return len(wanted & found) / len(wanted) if wanted else 0.0

    return float(normalize_llavamed(max(candidates, key=share_found)) == normalize_llavamed(reference))


def closed_llavamed(answer: str, reference: str) -> float:
    """1 where the answer holds the letters of "yes" or "no" and those of the reference, else 0.

    Letters, not words: "normal" and "cannot" hold "no", "eyes" holds "yes", and "yes and no" is right for either
    reference. A choice such as "left" scores only where some word of the answer holds "no" or "yes".

    Source: `run_eval.py` in LLaVA-Med since commit b9a98a7 (2023-12-11).

    >>> closed_llavamed("The heart is normal in size.", "no"), closed_llavamed("left", "left")
    (1.0, 0.0)
    """
    text = normalize_llavamed(answer)
    return float(("yes" in text or "no" in text) and normalize_llavamed(reference) in text)


def closed_llavamed_batch(answer: str, reference: str) -> float:
    """1 where the answer holds the letters of the reference, else 0.

    Differs from `closed_llavamed` on references other than yes and no only.

    Source: `run_eval_batch.py` in LLaVA-Med v1.0.0; the numbers in its notebook come from it.
    """
    return float(normalize_llavamed(reference) in normalize_llavamed(answer))


def closed_llavamed_before_fix(answer: str, reference: str) -> float | None:
    """`closed_llavamed` before commit b9a98a7; None where the old script left the question out of its mean.

    It left out every answer with "yes" or "no" that did not hold the reference, that is, nearly every wrong one. For
    reading tables made before 2023-12-11; not in `SCORES`.
    """
    text = normalize_llavamed(answer)
    if "yes" not in text and "no" not in text:
        return 0.0
    return 1.0 if normalize_llavamed(reference) in text else None


def commonest_words(references: Iterable[str], k: int) -> str:
    """The k most frequent words of `references`, as one answer that looks at no image; ties go by alphabet.

    Words are those of `normalize_llavamed`. Given the open answers of a training set, its `recall_llavamed` is what a
    model must beat: on SLAKE's English test 10 words get 42.0 (STLLaVA-Med without DPO: 40.13).

    >>> commonest_words(["Left lung", "right lung", "Right"], 2)
    'lung right'
    """
    counts = Counter(word for reference in references for word in normalize_llavamed(reference).split())
    return " ".join(sorted(counts, key=lambda word: (-counts[word], word))[:k])


# ---------------------------------------------------------------------------------------------------------------------
# Clean family


Words = Callable[[str], tuple[str, ...]]
"""What a text's words are: `singular_words` today, `folded_words` in the first version, which told plurals apart."""


def _wanted(reference: str, words: Words) -> tuple[str, ...]:
    return words(reference) or wanted_words(reference)  # which raises


@remembered
def _found(answer: str, reference: str, words: Words) -> int:
    """How many of the reference's words the answer has; one said twice counts twice only if it is wanted twice."""
    wanted = Counter(_wanted(reference, words))
    return sum(min(count, wanted[word]) for word, count in Counter(words(answer)).items() if word in wanted)


def recall(answer: str, reference: str, words: Words = singular_words) -> float:
    """Share of the reference's words that the answer has, in [0, 1].

    Each word counts as often as the reference has it. A long answer loses nothing for its extra words: read it beside
    `precision` and `words`.

    Raises:
        InputError: The reference has no words.

    >>> recall("lung lung lung", "right lungs")
    0.5
    """
    return _found(answer, reference, words) / len(_wanted(reference, words))


def precision(answer: str, reference: str, words: Words = singular_words) -> float:
    """Share of the answer's words that the reference has, in [0, 1]; 0 for an answer without words.

    Raises:
        InputError: The reference has no words.

    >>> precision("a mass in the lung", "lung")  # mass, in, lung
    0.3333333333333333
    """
    return _found(answer, reference, words) / max(1, len(words(answer)))


def f1(answer: str, reference: str, words: Words = singular_words) -> float:
    """Harmonic mean of `precision` and `recall`, in [0, 1]; 0 where both are.

    Source: the F1 of SQuAD (arXiv:1606.05250), with the words of `singular_words`.

    Raises:
        InputError: The reference has no words.
    """
    return _harmonic_mean(precision(answer, reference, words), recall(answer, reference, words))


def exact_match(answer: str, reference: str, words: Words = singular_words) -> float:
    """1 where answer and reference are the same words in the same order, else 0.

    Raises:
        InputError: The reference has no words.
    """
    return float(words(answer) == _wanted(reference, words))


def bleu1(answer: str, reference: str, words: Words = singular_words) -> float:
    """`precision`, times exp(1 - reference words / answer words) for an answer shorter than its reference; in [0, 1].

    BLEU of single words: references have two or three, too few for the longer n-grams of the usual BLEU-4.

    Source: Papineni et al. (ACL 2002), section 2, N = 1.

    Raises:
        InputError: The reference has no words.
    """
    return _bleu(words(answer), _wanted(reference, words), (1,))


def closed_accuracy(answer: str, reference: str, question: str = "") -> float:
    """1 where `verdict` is "right", else 0; an unparsed answer is not right.

    Raises:
        InputError: The reference has no words.
    """
    return float(verdict(answer, reference, question) == "right")


def closed_accuracy_v1(answer: str, reference: str, question: str = "") -> float:
    """1 where the verdict of the first version is "right", else 0: what `closed_accuracy` was until 2026-11-30.

    Raises:
        InputError: The reference has no words.
    """
    return float(verdict_v1.verdict(answer, reference, question) == "right")


def unparsed(answer: str, reference: str, question: str = "") -> float:
    """1 where `verdict` is "unparsed", else 0. A rate to read beside `closed_accuracy`: here lower is better.

    Raises:
        InputError: The reference has no words.
    """
    return float(verdict(answer, reference, question) == "unparsed")


# ---------------------------------------------------------------------------------------------------------------------
# What the answer is like, whatever the reference


def words(answer: str) -> int:
    """Length of the answer in words, divided by white space."""
    return len(answer.split())


_FAILED_REQUESTS = (
    # lmms_eval 0.7.3, below lmms_eval/models/
    "[LMMS_EVAL_REQUEST_FAILED after ",  # simple/openai.py, simple/gemini.py, chat/{openai,async_openai,gemini}.py
    "Error: can only concatenate str",  # chat/async_openai.py: the service sent a message without content
    "Batch failed",  # simple/batch_gpt4.py
    "[GENERATION_FAILED]",  # simple/{cosmos_wm,diffusers_wm_base,generation_api,magi1_wm,wan2_1_t2i}.py
    "[ERROR] ",  # the same files
)
_FAILED_VIDEO = re.compile(r"Video .* (?:can not load|generate failed), check the source", re.DOTALL)


def is_failed_request(answer: str) -> bool:
    """Is this not an answer but the text that an lmms-eval adapter writes in its place when a request has failed?

    Such a question belongs left out, counted and listed. Many adapters (`chat/_chat_base.py`, `simple/gpt4v.py`,
    `simple/qwen_vl_api.py`, `simple/llava.py`, ...) write an empty string instead; a model can answer nothing too,
    so an empty answer is not called failed here, and a run with many deserves a look at its log.

    >>> is_failed_request("[LMMS_EVAL_REQUEST_FAILED after 5 retries] Connection error.")
    True
    """
    return answer.startswith(_FAILED_REQUESTS) or _FAILED_VIDEO.fullmatch(answer) is not None


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


def _of_the_script(kind: Literal["open", "closed"], *functions: Callable[[str, str], float]) -> list[Score]:
    def without_question(function: Callable[[str, str], float]) -> Callable[[str, str, str], float]:
        return lambda answer, reference, question: function(answer, reference)

    return [Score(f.__name__, kind, f"{f.__name__}|v1", True, without_question(f)) for f in functions]


def _of_words(words_of: Words, version: str, suffix: str = "") -> list[Score]:
    def of_question(function: Callable[[str, str, Words], float]) -> Callable[[str, str, str], float]:
        return lambda answer, reference, question: function(answer, reference, words_of)

    return [
        Score(f"{f.__name__}{suffix}", "open", f"{f.__name__}|{version}", False, of_question(f))
        for f in (recall, precision, f1, exact_match, bleu1)
    ]


SCORES: dict[str, Score] = {
    each.name: each
    for each in (
        *_of_the_script(
            "open",
            recall_llavamed,
            precision_llavamed,
            f1_llavamed,
            exact_match_llavamed,
            open_accuracy_llavamed_batch,
            bleu_llavamed,
        ),
        *_of_words(singular_words, "v2"),
        *_of_words(folded_words, "v1", "_v1"),
        *_of_the_script("closed", closed_llavamed, closed_llavamed_batch),
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
    scores = {
        s.name: float(s.name in ("cut", "unparsed")) if cut else s.function(answer, reference, question)
        for s in SCORES.values()
        if s.kind == "both" or (s.kind == kind and (s.published or has_words))
    }
    if scores.get("unparsed") == 0:
        scores["refused"] = 0.0  # "I'm not a doctor, but yes" has answered
    return scores


def score_replies(finals: Sequence[Final], reference: str, kind: str, question: str) -> dict[str, float]:
    """Compute every score of a question as its mean over the replies; empty where every request failed.

    Args:
        finals: The final answer of each reply: one where the model answers greedily, several where it is sampled.
        reference: See `score`.
        kind: See `score`.
        question: See `score`.

    Raises:
        InputError: See `score`.
    """
    each = [
        score(final.answer, reference, kind, question, final.cut)
        for final in finals
        if not is_failed_request(final.answer)
    ]
    return {name: math.fsum(of[name] for of in each) / len(each) for name in each[0]} if each else {}


def _harmonic_mean(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _bleu(answer: Sequence[str], reference: Sequence[str], orders: tuple[int, ...]) -> float:
    """Geometric mean of the answer's n-gram precisions of these orders, times BLEU's penalty for a short answer."""
    if not set(answer) & set(reference):
        return 0.0
    logarithms = []
    for n in orders:
        found = Counter(zip(*(answer[i:] for i in range(n)), strict=False))
        wanted = Counter(zip(*(reference[i:] for i in range(n)), strict=False))
        matches = sum(min(count, wanted[gram]) for gram, count in found.items() if gram in wanted)
        logarithms.append(math.log(matches / found.total() if matches else sys.float_info.min) / len(orders))
    penalty = min(1.0, math.exp(1 - len(reference) / len(answer)))
    return penalty * math.exp(math.fsum(logarithms))
