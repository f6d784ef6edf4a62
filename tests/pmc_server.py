"""A small PubMed Central on this machine: figures, packages and LLaVA-Med's two files, going wrong as it is told."""

from __future__ import annotations

import io
import tarfile
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class PmcServer:
    """`with PmcServer() as server: server.files["/PMC1.1/a.jpg"] = ...`.

    `files` holds what each path answers; `faults` what goes wrong there the first, second, ... time; `pause` is how
    many seconds each reply takes; `asked` are the paths in the order of arrival.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.pause = 0.0
        self.asked: list[str] = []
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._http = _Http(("127.0.0.1", 0), _Handler)
        self._http.pmc = self
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> PmcServer:
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def answer(self, handler: _Handler) -> None:
        with self._lock:
            self.asked.append(handler.path)
            left = self.faults.get(handler.path)
            fault = left.pop(0) if left else None
        if self.pause:
            self.closing.wait(self.pause)
        if fault:
            fault(handler)
        elif handler.path in self.files:
            handler.sends(200, self.files[handler.path])
        else:
            handler.sends(404, b"no such file")


class _Handler(BaseHTTPRequestHandler):
    server: _Http

    def do_GET(self) -> None:
        self.server.pmc.answer(self)

    def sends(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class _Http(ThreadingHTTPServer):
    pmc: PmcServer
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """The client went away: that is what some tests are about."""


Fault = Callable[[_Handler], None]


def refuses(status: int, **headers: str) -> Fault:
    """An HTTP error; `Retry_After="1"` adds a header."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler: handler.sends(status, b"not now", named)


def half_a_reply(handler: _Handler) -> None:
    """The connection ends before the body does."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"half")


def hangs_up(handler: _Handler) -> None:
    """No reply at all."""


def silence(handler: _Handler) -> None:
    """No byte until the server closes."""
    handler.server.pmc.closing.wait(30)


def package(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    """A tar.gz of these members; a TarInfo is taken as it is, without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            if isinstance(content, bytes):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                archive.addfile(content)
    return buffer.getvalue()


def link(name: str, target: str) -> tarfile.TarInfo:
    """A symbolic link in an archive."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info
