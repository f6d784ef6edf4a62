"""Ask through OpenAI's Batch API, which answers within a day at half the price: requests -> replies."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.errors import InputError, NotThereError
from stllava_eval.inference.replies import Bill, Failure
from stllava_eval.storage import read_json, write_json

if TYPE_CHECKING:
    from stllava_eval.inference.endpoint import Endpoint, Request
    from stllava_eval.inference.replies import Reply

BATCH_REQUESTS, BATCH_BYTES = 50_000, 150_000_000  # OpenAI's limits are 50,000 and 200 MB
# Our choice: about the most bytes that a reply and each of its tokens take in a batch's file, which must be readable
ROW_BYTES, TOKEN_BYTES = 2048, 6
GIVEN_UP = ("failed", "expired", "cancelled")  # states of a batch that has ended early; its files have what it answered
NAME = re.compile(r'"custom_id"\s*:\s*"([^"\\]+)"')  # also in a line that is cut; our own ids hold no escapes

Room = tuple[int, int]
"""Tokens of a reply and of its thought, at most."""


class Batches:
    """The batches of a judge that are under way, whose ids are in a file beside those of other judges.

    The file of a batch's requests is written down before the batch is made of it. If a kill then comes before the id of
    the batch is known, the next call finds the batch by that file, so that nothing is paid twice.

    Args:
        endpoint: The server.
        file: `NAME.batches.json`.
        judge: The judge whose batches these are.

    Raises:
        InputError: The file holds no list of batches.
    """

    def __init__(self, endpoint: Endpoint, file: Path, judge: str) -> None:
        self.endpoint, self.file, self.judge = endpoint, file, judge
        self._all, self._limits, self._begun = _listed(file)
        self.ids = self._all.setdefault(judge, [])
        self._known: dict[str, dict[str, Any]] = {}

    @property
    def under_way(self) -> list[str]:
        """Return the ids of the batches that have not ended, as far as `ended` has seen."""
        return [batch for batch in self.ids if not self._ended(batch)]

    def state(self) -> str:
        """Return in words what the server says of the batches under way."""
        states = []
        for batch in self.under_way:
            states.append(f"batch {batch} is {self._known.get(batch, {}).get('status')}")
        return ", ".join(states)

    def ended(self) -> list[str]:
        """Ask the server for the state of every batch, and return the ids of those that have ended.

        Raises:
            InputError: The server does not answer, or does not know one of them.
        """
        self._find_begun()
        for batch in self.ids:
            self._known[batch] = self._json(partial(_retrieve, batch), batch)
        return [batch for batch in self.ids if self._ended(batch)]

    def error(self, batch: str) -> str:
        """Return what the server says of a batch that it did not begin, code and message; empty for any other batch."""
        known = self._known[batch]
        if known.get("status") != "failed":
            return ""
        errors = known.get("errors")
        errors = errors.get("data") if isinstance(errors, dict) else errors
        messages: dict[str, None] = {}  # in order, each once
        for error in errors if isinstance(errors, list) else []:
            if isinstance(error, dict):
                message = ": ".join(str(error[key]) for key in ("code", "message") if error.get(key))
                messages |= {message: None} if message else {}
        return self.endpoint.line("; ".join(messages)) or "it does not say why"

    def room(self, batch: str, otherwise: Room) -> Room:
        """Return the tokens that each reply of a batch was allowed; `otherwise` where they were not written down."""
        return self._limits.get(batch, otherwise)

    def replies(self, batch: str, max_tokens: int) -> dict[str, Reply | Failure]:
        """Return custom id -> reply or failure, of a batch that has ended. An id in neither of its files was not asked.

        Where several lines have one id, a reply is kept rather than a failure, because it is paid.
        """
        replies: dict[str, Reply | Failure] = {}
        for kind in ("output_file_id", "error_file_id"):
            if not (file := self._known[batch].get(kind)):
                continue
            text = self._call(partial(_content, file), batch)
            for line in text.split("\n"):  # no other sign ends a line of JSON
                if (name := NAME.search(line)) is None:
                    continue
                reply = self._read(line, max_tokens)
                if name[1] not in replies or not isinstance(reply, Failure):
                    replies[name[1]] = reply
        return replies

    def _read(self, line: str, max_tokens: int) -> Reply | Failure:
        """Read the reply or the failure in a line of a batch's file."""
        try:
            row = json.loads(line)
            response = row.get("response") or {}
            if str(response.get("status_code")) == "200":
                return self.endpoint.read_reply(response["body"], max_tokens)
            error = row.get("error") or response.get("body") or {}
            return self.endpoint.read_error(response.get("status_code"), error)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # half a line: it may have been paid
            return Failure("its line in the batch's file cannot be read", 1, again=True, before=Bill(unknown=1))

    def hand_in(self, requests: Iterable[tuple[str, Request]], room: Room) -> None:
        """Make batches of these requests, each with its custom id.

        Args:
            requests: (custom id, request) each, read once; more than one batch holds make several.
            room: Tokens that each reply is allowed.

        Raises:
            InputError: The server declines.
        """
        from stllava_eval.inference.endpoint import LARGEST_FILE  # with openai's client

        most = max(1, min(BATCH_REQUESTS, LARGEST_FILE // (ROW_BYTES + TOKEN_BYTES * sum(room))))
        lines: list[bytes] = []
        size = 0
        for name, request in requests:
            row = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": request}
            line = json.dumps(row).encode() + b"\n"
            if lines and (len(lines) == most or size + len(line) > BATCH_BYTES):
                self._hand_in(lines, room)
                lines, size = [], 0
            lines.append(line)
            size += len(line)
        self._hand_in(lines, room)

    def forget(self, batch: str) -> None:
        """Note that a batch has been read, so that later calls pass it over."""
        self.ids.remove(batch)
        self._limits.pop(batch, None)
        self._write()

    def _hand_in(self, lines: Sequence[bytes], room: Room) -> None:
        """Upload these lines as one file, and make a batch of it."""
        body = b"".join(lines)
        file = self._json(
            lambda client: client.files.with_raw_response.create(file=("judge.jsonl", body), purpose="batch"),
            "file of requests",
        )
        self._begun[self.judge] = (str(file["id"]), room)
        self._write()
        batch = self._json(
            lambda client: client.batches.with_raw_response.create(
                input_file_id=file["id"], endpoint="/v1/chat/completions", completion_window="24h"
            ),
            "new batch",
            once=True,  # a reply that is lost does not mean that none was made; the next call finds it by its file
        )
        self._add(batch)

    def _find_begun(self) -> None:
        """Find the batch that an earlier call was about to make, and add it if it was made."""
        if self.judge not in self._begun:
            return
        after: dict[str, str] = {}
        while True:
            listed = self._json(partial(_list, after), "list of batches")
            batches = [batch for batch in listed.get("data") or () if isinstance(batch, dict)]
            for batch in batches:
                if batch.get("input_file_id") == self._begun[self.judge][0]:
                    self._add(batch)
                    return
            if not listed.get("has_more") or not batches or after.get("after") == batches[-1].get("id"):
                break
            after = {"after": str(batches[-1].get("id"))}
        del self._begun[self.judge]
        self._write()

    def _add(self, batch: dict[str, Any]) -> None:
        """Write down a batch that was made, as the server describes it."""
        _, room = self._begun.pop(self.judge)
        name = str(batch["id"])
        self._known[name] = batch
        self.ids.append(name)
        self._limits[name] = room
        self._write()

    def _ended(self, batch: str) -> bool:
        return self._known.get(batch, {}).get("status") in ("completed", *GIVEN_UP)

    def _call(self, send: Callable[[Any], Any], what: str, once: bool = False) -> str:
        try:
            return self.endpoint.call(send, what, once)
        except NotThereError as error:
            if what not in self.ids:
                raise
            raise InputError(
                f"{error}. If it was handed in elsewhere or with another key, call with those. If it is gone, take "
                f"{what} out of {self.file}: its questions are then asked again."
            ) from error

    def _json(self, send: Callable[[Any], Any], what: str, once: bool = False) -> dict[str, Any]:
        body = self._call(send, what, once)
        try:
            made = dict(json.loads(body))
            if not isinstance(made.get("id", made.get("data")), str | list):
                raise TypeError("it has no id")
            return made
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{self.endpoint.base_url}: {what}: its reply is no object. Call again.") from error

    def _write(self) -> None:
        write_json(self.file, {"format": 1, "batches": self._all, "room": self._limits, "begun": self._begun})


def batches_under_way(file: Path, judge: str) -> list[str]:
    """Return the batches of a judge that were handed in and not read yet, and the file of one that may have been.

    Raises:
        InputError: The file holds no list of batches.
    """
    batches, _, begun = _listed(file)
    return batches.get(judge, []) + ([f"a batch of {begun[judge][0]}"] if judge in begun else [])


def _listed(file: Path) -> tuple[dict[str, list[str]], dict[str, Room], dict[str, tuple[str, Room]]]:
    """Read the file of batches.

    Returns:
        Judge -> its batches that are not read yet; batch -> the room of its replies; judge -> the file of requests of
        which a batch was about to be made, and the room of its replies.
    """
    if not file.exists():
        return {}, {}, {}
    try:
        listed = read_json(file)
        return (
            {str(judge): list(map(str, ids)) for judge, ids in listed["batches"].items()},
            {str(batch): _room(room) for batch, room in listed.get("room", {}).items()},
            {str(judge): (str(requests), _room(room)) for judge, (requests, room) in listed.get("begun", {}).items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: no list of batches ({error!r}). Delete it if none is under way.") from error


def _room(value: Any) -> Room:
    """Return the room of replies, as the file has it, as two numbers."""
    tokens, thought = map(int, value)
    return tokens, thought


def _retrieve(batch: str, client: Any) -> Any:
    return client.batches.with_raw_response.retrieve(batch)


def _list(after: dict[str, str], client: Any) -> Any:
    return client.batches.with_raw_response.list(limit=100, **after)


def _content(file: str, client: Any) -> Any:
    return client.files.with_raw_response.content(file)
