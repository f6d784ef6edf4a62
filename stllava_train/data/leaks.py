"""Screen images against the prepared test splits, pixel for pixel and by near copies.

Conversations, candidates and pairs are screened here before they are learnt from: a test image among them would spoil
the scores on its split. See docs/train/data.md, "What counts as a copy".
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from stllava_eval.data.catalog import DATASETS
from stllava_eval.data.splits import read_manifest, read_rows
from stllava_eval.errors import InputError
from stllava_eval.images import decode, pixel_hash, read_image
from stllava_eval.storage import home
from stllava_train.data.conversations import Problem, image_file, read_records
from stllava_train.data.near_copies import COPY, NearDuplicateIndex
from stllava_train.data.records import read_picture, read_turns

if TYPE_CHECKING:
    from PIL.Image import Image


log = logging.getLogger("stllava_train")

Given = TypeVar("Given")
Made = TypeVar("Made")

# px of the longer side of a test image that is kept for comparison (our choice). Near copies are found on pictures of
# `near_copies.LONGEST` = 256 px, which is less than either, and a thousand test images of many megapixels would fill
# the memory. Larger ones are reduced by a whole factor to `REDUCED` px or a little more
KEPT, REDUCED = 1024, 512


class HasImage(Protocol):
    """What is screened: an `ImageRef`, or a conversation, which has the same three attributes."""

    @property
    def location(self) -> str:
        """Return `FILE:LINE` of the record, for messages."""

    @property
    def id(self) -> str:
        """Return the record's id, for messages."""

    @property
    def image(self) -> Path | None:
        """Return the image's file; None where the record has none."""


@dataclass(frozen=True)
class ImageRef:
    """An image file, and the record that names it."""

    location: str
    id: str
    image: Path


@dataclass(frozen=True)
class ScreenedImages:
    """What the screening of some records' images found."""

    broken: list[Problem]  # a problem for each record whose image cannot be decoded, in their order
    leaks: list[Problem]  # likewise, for each whose image is in a prepared test split, or looks so
    pixels: dict[Path, str]  # `pixel_hash` of each image that can be decoded
    sha256: str  # of all of these hashes, in the order of the records


def screen_images(records: Sequence[HasImage], progress: bool = True, leaks: bool = True) -> ScreenedImages:
    """Decode every image of the records, and compare it with the test images.

    Test splits that are not prepared are named in a warning.

    Args:
        records: Conversations or `ImageRef`s.
        progress: Whether to draw a bar on stderr, where that is a terminal.
        leaks: Whether to compare them with test images; a caller that keeps those anyway need not.

    Returns:
        The records whose image is broken or leaks, and the hash of every image's pixels.

    Raises:
        InputError: A prepared test split is not whole.
    """
    tests = test_images(progress) if leaks else TestImages({}, [], None)
    looks = look_at_images(records, progress, tests)
    pixels = {path: look.pixels for path, look in looks.items() if look.pixels is not None}
    in_order = [None if record.image is None else pixels.get(record.image) for record in records]
    return ScreenedImages(
        image_problems(records, looks, lambda look: look.broken),
        image_problems(records, looks, lambda look: look.leak),
        pixels,
        hashlib.sha256(json.dumps(in_order).encode()).hexdigest(),
    )


# --- images -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TestImages:
    """The images of all prepared test splits, by pixels and as an index of near copies."""

    names: dict[str, str]  # pixel hash -> vqarad/synpic100132.jpg
    listed: list[str]  # names, as the index numbers them
    index: NearDuplicateIndex | None  # None where nothing is prepared


@dataclass(frozen=True)
class ImageLook:
    """What one look at an image file found."""

    pixels: str | None = None  # `pixel_hash`; None where it cannot be decoded
    broken: str | None = None  # why it cannot be decoded
    leak: str | None = None  # the test image that it is, or looks like


def test_images(progress: bool) -> TestImages:
    """Read the images of the test splits under `$STLLAVA_HOME`, and name the splits that lack in a warning.

    Returns:
        The images; equal pixels count once, under the name that comes first.
    """
    missing: list[str] = []
    files: dict[bytes, str] = {}
    for name in DATASETS:
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
    return TestImages(names, list(names.values()), NearDuplicateIndex(pictures) if pictures else None)


def _small(picture: Image) -> Image:
    """Return all that an index of near copies needs of a picture."""
    longest = max(picture.size)
    return picture if longest <= KEPT else picture.reduce(longest // REDUCED)


def look_at_images(records: Iterable[HasImage], progress: bool, tests: TestImages) -> dict[Path, ImageLook]:
    """Look at each distinct file once; return what was found, by file."""
    paths = list(dict.fromkeys(record.image for record in records if record.image is not None))
    return dict(zip(paths, _mapped(lambda path: look_at(path, tests), paths, "images", progress), strict=True))


def look_at(path: Path, tests: TestImages) -> ImageLook:
    """Decode one image file and compare it with the test images."""
    try:
        picture = decode(read_image(path))
    except OSError as error:
        return ImageLook(broken=f"its image {path} cannot be read ({error.strerror or error}).")
    except InputError as error:
        return ImageLook(broken=f"its image {path}: {error}")
    pixels = pixel_hash(picture)
    if pixels in tests.names:
        return ImageLook(pixels, leak=f"its image is test image {tests.names[pixels]}, pixel for pixel. Leave it out.")
    if tests.index is not None:
        number, distance = tests.index.nearest(picture)
        if distance <= COPY:
            like = f"its image looks like test image {tests.listed[number]} (distance {distance:.3f} of at most {COPY})"
            return ImageLook(pixels, leak=f"{like}. Compare the two, and leave it out.")
    return ImageLook(pixels)


def _mapped(function: Callable[[Given], Made], given: Iterable[Given], title: str, progress: bool) -> list[Made]:
    """Apply a function in one thread for each core, which works as Pillow decodes and scales without Python's lock.

    Returns:
        The results, in the order given.
    """
    from tqdm import tqdm

    todo = list(given)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(tqdm(pool.map(function, todo), title, len(todo), disable=None if progress else True))


def image_problems(
    records: Iterable[HasImage], looks: dict[Path, ImageLook], what: Callable[[ImageLook], str | None]
) -> list[Problem]:
    """Return a problem for each record about whose image `what` has something to say."""
    problems = []
    for record in records:
        if record.image is not None and (text := what(looks[record.image])):
            problems.append(Problem(record.location, record.id, text))
    return problems


def images_of_others(file: Path, images: Path | None, sound: set[str]) -> list[ImageRef]:
    """Return the images of the records that are not sound, so that what is wrong with them is reported too.

    Args:
        file: Of conversations.
        images: The folder that images are relative to (default: that of `file`).
        sound: Locations of the sound records, which are passed over.
    """
    folder = file.parent if images is None else images
    others = []
    for location, record in read_records(file):
        if location in sound or not isinstance(record, dict):
            continue
        name = read_picture(record, read_turns(record, []), [])
        if name is not None and (image := image_file(folder, name)):
            others.append(ImageRef(location, str(record.get("id") or ""), image))
    return others
