"""The first version of the strict verdict, kept by name: older figures are compared with it alone.

It looks for the words yes and no, or for the words of the options, and is wrong where it finds two of them. What is
scored as `closed_accuracy` today is in `verdict.py`; docs/evaluate/metrics.md says what changed.
"""

import re
from functools import lru_cache
from typing import Literal

from stllava_eval.scoring.words import folded, folded_words, remembered, wanted_words


@remembered
def verdict(answer: str, reference: str, question: str = "") -> Literal["right", "wrong", "unparsed"]:
    """Return whether the answer chooses what the reference chooses, by the rules of version 1.

    The options are yes and no where the reference is one of them, else what `choices` reads from the question. An
    answer names an option by its words in a row ("normal" is not in "abnormal"). It is right if it names the
    reference's option and no other, unparsed if it names none, and otherwise wrong: "yes and no" is wrong.

    Strict on purpose, so that no wording is worth more than a plain verdict:
    - Only the words yes and no are verdicts. "no evidence of" says no. "not" says nothing by itself, since it denies
      whatever follows: "not seen" is a no, but "not sure" is none and "yes, not enlarged" is a yes.
    - "MRI, not CT" names both and is wrong; "yes, there is no effusion" too.
    - Where the question offers nothing that fits the reference, the reference is the only known option and any other
      choice is unparsed rather than wrong. Neither scores.

    Raises:
        InputError: The reference has no words.

    >>> verdict("The left side.", "Left", "Is the lesion on the left or right?")
    'right'
    >>> verdict("There is no evidence of fracture.", "no"), verdict("It is abnormal.", "no")
    ('right', 'unparsed')
    """
    named, wanted = _named_and_wanted(answer, reference, question)
    if not named:
        return "unparsed"
    return "right" if named == wanted else "wrong"


def options_named(answer: str, reference: str, question: str = "") -> set[str]:
    """Return the options of a closed question whose words the answer has, denied or not. The gate guards formats by it.

    Raises:
        InputError: The reference has no words.

    >>> sorted(options_named("Yes and no.", "no"))
    ['no', 'yes']
    """
    return _named_and_wanted(answer, reference, question)[0]


def _named_and_wanted(answer: str, reference: str, question: str) -> tuple[set[str], set[str]]:
    """Return the options that the answer names, and those that the reference names."""
    wanted = " ".join(wanted_words(reference))
    options = ("yes", "no") if wanted in ("yes", "no") else choices(question)
    if not _named(wanted, options):
        options = (*options, wanted)
    return _named(" ".join(folded_words(answer)), options), _named(wanted, options)


_LAST_OR = re.compile(r"(.*)\bor\b([^,]*)", re.DOTALL)
_CLAUSE_BEFORE_LIST = re.compile(r"\s*(?:which|what|where)\b[^,]*,")


@remembered
def choices(question: str) -> tuple[str, ...]:
    """Return the options that a closed question offers, as words joined by spaces; none if it has no "or".

    Two forms, those of VQA-RAD and SLAKE. "Which ..., A, B or C?" is a list with a start and an end. In "Is it A, B or
    C ...?" neither is marked: the first option is as long as the second, and of the last one word is taken (of both
    two, if they are "A x or B x").

    >>> choices("Which plane is the image scanned, transverse plane or coronal plane?")
    ('transverse plane', 'coronal plane')
    >>> choices("Is this a T1 weighted, T2 weighted, or FLAIR image?")
    ('t1 weighted', 't2 weighted', 'flair')
    """
    offer = _LAST_OR.match(folded(question))
    if offer is None:
        return ()
    before, last = offer[1], folded_words(offer[2])
    clause = _CLAUSE_BEFORE_LIST.match(before)
    start = clause.end() if clause else 0
    parts = [part for text in re.split(r",|\bor\b", before[start:]) if (part := folded_words(text))]
    if not clause and parts:
        # an option has at most two words here, so the last longer part is the clause that the first option ends
        first, *middle = parts[max((i for i, part in enumerate(parts) if len(part) > 2), default=0) :]
        alike = first[-1:] == last[1:2]
        first_length = len(middle[0]) if middle else 1 + alike
        parts, last = [first[-first_length:], *middle], last[: 1 + alike]
    return tuple(" ".join(option) for option in (*parts, last) if option)


def _named(text: str, options: tuple[str, ...]) -> set[str]:
    """Return the options whose words are in `text`, which is words joined by spaces."""
    if not options:
        return set()
    pattern, option_of = _naming(options)
    return {option_of[phrase] for phrase in pattern.findall(text)}


@lru_cache(maxsize=1024)
def _naming(options: tuple[str, ...]) -> tuple[re.Pattern[str], dict[str, str]]:
    """Return a pattern that finds the options in words, and the option that each phrase names.

    An option is named in full, or by the words that set it apart: "T1" names "T1 weighted" beside "T2 weighted". The
    longest phrase wins, so "upper left" does not name "left" as well.
    """
    option_of = {option: option for option in options}
    for option in options:
        shared: set[str] = set()
        for other in options:
            if other != option:
                shared.update(other.split())
        if own := " ".join(word for word in option.split() if word not in shared):
            option_of.setdefault(own, option)
    phrases = "|".join(re.escape(phrase) for phrase in sorted(option_of, key=len, reverse=True))
    return re.compile(rf"(?<!\S)(?:{phrases})(?!\S)"), option_of
