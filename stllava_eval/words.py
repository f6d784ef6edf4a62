"""A text -> the words that the clean scores compare, without differences of case, accent, width or punctuation."""

import re
import unicodedata
from functools import lru_cache

from stllava_eval.errors import InputError

ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)}
# The scores of one question share its words, and questions share references; remembering more would only cost memory.
remembered = lru_cache(maxsize=2048)

_APOSTROPHES = str.maketrans(dict.fromkeys("‘’ʼ´′", "'"))
_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_WORD = re.compile(r"\d+(?:\.\d+)*|[^\W\d_][^\W_]*(?:'[^\W_]+)*")


def folded(text: str) -> str:
    """`text` without differences of case, width, ligature, accent or apostrophe; zero-width marks are gone."""
    if not text.isascii():
        text = unicodedata.normalize("NFKD", text.translate(_APOSTROPHES)).casefold()
        text = "".join(letter for letter in text if unicodedata.category(letter) not in ("Mn", "Cf"))
    return text.lower().replace("`", "'")


@remembered
def folded_words(text: str) -> tuple[str, ...]:
    """The words that the clean scores compare.

    Unicode is folded (NFKD, case, accents, curly apostrophes, µ to μ), number words up to twelve are digits, "a", "an"
    and "the" are dropped unless nothing else is there. A word is a number with its decimals, or letters and digits
    that start with a letter, with an apostrophe inside or not; every other mark separates, and so do dashes of any
    kind. One form for all: "x-ray" is "x ray", "5cm" is "5 cm", "1,000" is "1000".

    Not done: plurals (see `singular_words`), synonyms, abbreviations, and Chinese, where a run of characters is one
    word.

    >>> folded_words("Two T2‑weighted lesions, 2.5cm: Sjögren’s?")
    ('2', 't2', 'weighted', 'lesions', '2.5', 'cm', "sjogren's")
    """
    found = [DIGITS.get(word, word) for word in _WORD.findall(_THOUSANDS_COMMA.sub("", folded(text)))]
    return tuple(word for word in found if word not in ARTICLES) or tuple(found)


@remembered
def singular(word: str) -> str:
    """An English noun without its plural's ending; another word that ends like one loses the ending too.

    Our choice beside Porter's and Snowball's stemmers: on real answers it finds what they find, and it folds nothing
    but number (docs/metrics.md has the table).

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
    """`folded_words` in the singular: the words that the clean open scores compare.

    >>> singular_words("The lungs")
    ('lung',)
    """
    return tuple(singular(word) for word in folded_words(text))


def wanted_words(reference: str) -> tuple[str, ...]:
    """The words of a reference.

    Raises:
        InputError: It has none.
    """
    if wanted := folded_words(reference):
        return wanted
    raise InputError(f"reference {reference!r}: has no words, so nothing can be right. Leave the question out.")


def word_set(text: str) -> frozenset[str]:
    """The words of a text, divided by white space: how the lists of the rules are written down."""
    return frozenset(text.split())
