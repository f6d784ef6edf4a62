"""A small OpenAI-compatible server on this machine that goes wrong as it is told."""

from __future__ import annotations

import base64
import io
import json
import threading
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl

import PIL.Image

MODEL = "tiny"
SNAPSHOT, PROMPT_TOKENS = "tiny-2026-11-01", 1000  # what it says of itself and of a prompt where `reply` is given
KEY_REFUSED = "Incorrect API key provided: {key}"  # a real server shows part of it; this one shows all


class FaultServer:
    """`with FaultServer(...) as server: ServerAnswerer(server.url)`.

    Args:
        faults: For a question's text, or for the number of a request (from 0, in the order of arrival), what goes wrong
            in the first, second, ... attempt. Without a fault (left), the answer is the text and the image's colour.
        models: What `/v1/models` lists; a fault in place of the list is what happens there.
        pause: Seconds that every reply takes.
        reply: What is answered to a request without a fault; a fault in place of a text happens.
    """

    def __init__(
        self,
        faults: dict[str | int, list[Fault]] | None = None,
        models: list[str] | Fault | None = None,
        pause: float = 0.0,
        reply: Callable[[dict[str, Any]], str | Fault] | None = None,
    ) -> None:
        self.faults = {key: list(all_of_them) for key, all_of_them in (faults or {}).items()}
        self.models = [MODEL] if models is None else models
        self.pause, self.reply = pause, reply or answer
        self.requests: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}  # of the Batch API; see `answer_batches`
        self.keys: list[str | None] = []
        self.bill: list[tuple[int, int]] = []  # tokens of prompt and reply of all that is not answered by an error
        self.most_at_once = self.replied = 0
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._http = _Http(("127.0.0.1", 0), _Handler)
        self._http.faulty = self
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> FaultServer:
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Nothing listens from here on."""
        if not self.closing.is_set():
            self.closing.set()
            self._http.shutdown()
            self._http.server_close()
            self._thread.join()

    def answer_batches(self, status: str = "completed", share: float = 1.0, expired: str = "") -> None:
        """What OpenAI does within a day: this share of each batch is answered, and `expired` said of the rest."""
        for batch in self.batches.values():
            if batch["status"] != "in_progress":
                continue
            rows = [json.loads(row) for row in self.files[batch["input_file_id"]].splitlines()]
            done = rows[: round(share * len(rows))]
            lines = []
            for row in reversed(done):  # in no order
                self.requests.append(row["body"])
                captured = _Captured(self)
                said = self.reply(row["body"])
                said(captured) if callable(said) else captured.says(said, usage=PROMPT_TOKENS)
                lines.append({"custom_id": row["custom_id"], "response": captured.response})
            batch |= {"status": status, "output_file_id": self.keep(lines)}
            if expired:
                error = {"code": expired, "message": "not within a day"}
                lines = [{"custom_id": row["custom_id"], "response": None, "error": error} for row in rows[len(done) :]]
                batch["error_file_id"] = self.keep(lines)

    def keep(self, lines: list[dict[str, Any]]) -> str:
        """A file of these lines."""
        name = f"file-{len(self.files)}"
        self.files[name] = "".join(json.dumps(row) + "\n" for row in lines).encode()
        return name

    def asked(self) -> list[str]:
        """The text of every request, in the order of arrival."""
        return [text(request) for request in self.requests]

    def complete(self, handler: _Handler, request: dict[str, Any]) -> None:
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            self.most_at_once = max(self.most_at_once, len(self.requests) - self.replied)
            left = self.faults.get(number) or self.faults.get(text(request))
            fault = left.pop(0) if left else None
        if self.pause:
            self.closing.wait(self.pause)
        with self._lock:
            self.replied += 1  # before its first byte: the client may ask again before we come back from the last one
        if self.closing.is_set():
            hangs_up(handler)
            return
        said = fault or self.reply(request)
        if fault in LOST or getattr(fault, "lost", False):  # it has thought, and bills it, and the reply is lost
            told = self.reply(request)
            self.bill.append((PROMPT_TOKENS, len(told.split()) if isinstance(told, str) else 0))
        said(handler) if callable(said) else handler.says(said, usage=PROMPT_TOKENS if self.reply != answer else 0)


def text(request: dict[str, Any]) -> str:
    """The text of a request's last message."""
    content = request["messages"][-1]["content"]
    return content if isinstance(content, str) else next(part["text"] for part in content if part["type"] == "text")


def answer(request: dict[str, Any]) -> str:
    """What is answered: the text, and the colour of the image."""
    content = request["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    url = content[0]["image_url"]["url"].removeprefix("data:image/png;base64,")
    return f"{content[-1]['text']} {PIL.Image.open(io.BytesIO(base64.b64decode(url))).getpixel((0, 0))}"


def bills(server: FaultServer, status: int, body: Any) -> None:
    """Put what a reply comes to on the bill."""
    if status == 200 and isinstance(body, dict) and isinstance(usage := body.get("usage"), dict):
        server.bill.append((usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)))


class _Captured:
    """In place of a connection: what would be sent, for the file of a batch."""

    def __init__(self, server: FaultServer) -> None:
        self.server, self.headers, self.faulty = self, {"Authorization": ""}, server
        self.response: dict[str, Any] = {}

    def sends(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        bills(self.faulty, status, body)
        self.response = {"status_code": status, "body": body}

    def says(self, *given: Any, **named: Any) -> None:
        _Handler.says(self, *given, **named)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http

    def do_GET(self) -> None:
        faulty = self.server.faulty
        faulty.keys.append(self.headers["Authorization"])
        where, _, asked = self.path.removeprefix("/v1/").partition("?")
        path = where.split("/")
        if path == ["batches"]:
            listed = list(faulty.batches.values())[::-1]  # the newest first
            after = dict(parse_qsl(asked)).get("after")
            listed = listed[[one["id"] for one in listed].index(after) + 1 :] if after else listed
            self.sends(200, {"object": "list", "data": listed[:100], "has_more": len(listed) > 100})
        elif path[0] == "batches" and path[1] in faulty.batches:
            self.sends(200, faulty.batches[path[1]])
        elif path[0] == "files" and path[1] in faulty.files:
            self.sends(200, faulty.files[path[1]])
        elif self.path != "/v1/models":
            self.sends(404, {"detail": "Not Found"})
        elif callable(faulty.models):
            faulty.models(self)
        else:
            self.sends(200, {"object": "list", "data": [{"id": name} for name in faulty.models]})

    def do_POST(self) -> None:
        faulty = self.server.faulty
        faulty.keys.append(self.headers["Authorization"])
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/files":
            start = body.index(b"{", body.index(b'filename="'))
            faulty.files[name := f"file-{len(faulty.files)}"] = body[start : body.rindex(b"}") + 1]
            self.sends(200, {"id": name, "object": "file"})
            return
        request = json.loads(body)
        if self.path == "/v1/batches":
            name = f"batch-{len(faulty.batches)}"
            faulty.batches[name] = {"id": name, "object": "batch", "status": "in_progress", **request}
            self.sends(200, faulty.batches[name])
        elif isinstance(faulty.models, list) and request["model"] not in faulty.models:
            error = {"message": f"The model `{request['model']}` does not exist.", "code": 404}
            self.sends(404, {"error": error})
        else:
            faulty.complete(self, request)

    def says(self, content: str | None, finish: str = "stop", usage: int = 0, **message: Any) -> None:
        choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
        counts = {"completion_tokens": len((content or "").split())} | ({"prompt_tokens": usage} if usage else {})
        self.sends(200, {"choices": [choice], "usage": counts} | ({"model": SNAPSHOT} if usage else {}))

    def sends(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        bills(self.server.faulty, status, body)
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        named = {"Content-Type": "application/json", "Content-Length": str(len(raw))} | (headers or {})
        for name, value in named.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        pass


class _Http(ThreadingHTTPServer):
    faulty: FaultServer
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """The client went away: that is what some tests are about."""


# what can go wrong --------------------------------------------------------------------------------------------------

Fault = Callable[[_Handler], None]


def refuses(status: int, message: str = "not now", **headers: str) -> Fault:
    """An error as servers send it; `Retry_After="1"` adds a header, `{key}` in the message is the key that came."""

    def fault(handler: _Handler) -> None:
        key = (handler.headers["Authorization"] or "").removeprefix("Bearer ")
        code = "insufficient_quota" if message == "insufficient_quota" else None
        error = {"message": message.replace("{key}", key), "code": code}
        handler.sends(status, {"error": error}, {name.replace("_", "-"): value for name, value in headers.items()})

    return fault


def sends(body: bytes, status: int = 200) -> Fault:
    """These bytes, whatever they are."""

    def fault(handler: _Handler) -> None:
        handler.sends(status, body)

    fault.lost = status == 200
    return fault


def completes(message: Any, finish: Any = "stop", usage: Any = None, **more: Any) -> Fault:
    """Send a chat completion with this message; `more` adds fields next to `choices`."""
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return lambda handler: handler.sends(200, {"choices": [choice], "usage": usage} | more)


def packed(body: bytes, status: int = 200, packing: str = "gzip") -> Fault:
    """These bytes, which are said to be packed."""
    return lambda handler: handler.sends(status, body, {"Content-Encoding": packing})


def bomb(mib: int) -> bytes:
    """As many MiB of blanks, packed by gzip into a thousandth."""
    packer = zlib.compressobj(9, wbits=31)
    return b"".join(packer.compress(b" " * 2**20) for _ in range(mib)) + packer.flush()


def sends_on(address: str, status: int = 307) -> Fault:
    """A redirect."""
    return lambda handler: handler.sends(status, b"", {"Location": address})


def raw(head: bytes, body: bytes = b"") -> Fault:
    """These bytes instead of HTTP, and the connection is closed."""

    def fault(handler: _Handler) -> None:
        handler.wfile.write(head + b"\r\n\r\n" + body)
        handler.close_connection = True

    return fault


def head_alone(handler: _Handler) -> None:
    """The head of a reply, and never its body."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.server.faulty.closing.wait(30)


def says(content: str | None, finish: str = "stop", **message: Any) -> Fault:
    """A reply in good form: an empty one, one without text, a refusal, 8 MB of text."""
    return lambda handler: handler.says(content, finish, **message)


def silence(handler: _Handler) -> None:
    """No byte until the server closes."""
    handler.server.faulty.closing.wait(30)


def hangs_up(handler: _Handler) -> None:
    """The connection is closed without a reply."""
    handler.close_connection = True


def half_a_reply(handler: _Handler) -> None:
    """The connection is closed in the middle of a reply."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"message": {"content": "ha')
    handler.close_connection = True


def slow_bytes(handler: _Handler) -> None:
    """A reply that never stands still and never ends."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while not handler.server.faulty.closing.wait(0.02):
        handler.wfile.write(b" ")
        handler.wfile.flush()


LOST = (silence, hangs_up, half_a_reply, slow_bytes)  # the reply was made, and does not come
