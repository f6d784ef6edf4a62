"""Let a person judge: a page on this machine shows two answers without saying which came first, and takes a key.

The verdicts go where those of every judge go: into `judged.jsonl`, from which pairs are made.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from stllava_eval.errors import InputError
from stllava_eval.images import open_image, pixel_hash
from stllava_train.preferences.judges.endpoint import now
from stllava_train.preferences.judges.prompt import Comparison, questions
from stllava_train.preferences.rows import Candidate
from stllava_train.preferences.verdicts import HUMAN_PREFIX, Verdict, row_of, verdict_of
from stllava_train.resumable import ResumableJsonl, Row

# Scores of the answers as shown. A person says which is better and not by how much, so that the difference is the least
# one that `verdicts.Rule` counts (our choice)
SCORES = {"1": (2.0, 1.0), "2": (1.0, 2.0), "tie": (1.0, 1.0)}
CHOICES = (*SCORES, "skip", "again", "undo")
BODY_BYTES = 4096  # of a POST, at most (our choice): a choice takes 40
TIMEOUT_S = 10.0  # for a browser to say what it wants (our choice): some open connections ahead of need
PNG_LEVEL = 1  # our choice: of 0 to 9; on one machine quick matters more than small


def blind_questions(candidates: Sequence[Candidate], name: str, seed: int) -> list[Comparison]:
    """Return every two answers of every candidate once, in their order: questions about one image follow each other.

    Which answer stands first is drawn from seed, name and id alone: a restart shows the same; to another person it is
    drawn again, lest a liking for the first answer look like agreement.
    """
    comparisons = []
    for comparison in questions(candidates, both_orders=False):
        key = json.dumps([seed, name, comparison.candidate.id, comparison.shown])
        if random.Random(key).random() < 0.5:
            comparison = replace(comparison, shown=comparison.shown[::-1])
        comparisons.append(comparison)
    return comparisons


class HumanJudging:
    """Where a person is among the questions. All of it follows from the ledger, but for what is skipped for now.

    A question is due as long as its last verdict has no scores. The ledger only appends: undo puts a row without
    scores, outcome "unknown", in the place of the verdict.
    """

    def __init__(self, candidates: Sequence[Candidate], ledger: ResumableJsonl, name: str, seed: int) -> None:
        self.judge, self.ledger = HUMAN_PREFIX + name, ledger
        self.asked = blind_questions(candidates, name, seed)
        self.skipped: set[int] = set()
        self.closed = False
        self._lock = Lock()  # a browser asks several things at once
        # by the numbers of the questions, the latest verdict last
        self.verdicts: dict[int, Verdict] = {}
        numbers = {(one.candidate.id, frozenset(one.shown)): number for number, one in enumerate(self.asked)}
        mine = [verdict_of(row) for row in ledger.rows.values() if row["judge"] == self.judge]
        for verdict in sorted(mine, key=lambda verdict: verdict.date or ""):
            if (number := numbers.get((verdict.id, frozenset(verdict.shown)))) is not None:
                self._keep(number, verdict)

    def judged(self) -> list[int]:
        """Return the numbers of the questions that have scores, the latest last."""
        return [number for number, verdict in self.verdicts.items() if verdict.scores is not None]

    def state(self) -> Row:
        """Return what the page shows: counts, and the next question, whose `number` is None where none is left.

        The latest undone is next, else the first that is due.
        """
        with self._lock:
            judged = self.judged()
            left = {*range(len(self.asked))} - {*judged} - self.skipped
            undone = [number for number in self.verdicts if number in left]
            number = undone[-1] if undone else min(left, default=None)
            state: Row = {
                "judge": self.judge,
                "judged": len(judged),
                "skipped": len(self.skipped),
                "total": len(self.asked),
                "number": number,
            }
            if number is not None:
                question, *answers = self.asked[number].texts()
                state |= {"image": self.asked[number].candidate.image_sha256, "question": question, "answers": answers}
            return state

    def choose(self, choice: str, number: int) -> None:
        """Do what the person chose; a verdict is on the disk when this returns.

        Args:
            choice: One of `CHOICES`. "again" shows what is skipped; "undo" takes back the latest verdict, if any.
            number: Of the question, for the others.

        Raises:
            InputError: The disk is full, or no more verdicts are taken.
        """
        with self._lock:
            if self.closed:
                raise InputError("The server is stopping. Start the same command again.")
            if choice == "again":
                self.skipped.clear()
            elif choice == "skip":
                self.skipped.add(number)
            elif choice != "undo":
                self._write(number, self._verdict(number, choice))
            elif judged := self.judged():
                before = self.verdicts[judged[-1]]
                undone = replace(before, outcome="unknown", scores=None, reply=choice, why="undone", date=now())
                self._write(judged[-1], undone)

    def close(self) -> None:
        """Take no more verdicts; one under way is on the disk when this returns."""
        with self._lock:
            self.closed = True

    def _verdict(self, number: int, choice: str) -> Verdict:
        comparison = self.asked[number]
        return replace(
            comparison.unscored(self.judge),
            outcome="scored",
            scores=SCORES[choice],
            reply=choice,
            date=now(),
            prompt_sha256=hashlib.sha256(json.dumps(comparison.texts()).encode()).hexdigest(),
        )

    def _write(self, number: int, verdict: Verdict) -> None:
        self.ledger.add([row_of(verdict)])
        self._keep(number, verdict)

    def _keep(self, number: int, verdict: Verdict) -> None:
        self.verdicts.pop(number, None)
        self.verdicts[number] = verdict
        self.skipped.discard(number)


class HumanJudgeServer(ThreadingHTTPServer):
    """Shows a person the candidates on 127.0.0.1. `serve_forever` runs it, `shutdown` from another thread stops it.

    Whoever has an account on this machine can open the page while it is up. Other sites in the person's browser cannot
    read it (their requests name another Host) nor choose (they lack the token).

    Args:
        candidates: To be judged.
        images: Folder of their images.
        ledger: Of verdicts, its key `Verdict.key`.
        name: Of the person.
        seed: Of the order on the screen.
        port: 0 takes a free one.

    Raises:
        InputError: There is no candidate, no name, or the port is taken.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        images: Path,
        ledger: ResumableJsonl,
        name: str,
        seed: int = 0,
        port: int = 0,
    ) -> None:
        if not candidates:
            raise InputError(
                "no candidates: nothing to judge. Pass a file in which `stllava-train candidates` kept some."
            )
        if not name.strip() or not name.isprintable():
            raise InputError(f"--human {name!r}: no name. Give the name that is recorded with the verdicts.")
        self.reading = HumanJudging(candidates, ledger, name, seed)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(
                f"--port {port}: cannot be listened at ({error}). Give another, or leave it out."
            ) from error
        self.files = {one.image_sha256: images / one.image for one in candidates}
        self.token = secrets.token_urlsafe()
        self.hosts = {f"{host}:{self.server_port}" for host in ("127.0.0.1", "localhost")}
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def server_close(self) -> None:
        """Let go of the port; no verdict is written after this."""
        super().server_close()
        self.reading.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what went wrong, but for a browser that went away."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def serve(
    candidates: Sequence[Candidate], images: Path, ledger: ResumableJsonl, name: str, seed: int = 0, port: int = 0
) -> int:
    """Let a person judge until Ctrl-C; see `HumanJudgeServer`. Called again, it continues with what is left.

    Returns:
        How many questions this person has judged, in earlier calls too.

    Raises:
        InputError: See `HumanJudgeServer`.
    """
    with HumanJudgeServer(candidates, images, ledger, name, seed, port) as server:
        print(f"judge at {server.url}  (Ctrl-C ends; every verdict is saved at once)", file=sys.stderr, flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(file=sys.stderr)
    return len(server.reading.judged())


# --- HTTP -------------------------------------------------------------------------------------------------------------


class _Refused(Exception):  # noqa: N818 - the request is wrong, not we
    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: HumanJudgeServer
    timeout = TIMEOUT_S

    def do_GET(self) -> None:
        self._reply(self._get)

    def do_POST(self) -> None:
        self._reply(self._post)

    def log_message(self, *_: object) -> None:
        pass

    def _get(self) -> None:
        if self.path == "/":
            nonce = secrets.token_urlsafe()
            page = Path(__file__).with_name("human_judge.html").read_text(encoding="utf-8")
            page = page.replace("{nonce}", nonce).replace("{token}", self.server.token)
            self._send(200, "text/html; charset=utf-8", page.encode(), nonce)
        elif self.path == "/state":
            self._send(200, "application/json", json.dumps(self.server.reading.state()).encode())
        elif file := self.server.files.get(self.path.removeprefix("/image/")):
            self._send(200, "image/png", _png(file, self.path.removeprefix("/image/")))
        else:
            raise _Refused(404, "no such page")

    def _post(self) -> None:
        if not secrets.compare_digest(self.headers.get("X-Token", "").encode(), self.server.token.encode()):
            raise _Refused(403, "The server was started again. Reload the page.")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _Refused(411, "how long is it?")
        if len(length) > len(str(BODY_BYTES)) or int(length) > BODY_BYTES:
            raise _Refused(413, f"more than {BODY_BYTES} bytes")
        try:
            posted = json.loads(self.rfile.read(int(length)))
            choice, number = posted["choice"], posted["number"]
            if self.path != "/choose" or choice not in CHOICES or type(number) is not int:
                raise ValueError
            if not 0 <= number < len(self.server.reading.asked):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _Refused(400, "no choice") from error
        self.server.reading.choose(choice, number)
        self._send(200, "application/json", json.dumps(self.server.reading.state()).encode())

    def _reply(self, what: Callable[[], None]) -> None:
        """Do it, or send why not."""
        try:
            # another site whose name an attacker points at 127.0.0.1 would be let in by the browser, but names itself
            if not {*self.headers.get_all("Host", [""])} <= self.server.hosts:
                raise _Refused(403, f"Open {self.server.url}; a forwarded port must have the same number.")
            what()
        except _Refused as refused:
            self._send(refused.status, "text/plain; charset=utf-8", str(refused).encode())
        except InputError as error:
            self._send(500, "text/plain; charset=utf-8", str(error).encode())

    def _send(self, status: int, kind: str, body: bytes, nonce: str = "") -> None:
        inline = f"'nonce-{nonce}'" if nonce else "'none'"
        policy = (
            f"default-src 'none'; script-src {inline}; style-src {inline}; img-src 'self'; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", policy)
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")  # of patients' images no copy stays in the browser
        self.end_headers()
        self.wfile.write(body)


def _png(file: Path, sha256: str) -> bytes:
    """Return the picture as the model saw it, in an encoding that every browser shows: not all know TIFF or CMYK.

    Raises:
        InputError: The file is broken, gone, or another picture by now.
    """
    picture = open_image(file)
    if pixel_hash(picture) != sha256:
        raise InputError(f"{file}: not the picture that the model was asked about. Put that one back.")
    encoded = io.BytesIO()
    picture.save(encoded, "PNG", compress_level=PNG_LEVEL)
    return encoded.getvalue()
