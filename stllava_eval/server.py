"""Images + questions -> answers of an OpenAI-compatible server. `Endpoint` carries any other messages there as well."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from stllava_eval.answering import Answer, Question, cut, progress_bar
from stllava_eval.errors import InputError, printable

if TYPE_CHECKING:
    import openai
    import torch

FIRST_WAIT = 1.0  # seconds before the second attempt, doubled before each further one (our choice)
LONGEST_WAIT = 120.0  # seconds that a server may ask us to wait; openai's own client stops there too
THOUGHT = 8192  # tokens in which a reasoning model may think before its answer (our choice)
LONGEST_TOKEN = 100  # characters; a reply with more of them per token asked did not keep to `max_tokens` (our choice)

Request = dict[str, Any]
"""What `chat.completions.create` takes but for the model: messages, max_tokens or max_completion_tokens, and what else
is wanted."""

T = TypeVar("T")


@dataclass(frozen=True)
class Reply:
    """The text as it came; the server's count of its tokens, mostly with the end token, 0 if it counts none; why it
    ended: stop, length, ...; the server's name for the model that spoke, and its count of the prompt's tokens."""

    text: str
    tokens: int
    finish: str | None
    model: str | None = None
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Failure:
    """A request without a reply: why, on one line that never holds the key, after how many attempts, and whether the
    model or a filter declined it. Of one that was declined the server counts tokens too."""

    reason: str
    attempts: int
    refused: bool = False
    model: str | None = None
    prompt_tokens: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class _Trouble:
    """What went wrong with one attempt."""

    reason: str
    again: bool = False
    """Another attempt may succeed."""
    wait: float = 0.0
    """Seconds that the server asks us to wait before it."""
    status: int | None = None
    gone: bool = False
    """Nothing listens at the address."""
    ends_the_run: str = ""
    """Why no other request can succeed either, and what to do."""
    declined: Reply | None = None
    """What came instead of an answer, where the model or a filter declined."""


class Endpoint:
    """A model of an OpenAI-compatible server. The key is `$OPENAI_API_KEY`; most servers of one's own need none.

    Args:
        base_url: Where the server is, to `/v1`.
        model: As the server names it; None takes the only one that it serves.
        concurrency: Requests under way at once, at most.
        retries: Further attempts after one that failed and may succeed when repeated: HTTP 408, 409, 429 and 5xx, a
            time-out, a connection that breaks off, a reply that is no chat completion.
        timeout: Seconds that one attempt may take in all, however slowly its bytes come.
        per_minute: Attempts begun in a minute, at most; None sets no limit.

    Raises:
        InputError: An argument is wrong, no server answers, it refuses the key, or it does not serve the model.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        concurrency: int = 16,
        retries: int = 5,
        timeout: float = 120.0,
        per_minute: float | None = None,
    ) -> None:
        for name, value, least in (("concurrency", concurrency, 1), ("retries", retries, 0)):
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name}={value}: pass a whole number from {least} on.")
        if not isinstance(timeout, int | float) or not timeout > 0:
            raise InputError(f"timeout={timeout}: pass a number of seconds above 0.")
        if per_minute is not None and not 0 < per_minute < float("inf"):
            raise InputError(f"per_minute={per_minute}: pass a number of requests above 0.")
        self._apart = 60 / per_minute if per_minute else 0.0  # seconds
        self._due = 0.0  # when the next attempt may begin, by `time.monotonic`
        self.base_url = _base_url(base_url)
        self._key = _key(self.base_url)
        self.concurrency, self.retries, self.timeout = concurrency, retries, timeout
        (self.model,) = _in_background(partial(self._find_model, model))

    def replies(self, requests: Sequence[Callable[[], Request]]) -> Generator[tuple[int, Reply | Failure], None, None]:
        """(place in `requests`, reply or failure) as they come. A request is made when its turn has come, not before.

        Raises:
            InputError: No further request can succeed: the server refuses the key, the key's quota is used up, or
                nothing listens any more. What came before has been yielded; what is under way is given up.
        """
        with closing(_in_background(partial(self._reply_to_all, requests))) as replies:
            yield from replies

    async def _reply_to_all(
        self, requests: Sequence[Callable[[], Request]], emit: Callable[[tuple[int, Reply | Failure]], None]
    ) -> None:
        due = iter(enumerate(requests))

        async def work(client: openai.AsyncOpenAI) -> None:
            for place, make in due:  # shared by all workers
                emit((place, await self._reply(client, await asyncio.to_thread(make))))

        async with self._client() as client:
            workers = [asyncio.create_task(work(client)) for _ in range(min(self.concurrency, len(requests)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _reply(self, client: openai.AsyncOpenAI, request: Request) -> Reply | Failure:
        outcome, attempts = await self._insist(client, self.model, request)
        if isinstance(outcome, Reply):
            return outcome
        if outcome.gone:
            raise InputError(
                f"{self.base_url}: no server answers there any more ({outcome.reason}, {attempts} attempts). "
                "Start it again."
            )
        return _failure(outcome, attempts)

    async def _insist(self, client: openai.AsyncOpenAI, model: str, request: Request) -> tuple[Reply | _Trouble, int]:
        """The outcome of the last attempt, and how many there were."""
        attempt = 0
        while True:
            attempt += 1
            if self._apart:
                begins = max(now := time.monotonic(), self._due)
                self._due = begins + self._apart
                await asyncio.sleep(begins - now)
            outcome = await self._attempt(client, model, request)
            if isinstance(outcome, Reply):
                return outcome, attempt
            if outcome.ends_the_run:
                raise InputError(outcome.ends_the_run)
            if not outcome.again or attempt > self.retries:
                return outcome, attempt
            wait = FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)  # requests that met one fault part ways
            await asyncio.sleep(max(wait, outcome.wait))

    async def _attempt(self, client: openai.AsyncOpenAI, model: str, request: Request) -> Reply | _Trouble:
        body = await self._json(partial(client.chat.completions.with_raw_response.create, model=model, **request))
        if isinstance(body, _Trouble):
            return body
        outcome = _read(body, request.get("max_tokens") or request["max_completion_tokens"])
        return replace(outcome, reason=self._clean(outcome.reason)) if isinstance(outcome, _Trouble) else outcome

    async def _find_model(self, model: str | None, emit: Callable[[str], None]) -> None:
        """`model`, or the only one that the server lists."""
        async with self._client() as client:
            body = await self._json(client.models.with_raw_response.list)
            if isinstance(body, _Trouble):
                if body.ends_the_run:
                    raise InputError(body.ends_the_run)
                if body.status is None:
                    raise InputError(
                        f"{self.base_url}: no OpenAI-compatible server answers there ({body.reason}). "
                        "Start it, wait until it is ready, and pass its address to /v1."
                    )
                if body.status == 404:
                    raise InputError(
                        f"{self.base_url}: the server there has no /models (HTTP 404). "
                        "Pass the address that its own log names, usually to /v1."
                    )
            try:
                served = [str(one["id"]) for one in body["data"]]
            except (TypeError, KeyError):
                served = []
            unlisted = f"none that it lists ({body.reason})" if isinstance(body, _Trouble) else "none that it lists"
            names = self._clean(", ".join(served)) or unlisted
            if model is None:
                if len(served) != 1:
                    raise InputError(f"{self.base_url}: no model is named and it serves {names}. Name one with model=.")
                model = served[0]
            elif model not in served:  # `transformers serve` lists what is cached, not what it serves: ask
                hello: Request = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
                outcome, _ = await self._insist(client, model, hello)
                if isinstance(outcome, _Trouble) and outcome.status in (400, 404, 422):
                    raise InputError(
                        f"{self.base_url}: it does not serve {model!r} ({outcome.reason}). "
                        f"It serves {names}; name one with model=."
                    )
            emit(model)

    def _client(self) -> openai.AsyncOpenAI:
        """Without the SDK's retries, which count no attempts and do not repeat broken JSON, and without its time-outs,
        each of which starts anew with every byte."""
        from openai import AsyncOpenAI

        return AsyncOpenAI(base_url=self.base_url, api_key=self._key or "none", max_retries=0, timeout=None)

    def call(self, send: Callable[[openai.AsyncOpenAI], Awaitable[Any]], what: str) -> str:
        """The body of a reply to any other request, tried as often as `replies` tries.

        Args:
            send: Makes the request, a raw response.
            what: It is for, in the message of an error.

        Raises:
            InputError: It cannot be had.
        """
        (body,) = _in_background(partial(self._call, send, what))
        return body

    async def _call(
        self, send: Callable[[openai.AsyncOpenAI], Awaitable[Any]], what: str, emit: Callable[[str], None]
    ) -> None:
        async with self._client() as client:
            outcome: str | _Trouble = ""
            for attempt in range(self.retries + 1):
                outcome = await self._text(partial(send, client))
                if isinstance(outcome, str) or not outcome.again:
                    break
                await asyncio.sleep(max(FIRST_WAIT * 2**attempt * random.uniform(0.75, 1.25), outcome.wait))
            if isinstance(outcome, _Trouble):
                raise InputError(
                    outcome.ends_the_run or f"{self.base_url}: {what}: {outcome.reason}. The same call tries again."
                )
            emit(outcome)

    async def _json(self, send: Callable[[], Awaitable[Any]]) -> Any:
        """The JSON of a reply, or a `_Trouble`."""
        body = await self._text(send)
        if isinstance(body, _Trouble):
            return body
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            return _Trouble(f"its reply is no JSON: {self._clean(body, 60)!r}", again=True)

    async def _text(self, send: Callable[[], Awaitable[Any]]) -> str | _Trouble:
        """The body of a reply, or a `_Trouble`.

        None of the SDK's exceptions leaves here: they hold what the server said, which may be the key.
        """
        import httpx2
        import openai

        try:
            async with asyncio.timeout(self.timeout):
                return str((await send()).text)
        except TimeoutError:
            return _Trouble(f"no reply within {self.timeout:g} s", again=True)
        except openai.APIStatusError as error:
            return self._refused(error)
        except openai.APIConnectionError as error:
            cause = error.__cause__
            reason = self._clean(f"the connection failed: {cause or error}")
            return _Trouble(reason, again=True, gone=isinstance(cause, httpx2.ConnectError))

    def _refused(self, error: openai.APIStatusError) -> _Trouble:
        status, body = error.status_code, error.body
        said = body.get("message") or body.get("detail") if isinstance(body, dict) else None
        reason = f"HTTP {status}: {self._clean(str(said or error.response.text))}"
        ends = ""
        if status in (401, 403):
            given = "the key in OPENAI_API_KEY" if self._key else "a request without a key"
            ends = f"{self.base_url}: the server refuses {given} ({reason}). Set OPENAI_API_KEY to one that it accepts."
        elif status == 429 and "insufficient_quota" in error.response.text:
            ends = f"{self.base_url}: the key's quota is used up ({reason}). Raise it or set another OPENAI_API_KEY."
        wait = _seconds(error.response.headers.get("retry-after", ""))
        again = status in (408, 409, 429) or status >= 500
        if again and wait > LONGEST_WAIT:
            again, reason = False, f"{reason} (it asks us to wait {wait:.0f} s, more than {LONGEST_WAIT:g} s)"
        return _Trouble(reason, again, wait, status, ends_the_run=ends)

    def without_key(self, text: str) -> str:
        """`text` with stars for the key: a server may say it back."""
        return text.replace(self._key, "***") if self._key else text

    def _clean(self, text: str, longest: int = 300) -> str:
        """One line, without the key."""
        text = printable(" ".join(self.without_key(text).split()))
        return text if len(text) <= longest else f"{text[:longest]}..."


class ServerAnswerer:
    """A server's model that answers questions about images, with what a run reads of `answering.Answerer`.

    The server's own chat template makes the prompt and its own processor the pixels. Nothing shows which weights it
    holds: `sha256` stands for the address and the model's name.

    Args and errors are those of `Endpoint`, and:
        reasoning: The model thinks before it answers and takes neither a temperature nor `max_tokens`, as GPT-4o's
            successors: it decodes as it likes, and `THOUGHT` tokens of thinking are allowed on top of the answer's.
    """

    dtype = "server"

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        concurrency: int = 16,
        retries: int = 5,
        timeout: float = 120.0,
        reasoning: bool = False,
    ) -> None:
        if not isinstance(reasoning, bool):
            raise InputError(f"reasoning={reasoning}: pass True or False.")
        self.reasoning = reasoning
        self.endpoint = Endpoint(base_url, model, concurrency, retries, timeout)
        self.name = self.endpoint.model
        self.sha256 = hashlib.sha256(json.dumps([self.endpoint.base_url, self.name]).encode()).hexdigest()

    @property
    def device(self) -> torch.device:
        """Where lmms-eval gathers; the weights lie elsewhere."""
        import torch

        return torch.device("cpu")

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What is known of what is done to questions and images, for a run's manifest."""
        return {
            "backend": "openai_server",
            "device": "server",
            "base_url": self.endpoint.base_url,
            "model": self.name,
            "prompt": "the server's chat template",
            "decoding": "the server's own (reasoning)" if self.reasoning else "greedy (temperature 0)",
        }

    def answer(self, questions: Sequence[Question], progress: bool = True) -> Iterator[tuple[int, Answer | Failure]]:
        """(place in `questions`, answer or failure) as they come.

        Raises:
            InputError: As `Endpoint.replies`.
        """
        if any(one.text is None or one.history or one.sampling or one.template for one in questions):
            raise InputError(f"{self.name}: a server is asked one round, greedily. Leave history and sampling out.")
        requests = [partial(_request, question, self.reasoning) for question in questions]
        with (
            closing(self.endpoint.replies(requests)) as replies,
            progress_bar(len(questions), progress) as bar,
        ):
            for place, reply in replies:
                bar.update()
                yield place, reply if isinstance(reply, Failure) else _answer(reply, questions[place])


def _request(question: Question, reasoning: bool) -> Request:
    """Greedy, but for a model that reasons. Stop strings are cut off afterwards: `transformers serve` fails on them."""
    png = io.BytesIO()
    question.image().save(png, "PNG", compress_level=1)  # our choice: bytes are cheap, the harness's CPU is not
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question.text}]
    messages = [{"role": "user", "content": content}]
    if reasoning:
        return {"messages": messages, "max_completion_tokens": question.max_new_tokens + THOUGHT}
    return {"messages": messages, "max_tokens": question.max_new_tokens, "temperature": 0}


def _answer(reply: Reply, question: Question) -> Answer:
    text, stopped = cut(reply.text, question.until)
    return Answer(text.strip(), reply.tokens, stopped or reply.finish == "stop")


def read_reply(body: Any, max_tokens: int) -> Reply | Failure:
    """The reply in a chat completion that came another way, from a batch.

    Args:
        body: The completion, as JSON holds it.
        max_tokens: That it was asked for.
    """
    outcome = _read(body, max_tokens)
    if isinstance(outcome, Reply):
        return outcome
    return _failure(outcome, 1)


def _failure(trouble: _Trouble, attempts: int) -> Failure:
    if (declined := trouble.declined) is None:
        return Failure(trouble.reason, attempts)
    return Failure(trouble.reason, attempts, True, declined.model, declined.prompt_tokens, declined.tokens)


def _read(body: Any, max_tokens: int) -> Reply | _Trouble:
    """The reply in a chat completion."""
    try:
        choice = body["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text, refusal = message.get("content"), message.get("refusal")
        usage = body.get("usage") or {}
        tokens, prompt_tokens = (_tokens(usage.get(f"{of}_tokens")) for of in ("completion", "prompt"))
        name = body.get("model")
        reply = Reply("", tokens, finish, name if isinstance(name, str) else None, prompt_tokens)
    except (TypeError, KeyError, IndexError, AttributeError, ValueError):
        return _Trouble("its reply is no chat completion", again=True)
    if refusal or finish == "content_filter":
        return _Trouble(f"refused: {refusal or 'content filter'}", declined=reply)
    if text is None:
        return _Trouble(f"its reply has no text (finish_reason {finish!r})")
    if not isinstance(text, str):
        return _Trouble("its reply is no chat completion", again=True)
    if len(text) > LONGEST_TOKEN * max_tokens:
        return _Trouble(f"its reply has {len(text)} characters where {max_tokens} tokens were asked for")
    if not text.strip() and finish != "stop":
        return _Trouble(f"its reply is empty (finish_reason {finish!r})")
    return replace(reply, text=text)


def _tokens(counted: Any) -> int:
    """What a server counts; 0 where that is no count."""
    return counted if isinstance(counted, int) and 0 <= counted < 10**9 else 0


def _base_url(given: str) -> str:
    if "@" in str(given):
        raise InputError("base_url: it holds a user name. Pass the address alone, and a key in OPENAI_API_KEY.")
    try:
        parts = urlsplit(given)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        usable = usable and not parts.query and not parts.fragment and not any(sign.isspace() for sign in given)
    except (ValueError, TypeError, AttributeError):
        usable = False
    if not usable:
        raise InputError(
            f"base_url {str(given).split('?')[0]!r}: not the address of a server. Pass one such as "
            "http://127.0.0.1:8000/v1, with nothing behind a ? or #."
        )
    return given.rstrip("/")


def _key(base_url: str) -> str | None:
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key and urlsplit(base_url).hostname == "api.openai.com":
        raise InputError(f"{base_url}: needs a key. Set OPENAI_API_KEY.")
    if any(not "!" <= sign <= "~" for sign in key):
        raise InputError("OPENAI_API_KEY: it holds a space or another sign that no key has. Copy it again.")
    return key or None


def _seconds(retry_after: str) -> float:
    """What a Retry-After header asks to wait, a number of seconds or a date; 0 if it says neither."""
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(retry_after)
        return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):
        return 0.0


def _in_background(work: Callable[[Callable[[T], None]], Coroutine[Any, Any, None]]) -> Generator[T, None, None]:
    """What `work` emits, while it runs in an event loop of its own. It is cancelled when the iterator is closed."""
    loop = asyncio.new_event_loop()
    emitted: SimpleQueue[tuple[T, ...]] = SimpleQueue()
    task = loop.create_task(work(lambda item: emitted.put((item,))))

    def run() -> None:
        try:
            loop.run_until_complete(asyncio.wait({task}))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            loop.close()
            emitted.put(())

    thread = Thread(target=run, name="requests", daemon=True)
    thread.start()
    try:
        while item := emitted.get():
            yield item[0]
        task.result()  # raises what ended the work early
    finally:
        with suppress(RuntimeError):  # it has ended by itself
            loop.call_soon_threadsafe(task.cancel)
        thread.join()
