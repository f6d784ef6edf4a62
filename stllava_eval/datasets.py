"""The three data sets: what was downloaded -> checked official splits on disk -> rows."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import logging
import lzma
import math
import os
import pickle
import re
import shlex
import stat
import tarfile
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from stllava_eval import fields
from stllava_eval.errors import InputError, one_line
from stllava_eval.home import home, loads, local, read_json, whole_file, write_json
from stllava_eval.images import IMAGE_BYTES, decode, pixel_hash

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

log = logging.getLogger("stllava_eval")

FORMAT = 1  # of the manifest
LISTED = 20  # rows named in one message
# pyarrow handles a row group's images in one piece, which must stay below 2 GiB; writing takes about three times this
ROW_GROUP_BYTES = 2**28
# What a source may hold, at most: sizes are known before anything is read, and a few megabytes can unpack to terabytes.
# All our choice.
LISTING_BYTES = 2**26  # of what an archive says of its members; PathVQA's 4,998 images make 8 MB in a tar archive
TABLE_BYTES = 2**26  # of a JSON or pickle file; the largest that we know, SLAKE's train.json, has 3 MB
TEXTS_BYTES = 2**28  # of all but the images in a parquet file; PathVQA's, which is the longest, has about 2 MB
NESTED_BYTES = 2**30  # of the zip archives in an archive, which are held in memory; SLAKE's imgs.zip has 0.2 GB
PARQUET_BYTES = 2**31  # of a parquet file, held in memory; a hub copy's have up to about 0.5 GB
IMAGES_BYTES = 2**32  # of a split's image files, held in memory; PathVQA's have about 1 GB in all
UNPACKED_BYTES = 2**33  # of what a tar or parquet file unpacks to; PathVQA's train split, an image a row, is about 3 GB
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Row:
    """One question about one image. The texts are exactly as distributed, VQA-RAD's tabs included."""

    id: str  # the data set's own: public qid of VQA-RAD, qid of SLAKE, row number of the official PathVQA split
    image: bytes  # encoded file as distributed
    image_id: str  # image name; the cluster of the statistics
    question: str
    reference: str
    kind: str  # "open" | "closed"
    categories: dict[str, str]  # organ, modality, question_type, ... as the set names them


@dataclass(frozen=True)
class Edition:
    """A known form of a split. A count that we found documented nowhere is None, and not checked."""

    name: str
    rows: int
    closed: int | None
    images: int | None
    official: bool = False  # the split as its authors published it
    text: str | None = None  # first 16 hex digits of its `_text_hash`
    ids: str | None = None  # first 16 hex digits of its `_ids_hash`
    prefix: str = ""  # of its ids, where they are row numbers as another edition's are; no answer fits both

    @property
    def open(self) -> int | None:
        """Open questions."""
        return None if self.closed is None else self.rows - self.closed

    @property
    def verified(self) -> bool:
        """Every count is documented, so every count is checked."""
        return self.closed is not None and self.images is not None

    def __str__(self) -> str:
        return f"the {self.name} {_counted(self.rows, self.closed, self.images)}"


@dataclass(frozen=True)
class Dataset:
    """One of the three sets: whose it is, what it holds, where it comes from."""

    title: str
    licence: str
    citation: str
    hub: str  # the copy prepared when no source is named
    categories: dict[str, str]  # our column -> the set's own field
    splits: dict[str, tuple[Edition, ...]]


@dataclass(frozen=True)
class Manifest:
    """What a prepared split is and came from: the JSON beside its parquet file."""

    dataset: str
    split: str
    edition: str
    official: bool
    sample: bool
    source: str  # as given
    resolved: str  # absolute path, or owner/name@commit
    licence: str
    counts: dict[str, int]  # rows, open, closed, images
    sha256_rows: str  # of everything but the images, in order
    sha256_pixels: str  # of the decoded images, by image_id
    sha256_file: str  # of the parquet file
    notes: tuple[str, ...]


# Counts of VQA-RAD and SLAKE are of the authors' files; of the PathVQA test, as published with them.
DATASETS = {
    "vqarad": Dataset(
        title="VQA-RAD",
        licence="CC0 1.0",
        citation="Lau et al., Scientific Data 5:180251 (2018)",
        hub="flaviagiammarino/vqa-rad",
        categories={"organ": "image_organ", "question_type": "question_type", "phrase_type": "phrase_type"},
        splits={
            "train": (
                Edition(
                    "public train", 1797, 1027, 313, official=True, text="10ec52e1429fbbb2", ids="de228a16f9808fc3"
                ),
                Edition("data_RAD train (with frame questions)", 3064, 1823, 314, text="0005cb3367a26284"),
                # the hub copy drops 3 repeated rows and 1 shared with the test; no kinds, 940 answers are yes or no
                Edition("deduplicated train", 1793, 940, 313),
            ),
            "validation": (),  # VQA-RAD has none of its own; the sample set has
            "test": (Edition("official test", 451, 272, 203, official=True, text="7f22162af081b04c"),),
        },
    ),
    "slake": Dataset(
        title="SLAKE",
        licence="CC BY 4.0",
        citation="Liu et al., ISBI 2021 (arXiv:2102.09542)",
        hub="BoKelvin/SLAKE",
        categories={
            "modality": "modality",
            "location": "location",
            "content_type": "content_type",
            "base_type": "base_type",
            "language": "q_lang",
        },
        splits={
            "train": (
                Edition(
                    "official train", 4919, 1943, 450, official=True, text="af4ea7976131c395", ids="ac410672b60664c0"
                ),
                Edition("train and validation in one", 5972, 2365, 546),  # OctoMed/SLAKE
            ),
            "validation": (
                Edition(
                    "official validation", 1053, 422, 96, official=True, text="a09e7ad95540d526", ids="fb346c9b3a645bf5"
                ),
            ),
            "test": (
                Edition("official test", 1061, 416, 96, official=True, text="8530e509e563fd91", ids="bcceb71850c2e290"),
            ),
            "train_zh": (
                Edition(
                    "official Chinese train",
                    4916,
                    1938,
                    450,
                    official=True,
                    text="2ef053f3ba6f8045",
                    ids="ef4c13593a47789a",
                ),
            ),
            "validation_zh": (
                Edition(
                    "official Chinese validation",
                    1046,
                    422,
                    96,
                    official=True,
                    text="e682e3734c1ebe39",
                    ids="13dbe52c05310502",
                ),
            ),
            "test_zh": (
                Edition(
                    "official Chinese test",
                    1033,
                    420,
                    96,
                    official=True,
                    text="4cf2b024334cbb27",
                    ids="8ba276b114770a48",
                ),
            ),
        },
    ),
    "pathvqa": Dataset(
        title="PathVQA",
        licence="MIT on the hub; the images belong to the publishers of the books: do not redistribute",
        citation="He et al. (arXiv:2003.10286)",
        hub="flaviagiammarino/path-vqa",
        categories={"question_type": "question_type"},
        # Train and validation: the hub card gives 32,795 rows in all, 32,632 without repeated ones, and its splits;
        # published loaders give 6,279, which leaves 19,755. We found no reliable count of their closed questions.
        splits={
            "train": (
                Edition("original train", 19755, None, None, official=True),
                Edition("deduplicated train", 19654, None, None, prefix="dedup-"),
            ),
            "validation": (
                Edition("original validation", 6279, None, None, official=True),
                Edition("deduplicated validation", 6259, None, None, prefix="dedup-"),
            ),
            "test": (
                Edition("official test", 6761, 3391, 858, official=True),
                Edition("deduplicated test", 6719, 3362, None, prefix="dedup-"),
            ),
        },
    ),
}


def prepare(name: str, split: str, source: str | Path | None = None, home_folder: Path | None = None) -> Manifest:
    """Check a split against its known editions and write it under `home_folder` (default `$STLLAVA_HOME`).

    It is the edition in use afterwards, which tasks ask about; another edition that was in use is kept beside it. Where
    the same source has been prepared, has not changed since and its file is whole, it is not read again.

    Args:
        name: A key of `DATASETS`.
        split: A key of its `splits`.
        source: A folder or archive with the authors' files or a hub copy's, or a hub id (default: the set's).

    Raises:
        InputError: The source cannot be read or is not an edition we know, an image is missing or broken, or the disk
            is full. What was prepared before stays.
    """
    dataset = _known(name, split)
    if not dataset.splits[split]:
        raise InputError(f"{dataset.title} has no {split} split of its own; `stllava-eval prepare --sample` makes one.")
    given = str(source or dataset.hub)
    with _alone(name, split, home_folder):
        done = _done(name, split, given, home_folder)
        if done is not None:
            log.info("%s %s is prepared from %s already: %s", name, split, given, _parquet(name, split, home_folder))
            _use(*done, home_folder)
            return done[0]
        path, resolved = _fetch(name, split, given)
        with open_files(path) as files:
            found, notes = _found_rows(name, split, files)
            images, missing = _find_images(found, files)
        present = ((row.place, image) for row, image in zip(found, images, strict=True) if image)
        pixels = _decoded(f"{name} {split}", present, missing)
        if (name, split) == ("vqarad", "test"):
            rows, more = _official_vqarad(found, images, pixels)
            notes += more
        else:
            rows = [_row(row, image, pixels[image]) for row, image in zip(found, images, strict=True)]
        edition = _edition(name, split, rows, resolved)
        rows = [replace(row, id=edition.prefix + row.id) for row in rows]
        doubts = _doubts(edition, rows)
        return _write(
            name,
            split,
            rows,
            pixels,
            edition=edition.name,
            official=edition.official and not doubts,
            sample=False,
            source=given,
            resolved=resolved,
            licence=dataset.licence,
            notes=(*notes, *_remarks(dataset.splits[split], edition, rows), *doubts),
            home_folder=home_folder,
        )


def prepare_on_first_use(name: str, split: str) -> None:
    """Prepare the split from the set's hub copy unless something, a sample included, is prepared.

    Raises:
        InputError: The hub cannot be reached, with what to run instead.
    """
    dataset = _known(name, split)
    if _manifest(name, split).exists():
        return
    log.warning("%s %s is not prepared yet: fetching %s from the hub", name, split, dataset.hub)
    for note in prepare(name, split).notes:
        log.warning("%s %s: %s", name, split, note)


def write_split(
    name: str,
    split: str,
    rows: Sequence[Row],
    *,
    edition: str,
    official: bool,
    sample: bool,
    source: str,
    licence: str,
    notes: Sequence[str] = (),
    home_folder: Path | None = None,
) -> Manifest:
    """Write rows as `<home>/data/<name>/<split>.parquet` and `.json`. Equal rows give equal bytes.

    Counts are not compared with an edition here: that is `prepare`'s half.

    Raises:
        InputError: An image cannot be decoded, two rows share an id, one image_id has two images, the disk is full, or
            a sample would replace a real split.
    """
    _known(name, split)
    pixels = _decoded(f"{name} {split}", ((row.id, row.image) for row in rows))
    with _alone(name, split, home_folder):
        return _write(
            name,
            split,
            rows,
            pixels,
            edition=edition,
            official=official,
            sample=sample,
            source=source,
            resolved=source,
            licence=licence,
            notes=tuple(notes),
            home_folder=home_folder,
        )


def is_prepared(name: str, split: str, home_folder: Path | None = None) -> bool:
    """Return whether a split has been written under `home_folder` (default `$STLLAVA_HOME`), whole or damaged."""
    return _manifest(name, split, home_folder).exists()


def read_manifest(name: str, split: str, home_folder: Path | None = None) -> Manifest:
    """The manifest of a prepared split.

    Args:
        name: A key of `DATASETS`.
        split: A key of its `splits`; with `@` and the beginning of a name behind it, as in `test@deduplicated`, the
            prepared edition of that name instead of the one in use.
        home_folder: See `prepare`.

    Raises:
        InputError: Nothing is prepared, or by another version; with the command to run.
    """
    return _found_edition(name, split, home_folder)[0]


def _found_edition(name: str, split: str, home_folder: Path | None) -> tuple[Manifest, Path]:
    """The manifest and the parquet file that a split's name means: see `read_manifest`."""
    of, _, wanted = split.partition("@")
    _known(name, of)
    if not wanted:
        return _read_manifest(name, of, _manifest(name, of, home_folder)), _parquet(name, of, home_folder)
    prepared = _editions(name, of, home_folder)
    fitting = [found for found in prepared if _slug(found[0].edition).startswith(_slug(wanted))]
    if len(fitting) != 1:
        held = ", ".join(f"{of}@{_slug(manifest.edition)}" for manifest, _ in prepared) or "none"
        raise InputError(
            f"{name} {split}: {len(fitting)} of the prepared editions have such a name; there is {held}. Name one of "
            f"them, or run {_what_to_run(name, of)}."
        )
    return fitting[0]


def prepared_editions(name: str, split: str, home_folder: Path | None = None) -> list[Manifest]:
    """The manifests of all prepared editions of a split that can be read, that of the one in use first.

    Raises:
        InputError: There is no such set or split.
    """
    _known(name, split)
    return [manifest for manifest, _ in _editions(name, split, home_folder)]


def numbered_edition(name: str, split: str, ids: Collection[str]) -> Edition | None:
    """The edition of a split without ids of its own, PathVQA's, whose row numbers these are, all of 0 to n-1.

    >>> numbered_edition("pathvqa", "test", [str(number) for number in range(6719)]).name
    'deduplicated test'
    """
    editions = _known(name, split).splits[split] if name == "pathvqa" else ()
    fitting = (edition for edition in editions if edition.rows == len(ids))
    return next((edition for edition in fitting if set(ids) == {str(number) for number in range(edition.rows)}), None)


def how_to_use(manifest: Manifest) -> str:
    """The command that takes a prepared edition into use, for messages."""
    source = manifest.resolved if local(manifest.resolved) else manifest.source
    split = "" if manifest.split == "test" else f" --split {manifest.split}"
    return f"`stllava-eval prepare {manifest.dataset}{split} --from {shlex.quote(source)}`"


def _read_manifest(name: str, split: str, path: Path) -> Manifest:
    try:
        written = read_json(path)
    except FileNotFoundError:
        raise InputError(
            f"{name} {split} is not prepared: there is no {path}. Run {_what_to_run(name, split)}."
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}). Remove it and prepare {name} again.") from error
    if not isinstance(written, dict) or written.pop("format", None) != FORMAT:
        raise InputError(f"{path}: not a manifest of format {FORMAT}. Remove it and prepare {name} again.")
    try:
        return Manifest(**{**written, "notes": tuple(written["notes"])})
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: not a whole manifest ({error}). Remove it and prepare {name} again.") from error


def read_split(name: str, split: str, images: bool = True, home_folder: Path | None = None) -> datasets.Dataset:
    """The prepared split in memory: the columns of the parquet file, `image` as `{"bytes", "path"}`, not decoded.

    It is built past the cache of `datasets`, which goes by a file's name and time and can serve what was there before.

    Args:
        name: See `read_manifest`.
        split: See `read_manifest`.
        images: Whether to hold the column `image`.
        home_folder: See `prepare`.

    Raises:
        InputError: Nothing is prepared, or the file is not the one that its manifest describes.
    """
    import datasets
    import pyarrow as pa

    manifest, path = _found_edition(name, split, home_folder)
    with _whole_parquet(manifest, path) as file:
        columns = [column for column in file.schema_arrow.names if images or column != "image"]
        groups = [file.read_row_group(number, columns=columns) for number in range(file.num_row_groups)]
    features = datasets.Features(
        {name: datasets.Image(decode=False) if name == "image" else datasets.Value("string") for name in columns}
    )
    return datasets.Dataset(
        pa.concat_tables(groups),
        info=datasets.DatasetInfo(features=features),
        # computing one would serialise every image
        fingerprint=hashlib.sha256(f"{manifest.sha256_file} {images}".encode()).hexdigest()[:16],
    )


def read_rows(name: str, split: str, home_folder: Path | None = None) -> list[Row]:
    """The prepared split as rows; rows of one image share its bytes.

    Raises:
        InputError: See `read_split`.
    """
    manifest, path = _found_edition(name, split, home_folder)
    rows: list[Row] = []
    shared: dict[bytes, bytes] = {}
    with _whole_parquet(manifest, path) as file:
        for batch in file.iter_batches(batch_size=256):
            for record in batch.to_pylist():
                image = record.pop("image")["bytes"]
                del record["image_sha256"]
                own = {field: record.pop(field) for field in ("id", "image_id", "question", "reference", "kind")}
                rows.append(Row(image=shared.setdefault(image, image), categories=record, **own))
    return rows


def _pixel_hash(image: bytes) -> str:
    return pixel_hash(decode(image))


def _decoded(title: str, images: Iterable[tuple[str, bytes]], missing: Sequence[str] = ()) -> dict[bytes, str]:
    """Image file -> `_pixel_hash`, each distinct file decoded once; every missing or unreadable one is named.

    Args:
        title: What the progress bar and the message say.
        images: Row and its image.
        missing: What to say of the missing ones.
    """
    from tqdm import tqdm

    users: dict[bytes, list[str]] = defaultdict(list)
    for row, image in images:
        users[image].append(row)

    def attempt(image: bytes) -> str | InputError:
        try:
            return _pixel_hash(image)
        except InputError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        progress = tqdm(pool.map(attempt, users), f"{title}: images", len(users), disable=None)
        outcomes = dict(zip(users, progress, strict=True))
    broken = [*missing]
    for image, outcome in outcomes.items():
        if isinstance(outcome, InputError):
            broken.append(f"{users[image][0]} ({len(users[image])} rows): {outcome}")
    if broken:
        raise InputError(f"{title}: {len(broken)} missing or unreadable images. {_listed(broken)}")
    return {image: str(outcome) for image, outcome in outcomes.items()}


# From a source to files.


@dataclass(frozen=True)
class Files:
    """What was handed in: paths in a folder or archive, in its own order. Nothing is unpacked onto the disk."""

    place: str
    names: tuple[str, ...]
    open: Callable[[str], IO[bytes]]
    size: Callable[[str], int]
    """Bytes of a file, as the folder or archive says before anything of it is read."""

    def read(self, name: str, most: int) -> bytes:
        """The whole file.

        Raises:
            InputError: It has more than `most` bytes or than it says, cannot be read, or the archive is damaged.
        """
        try:
            if (size := self.size(name)) > most:
                raise InputError(f"{self.place}: {name} has {size:,} bytes, and at most {most:,} are read. {REMEDY}.")
            with self.open(name) as file:
                content = file.read(size + 1)
        except DAMAGES as error:
            raise InputError(f"{self.place}: {name} cannot be read ({one_line(error)}). {REMEDY}.") from error
        if len(content) > size:
            raise InputError(f"{self.place}: {name} holds more than the {size:,} bytes that it says. {REMEDY}.")
        return content


REMEDY = "Download it again"
DAMAGES = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError)


class Bounded:
    """A file of which at most `left` more bytes can be read: sizes in an archive need not be true.

    Raises:
        InputError: On reading more, or on going beyond `UNPACKED_BYTES`.
    """

    def __init__(self, file: Any, place: str) -> None:
        self.file, self.place, self.left = file, place, LISTING_BYTES

    def read(self, size: int | None = -1) -> bytes:
        """Read as a file does."""
        content = self.file.read(self.left + 1 if size is None or size < 0 else min(size, self.left + 1))
        self.left -= len(content)
        if self.left < 0:
            raise InputError(f"{self.place}: more is in it than the files of a data set take. {REMEDY}.")
        return content

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Seek as a file does; in a compressed one, everything up to there is unpacked."""
        if whence == os.SEEK_SET and offset > UNPACKED_BYTES and not isinstance(self.file, io.BufferedReader):
            raise InputError(f"{self.place}: it unpacks to more than {UNPACKED_BYTES:,} bytes. {REMEDY}.")
        return self.file.seek(offset, whence)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@contextmanager
def open_files(path: Path) -> Iterator[Files]:
    """The files of a folder or of a zip or tar archive, and those of zip archives in it (SLAKE's imgs.zip).

    Raises:
        InputError: Neither a folder nor an archive, or an archive with a member that would leave its folder.
    """
    with ExitStack() as stack:
        if not path.is_dir() and not path.is_file():
            raise InputError(f"{path} is neither a folder nor a regular file. Pass what holds the set's files.")
        if path.is_dir():
            outer = _folder(path)
        elif _is_tar(path):  # before zip: a tar that ends with a zip passes for one
            outer = _tar(path, stack)
        elif zipfile.is_zipfile(path):
            outer = _zip(str(path), stack.enter_context(path.open("rb")))
        else:
            raise InputError(f"{path} is neither a folder nor a zip or tar archive. Pass what holds the set's files.")
        owners: dict[str, tuple[Files, str]] = {name: (outer, name) for name in outer.names}
        left = NESTED_BYTES
        for archive in [name for name in outer.names if name.lower().endswith(".zip")]:
            place = f"{path}: {archive}"
            if path.is_dir():
                outer.size(archive)  # refuses a pipe, at which opening it would wait
                inner = _zip(place, stack.enter_context(outer.open(archive)))
            else:  # a member of an archive is slow to seek in
                inner = _zip(place, io.BytesIO(outer.read(archive, left)))
                left -= outer.size(archive)
            owners |= {f"{archive}/{name}": (inner, name) for name in inner.names}
        # Windows' own tools write a\b into an archive, which no other system takes for a folder
        spelt = {name.replace("\\", "/"): name for name in owners}
        if len(spelt) < len(owners):
            twice = next(name for name in owners if spelt[name.replace("\\", "/")] != name)
            raise InputError(f"{path}: it holds {twice} twice, with / and with \\ in the name. {REMEDY}.")
        owners = {name: owners[inside] for name, inside in spelt.items()}
        yield Files(
            str(path),
            tuple(owners),
            lambda name: owners[name][0].open(owners[name][1]),
            lambda name: owners[name][0].size(owners[name][1]),
        )


def _folder(path: Path) -> Files:
    names, seen = [], set()
    for folder, below, found in os.walk(path, followlinks=True):
        real = Path(folder).resolve()
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        names += [(Path(folder) / name).relative_to(path).as_posix() for name in sorted(found) if name[0] != "."]

    def size(name: str) -> int:
        try:
            found = (path / name).stat()
        except OSError as error:  # a link to nowhere
            raise InputError(f"{path}: {name} cannot be read ({error.strerror}). {REMEDY}.") from error
        if not stat.S_ISREG(found.st_mode):  # a device or a pipe would never end
            raise InputError(f"{path}: {name} is no regular file. Pass a folder that holds the files themselves.")
        return found.st_size

    return Files(str(path), tuple(names), lambda name: (path / name).open("rb"), size)


def _zip(place: str, file: IO[bytes]) -> Files:
    bounded = Bounded(file, place)
    try:
        archive = zipfile.ZipFile(bounded)  # type: ignore[arg-type]
    except (zipfile.BadZipFile, NotImplementedError, OSError, OverflowError) as error:
        raise InputError(f"{place} is not a whole zip archive ({one_line(error)}). {REMEDY}.") from error
    bounded.left = UNPACKED_BYTES
    members = [member for member in archive.infolist() if not member.is_dir()]
    for member in members:
        _refuse_escape(place, member.filename, stat.S_ISLNK(member.external_attr >> 16))
        # of the others, Python unpacks all that a few bytes stand for before it looks at the size
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(
                f"{place}: {member.filename!r} is compressed in a way (number {member.compress_type}) that is not read "
                "here. Pack it with zip, or unpack it and pass the folder."
            )
    return Files(
        place,
        _without_litter(member.filename for member in members),
        archive.open,
        lambda name: archive.getinfo(name).file_size,
    )


def _is_tar(path: Path) -> bool:
    try:
        with _unpacked(path) as file, _tar_file(Bounded(file, str(path))):
            return True
    except DAMAGES:  # it begins like a compressed file and is none
        return False


def _unpacked(path: Path) -> Any:
    """The opened file, seen without its compression: gzip, bzip2 or xz."""
    with path.open("rb") as file:
        begin = file.read(6)
    if begin.startswith(b"\x1f\x8b"):
        return gzip.open(path)
    if begin.startswith(b"BZh"):
        return bz2.open(path)
    return lzma.open(path) if begin == b"\xfd7zXZ\0" else path.open("rb")


def _tar_file(file: Bounded) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode="r:")  # type: ignore[call-overload]


def _tar(path: Path, stack: ExitStack) -> Files:
    try:
        bounded = Bounded(stack.enter_context(_unpacked(path)), str(path))
        archive = stack.enter_context(_tar_file(bounded))
        members, size = [], 0
        for member in archive:
            size += member.size
            if member.size > PARQUET_BYTES or size > UNPACKED_BYTES:  # before the next one is looked for behind it
                raise InputError(
                    f"{path}: {member.name} has {member.size:,} bytes, and at most {PARQUET_BYTES:,} are read of a "
                    f"file, {UNPACKED_BYTES:,} in all. {REMEDY}."
                )
            if not member.isdir():
                members.append(member)
    except DAMAGES as error:
        raise InputError(f"{path} is not a whole tar archive ({one_line(error)}). {REMEDY}.") from error
    bounded.left = UNPACKED_BYTES
    for member in members:
        _refuse_escape(str(path), member.name, not member.isfile())
    by_name = {member.name: member for member in members}
    return Files(
        str(path),
        _without_litter(by_name),
        lambda name: archive.extractfile(by_name[name]),  # type: ignore
        lambda name: by_name[name].size,
    )


def _refuse_escape(place: str, member: str, no_file: bool) -> None:
    """Refuse a member that unpacked elsewhere would write or point outside its folder; we unpack nothing ourselves."""
    path = PurePosixPath(member.replace("\\", "/"))
    if no_file or path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", member):
        raise InputError(
            f"{place}: {member!r} is a link or leads out of the archive's folder. Do not use this archive."
        )


def _without_litter(names: Iterable[str]) -> tuple[str, ...]:
    """Without what macOS adds to archives: `__MACOSX/._synpic1.jpg` has an image's name and is none."""
    return tuple(
        name for name in names if not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)
    )


def _fetch(name: str, split: str, given: str) -> tuple[Path, str]:
    """Where the source lies on this disk, downloaded if it is a hub id, and its full name."""
    if (path := local(given)) is not None:
        return path, str(path.resolve())
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", given):
        raise InputError(
            f"{given}: no such folder or archive. Pass one with the files of {name}, or a hub id owner/name."
        )
    import huggingface_hub

    part = split.removesuffix("_zh")
    wanted = ["*.json", "*.jsonl", "*.pkl", "*.zip", f"*{part}*.parquet", f"*{part}/*.parquet"]
    try:
        folder = Path(
            huggingface_hub.snapshot_download(given, repo_type="dataset", allow_patterns=wanted, etag_timeout=5)
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{given} cannot be fetched from the hub ({one_line(error)}). Download the files of {name} elsewhere and "
            f"run {_what_to_run(name, split)}."
        ) from error
    return folder, f"{given}@{folder.name}"


# From files to rows. A record is a row in the source's own words.


@dataclass(frozen=True)
class _Found:
    """A row as its source has it; what the source lacks is None."""

    place: str  # its id, or file and number, for messages
    id: str | None
    image: str | bytes  # its name in the source, or the file itself
    image_id: str | None
    question: str
    reference: str
    kind: str | None
    categories: dict[str, str]
    path_alone: bool  # its image has a path and no bytes


def _found_rows(name: str, split: str, files: Files) -> tuple[list[_Found], list[str]]:
    """The split's rows in the source's order, and notes for the manifest."""
    part = split.removesuffix("_zh")
    records, place = {"vqarad": _vqarad, "slake": _slake, "pathvqa": _pathvqa}[name](split, part, files)
    found: list[_Found] = []
    broken: dict[str, list[str]] = defaultdict(list)  # the rows, by what is wrong with them
    unwrapped: dict[str, list[str]] = defaultdict(list)  # the rows, by the field that was a list
    for number, record in enumerate(records):
        plain = _unwrapped(name, record)
        try:
            found.append(_found(name, plain, number, place))
        except _BrokenRowError as error:
            broken[str(error)].append(error.place)
            continue
        for field in (field for field in plain if plain[field] is not record[field]):
            unwrapped[field].append(found[-1].place)
    # a set has all ids and kinds or none: those of some rows alone were lost on the way
    for what, lack in (
        ("qid", [row.place for row in found if row.id is None]),
        ("answer_type", [row.place for row in found if row.kind is None]),
    ):
        if lack and (len(lack) < len(found) or (name, what) == ("slake", "answer_type")):
            broken[f"no {what}"] += lack
    if broken:
        told = [f"{_listed(rows)}: {what}" for what, rows in broken.items()]
        raise InputError(
            f"{files.place}: {sum(map(len, broken.values()))} broken rows. {_listed(told)}. "
            "Correct them, or pass an unchanged copy."
        )
    found = [replace(row, id=row.id or f"row-{number}") for number, row in enumerate(found)]
    repeated = [str(id) for id, times in Counter(row.id for row in found).items() if times > 1]
    if repeated:
        raise InputError(f"{files.place}: {place} has several rows of one id: {_listed(repeated)}. Ids are unique.")
    notes = []
    for field, rows in unwrapped.items():
        notes.append(f"{field} was a list of one text in {len(rows)} rows, and that text is taken: {_listed(rows)}")
    if found and found[0].kind is None and (name, split) != ("vqarad", "test"):
        found = [replace(row, kind=_yes_no_kind(row.reference)) for row in found]
        notes.append(f"kind from the answer (closed: yes or no) in {len(found)} rows: {place} has no answer_type")
    return found, notes


def _unwrapped(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its texts out of lists of one text."""
    own = ("question", "answer", "answer_type", *DATASETS[name].categories.values())
    return {field: fields.alone(value) if field in own else value for field, value in record.items()}


def _vqarad(split: str, part: str, files: Files) -> tuple[list[dict[str, Any]], str]:
    """The public file holds both splits, told apart by `phrase_type`; data_RAD's two are told apart by name."""
    tables = {
        name: records
        for name in files.names
        if name.endswith((".json", ".jsonl"))
        and (records := _json_records(files, name))
        and {"image_name", "question", "answer"} <= records[0].keys()
    }
    for name, records in tables.items():
        if any(_is_test(record) for record in records):
            return [record for record in records if _is_test(record) == (split == "test")], name
    for name, records in tables.items():
        if PurePosixPath(name).stem.startswith(split):
            return records, name
    return _parquet_records(
        files, part, "VQA-RAD's public JSON file or data_RAD's trainset.json and testset.json, with the images"
    )


def _is_test(record: Mapping[str, Any]) -> bool:
    return str(fields.alone(record.get("phrase_type"))).startswith("test_")


def _slake(split: str, part: str, files: Files) -> tuple[list[dict[str, Any]], str]:
    """The rows of the split's language; a hub copy without `answer_type` needs SLAKE's own JSON file beside it."""
    language = "zh" if split.endswith("_zh") else "en"
    stem = part.replace("validation", "validate")
    own, place = [], ""
    for name in files.names:
        if PurePosixPath(name).name in (f"{stem}.json", f"{stem}.jsonl", f"{part}.json", f"{part}.jsonl"):
            own, place = _json_records(files, name), name
            if not own:
                raise InputError(f"{files.place}: {name} holds no list of records. Download it from its authors.")
    own = _in_language(own, language, files, place)
    if own and not _parquet_names(files, part):
        return own, place
    records, place = _parquet_records(files, part, f"SLAKE's own {stem}.json with imgs/ or imgs.zip")
    if any(not fields.missing(record.get("answer_type")) for record in records):
        return _in_language(records, language, files, place), place
    if not own or [_line(record) for record in own] != [_line(record) for record in records]:
        raise InputError(
            f"{files.place}: {place} has no answer_type, and a closed answer of SLAKE need not be yes or no. "
            f"Put SLAKE's own {stem}.json with the same rows beside it, or prepare BoKelvin/SLAKE."
        )
    return [{**record, "image": copy["image"]} for record, copy in zip(own, records, strict=True)], place


def _in_language(records: Sequence[dict[str, Any]], language: str, files: Files, place: str) -> list[dict[str, Any]]:
    """The records of one language; a copy without `q_lang` is English.

    Raises:
        InputError: A record says neither en nor zh: it would be in no split.
    """
    found = []
    for number, record in enumerate(records):
        told = fields.alone(record.get("q_lang", "en"))
        folded = told.strip().lower() if isinstance(told, str) else ""
        if folded not in ("en", "zh"):
            raise InputError(
                f"{files.place}: {place} row {number}: q_lang {told!r:.60} is neither en nor zh. "
                "Pass an unchanged copy."
            )
        if folded == language:
            found.append(record)
    return found


def _pathvqa(split: str, part: str, files: Files) -> tuple[list[dict[str, Any]], str]:
    """The authors' pickles: `*_vqa.pkl`, which names the question's type, before `*_qa.pkl`."""
    short = part.replace("validation", "val")
    for ending in ("vqa", "qa"):
        for name in files.names:
            if PurePosixPath(name).name == f"{short}_{ending}.pkl":
                return [_from_pickle(record) for record in _pickled(files, name)], name
    return _parquet_records(files, part, f"PathVQA's {short}_vqa.pkl or {short}_qa.pkl, with the images")


def _from_pickle(record: dict[str, Any]) -> dict[str, Any]:
    """A record of either pickle with the fields' usual names; a `label` holds answers and their weights.

    Where no answer has more weight than all others, there is none.
    """
    if "sent" not in record:
        return {**record, "image_name": record.get("image"), "image": None}
    label = record.get("label")
    if not isinstance(label, dict) or not all(
        isinstance(weight, int | float) and math.isfinite(weight) for weight in label.values()
    ):
        label = {}
    most = max(label.values(), default=0)
    best = [answer for answer, weight in label.items() if weight == most]
    answer = best[0] if len(best) == 1 else None
    return {**record, "question": record["sent"], "answer": answer, "image_name": record.get("img_id")}


class _PlainUnpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """Lists, dicts, texts and numbers only: any other pickle can run a program of its author's.

    Python's unpickler that is written in Python: the one in C makes room for as many objects as the pickle numbers.
    """

    def find_class(self, module: str, name: str) -> Any:
        raise InputError(f"it holds {module}.{name}, and only lists, dicts, texts and numbers are read")


def _pickled(files: Files, name: str) -> list[dict[str, Any]]:
    content = files.read(name, TABLE_BYTES)
    try:
        records = _PlainUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # a damaged pickle raises nearly everything
        raise InputError(
            f"{files.place}: {name} is refused: {one_line(error)}. Download it from its authors."
        ) from error
    return _checked(records, files, name)


def _json_records(files: Files, name: str) -> list[dict[str, Any]]:
    """The records of a JSON or JSON-lines file; none where it holds something else."""
    content = files.read(name, TABLE_BYTES)
    try:
        if name.endswith(".jsonl") or _is_lines(content):
            lines = enumerate(content.splitlines(), 1)
            return _checked([_json_line(line, number) for number, line in lines if line.strip()], files, name)
        records = loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{files.place}: {name} is no JSON ({error}). Download it again.") from error
    return records if isinstance(records, list) and all(isinstance(record, dict) for record in records) else []


def _is_lines(content: bytes) -> bool:
    """Whether its first line is an object of its own, as in what `datasets` writes to a file named .json."""
    first, _, others = content.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    return first.startswith(b"{") and first.rstrip().endswith(b"}") and others.lstrip().startswith(b"{")


def _json_line(line: bytes, number: int) -> Any:
    try:
        return loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def _checked(records: Any, files: Files, name: str) -> list[dict[str, Any]]:
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError(f"{files.place}: {name} is not a list of records. Download it from its authors.")
    return records


def _parquet_names(files: Files, part: str) -> list[str]:
    """`data/test-00000-of-00001.parquet`, or in the hub's own conversion `test/0000.parquet`."""
    paths = [PurePosixPath(name) for name in files.names if name.endswith(".parquet")]
    return sorted(str(path) for path in paths if part in (path.stem.split("-")[0], path.parent.name))


def _parquet_records(files: Files, part: str, otherwise: str) -> tuple[list[dict[str, Any]], str]:
    """The split's records in a hub copy's parquet files; rows of one image share its bytes.

    Args:
        files: The source.
        part: train, validation or test, as the files or their folder are named.
        otherwise: What could have been there instead, for the message.
    """
    import pyarrow as pa

    names = _parquet_names(files, part)
    if not names:
        raise InputError(
            f"{files.place} holds no {part} split: neither {otherwise}, nor a hub copy's {part}-*.parquet. "
            "Pass the folder or archive that was downloaded, or a hub id."
        )
    records: list[dict[str, Any]] = []
    shared: dict[bytes, bytes] = {}
    left = IMAGES_BYTES
    for name in names:
        content = files.read(name, PARQUET_BYTES)
        try:
            _check_image_column(pa.BufferReader(content), f"{files.place}: {name}")
            for record in parquet_rows(pa.BufferReader(content), f"{files.place}: {name}"):
                image = (record.get("image") or {}).get("bytes")
                if image is not None:
                    left -= len(image) if image not in shared else 0
                    if left < 0:
                        raise InputError(f"{files.place}: {part} images of more than {IMAGES_BYTES:,} bytes. {REMEDY}.")
                    record["image"]["bytes"] = shared.setdefault(image, image)
                records.append(record)
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{files.place}: {name} is not a hub copy's parquet file ({one_line(error)}). {REMEDY}."
            ) from error
    return records, names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _check_image_column(source: Any, place: str) -> None:
    """Refuse a parquet file whose images are something else than files; it may have none, and name them.

    Raises:
        InputError: With the column's type, and what it should be.
        pyarrow.ArrowException, OSError: It is no parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pq.read_schema(source)
    kind = schema.field("image").type if "image" in schema.names else pa.null()
    parts = list(kind) if pa.types.is_struct(kind) else [] if pa.types.is_null(kind) else None
    if parts is None or any(part.name == "bytes" and not _holds_bytes(part.type) for part in parts):
        raise InputError(f"{place}: its column image is {kind!s:.60}; {fields.IMAGE}. Write it so.")


def _holds_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_null(kind)


def parquet_rows(source: Any, place: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file, some at a time.

    Args:
        source: A file, by path or as pyarrow opened it.
        place: For messages.

    Raises:
        InputError: It unpacks to more than `UNPACKED_BYTES`, or to more than `TEXTS_BYTES` beside its columns
            `image`, `images` and the like.
        pyarrow.ArrowException, OSError: It is no parquet file.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(source) as file:
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        if (size := sum(group.total_byte_size for group in groups)) > UNPACKED_BYTES:
            raise InputError(f"{place} unpacks to {size:,} bytes, and at most {UNPACKED_BYTES:,} are read. {REMEDY}.")
        left = TEXTS_BYTES
        for batch in file.iter_batches(batch_size=16):  # a value that the file holds once may stand in every row
            columns = zip(batch.schema.names, batch, strict=True)
            left -= sum(column.nbytes for name, column in columns if not name.startswith("image"))
            if left < 0:
                raise InputError(f"{place} holds more than {TEXTS_BYTES:,} bytes beside its images. {REMEDY}.")
            yield from batch.to_pylist()


class _BrokenRowError(InputError):
    """What is wrong with a row."""

    def __init__(self, place: str, what: str) -> None:
        super().__init__(what)
        self.place = place


def _found(name: str, record: Mapping[str, Any], number: int, file: str) -> _Found:
    """The row in a record.

    Raises:
        _BrokenRowError: A field that is read is missing, or is no text, number, id or image.
    """
    place = f"{file} row {number}"
    try:
        # PathVQA has no ids of its own
        qid = str(number) if name == "pathvqa" else fields.identity(record.get("qid"), "qid")
        place = place if qid is None or name == "pathvqa" else f"qid {qid}"
        if lacking := [field for field in ("question", "answer") if record.get(field) is None]:
            raise InputError(f"no {' and no '.join(lacking)}")
        question = fields.text(record["question"], "question")
        if not question.strip():
            raise InputError("question is empty")
        reference = fields.text(record["answer"], "answer", numbers=name == "vqarad")
        picture, image = _picture(name, record), fields.image(record.get("image"))
        if not (image or picture):
            raise InputError("no image")
        content = image if isinstance(image, bytes) else picture or image  # a path is the writer's, a name the set's
        return _Found(
            place,
            # data_RAD has ids of its own for VQA-RAD's questions
            f"data_RAD-{qid}" if qid and name == "vqarad" and "qid_linked_id" not in record else qid,
            content or b"",
            picture,
            question,
            reference,
            _yes_no_kind(reference) if name == "pathvqa" else _kind(record.get("answer_type")),
            {ours: _category(record.get(theirs), theirs) for ours, theirs in DATASETS[name].categories.items()},
            isinstance(image, str),
        )
    except InputError as error:
        raise _BrokenRowError(place, str(error)) from error


def _kind(told: object) -> str | None:
    """open or closed, as `answer_type` has it; two rows of VQA-RAD say "CLOSED "."""
    if fields.missing(told):
        return None
    kind = fields.text(told, "answer_type").strip().lower()
    if kind not in ("open", "closed"):
        raise InputError(f"answer_type {told!r:.60} is neither OPEN nor CLOSED")
    return kind


def _category(told: object, field: str) -> str:
    """A category as the set names it; VQA-RAD's public file says test_para where data_RAD's test file says para."""
    return "" if fields.missing(told) else fields.text(told, field).removeprefix("test_")


def _picture(name: str, record: Mapping[str, Any]) -> str | None:
    """The image's name: every set has its own field for it. OctoMed/SLAKE gives SLAKE's number alone."""
    for field in ("image_name", "img_name"):  # SLAKE's names have a folder: xmlab1/source.jpg
        if found := fields.image_name(record.get(field), field, folders=1 if name == "slake" else 0):
            return found
    if name != "slake":
        return None
    number = fields.identity(record.get("img_id"), "img_id")
    return f"xmlab{number}/source.jpg" if number else None


def _yes_no_kind(reference: str) -> str:
    return "closed" if _normalised(reference) in ("yes", "no") else "open"


def _find_images(found: Sequence[_Found], files: Files) -> tuple[list[bytes], list[str]]:
    """The image file of every row, found by name anywhere in the source; empty where missing, and what is missing."""
    candidates: dict[str, list[str]] = defaultdict(list)
    for name in files.names:
        path = PurePosixPath(name)
        if path.suffix.lower() in IMAGE_SUFFIXES:
            for key in {path.name, path.stem, _last_two(name)}:
                candidates[key].append(name)
    named = {image: _last_two(image) for image in (row.image for row in found) if isinstance(image, str)}
    wanted = {name for key in named.values() for name in candidates[key]}
    if (size := sum(files.size(name) for name in wanted)) > IMAGES_BYTES:
        raise InputError(f"{files.place}: images of {size:,} bytes, and at most {IMAGES_BYTES:,} are read. {REMEDY}.")
    # in order: a tar.gz has no index
    content = {name: files.read(name, IMAGE_BYTES) for name in files.names if name in wanted}
    for image, key in named.items():
        if len({content[name] for name in candidates[key]}) > 1:
            raise InputError(
                f"{files.place}: {image} is {' and '.join(candidates[key])}, which differ. Keep one of them."
            )
    by_image = {image: content[candidates[key][0]] if candidates[key] else b"" for image, key in named.items()}
    images = [by_image[row.image] if isinstance(row.image, str) else row.image for row in found]
    lacking = [row for row, image in zip(found, images, strict=True) if not image]
    missing = [f"{row.place}: no {row.image!r}" for row in lacking]
    if lacking and lacking[0].path_alone:
        missing[0] += f" in the source, and its image has a path and no bytes ({fields.IMAGE})"
    return images, missing


def _last_two(name: str) -> str:
    return fields.image_name(name, "image", folders=1) or ""


def _row(found: _Found, image: bytes, pixels: str) -> Row:
    """A row whose kind is known; where a copy has dropped the image's name, its pixels name it."""
    assert found.kind is not None
    assert found.id is not None
    return Row(
        found.id, image, found.image_id or pixels[:16], found.question, found.reference, found.kind, found.categories
    )


# What makes a row of VQA-RAD's official test: tasks/vqarad/test_ids.csv.


@dataclass(frozen=True)
class OfficialRow:
    """One row of the official test, without the data set's own words."""

    qid: str  # of the public file
    data_rad_qid: str
    kind: str
    image_name: str
    text: str  # `_line_hash` of question and answer
    pixels: str  # first 16 hex digits of the image's `_pixel_hash`


@cache
def _official_rows() -> tuple[OfficialRow, ...]:
    text = (package_files("stllava_eval.tasks") / "vqarad" / "test_ids.csv").read_text(encoding="utf-8")
    return tuple(OfficialRow(**line) for line in csv.DictReader(text.splitlines()))


def data_rad_ids() -> dict[str, str]:
    """Return the public id of each question of VQA-RAD's official test, by its id in data_RAD's own files."""
    return {row.data_rad_qid: row.qid for row in _official_rows()}


def _official_vqarad(
    found: Sequence[_Found], images: Sequence[bytes], pixels: Mapping[bytes, str]
) -> tuple[list[Row], list[str]]:
    """The test rows in official order with public qid, kind and image name, and notes for the manifest.

    A row is known by question, answer and image. Where a copy has dropped the image's name, its pixels give it, or, if
    it has encoded the images again, a row of the image whose text occurs once; else order among equal texts decides.
    """
    waiting: dict[str, list[OfficialRow]] = defaultdict(list)
    for known in _official_rows():
        waiting[known.text].append(known)
    texts = [_line_hash(row.question, row.reference) for row in found]
    pixels_of = [pixels[image][:16] for image in images]
    names = {known.pixels: known.image_name for known in _official_rows()}
    for text, seen in zip(texts, pixels_of, strict=True):
        if len(waiting[text]) == 1:
            names.setdefault(seen, waiting[text][0].image_name)
    rows: dict[str, Row] = {}
    unknown, by_order, changed = [], [], set()
    # nameless images last: they take what the others leave
    for number in sorted(range(len(found)), key=lambda number: pixels_of[number] not in names):
        row, candidates = found[number], waiting[texts[number]]
        name = row.image_id or names.get(pixels_of[number])
        fitting = [known for known in candidates if name in (None, known.image_name) and row.kind in (None, known.kind)]
        if not fitting:
            unknown.append(row.place)
            continue
        if name is None:
            by_order.append(row.place)
        known = fitting[0]
        candidates.remove(known)
        if known.pixels != pixels_of[number]:
            changed.add(known.image_name)
        rows[known.qid] = Row(
            known.qid, images[number], known.image_name, row.question, row.reference, known.kind, row.categories
        )
    if unknown:
        raise InputError(
            f"vqarad test: {len(unknown)} rows are not in the official test with this image: {_listed(unknown)}. "
            "Prepare an unchanged copy."
        )
    notes = []
    if changed:
        notes.append(f"the pixels of {len(changed)} images differ from the originals")
    if by_order:
        notes.append(
            "rows matched by question, answer and order alone, since nothing names their image: " + _listed(by_order)
        )
    return [rows[known.qid] for known in _official_rows() if known.qid in rows], notes


def _normalised(text: str) -> str:
    """Lower case, single spaces, and none before a mark: copies differ in these."""
    return re.sub(r" (?=[?.,;:!])", "", " ".join(text.lower().split()))


def _line(record: Mapping[str, Any]) -> tuple[str, str]:
    return _normalised(str(record.get("question"))), _normalised(str(record.get("answer")))


def _line_hash(question: str, reference: str) -> str:
    return hashlib.sha256(f"{_normalised(question)}\t{_normalised(reference)}".encode()).hexdigest()[:16]


def _text_hash(rows: Iterable[Row]) -> str:
    """Hex sha256 of questions, references and kinds, whatever the rows' order, ids and letter case."""
    lines = sorted(f"{_line_hash(row.question, row.reference)} {row.kind}\n" for row in rows)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _ids_hash(rows: Iterable[Row]) -> str:
    """Hex sha256 of which question and reference each id has, whatever the rows' order and letter case."""
    lines = sorted(f"{row.id} {_line_hash(row.question, row.reference)}\n" for row in rows)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# Checked rows to disk.


def _known(name: str, split: str) -> Dataset:
    if name not in DATASETS:
        raise InputError(f"{name}: no such data set. There are {', '.join(DATASETS)}.")
    if split not in DATASETS[name].splits:
        raise InputError(f"{name} has no split {split}. It has {', '.join(DATASETS[name].splits)}.")
    return DATASETS[name]


def _edition(name: str, split: str, rows: Sequence[Row], place: str) -> Edition:
    """The known edition that has the rows' counts."""
    closed, images = sum(row.kind == "closed" for row in rows), len({row.image_id for row in rows})
    editions = DATASETS[name].splits[split]
    for edition in editions:
        if edition.rows == len(rows) and edition.closed in (None, closed) and edition.images in (None, images):
            return edition
    raise InputError(
        f"{name} {split} from {place}: found {_counted(len(rows), closed, images, verb='')}; "
        f"{'; '.join(map(str, editions))}. Prepare a whole, unchanged copy."
    )


def _counted(rows: int, closed: int | None, images: int | None, verb: str = "has ") -> str:
    kinds = "" if closed is None else f" = {closed} closed + {rows - closed} open"
    return f"{verb}{rows}{kinds}" + ("" if images is None else f" on {images} images")


def _doubts(edition: Edition, rows: Sequence[Row]) -> list[str]:
    """Why rows with an edition's counts are not that edition: each of these a note for the manifest."""
    if edition.text is not None and edition.text != _text_hash(rows)[:16]:
        return [f"not official: counts as the {edition.name}, but other questions, references or kinds"]
    if edition.ids is not None and edition.ids != _ids_hash(rows)[:16]:
        return [f"not official: the text of the {edition.name}, but under other ids, so answers of others do not fit"]
    written_out = [row.id for row in rows if re.fullmatch(r"\[.*\]|\{.*\}|nan|<NA>", row.reference.strip())]
    if edition.text is None and written_out:
        return [
            f"not official: counts as the {edition.name}, but the references of {len(written_out)} rows are lists, "
            f"objects or missing values that were written out as text: {_listed(written_out)}"
        ]
    return []


def _remarks(known: Sequence[Edition], edition: Edition, rows: Sequence[Row]) -> list[str]:
    """What else the manifest should say of an edition that fits."""
    notes = []
    if not edition.verified:
        notes.append(f"unverified: {edition}, and what this leaves out is documented nowhere we could check")
    if not edition.official and (own := next((other for other in known if other.official), None)):
        notes.append(f"not the split as its authors published it: {own}")
    empty = [row.id for row in rows if not row.reference.strip()]
    if empty:
        notes.append(f"no reference in {len(empty)} rows: {_listed(empty)}")
    return notes


def _write(
    name: str,
    split: str,
    rows: Sequence[Row],
    pixels: Mapping[bytes, str],
    *,
    sample: bool,
    home_folder: Path | None,
    **described: Any,
) -> Manifest:
    """Parquet first, manifest last; in between there is none, so a kill leaves nothing that looks prepared.

    Another edition that was in use is kept.
    """
    import pyarrow.parquet as pq

    path, manifest_path = _parquet(name, split, home_folder), _manifest(name, split, home_folder)
    if sample and manifest_path.exists() and not read_manifest(name, split, home_folder).sample:
        raise InputError(
            f"{path} is the real {name} {split}, and a sample does not replace it. "
            "Set STLLAVA_HOME to another folder for the sample."
        )
    _check_rows(f"{name} {split}", rows)
    for leftover in path.parent.glob(f".{split}.*.unfinished"):  # of a killed run; nobody else is at work here
        leftover.unlink()
    with whole_file(path) as unfinished:
        groups = _row_groups(rows)
        table = _table(rows[groups[0][0] : groups[0][1]], pixels)
        with pq.ParquetWriter(
            unfinished,
            table.schema,
            # a dictionary per row group stores an image once; the images are compressed already
            use_dictionary=True,
            dictionary_pagesize_limit=2**31 - 1,
            compression={column: "none" if column == "image.bytes" else "zstd" for column in _leaves(table.schema)},
        ) as file:
            for first, end in groups:
                file.write_table(_table(rows[first:end], pixels), row_group_size=end - first)
        sha256_file = _file_hash(unfinished)
        _make_room(name, split, described["edition"], home_folder)
    closed = sum(row.kind == "closed" for row in rows)
    manifest = Manifest(
        dataset=name,
        split=split,
        sample=sample,
        counts={
            "rows": len(rows),
            "open": len(rows) - closed,
            "closed": closed,
            "images": len({row.image_id for row in rows}),
        },
        sha256_rows=_hash_lines(
            [row.id, row.image_id, row.question, row.reference, row.kind, row.categories] for row in rows
        ),
        sha256_pixels=_hash_lines(sorted({(row.image_id, pixels[row.image]) for row in rows})),
        sha256_file=sha256_file,
        **described,
    )
    write_json(manifest_path, {"format": FORMAT, **asdict(manifest)})
    for old in (".json", ".parquet"):  # of this edition, from another source
        _kept(path, manifest.edition).with_suffix(old).unlink(missing_ok=True)
    return manifest


def _make_room(name: str, split: str, edition: str, home_folder: Path | None) -> None:
    """Keep another edition that is in use under a name of its own; a sample, or the same edition, goes."""
    path, manifest_path = _parquet(name, split, home_folder), _manifest(name, split, home_folder)
    with suppress(InputError):  # nothing is prepared, or nothing that can be read
        used = read_manifest(name, split, home_folder)
        if not used.sample and used.edition != edition:
            kept = _kept(path, used.edition)
            with suppress(FileNotFoundError):  # a kill came between the two
                path.replace(kept)
            manifest_path.replace(kept.with_suffix(".json"))
    manifest_path.unlink(missing_ok=True)


def _kept(path: Path, edition: str) -> Path:
    """`test.parquet` -> `test@deduplicated-test.parquet`: an edition that is prepared and not in use."""
    return path.with_name(f"{path.stem}@{_slug(edition)}.parquet")


def _slug(edition: str) -> str:
    """An edition's name as a part of a file's: `deduplicated-test`."""
    return re.sub(r"[^a-zA-Z0-9_]+", "-", edition).strip("-")


def _editions(name: str, split: str, home_folder: Path | None) -> list[tuple[Manifest, Path]]:
    """The manifest and the parquet file of each prepared edition, that of the one in use first."""
    used = _manifest(name, split, home_folder)
    found = []
    for path in [used, *sorted(used.parent.glob(f"{split}@*.json"))]:
        with suppress(InputError):
            found.append((_read_manifest(name, split, path), path.with_suffix(".parquet")))
    return found


def _use(manifest: Manifest, file: Path, home_folder: Path | None) -> None:
    """Take a prepared edition into use."""
    path = _parquet(manifest.dataset, manifest.split, home_folder)
    if file == path:
        return
    _make_room(manifest.dataset, manifest.split, manifest.edition, home_folder)
    file.replace(path)
    file.with_suffix(".json").replace(path.with_suffix(".json"))


def _check_rows(title: str, rows: Sequence[Row]) -> None:
    if not rows:
        raise InputError(f"{title} has no rows. Pass at least one.")
    repeated = [id for id, times in Counter(row.id for row in rows).items() if times > 1]
    if repeated:
        raise InputError(f"{title}: several rows of one id: {_listed(repeated)}. Ids are unique.")
    wrong = [f"{row.id}: {row.kind!r}" for row in rows if row.kind not in ("open", "closed")]
    if wrong:
        raise InputError(f"{title}: a kind is open or closed, not {_listed(wrong)}.")
    images: dict[str, bytes] = {}
    mixed = {row.image_id for row in rows if images.setdefault(row.image_id, row.image) != row.image}
    if mixed:
        raise InputError(f"{title}: one image_id, several images: {_listed(sorted(mixed))}. An image has one name.")


def _row_groups(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """First row and end of each row group: as few as fit `ROW_GROUP_BYTES`, since each stores its images again."""
    starts, size = [0], 0
    for number, row in enumerate(rows):
        size += len(row.image)
        if size > ROW_GROUP_BYTES and number > starts[-1]:
            starts.append(number)
            size = len(row.image)
    return list(zip(starts, [*starts[1:], len(rows)], strict=True))


def _table(rows: Sequence[Row], pixels: Mapping[bytes, str]) -> pa.Table:
    """The rows as an Arrow table whose metadata tell `datasets` that `image` is one."""
    import pyarrow as pa

    columns: dict[str, Any] = {
        "id": [row.id for row in rows],
        "image": pa.array(
            [{"bytes": row.image, "path": row.image_id} for row in rows],
            pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        ),
        "image_id": [row.image_id for row in rows],
        "image_sha256": [pixels[row.image] for row in rows],
        "question": [row.question for row in rows],
        "reference": [row.reference for row in rows],
        "kind": [row.kind for row in rows],
        **{category: [row.categories[category] for row in rows] for category in rows[0].categories},
    }
    features = {
        name: {"_type": "Image"} if name == "image" else {"dtype": "string", "_type": "Value"} for name in columns
    }
    table = pa.table(
        {name: values if name == "image" else pa.array(values, pa.string()) for name, values in columns.items()}
    )
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _leaves(schema: pa.Schema) -> list[str]:
    return [leaf for name in schema.names for leaf in (("image.bytes", "image.path") if name == "image" else (name,))]


def _parquet(name: str, split: str, home_folder: Path | None = None) -> Path:
    return (home_folder or home()) / "data" / name / f"{split}.parquet"


def _manifest(name: str, split: str, home_folder: Path | None = None) -> Path:
    return _parquet(name, split, home_folder).with_suffix(".json")


def _alone(name: str, split: str, home_folder: Path | None) -> AbstractContextManager:
    """Held while a split is prepared: the ranks of one run all find it missing, and one of them prepares it."""
    import filelock

    path = _parquet(name, split, home_folder).with_name(f".{split}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path.parent}: cannot be created ({error.strerror}). Set STLLAVA_HOME to another folder."
        ) from error
    return filelock.FileLock(path)


def _done(name: str, split: str, given: str, home_folder: Path | None) -> tuple[Manifest, Path] | None:
    """The manifest and file of the edition that was prepared from this source, if both are as they were."""
    source = local(given)
    for manifest, path in _editions(name, split, home_folder):
        same = manifest.resolved == str(source.resolve()) if source is not None else manifest.source == given
        if same and not _changed(source, path.with_suffix(".json").stat().st_mtime):
            with suppress(InputError), _whole_parquet(manifest, path):
                return manifest, path
    return None


def _changed(source: Path | None, since: float) -> bool:
    """Whether a file of a source on this machine was written or put there after a time (s, of its disk's clock)."""
    if source is None:
        return False
    try:
        files = [source / name for name in _folder(source).names] if source.is_dir() else [source]
        # not mtime, which unpacking an archive sets back
        return any(max(file.stat().st_ctime, file.lstat().st_ctime) > since for file in files)
    except OSError:  # a link to nowhere
        return True


def _whole_parquet(manifest: Manifest, path: Path) -> Any:
    """The split's opened parquet file, if it is the one that the manifest describes."""
    import pyarrow.parquet as pq

    again = f"Run {_what_to_run(manifest.dataset, manifest.split)} again."
    if not path.exists() or _file_hash(path) != manifest.sha256_file:
        raise InputError(
            f"{path} is not the file that was prepared: its sha256 is not the manifest's. Remove it. {again}"
        )
    file = pq.ParquetFile(path)
    editions = DATASETS[manifest.dataset].splits[manifest.split]
    prefix = next((edition.prefix for edition in editions if edition.name == manifest.edition), "")
    if prefix and not file.read_row_group(0, columns=["id"])["id"][0].as_py().startswith(prefix):
        file.close()
        raise InputError(
            f"{path} was prepared by an earlier version, whose ids of the {manifest.edition} were also those of the "
            f"official one. {again}"
        )
    return file


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_lines(lines: Iterable[Any]) -> str:
    text = "".join(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines)
    return hashlib.sha256(text.encode()).hexdigest()


def _what_to_run(name: str, split: str) -> str:
    chosen = "" if split == "test" else f" --split {split}"  # what the command takes by default
    return f"`stllava-eval prepare {name}{chosen} --from DIR`, or `stllava-eval prepare {name} --sample`"


def _listed(items: Sequence[str]) -> str:
    more = f" ... and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return "; ".join(items[:LISTED]) + more
