import asyncio
import base64
import datetime
import gzip
import io
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
import zlib
from dataclasses import replace
from email.utils import format_datetime

import pytest
from fault_server import (
    KEY_REFUSED,
    MODEL,
    FaultServer,
    bomb,
    completes,
    half_a_reply,
    hangs_up,
    head_alone,
    packed,
    raw,
    refuses,
    says,
    sends,
    sends_on,
    silence,
    slow_bytes,
    text,
)
from PIL import Image

from stllava_eval.errors import InputError
from stllava_eval.inference import endpoint as module
from stllava_eval.inference import wire
from stllava_eval.inference.answerer import Answerer
from stllava_eval.inference.endpoint import Endpoint, scaled
from stllava_eval.inference.replies import Failure, Reply
from stllava_eval.inference.server import ServerAnswerer
from stllava_eval.inference.types import Answer, Question, Sampling

KEY = "sk-secret/0123456789+abc"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def question(text: str, colour: int = 0, limit: int = 20, until: tuple[str, ...] = ()) -> Question:
    return Question(text, lambda: Image.new("RGB", (8, 6), (colour, colour, colour)), limit, until)


def ask(server: FaultServer, *questions: Question, **options) -> list[Answer | Failure]:
    """Answers and failures in the questions' order; every place comes once."""
    found = list(ServerAnswerer(server.url, **options).answer(questions, progress=False))
    assert sorted(place for place, _ in found) == list(range(len(questions)))
    return [outcome for _, outcome in sorted(found, key=lambda one: one[0])]


def collect(stream, into: list) -> None:
    for one in stream:
        into.append(one)


# what is asked and what comes back ----------------------------------------------------------------------------------


def test_every_question_gets_the_answer_to_its_own_text_and_image():
    with FaultServer() as server:
        answers = ask(server, *[question(f"question {n}", colour=n) for n in range(20)], concurrency=5)
    assert answers == [Answer(f"question {n} ({n}, {n}, {n})", 5, True) for n in range(20)]


def test_a_request_is_greedy_holds_the_image_before_the_text_and_no_stop_strings():
    with FaultServer() as server:
        ask(server, question("Is it?", until=("\n",), limit=7))
        (request,) = server.requests
    (message,) = request.pop("messages")
    assert request == {"model": MODEL, "max_tokens": 7, "temperature": 0}
    assert message["role"] == "user"
    image, text = message["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text == {"type": "text", "text": "Is it?"}


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        pytest.param(says(" yes \n"), Answer("yes", 1, True), id="stripped"),
        pytest.param(says("a b", "length"), Answer("a b", 2, False), id="cut by its length limit"),
        pytest.param(says("a b STOP c", "length"), Answer("a b", 4, True), id="cut at a stop string"),
        pytest.param(says(""), Answer("", 0, True), id="nothing, and meant so"),
        pytest.param(
            sends(b'{"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}'),
            Answer("yes", 0, True),
            id="tokens not counted",
        ),
        pytest.param(says("", "length"), Failure("its reply is empty (finish_reason 'length')", 1), id="empty, cut"),
        pytest.param(says(None), Failure("its reply has no text (finish_reason 'stop')", 1), id="no text"),
        pytest.param(says(None, refusal="I can't"), Failure("refused: I can't", 1, refused=True), id="refused"),
        pytest.param(
            says("par", "content_filter"), Failure("refused: content filter", 1, refused=True, tokens=1), id="filtered"
        ),
        pytest.param(
            says("word " * 1_600_000),
            Failure("its reply has 8000000 characters where 20 tokens were asked for", 1, tokens=1_600_000),
            id="8 MB",
        ),
        pytest.param(refuses(400, "too\nlong"), Failure("HTTP 400: too long", 1), id="a bad request"),
        pytest.param(refuses(404, "gone"), Failure("HTTP 404: gone", 1), id="not found"),
        pytest.param(sends(b'{"detail": "no images"}', 422), Failure("HTTP 422: no images", 1), id="FastAPI's error"),
        pytest.param(sends(b"<html>", 413), Failure("HTTP 413: <html>", 1), id="a proxy's error"),
        pytest.param(sends(b'{"error": "too large"}', 413), Failure("HTTP 413: too large", 1), id="an error of words"),
        pytest.param(
            sends(b'{"error": {"code": "400", "message": "too large"}}'),
            Failure("HTTP 200 with error 400: too large", 1),
            id="400 inside",
        ),
        pytest.param(
            sends(b'{"object": "error", "type": "BadRequestError", "message": "too large"}'),
            Failure("HTTP 200 with error 400: too large", 1),
            id="vLLM's error inside",
        ),
        pytest.param(
            completes({"content": "yes"}, error={"code": None, "message": ""}), Answer("yes", 0, True), id="no error"
        ),
        pytest.param(
            sends(b'{"choices": [{"message": {"content": "Yes \\ud83d"}, "finish_reason": "stop"}]}'),
            Answer("Yes \ufffd", 0, True),
            id="half a surrogate pair",
        ),
        pytest.param(
            sends(b'{"choices": [{"message": {"content": "Yes \\ud83d\\ude00"}, "finish_reason": "stop"}]}'),
            Answer("Yes \U0001f600", 0, True),
            id="a whole pair",
        ),
        pytest.param(
            sends(b'{"choices": [{"message": {"content": "Yes \xff"}, "finish_reason": "stop"}]}'),
            Answer("Yes \ufffd", 0, True),
            id="no UTF-8",
        ),
        pytest.param(
            sends(b'\xef\xbb\xbf{"choices": [{"message": {"content": "\xc3\xa4"}, "finish_reason": "stop"}]}'),
            Answer("ä", 0, True),
            id="UTF-8 with its mark",
        ),
        pytest.param(completes({"content": "a\0b"}), Answer("a\0b", 0, True), id="a NUL"),
        pytest.param(
            completes({"content": None, "refusal": "No \ud83d"}, model="\udc00"),
            Failure("refused: No \ufffd", 1, refused=True, model="\ufffd"),
            id="half pairs in a refusal and a name",
        ),
        pytest.param(completes({"content": "yes"}, usage=[5]), Answer("yes", 0, True), id="no counts"),
        pytest.param(
            completes({"content": "yes"}, usage={"completion_tokens": True}), Answer("yes", 0, True), id="true tokens"
        ),
        pytest.param(
            completes({"content": "yes"}, usage={"completion_tokens": float("nan")}), Answer("yes", 0, True), id="NaN"
        ),
        pytest.param(
            sends(
                b'{"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": '
                + b"9" * 5000
                + b"}}"
            ),
            Answer("yes", 0, True),
            id="a number of 5000 digits",
        ),
        pytest.param(
            packed(b'{"choices": [{"message": {"content": "yes"}}]}', packing="br"),
            Failure("its reply is packed as 'br', and only gzip was asked for", 1),
            id="packed as nobody asked",
        ),
        pytest.param(
            packed(gzip.compress(b'{"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}')),
            Answer("yes", 0, True),
            id="packed",
        ),
        pytest.param(
            lambda handler: handler.sends(400, b"no", {"Content-Type": "text/plain; charset=hex"}),
            Failure("HTTP 400: no", 1),
            id="a charset that is none",
        ),
    ],
)
def test_one_reply(fault, expected):
    with FaultServer({"a question": [fault]}) as server:
        other, outcome = ask(server, question("another"), question("a question", until=("STOP",)))
        assert server.asked().count("a question") == 1
    assert other == Answer("another (0, 0, 0)", 4, True)
    assert outcome == expected


PARTS = [{"type": "text", "text": "a "}, {"type": "text", "text": "mass"}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(PARTS, Answer("a mass", 0, True), id="texts"),
        pytest.param(["a ", "mass"], Answer("a mass", 0, True), id="strings"),
        pytest.param(PARTS[1], Answer("mass", 0, True), id="a part alone"),
        pytest.param([{"type": "thinking", "thinking": "hm"}, *PARTS], Answer("a mass", 0, True), id="after a thought"),
        pytest.param([{"type": "refusal", "refusal": "no"}], Failure("refused: no", 1, refused=True), id="a refusal"),
        pytest.param([], Failure("its reply has no text (finish_reason 'stop')", 1), id="no part"),
        pytest.param(
            [{"type": "image_url", "image_url": {"url": "x"}}],
            Failure("its reply has no text (finish_reason 'stop')", 1),
            id="an image",
        ),
        pytest.param(
            [{"type": "thinking", "thinking": "hm"}],
            Failure("its reply is all thought (thinking) and has no answer (finish_reason 'stop')", 1),
            id="a thought alone",
        ),
    ],
)
def test_content_may_be_a_list_of_parts(content, expected):
    with FaultServer({"a": [completes({"content": content})]}) as server:
        assert ask(server, question("a")) == [expected]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize("content", [None, "", "\n\n"])
def test_a_reply_that_is_all_thought_is_a_failure_whose_tokens_are_counted(field, content):
    thinks = {"content": content, field: "Let me look. Is it yes? The"}
    usage = {"completion_tokens": 20, "prompt_tokens": 300}
    faults = {"ended": [completes(thinks, usage=usage)], "cut": [completes(thinks, "length", usage)]}
    with FaultServer(faults) as server:
        ended, cut = ask(server, question("ended"), question("cut"))
    reason = f"its reply is all thought ({field}) and has no answer (finish_reason 'stop')"
    assert ended == Failure(reason, 1, prompt_tokens=300, tokens=20)
    reason = "its reply was cut in its thought (finish_reason 'length'), before an answer. Raise max_new_tokens."
    assert cut == Failure(reason, 1, prompt_tokens=300, tokens=20)


def test_a_hidden_thought_that_was_cut_is_named_and_a_thought_beside_an_answer_is_none_of_it():
    usage = {"completion_tokens": 20, "completion_tokens_details": {"reasoning_tokens": 20}}
    hidden = completes({"content": ""}, "length", usage)
    faults = {"hidden": [hidden], "both": [completes({"content": "yes", "reasoning_content": "Is it? It is."})]}
    with FaultServer(faults) as server:
        hidden, both = ask(server, question("hidden"), question("both"))
    assert hidden.reason.startswith("its reply was cut in its thought")
    assert both == Answer("yes", 0, True)


@pytest.mark.parametrize(
    ("finish", "tokens", "ended"),
    [
        ("stop", 20, True),
        ("eos", 20, True),
        ("end_turn", 5, True),
        ("length", 5, False),
        ("MAX_TOKENS", 5, False),
        ("model_length", 5, False),
        ("tool_calls", 5, True),
        ("tool_calls", 20, False),
        ("a new word", 5, True),
        (None, 5, True),
        (None, 0, True),  # not counted
        (None, 20, False),
        (["stop"], 5, True),
    ],
)
def test_an_answer_is_cut_where_its_length_was_limited(finish, tokens, ended):
    fault = completes({"content": "yes"}, finish, {"completion_tokens": tokens})
    with FaultServer({"a": [fault]}) as server:
        assert ask(server, question("a", limit=20)) == [Answer("yes", tokens, ended)]


# what is read -------------------------------------------------------------------------------------------------------


class Counting:
    """`zlib` for `wire`: counts what is unpacked, and takes its time."""

    def __init__(self, pause: float = 0.0) -> None:
        self.bytes, self.pause, self.error = 0, pause, zlib.error

    def decompressobj(self, wbits: int):
        counting, real = self, zlib.decompressobj(wbits)

        class Unpacker:
            eof = property(lambda _: real.eof)
            unconsumed_tail = property(lambda _: real.unconsumed_tail)

            def decompress(self, packed: bytes, most: int) -> bytes:
                time.sleep(counting.pause)
                found = real.decompress(packed, most)
                counting.bytes += len(found)
                return found

        return Unpacker()


def test_of_a_gzip_bomb_no_more_is_unpacked_than_allowed(monkeypatch):
    counting = Counting()
    monkeypatch.setattr(wire, "zlib", counting)
    with FaultServer({"a": [packed(bomb(200))]}) as server:
        (outcome,) = ask(server, question("a"))
    assert outcome == Failure("its reply is larger than 16 MiB", 1)
    assert module.LARGEST < counting.bytes <= module.LARGEST + wire.PIECE


def test_the_time_limit_holds_while_a_reply_is_unpacked(monkeypatch):
    monkeypatch.setattr(wire, "PIECE", 2**16)
    monkeypatch.setattr(wire, "zlib", Counting(pause=0.02))  # 2.5 s for the 128 pieces
    with FaultServer({"a": [packed(bomb(8))]}) as server:
        assert ask(server, question("a"), timeout=0.5, retries=0) == [Failure("no reply within 0.5 s", 1)]


def test_no_more_than_allowed_is_read_of_an_endless_reply_and_of_a_list_of_models():
    blanks = sends(b" " * (17 << 20))
    with FaultServer({"a": [blanks]}) as server:
        assert ask(server, question("a")) == [Failure("its reply is larger than 16 MiB", 1)]
    with FaultServer(models=packed(bomb(20))) as server, pytest.raises(InputError, match="larger than 16 MiB"):
        ServerAnswerer(server.url)


def test_only_gzip_is_asked_for():
    asked = []

    def models(handler):
        asked.append(handler.headers["Accept-Encoding"])
        handler.sends(200, {"data": [{"id": MODEL}]})

    with FaultServer(models=models) as server:
        assert ServerAnswerer(server.url).name == MODEL
    assert asked == ["gzip"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_ends_the_run_and_nothing_is_sent_on(status, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with (
        FaultServer() as other,
        FaultServer({"b": [sends_on(f"{other.url}/chat/completions?token={KEY}", status)]}) as server,
    ):
        stream, answers = ServerAnswerer(server.url, concurrency=1).answer([question("a"), question("b")], False), []
        with pytest.raises(InputError) as raised:
            collect(stream, answers)
        assert not other.requests
        assert not other.keys
        assert str(raised.value) == (
            f"{server.url}: the server sends requests on to {other.url}/chat/completions (HTTP {status}), "
            "and questions and images go to base_url only. If the model is there, pass that address, to /v1."
        )
    assert [answer.text for _, answer in answers] == ["a (0, 0, 0)"]


@pytest.mark.parametrize(
    "address", ["/elsewhere", "https://[::bad", "http://\x01\xe4/", "javascript:1", "http://a/" + "b" * 9000]
)
def test_a_redirect_within_one_origin_or_to_nowhere_is_refused_too(address):
    with FaultServer(models=sends_on(address)) as server:
        with pytest.raises(InputError, match=r"the server sends requests on to .* \(HTTP 307\)") as raised:
            ServerAnswerer(server.url)
        assert len(str(raised.value)) < 700
        assert len(str(raised.value).splitlines()) == 1


# faults that pass ---------------------------------------------------------------------------------------------------

FAULTS = [
    pytest.param(refuses(408), "HTTP 408: not now", id="408"),
    pytest.param(refuses(409), "HTTP 409: not now", id="409"),
    pytest.param(refuses(429), "HTTP 429: not now", id="429"),
    pytest.param(refuses(500), "HTTP 500: not now", id="500"),
    pytest.param(sends(b"", 503), "HTTP 503: ", id="503 without a word"),
    pytest.param(silence, "no reply within 0.4 s", id="silence"),
    pytest.param(slow_bytes, "no reply within 0.4 s", id="slow bytes"),
    pytest.param(hangs_up, "the connection failed: Server disconnected", id="closed connection"),
    pytest.param(half_a_reply, "the connection failed: peer closed connection", id="half a reply"),
    pytest.param(sends(b"half {"), "its reply is no JSON: 'half {'", id="no JSON"),
    pytest.param(sends(b"[" * 100_000), "its reply is no JSON: ", id="nested without end"),
    pytest.param(sends(b"[1]"), "its reply is no chat completion", id="other JSON"),
    pytest.param(sends(b'{"choices": []}'), "its reply is no chat completion", id="no choice"),
    pytest.param(sends(b'{"choices": null}'), 'its reply is no chat completion: {"choices": null}', id="choices: null"),
    pytest.param(completes(None), "its reply is no chat completion", id="no message"),
    pytest.param(completes({"content": 5}), "its reply is no chat completion", id="a number for a text"),
    pytest.param(completes({"content": "ye"}, "abort"), "its reply broke off (finish_reason 'abort')", id="aborted"),
    pytest.param(
        sends(b'{"choices": [{"message": {"content": "yes", "content": "no"}}]}'),
        "its reply says 'content' twice, with two values",
        id="two answers",
    ),
    pytest.param(
        sends(b'{"error": ' + b"[" * 900 + b"1" + b"]" * 900 + b"}"),
        "HTTP 200 with an error: ",
        id="an error nested deep",
    ),
    pytest.param(head_alone, "no reply within 0.4 s", id="a head and no body"),
    pytest.param(raw(b"hello"), "the connection failed: illegal status line", id="no HTTP"),
    pytest.param(
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999", b'{"choices"'),
        "the connection failed: peer closed connection",
        id="fewer bytes than promised",
    ),
    pytest.param(
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked", b"no length\r\n"),
        "the connection failed: illegal chunk header",
        id="chunks without lengths",
    ),
    pytest.param(
        sends(b"<html>\n<body>Sign in</body>"),
        "its reply is no JSON: '<html> <body>Sign in</body>'",
        id="a proxy's page",
    ),
    pytest.param(packed(b"no gzip"), "its reply says that it is gzip and is not", id="no gzip"),
    pytest.param(packed(gzip.compress(b"{}")[:-5]), "its reply breaks off in the middle of its gzip", id="half a gzip"),
    pytest.param(packed(bomb(40), 500), "HTTP 500: ", id="a bomb with an error"),
    pytest.param(
        sends(b'{"error": {"code": 429, "message": "slow down"}}'),
        "HTTP 200 with error 429: slow down",
        id="429 inside",
    ),
    pytest.param(
        sends(b'{"error": {"type": "server_error", "message": "oh"}}'), "HTTP 200 with error 500: oh", id="500 inside"
    ),
    pytest.param(sends(b'{"error": "out of memory"}'), "HTTP 200 with an error: out of memory", id="words inside"),
    pytest.param(sends(b'{"choices": null, "message": "loading"}'), "HTTP 200 with an error: loading", id="a message"),
    pytest.param(
        sends(b'{"choices": [{"error": {"code": 502, "message": "no provider"}, "message": {"content": "ye"}}]}'),
        "HTTP 200 with error 502: no provider",
        id="an error in the choice",
    ),
]


@pytest.mark.parametrize(("fault", "reason"), FAULTS)
def test_a_fault_that_passes_costs_no_answer_and_one_that_stays_costs_one(fault, reason):
    faults = {"passes": [fault, fault], "stays": [fault] * 3}
    with FaultServer(faults) as server:
        timeout = 0.4 if fault in (silence, slow_bytes, head_alone) else 60
        passes, stays = ask(server, question("passes"), question("stays"), retries=2, timeout=timeout)
        assert sorted(server.asked()) == ["passes"] * 3 + ["stays"] * 3
    assert passes == Answer("passes (0, 0, 0)", 4, True)
    assert stays.attempts == 3
    assert stays.reason.startswith(reason)


def test_faults_by_number_of_the_request_cost_no_answer():
    with FaultServer({0: [refuses(500)], 3: [hangs_up], 4: [half_a_reply], 7: [refuses(429)]}) as server:
        answers = ask(server, *[question(f"question {n}", n) for n in range(12)], concurrency=4)
        assert len(server.requests) == 16
    assert answers == [Answer(f"question {n} ({n}, {n}, {n})", 5, True) for n in range(12)]


def test_an_attempt_waits_as_long_as_the_server_asks():
    with FaultServer({"a": [refuses(429, Retry_After="0.5")]}) as server:
        answerer = ServerAnswerer(server.url)
        start = time.monotonic()
        ((_, answer),) = answerer.answer([question("a")], progress=False)
        assert 0.5 <= time.monotonic() - start < 5
    assert answer.text == "a (0, 0, 0)"


@pytest.mark.parametrize("seconds", [300, "a date"])
def test_a_server_that_asks_to_wait_too_long_is_not_waited_for(seconds):
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=400)
    header = format_datetime(later) if seconds == "a date" else str(seconds)
    with FaultServer({"a": [refuses(503, "closed", Retry_After=header)]}) as server:
        (outcome,) = ask(server, question("a"))
    assert outcome.attempts == 1
    assert outcome.reason.startswith("HTTP 503: closed (it asks us to wait ")
    assert outcome.reason.endswith("s, more than 120 s)")


def test_waits_double(monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr(module, "FIRST_WAIT", 1.0)
    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    with FaultServer({"a": [refuses(500)] * 5}) as server:
        ask(server, question("a"))
    assert len(waits) == 5
    for wait, expected in zip(waits, [1, 2, 4, 8, 16], strict=True):
        assert 0.75 * expected <= wait <= 1.25 * expected


# many at once -------------------------------------------------------------------------------------------------------


def test_no_more_requests_and_images_than_allowed_are_under_way():
    opened, most = 0, 0
    lock = threading.Lock()

    def image():
        nonlocal opened, most
        with lock:
            opened += 1
            most = max(most, opened - server.replied)
        return Image.new("RGB", (8, 6))

    with FaultServer(pause=0.05) as server:
        ask(server, *[Question(f"question {n}", image, 20) for n in range(24)], concurrency=4)
        assert server.most_at_once == 4
    assert most == 4
    assert opened == 24


def test_answers_come_when_they_are_there():
    with FaultServer({"slow": [silence]}) as server:
        answers = ServerAnswerer(server.url, concurrency=2).answer(
            [question("slow"), *[question(f"question {n}") for n in range(5)]], progress=False
        )
        assert [next(answers)[0] for _ in range(5)] == [1, 2, 3, 4, 5]
        answers.close()


def test_nothing_is_left_running_when_the_answers_are_no_longer_wanted():
    with FaultServer(pause=0.05) as server:
        answerer = ServerAnswerer(server.url, concurrency=2)
        answers = answerer.answer([question(f"question {n}") for n in range(50)], progress=False)
        next(answers)
        answers.close()
        assert "requests" not in [thread.name for thread in threading.enumerate()]
        time.sleep(0.1)
        asked = len(server.requests)
        time.sleep(0.2)
        assert len(server.requests) == asked < 10


def test_an_event_loop_may_be_running_already():
    async def notebook():
        return ask(server, question("a"))

    with FaultServer() as server:
        assert asyncio.run(notebook())[0].text == "a (0, 0, 0)"


def test_an_image_that_cannot_be_opened_is_no_failed_request():
    def image():
        raise OSError("no such image")

    with FaultServer() as server, pytest.raises(OSError, match="no such image"):
        ask(server, question("a"), Question("b", image, 20))


def test_no_question_is_no_request():
    with FaultServer() as server:
        assert ask(server) == []
        assert server.requests == []


def test_a_progress_bar_counts_the_questions(capsys):
    with FaultServer() as server:
        list(ServerAnswerer(server.url).answer([question("a"), question("b")]))
    assert "2/2" in capsys.readouterr().err


# what ends a run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        pytest.param(refuses(401, KEY_REFUSED), r"/v1: the server refuses the key .*Set OPENAI_API_KEY", id="401"),
        pytest.param(refuses(403, "not you"), r"/v1: the server refuses the key .*HTTP 403: not you", id="403"),
        pytest.param(refuses(429, "insufficient_quota"), r"the key's quota is used up .*Raise it", id="quota"),
        pytest.param(refuses(402, "pay"), r"the key's quota is used up \(HTTP 402: pay\)\. Raise it", id="402"),
        pytest.param(
            sends(b'{"error": {"code": 401, "message": "who?"}}'),
            r"/v1: the server refuses the key .*HTTP 200 with error 401: who\?",
            id="401 inside",
        ),
        pytest.param(
            sends(b'{"error": {"code": 402, "message": "pay"}}'),
            r"the key's quota is used up \(HTTP 200 with error 402: pay\)\. Raise it",
            id="402 inside",
        ),
        pytest.param(
            sends(b'{"choices": null, "code": 403, "msg": "not you"}'),
            r"/v1: the server refuses the key .*HTTP 200 with error 403: not you",
            id="403 inside",
        ),
        pytest.param(
            sends(b'{"error": {"type": "invalid_request_error", "code": "invalid_api_key", "message": "who?"}}'),
            r"/v1: the server refuses the key .*error 401: who\?",
            id="a name for 401 inside",
        ),
        pytest.param(
            sends(b'{"error": {"type": "insufficient_quota", "message": "pay"}}'),
            r"the key's quota is used up .*pay",
            id="quota inside",
        ),
    ],
)
def test_a_key_that_is_no_longer_accepted_ends_the_run_after_the_answers_so_far(fault, message, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FaultServer({"question 5": [fault], "slow": [silence]}) as server:
        answers = []
        questions = [question("slow"), *[question(f"question {n}") for n in range(1, 20)]]
        stream = ServerAnswerer(server.url, concurrency=2).answer(questions, progress=False)
        with pytest.raises(InputError, match=message) as raised:
            collect(stream, answers)
        assert len(server.requests) == 6
    assert [(place, answer.text) for place, answer in answers] == [(n, f"question {n} (0, 0, 0)") for n in range(1, 5)]
    assert len(str(raised.value).splitlines()) == 1


def test_a_server_that_is_gone_ends_the_run():
    with FaultServer(pause=0.1) as server:
        answerer = ServerAnswerer(server.url, concurrency=1, retries=2)
        stream = answerer.answer([question(f"question {n}") for n in range(9)], progress=False)
        answers = [next(stream), next(stream)]
        server.stop()
        with pytest.raises(InputError, match=r"no server answers there any more \(.*, 3 attempts\)\. Start it again\."):
            collect(stream, answers)
    assert [place for place, _ in answers] == list(range(len(answers)))
    assert len(answers) <= 3


# the start ----------------------------------------------------------------------------------------------------------


def test_a_model_is_found_or_named_or_refused():
    with FaultServer(models=["one"]) as server:
        assert ServerAnswerer(server.url).name == "one"
        assert ServerAnswerer(server.url + "/", "one").endpoint.base_url == server.url
        assert server.requests == []
        with pytest.raises(InputError, match=r"does not serve 'two' \(HTTP 404: .*It serves one; name one with model="):
            ServerAnswerer(server.url, "two")
    with FaultServer(models=["one", "two"]) as server:
        assert ServerAnswerer(server.url, "two").name == "two"
        with pytest.raises(InputError, match="no model is named and it serves one, two"):
            ServerAnswerer(server.url)
    with FaultServer(models=[]) as server, pytest.raises(InputError, match="it serves none that it lists"):
        ServerAnswerer(server.url)


def test_a_model_that_is_served_and_not_listed_is_found_out_by_asking():
    with FaultServer(models=sends(b'{"data": [{"id": "cached"}]}')) as server:
        assert ServerAnswerer(server.url, "/my/folder").name == "/my/folder"
        assert server.asked() == ["Hello"]


def test_a_fault_that_passes_hides_no_refusal_of_the_model():
    """`transformers serve` hangs up after the HTTP 500 that is its list of models."""
    faults = {"Hello": [hangs_up, refuses(404, "no such model")]}
    with FaultServer(faults, models=refuses(500)) as server:
        with pytest.raises(InputError, match=r"does not serve 'another' \(HTTP 404: no such model\)"):
            ServerAnswerer(server.url, "another")
        assert server.asked() == ["Hello", "Hello"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        pytest.param(sends(b"{}", 404), r"has no /models \(HTTP 404\)", id="another address"),
        pytest.param(refuses(401), r"refuses a request without a key .*Set OPENAI_API_KEY", id="no key"),
        pytest.param(
            sends(b"hello"), r"no OpenAI-compatible server answers there \(its reply is no JSON", id="no JSON"
        ),
        pytest.param(silence, r"no OpenAI-compatible server answers there \(no reply within 0\.3 s", id="silence"),
        pytest.param(refuses(500), r"it serves none that it lists \(HTTP 500: not now\)\. Name", id="cannot list"),
    ],
)
def test_a_server_that_is_no_such_server_is_refused_at_the_start(fault, message):
    with FaultServer(models=fault) as server, pytest.raises(InputError, match=message):
        ServerAnswerer(server.url, timeout=0.3 if fault is silence else 60)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("HTTP_PROXY", "ftp://127.0.0.1:1", "Unknown scheme for proxy URL"),
        ("ALL_PROXY", "http://127.0.0.1:port", "Invalid port"),
        ("SSL_CERT_FILE", "/not/there", "No such file"),
    ],
)
def test_a_proxy_or_certificates_that_cannot_be_used_are_refused(name, value, reason, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"HTTP_PROXY, .* cannot be used .*{reason}.* Fix or unset it") as raised:
        ServerAnswerer("http://127.0.0.1:1/v1")
    assert len(str(raised.value).splitlines()) == 1


def test_a_request_that_cannot_be_sent_is_a_failure():
    request = {"messages": [{"role": "user", "content": "Why \ud83d?"}], "max_tokens": 5}
    with FaultServer() as server:
        ((_, failure),) = Endpoint(server.url).replies([lambda: request])
    assert failure == Failure("the request holds half a character, which no server can be sent", 1)


def test_an_address_without_v1_is_refused():
    with FaultServer() as server, pytest.raises(InputError, match="has no /models"):
        ServerAnswerer(server.url.removesuffix("/v1"))


def test_an_address_where_nothing_listens_is_refused():
    with FaultServer() as server:
        pass
    with pytest.raises(InputError, match=r"no OpenAI-compatible server answers there .*Start it, wait until"):
        ServerAnswerer(server.url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://me:secret@127.0.0.1:1/v1", "base_url: it holds a user name"),
        ("me:secret@127.0.0.1/v1", "base_url: it holds a user name"),
        ("http://127.0.0.1:1/v1?key=secret", "base_url 'http://127.0.0.1:1/v1': not the address"),
        ("127.0.0.1:8000/v1", "not the address of a server"),
        ("http://127.0.0.1:80000/v1", "not the address of a server"),
        ("http://[::1/v1", "not the address of a server"),
        ("http://127.0.0.1:1/\x7f", "not the address of a server"),
        ("http://\udcff/v1", "not the address of a server"),
        ("http://127.0.0.1:1/" + "v" * 99999, "not the address of a server"),
        ("", "not the address of a server"),
        (None, "not the address of a server"),
        ("https://api.openai.com/v1", "needs a key. Set OPENAI_API_KEY"),
    ],
)
def test_a_wrong_address_is_refused_without_its_secrets(url, message):
    with pytest.raises(InputError, match=message) as raised:
        ServerAnswerer(url)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "options",
    [
        {"concurrency": 0},
        {"concurrency": "many"},
        {"retries": -1},
        {"timeout": 0},
        {"timeout": "long"},
        {"timeout": float("inf")},
        {"min_pixels": 0},
        {"max_pixels": 1.5},
        {"max_pixels": "many"},
        {"max_pixels": True},
        {"max_pixels": 10**9},
        {"enable_thinking": "yes"},
        {"model": 7},
        {"system": 7},
        {"system": " "},
        {"system": "\ud83d"},
    ],
)
def test_a_wrong_option_is_refused(options):
    (name,) = options
    with pytest.raises(InputError, match=f"{name}=.*: pass (a (whole )?number|True or False|the )") as raised:
        ServerAnswerer("http://127.0.0.1:1/v1", **options)
    assert len(str(raised.value).splitlines()) == 1


def test_fewer_pixels_at_most_than_at_least_are_refused():
    with pytest.raises(InputError, match=r"min_pixels=9: more than max_pixels=4\. Pass at most as many\."):
        ServerAnswerer("http://127.0.0.1:1/v1", min_pixels=9, max_pixels=4)


# the key ------------------------------------------------------------------------------------------------------------


def test_the_key_comes_from_the_environment_and_nothing_shows_it(monkeypatch, caplog, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    echo = refuses(400, KEY_REFUSED + " " * 250 + KEY_REFUSED)
    faults = {
        "json": [echo],
        "text": [sends(KEY.encode(), 400)],
        "refusal": [says(None, refusal=KEY)],
        "no json": [sends(KEY.encode())] * 2,
    }
    with FaultServer(faults) as server:
        answerer = ServerAnswerer(server.url, retries=1)
        outcomes = [one for _, one in answerer.answer([question(text) for text in faults])]
        assert set(server.keys) == {f"Bearer {KEY}"}
    assert all(isinstance(outcome, Failure) and "***" in outcome.reason for outcome in outcomes)
    with FaultServer({"a": [refuses(401, KEY_REFUSED)]}) as server, pytest.raises(InputError) as raised:
        ask(server, question("a"))
    with FaultServer(models=refuses(403, KEY_REFUSED)) as server, pytest.raises(InputError) as at_start:
        ServerAnswerer(server.url)
    captured = capfd.readouterr()
    shown = [*map(repr, outcomes), repr(answerer), repr(answerer.endpoint), str(answerer.preprocessing)]
    for error in (raised, at_start):
        assert "***" in str(error.value)
        shown.append("".join(traceback.TracebackException.from_exception(error.value, capture_locals=True).format()))
        assert error.value.__cause__ is None
        assert error.value.__context__ is None
    assert not [text for text in [*shown, caplog.text, captured.out, captured.err] if KEY[3:-3] in text]


def encoded(key: str) -> str:
    return base64.b64encode(key.encode()).decode()


@pytest.mark.parametrize(
    ("said", "masked"),
    [
        pytest.param("The key is {key}.", "The key is ***.", id="as it is"),
        pytest.param("Authorization: Bearer {key}", "Authorization: Bearer ***", id="in its header"),
        pytest.param(f"yes {KEY[:14]}...", "yes ***...", id="its beginning"),
        pytest.param(f"yes {KEY[-14:]}", "yes ***", id="its end"),
        pytest.param(f"yes {KEY[:5]}", f"yes {KEY[:5]}", id="a few signs of it"),
        pytest.param(f"yes {encoded(KEY)}", "yes ***", id="base64"),
        pytest.param(f"yes {KEY.encode().hex()}", "yes ***", id="hexadecimal"),
        pytest.param("yes sk-secret%2F0123456789%2Babc", "yes ***", id="in an address"),
        pytest.param(f"{KEY}{KEY} and {KEY}", "****** and ***", id="again and again"),
    ],
)
def test_the_key_is_masked_in_an_answer(said, masked, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FaultServer({"a": [says(said.replace("{key}", KEY))]}) as server:
        ((_, answer),) = ServerAnswerer(server.url).answer([question("a", limit=99)], progress=False)
    assert answer.text == masked


@pytest.mark.parametrize("before", ["Bearer ", "user:", "x", ""])
def test_the_key_is_masked_wherever_it_stands_in_base64(before, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    said = encoded(f"{before}{KEY}/end")
    with FaultServer({"a": [says(said)]}) as server:
        (outcome,) = ask(server, question("a", limit=99))
    start, end = outcome.text.split("***")
    assert said.startswith(start)
    assert said.endswith(end)
    assert len(start) <= 4 * len(before) / 3 + 1  # a sign of the border holds bits of both sides
    assert len(end) <= 4 * len("/end") / 3 + 1 + said.count("=")


def test_the_key_is_masked_in_the_name_of_a_model_and_in_what_is_said_of_a_thought(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    faults = {"a": [completes({"content": "yes"}, KEY, model=KEY)], "b": [completes({"content": None}, KEY, model=KEY)]}
    with FaultServer(faults) as server:
        request = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5}
        endpoint = Endpoint(server.url)
        ((_, reply),) = endpoint.replies([lambda: request])
        ((_, failure),) = endpoint.replies([lambda: request | {"messages": [{"role": "user", "content": "b"}]}])
    assert reply == Reply("yes", 0, "***", "***")
    assert failure == Failure("its reply has no text (finish_reason '***')", 1, model="***")
    with FaultServer(models=[KEY]) as server, pytest.raises(InputError, match=r"it serves \*\*\*\. Name one"):
        ServerAnswerer(server.url)


@pytest.mark.parametrize("key", ["EMPTY", "none", "no", "x", "1"])
def test_a_placeholder_for_a_key_is_masked_in_no_answer(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with FaultServer({"a": [says(f"no, none, 1 x EMPTY. Bearer {key}")]}) as server:
        ((_, answer),) = ServerAnswerer(server.url).answer([question("a")], progress=False)
    assert answer.text == "no, none, 1 x EMPTY. ***"


def test_a_server_of_ones_own_needs_no_key():
    with FaultServer() as server:
        ask(server, question("a"))
        assert set(server.keys) == {"Bearer none"}


@pytest.mark.parametrize("key", ["sk-secret 1", "sk-secret\n2", "sk-secretä"])
def test_a_key_that_no_header_can_carry_is_refused_without_showing_it(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError, match="OPENAI_API_KEY: it holds a space") as raised:
        ServerAnswerer("http://127.0.0.1:1/v1")
    assert "secret" not in str(raised.value)


# how it is asked ----------------------------------------------------------------------------------------------------


def requests(*questions: Question, **options) -> list[dict]:
    """What the server is sent, without the model, in the questions' order."""
    with FaultServer() as server:
        ask(server, *questions, concurrency=1, **options)
        return [{name: value for name, value in one.items() if name != "model"} for one in server.requests]


def test_a_system_message_stands_before_the_question():
    (request,) = requests(question("Is it?"), system="You are a radiologist.")
    assert request["messages"][0] == {"role": "system", "content": "You are a radiologist."}
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    assert text(request) == "Is it?"


@pytest.mark.parametrize("think", [True, False])
def test_thinking_is_told_to_the_chat_template(think):
    (request,) = requests(question("Is it?"), enable_thinking=think)
    assert request["chat_template_kwargs"] == {"enable_thinking": think}
    assert request["temperature"] == 0


def test_a_draw_carries_its_sampling_and_a_seed_of_its_own():
    plain = replace(question("a"), sampling=Sampling(0.7, seed=5))
    full = replace(question("b"), sampling=Sampling(0.6, top_k=20, top_p=0.95, seed=5))
    found = requests(plain, replace(plain, sample_index=2), full, question("greedy"))
    for request in found:
        del request["messages"]
    assert found == [
        {"max_tokens": 20, "temperature": 0.7, "seed": 5},
        {"max_tokens": 20, "temperature": 0.7, "seed": 7},
        {"max_tokens": 20, "temperature": 0.6, "seed": 5, "top_p": 0.95, "top_k": 20},
        {"max_tokens": 20, "temperature": 0},
    ]


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        pytest.param((400, 100), {"max_pixels": 10_000}, (200, 50), id="too many"),
        pytest.param((400, 100), {"max_pixels": 40_000}, (400, 100), id="just as many"),
        pytest.param((30, 20), {"min_pixels": 2_400}, (60, 40), id="too few"),
        pytest.param((30, 20), {"min_pixels": 600, "max_pixels": 600}, (30, 20), id="just right"),
        pytest.param((7, 5), {"min_pixels": 100}, (12, 9), id="at least as many"),
        pytest.param((7, 5), {"max_pixels": 20}, (5, 3), id="at most as many"),
        pytest.param((9000, 1), {"max_pixels": 50}, (50, 1), id="a line"),
        pytest.param((1, 9000), {"max_pixels": 50}, (1, 50), id="an upright line"),
    ],
)
def test_an_image_is_scaled_before_it_is_sent(size, limits, expected):
    image = Image.effect_noise(size, 50).convert("RGB")
    (request,) = requests(Question("Is it?", lambda: image, 20), **limits)
    url = request["messages"][0]["content"][0]["image_url"]["url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert sent.size == expected
    assert sent.tobytes() == image.resize(expected, Image.Resampling.BICUBIC).tobytes()
    assert scaled(image, None, None) is image


def test_what_decides_an_answer_is_in_the_manifest_and_nothing_else_is():
    given = {"system": "Be short.", "enable_thinking": False, "min_pixels": 4, "max_pixels": 9}
    with FaultServer() as server:
        plain, full = ServerAnswerer(server.url).preprocessing, ServerAnswerer(server.url, **given).preprocessing
    assert full == plain | given
    assert not plain.keys() & given.keys()


def test_a_model_that_reasons_draws_nothing():
    with FaultServer() as server:
        answerer = ServerAnswerer(server.url, reasoning=True)
        with pytest.raises(InputError, match="with reasoning=True it takes no temperature"):
            list(answerer.answer([replace(question("a"), sampling=Sampling(1.0))], progress=False))
        assert not server.requests


def test_a_question_with_half_a_character_is_refused():
    with FaultServer() as server, pytest.raises(InputError, match="it holds half a character"):
        ask(server, question("Is it \ud83d?"))


def test_further_rounds_are_refused():
    with FaultServer() as server, pytest.raises(InputError, match="a server is asked one question in one round"):
        list(ServerAnswerer(server.url).answer([replace(question("Why?"), history=(("a", "b"),))], progress=False))


def test_a_model_that_reasons_gets_no_temperature_and_room_to_think():
    with FaultServer() as server:
        answerer = ServerAnswerer(server.url, reasoning=True)
        ((_, answer),) = answerer.answer([question("Is it?", limit=7)], progress=False)
        (request,) = server.requests
        with pytest.raises(InputError, match="reasoning=yes: pass True or False"):
            ServerAnswerer(server.url, reasoning="yes")  # type: ignore[arg-type]
    del request["messages"]
    assert request == {"model": MODEL, "max_completion_tokens": 7 + 8192}
    assert answer.text.startswith("Is it?")
    assert answerer.preprocessing["decoding"] == "the server's own (reasoning)"


# what a run reads ---------------------------------------------------------------------------------------------------


def test_a_run_knows_the_server_and_the_model():
    with FaultServer(models=["one", "two"]) as server:
        one, again, two = (ServerAnswerer(server.url, name) for name in ("one", "one", "two"))
    assert one.sha256 == again.sha256 != two.sha256
    assert one.name == "one"
    assert str(one.device) == "cpu"
    assert one.dtype == "server"
    assert one.preprocessing == {
        "backend": "openai_server",
        "device": "server",
        "base_url": server.url,
        "model": "one",
        "prompt": "the server's chat template",
        "decoding": "greedy (temperature 0)",
    }


def test_an_endpoint_carries_any_messages():
    request = {"messages": [{"role": "user", "content": "Which is better?"}], "max_tokens": 5, "seed": 3}
    with FaultServer() as server:
        assert list(Endpoint(server.url).replies([lambda: request])) == [(0, Reply("Which is better?", 3, "stop"))]
        assert server.requests == [request | {"model": MODEL}]


def test_importing_is_cheap():
    heavy = ["openai", "torch", "PIL", "tqdm"]
    check = f"import sys, stllava_eval.inference.endpoint; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# a real server ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers_serve(checkpoint, tmp_path_factory):
    """(address, folder) of `transformers serve` with the small LLaVA, as `convert --to llava-hf` writes it."""
    from transformers.utils.import_utils import is_serve_available

    from stllava_eval.network.checkpoint import open_checkpoint
    from stllava_eval.network.convert import convert

    if not is_serve_available():
        pytest.skip("needs `pip install fastapi uvicorn python-multipart opentelemetry-api` for `transformers serve`")
    folder, log = tmp_path_factory.mktemp("served") / "model", tmp_path_factory.mktemp("log") / "log"
    convert(open_checkpoint(str(checkpoint)), folder, to="llava-hf", progress=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.kill()  # a polite end may be refused, and nobody needs it
        process.wait()


def test_a_real_server_gives_the_answers_of_the_checkpoint(transformers_serve, checkpoint):
    url, folder = transformers_serve
    colours = [(0, 0, 0), (200, 10, 10), (10, 200, 90), (255, 255, 255)]
    texts = ["Is there a mass?", "What organ is shown?", "Why?"]
    questions = [
        Question(text, lambda colour=colour: Image.new("RGB", (40, 30), colour), 40)
        for colour in colours
        for text in texts
    ]
    here = dict(Answerer(str(checkpoint), device="cpu").answer(questions, progress=False))
    expected = [here[place] for place in range(len(questions))]
    found = dict(ServerAnswerer(url, folder, concurrency=4).answer(questions, progress=False))
    assert sorted(found) == list(range(len(questions)))
    assert len({answer.text for answer in expected}) > 3
    assert [found[place].text for place in range(len(questions))] == [answer.text for answer in expected]
    for place, answer in enumerate(expected):
        assert found[place].ended == answer.ended
        assert found[place].tokens == answer.tokens + answer.ended  # the server counts the end token too


def test_a_real_server_refuses_a_model_that_it_does_not_serve(transformers_serve):
    with pytest.raises(InputError, match="does not serve 'another'"):
        ServerAnswerer(transformers_serve[0], "another")
