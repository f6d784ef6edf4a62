"""Append rows as they arrive; the file survives kills, and is complete and in order when the job ends.

Candidates, verdicts and pairs are written through here.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from stllava_eval.errors import InputError, one_line
from stllava_eval.storage import has_lone_surrogate, loads, read_bytes, read_json, whole_file, write_json

Row = dict[str, Any]


class ResumableJsonl:
    """A JSONL file to which rows are appended while a job is at work, and beside it its manifest, `NAME.json`.

    The same job called again resumes with the rows that are there; a line that a kill has cut is not read. Rows are
    known by their key, never by their position. One process at a time writes.

    Args:
        path: `NAME.jsonl`.
        key: Of a row; a later row takes the place of an earlier one with the same key.
        decided_by: What decides the rows, as JSON holds it. A job that was decided by something else is not resumed.
        wait: Wait until no other process writes them, for a file that is never finished; finishing makes a new file.

    Raises:
        InputError: The files hold another job, are no such rows, cannot be written, or another process is at them.
    """

    def __init__(
        self, path: Path, key: Callable[[Row], Any], decided_by: Mapping[str, Any], wait: bool = False
    ) -> None:
        self.path, self.key = path, key
        self._lock = Lock()  # threads may add rows at the same time
        self.decided_by: Row = json.loads(json.dumps(decided_by))  # as it will be read back
        if path.suffix != ".jsonl":
            raise InputError(f"{path}: rows go to a file named .jsonl, its manifest beside it to .json. Rename it.")
        self.manifest = path.with_suffix(".json")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}). Free some space or fix it.") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            self._file.truncate(_whole_bytes(path))
            if not path.stat().st_size:  # a call that failed before its first row binds nobody
                write_json(self.manifest, {"format": 1, **self.decided_by, "finished": False})
            elif self.manifest.exists():
                self._compare()
            else:
                raise InputError(
                    f"{path}: its manifest {self.manifest.name} is not beside it. Put it back, or choose another --out."
                )
            self.rows = {key(row): row for row in read_rows(path)}
        except BlockingIOError as error:
            self.close()
            raise InputError(f"{path}: another process is writing it. Wait for it, or choose another --out.") from error
        except InputError:
            self.close()
            raise
        except (ValueError, KeyError, TypeError) as error:
            self.close()
            raise InputError(f"{path}: a row in it is of another kind ({error}). Choose another --out.") from error

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows; when this returns they are on the disk.

        Raises:
            InputError: The disk is full.
        """
        rows = list(rows)
        if not rows:
            return
        with self._lock:
            try:
                self._file.write("".join(map(line, rows)).encode())
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as error:
                raise InputError(
                    f"{self.path}: cannot be written ({error.strerror}). Free some space; the same call continues from "
                    "here."
                ) from error
            self.rows |= {self.key(row): row for row in rows}

    def finish(self, order: Sequence[Any], finished: bool = True, **others: Any) -> None:
        """Write the rows again in the order of these keys, others behind them as they came, and close the file.

        Args:
            order: Keys; those without a row are passed over.
            finished: Whether nothing is left to do.
            others: For the manifest.

        Raises:
            InputError: The disk is full.
        """
        known = dict.fromkeys([key for key in order if key in self.rows]) | dict.fromkeys(self.rows)
        with whole_file(self.path) as unfinished:
            unfinished.write_text("".join(line(self.rows[key]) for key in known), encoding="utf-8")
        write_json(self.manifest, {"format": 1, **self.decided_by, **others, "finished": finished})
        self.close()

    def close(self) -> None:
        """Let others write."""
        self._file.close()

    def __enter__(self) -> ResumableJsonl:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _compare(self) -> None:
        before = read_manifest(self.path)
        for name in sorted(self.decided_by, key=lambda name: (name.endswith("sha256"), name)):  # causes before hashes
            if (then := before.get(name)) != (now := self.decided_by[name]):
                raise InputError(
                    f"{self.path}: {_difference(name, then, now)}. Call it as before, or choose another --out."
                )


def _difference(name: str, then: Any, now: Any) -> str:
    """Say of the first value that differs what it was when the rows were made, and what it is in this call."""
    if isinstance(then, dict) and isinstance(now, dict):
        key = next(key for key in sorted({*then, *now}) if then.get(key) != now.get(key))
        return _difference(f"{name}.{key}", then.get(key), now.get(key))
    short = [text if len(text := json.dumps(value)) < 80 else f"{text[:80]}..." for value in (then, now)]
    return f"{name}: the rows in it were made with {short[0]}, and this call has {short[1]}"


def line(row: Row) -> str:
    """Return the row as a line of JSONL, its keys in their order."""
    text = json.dumps(row, ensure_ascii=False)
    if has_lone_surrogate(text) or re.search("[\u2028\u2029]", text):  # some readers end a line at these two
        text = json.dumps(row)
    return text + "\n"


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a JSONL file.

    Raises:
        InputError: It cannot be read, or a line is no object.
    """
    try:
        lines = read_bytes(path).split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Pass a JSONL file of an earlier step.") from error
    rows = []
    for number, text in enumerate(lines if lines[-1] else lines[:-1], 1):
        try:
            row, why = loads(text), repr(text[:60])
        except (ValueError, RecursionError) as error:
            row, why = None, f"{one_line(error)}, in {text[:60]!r}"
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: no row ({why}). Delete the line, or write the file again.")
        rows.append(row)
    return rows


def read_manifest(path: Path) -> Row:
    """Read the manifest beside the rows at `path`.

    Raises:
        InputError: It is missing, or of another kind.
    """
    file = path.with_suffix(".json")
    try:
        manifest = read_json(file)
        if manifest["format"] != 1:
            raise ValueError(f"format {manifest['format']}")
        return dict(manifest)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{file}: no manifest of {path.name} ({error!r}). Put it back, or write {path.name} again."
        ) from error


def _whole_bytes(path: Path) -> int:
    """Return the file's length in bytes without a last line that a kill has cut."""
    whole, end, _ = path.read_bytes().rpartition(b"\n")
    return len(whole + end)
