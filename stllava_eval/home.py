"""Where data, checkpoints and runs live, and how a file appears there: whole or not at all."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from stllava_eval.errors import InputError


def home() -> Path:
    """`$STLLAVA_HOME`, by default `~/.cache/stllava-med`. Not created here."""
    return Path(os.environ.get("STLLAVA_HOME") or Path.home() / ".cache" / "stllava-med").expanduser()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it becomes `path` when the block ends without an error.

    A reader, or the next run after a kill, sees the old file or the new one and never half of one.

    Raises:
        InputError: The disk is full, or the folder cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}). Free some space or choose another folder."
        ) from error
    finally:
        with suppress(OSError):  # it was never made, or its folder is a file: the error above says so
            unfinished.unlink()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make the folder, and hold it against other processes that ask likewise; a process that dies lets go.

    Raises:
        InputError: It cannot be made, or another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made or read ({error.strerror}). Choose another folder.") from error
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise InputError(f"{folder}: another process is writing it. Wait for it, or choose another folder.") from error
    finally:
        os.close(opened)
        with suppress(OSError):  # it holds something, as a rule
            folder.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8, atomically; what UTF-8 does not have, such as half of a character, as `\\ud800`.

    Raises:
        InputError: See `whole_file`.
    """
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, atomically.

    Raises:
        InputError: See `whole_file`.
    """
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
