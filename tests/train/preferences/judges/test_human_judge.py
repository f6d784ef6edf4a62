import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import PIL.Image
import pytest

from stllava_eval.errors import InputError
from stllava_eval.images import decode, pixel_hash
from stllava_train.preferences.judges.human_judge import BODY_BYTES, HumanJudgeServer, blind_questions, serve
from stllava_train.preferences.rows import Candidate
from stllava_train.preferences.verdicts import Rule, judged, verdict_of
from stllava_train.resumable import ResumableJsonl, read_rows

ANSWERS = ("A mass in the left lung.", "No mass is seen.")
IMAGE = "document.querySelector('[data-choice=tie]')?.disabled === false"  # it is there
HOSTILE = (
    "</textarea><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'> {token} \u202e&lt;",
)
direct = build_opener(ProxyHandler({}))  # a proxy of the environment cannot reach this machine


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two images; candidates and verdicts go here too."""
    for name, shade in (("a.png", 80), ("b.png", 160)):
        PIL.Image.new("RGB", (40, 30), (shade, shade, shade)).save(tmp_path / name)
    return tmp_path


def candidate(folder: Path, number: int = 0, image: str = "a.png", answers: tuple[str, ...] = ANSWERS) -> Candidate:
    sha256 = pixel_hash(decode((folder / image).read_bytes()))
    return Candidate(f"{image}#{number}", image, sha256, f"Question {number}?", answers)


def open_ledger(folder: Path) -> ResumableJsonl:
    return ResumableJsonl(folder / "judged.jsonl", lambda row: verdict_of(row).key, {"stage": "judge"})


@contextmanager
def served(folder: Path, candidates: list[Candidate], name: str = "ann", seed: int = 0):
    ledger = open_ledger(folder)
    with HumanJudgeServer(candidates, folder, ledger, name, seed) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
            ledger.close()


def asked(url: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    """(status, body, headers) of what the server replies."""
    try:
        with direct.open(Request(url, data, {key.replace("_", "-"): text for key, text in headers.items()})) as reply:
            return reply.status, reply.read(), dict(reply.headers)
    except HTTPError as error:
        with error:
            return error.code, error.read(), dict(error.headers)


def state(url: str) -> dict:
    return json.loads(asked(url + "state")[1])


def choose(url: str, choice: str, number: int = 0) -> dict:
    """Do as the page does; the state after it."""
    (token,) = re.findall(r'data-token="([^"]+)"', asked(url)[1].decode())
    status, body, _ = asked(url + "choose", json.dumps({"choice": choice, "number": number}).encode(), X_Token=token)
    assert status == 200, body
    return json.loads(body)


def scores(folder: Path) -> dict[str, list[float] | None]:
    """Of the last row of each candidate on the disk, by id."""
    return {row["id"]: row["scores"] for row in read_rows(folder / "judged.jsonl")}


# --- blind ------------------------------------------------------------------------------------------------------------


def test_the_order_is_balanced_and_hangs_on_seed_name_and_id_alone(folder):
    many = [candidate(folder, number) for number in range(1000)]
    orders = [one.shown for one in blind_questions(many, "ann", 0)]
    assert orders == [one.shown for one in blind_questions(many[::-1], "ann", 0)][::-1]
    assert 430 < orders.count((0, 1)) < 570  # of 1000 fair coins: outside 4.4 standard deviations, 1 time in 100,000
    for other in (blind_questions(many, "bob", 0), blind_questions(many, "ann", 1)):
        same = sum(one.shown == order for one, order in zip(other, orders, strict=True))
        assert 430 < same < 570


def test_of_three_answers_every_two_are_shown_once(folder):
    found = blind_questions([candidate(folder, answers=("a", "b", "c"))], "ann", 0)
    assert [sorted(one.shown) for one in found] == [[0, 1], [0, 2], [1, 2]]


def test_the_page_shows_answers_in_the_order_drawn_and_does_not_tell_it(folder):
    candidates = [candidate(folder, number) for number in range(8)]
    drawn = blind_questions(candidates, "ann", 0)
    assert {one.shown for one in drawn} == {(0, 1), (1, 0)}
    with served(folder, candidates) as server:
        for one in drawn:
            now = state(server.url)
            assert now["question"] == one.candidate.question
            assert now["answers"] == [ANSWERS[place] for place in one.shown]
            assert set(now) == {"judge", "judged", "skipped", "total", "number", "image", "question", "answers"}
            choose(server.url, "tie", now["number"])


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("choice", "scored"), [("1", [2, 1]), ("2", [1, 2]), ("tie", [1, 1])])
def test_a_verdict_is_on_the_disk_when_the_reply_comes(folder, choice, scored):
    one = candidate(folder)
    (drawn,) = blind_questions([one], "ann", 0)
    with served(folder, [one]) as server:
        after = choose(server.url, choice)
        (row,) = read_rows(folder / "judged.jsonl")
    assert (after["judged"], after["total"], after["number"]) == (1, 1, None)
    verdict = verdict_of(row)
    assert (verdict.id, verdict.image, verdict.image_sha256) == (one.id, one.image, one.image_sha256)
    assert (verdict.judge, verdict.shown, verdict.outcome, verdict.reply) == (
        "human:ann",
        drawn.shown,
        "scored",
        choice,
    )
    assert list(verdict.scores) == scored
    outcome, margin = judged([verdict], Rule())
    better = {"1": drawn.shown[0], "2": drawn.shown[1]}.get(choice)
    assert (outcome, margin) == {None: ("tie", 0), 0: ("preferred", 1), 1: ("preferred", -1)}[better]


def test_undo_takes_back_the_latest_verdicts_one_by_one(folder):
    with served(folder, [candidate(folder, number) for number in range(3)]) as server:
        for number in range(3):
            choose(server.url, "1", number)
        assert choose(server.url, "undo")["number"] == 2
        assert choose(server.url, "undo")["number"] == 1
        assert scores(folder) == {"a.png#0": [2, 1], "a.png#1": None, "a.png#2": None}
        assert choose(server.url, "2", 1)["number"] == 2
        assert choose(server.url, "undo")["number"] == 1  # and not 0: what was chosen again is the latest
        assert choose(server.url, "tie", 1)["number"] == 2
    assert scores(folder) == {"a.png#0": [2, 1], "a.png#1": [1, 1], "a.png#2": None}
    assert verdict_of(read_rows(folder / "judged.jsonl")[3]).why == "undone"
    assert judged([verdict_of(read_rows(folder / "judged.jsonl")[3])], Rule())[0] == "not scored"


def test_undo_of_nothing_writes_nothing(folder):
    with served(folder, [candidate(folder)]) as server:
        assert choose(server.url, "undo")["number"] == 0
    assert scores(folder) == {}


def test_what_is_skipped_comes_again_at_the_end(folder):
    with served(folder, [candidate(folder, number) for number in range(3)]) as server:
        assert choose(server.url, "skip", 0)["number"] == 1
        choose(server.url, "1", 1)
        after = choose(server.url, "1", 2)
        assert (after["judged"], after["skipped"], after["number"]) == (2, 1, None)
        after = choose(server.url, "again")
        assert (after["skipped"], after["number"]) == (0, 0)
        assert choose(server.url, "1", 0)["judged"] == 3


def test_a_restart_goes_on_with_what_is_left_and_undoes_what_was_before(folder):
    candidates = [candidate(folder, number) for number in range(4)]
    with served(folder, candidates) as server:
        choose(server.url, "1", 0)
        before = choose(server.url, "2", 1)
    with served(folder, candidates) as server:
        assert state(server.url) == before
        assert choose(server.url, "undo")["number"] == 1
    with served(folder, candidates, name="bob") as server:
        assert state(server.url)["judged"] == 0


def test_undo_after_a_restart_with_another_seed_replaces_the_row_that_was_written(folder):
    candidates = [candidate(folder, number) for number in range(4)]
    with served(folder, candidates) as server:
        for number in range(4):
            choose(server.url, "1", number)
    with served(folder, candidates, seed=1) as server:
        for _ in range(4):
            choose(server.url, "undo")
    rows = {verdict_of(row).key: row["outcome"] for row in read_rows(folder / "judged.jsonl")}
    assert list(rows.values()) == ["unknown"] * 4


SERVE = """
import sys
from pathlib import Path
from stllava_train.preferences.judges.human_judge import serve
from stllava_train.preferences.rows import Candidate
from stllava_train.preferences.verdicts import verdict_of
from stllava_train.resumable import ResumableJsonl

folder, sha256 = Path(sys.argv[1]), sys.argv[2]
candidates = [Candidate(f"a.png#{number}", "a.png", sha256, f"Question {number}?", ("A", "B")) for number in range(4)]
verdicts = ResumableJsonl(folder / "judged.jsonl", lambda row: verdict_of(row).key, {"stage": "judge"})
serve(candidates, folder, verdicts, "ann")
"""


def test_a_killed_server_loses_nothing(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, folder, candidate(folder).image_sha256], stderr=subprocess.PIPE, text=True
    )
    (url,) = re.findall(r"judge at (http://127\.0\.0\.1:\d+/) ", process.stderr.readline())
    for number in range(3):
        choose(url, "1", number)
    process.kill()
    process.communicate()
    assert list(scores(folder).values()) == [[2, 1]] * 3
    with served(folder, [candidate(folder, number) for number in range(4)]) as server:
        assert state(server.url)["number"] == 3


def test_ctrl_c_ends_it_and_says_how_many_are_judged(folder, capsys, signals):
    def person() -> None:
        while not (found := re.findall(r"judge at (\S+) ", capsys.readouterr().err)):
            time.sleep(0.02)
        choose(found[0], "1", 0)
        choose(found[0], "tie", 2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = Thread(target=person)
    thread.start()
    ledger = open_ledger(folder)
    assert serve([candidate(folder, number) for number in range(3)], folder, ledger, "ann") == 2
    thread.join()
    ledger.close()


def test_a_server_that_has_ended_writes_no_more(folder):
    with served(folder, [candidate(folder)]) as server:
        pass
    with pytest.raises(InputError, match="stopping"):
        server.reading.choose("1", 0)


def test_a_full_disk_is_said_on_the_page_and_nothing_counts(folder, monkeypatch):
    def full(_):
        raise InputError("judged.jsonl: cannot be written (No space left on device).")

    with served(folder, [candidate(folder)]) as server:
        monkeypatch.setattr(server.reading.ledger, "add", full)
        body = b'{"choice": "1", "number": 0}'
        status, text, _ = asked(server.url + "choose", body, X_Token=server.token)
        assert (status, text) == (500, b"judged.jsonl: cannot be written (No space left on device).")
        assert state(server.url)["judged"] == 0


@pytest.mark.parametrize(
    ("name", "port", "count", "message"),
    [
        pytest.param("ann", 0, 0, "no candidates", id="nothing to judge"),
        pytest.param(" ", 0, 1, "--human ' ': no name", id="no name"),
        pytest.param("a\nb", 0, 1, "--human", id="two lines"),
        pytest.param("ann", 99999, 1, "--port 99999", id="no such port"),
    ],
)
def test_a_wrong_call_is_refused(folder, name, port, count, message):
    ledger = open_ledger(folder)
    with pytest.raises(InputError, match=message):
        HumanJudgeServer([candidate(folder)] * count, folder, ledger, name, port=port)
    ledger.close()


def test_a_port_that_is_taken_is_refused(folder):
    with served(folder, [candidate(folder)]) as server, pytest.raises(InputError, match="in use"):
        HumanJudgeServer([candidate(folder)], folder, server.reading.ledger, "bob", port=server.server_port)


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["CMYK", "I;16", "RGBA", "1"])
def test_an_image_is_shown_as_the_model_saw_it(folder, mode):
    PIL.Image.linear_gradient("L").convert("I" if mode == "I;16" else mode).save(folder / "c.tiff")
    one = candidate(folder, image="c.tiff")
    with served(folder, [one]) as server:
        status, body, headers = asked(f"{server.url}image/{state(server.url)['image']}")
    with PIL.Image.open(io.BytesIO(body)) as shown:
        assert (status, headers["Content-Type"], shown.format) == (200, "image/png", "PNG")
        assert pixel_hash(shown) == one.image_sha256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"no image", "a.png: 8 bytes are no JPEG", id="broken"),
        pytest.param(None, "a.png: cannot be read (No such file or directory)", id="gone"),
        pytest.param("b.png", "a.png: not the picture that the model was asked about", id="another"),
    ],
)
def test_an_image_that_cannot_be_shown_says_why_and_can_be_skipped(folder, content, message):
    one = candidate(folder)
    if content is None:
        (folder / "a.png").unlink()
    else:
        (folder / "a.png").write_bytes(content if isinstance(content, bytes) else (folder / content).read_bytes())
    with served(folder, [one, candidate(folder, image="b.png")]) as server:
        status, body, headers = asked(f"{server.url}image/{one.image_sha256}")
        assert (status, headers["Content-Type"]) == (500, "text/plain; charset=utf-8")
        assert message in body.decode()
        assert choose(server.url, "skip", 0)["number"] == 1


# --- who may ----------------------------------------------------------------------------------------------------------


def test_the_page_and_all_replies_forbid_what_they_do_not_need(folder):
    with served(folder, [candidate(folder)]) as server:
        _, page, headers = asked(server.url)
        policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == "'none'"
        nonce = policy["script-src"].removeprefix("'nonce-").removesuffix("'")
        assert page.decode().count(f'nonce="{nonce}"') == 2
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert asked(server.url)[2]["Content-Security-Policy"] != headers["Content-Security-Policy"]
        for path in ("", "state", f"image/{candidate(folder).image_sha256}", "nothing"):
            headers = asked(server.url + path)[2]
            assert (headers["Cache-Control"], headers["X-Content-Type-Options"]) == ("no-store", "nosniff")
            assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert "Access-Control-Allow-Origin" not in headers
        assert server.server_address[0] == "127.0.0.1"
        assert b"Research only; not for clinical use." in page
        assert not re.search(rb"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", page)


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        pytest.param({"X-Token": "wrong"}, "{}", 403, id="wrong token"),
        pytest.param({"X-Token": None}, "{}", 403, id="no token"),
        pytest.param({"X-Token": "ä"}, "{}", 403, id="a token that is not ASCII"),
        pytest.param({"Host": "evil.example"}, '{"choice": "1", "number": 0}', 403, id="wrong host"),
        pytest.param({"Host": "127.0.0.1:1"}, '{"choice": "1", "number": 0}', 403, id="wrong port"),
        pytest.param({"Host": None}, '{"choice": "1", "number": 0}', 403, id="no host"),
        pytest.param({"Content-Length": str(BODY_BYTES + 1)}, "", 413, id="long body"),
        pytest.param({"Content-Length": "000000000000000099999"}, "", 413, id="long body, long number"),
        pytest.param({"Content-Length": "-1"}, "", 411, id="negative length"),
        pytest.param({"Content-Length": None}, "", 411, id="no length"),
        pytest.param({}, "[" * 4000, 400, id="deep JSON"),
        pytest.param({}, "[]", 400, id="a list"),
        pytest.param({}, '{"choice": "3", "number": 0}', 400, id="no such choice"),
        pytest.param({}, '{"choice": ["1"], "number": 0}', 400, id="a choice that is a list"),
        pytest.param({}, '{"choice": "1", "number": 1}', 400, id="no such question"),
        pytest.param({}, '{"choice": "1", "number": -1}', 400, id="a question from the end"),
        pytest.param({}, '{"choice": "1", "number": true}', 400, id="a question that is no number"),
        pytest.param({}, "\xff", 400, id="no text"),
    ],
)
def test_a_wrong_post_is_refused_and_nothing_is_written(folder, headers, body, status):
    with served(folder, [candidate(folder)]) as server:
        right = {"Host": f"localhost:{server.server_port}", "X-Token": server.token, "Content-Length": str(len(body))}
        connection = HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        connection.putrequest("POST", "/choose", skip_host=True)
        for name, value in (right | headers).items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body.encode("latin-1"))
        assert connection.getresponse().status == status
        connection.close()
    assert scores(folder) == {}


@pytest.mark.parametrize("path", ["", "state", "image/{sha256}"])
def test_a_page_of_another_name_reads_nothing(folder, path):
    with served(folder, [candidate(folder)]) as server:
        status, body, _ = asked(
            server.url + path.format(sha256=candidate(folder).image_sha256), Host=f"evil.example:{server.server_port}"
        )
        assert (status, server.token.encode() in body) == (403, False)


@pytest.mark.parametrize(
    "path",
    [
        "/image/a.png",
        "/image/../a.png",
        "/image/..%2f..%2fetc%2fpasswd",
        "/image//etc/passwd",
        "/a.png",
        "/judged.jsonl",
        "//etc/passwd",
        "/image/",
    ],
)
def test_no_path_leads_to_a_file(folder, path):
    with served(folder, [candidate(folder)]) as server:
        connection = HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        connection.request("GET", path)  # as it stands: urllib and browsers would shorten it
        reply = connection.getresponse()
        assert (reply.status, reply.read()) == (404, b"no such page")
        connection.close()


def test_hostile_answers_come_as_text_in_json_and_never_in_the_page(folder):
    with served(folder, [candidate(folder, answers=HOSTILE)]) as server:
        status, body, headers = asked(server.url + "state")
        assert (status, headers["Content-Type"]) == (200, "application/json")
        assert sorted(json.loads(body)["answers"]) == sorted(HOSTILE)
        assert b"hacked" not in asked(server.url)[1]


# --- in a browser -----------------------------------------------------------------------------------------------------


def test_keys_and_mouse_judge_what_is_on_the_screen(folder, browser):
    candidates = [candidate(folder, number, answers=HOSTILE) for number in range(5)]
    (folder / "c.png").write_bytes((folder / "b.png").read_bytes())
    candidates.append(candidate(folder, image="c.png"))
    (folder / "c.png").write_bytes(b"broken")
    first = blind_questions(candidates, "ann", 0)[0]

    def at(count: str) -> None:
        browser.wait(f"document.title.startsWith({count!r}) && !document.querySelector('[data-choice=skip]').disabled")

    with served(folder, candidates) as server:
        browser.open(server.url)
        at("1 of 6")
        browser.wait(IMAGE)
        shown = browser.value("[first.textContent, second.textContent, question.textContent]")
        assert shown == [*(HOSTILE[place] for place in first.shown), "Question 0?"]
        browser.press("1", autoRepeat=True)  # a key held down
        browser.press("1", modifiers=2)  # Ctrl-1 goes to another tab
        browser.press("x")
        browser.press("1")
        at("2 of 6")
        browser.press("0")
        at("3 of 6")
        assert scores(folder) == {"a.png#0": [2, 1], "a.png#1": [1, 1]}
        browser.press("u")
        at("2 of 6")
        browser.press("2")
        at("3 of 6")
        browser.press("z")
        assert browser.value("figure.className") == "large"
        browser.press("T")
        at("4 of 6")
        browser.press("s")
        at("4 of 6, 1 skipped")
        browser.click("[data-choice='2']")
        at("5 of 6, 1 skipped")
        browser.wait("broken.textContent.includes('no JPEG, PNG, BMP')")
        browser.press("1")
        browser.wait("said.textContent.includes('Not saved')")
        browser.press("s")
        at("4 of 6 judged, 2 skipped")
        browser.press("s")  # again
        at("5 of 6")
        browser.wait(IMAGE)
        browser.press("2")
        at("6 of 6")
        assert browser.value("[figure.className, typeof window.hacked]") == ["", "undefined"]
    assert scores(folder) == {
        "a.png#0": [2, 1],
        "a.png#1": [1, 2],
        "a.png#2": [1, 1],
        "a.png#3": [1, 2],
        "a.png#4": [1, 2],
    }
    assert "c.png#0" not in scores(folder)


def test_nothing_sticks_out_of_the_page_at_any_width(folder, browser):
    long = ("a" * 300, "a sentence of several words " * 40)
    with served(folder, [candidate(folder, answers=long)]) as server:
        for width in (320, 400, 640, 899, 900, 1280, 1920):
            browser.open(server.url, width=width)
            browser.wait(IMAGE)
            assert (width, browser.sticking_out()) == (width, [])


def test_the_page_says_that_the_server_has_stopped(folder, browser):
    with served(folder, [candidate(folder)]) as server:
        browser.open(server.url)
        browser.wait(IMAGE)
    browser.press("1")
    browser.wait("said.textContent.includes('The server has stopped; nothing was saved')")
    assert scores(folder) == {}
