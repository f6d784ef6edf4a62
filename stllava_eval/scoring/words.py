"""Split a text into the words that our scores compare, without differences of case, accent, width or punctuation.

`metrics.py`, `verdict.py` and `statements.py` read answers, references and questions through these functions.
"""

import re
import unicodedata
from functools import lru_cache

from stllava_eval.errors import InputError

ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)}
# The scores of one question use the same words, and questions share references. A larger cache would only cost memory.
remembered = lru_cache(maxsize=2048)

_APOSTROPHES = str.maketrans(dict.fromkeys("‘’ʼ´′", "'"))
_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_WORD = re.compile(r"\d+(?:\.\d+)*|[^\W\d_][^\W_]*(?:'[^\W_]+)*")


def folded(text: str) -> str:
    """Fold differences of case, width, ligature, accent and apostrophe, and remove zero-width marks."""
    if not text.isascii():
        # NFKD (Unicode Annex 15) splits accents, ligatures and full width off; Mn are accents, Cf zero-width marks
        text = unicodedata.normalize("NFKD", text.translate(_APOSTROPHES)).casefold()
        text = "".join(letter for letter in text if unicodedata.category(letter) not in ("Mn", "Cf"))
    return text.lower().replace("`", "'")


@remembered
def folded_words(text: str) -> tuple[str, ...]:
    """Return the words of a text before plurals are folded; version 1 of the clean scores compares these.

    Unicode is folded (NFKD, case, accents, curly apostrophes, µ to μ), number words up to twelve are digits, "a", "an"
    and "the" are dropped unless the text has no other word. A word is a number with its decimals, or letters and digits
    that start with a letter, with an apostrophe inside or not; every other mark, including dashes of any kind,
    separates words. So "x-ray" equals "x ray", "5cm" equals "5 cm", and "1,000" equals "1000".

    Plurals (see `singular_words`), synonyms and abbreviations are not folded. Chinese is not segmented: a run of
    characters is one word.

    >>> folded_words("Two T2‑weighted lesions, 2.5cm: Sjögren’s?")
    ('2', 't2', 'weighted', 'lesions', '2.5', 'cm', "sjogren's")
    """
    without_commas = _THOUSANDS_COMMA.sub("", folded(text))
    words = [DIGITS.get(word, word) for word in _WORD.findall(without_commas)]
    return tuple(word for word in words if word not in ARTICLES) or tuple(words)


@remembered
def singular(word: str) -> str:
    """Remove the plural ending of an English noun, and of any other word with the same ending.

    We chose this rule over Porter's and Snowball's stemmers: on real answers it gives the same scores, and it folds
    only singular and plural (docs/evaluate/metrics.md has the comparison).

    >>> [singular(word) for word in ("lungs", "masses", "biopsies", "pelvis", "foci")]
    ['lung', 'mass', 'biopsy', 'pelvis', 'focus']
    """
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith(("sses", "shes", "ches", "xes")):
        return word[:-2]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3 else word


_IRREGULAR = {
    "women": "woman",
    "men": "man",
    "foci": "focus",
    "bronchi": "bronchus",
    "metastases": "metastasis",
    "stenoses": "stenosis",
    "thromboses": "thrombosis",
    "vertebrae": "vertebra",
    "apices": "apex",
    "diagnoses": "diagnosis",
}


@remembered
def singular_words(text: str) -> tuple[str, ...]:
    """Return `folded_words` in the singular: the words that version 2 of the clean open scores compares.

    >>> singular_words("The lungs")
    ('lung',)
    """
    return tuple(singular(word) for word in folded_words(text))


def wanted_words(reference: str) -> tuple[str, ...]:
    """Return the words of a reference.

    Raises:
        InputError: It has no words.
    """
    if wanted := folded_words(reference):
        return wanted
    raise InputError(f"reference {reference!r}: it has no words, so no answer can be right. Leave the question out.")


def word_set(text: str) -> frozenset[str]:
    """Return the set of words in a text that white space separates, the form in which the rules' lists are written."""
    return frozenset(text.split())
