"""Ask an OpenAI-compatible server: send it questions with images, or any other messages, and return its replies.

`server.py` asks it the questions of an evaluation, and the judges of stage 2 send it their prompts.
"""

from __future__ import annotations

import asyncio
import base64
import html
import json
import math
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlsplit

from stllava_eval.errors import InputError, NotThereError, printable
from stllava_eval.inference.replies import (
    Bill,
    Failure,
    Reply,
    Trouble,
    TwiceError,
    error_in_body,
    error_text,
    is_transient,
    parse_json,
    read_completion,
)
from stllava_eval.storage import has_lone_surrogate, replace_lone_surrogates

if TYPE_CHECKING:
    import openai
    from PIL.Image import Image


OPENAI = "https://api.openai.com/v1"  # the server of a judge that does not name one
FIRST_WAIT = 1.0  # seconds before the second attempt, doubled before each further one (our choice)
LONGEST_WAIT = 120.0  # most seconds that we wait if a server asks us to; the limit of openai's own client
# The status of a gateway if the server behind it took too long (524 is Cloudflare's). That server may have finished
# the reply, and then bills it.
GATEWAY_TIMEOUTS = {504, 524}
LARGEST = 16 << 20  # most bytes of a reply or a list of models (our choice: 65,536 tokens of text are below 1 MiB)
LARGEST_FILE = 512 << 20  # most bytes of a batch's results (our choice: OpenAI's have up to 50,000 replies)
LONGEST = 10_000  # most characters of a message that are searched for the key; 300 are shown (our choice)
FRAGMENT = 12  # a part of the key of so many characters is masked like the key itself (our choice)
MOST_PIXELS = 10**8  # largest min_pixels and max_pixels (our choice: Pillow warns of images above 89 million pixels)

Request = dict[str, Any]
"""The arguments of `chat.completions.create` without the model: messages, max_tokens or max_completion_tokens, and
any others."""

# Messages that come with the status of a wrong request although the request is right: no money is left (OpenAI 400,
# Anthropic 400), the key is not valid (Google 400), or a filter refused (Azure 400, OpenRouter 403). Source: the guides
# to errors of these services.
NO_MONEY = re.compile("insufficient_quota|billing_hard_limit|billing_not_active|credit balance is too low", re.I)
NO_KEY = re.compile("api key not valid|api_key_invalid", re.I)
FILTER = re.compile(
    "content[ _-]?(?:filter|management|policy)|responsibleai|moderation|flagged|safety system|data_inspection", re.I
)

T = TypeVar("T")


class Endpoint:
    """Send requests to a model of an OpenAI-compatible server.

    The key is read from `$OPENAI_API_KEY`; most local servers need none.

    Args:
        base_url: The server's address, up to and with `/v1`.
        model: The model's name on the server; None takes the only model that it serves.
        concurrency: Largest number of requests at the same time.
        retries: Number of further attempts after one that failed and may succeed when it is repeated: HTTP 408, 409,
            429 and 5xx, or such a code in a reply, a time-out, a connection or answer that breaks off, a reply that is
            not a chat completion.
        timeout: Seconds that one attempt may take in all, however slowly its bytes arrive.
        per_minute: Largest number of attempts that begin in a minute; None sets no limit.
        greets: Whether a model that the server does not list is sent a short request, which costs money: see `hello`.

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
        greets: bool = True,
    ) -> None:
        for name, value, least in (("concurrency", concurrency, 1), ("retries", retries, 0)):
            if type(value) is not int or value < least:
                raise InputError(f"{name}={value}: pass a whole number from {least} on.")
        if type(timeout) not in (int, float) or not 0 < timeout < 10**9:
            raise InputError(f"timeout={timeout}: pass a number of seconds above 0.")
        if model is not None and (not isinstance(model, str) or not model or has_lone_surrogate(model)):
            raise InputError(f"model={model!r}: pass the model's name as the server lists it.")
        if per_minute is not None and not 0 < per_minute < float("inf"):
            raise InputError(f"per_minute={per_minute}: pass a number of requests above 0.")
        self._apart = 60 / per_minute if per_minute else 0.0  # seconds
        self._due = 0.0  # when the next attempt may begin, by `time.monotonic`
        self.base_url = _base_url(base_url)
        self._key = _key(self.base_url)
        self._secret = _Secret(self._key)
        self.concurrency, self.retries, self.timeout = concurrency, retries, timeout
        self._greets = greets
        self.hello: Reply | None = None  # the reply to the short request that shows whether it serves the model
        (self.model,) = _in_background(partial(self._find_model, model))

    def replies(
        self, requests: Sequence[Callable[[], Request]], may: Callable[[int, Bill], bool] | None = None
    ) -> Generator[tuple[int, Reply | Failure], None, None]:
        """Yield (index in `requests`, reply or failure) as they arrive; each request is built when it is sent.

        Args:
            requests: Functions that build the requests; each is called once, in a thread of its own.
            may: A check of the budget. It is called before every attempt, in a thread, with the index and the bill of
                the attempts before it, and the attempt is made only if it returns True. If it refuses a first attempt,
                nothing is yielded for that request and no further request is begun.

        Raises:
            InputError: No further request can succeed: the server refuses the key, the key's quota is used up, it sends
                requests on to another address, or nothing listens any more. Earlier outcomes have been yielded.
                Requests on their way are abandoned; with `may`, which means that they are paid, they are waited for
                and yielded.
        """
        with closing(_in_background(partial(self._reply_to_all, requests, may))) as replies:
            yield from replies

    async def _reply_to_all(
        self,
        requests: Sequence[Callable[[], Request]],
        may: Callable[[int, Bill], bool] | None,
        emit: Callable[[tuple[int, Reply | Failure]], None],
    ) -> None:
        due = iter(enumerate(requests))
        over, ends = asyncio.Event(), []

        async def work(client: openai.AsyncOpenAI) -> None:
            for index, make in due:  # shared by all workers
                if over.is_set():
                    return
                request = await asyncio.to_thread(make)
                outcome, attempts, before = await self._insist(
                    client, self.model, request, may and partial(may, index), over if may else None
                )
                if outcome is None:
                    return
                if isinstance(outcome, Reply):
                    emit((index, replace(outcome, before=before)))
                    continue
                if why := self._ending(outcome, attempts):
                    if may is None:
                        raise InputError(why)
                    ends.append(why)
                    over.set()
                emit((index, outcome.failure(attempts, before)))

        async with self._client() as client:
            workers = [asyncio.create_task(work(client)) for _ in range(min(self.concurrency, len(requests)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        if ends:
            raise InputError(ends[0])

    def _ending(self, outcome: Trouble, attempts: int) -> str:
        """Return why no further request can succeed after this outcome; empty if one can."""
        if outcome.gone:
            return (
                f"{self.base_url}: no server answers there any more ({outcome.reason}, {attempts} attempts). "
                "Start it again."
            )
        return outcome.ends_the_run

    async def _insist(
        self,
        client: openai.AsyncOpenAI,
        model: str,
        request: Request,
        may: Callable[[Bill], bool] | None = None,
        over: asyncio.Event | None = None,
    ) -> tuple[Reply | Trouble | None, int, Bill]:
        """Repeat a request until it succeeds, cannot succeed, or has used up its attempts.

        Args:
            client: The client that sends the request.
            model: The model that is asked.
            request: What it is asked.
            may: As in `replies`.
            over: Once it is set, no further attempt is made.

        Returns:
            The outcome of the last attempt (None if `may` allowed none), the number of attempts, and the bill of those
            before the last.
        """
        attempt, bill = 0, Bill()
        outcome: Reply | Trouble | None = None
        while True:
            if self._apart:
                begins = max(now := time.monotonic(), self._due)
                self._due = begins + self._apart
                await asyncio.sleep(begins - now)
            following = bill.plus(outcome) if isinstance(outcome, Trouble) else bill
            if (over and over.is_set()) or (may and not await asyncio.to_thread(may, following)):
                return outcome, attempt, bill
            attempt, bill = attempt + 1, following
            outcome = await self._attempt(client, model, request)
            if isinstance(outcome, Reply) or outcome.ends_the_run or not outcome.again or attempt > self.retries:
                return outcome, attempt, bill
            wait = (
                FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
            )  # spread, or they would all come again at once
            await _sleep(max(wait, outcome.wait), over)

    async def _attempt(self, client: openai.AsyncOpenAI, model: str, request: Request) -> Reply | Trouble:
        body = await self._json(partial(client.chat.completions.with_raw_response.create, model=model, **request))
        if isinstance(body, Trouble):
            return body
        return self._read(body, request.get("max_tokens") or request["max_completion_tokens"])

    def read_reply(self, body: Any, max_tokens: int) -> Reply | Failure:
        """Return the reply in a chat completion that came from a batch.

        Args:
            body: The parsed JSON of the completion.
            max_tokens: The limit of tokens that was set for it.
        """
        outcome = self._read(body, max_tokens)
        return outcome if isinstance(outcome, Reply) else outcome.failure(1)

    def read_error(self, status: int | None, body: Any) -> Failure:
        """Return the failure of a request that a batch did not answer.

        Args:
            status: The HTTP status; None if the request was not sent.
            body: The parsed JSON of the error.
        """
        said = error_text(body) or "it does not say why"
        again = status is None or is_transient(status)
        trouble = Trouble(self.line(f"HTTP {status}: {said}" if status else said), again, status=status)
        return self._judged(trouble, json.dumps(body)).failure(1)

    def _read(self, body: Any, max_tokens: int) -> Reply | Trouble:
        outcome = read_completion(body, max_tokens)
        if isinstance(outcome, Reply):
            return self._masked(outcome)
        came = outcome.came and self._masked(outcome.came)
        return self._judged(replace(outcome, reason=self.line(outcome.reason), came=came))

    def _masked(self, reply: Reply) -> Reply:
        """Return a reply without the key in it, because replies are written to files that people publish."""
        hidden = self.without_key
        return replace(
            reply,
            text=hidden(reply.text),
            finish=reply.finish and hidden(reply.finish),
            model=reply.model and hidden(reply.model),
        )

    def _judged(self, trouble: Trouble, text: str = "") -> Trouble:
        """Return the trouble with what it means for the run: whether it was a refusal, and whether it ends the run.

        Args:
            trouble: What went wrong; its reason has the server's message, shortened.
            text: The whole message.
        """
        reason, ends, said = trouble.reason, "", text or trouble.reason
        if trouble.status in (400, 403, 429) and NO_MONEY.search(said):
            trouble = replace(trouble, status=402)  # the status that other servers send if no money is left
        elif trouble.status == 400 and NO_KEY.search(said):
            trouble = replace(trouble, status=401)
        elif trouble.status in (400, 403) and FILTER.search(said):
            return replace(trouble, refused=True)
        if trouble.status in (401, 403):
            given = "the key in OPENAI_API_KEY" if self._key else "a request without a key"
            ends = f"{self.base_url}: the server refuses {given} ({reason}). Set OPENAI_API_KEY to one that it accepts."
        elif trouble.status == 402:
            ends = f"{self.base_url}: the key's quota is used up ({reason}). Raise it or set another OPENAI_API_KEY."
        elif trouble.sent_on:
            ends = (
                f"{self.base_url}: the server sends requests on to {self.line(trouble.sent_on)} ({reason}), "
                "and questions and images go to base_url only. If the model is there, pass that address, to /v1."
            )
        return replace(trouble, ends_the_run=ends)

    async def _find_model(self, model: str | None, emit: Callable[[str], None]) -> None:
        """Emit the name of the model that is asked: `model`, or the only one that the server lists.

        Raises:
            InputError: No server answers, it serves several models and none was named, or it does not serve `model`.
        """
        async with self._client() as client:
            body = await self._json(client.models.with_raw_response.list)
            if not isinstance(body, Trouble) and (wrong := error_in_body(body)):
                body = self._judged(replace(wrong, reason=self.line(wrong.reason)))
            if isinstance(body, Trouble):
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
                served = [entry["id"] for entry in body["data"] if isinstance(entry["id"], str)]
            except (TypeError, KeyError):
                served = []
            unlisted = f"none that it lists ({body.reason})" if isinstance(body, Trouble) else "none that it lists"
            names = self.line(", ".join(served)) or unlisted
            if model is None:
                if len(served) != 1 or served[0] != replace_lone_surrogates(self.without_key(served[0])):
                    raise InputError(f"{self.base_url}: no model is named and it serves {names}. Name one with model=.")
                model = served[0]
            elif model not in served and self._greets:
                # `transformers serve` lists the models of its cache and not those that it serves, so ask
                hello: Request = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
                outcome, _, _ = await self._insist(client, model, hello)
                self.hello = outcome.came if isinstance(outcome, Trouble) else outcome
                if isinstance(outcome, Trouble) and outcome.ends_the_run:
                    raise InputError(outcome.ends_the_run)
                refused = isinstance(outcome, Trouble) and outcome.status in (400, 404, 422)
                if isinstance(outcome, Trouble) and refused and "max_completion_tokens" not in outcome.reason:
                    raise InputError(
                        f"{self.base_url}: it does not serve {model!r} ({outcome.reason}). "
                        f"It serves {names}; name one with model=."
                    )
            emit(model)

    def _client(self, limit: int = LARGEST) -> openai.AsyncOpenAI:
        """Make a client that neither retries nor times out by itself, since this class does both.

        The SDK's retries do not count attempts or repeat broken JSON, and its time-outs restart with every byte.

        Args:
            limit: Most bytes of a reply.
        """
        from httpx2 import InvalidURL
        from openai import AsyncOpenAI

        from stllava_eval.inference.wire import Client  # with openai

        key = self._key or "none"
        try:
            http = Client(limit)
        # a SOCKS proxy without the package for it, a proxy that is not an address, a certificate that is not there
        except (ImportError, ValueError, OSError, InvalidURL) as error:
            raise InputError(
                "HTTP_PROXY, HTTPS_PROXY, ALL_PROXY or SSL_CERT_FILE: one of them cannot be used "
                f"({printable(str(error))}). Fix or unset it."
            ) from error
        return AsyncOpenAI(base_url=self.base_url, api_key=key, max_retries=0, timeout=None, http_client=http)

    def call(self, send: Callable[[openai.AsyncOpenAI], Awaitable[Any]], what: str, once: bool = False) -> str:
        """Return the body of a reply to any other request, with as many attempts as `replies` makes.

        Args:
            send: Sends the request with a client and returns its raw response.
            what: What the request is for, for the message of an error.
            once: Whether to make one attempt only, because the request must not take effect twice.

        Raises:
            InputError: No attempt succeeded.
            NotThereError: The server does not know what is asked for.
        """
        (body,) = _in_background(partial(self._call, send, what, 0 if once else self.retries))
        return body

    async def _call(
        self, send: Callable[[openai.AsyncOpenAI], Awaitable[Any]], what: str, retries: int, emit: Callable[[str], None]
    ) -> None:
        async with self._client(LARGEST_FILE) as client:
            outcome: str | Trouble = ""
            for attempt in range(retries + 1):
                outcome = await self._text(partial(send, client))
                if isinstance(outcome, str) or not outcome.again:
                    break
                await asyncio.sleep(max(FIRST_WAIT * 2**attempt * random.uniform(0.75, 1.25), outcome.wait))
            if isinstance(outcome, Trouble):
                kind = NotThereError if outcome.status == 404 else InputError
                again = "" if outcome.status == 404 else ". The same call tries again."
                raise kind(outcome.ends_the_run or f"{self.base_url}: {what}: {outcome.reason}{again}")
            emit(outcome)

    async def _json(self, send: Callable[[], Awaitable[Any]]) -> Any:
        """Send a request, and return the parsed JSON of its reply or a `Trouble`."""
        body = await self._text(send)
        if isinstance(body, Trouble):
            return body
        try:
            return parse_json(body.removeprefix("\ufeff"))
        except TwiceError as twice:
            return Trouble(
                f"its reply says {self.line(str(twice), 60)!r} twice, with two values", again=True, lost=True
            )
        except ValueError:
            return Trouble(f"its reply is no JSON: {self.line(body, 60)!r}", again=True, lost=True)

    async def _text(self, send: Callable[[], Awaitable[Any]]) -> str | Trouble:
        """Send a request, and return the body of its reply or a `Trouble`.

        None of the SDK's exceptions leaves this function: they contain the server's message, which may repeat the key.
        """
        import httpx2
        import openai

        from stllava_eval.inference.wire import UnreadError  # with openai

        try:
            async with asyncio.timeout(self.timeout):
                return str((await send()).http_response.text)
        except TimeoutError:
            return Trouble(f"no reply within {self.timeout:g} s", again=True, lost=True)
        except UnicodeEncodeError:
            return Trouble("the request holds half a character, which no server can be sent")
        except UnreadError as unread:
            return Trouble(self.line(str(unread)), unread.again, lost=True)
        except openai.APIStatusError as refusal:
            return self._refused(refusal)
        except openai.APIConnectionError as failed:
            cause = failed.__cause__
            reason = self.line(f"the connection failed: {cause or failed}")
            gone = isinstance(cause, httpx2.ConnectError)
            return Trouble(reason, again=True, gone=gone, lost=not gone)

    def _refused(self, refusal: openai.APIStatusError) -> Trouble:
        status, text = refusal.status_code, refusal.response.text
        reason = f"HTTP {status}: {self.line(error_text(refusal.body) or text)}"
        wait = _seconds(refusal.response.headers.get("retry-after", ""))
        again = is_transient(status)
        if again and wait > LONGEST_WAIT:
            again, reason = False, f"{reason} (it asks us to wait {wait:.0f} s, more than {LONGEST_WAIT:g} s)"
        sent_on = refusal.response.headers.get("location", "").split("?")[0] if 300 <= status < 400 else ""
        if sent_on:
            reason = f"HTTP {status}"
        return self._judged(
            Trouble(reason, again, wait, status, sent_on=sent_on, lost=status in GATEWAY_TIMEOUTS), text
        )

    def without_key(self, text: str) -> str:
        """Return `text` with stars for the key, which a server may repeat."""
        return self._secret.masked(text)

    def line(self, text: str, longest: int = 300) -> str:
        """Return `text` on one line, without the key."""
        text = self.without_key(text[:LONGEST])
        if self._key:
            text = text.replace(self._key, "***")  # one too short to be masked in an answer, too
        text = printable(" ".join(text.split()))
        return text if len(text) <= longest else f"{text[:longest]}..."


class _Secret:
    """Mask a key in the messages of a server, in every form in which a server may repeat it or a part of it.

    A key of fewer than 8 characters that is a word or a number, such as `EMPTY`, is not secret and may be part of an
    answer, so only `Bearer EMPTY` is masked.
    """

    def __init__(self, key: str | None) -> None:
        forms = set()
        if key is not None and (len(key) >= 8 or (len(key) >= 4 and re.search("[a-zA-Z]", key) and not key.isalpha())):
            forms = {key, key.replace("/", "\\/"), quote(key, safe=""), html.escape(key), key.encode().hex()}
            for before in range(3):  # base64 codes groups of three bytes; the key may begin at any byte of one
                coded = base64.b64encode(bytes(before) + key.encode()).decode()
                # the characters that do not depend on the bytes around the key
                own = coded[-(-before * 8 // 6) : (before + len(key)) * 8 // 6]
                forms |= {own, own.translate(str.maketrans("+/", "-_"))}
        elif key is not None:
            forms = {f"Bearer {key}"}
        self._short = {form for form in forms if len(form) < FRAGMENT}
        self._parts = {form[n : n + FRAGMENT] for form in forms for n in range(len(form) - FRAGMENT + 1)}

    def masked(self, text: str) -> str:
        """Return `text` with stars for each form, and for each part of one that has `FRAGMENT` characters or more."""
        for form in self._short:
            text = text.replace(form, "***")
        kept, done, start = [], 0, 0
        while self._parts and start <= len(text) - FRAGMENT:
            end = start
            while text[end : end + FRAGMENT] in self._parts:
                end += 1
            if end > start:
                kept += [text[done:start], "***"]
                done = start = end + FRAGMENT - 1
            else:
                start += 1
        return "".join([*kept, text[done:]])


def scaled(image: Image, min_pixels: int | None, max_pixels: int | None) -> Image:
    """Scale `image` to at most `max_pixels`, else at least `min_pixels`: bicubic (Pillow), aspect kept to the pixel.

    Source: `smart_resize` of Qwen2-VL's processor (transformers, image_processing_qwen2_vl.py), up to its rounding to
    whole patches, whose side depends on the model: the server's processor does that.
    """
    import PIL.Image

    width, height = image.size
    if max_pixels is not None and width * height > max_pixels:
        share = math.sqrt(max_pixels / (width * height))
        width, height = max(1, math.floor(width * share)), max(1, math.floor(height * share))
        if width > height:  # a side below one pixel was raised to one, so the other must shrink
            width = min(width, max_pixels // height)
        else:
            height = min(height, max_pixels // width)
    elif min_pixels is not None and width * height < min_pixels:
        share = math.sqrt(min_pixels / (width * height))
        width, height = math.ceil(width * share), math.ceil(height * share)
    return image if (width, height) == image.size else image.resize((width, height), PIL.Image.Resampling.BICUBIC)


async def _sleep(seconds: float, over: asyncio.Event | None) -> None:
    """Wait for a number of seconds, or until `over` is set."""
    if over is None:
        await asyncio.sleep(seconds)
        return
    with suppress(TimeoutError):
        await asyncio.wait_for(over.wait(), seconds)


def _base_url(given: str) -> str:
    if "@" in str(given):
        raise InputError("base_url: it holds a user name. Pass the address alone, and a key in OPENAI_API_KEY.")
    import httpx2

    try:
        parts = urlsplit(given)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        usable = usable and not parts.query and not parts.fragment and not any(sign.isspace() for sign in given)
        httpx2.URL(given)
    except (ValueError, TypeError, AttributeError, httpx2.InvalidURL):
        usable = False
    if not usable:
        raise InputError(
            f"base_url {str(given).split('?')[0][:300]!r}: not the address of a server. Pass one such as "
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
    """Return the seconds that a Retry-After header asks for, as a number or a date; 0 if it has neither."""
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
    """Yield what `work` emits while it runs in an event loop of its own; closing the iterator cancels the work."""
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
        task.result()  # raise the exception that ended the work early, if there is one
    finally:
        with suppress(RuntimeError):  # the loop is closed if the work ended by itself
            loop.call_soon_threadsafe(task.cancel)
        thread.join()
