import asyncio
import datetime
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from dataclasses import replace
from email.utils import format_datetime

import pytest
from fault_server import (
    KEY_REFUSED,
    MODEL,
    FaultServer,
    half_a_reply,
    hangs_up,
    refuses,
    says,
    sends,
    silence,
    slow_bytes,
)
from PIL import Image

from stllava_eval import server as module
from stllava_eval.answering import Answer, Answerer, Question
from stllava_eval.errors import InputError
from stllava_eval.server import Endpoint, Failure, Reply, ServerAnswerer

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
            Failure("its reply has 8000000 characters where 20 tokens were asked for", 1),
            id="8 MB",
        ),
        pytest.param(refuses(400, "too\nlong"), Failure("HTTP 400: too long", 1), id="a bad request"),
        pytest.param(refuses(404, "gone"), Failure("HTTP 404: gone", 1), id="not found"),
        pytest.param(sends(b'{"detail": "no images"}', 422), Failure("HTTP 422: no images", 1), id="FastAPI's error"),
        pytest.param(sends(b"<html>", 413), Failure("HTTP 413: <html>", 1), id="a proxy's error"),
    ],
)
def test_one_reply(fault, expected):
    with FaultServer({"a question": [fault]}) as server:
        other, outcome = ask(server, question("another"), question("a question", until=("STOP",)))
        assert server.asked().count("a question") == 1
    assert other == Answer("another (0, 0, 0)", 4, True)
    assert outcome == expected


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
]


@pytest.mark.parametrize(("fault", "reason"), FAULTS)
def test_a_fault_that_passes_costs_no_answer_and_one_that_stays_costs_one(fault, reason):
    faults = {"passes": [fault, fault], "stays": [fault] * 3}
    with FaultServer(faults) as server:
        timeout = 0.4 if fault in (silence, slow_bytes) else 60
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
    "options", [{"concurrency": 0}, {"concurrency": "many"}, {"retries": -1}, {"timeout": 0}, {"timeout": "long"}]
)
def test_a_wrong_option_is_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(InputError, match=f"{name}={value}: pass a"):
        ServerAnswerer("http://127.0.0.1:1/v1", **options)


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


def test_draws_and_further_rounds_are_refused():
    with FaultServer() as server, pytest.raises(InputError, match="a server is asked one round, greedily"):
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
    check = f"import sys, stllava_eval.server; print([name for name in {heavy} if name in sys.modules])"
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
