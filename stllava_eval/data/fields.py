"""Read one field of a record as a text, an id or an image, or raise an error that says what is expected.

pandas, `datasets` and hand-made JSON write the same value in several ways: `MRI` or `["MRI"]`, 1 or 1.0, and a missing
value as null or nan. A value with a single possible meaning is read. Everything else is refused and never turned into
a text.
"""

from __future__ import annotations

import math
import re
from pathlib import PurePosixPath
from typing import Any

from stllava_eval.errors import InputError
from stllava_eval.storage import has_lone_surrogate

SHOWN = 60  # a message shows at most this many characters of a value (our choice)
IMAGE = "an image is {bytes, path}, with the whole file (JPEG, PNG, ...) in bytes, as on the hub"


def missing(value: object) -> bool:
    """Return whether the value is null, or the nan that pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def alone(value: object) -> object:
    """Return the text from a list of exactly one text, and every other value unchanged.

    >>> alone(["MRI"]), alone(["MRI", "CT"])
    ('MRI', ['MRI', 'CT'])
    """
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], str) else value


def text(value: object, what: str, numbers: bool = False) -> str:
    """Return a text unchanged and, if numbers are allowed, a number as the text in the authors' files.

    Args:
        value: A value of any type.
        what: The field's name, for the message.
        numbers: Whether a number is allowed: VQA-RAD's authors wrote some answers as numbers, and pandas turns 2 into
            2.0.

    Raises:
        InputError: The value is something else, or cannot be encoded in UTF-8.

    >>> text(2.0, "answer", numbers=True)
    '2'
    """
    if isinstance(value, str):
        if has_lone_surrogate(value):
            raise InputError(f"{what} {_shown(value)} contains half of a surrogate pair. Write it in UTF-8")
        return value
    if numbers and type(value) in (int, float) and math.isfinite(value):  # type: ignore[arg-type]
        return _number(value)  # type: ignore[arg-type]
    raise InputError(f"{what} {_kind(value)}, and not a text{' or a number' if numbers else ''}")


def identity(value: object, what: str) -> str | None:
    """Return an id as a text, a whole number without `.0`; None if it is missing or blank.

    Raises:
        InputError: The value is neither a whole number nor a text.

    >>> identity(7.0, "qid"), identity("7.0", "qid"), identity(float("nan"), "qid")
    ('7', '7', None)
    """
    if missing(value):
        return None
    if type(value) is int or (isinstance(value, float) and value.is_integer()):
        return _number(value)  # type: ignore[arg-type]
    if not isinstance(value, str):
        raise InputError(f"{what} {_kind(value)}, and neither a whole number nor a text")
    written = text(value, what).strip()
    return (re.sub(r"^(\d+)\.0+$", r"\1", written)) or None


def image_name(value: object, what: str, folders: int = 0) -> str | None:
    """Return the name of an image file with `/` between its parts; None if it is missing or blank.

    Args:
        value: A value of any type.
        what: The field's name, for the message.
        folders: How many folders above the file belong to its name; the other folders are dropped.

    Raises:
        InputError: The value is not a text.

    >>> image_name("C:\\\\slake\\\\imgs\\\\xmlab1\\\\source.jpg", "img_name", folders=1)
    'xmlab1/source.jpg'
    """
    if missing(value):
        return None
    parts = PurePosixPath(text(value, what).strip().replace("\\", "/")).parts
    return "/".join(parts[-1 - folders :]) or None


def image(value: object) -> bytes | str | None:
    """Return an encoded image, or the name of its file if the value has no bytes; None if it has neither.

    Args:
        value: `{"bytes", "path"}` as `datasets` writes it, or only the bytes, or only the file's name.

    Raises:
        InputError: The value is something else. The message says what an image looks like.
    """
    if missing(value) or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str):
        return text(value, "image")
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, dict):
        raise InputError(f"image {_kind(value)}; {IMAGE}")
    if not value.keys() & {"bytes", "path"}:
        raise InputError(f"image has the keys {', '.join(map(str, value))[:SHOWN] or 'of nothing'}; {IMAGE}")
    content, path = value.get("bytes"), value.get("path")
    if isinstance(content, bytes) and content:
        return content
    if content is not None and not isinstance(content, bytes):
        raise InputError(f"image has {type(content).__name__} in bytes; {IMAGE}")
    if path is not None and not isinstance(path, str):
        raise InputError(f"image has {type(path).__name__} in path; {IMAGE}")
    if content is not None or not (path or "").strip():
        raise InputError(f"image has {'empty' if content is not None else 'no'} bytes; {IMAGE}")
    return text(path, "image path")


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else str(value)


def _kind(value: Any) -> str:
    """Return a phrase that says what a value of a wrong type is and shows its beginning."""
    if value is None:
        return "is null"
    if missing(value):
        return "is nan, a missing value (pandas also reads the word None as one)"
    if isinstance(value, list | tuple):
        return f"{_shown(value)} is a list of {len(value)}"
    names = {dict: "an object", bytes: "bytes", bool: "true or false", int: "a number", float: "a number"}
    return f"{_shown(value)} is {names.get(type(value), type(value).__name__)}"


def _shown(value: object) -> str:
    shown = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return shown if len(shown) <= SHOWN else f"{shown[: SHOWN - 3]}..."
