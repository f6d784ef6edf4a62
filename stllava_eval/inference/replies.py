"""Read the reply in the JSON of a chat completion, or why there is none, in the server's own words.

`endpoint.py` decides by it whether a request is repeated, and what a run is billed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from stllava_eval.storage import replace_lone_surrogates

LONGEST_TOKEN = 100  # most characters per token of `max_tokens`; a longer reply ignored it (our choice)
LONGEST_NAME = 1000  # most characters of a model's name; a longer one is ignored (our choice)

# Why a reply ended. OpenAI's names are stop, length, content_filter and tool_calls; others are those of vLLM (abort),
# text-generation-inference (eos_token, stop_sequence), Mistral (model_length, error), Anthropic (end_turn, max_tokens,
# refusal), Google (safety), DeepSeek (insufficient_system_resource), OpenRouter (error) and llama.cpp (eos).
STOPPED = {"stop", "eos", "eos_token", "stop_sequence", "end_turn"}
CUT = {"length", "max_tokens", "max_output_tokens", "model_length"}
BROKEN_OFF = {"error", "abort", "insufficient_system_resource"}
FILTERED = {"content_filter", "safety", "refusal"}

# The HTTP status of errors that name a code or type instead, in lower case, without punctuation and the word "error".
# Source: OpenAI's and Anthropic's guides to errors, Google's status names, and vLLM's class names.
STATUSES = {
    400: ("badrequest", "invalidrequest", "invalidargument"),
    401: ("invalidapikey", "authentication", "unauthenticated", "unauthorized"),
    402: ("insufficientquota", "insufficientbalance", "insufficientcredits", "paymentrequired", "billing"),
    403: ("permission", "permissiondenied", "forbidden"),
    404: ("notfound", "modelnotfound"),
    429: ("ratelimit", "ratelimitexceeded", "toomanyrequests", "resourceexhausted"),
    500: ("server", "internalserver", "internal", "api"),
    503: ("overloaded", "unavailable", "serviceunavailable"),
}


@dataclass(frozen=True)
class Bill:
    """What a server bills for attempts that were followed by another attempt.

    It has the tokens that the server counted, and the number of attempts that may have cost an amount that we do not
    know, such as one that timed out.
    """

    prompt_tokens: int = 0
    tokens: int = 0
    unknown: int = 0

    def plus(self, trouble: Trouble) -> Bill:
        """Return this bill with what a failed attempt costs; an error without a reply costs nothing."""
        came = trouble.came
        if trouble.lost or (came and not came.counted):
            return replace(self, unknown=self.unknown + 1)
        if came is None:
            return self
        return self.plus_reply(came)

    def plus_reply(self, came: Reply) -> Bill:
        """Return this bill with what a reply costs, by the server's count of tokens."""
        return replace(self, prompt_tokens=self.prompt_tokens + came.prompt_tokens, tokens=self.tokens + came.tokens)


@dataclass(frozen=True)
class Reply:
    """A reply of a server to one request."""

    text: str
    """The text, unchanged."""
    tokens: int
    """The server's count of the reply's tokens, mostly with the end token; 0 if it counts none."""
    finish: str | None
    """Why the reply ended: stop, length, ..."""
    model: str | None = None
    """The server's name for the model that replied."""
    prompt_tokens: int = 0
    """The server's count of the prompt's tokens."""
    cut: bool = False
    """Whether the reply was cut off at its limit of length."""
    written: int = field(default=0, compare=False)
    """Number of characters of the text, the thought and the refusal."""
    before: Bill = field(default=Bill(), compare=False)
    """The bill of the attempts before this one."""

    @property
    def counted(self) -> bool:
        """Return whether the server counted any token."""
        return bool(self.prompt_tokens or self.tokens)


@dataclass(frozen=True)
class Failure:
    """A request without an answer. Its tokens are counted, and paid, if a reply came that is not an answer."""

    reason: str
    """Why there is no answer, on one line that never contains the key."""
    attempts: int
    refused: bool = False
    """Whether the model or a filter declined the request."""
    model: str | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    status: int | None = field(default=None, compare=False)
    """The HTTP status of the error."""
    again: bool = field(default=False, compare=False)
    """Whether another attempt may succeed."""
    came: Reply | None = field(default=None, compare=False)
    """The reply that is not an answer, without its text."""
    before: Bill = field(default=Bill(), compare=False)
    """The bill of all other attempts."""


@dataclass(frozen=True)
class Trouble:
    """Why one attempt failed."""

    reason: str
    again: bool = False
    """Another attempt may succeed."""
    wait: float = 0.0
    """Seconds that the server asks us to wait before it."""
    status: int | None = None
    """The HTTP status, or the status code inside the error body."""
    gone: bool = False
    """Whether nothing listens at the address."""
    ends_the_run: str = ""
    """Why no other request can succeed either, and what to do."""
    sent_on: str = ""
    """The address of a redirect."""
    refused: bool = False
    """Whether the model or a filter declined."""
    came: Reply | None = None
    """The reply that is not an answer, without its text."""
    lost: bool = False
    """Whether the server may have billed a reply that did not arrive, or not whole, so that its cost is unknown."""

    def failure(self, attempts: int, before: Bill = Bill()) -> Failure:
        """Return the failure of a request whose last attempt this was, after attempts with the bill `before`."""
        came = self.came or Reply("", 0, None)
        return Failure(
            *(self.reason, attempts, self.refused, came.model, came.prompt_tokens, came.tokens),
            status=self.status,
            again=self.again,
            came=None if self.lost else self.came,
            before=before.plus(self) if self.lost else before,
        )


def is_transient(status: int) -> bool:
    """Return whether a request with this HTTP status may succeed when it is repeated."""
    return status in (408, 409, 429) or status >= 500


class TwiceError(ValueError):
    """A key appears twice in one object, with different values."""


def parse_json(text: str) -> Any:
    """Parse the JSON in `text`. A whole number of more than 20 digits, which cannot be a count, becomes a float.

    Raises:
        TwiceError: An object has a name twice with two values, so it is not known which one the server means.
        ValueError: It is not JSON, or is nested too deep.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_named_once, parse_int=lambda digits: (int if len(digits) <= 20 else float)(digits)
        )
    except RecursionError:
        raise ValueError("nested too deep") from None


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        for name, value in pairs:
            if members[name] != value:
                raise TwiceError(name)
    return members


def error_text(body: Any) -> str:
    """Return what the body of an error says; an empty text if it says nothing."""
    wrong = body.get("error") or body if isinstance(body, Mapping) else body
    if isinstance(wrong, Mapping):
        wrong = next((wrong[name] for name in ("message", "detail", "msg", "code", "type") if wrong.get(name)), "")
    return wrong if isinstance(wrong, str) else _shown(wrong)


def _shown(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "nested too deep"


def error_in_body(body: Any) -> Trouble | None:
    """Return the error in the body of a reply with HTTP status 200; None if there is none.

    Some servers send errors in this way once they have begun to reply (https://openrouter.ai/docs/api/errors).
    """
    if not isinstance(body, Mapping):
        return None
    wrong = body.get("error")
    if isinstance(wrong, Mapping) and not any(
        wrong.values()
    ):  # the field is always there and empty unless there is an error
        wrong = None
    if (
        not wrong
        and not (body.get("choices") or "data" in body)
        and (body.get("object") == "error" or error_text(body))
    ):
        wrong = body
    if not wrong:
        return None
    status = _status(wrong) if isinstance(wrong, Mapping) else None
    reason = f"HTTP 200 with error {status}" if status else "HTTP 200 with an error"
    # an error without a code may be transient, so the request is repeated
    return Trouble(
        f"{reason}: {error_text(wrong) or _shown(wrong)}", status is None or is_transient(status), status=status
    )


def _status(wrong: Mapping[str, Any]) -> int | None:
    """Return the HTTP status that an error names in its code, status or type; None if it names none."""
    for named in (wrong.get(name) for name in ("code", "status", "status_code", "type")):
        if isinstance(named, str):
            plain = re.sub(r"[^a-z]", "", named.lower()).removesuffix("error")
            named = int(named) if re.fullmatch("[45][0-9][0-9]", named) else named
            named = next((status for status, names in STATUSES.items() if plain in names), named)
        if type(named) is int and 400 <= named < 600:
            return named
    return None


def read_completion(body: Any, max_tokens: int) -> Reply | Trouble:
    """Read the reply in a chat completion.

    Half of a surrogate pair, which cannot be written in UTF-8, becomes U+FFFD.

    Args:
        body: The completion, as `parse_json` returns it.
        max_tokens: The limit of tokens that was set for it.
    """
    try:
        outcome = _read(body, max_tokens)
    except RecursionError:  # from a message that shows a part of it
        outcome = Trouble("its reply is nested too deep", again=True)
    if isinstance(outcome, Reply):
        return replace(_whole_reply(outcome), text=replace_lone_surrogates(outcome.text))
    return replace(
        outcome, reason=replace_lone_surrogates(outcome.reason), came=outcome.came and _whole_reply(outcome.came)
    )


def _whole_reply(reply: Reply) -> Reply:
    return replace(
        reply,
        finish=reply.finish and replace_lone_surrogates(reply.finish),
        model=reply.model and replace_lone_surrogates(reply.model),
    )


def _read(body: Any, max_tokens: int) -> Reply | Trouble:
    none = Trouble("its reply is no chat completion", again=True, lost=True)
    if not isinstance(body, Mapping):
        return none
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    choice = choice if isinstance(choice, Mapping) else {}
    usage = _usage(body, choice)
    prompt_tokens, tokens = _counts(usage)
    name = body.get("model")
    came = Reply("", tokens, None, name if isinstance(name, str) and len(name) <= LONGEST_NAME else None, prompt_tokens)
    none = replace(none, lost=not came.counted)
    if trouble := error_in_body(body) or error_in_body({"error": choice.get("error")}):
        return replace(trouble, came=came if came.counted else None)  # an error alone is not billed
    message = choice.get("message")
    if not isinstance(message, Mapping) and str(choice.get("finish_reason")).lower() in FILTERED:
        message = {}  # Azure's filter leaves it out
    if not isinstance(message, Mapping):
        said = error_text(body) or _shown(body)
        return replace(none, reason=f"{none.reason}: {said}", came=came)
    finish = choice.get("finish_reason")
    finish = finish if isinstance(finish, str) else None
    why = (finish or "").lower()
    # a reply with an unknown reason was cut off if it has as many tokens as were allowed
    cut = why in CUT or (why not in STOPPED and tokens >= max_tokens)
    came = replace(came, finish=finish, cut=cut, written=_written(message))
    try:
        text, thought, refusal = _parts(message.get("content"))
    except TypeError:
        return replace(none, came=came)
    refusal = message.get("refusal") or refusal
    if refusal or why in FILTERED:
        said = "content filter" if why == "content_filter" else str(finish)
        return Trouble(f"refused: {refusal or said}", refused=True, came=came)
    if why in BROKEN_OFF:
        return Trouble(f"its reply broke off (finish_reason {finish!r})", again=True, came=came)
    if not (text or "").strip():
        # vLLM, SGLang and DeepSeek name the thought reasoning_content, vLLM since 0.12, OpenRouter and Ollama reasoning
        field = next((name for name in ("reasoning_content", "reasoning") if message.get(name)), thought)
        if cut and (field or _thought_tokens(usage)):
            return Trouble(
                f"its reply was cut in its thought (finish_reason {finish!r}), before an answer. Raise max_new_tokens.",
                came=came,
            )
        if field:
            reason = f"its reply is all thought ({field}) and has no answer (finish_reason {finish!r})"
            return Trouble(reason, came=came)
    if text is None:
        return Trouble(f"its reply has no text (finish_reason {finish!r})", came=came)
    if len(text) > LONGEST_TOKEN * max_tokens:
        reason = f"its reply has {len(text)} characters where {max_tokens} tokens were asked for"
        return Trouble(reason, came=came)
    if not text.strip() and why not in STOPPED:
        return Trouble(f"its reply is empty (finish_reason {finish!r})", came=came)
    return replace(came, text=text)


def _parts(content: Any) -> tuple[str | None, str, str]:
    """Return (text, name of the part with a thought, refusal) of a message's content, a string or a list of parts.

    Raises:
        TypeError: It is neither.
    """
    if content is None or isinstance(content, str):
        return content, "", ""
    texts, thought, refusal = [], "", ""
    for part in [content] if isinstance(content, Mapping) else content:
        if isinstance(part, str):
            texts.append(part)
        elif not isinstance(part, Mapping):
            raise TypeError("no part")
        elif (kind := part.get("type", "text")) in ("text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("thinking", "reasoning"):
            thought = kind
        elif kind == "refusal":
            refusal = str(part.get("refusal") or "it does not say why")
    return "".join(texts) if texts else None, thought, refusal


def _written(message: Mapping[str, Any]) -> int:
    """Return the number of characters of a message's text, thought and refusal."""
    parts = [message.get(name) for name in ("content", "reasoning_content", "reasoning", "refusal")]
    count = 0
    while parts:
        part = parts.pop()
        if isinstance(part, str):
            count += len(part)
        elif isinstance(part, list):
            parts += part
        elif isinstance(part, Mapping):
            parts += [part.get(name) for name in ("text", "thinking", "reasoning", "refusal")]
    return count


def _usage(body: Mapping[str, Any], choice: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a server's counts of tokens; if the reply has none, Moonshot has them in the choice, Groq in `x_groq`."""
    groq = body.get("x_groq")
    usages = []
    for holder in (body, choice, groq if isinstance(groq, Mapping) else {}):
        if isinstance(usage := holder.get("usage"), Mapping):
            usages.append(usage)
    return next((usage for usage in usages if any(_counts(usage))), usages[0] if usages else {})


def _counts(usage: Mapping[str, Any]) -> tuple[int, int]:
    """Return the (tokens of the prompt, tokens of the reply with its thought) that a server counts, 0 if it does not.

    Anthropic's and OpenAI's newer names are `input_tokens` and `output_tokens`. OpenAI counts the thought among the
    reply's tokens. xAI and Google's OpenAI-compatible server leave it out there and count it in `total_tokens`.
    """
    prompt = _tokens(usage.get("prompt_tokens")) or _tokens(usage.get("input_tokens"))
    reply = _tokens(usage.get("completion_tokens")) or _tokens(usage.get("output_tokens"))
    total, thought = _tokens(usage.get("total_tokens")), _thought_tokens(usage)
    if thought > reply:  # then the thought is not included in the reply's count
        reply += thought
    if prompt:
        return prompt, max(reply, total - prompt)
    return (max(0, total - reply), reply) if reply else (0, 0)


def _thought_tokens(usage: Mapping[str, Any]) -> int:
    """Return the number of tokens of a thought that the server does not show, as OpenAI does not; 0 if unknown."""
    details = usage.get("completion_tokens_details") or usage.get("output_tokens_details")
    return _tokens(details.get("reasoning_tokens")) if isinstance(details, Mapping) else 0


def _tokens(counted: Any) -> int:
    """Return a count that is a number or the digits of one; 0 if it is neither."""
    if isinstance(counted, str) and re.fullmatch("[0-9]{1,9}", counted.strip()):
        counted = int(counted)
    if isinstance(counted, float) and counted.is_integer():
        counted = int(counted)
    return counted if type(counted) is int and 0 <= counted < 10**9 else 0
