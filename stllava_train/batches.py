"""Requests -> replies through OpenAI's Batch API, which takes a day and half the price."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.errors import InputError
from stllava_eval.home import read_json, write_json

if TYPE_CHECKING:
    from stllava_eval.server import Endpoint, Failure, Reply, Request

BATCH_REQUESTS, BATCH_BYTES = 50_000, 150_000_000  # OpenAI's limits are 50,000 and 200 MB
GIVEN_UP = ("failed", "expired", "cancelled")  # states of a batch; what it has answered is in its files


class Batches:
    """The batches of a judge that are under way. Their ids are in a file, with those of other judges.

    A batch that was made when a kill came before its id was written down is found again by its mark, so that nothing
    is paid twice. A batch that has been read is remembered, lest it be found again in the place of a new one.

    Args:
        endpoint: The server.
        file: `NAME.batches.json`.
        judge: Whose batches.

    Raises:
        InputError: The file holds no list of batches.
    """

    def __init__(self, endpoint: Endpoint, file: Path, judge: str) -> None:
        self.endpoint, self.file, self.judge = endpoint, file, judge
        self._all, self._read, self._limits = _listed(file)
        self.ids = self._all.setdefault(judge, [])
        self._known: dict[str, dict[str, Any]] = {}

    @property
    def under_way(self) -> list[str]:
        """Those that have not ended, as far as `ended` has seen."""
        return [one for one in self.ids if not self._ended(one)]

    def state(self) -> str:
        """What the server says of those under way."""
        return ", ".join(f"batch {one} is {self._known.get(one, {}).get('status')}" for one in self.under_way)

    def ended(self) -> list[str]:
        """Those that have ended, asked of the server."""
        for one in self.ids:
            self._known[one] = self._json(partial(_retrieve, one), one)
        return [one for one in self.ids if self._ended(one)]

    def error(self, batch: str) -> str:
        """What the server says of a batch that it did not begin: code and message; empty of any other."""
        known = self._known[batch]
        if known.get("status") != "failed":
            return ""
        errors = known.get("errors")
        errors = errors.get("data") if isinstance(errors, dict) else errors
        said = [
            ": ".join(str(one[key]) for key in ("code", "message") if one.get(key))
            for one in (errors if isinstance(errors, list) else [])
            if isinstance(one, dict)
        ]
        return self.endpoint.line("; ".join(dict.fromkeys(filter(None, said)))) or "it does not say why"

    def limit(self, batch: str, otherwise: int) -> int:
        """Tokens that each of its replies was allowed; `otherwise` where it was not written down."""
        return self._limits.get(batch, otherwise)

    def replies(self, batch: str, max_tokens: int) -> Iterator[tuple[str, Reply | Failure]]:
        """(custom id, what came) of a batch that has ended. What is in neither of its files was not asked."""
        for kind in ("output_file_id", "error_file_id"):
            if not (file := self._known[batch].get(kind)):
                continue
            text = self.endpoint.call(partial(_content, file), batch)
            for line in text.split("\n"):  # no other sign ends a line of JSON
                try:
                    row = json.loads(line)
                    name, response = str(row["custom_id"]), row.get("response") or {}
                    if response.get("status_code") == 200:
                        yield name, self.endpoint.read_reply(response["body"], max_tokens)
                    else:
                        said = row.get("error") or response.get("body") or {}
                        yield name, self.endpoint.read_error(response.get("status_code"), said)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    continue  # half a line; its question is asked again

    def hand_in(self, requests: Iterable[tuple[str, Request]], max_tokens: int) -> None:
        """Make batches of these requests, each with its custom id.

        Raises:
            InputError: The server declines.
        """
        lines: list[bytes] = []
        size = 0
        for name, request in requests:
            row = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": request}
            line = json.dumps(row).encode() + b"\n"
            if lines and (len(lines) == BATCH_REQUESTS or size + len(line) > BATCH_BYTES):
                self._hand_in(lines, max_tokens)
                lines, size = [], 0
            lines.append(line)
            size += len(line)
        self._hand_in(lines, max_tokens)

    def forget(self, batch: str) -> None:
        """Note that it has been read."""
        self.ids.remove(batch)
        self._read.append(batch)
        self._limits.pop(batch, None)
        self._write()

    def _hand_in(self, lines: Sequence[bytes], max_tokens: int) -> None:
        mark = hashlib.sha256(b"".join(lines)).hexdigest()
        listed = self._json(lambda client: client.batches.with_raw_response.list(limit=100), "list of batches")
        made = next(  # a kill may have come between making it and writing it down
            (
                one
                for one in listed.get("data") or ()
                if (one.get("metadata") or {}).get("stllava") == mark
                and one["id"] not in (*self.ids, *self._read)
                and one.get("status") not in GIVEN_UP
            ),
            None,
        )
        if made is None:
            body = b"".join(lines)
            file = self._json(
                lambda client: client.files.with_raw_response.create(file=("judge.jsonl", body), purpose="batch"),
                "file of requests",
            )
            made = self._json(
                lambda client: client.batches.with_raw_response.create(
                    input_file_id=file["id"],
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                    metadata={"stllava": mark},
                ),
                "new batch",
                once=True,  # a reply that is lost does not mean that none was made; the next call finds it by its mark
            )
        self._known[made["id"]] = made
        self.ids.append(made["id"])
        self._limits[made["id"]] = max_tokens
        self._write()

    def _ended(self, batch: str) -> bool:
        return self._known.get(batch, {}).get("status") in ("completed", *GIVEN_UP)

    def _json(self, send: Callable[[Any], Any], what: str, once: bool = False) -> dict[str, Any]:
        try:
            made = json.loads(self.endpoint.call(send, what, once))
            return dict(made)
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{self.endpoint.base_url}: {what}: its reply is no object. Call again.") from error

    def _write(self) -> None:
        write_json(self.file, {"format": 1, "batches": self._all, "read": self._read, "limits": self._limits})


def batches_under_way(file: Path, judge: str) -> list[str]:
    """The batches of a judge that were handed in and not read yet.

    Raises:
        InputError: The file holds no list of batches.
    """
    return _listed(file)[0].get(judge, [])


def _listed(file: Path) -> tuple[dict[str, list[str]], list[str], dict[str, int]]:
    """(of each judge the batches that are not read yet, those that are, tokens that replies of each were allowed)."""
    if not file.exists():
        return {}, [], {}
    try:
        found = read_json(file)
        return (
            {str(name): list(map(str, ids)) for name, ids in found["batches"].items()},
            list(map(str, found.get("read", []))),
            {str(name): int(limit) for name, limit in found.get("limits", {}).items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: no list of batches ({error!r}). Delete it if none is under way.") from error


def _retrieve(batch: str, client: Any) -> Any:
    return client.batches.with_raw_response.retrieve(batch)


def _content(file: str, client: Any) -> Any:
    return client.files.with_raw_response.content(file)
