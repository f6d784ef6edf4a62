"""Take the final answer out of a model's raw reply, by a named and versioned rule; `metrics.py` scores that answer.

Models that think, and models that were tuned with rewards, wrap their answer: in marks around a thought, in tags, in a
box, in JSON. What such a model says and what it answers are two things, and only the answer is scored. A reply that
stopped inside its thought has no answer: whatever words stand in the thought, it is *cut* and never right.

The rule depends on the reply and on the text that was asked, and on nothing else, so that lmms-eval's table, a run
folder and `stllava-eval score` all read one reply alike. A reply without any of the forms is its own answer, to the
last character.
"""

from __future__ import annotations

import ast
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise, takewhile
from typing import Any

from stllava_eval.errors import InputError
from stllava_eval.storage import replace_lone_surrogates

log = logging.getLogger("stllava_eval")

FINAL = "final"
NONE = "none"
SIGNATURES = {FINAL: "final-v1", NONE: "none"}
"""Each rule's name in a score's signature. `none` scores the raw reply, as the papers' scripts do."""

DEPTH = 6  # forms inside forms, such as a letter in bold in a box in a tag (our choice)
LONGEST_JSON = 100_000  # characters that are tried as JSON (our choice): an answer is far shorter


@dataclass(frozen=True)
class FinalAnswer:
    """The final answer of one reply.

    Args:
        answer: The text that is scored; empty where there is none.
        cut: The reply stopped inside its thought, so it never came to an answer.
        forms: What the answer was taken out of, from the outside in; empty for a plain reply.
        reply: The raw reply.
    """

    answer: str
    cut: bool = False
    forms: tuple[str, ...] = ()
    reply: str = field(default="", repr=False, compare=False)


def check_rule(rule: object, name: str) -> str:
    """Return `rule` if it names one.

    Raises:
        InputError: It does not; `name` says where it was given.
    """
    if str(rule).lower() not in SIGNATURES:  # lmms-eval hands over "none" as typed
        raise InputError(f"{name}={rule}: unknown. Pass one of {', '.join(SIGNATURES)}.")
    return str(rule).lower()


def final_answer(reply: str, asked: str = "", rule: str = FINAL) -> FinalAnswer:
    """Take the final answer out of a reply.

    Args:
        reply: The raw text. Where the chat template opened the thought, `with_opened_thoughts` has put its mark back.
        asked: The text that the model was asked; a letter names one of its lettered options.
        rule: `final`, or `none` for the reply as it is.

    Source: the forms are those of the models that docs/evaluate/answers.md lists; the rule is ours.

    >>> final_answer("<think>It is dark.</think><answer>Yes</answer>")
    FinalAnswer(answer='Yes', cut=False, forms=('thought', 'tag'))
    >>> final_answer("<think>Let me look. Is it yes? The").cut
    True
    >>> final_answer("Yes, on the left.").forms
    ()
    """
    return replace(FinalAnswer(reply) if rule == NONE else _final(reply, asked), reply=reply)


def _final(reply: str, asked: str) -> FinalAnswer:
    reply = _ESCAPED_TAG.sub(r"<\1>", reply) if "&lt;" in reply else reply
    text = reply
    forms: tuple[str, ...] = ()
    if _OPEN_AT_THE_END.search(reply):
        return FinalAnswer("", cut=True, forms=("tag" if reply.rstrip().endswith(">") else "box",))
    if _MARK.search(reply) or _CHANNEL in reply:
        outside = outside_thoughts(reply)
        if outside is None:
            return FinalAnswer("", cut=True, forms=("thought",))
        text, forms = outside, ("thought",)
    for _ in range(DEPTH):
        for name, take in _FORMS.items():
            taken = take(text)
            if taken is not None and taken != text:
                text, forms = taken, (*forms, name)
                break
        else:
            break
    if _stopped_before_its_answer(text, forms):
        return FinalAnswer("", cut=True, forms=forms or ("json",))
    if (option := _option_of_letter(text, asked)) is not None:
        text, forms = option, (*forms, "letter")
    return FinalAnswer(text, forms=forms)


# ---------------------------------------------------------------------------------------------------------------------
# Thoughts

# Tags that families of models write around a thought, in any letter case. think: Qwen3, Lingshu-R1, MedVLThinker,
# DeepSeek-R1; thinking, thought, reasoning, rationale: instruction-tuned relatives; analysis: lmms-eval's second
# default; seed:think: Seed-OSS; summary, caption: the steps of LLaVA-CoT before its conclusion.
_TAGS = (
    "think|thinking|thought|thoughts|reason|reasoning|rationale|analysis|reflection|scratchpad|seed:think"
    "|inner_monologue|summary|caption"
)
_ATTRIBUTES = r"(?:\s+[\w:-]+\s*=[^<>]*)?"
_OPENING = (
    rf"<\s*(?:{_TAGS}){_ATTRIBUTES}\s*>"
    r"|◁\s*think\s*▷"  # Kimi-VL-Thinking
    r"|\[THINK\]"  # Magistral
    r"|<\|begin_of_thought\|>|<\|START_THINKING\|>|<\|think\|>"  # OpenThinker and its like; Command A Reasoning
    r"|<unused94>(?:\s*thought\b)?"  # MedGemma 1.5
    r"|<\|channel>(?:\s*thought\b)?"  # Gemma 4
)
_CLOSING = (
    rf"<\s*/\s*(?:{_TAGS})\s*>"
    r"|◁\s*/\s*think\s*▷|\[/THINK\]|<\|end_of_thought\|>|<\|END_THINKING\|>|<\|/think\|>|<unused95>|<channel\|>"
)
_MARK = re.compile(rf"(?P<opening>{_OPENING})|(?P<closing>{_CLOSING})", re.IGNORECASE)
_CHANNEL = "<|channel|>"  # gpt-oss and its relatives: a channel is named, then its message follows
_FINAL_CHANNEL = re.compile(  # a message in a format names it: `final <|constrain|>json`
    r"<\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>(.*?)(?:<\|(?:end|return)\|>|\Z)", re.DOTALL
)


def outside_thoughts(reply: str) -> str | None:
    """Return the last text outside every thought, stripped; None where the reply stopped inside a thought.

    A closing mark without an opening one ends a thought that began with the reply, since many templates open the
    thought in the prompt.
    """
    if _CHANNEL in reply:
        messages = _FINAL_CHANNEL.findall(reply)
        return messages[-1].strip() if messages else None
    pieces: list[str] = []
    inside, start = False, 0
    for mark in _MARK.finditer(reply):
        if mark["opening"]:
            if not inside:
                pieces.append(reply[start : mark.start()])
            inside = True
        else:
            if not inside:
                pieces.clear()  # what seemed to be outside was thought
            inside, start = False, mark.end()
    if inside:
        # a model that forgot to close its thought, yet came to a whole answer with which the reply ends
        whole_tag = _WHOLE_TAG_AT_THE_END.search(reply)
        return whole_tag[0].strip() if whole_tag else None
    pieces.append(reply[start:])
    return next((piece.strip() for piece in reversed(pieces) if piece.strip()), "")


def opens_thought(prompt: str) -> str:
    """Return the thought mark that a rendered prompt ends with, as it must stand before the reply; empty if none."""
    marks = list(_MARK.finditer(prompt))
    if not marks or not marks[-1]["opening"] or prompt[marks[-1].end() :].strip():
        return ""
    return prompt[marks[-1].start() :]


def with_opened_thoughts(replies: Sequence[str], ended: Sequence[bool | None], before: str = "") -> list[str]:
    """Return the replies, each with the thought mark in front that the chat template wrote into the prompt, if it did.

    A template opens the thought of every reply or of none. We infer that it does where at least half of the replies
    that were not cut at their limit (our choice) have a closing mark and no opening mark. A reply of the same model
    without any mark then stopped inside its thought, which its own text cannot show.

    Args:
        replies: All the raw replies of one model under one prompt.
        ended: For each reply, False where it was cut at its limit of tokens; None where that is not known.
        before: The opening mark that earlier replies of this model under this prompt lacked; empty if none. Where no
            reply here closes a thought, it is put before those that were cut at their limit without any mark.
    """
    closings = [_lone_closing(reply) for reply in replies]
    lone = [mark for mark in closings if mark]
    not_cut = sum(end is not False for end in ended)
    if not lone:
        return [
            f"{before}\n{reply}" if before and end is False and reply.strip() and not _MARK.search(reply) else reply
            for reply, end in zip(replies, ended, strict=True)
        ]
    if 2 * len(lone) < not_cut:
        unmarked = sum(not _MARK.search(reply) for reply in replies)
        log.warning(
            "%d replies close a thought that they do not open, and %d have no thought mark: the latter are taken for "
            "plain answers. If they stopped in their thought, say so by finish_reason or ended in each line.",
            len(lone),
            unmarked,
        )
        return list(replies)
    opening = _OPENING_OF.get(lone[0].lower(), re.sub(r"/\s*", "", lone[0]))
    return [
        reply if not reply.strip() or (_MARK.search(reply) and not closing) else f"{opening}\n{reply}"
        for reply, closing in zip(replies, closings, strict=True)
    ]


_OPENING_OF = {
    "<unused95>": "<unused94>",
    "<channel|>": "<|channel>",
    "<|end_of_thought|>": "<|begin_of_thought|>",
    "<|end_thinking|>": "<|START_THINKING|>",
    "<|/think|>": "<|think|>",
}


def _lone_closing(reply: str) -> str:
    """Return the closing mark that comes before any opening one; empty if none does."""
    first = _MARK.search(reply)
    return first["closing"] or "" if first else ""


# ---------------------------------------------------------------------------------------------------------------------
# Forms of an answer. Each function returns the text inside its form, or None if the form does not occur.

_ANSWER_TAGS = "answer|final_answer|final answer|finalanswer|conclusion|final|solution"
_ANSWER_OPENING = rf"(?:<\s*(?:{_ANSWER_TAGS}){_ATTRIBUTES}\s*>|<\|begin_of_(?:box|solution)\|>)"
_ANSWER_CLOSING = rf"(?:<\s*/\s*(?:{_ANSWER_TAGS})\s*>|<\|end_of_(?:box|solution)\|>)"
# One tag around a final answer, opening or closing.
_ANSWER_TAG = re.compile(f"{_ANSWER_OPENING}|(?P<closing>{_ANSWER_CLOSING})", re.IGNORECASE)
# A whole pair of such tags with which the text ends.
_WHOLE_TAG_AT_THE_END = re.compile(
    rf"{_ANSWER_OPENING}(?:(?!{_ANSWER_OPENING}).)*?{_ANSWER_CLOSING}\s*\Z", re.IGNORECASE | re.DOTALL
)


def _in_tag(text: str) -> str | None:
    """Return what the last `<answer>`, `<conclusion>` or GLM box holds.

    The end of the text closes a tag too, since `</answer>` is a usual stop text; and the beginning opens one, since
    templates write `<answer>`.
    """
    start, held = 0, None
    for tag in _ANSWER_TAG.finditer(text):
        if tag["closing"]:
            held, start = text[start : tag.start()], tag.end()
        else:
            start = tag.end()
            held = text[start:]
    return None if held is None else held.strip()


_ESCAPED_TAG = re.compile(rf"&lt;(\s*/?\s*(?:{_TAGS}|{_ANSWER_TAGS})\s*)&gt;", re.IGNORECASE)  # as web pages keep them
# The beginning of LaTeX's box, with which models of mathematics mark their answers.
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# LaTeX's commands around plain text, which are replaced by that text.
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")


def _in_box(text: str) -> str | None:
    r"""Return what the last `\boxed{...}` holds, without LaTeX's commands for text."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start, depth = boxes[-1].end(), 1
    end = len(text)
    for index in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if not depth:  # the brace that closes the box; a reply that stopped inside it ends it too
            end = index
            break
    held = text[start:end]
    for _ in range(DEPTH):
        held = _LATEX_TEXT.sub(r"\1", held)
    return held.strip().strip("$").replace(r"\ ", " ").replace("~", " ").replace(r"\%", "%").strip()


_FIELDS = ("finalanswer", "answer", "predictedanswer", "modelanswer", "prediction", "response")
# A fence of code, in which models write JSON.
_FENCE = re.compile(r"```[a-zA-Z]*\s*\n?(.*?)```", re.DOTALL)
_ANSWER_FIELD = re.compile(
    # A quoted value ends at its own quote before a comma, a brace or the end of the text. A value without quotes ends
    # at a comma, a brace or the end of its line.
    r"""(?:["'](?:final[ _]?)?answer["']|(?<=\{)\s*(?:final_?)?answer)\s*:\s*"""
    r"""(?:(["'])(.*?)(?:(?<!\\)\1\s*(?=[,}]|\Z)|\Z)|([^\s"'{}\[\],][^,{}\n]{0,300})(?=[,}\n]))""",
    re.IGNORECASE | re.DOTALL,
)


def _in_json(text: str) -> str | None:
    """Return the answer field of a JSON object that is the whole text, is in a code fence, or ends the text."""
    if "{" not in text:
        return None
    bodies = [fenced[1].strip() for fenced in _FENCE.finditer(text)][::-1]
    for body in [*bodies, text[text.index("{") : text.rfind("}") + 1]]:
        with suppress(RecursionError):  # nested too deep to hold an answer
            if body.startswith("{") and (held := _answer_field(_loaded(body))) is not None:
                return held
    return None


def _loaded(body: str) -> Any:
    """Return what JSON, or a Python dict with single quotes, holds; None where it is neither."""
    if len(body) > LONGEST_JSON:
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # LaTeX in a Python dict: an escape that is none
                return read(body)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return None


def _answer_field(value: Any) -> str | None:
    if not isinstance(value, dict):
        return None
    named = {re.sub(r"[\s_-]", "", str(name)).lower(): held for name, held in value.items()}
    for name in _FIELDS:
        if name in named:
            return _as_text(named[name])
    for held in value.values():  # the answer may be in an object inside this one
        if (answer := _answer_field(held)) is not None:
            return answer
    return None


def _as_text(value: Any) -> str:
    """Return a JSON value as an answer: yes or no for a truth value, the items of a list."""
    if isinstance(value, dict):
        held = _answer_field(value)
        return held if held is not None else ", ".join(map(_as_text, value.values()))
    if isinstance(value, list | tuple):
        return ", ".join(map(_as_text, value))
    if value is None:
        return ""
    return ("no", "yes")[value] if isinstance(value, bool) else replace_lone_surrogates(str(value)).strip()


# The beginning of a JSON object that never ends: the reply stopped inside it.
_BROKEN_JSON = re.compile(r"""\A\s*(?:```[a-zA-Z]*\s*)?\{\s*"[^"\n]{1,40}"\s*:(?!.*\}[\s`]*\Z)""", re.DOTALL)
# A form that is opened by the last characters of the text, so its answer never came.
_OPEN_AT_THE_END = re.compile(rf"(?:{_ANSWER_OPENING}|\\(?:boxed|fbox)\s*\{{)\s*\Z", re.IGNORECASE)


def _stopped_before_its_answer(text: str, forms: Sequence[str]) -> bool:
    """Return whether an answer was announced and never came: behind "Final answer:" or in a broken object."""
    return (not text and forms[-1:] == ("final answer",)) or _BROKEN_JSON.match(text) is not None


def _in_broken_json(text: str) -> str | None:
    """Return the answer field of an object that is not whole, or not quite JSON."""
    if not re.match(r"\s*(?:```[a-zA-Z]*\s*)?\{", text) or not (fields := _ANSWER_FIELD.findall(text)):
        return None
    quote, quoted, bare = fields[-1]
    if not quote:
        return str(bare).strip()
    held = _loaded(f'"{quoted}"')  # with JSON's escapes
    return replace_lone_surrogates(held if isinstance(held, str) else quoted.replace('\\"', '"')).strip()


_ANNOUNCED = re.compile(
    # "Final answer: yes", "The final answer is yes", "## Final Answer", anywhere; "Answer: yes" at the start of a line;
    # "Answer" alone on a line that other lines follow
    r"(?:\bfinal[ \t_]{1,4}answer\b"
    r"|^[ \t>#*_-]{0,8}(?:the[ \t]+)?(?:correct[ \t]+)?answer(?=[*_ \t]{0,8}(?:[:：]|\n\s*\w)))"
    r"[*_`\"]*[ \t]*(?P<said>(?:is\b|would be\b)[ \t]*)?[*_`]*[ \t]*(?P<mark>[:：=]|[-–—](?=[ \t]))?[*_`]*[ \t]*",
    re.IGNORECASE | re.MULTILINE,
)


def _announced(text: str) -> str | None:
    """Return the line behind the last "Final answer:"; where it has no words, the next line or list that has."""
    last = None
    for match in _ANNOUNCED.finditer(text):
        line = text[match.end() :].split("\n", 1)[0] if not (match["said"] or match["mark"]) else ""
        if not line.strip():  # "my final answer depends on the view" announces nothing
            last = match
    if last is None:
        return None
    lines = [line.strip() for line in text[last.end() :].split("\n") if re.search(r"\w", line)]
    listed = list(takewhile(_LIST_ITEM.match, lines))
    return "\n".join(listed or lines[:1])


# A line of a list, with a bullet or a number.
_LIST_ITEM = re.compile(r"(?:[-*•]|\d{1,2}[.)])[ \t]+\S")
# Words in *, **, *** or _, __, ___. The marks touch the words, and are not inside a word ("snake_case").
_EMPHASIS = re.compile(
    r"(?<![\w*])(\*{1,3})(?=[^\s*])([^*\n]*[^\s*])\1(?![\w*])|(?<![\w_])(_{1,3})(?=[^\s_])([^_\n]*[^\s_])\3(?![\w_])"
)
# A text that is code as a whole, with a mark behind it.
_CODE = re.compile(r"\A`+([^`\n]+)`+([.!]?)\Z")
# The marks of a heading.
_HEADING = re.compile(r"\A#{1,6}[ \t]+")
# A text that is a fence of code as a whole.
_WHOLE_FENCE = re.compile(r"\A```[a-zA-Z]*\s*\n(.*?)\n?```\Z", re.DOTALL)


def _without_emphasis(text: str) -> str | None:
    """Remove Markdown's marks around words, code marks around all, and a heading's: `**Yes**` gives `Yes`."""
    if not any(sign in text for sign in "*_`#"):
        return None
    bare = _EMPHASIS.sub(lambda match: match[2] or match[4], text)
    stripped = bare.strip()
    for pattern, by in ((_WHOLE_FENCE, r"\1"), (_CODE, r"\1\2"), (_HEADING, "")):
        if (plain := pattern.sub(by, stripped)) != stripped:
            bare = stripped = plain.strip()
    return bare


_FORMS: dict[str, Callable[[str], str | None]] = {
    "tag": _in_tag,
    "box": _in_box,
    "json": lambda text: held if (held := _in_json(text)) is not None else _in_broken_json(text),
    "emphasis": _without_emphasis,  # before the announced line: "The final answer is **yes**."
    "final answer": _announced,
}
"""The forms in the order in which they are searched. After a form is found, all are searched again inside it."""


# ---------------------------------------------------------------------------------------------------------------------
# Letters

_LETTERED = re.compile(  # "A. yes", "(A) yes", "[A] yes", "**A:** yes", "a) yes"
    r"(?:(?<=\s)|\A|(?<=[(\[,;?:：|]))[(\[*]{0,3}([A-Ja-j])(?:[.):\]：、．]|\s[-–—])[*)]{0,3}\s*(?=\S)"
)
_INSTRUCTION = re.compile(  # "B. right. Answer with the letter." or "B. right Answer with the letter."
    r"(?<=[.?!])\s+(?=[A-Z])"
    r"|\s+(?=(?:Answer|Choose|Give|Only|Output|Pick|Please|Provide|Reply|Respond|Return|Select|Write|Your)\b)"
)
# A text from its first to its last letter or digit.
_CORE = re.compile(r"\w(?:.*\w)?", re.DOTALL)
# Both are matched with a core whose white space is single spaces, so no part of them competes for a run of it.
_LEAD = (
    r"(?:(?:the )?(?:correct |best |right )?(?:answer|option|choice)(?: is| would be)? ?[:：]? ?)?"
    r"[(\[]?(?:option |choice )?"
)
# A letter alone, with or without "The answer is" and "is correct".
_LETTER = re.compile(
    rf"{_LEAD}([A-J])[)\]]?(?: is (?:the )?(?:correct|right|best)(?: answer| option| choice)?)?", re.IGNORECASE
)
# A letter with its option behind it: "B. the heart", "Option B - the heart".
_LETTER_AND_OPTION = re.compile(rf"{_LEAD}([A-J])(?: ?[)\].:：,]{{1,3}}| [-–—]) ?(\S.*)", re.IGNORECASE)


def lettered_options(asked: str) -> dict[str, str]:
    """Return the options that a text letters A, B, ..., by letter; empty where it letters fewer than two.

    >>> lettered_options("Which side? A. left B. right")
    {'A': 'left', 'B': 'right'}
    """
    marks = list(_LETTERED.finditer(asked))
    # the last A after which B follows: an "A." before it is prose
    starts = [index for index, (mark, after) in enumerate(pairwise(marks)) if mark[1] + after[1] in ("AB", "ab")]
    if not starts:
        return {}
    options: dict[str, str] = {}
    run = marks[starts[-1] :]
    for number, mark in enumerate(run):
        if ord(mark[1]) != ord(run[0][1]) + number:
            break
        end = run[number + 1].start() if number + 1 < len(run) else len(asked)
        lines = asked[mark.end() : end].strip().split("\n")
        options[mark[1].upper()] = _INSTRUCTION.split(lines[0])[0].strip().rstrip("([").strip(" \t,;.|*")
    return options if len(options) > 1 and all(options.values()) else {}


def _option_of_letter(text: str, asked: str) -> str | None:
    """Return the option that an answer names by its letter; None if it names none or says more than that."""
    options = lettered_options(asked)
    core = _CORE.search(text)
    if not options or core is None:
        return None
    said = " ".join(core[0].split())
    if letter_alone := _LETTER.fullmatch(said):
        return options.get(letter_alone[1].upper())
    if (letter_and_option := _LETTER_AND_OPTION.fullmatch(said)) is None:
        return None
    letter, text_words = letter_and_option[1].upper(), _words(letter_and_option[2])
    fitting = [name for name, option in options.items() if _begins(text_words, _words(option))]
    # of "left" and "left lung", the longer one is meant where both fit
    if not fitting or max(fitting, key=lambda name: len(_words(options[name]))) != letter:
        return None
    option = options[letter]
    rest = text_words[len(_words(option)) :]
    behind = rest[1:] if rest[:1] in (["and"], ["or"]) else rest  # "A. left and right", "A. yes B. no"
    own = ([letter.lower()], _words(option))
    for name, other in options.items():
        for named in ([name.lower()], _words(other)):
            if named not in own and _begins(behind, named):
                return None  # it names another option as well
    return option


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _begins(words: Sequence[str], first: Sequence[str]) -> bool:
    return bool(first) and words[: len(first)] == first


# ---------------------------------------------------------------------------------------------------------------------
# Replies on their way through lmms-eval

SEALED = "[stllava_med replies] "


def pack_replies(replies: Sequence[str], asked: str, rule: str) -> str:
    """Return one text that holds the replies to one question, for lmms-eval, which passes on one text per question.

    It carries what `final_answer` needs besides the replies, so that the task reads them as the run does: sampled
    replies are several, and a task knows neither the rule of a run nor the text that was asked.
    """
    return SEALED + json.dumps({"replies": list(replies), "asked": asked, "extract": rule}, ensure_ascii=True)


def unpack_replies(text: str) -> list[str]:
    """Return the raw replies to one question from the text that lmms-eval holds: a plain reply, or packed ones."""
    held = _held(text)
    return list(held["replies"]) if held else [text]


def unpack_final_answers(text: str, asked: str = "") -> list[FinalAnswer]:
    """Return the final answer of each reply in the text that lmms-eval hands to a task, plain or packed."""
    held = _held(text)
    return (
        final_answers(held["replies"], held["asked"], held["extract"]) if held else final_answers([text], asked, FINAL)
    )


def _held(text: str) -> dict[str, Any] | None:
    """Return what `pack_replies` has put into a text; None for a plain reply, even one that begins alike."""
    if not text.startswith(SEALED):
        return None
    try:
        held = json.loads(text[len(SEALED) :])
        if held["extract"] in SIGNATURES and isinstance(held["asked"], str) and held["replies"]:
            return held if all(isinstance(reply, str) for reply in held["replies"]) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    return None


def final_answers(replies: Iterable[str], asked: str, rule: str) -> list[FinalAnswer]:
    """Return the final answer of each reply to one question; a failed request stays what it is."""
    return [final_answer(reply, asked, NONE if is_failed_request(reply) else rule) for reply in replies]


_FAILED_REQUESTS = (
    # lmms_eval 0.7.3, below lmms_eval/models/
    "[LMMS_EVAL_REQUEST_FAILED after ",  # simple/openai.py, simple/gemini.py, chat/{openai,async_openai,gemini}.py
    "Error: can only concatenate str",  # chat/async_openai.py: the service sent a message without content
    "Batch failed",  # simple/batch_gpt4.py
    "[GENERATION_FAILED]",  # simple/{cosmos_wm,diffusers_wm_base,generation_api,magi1_wm,wan2_1_t2i}.py
    "[ERROR] ",  # the same files
    "Failed to obtain answer via API.",  # VLMEvalKit, vlmeval/api/base.py
)
_FAILED_VIDEO = re.compile(r"Video .* (?:can not load|generate failed), check the source", re.DOTALL)


def is_failed_request(answer: str) -> bool:
    """Return whether this is the text that an lmms-eval adapter, or VLMEvalKit, writes when a request has failed.

    Such a question must be left out, counted and listed. Many adapters (`chat/_chat_base.py`, `simple/gpt4v.py`,
    `simple/qwen_vl_api.py`, `simple/llava.py`, ...) write an empty string instead; a model can answer nothing too,
    so an empty answer is not called failed here, and a run with many deserves a look at its log.

    >>> is_failed_request("[LMMS_EVAL_REQUEST_FAILED after 5 retries] Connection error.")
    True
    """
    return answer.startswith(_FAILED_REQUESTS) or _FAILED_VIDEO.fullmatch(answer) is not None
