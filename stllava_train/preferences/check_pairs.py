"""List every problem of a file of preference pairs, for `stllava-train check`, before `stllava-train dpo` reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from stllava_eval.errors import one_line
from stllava_eval.storage import TEXT_BYTES, loads, read_bytes
from stllava_train.data.check import KINDS, MAX_TOKENS, Found, too_long
from stllava_train.data.conversations import (
    FOLDER_OR_OUT,
    Conversation,
    counted_about,
    image_file,
)
from stllava_train.data.encoding import Encoder
from stllava_train.data.leaks import ImageRef, look_at_images, test_images
from stllava_train.preferences.pairs import Pair, pair_of


def is_pairs(file: Path) -> bool:
    """Return whether a file holds preference pairs: its first record has a chosen and a rejected answer."""
    try:
        if not file.is_file():  # a pipe gives its first line once
            return False
        with file.open("rb") as opened:
            first = json.loads(opened.readline(TEXT_BYTES))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and {"chosen", "rejected"} <= first.keys()


def pair_problems(
    file: Path,
    images: Path | None = None,
    encoder: Encoder | None = None,
    max_tokens: int = MAX_TOKENS,
    progress: bool = True,
    report: Callable[[str], object] = lambda line: None,
) -> list[Found]:
    """List every problem of a file that `stllava-train pairs` wrote, sorted by line: what `stllava-train dpo` refuses.

    Args:
        file, images, encoder, max_tokens, progress, report: As of `check.problems`.

    Raises:
        InputError: As `problems`.
    """
    folder = file.parent if images is None else images
    sound, found = _read(file)
    report(f"read: {counted_about('pair', [pair.image_sha256 for _, pair in sound])}")
    found += _repeated_pairs(sound) + _without_weight(sound)
    found += _image_problems(sound, folder, progress)
    if encoder is not None:
        found += _length_problems(sound, folder, encoder, max_tokens, progress)
    return sorted(found, key=lambda problem: (_line_of(problem.location), KINDS.index(problem.kind)))


def _line_of(location: str) -> int:
    return int(location.rpartition(":")[2])


def _read(file: Path) -> tuple[list[tuple[str, Pair]], list[Found]]:
    """Return (location, pair) of every line that holds one, and the problems of the other lines and of the ids."""
    found: list[Found] = []
    sound: list[tuple[str, Pair]] = []
    first: dict[str, str] = {}  # id -> location of the first pair that has it
    *lines, end = read_bytes(file).split(b"\n")
    for line, text in enumerate([*lines, end] if end else lines, 1):
        location = f"{file}:{line}"
        try:
            row: Any = loads(text)
            why = "no row of JSON"
        except (ValueError, RecursionError) as error:
            row, why = None, f"no row of JSON ({one_line(error)})"
        if not isinstance(row, dict):
            found.append(Found(location, "", f"it is {text[:40]!r}, {why}. Delete the line.", "form"))
            continue
        try:
            pair = pair_of(row)
        except ValueError as error:
            found.append(Found(location, str(row.get("id") or ""), str(error), "form"))
            continue
        if (before := first.setdefault(pair.id, location)) != location:
            what = f"its id is that of {before} too. Give each record one of its own."
            found.append(Found(location, pair.id, what, "form"))
        sound.append((location, pair))
    return sound, found


def _image_problems(pairs: Sequence[tuple[str, Pair]], folder: Path, progress: bool) -> list[Found]:
    """Return the problems of the pairs' images: missing, broken, of other pixels than the pair says, test images."""
    found: list[Found] = []
    refs: list[tuple[ImageRef, str]] = []  # each image that is there, and the hash that its pair says
    for location, pair in pairs:
        for name, sha256 in pair.pictures.items():
            if (image := image_file(folder, name)) is None:
                what = f"its image {name} is not in {folder}. {FOLDER_OR_OUT}"
                found.append(Found(location, pair.id, what, "image"))
            else:
                refs.append((ImageRef(location, pair.id, image), sha256))
    looks = look_at_images([ref for ref, _ in refs], progress, test_images(progress))
    for ref, sha256 in refs:
        look = looks[ref.image]
        if look.broken:
            found.append(Found(ref.location, ref.id, look.broken, "image"))
        elif look.pixels != sha256:
            name = ref.image.relative_to(folder).as_posix()
            what = f"its image {name} has other pixels than the one that was asked about. Put that one back."
            found.append(Found(ref.location, ref.id, what, "image"))
        if look.leak:
            found.append(Found(ref.location, ref.id, look.leak, "test image"))
    return found


def _length_problems(
    pairs: Sequence[tuple[str, Pair]], folder: Path, encoder: Encoder, max_tokens: int, progress: bool
) -> list[Found]:
    """Return one problem for each pair of which either answer makes a conversation that is too long."""
    conversations = []
    for location, pair in pairs:
        for name in pair.pictures:
            if (image := image_file(folder, name)) is not None:
                for answer in (pair.chosen, pair.rejected):
                    conversations.append(Conversation(pair.id, image, ((pair.question, answer),), location))
    by_pair = {problem.location: problem for problem in too_long(conversations, encoder, max_tokens, progress)}
    return [Found(problem.location, problem.id, problem.what, "length") for problem in by_pair.values()]


def _repeated_pairs(pairs: Iterable[tuple[str, Pair]]) -> list[Found]:
    """Return the pairs about the same pixels that say again what one before them says, or the opposite.

    Texts are compared without upper case and white space, as a reader does.
    """
    first: dict[tuple[str, tuple[str, str], tuple[str, str]], tuple[str, str, float | None]] = {}
    found = []
    for location, pair in pairs:
        question, *texts = (" ".join(text.casefold().split()) for text in (pair.question, pair.chosen, pair.rejected))
        chosen = pair.image_sha256, texts[0]
        rejected = pair.rejected_image_sha256 or pair.image_sha256, texts[1]
        if before := first.get((question, chosen, rejected)):
            what = f"its image, question and answers are those of {before[0]} at {before[1]}"
            if None not in (before[2], pair.weight) and before[2] != pair.weight:
                what += f", and its weight is {pair.weight:g}, not {before[2]:g}. Keep the one that is right."
                found.append(Found(location, pair.id, what, "contradiction"))
            else:
                found.append(Found(location, pair.id, f"{what}. Keep one of the two.", "duplicate"))
            continue
        first[(question, chosen, rejected)] = pair.id, location, pair.weight
        if opposite := first.get((question, rejected, chosen)):
            what = (
                f"its chosen and rejected answers are those of {opposite[0]} at {opposite[1]} the other way round. "
                "Keep the one that is right, or neither."
            )
            found.append(Found(location, pair.id, what, "contradiction"))
    return found


def _without_weight(pairs: Sequence[tuple[str, Pair]]) -> list[Found]:
    """Return what `pairs.check_weights` refuses: pairs without a weight beside others with one, and weights of 0."""
    without = [(location, pair) for location, pair in pairs if pair.weight is None]
    weighted = len(pairs) - len(without)
    if weighted and not without and not any(pair.weight for _, pair in pairs):
        location, first = pairs[0]
        what = "its weight is 0 as every other one is, so nothing would be learnt. Raise some."
        return [Found(location, first.id, what, "form")]
    what = f"it has no weight, and {weighted:,} of the file's pairs have one. Give each a weight, or none."
    return [Found(location, pair.id, what, "form") for location, pair in without] if weighted else []
