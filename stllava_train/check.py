"""Files of conversations -> everything that is wrong with them: form, images, length, duplicates, test images."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from stllava_eval.errors import InputError, one_line
from stllava_eval.home import TEXT_BYTES, home, loads, read_bytes, whole_file
from stllava_eval.images import decode, pixel_hash, read_image
from stllava_train.conversations import (
    FOLDER_OR_OUT,
    Conversation,
    Encoder,
    Problem,
    counted,
    counted_about,
    image_file,
    read_files,
    records,
)
from stllava_train.likeness import COPY, Gallery
from stllava_train.recipe import SETS
from stllava_train.record import read_picture, read_turns

if TYPE_CHECKING:
    from PIL.Image import Image

    from stllava_train.pairs import Pair

log = logging.getLogger("stllava_train")

Given = TypeVar("Given")
Made = TypeVar("Made")

KINDS = ("form", "image", "length", "duplicate", "contradiction", "test image")
MAX_TOKENS = 2623  # the authors': 2048 ids with the image as one, and 575 more for an image of 576 vectors


@dataclass(frozen=True)
class Found(Problem):
    """A problem and its kind, of `KINDS`."""

    kind: str


def problems(
    files: Sequence[Path],
    images: Path | None = None,
    encoder: Encoder | None = None,
    max_tokens: int = MAX_TOKENS,
    progress: bool = True,
    report: Callable[[str], object] = lambda line: None,
) -> list[Found]:
    """Every problem, sorted by file and line.

    A record can have several. Of records that say the same, the first is taken for sound.

    Args:
        files: JSON or JSONL.
        images: The folder that images are relative to (default: that of each file).
        encoder: Counts tokens; without one, lengths are not looked at.
        max_tokens: That a conversation may have, its image's vectors included.
        progress: Whether to draw a bar on stderr, where that is a terminal.
        report: Gets one line, how many sound records there are and about how many images.

    Raises:
        InputError: A file is missing, a pipe or no JSON, or a prepared test split is not whole.
    """
    read, form = read_files(files, images)
    sound = [one for of in read for one in of]
    report(f"read: {counted(sound)}")
    others: list[Conversation] = []
    for file, of in zip(files, read, strict=True):
        others += _images_of_others(file, images, {one.place for one in of})
    seen = _looked_at([*sound, *others], progress, _test_images(progress))
    everyone = [*sound, *others]
    found = {
        "form": form,
        "image": _with_image(everyone, seen, lambda look: look.broken),
        "length": [] if encoder is None else _too_long(sound, encoder, max_tokens, progress),
        "duplicate": _duplicates(sound, seen),
        "test image": _with_image(everyone, seen, lambda look: look.leak),
    }
    order: dict[str, int] = {}
    for file in files:
        for place, _ in records(file):
            order[place] = len(order)
    return sorted(
        (Found(one.place, one.id, one.what, kind) for kind in KINDS for one in found.get(kind, ())),
        key=lambda one: order[one.place],
    )


def is_pairs(file: Path) -> bool:
    """Whether it holds preference pairs: its first record has a chosen and a rejected answer."""
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
    """As `problems`, of a file that `stllava-train pairs` wrote; what `stllava-train dpo` would refuse.

    Raises:
        InputError: As `problems`.
    """
    from stllava_train.pairs import pair_of

    folder = file.parent if images is None else images
    found: list[Found] = []
    sound: list[tuple[str, Pair]] = []
    first: dict[str, str] = {}
    *lines, end = read_bytes(file).split(b"\n")
    for line, text in enumerate([*lines, end] if end else lines, 1):
        place = f"{file}:{line}"
        try:
            row: Any = loads(text)
            why = "no row of JSON"
        except (ValueError, RecursionError) as error:
            row, why = None, f"no row of JSON ({one_line(error)})"
        if not isinstance(row, dict):
            found.append(Found(place, "", f"it is {text[:40]!r}, {why}. Delete the line.", "form"))
            continue
        try:
            pair = pair_of(row)
        except ValueError as error:
            found.append(Found(place, str(row.get("id") or ""), str(error), "form"))
            continue
        if (before := first.setdefault(pair.id, place)) != place:
            what = f"its id is that of {before} too. Give each record one of its own."
            found.append(Found(place, pair.id, what, "form"))
        sound.append((place, pair))
    report(f"read: {counted_about('pair', [pair.image_sha256 for _, pair in sound])}")
    shown: list[tuple[Conversation, Pair, str]] = []
    for place, pair in sound:
        for named, sha256 in pair.pictures.items():
            if (image := image_file(folder, named)) is None:
                what = f"its image {named} is not in {folder}. {FOLDER_OR_OUT}"
                found.append(Found(place, pair.id, what, "image"))
            else:
                shown.append((Conversation(pair.id, image, ((pair.question, pair.chosen),), place), pair, sha256))
    found += _repeated_pairs(sound) + _without_weight(sound)
    seen = _looked_at([one for one, *_ in shown], progress, _test_images(progress))
    for one, _, sha256 in shown:
        assert one.image is not None
        look = seen[one.image]
        if look.broken:
            found.append(Found(one.place, one.id, look.broken, "image"))
        elif look.pixels != sha256:
            name = one.image.relative_to(folder).as_posix()
            what = f"its image {name} has other pixels than the one that was asked about. Put that one back."
            found.append(Found(one.place, one.id, what, "image"))
        if look.leak:
            found.append(Found(one.place, one.id, look.leak, "test image"))
    if encoder is not None:
        both = [
            replace(one, rounds=((pair.question, text),))
            for one, pair, _ in shown
            for text in (pair.chosen, pair.rejected)
        ]
        long = {problem.place: problem for problem in _too_long(both, encoder, max_tokens, progress)}
        found += [Found(one.place, one.id, one.what, "length") for one in long.values()]
    return sorted(found, key=lambda one: (int(one.place.rpartition(":")[2]), KINDS.index(one.kind)))


@dataclass(frozen=True)
class Images:
    """What a look at the conversations' images found."""

    broken: list[Problem]  # of conversations whose image cannot be decoded, in their order
    leaks: list[Problem]  # of those whose image is in a prepared test split, or looks so, in their order
    pixels: dict[Path, str]  # `pixel_hash` of each image that can be decoded
    sha256: str  # of all of them, in the order of the conversations


def looked_at(conversations: Sequence[Conversation], progress: bool = True, leaks: bool = True) -> Images:
    """Every image of the conversations, decoded. Test splits that are not prepared are named in a warning.

    Args:
        conversations: Whose images are decoded.
        progress: Whether to draw a bar on stderr, where that is a terminal.
        leaks: Whether to compare them with test images; a caller that keeps those anyway need not.

    Raises:
        InputError: A prepared test split is not whole.
    """
    seen = _looked_at(conversations, progress, _test_images(progress) if leaks else _TestImages({}, [], None))
    pixels = {path: look.pixels for path, look in seen.items() if look.pixels is not None}
    in_order = [None if one.image is None else pixels.get(one.image) for one in conversations]
    return Images(
        _with_image(conversations, seen, lambda look: look.broken),
        _with_image(conversations, seen, lambda look: look.leak),
        pixels,
        hashlib.sha256(json.dumps(in_order).encode()).hexdigest(),
    )


def write_sound(files: Sequence[Path], found: Iterable[Problem], out: Path) -> int:
    """Write the records without a problem to `out`, a line each in one array. Returns their number.

    They are equal as JSON; but those whose columns have other names, see `columns`, get the names that we read.

    Raises:
        InputError: See `read_conversations` and `whole_file`.
    """
    wrong = {problem.place for problem in found}
    lines = [
        json.dumps(record) for file in files for place, record in records(file) if place not in wrong
    ]  # ASCII, since half a character in a field that we do not read has no UTF-8
    with whole_file(out) as unfinished:
        unfinished.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    return len(lines)


# Images.


@dataclass(frozen=True)
class _TestImages:
    names: dict[str, str]  # pixel hash -> vqarad/synpic100132.jpg
    listed: list[str]  # names, as the gallery numbers them
    gallery: Gallery | None  # None where nothing is prepared


@dataclass(frozen=True)
class _Look:
    """What one look at an image file found."""

    pixels: str | None = None  # None where it cannot be decoded
    broken: str | None = None
    leak: str | None = None


def _test_images(progress: bool) -> _TestImages:
    """Of the test splits under `$STLLAVA_HOME`; those that lack are named in a warning."""
    from stllava_eval.datasets import read_manifest, read_rows

    missing: list[str] = []
    files: dict[bytes, str] = {}
    for name in SETS:
        if not (home() / "data" / name / "test.json").exists():
            missing.append(f"{name} test (not prepared; run `stllava-eval prepare {name}`)")
            continue
        if read_manifest(name, "test").sample:
            missing.append(f"{name} test (only its sample is prepared; run `stllava-eval prepare {name}`)")
        for row in read_rows(name, "test"):
            files.setdefault(row.image, f"{name}/{row.image_id}")
    if missing:
        log.warning("images were not compared with: %s", ", ".join(missing))
    names: dict[str, str] = {}
    pictures: list[Image] = []
    for file, picture in zip(files, _mapped(decode, files, "test images", progress), strict=True):
        if (pixels := pixel_hash(picture)) not in names:
            names[pixels] = files[file]
            pictures.append(_small(picture))
    return _TestImages(names, list(names.values()), Gallery(pictures) if pictures else None)


def _small(picture: Image) -> Image:
    """All that a gallery needs of it: a thousand test images of many megapixels would fill the memory."""
    return picture if max(picture.size) <= 1024 else picture.reduce(max(picture.size) // 512)


def _looked_at(conversations: Iterable[Conversation], progress: bool, tests: _TestImages) -> dict[Path, _Look]:
    """Each distinct file, decoded once."""
    paths = list(dict.fromkeys(one.image for one in conversations if one.image is not None))
    return dict(zip(paths, _mapped(lambda path: _look(path, tests), paths, "images", progress), strict=True))


def _look(path: Path, tests: _TestImages) -> _Look:
    try:
        picture = decode(read_image(path))
    except OSError as error:
        return _Look(broken=f"its image {path} cannot be read ({error.strerror or error}).")
    except InputError as error:
        return _Look(broken=f"its image {path}: {error}")
    pixels = pixel_hash(picture)
    if pixels in tests.names:
        return _Look(pixels, leak=f"its image is test image {tests.names[pixels]}, pixel for pixel. Leave it out.")
    if tests.gallery is not None:
        number, distance = tests.gallery.nearest(picture)
        if distance <= COPY:
            like = f"its image looks like test image {tests.listed[number]} (distance {distance:.3f} of at most {COPY})"
            return _Look(pixels, leak=f"{like}. Compare the two, and leave it out.")
    return _Look(pixels)


def _mapped(function: Callable[[Given], Made], given: Iterable[Given], title: str, progress: bool) -> list[Made]:
    """In the order given, a thread a core: Pillow decodes and scales without the lock."""
    from tqdm import tqdm

    todo = list(given)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(tqdm(pool.map(function, todo), title, len(todo), disable=None if progress else True))


def _with_image(
    conversations: Iterable[Conversation], seen: dict[Path, _Look], what: Callable[[_Look], str | None]
) -> list[Problem]:
    return [
        Problem(one.place, one.id, text)
        for one in conversations
        if one.image is not None and (text := what(seen[one.image]))
    ]


def _images_of_others(file: Path, images: Path | None, sound: set[str]) -> list[Conversation]:
    """The records that are not among the sound ones and name an image that exists: its problems are told too."""
    folder = file.parent if images is None else images
    found = []
    for place, record in records(file):
        if place in sound or not isinstance(record, dict):
            continue
        name = read_picture(record, read_turns(record, []), [])
        if name is not None and (image := image_file(folder, name)):
            found.append(Conversation(str(record.get("id") or ""), image, (), place))
    return found


# Records.


def _duplicates(conversations: Iterable[Conversation], seen: dict[Path, _Look]) -> list[Problem]:
    """The same content about the same pixels, in whatever file they are, or about no image."""
    first: dict[Any, Conversation] = {}
    found = []
    for one in conversations:
        pixels = None if one.image is None else seen[one.image].pixels
        if one.image is not None and pixels is None:
            continue
        if (before := first.setdefault((pixels, *one.content), one)) is not one:
            what = f"its image and rounds are those of {before.id} at {before.place}. Keep one of the two."
            found.append(Problem(one.place, one.id, what))
    return found


def _repeated_pairs(pairs: Iterable[tuple[str, Pair]]) -> list[Found]:
    """Pairs about the same pixels that say again what one before them says, or the opposite; `pairs` with places.

    Texts are compared without upper case and white space, as a reader does.
    """
    first: dict[tuple[str, tuple[str, str], tuple[str, str]], tuple[str, str, float | None]] = {}
    found = []
    for place, pair in pairs:
        question, *texts = (" ".join(text.casefold().split()) for text in (pair.question, pair.chosen, pair.rejected))
        chosen = pair.image_sha256, texts[0]
        rejected = pair.rejected_image_sha256 or pair.image_sha256, texts[1]
        if before := first.get((question, chosen, rejected)):
            what = f"its image, question and answers are those of {before[0]} at {before[1]}"
            if None not in (before[2], pair.weight) and before[2] != pair.weight:
                what += f", and its weight is {pair.weight:g}, not {before[2]:g}. Keep the one that is right."
                found.append(Found(place, pair.id, what, "contradiction"))
            else:
                found.append(Found(place, pair.id, f"{what}. Keep one of the two.", "duplicate"))
            continue
        first[(question, chosen, rejected)] = pair.id, place, pair.weight
        if opposite := first.get((question, rejected, chosen)):
            what = (
                f"its chosen and rejected answers are those of {opposite[0]} at {opposite[1]} the other way round. "
                "Keep the one that is right, or neither."
            )
            found.append(Found(place, pair.id, what, "contradiction"))
    return found


def _without_weight(pairs: Sequence[tuple[str, Pair]]) -> list[Found]:
    """Pairs without a weight beside others with one, and weights that are all 0: as `pairs.check_weights` refuses."""
    without = [(place, pair) for place, pair in pairs if pair.weight is None]
    weighted = len(pairs) - len(without)
    if weighted and not without and not any(pair.weight for _, pair in pairs):
        place, first = pairs[0]
        what = "its weight is 0 as every other one is, so nothing would be learnt. Raise some."
        return [Found(place, first.id, what, "form")]
    what = f"it has no weight, and {weighted:,} of the file's pairs have one. Give each a weight, or none."
    return [Found(place, pair.id, what, "form") for place, pair in without] if weighted else []


def _too_long(
    conversations: Sequence[Conversation], encoder: Encoder, max_tokens: int, progress: bool
) -> list[Problem]:
    """Counted with every question learnt that can be, which is the longest that training renders."""
    from tqdm import tqdm

    found = []
    for one in tqdm(conversations, "lengths", disable=None if progress else True):
        asks = [number > 0 and one.image is not None for number in range(len(one.rounds))]
        try:
            count = len(encoder(one, asks).ids)
        except InputError as error:
            found.append(Problem(one.place, one.id, str(error).removeprefix(f"{one.place}: {one.id}: ")))
            continue
        if count > max_tokens:
            image = f", {encoder.image_tokens} of them its image's" if one.image else ""
            what = f"it has {count} tokens{image}, and at most {max_tokens} are read. Drop rounds, or make two of it."
            found.append(Problem(one.place, one.id, what))
    return found
