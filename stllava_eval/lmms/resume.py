"""Save the answers of a run while it answers, so that the next run of the same fingerprint resumes from them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from stllava_eval.errors import InputError
from stllava_eval.inference.types import Answer
from stllava_eval.storage import home

LONGEST_MARK = 100  # characters of a thought mark (our choice): the longest known has 22


def question_key(task: str, split: str, doc_id: int, text: str, max_new_tokens: int, until: Sequence[str]) -> str:
    """Return a key of one question, which includes its text and limits; the run's fingerprint says the rest."""
    asked = json.dumps([text, max_new_tokens, until])
    return f"{task}/{split}/{doc_id}/{hashlib.sha256(asked.encode()).hexdigest()[:16]}"


class SavedAnswers:
    """Keep the answers that runs with the same fingerprint have given so far, in `$STLLAVA_HOME/unfinished`.

    Each process of a run appends to a file of its own and reads those of all. A line that a kill has cut is not read.

    Args:
        fingerprint: The hash of what decides an answer: weights, data, prompt, dtype, images.
        rank: The rank of this process.

    Raises:
        InputError: The folder cannot be read or written.
    """

    def __init__(self, fingerprint: str, rank: int) -> None:
        folder, self.files = home() / "unfinished", f"{fingerprint[:32]}-*.jsonl"
        self.file = folder / f"{fingerprint[:32]}-{rank}.jsonl"
        self.answers: dict[str, Answer] = {}
        self.opening = ""
        """The thought mark that earlier replies of the same fingerprint lack, because the template writes it."""
        self._opening_file = folder / f"{fingerprint[:32]}.opening"
        try:
            if self._opening_file.exists():
                self.opening = self._opening_file.read_text(encoding="utf-8", errors="replace")[:LONGEST_MARK]
            for file in sorted(folder.glob(self.files)):
                self.answers.update(_read(file))
            if self.file.exists():  # without the line that a kill has cut
                whole, end, _ = self.file.read_bytes().rpartition(b"\n")
                os.truncate(self.file, len(whole + end))
        except OSError as error:
            raise InputError(f"{self.file}: cannot be used ({error.strerror}). Free some space or fix it.") from error

    def add(self, answers: Sequence[tuple[str, Answer]]) -> None:
        """Append answers; when this returns they are on the disk.

        Raises:
            InputError: The disk is full.
        """
        if not answers:
            return
        lines = [json.dumps({"key": key, **asdict(answer)}, ensure_ascii=False) + "\n" for key, answer in answers]
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab") as file:
                file.write("".join(lines).encode(errors="backslashreplace"))  # half a character: an escape of JSON
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"{self.file}: cannot be written ({error.strerror}). Free some space.") from error

    def remember_opening(self, mark: str) -> None:
        """Save the thought mark that the template writes, for later runs; `done` keeps it.

        Raises:
            InputError: The disk is full.
        """
        if mark == self.opening:
            return
        try:
            self._opening_file.parent.mkdir(parents=True, exist_ok=True)
            self._opening_file.write_text(mark, encoding="utf-8")
        except OSError as error:
            raise InputError(f"{self._opening_file}: cannot be written ({error.strerror}). Free some space.") from error

    def done(self) -> None:
        """Delete the saved answers after the run is written, including those of a stopped run with more processes."""
        for file in self.file.parent.glob(self.files):
            with suppress(OSError):  # another process was faster
                file.unlink()


def _read(file: Path) -> dict[str, Answer]:
    answers = {}
    for line in file.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
            if not isinstance(row["text"], str):
                continue
            answers[row["key"]] = Answer(row["text"], int(row["tokens"]), bool(row["ended"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):  # cut by a kill, or not ours
            continue
    return answers
