"""Read files of preference pairs in the layouts of other tools: trl, LLaMA-Factory, ms-swift, and published ones.

`pair_records` reads each record; this module finds and checks its images. What comes back are pairs as our own judges
make them, for `stllava-train pairs --from` and stage 2.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from stllava_eval.data.readers import parquet_rows
from stllava_eval.errors import InputError, one_line
from stllava_eval.images import decode, open_header
from stllava_eval.storage import file_sha256, loads, whole_file
from stllava_train.data.columns import columns_of, under_our_names
from stllava_train.data.conversations import image_file, read_records
from stllava_train.data.export import SUFFIXES, safe_names
from stllava_train.data.leaks import ImageRef, ScreenedImages, screen_images
from stllava_train.data.records import short
from stllava_train.preferences.pair_records import KNOWN, HeldPictures, answer_turns, read_record
from stllava_train.preferences.pairs import Pair, PairSet, check_weights, is_inside, pair_problem, read_pairs

READS = f"`stllava-train pairs --from` reads JSON, JSONL and parquet files as of {KNOWN}."
OTHER_PIXELS = "image has other pixels than the one that was asked about"
SAME_PIXELS = "the two images have the same pixels"
UNREADABLE = "image cannot be read"


def read_published(path: Path, images: Path | None, allow_test_images: bool = False, progress: bool = True) -> PairSet:
    """Read the pairs of a file in one of the layouts that `KNOWN` names, or in ours.

    Each record is read by its keys, so a file may hold several layouts. Its answers are texts, turns, or whole
    conversations with the question inside; `records.read_turns` reads the turns. Its image is a name relative to
    `images` or to the file's folder, a whole path into `images`, or the picture itself: bytes, base64, a struct of
    bytes and path, or a list of one of these. A picture that is held in the file is written to `images` under a name
    made of its own and its hash. An id that comes again gets a number, and a record without one the number of the
    record.

    A pair of ours has one question: records with earlier rounds are refused. Skipped are pairs of `pair_problem`, of
    images that cannot be read, and of images of prepared test splits. A rejected answer may have an image of its own
    (`rejected_image` of MMedPO, `rejected_images` of ms-swift); where the record only says that one of the two images
    is to be noised, and names no file, it is skipped. Margins and judges are known in our own files alone.

    Args:
        path: JSON, JSONL or parquet.
        images: The folder of the images.
        allow_test_images: Keep pairs about images of prepared test splits too.
        progress: Whether to show bars on stderr.

    Raises:
        InputError: The file cannot be read, a record is of another form, or no image can be read.
    """
    if images is None:
        raise InputError(
            f"{path}: a pair is read together with its image. Pass the folder of the images with --images."
        )
    skipped: Counter[str] = Counter()
    pairs, locations = _read_pairs(path, images, skipped)
    if not pairs and not skipped:
        raise InputError(f"{path}: it holds no pair. {READS}")
    check_weights(path, list(pairs.values()))
    refs = []
    for id, pair in pairs.items():
        refs += [ImageRef(locations[id], id, images / file) for file in pair.pictures]
    screened = screen_images(refs, progress, leaks=not allow_test_images)
    if pairs and len(screened.broken) == len(refs):
        raise InputError(f"{screened.broken[0]} No image can be read. Pass the folder of the images with --images.")
    return PairSet(_with_hashes(pairs, images, screened, skipped), dict(skipped))


def _read_pairs(path: Path, images: Path, skipped: Counter[str]) -> tuple[dict[str, Pair], dict[str, str]]:
    """Return (id -> pair, id -> location) of a file, the images not yet looked at; count what makes no pair."""
    pairs: dict[str, Pair] = {}
    locations: dict[str, str] = {}
    for number, (location, record) in enumerate(_records(path), 1):
        pictures = HeldPictures()
        empty = [key for key, value in record.items() if value is None] if isinstance(record, dict) else []
        read = read_record(location, number, pictures.named(record), empty)
        if why := read.why or pair_problem(*read.texts, two_images=read.rejected_image is not None):
            skipped[why] += 1
            continue
        image = _file(f"{location}: {read.id}", read.image, pictures, read.id, path, images)
        rejected = None
        if read.rejected_image is not None:
            rejected = _file(f"{location}: {read.id}", read.rejected_image, pictures, read.id, path, images)
        if image is None or (read.rejected_image is not None and rejected is None):
            skipped[UNREADABLE] += 1
            continue
        id = read.id
        if id in pairs:
            id = next(new for again in count(2) if (new := f"{id}-{again}") not in pairs)
        pairs[id] = Pair(
            id,
            image,
            read.image_sha256,
            *read.texts,
            margin=read.margin,
            judges=read.judges,
            weight=read.weight,
            rejected_image=rejected,
            rejected_image_sha256=None if rejected is None else read.rejected_image_sha256 or "",
        )
        locations[id] = location
    return pairs, locations


def _with_hashes(
    pairs: Mapping[str, Pair], images: Path, screened: ScreenedImages, skipped: Counter[str]
) -> list[Pair]:
    """Return the pairs whose images are sound, with the hashes of their pixels; count the others by reason."""
    leaks = {problem.id for problem in screened.leaks}
    sound = []
    for id, pair in pairs.items():
        pixels = [screened.pixels.get(images / file) for file in pair.pictures]
        stated = pair.pictures.values()  # the hashes that a file of our own has; empty in other layouts
        if None in pixels:
            skipped[UNREADABLE] += 1
        elif id in leaks:
            skipped["image of a test split"] += 1
        elif any(before not in ("", now) for before, now in zip(stated, pixels, strict=True)):
            skipped[OTHER_PIXELS] += 1
        elif len(set(pixels)) < len(pixels):
            skipped[SAME_PIXELS] += 1
        else:
            rejected = pixels[1] if pair.rejected_image else None
            sound.append(replace(pair, image_sha256=pixels[0] or "", rejected_image_sha256=rejected))
    return sound


def _file(location: str, image: str, pictures: HeldPictures, id: str, path: Path, images: Path) -> str | None:
    """Return the name in `images` of what a record names or holds.

    Returns:
        None where it holds a picture that cannot be decoded.
    """
    if image not in pictures.held:
        return _located(location, image, path, images)
    content, name = pictures.held[image]
    try:
        decode(content)
    except InputError:
        return None
    return _written(content, name or id, images)


def pairs_to_learn(path: Path, images: Path, progress: bool = True) -> list[Pair]:
    """Read the pairs of a file that `stllava-train pairs` wrote, or of one in another layout: all of them or none.

    Raises:
        InputError: See `read_pairs` and `read_published`; or a record of another layout makes no pair.
    """
    if _is_ours(path):
        return read_pairs(path)
    if path.is_dir():
        _shards(path)
        raise InputError(
            f"{path}: a folder of shards. `stllava-train pairs --from {path} --images {images} --out pairs.jsonl` "
            "makes one file of them."
        )
    pair_set = read_published(path, images, allow_test_images=True, progress=progress)
    if pair_set.skipped:
        reasons = "; ".join(f"{reason}: {number}" for reason, number in pair_set.skipped.items())
        raise InputError(
            f"{path}: {sum(pair_set.skipped.values())} of its records make no pair ({reasons}). `stllava-train pairs "
            f"--from {path} --images {images} --out pairs.jsonl` leaves them out."
        )
    return pair_set.pairs


def refuse_other_pairs(path: Path) -> None:
    """Refuse a file of preference pairs in another tool's layout, by its first record; let every other file pass.

    Raises:
        InputError: It holds such pairs, or it is a Parquet file.
    """
    advice = f"`stllava-train pairs --from {path} --images DIR --out pairs.jsonl` reads them; check the file it writes."
    if _is_parquet(path):
        raise InputError(f"{path}: conversations are read from JSON. If it holds pairs, {advice}")
    try:
        _, record = next(iter(read_records(path)))
    except (InputError, OSError, StopIteration):
        return  # the reader of conversations says what is wrong with it
    if isinstance(record, dict) and "image_sha256" not in record and answer_turns(record) is not None:
        raise InputError(f"{path}: it holds pairs in another tool's layout. {advice}")


def _is_ours(path: Path) -> bool:
    """Return whether a file's first row has the hash of a pair's image, which no other tool writes."""
    if not path.is_file() or _is_parquet(path):
        return False
    text = b""
    try:
        with path.open("rb") as lines:
            text = lines.readline(2**24)
        first = loads(text)
    except (OSError, ValueError, RecursionError):  # an array of JSON over several lines, or what cannot be read
        return b'"image_sha256"' in text and not text.lstrip().startswith(b"[")
    return isinstance(first, dict) and "image_sha256" in first


def _is_parquet(path: Path) -> bool:
    """Return whether a file is Parquet, by its name or by the four bytes that every such file begins with."""
    if path.suffix == ".parquet":
        return True
    try:
        if not path.is_file():  # a pipe would give its first bytes once
            return False
        with path.open("rb") as content:
            return content.read(4) == b"PAR1"
    except OSError:
        return False


def source_of(path: Path) -> dict[str, str]:
    """Return the name of a file of pairs, or of a folder of shards, and the SHA-256 of what it holds."""
    hashes = [file_sha256(file) for file in _shards(path)]
    whole = hashes[0] if path.is_file() else hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    return {"file": path.name, "sha256": whole}


def _shards(path: Path) -> list[Path]:
    """Return the file itself, or the Parquet files of a folder, which are one file in pieces: RLAIF-V is published so.

    Raises:
        InputError: The folder holds no parquet file, or files of several splits.
    """
    if not path.is_dir():
        return [path]
    shards = sorted(path.glob("*.parquet"))
    kinds = {re.sub(r"\d+", "N", file.name): file for file in shards}
    if len(kinds) == 1:
        return shards
    if kinds:
        first, second, *_ = kinds.values()
        raise InputError(
            f"{path}: its files {first.name} and {second.name} are not shards of one file. Put those of one split into "
            "a folder of their own, or pass one file."
        )
    held = ", ".join(sorted(file.name for file in path.iterdir())[:4]) or "nothing"
    raise InputError(
        f"{path}: a folder that holds {held}, and no parquet. {READS} A folder that `datasets` saved becomes a file by "
        "`load_from_disk(FOLDER)[SPLIT].to_parquet(FILE)`."
    )


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (location, record) of a file, or of a folder of shards."""
    for file in _shards(path):
        yield from _records_of(file)


def _records_of(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (location, record) of one file, JSON or Parquet, with the keys that its `dataset_info.json` maps."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: no regular file. Pass a JSON or parquet file of pairs.")
    if not _is_parquet(path):
        try:
            yield from read_records(path, "pairs")
        except InputError as error:
            raise InputError(f"{error} {READS}") from None
        return
    import pyarrow  # heavy, and needed for Parquet alone

    columns = columns_of(path)
    try:
        for number, row in enumerate(parquet_rows(path, str(path)), 1):
            yield f"{path}: row {number}", under_our_names(row, columns)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as parquet ({one_line(error)}). Download it again.") from error


def _located(location: str, name: str, path: Path, images: Path) -> str:
    """Return the name, relative to `images`, of the file that a record names there or beside its own file.

    Raises:
        InputError: The name leads out of `images`, or to a file beside the record's own.
    """
    if is_inside(name) and image_file(images, name) is not None:
        return Path(name).as_posix()  # ./a.png and a.png are one
    whole = Path(os.path.normpath(path.parent.absolute() / name)) if "\0" not in name else Path()
    for folder in (images.absolute(), images.resolve()):
        for file in (whole, whole.resolve()):
            if file != folder and file.is_relative_to(folder):
                return file.relative_to(folder).as_posix()
    if is_inside(name) and image_file(path.parent, name) is None:
        return name  # no folder has it: the caller counts it as an image that cannot be read
    raise InputError(
        f"{location}: image is {short(name)}, not a file's name relative to --images {images}. Pass the folder that it "
        "is in, or fix it."
    )


def _written(image: bytes, name: str, images: Path) -> str:
    """Write these bytes to a file in `images`, if it does not have them already, and return the file's name."""
    with open_header(image) as header:
        kind = header.format or ""
    stem = f"{safe_names([name])[name]}-{hashlib.sha256(image).hexdigest()[:12]}"
    path = images / f"{stem}{SUFFIXES.get(kind, f'.{kind.lower()}')}"
    if not path.exists():
        with whole_file(path) as unfinished:
            unfinished.write_bytes(image)
    return path.name
