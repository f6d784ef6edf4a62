"""The reply of a judge -> its two scores, or none where it does not say two."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from stllava_eval.inference.replies import Failure, Reply
from stllava_eval.scoring.final_answer import outside_thoughts
from stllava_eval.scoring.verdict import is_refusal

Scores = tuple[float, float]
"""Of Answer 1 and Answer 2."""

MORE_ROOM = "Raise --max-tokens, or give --reasoning to a model that thinks"
INVISIBLE = re.compile("[\ufeff\u200b-\u200d\u2060]")
LONGEST_LINE = 200  # characters of a line that holds scores and nothing else (our choice)


def read_verdict(reply: Reply | Failure, strict: bool, limit: int) -> tuple[str, str | None, Scores | None]:
    """(outcome, one of `verdicts.VERDICT_OUTCOMES`; why nothing is scored; the scores) of what came back from a judge.

    A question without a reply has *failed* and may be asked again. A reply is never asked for again, as it is paid:
    without scores it is *unparsable*. A question that the server itself refuses is *refused* as one that the model
    declines.

    Args:
        reply: What came.
        strict: Scores are read as the authors' code does; but where the first line numbers the answers, there are none.
        limit: Tokens that the reply was allowed, in the reason of one that was cut.
    """
    if isinstance(reply, Failure):
        if reply.came is not None and reply.came.cut and not (reply.refused or reply.again):
            return "unparsable", f"its reply is empty at the limit of {limit} tokens. {MORE_ROOM}", None
        if reply.refused or _final(reply.status):
            return "refused", reply.reason, None
        return ("failed" if reply.came is None or reply.again else "unparsable"), reply.reason, None
    numbered = strict and enumerates(reply.text)
    read = read_scores_authors if strict else read_scores
    scores = None if numbered else read(reply.text)
    if reply.cut and scores != read(f"{reply.text}0"):  # a number was cut, perhaps
        scores = None
    if scores is not None:
        return "scored", None, scores
    if is_refusal(reply.text):
        return "refused", "a refusal", None
    if reply.cut:
        return "unparsable", f"its reply was cut at {limit} tokens, before its scores. {MORE_ROOM}", None
    return "unparsable", "its first line numbers the answers" if numbered else "no two scores", None


# Of HTTP 4xx, those that may pass with another key, at another address, or at another time
PASSING = {401, 402, 403, 404, 405, 407, 408, 409, 425, 429}


def _final(status: int | None) -> bool:
    """Return whether an error of this HTTP status comes again with the same question, as 400, 413 and 422 do."""
    return status is not None and 400 <= status < 500 and status not in PASSING


def read_scores(reply: str) -> Scores | None:
    """Return the two scores in a judge's reply, each in 1 to 10; None where it does not say two.

    What a thought holds is not read. A JSON object with a score for each answer, which may be cut behind them; or the
    first line with words or figures, where it holds two scores and nothing else but marks and labels ("8 6", "8, 6",
    "**8 6**", "8/10 6/10", "eight six", "Answer 1: 8, Answer 2: 6", the row of a table); or two lines with a label
    each ("Answer 1: 8", then "Answer 2: 6"; "1. 8", then "2. 6"). Scores in a sentence are not looked for: any number
    in it could be taken for one. Where a figure may be the number of an answer or a score ("1.8 2.6"), there are none,
    nor where a form and a line say two different things.
    """
    text = outside_thoughts(INVISIBLE.sub("", reply))
    if text is None:
        return None
    form = _in_form(text)
    pair = form if form is not None else _in_lines(text)
    return pair if pair is not None and all(1 <= score <= 10 for score in pair) else None


def read_scores_authors(reply: str) -> Scores | None:
    """As the authors' `parse_score`: the first line, its commas blanks, cut at every single blank into two numbers."""
    parts = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, parts)
    except ValueError:
        return None
    return None if -1 in (first, second) or not math.isfinite(first + second) else (first, second)


def enumerates(reply: str) -> bool:
    """Return whether the first line has an answer's number and its score ("1. 8"), which look like two scores."""
    first, second, *_ = [*_lines(reply), "", ""]
    numbers = [match and next(filter(None, match.groups())) for match in map(NUMBERED.match, (first, second))]
    pairs = [_plain(line) for line in (first, second)]
    if numbers[0] == "1" or re.match(r"\W*2\s*[.)]\s*\d", first):
        return True
    if pairs[0] in ((1, 2), (2, 1)) and pairs[1]:  # the head of a table
        return True
    starts = [pair and pair[0] for pair in pairs]
    return starts in ([1, 2], [2, 1]) or numbers == ["2", "1"]


# --- a form of JSON ---------------------------------------------------------------------------------------------------

_OF = r"(?:score|rating|answer|assistant|response)s?"
# Names of the two scores: score_1, Answer 1, score for answer 1, answer_1_score, 1
KEY = re.compile(
    rf"(?:(?:overall|final)[_ ])?(?:{_OF}[_ ]?)?(?:(?:for|of)[_ ])?(?:{_OF})?[_ #]*([12])(?:[_ ]{_OF})?", re.I
)
AROUND = re.compile(
    r"(?:(?:overall|final)[_ ])?(?:score|rating|result|evaluation|verdict|output)s?", re.I
)  # a form in a form
VALUE = re.compile(r"\s*(\d{1,2}(?:[.,]\d+)?)\s*(?:(?:/|out of)\s*10\s*)?", re.I)
# What a score in a list says of whose it is: 2, "Answer 2", "second"
WHOSE = re.compile(r"(?:the\s+)?(?:[a-z]+[\s_#]*)?([12ab]|first|second)(?:\s+[a-z]+)?", re.I)
SCORE = ("score", "rating")
# The beginning of a form that is cut, or that is no JSON behind its scores. A number that ends the text may be cut too
BEGUN = re.compile(
    r'\{\s*"([^"]{1,40})"\s*:\s*(?:"([^"]{1,20})"|([\d.]{1,20}))\s*,'
    r'\s*"([^"]{1,40})"\s*:\s*(?:"([^"]{1,20})"|([\d.]{1,20})(?=[\s,}]))'
)


def _in_form(text: str) -> Scores | None:
    """Return the scores in the only JSON object that has some; out of range where it has two or cannot be read."""
    if (start := text.find("{")) < 0:
        return None
    try:
        made, end = json.JSONDecoder(object_pairs_hook=_once, strict=False).raw_decode(text[start:])
    except (ValueError, RecursionError):
        begun = BEGUN.match(text, start)
        if begun is None:
            return None
        made, end = {begun[1]: begun[2] or begun[3], begun[4]: begun[5] or begun[6]}, len(text)
    found = _of_answers(made)
    behind = text[start + end :]
    others = (_in_lines(text[:start]), _in_lines(behind))
    if found is not None and (_in_form(behind) is not None or any(one not in (None, found) for one in others)):
        return math.nan, math.nan
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object in which every name is there once.

    Raises:
        ValueError: One is there twice, and it is not known which is meant.
    """
    if len(made := dict(pairs)) < len(pairs):
        raise ValueError("a name is there twice")
    return made


def _of_answers(made: Any, inside: bool = False) -> Scores | None:
    """Return the scores in an object; in a list, if it has two values and is inside of an object."""
    if isinstance(made, list):
        return _numbers(made) if inside and len(made) == 2 and _in_order(made) else None
    if not isinstance(made, dict):
        return None
    named = [(match[1], value) for name, value in made.items() if (match := KEY.fullmatch(name))]
    if [place for place, _ in named] == ["1", "2"]:
        return _numbers([value for _, value in named])
    around = [value for name, value in made.items() if AROUND.fullmatch(name)]
    return _of_answers(around[0], True) if len(around) == 1 and not named and not inside else None


def _in_order(scores: Sequence[Any]) -> bool:
    """Return whether none in a list of scores says that it is of another answer than its place has."""
    for place, one in enumerate(scores, 1):
        said = [value for name, value in one.items() if name not in SCORE] if isinstance(one, dict) else []
        whose = [match for value in said if (match := WHOSE.fullmatch(str(value).strip()))]
        if any(PLACES[match[1].lower()] != place for match in whose):
            return False
    return True


def _numbers(values: Sequence[Any]) -> Scores:
    """Return both as numbers; NaN for what is none."""
    found = []
    for value in values:
        if isinstance(value, dict):
            value = next((value[name] for name in SCORE if name in value), None)
        if isinstance(value, str):
            match = VALUE.fullmatch(value)
            value = float(match[1].replace(",", ".")) if match else None
        fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
        found.append(float(value) if fits else math.nan)
    return found[0], found[1]


# --- lines ------------------------------------------------------------------------------------------------------------

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
WORD = re.compile(rf"\b(?:{'|'.join(WORDS)})\b", re.I)
# A score. One with a sign is none, nor is one of another scale than 10
SCORED = re.compile(r"(?<![\w./−-])(\d{1,2}(?:\.\d+)?)(?:\s*(?:/|out of)\s*10(?:\.0+)?)?(?![\w%]|\.\d|\s*/\s*\d)", re.I)
# Whose score follows: "Answer 1:", "Score for Answer 1 =", "the first:", "A:", and "1." where that is meant
_NAMED = (
    rf"(?:(?:scores?|ratings?)\s+(?:for|of)\s+)?(?:the\s+)?(?:{_OF}|a)\s*#?\s*([12ab])\b(?:\s*'s)?"
    r"\s*(?:scores?|ratings?)?\s*[:=|(–-]*"
)
_ORDINAL = r"(?:the\s+)?(first|second)(?:\s+(?:answer|assistant|response|one|score))?\s*[:=|–-]"
_LETTER = r"([ab])\s*[:=)|]"
_NUMBER = r"[(#]?([12])\s*(?:[.):=|]+|[–-](?=\s))(?!\d)"
LABEL = re.compile(rf"\b(?:{_NAMED}|{_ORDINAL}|{_LETTER})\s*(?:scores?\s*[:=]?)?\s*(?=\d|$)", re.I)
NUMBERED = re.compile(rf"\W*?{_NUMBER}\s*(?=\d)")
LABEL_OR_NUMBER = re.compile(rf"{LABEL.pattern}|{_NUMBER}\s*(?=\d)", re.I)
BEFORE_A_LABEL = re.compile(rf"\W*[12]\s*[.):]\s*(?={LABEL.pattern})", re.I)  # "1. Answer 1: 8"
IN_BETWEEN = re.compile(
    r"[\s,;:|&()\[\]/]+|[.](?=\s|$)|-(?=\s|$)|\b(?:and|vs|points?|pts?)\b|\b(?:scores?|ratings?)\b(?!\s*#?\s*[12]\b(?!\s*/|\.\d))",
    re.I,
)
# What a line without any figure may say before the scores
HEADING = re.compile(
    r"(?:\b(?:here|are|is|my|the|two|final|overall|results?|scores?|ratings?|answers?)\b|[\W_])*", re.I
)
NUMBER_OR_DECIMAL = re.compile(r"\W*1[.,]\d{1,2}\W+2[.,]\d{1,2}\W*")  # "1.8 2.6"
COMMA = re.compile(r"\d{1,2},\d{1,2}")  # two such lines may have a decimal comma each
PLACES = {"1": 1, "2": 2, "a": 1, "b": 2, "first": 1, "second": 2}
Item = tuple[int | None, float]
"""(which answer, where that is said; its score)."""


def _lines(text: str) -> list[str]:
    """Return the lines that say something, without Markdown and with figures for the words of numbers."""
    found = []
    for raw in text.splitlines():
        line = re.sub(r"[-=]+>|→", "- ", raw)
        line = " ".join(re.sub(r"[*_`#~]+|^[\s>]+|^\s*[•-]\s+", " ", line).split())  # no pattern meets many blanks
        if re.search(r"\w", line) and not raw.lstrip().startswith("```"):
            found.append(WORD.sub(lambda word: str(1 + WORDS.index(word[0].lower())), line[: LONGEST_LINE + 1]))
        if len(found) == 4:  # two headings and two lines with a score each
            break
    while found and not re.search(r"\d", found[0]) and HEADING.fullmatch(found[0]):
        found.pop(0)
    return found


def _in_lines(text: str) -> Scores | None:
    lines = _lines(text)
    if not lines or NUMBER_OR_DECIMAL.fullmatch(lines[0]) or all(map(COMMA.fullmatch, [*lines, "", ""][:2])):
        return None
    if len(lines) > 1 and [place for place, _ in _labels(lines[0])] == [1, 2] and (pair := _plain(lines[1])):
        return pair  # the first row of a table has the labels
    numbered = enumerates(text)
    first = _items(lines[0], numbered)
    if first is None:
        return None
    if len(first) == 1 and first[0][0] == 1 and len(lines) > 1:
        first += _items(lines[1], numbered) or []
    elif len(first) == 2 and first[0][0] is None and numbered:
        return None
    places = [place for place, _ in first]
    return (first[0][1], first[1][1]) if len(first) == 2 and places in ([None, None], [1, 2]) else None


def _plain(line: str) -> Scores | None:
    """Return two scores without a label."""
    items = _items(line)
    return (items[0][1], items[1][1]) if items is not None and [one[0] for one in items] == [None, None] else None


def _labels(line: str) -> list[tuple[int, str]]:
    """Return the labels of a line that has nothing else."""
    found, rest = [], line
    for part in re.split(r"[|,;/]|\band\b", rest):
        if not part.strip():
            continue
        match = LABEL.fullmatch(part.strip())
        if match is None:
            return []
        found.append((PLACES[next(filter(None, match.groups())).lower()], part))
    return found


def _items(line: str, numbered: bool = False) -> list[Item] | None:
    """Return the scores in a line that has nothing else, each with its label; None where it has something else.

    Where the lines are `numbered`, "1." is a label.

    A comma between two figures parts two scores, unless the line then has more than two and is right with decimal
    commas ("8,5 6,5").
    """
    if len(line) > LONGEST_LINE:
        return None
    found = _parted(line, numbered)
    places = None if found is None else [place for place, _ in found]
    if places in ([None, None], [1], [2], [1, 2], [2, 1]):
        return found
    decimal = re.sub(r"(?<!\d)(\d{1,2}),(\d{1,2})(?!\d)", r"\1.\2", line)
    other = _parted(decimal, numbered) if decimal != line else None
    if other and (all(place for place, _ in other) or len(other) == decimal.count(".") - line.count(".") == 2):
        return other
    return found


def _parted(line: str, numbered: bool) -> list[Item] | None:
    label = LABEL_OR_NUMBER if numbered else LABEL
    found: list[Item] = []
    start = BEFORE_A_LABEL.match(line)
    at, place = start.end() if start else 0, None
    while at < len(line):
        if place is None and (match := label.match(line, at)):
            place = PLACES[next(filter(None, match.groups())).lower()]
        elif match := SCORED.match(line, at):
            found.append((place, float(match[1])))
            place = None
        else:
            match = IN_BETWEEN.match(line, at)
        if match is None or match.end() == at:
            return None
        at = match.end()
    return found if place is None else None
