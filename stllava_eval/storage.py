"""Say where data, checkpoints and runs are kept, write files there whole or not at all, and read files of users safely.

Every room of both packages reads and writes its files through this module.
"""

import atexit
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from stllava_eval.errors import InputError

LONGEST_NAME = 255  # most bytes of a file's name on ext4, XFS, APFS and most other disks (NAME_MAX in limits.h)
# Largest text or JSON file that is read whole (our choice: twice the size of LLaVA's largest mix, 665k, of 1.0 GB).
TEXT_BYTES = 2**31


def home() -> Path:
    """Return `$STLLAVA_HOME`, by default `~/.cache/stllava-med`. It is not created here.

    Raises:
        InputError: It begins with `~` and the name of a user who does not exist.
    """
    return expanded("STLLAVA_HOME", os.environ.get("STLLAVA_HOME") or Path.home() / ".cache" / "stllava-med")


def expanded(named: str, path: str | Path) -> Path:
    """Return the path with its `~` or `~user` expanded; `named` says where it was given, for the message.

    Raises:
        InputError: There is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{named}={path}: no such user. Write the whole path.") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; it becomes `path` when the block ends without an error.

    A reader, or the next run after a kill, sees the old file or the new one and never half of one.

    Raises:
        InputError: The disk is full, or the folder cannot be written.
    """
    if len(path.name.encode(errors="surrogateescape")) > LONGEST_NAME:
        _refuse(path, OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG)))
    unfinished = path.with_name(f".{_short(path.name)}.{os.getpid()}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        _refuse(path, error)
    finally:
        with suppress(OSError):  # it was never made, or its folder is a file: the error above says so
            unfinished.unlink()


def _short(name: str) -> str:
    """Return `name` if it leaves room for what a temporary name adds; else its beginning and a hash.

    >>> _short("board.md")
    'board.md'
    """
    encoded = name.encode(errors="surrogateescape")
    if len(encoded) <= LONGEST_NAME - 40:
        return name
    return f"{encoded[:100].decode(errors='ignore')}-{hashlib.sha256(encoded).hexdigest()[:16]}"


def _refuse(path: Path, error: OSError) -> NoReturn:
    what = "Choose a shorter name" if error.errno == errno.ENAMETOOLONG else "Free some space or choose another folder"
    shown = path if len(str(path)) <= 500 else f"{str(path)[:500]}..."
    raise InputError(f"{shown}: cannot be written ({error.strerror or error}). {what}.") from error


def write_together(folder: Path, files: Mapping[str, str | bytes], stale: Iterable[Path] = ()) -> None:
    """Write several files that belong together: all of them appear, or what was in the folder before stays.

    All are first written beside their destinations; then they are renamed, which needs almost no space. If that fails
    too, the old files are put back. Only a kill between two renames can leave old files beside new ones.

    Args:
        folder: Made if it is not there.
        files: Content by name relative to the folder. Texts are written in UTF-8, as by `write_text`.
        stale: Files in the folder that go when the others appear, unless they are among them.

    Raises:
        InputError: The disk is full, the folder cannot be written, or a folder has the name of a file.
    """
    unfinished = folder / f".{os.getpid()}.unfinished"
    moved: list[tuple[Path, Path]] = []
    made: list[Path] = []
    with alone(folder):
        for leftover in folder.glob(".*.unfinished"):  # left by a killed process; no other process writes here
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            for name, content in files.items():
                new = unfinished / "new" / name
                new.parent.mkdir(parents=True, exist_ok=True)
                with new.open("wb") as file:
                    file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
                    file.flush()
                    os.fsync(file.fileno())
                if (folder / name).is_dir():
                    raise IsADirectoryError(errno.EISDIR, f"{name} in it is a folder")
            for path in dict.fromkeys([*(folder / name for name in files), *stale]):
                if os.path.lexists(path):
                    old = unfinished / "old" / path.relative_to(folder)
                    old.parent.mkdir(parents=True, exist_ok=True)
                    path.rename(old)
                    moved.append((old, path))
            for name in files:
                if not (parent := (folder / name).parent).exists():
                    parent.mkdir(parents=True)
                    made.append(parent)
                new = unfinished / "new" / name
                new.rename(folder / name)
                moved.append((folder / name, new))
            moved, made = [], []
        except OSError as error:
            _refuse(folder, error)
        finally:
            for now, before in reversed(moved):
                with suppress(OSError):
                    now.rename(before)
            shutil.rmtree(unfinished, ignore_errors=True)
            for parent in made:
                with suppress(OSError):  # somebody else's file is in it by now
                    parent.rmdir()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make the folder, and lock it against other processes that use this function; a process that dies releases it.

    Raises:
        InputError: It cannot be made, or another process holds it.
    """
    opened = _locked(folder)
    while opened is None:
        opened = _locked(folder)
    try:
        yield
    finally:
        with suppress(OSError):  # it holds something, as a rule
            folder.rmdir()
        os.close(opened)


def _locked(folder: Path) -> int | None:
    """Return the file descriptor of the opened and locked folder; None if it was removed in between."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made or read ({error.strerror}). Choose another folder.") from error
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if folder.exists() and folder.stat().st_ino == os.fstat(opened).st_ino:
            return opened
    except BlockingIOError as error:
        os.close(opened)
        raise InputError(f"{folder}: another process is writing it. Wait for it, or choose another folder.") from error
    except OSError:  # a network disk without locks: no other process can be kept out
        return opened
    os.close(opened)
    return None


def local_path(given: str) -> Path | None:
    """Return the path on this machine that has the given name; None where there is none: it may be a hub's."""
    try:
        path = Path(given).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):  # the name is too long, we may not look there, or there is no such user
        return None


_held: dict[Path, AbstractContextManager[None]] = {}


def hold(folder: Path) -> None:
    """Hold the folder as `alone` does, until this process ends. Asking again for the same folder is allowed.

    Raises:
        InputError: See `alone`.
    """
    path = folder.absolute()
    if path not in _held:
        held = alone(path)
        held.__enter__()
        _held[path] = held
        atexit.register(held.__exit__, None, None, None)


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
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Return `value` as indented JSON with sorted keys."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def refuse_file(folder: Path, named: str) -> None:
    """Refuse a folder that cannot be made, before any work: a file is in its place, or its name is not possible.

    Args:
        folder: It need not be there.
        named: The option that names it, for the message.

    Raises:
        InputError: See above.
    """
    try:
        for path in (folder, *folder.parents):
            if path.exists() and not path.is_dir():
                raise InputError(f"{named} {folder}: {path} is a file. Choose another folder.")
    except OSError as error:
        raise InputError(
            f"{named} {folder}: no folder can be made there ({error.strerror}). Choose another."
        ) from error


def read_bytes(file: Path, most: int = TEXT_BYTES) -> bytes:
    """Read a file that the user gave.

    Raises:
        InputError: It is a device, a pipe or a socket, which need not end, or it holds more than `most` bytes.
        OSError: It cannot be read.
    """
    size = _regular_size(file)
    if size > most:
        raise InputError(f"{file}: {size:,} bytes, and at most {most:,} are read. Pass another file.")
    with file.open("rb") as opened:
        content = opened.read(most + 1)  # it may grow, and files of /proc say that they are empty
    if len(content) > most:
        raise InputError(f"{file}: more than {most:,} bytes, which are the most that are read. Pass another file.")
    return content


def file_sha256(file: Path) -> str:
    """Return the hex SHA-256 of a file's bytes, read in blocks, so that no size is too large.

    Raises:
        InputError: It is a device, a pipe or a socket, which need not end.
        OSError: It cannot be read.
    """
    _regular_size(file)
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _regular_size(file: Path) -> int:
    """Return the size in bytes of a regular file, without opening it: opening a pipe would wait for its writer.

    Raises:
        InputError: It is a device, a pipe or a socket.
        OSError: It is not there. A folder raises nothing here, since opening it says what it is.
    """
    try:
        status = file.stat()
    except ValueError:  # a zero byte in its name
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file)) from None
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise InputError(f"{file}: no regular file, and a device or a pipe need not end. Write it to a file first.")
    return status.st_size


def read_text(file: Path, most: int = TEXT_BYTES) -> str:
    """Read the text of a file that the user gave: UTF-8, with or without a byte order mark.

    Raises:
        InputError, OSError: See `read_bytes`.
        UnicodeDecodeError: It is not UTF-8.
    """
    return read_bytes(file, most).decode("utf-8-sig")


def read_json(file: Path, most: int = TEXT_BYTES) -> Any:
    """Read the value in a JSON file that the user gave.

    Raises:
        InputError, OSError, UnicodeDecodeError: See `read_text`.
        ValueError, RecursionError: See `loads`.
    """
    return loads(read_text(file, most))


_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # a str joins the two halves of a pair, so any that is left is alone


def has_lone_surrogate(text: str) -> bool:
    """Return whether a text holds half of a UTF-16 surrogate pair, which no UTF-8 file or request can carry.

    >>> has_lone_surrogate("Yes " + chr(0xD83D)), has_lone_surrogate("Yes")
    (True, False)
    """
    return _LONE_SURROGATE.search(text) is not None


def replace_lone_surrogates(text: str) -> str:
    """Return `text` with U+FFFD, the replacement character, for each half of a surrogate pair.

    >>> ascii(replace_lone_surrogates("Yes " + chr(0xD83D)))
    "'Yes \\\\ufffd'"
    """
    return _LONE_SURROGATE.sub("\ufffd", text)


def loads(text: str | bytes) -> Any:
    """Parse the JSON in `text`. Every file of the user's is read with this; a server's reply need not be.

    Python's own reader silently takes the last value of a key that appears twice.

    Raises:
        ValueError: It is no JSON, or an object has a key twice; the message ends with line and column.
        RecursionError: It is nested too deeply.

    >>> loads('{"id": 1, "answer": "yes", "answer": "no"}')
    Traceback (most recent call last):
    json.decoder.JSONDecodeError: key 'answer' appears twice: line 1 column 1 (char 0)
    """
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except KeyTwiceError as error:
        if isinstance(text, bytes):
            text = text.decode(json.detect_encoding(text), "surrogatepass")
        with suppress(RecursionError):  # Python's scanner, which knows line and column, nests less deeply than C's
            _LocatingDecoder().decode(text)
        raise ValueError(str(error)) from error


class KeyTwiceError(ValueError):
    """An object of JSON has a key twice."""


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Make the object of these pairs, for `json`'s `object_pairs_hook`.

    Raises:
        KeyTwiceError: Two share a key.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise KeyTwiceError(f"key {twice[:60]!r} appears twice")
    return made


class _LocatingDecoder(json.JSONDecoder):
    """Decode JSON as the standard library does, but refuse a repeated key with its line and column; slower."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=unique_keys)
        self.parse_object = self._object
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]

    def _object(self, begun: tuple[str, int], *how: Any) -> Any:
        try:
            return json.decoder.JSONObject(begun, *how)  # type: ignore[attr-defined]
        except KeyTwiceError as error:
            raise json.JSONDecodeError(str(error), begun[0], begun[1] - 1) from error
