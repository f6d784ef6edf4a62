"""Requests -> replies through OpenAI's Batch API, which takes a day and half the price."""

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
ROW_BYTES, TOKEN_BYTES = 2048, 6  # of a reply in a batch's file, at most about, so that we can read it (our choice)
GIVEN_UP = ("failed", "expired", "cancelled")  # states of a batch; what it has answered is in its files
NAME = re.compile(r'"custom_id"\s*:\s*"([^"\\]+)"')  # in a line that may be cut; ours hold no escapes

Room = tuple[int, int]
"""Tokens of a reply and of its thought, at most."""


class Batches:
    """The batches of a judge that are under way. Their ids are in a file, with those of other judges.

    The file of a batch's requests is written down before the batch is made of it. If a kill then comes before the id of
    the batch is known, the next call finds the batch by that file, so that nothing is paid twice.

    Args:
        endpoint: The server.
        file: `NAME.batches.json`.
        judge: Whose batches.

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
        """Those that have not ended, as far as `ended` has seen."""
        return [one for one in self.ids if not self._ended(one)]

    def state(self) -> str:
        """What the server says of those under way."""
        return ", ".join(f"batch {one} is {self._known.get(one, {}).get('status')}" for one in self.under_way)

    def ended(self) -> list[str]:
        """Those that have ended, asked of the server.

        Raises:
            InputError: The server does not answer, or does not know one of them.
        """
        self._find_begun()
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

    def room(self, batch: str, otherwise: Room) -> Room:
        """What each of its replies was allowed; `otherwise` where it was not written down."""
        return self._limits.get(batch, otherwise)

    def replies(self, batch: str, max_tokens: int) -> dict[str, Reply | Failure]:
        """Custom id -> what came, of a batch that has ended. What is in neither of its files was not asked.

        Where there are several of one id, a reply is kept, as it is paid.
        """
        found: dict[str, Reply | Failure] = {}
        for kind in ("output_file_id", "error_file_id"):
            if not (file := self._known[batch].get(kind)):
                continue
            text = self._call(partial(_content, file), batch)
            for line in text.split("\n"):  # no other sign ends a line of JSON
                if (name := NAME.search(line)) is None:
                    continue
                came = self._read(line, max_tokens)
                if name[1] not in found or not isinstance(came, Failure):
                    found[name[1]] = came
        return found

    def _read(self, line: str, max_tokens: int) -> Reply | Failure:
        try:
            row = json.loads(line)
            response = row.get("response") or {}
            if str(response.get("status_code")) == "200":
                return self.endpoint.read_reply(response["body"], max_tokens)
            said = row.get("error") or response.get("body") or {}
            return self.endpoint.read_error(response.get("status_code"), said)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # half a line: it may have been paid
            return Failure("its line in the batch's file cannot be read", 1, again=True, before=Bill(unknown=1))

    def hand_in(self, requests: Iterable[tuple[str, Request]], room: Room) -> None:
        """Make batches of these requests, each with its custom id.

        Args:
            requests: They may be many.
            room: What each reply is allowed.

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
        """Note that it has been read."""
        self.ids.remove(batch)
        self._limits.pop(batch, None)
        self._write()

    def _hand_in(self, lines: Sequence[bytes], room: Room) -> None:
        body = b"".join(lines)
        file = self._json(
            lambda client: client.files.with_raw_response.create(file=("judge.jsonl", body), purpose="batch"),
            "file of requests",
        )
        self._begun[self.judge] = (str(file["id"]), room)
        self._write()
        made = self._json(
            lambda client: client.batches.with_raw_response.create(
                input_file_id=file["id"], endpoint="/v1/chat/completions", completion_window="24h"
            ),
            "new batch",
            once=True,  # a reply that is lost does not mean that none was made; the next call finds it by its file
        )
        self._add(made)

    def _find_begun(self) -> None:
        """The batch that an earlier call was about to make, if it was made."""
        if self.judge not in self._begun:
            return
        after: dict[str, str] = {}
        while True:
            listed = self._json(partial(_list, after), "list of batches")
            some = [one for one in listed.get("data") or () if isinstance(one, dict)]
            for one in some:
                if one.get("input_file_id") == self._begun[self.judge][0]:
                    self._add(one)
                    return
            if not listed.get("has_more") or not some or after.get("after") == some[-1].get("id"):
                break
            after = {"after": str(some[-1].get("id"))}
        del self._begun[self.judge]
        self._write()

    def _add(self, made: dict[str, Any]) -> None:
        """Write down a batch that was made."""
        _, room = self._begun.pop(self.judge)
        name = str(made["id"])
        self._known[name] = made
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
    """The batches of a judge that were handed in and not read yet, and the file of one that may have been.

    Raises:
        InputError: The file holds no list of batches.
    """
    batches, _, begun = _listed(file)
    return batches.get(judge, []) + [f"a batch of {of[0]}" for name, of in begun.items() if name == judge]


def _listed(file: Path) -> tuple[dict[str, list[str]], dict[str, Room], dict[str, tuple[str, Room]]]:
    """(of each judge the batches that are not read yet, what the replies of each were allowed, and of each judge the
    file of requests of which a batch was about to be made, with what its replies were allowed)."""
    if not file.exists():
        return {}, {}, {}
    try:
        found = read_json(file)
        return (
            {str(name): list(map(str, ids)) for name, ids in found["batches"].items()},
            {str(name): _room(room) for name, room in found.get("room", {}).items()},
            {str(name): (str(one), _room(room)) for name, (one, room) in found.get("begun", {}).items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: no list of batches ({error!r}). Delete it if none is under way.") from error


def _room(found: Any) -> Room:
    tokens, thought = map(int, found)
    return tokens, thought


def _retrieve(batch: str, client: Any) -> Any:
    return client.batches.with_raw_response.retrieve(batch)


def _list(after: dict[str, str], client: Any) -> Any:
    return client.batches.with_raw_response.list(limit=100, **after)


def _content(file: str, client: Any) -> Any:
    return client.files.with_raw_response.content(file)
