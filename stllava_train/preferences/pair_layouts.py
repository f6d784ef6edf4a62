"""Read preference pairs as others lay them out: files of trl, LLaMA-Factory, ms-swift, and published ones.

They become pairs as our own judges make them, for `stllava-train pairs --from` and stage 2.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from stllava_train.data.records import PICTURES, Turn, read_picture, read_system, read_turns, short
from stllava_train.preferences.pairs import Pair, PairSet, check_weights, is_inside, pair_of, pair_problem, read_pairs
from stllava_train.resumable import Row

KNOWN = "trl, LLaMA-Factory, ms-swift, RLHF-V, RLAIF-V, MMedPO and STLLaVA-Med-DPO"
READS = f"`stllava-train pairs --from` reads JSON, JSONL and parquet files as of {KNOWN}."
# Keys of whole conversations, of which the last answer is the chosen and the rejected one
BOTH = (
    ("chosen_conversations", "reject_conversations"),  # STLLaVA-Med's train_dpo.py:945-975; not "rejected"
    ("chosen_conversations", "rejected_conversations"),
    ("conversations", "rejected_conversations"),  # MMedPO's data/mimic_dpo_weighted.json; POVID's too
    ("messages", "rejected_messages"),  # ms-swift 3.8, docs/source_en/Customization/Custom-dataset.md
)
# trl, RLAIF-V, LLaMA-Factory's Alpaca format, and ms-swift's older one
QUESTIONS = ("prompt", "question", "instruction", "query")
IDS = ("id", "idx", "question_id")  # RLHF-V and RLAIF-V have `idx`
# MMedPO has `weighted_score`, and its loader calls it `dpo_weight`
_WEIGHT = re.compile(r"(?:(?:dpo|loss|sample|pair|example|instance)_)?weight|weighted_score")
_NOISED = ("rejected_noised", "chosen_noised")  # MMedPO's train_dpo_weighted.py: one answer's image is noise
_PICTURE_TEXT = re.compile(  # PNG, JPEG, GIF, WebP, BMP and both kinds of TIFF begin so in base64
    r"(?:data:image/[\w.+-]+;base64,)?((?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk|SUkq|TU0A)[A-Za-z0-9+/\r\n]{40,}=*\s*)"
)
OTHER_PIXELS = "image has other pixels than the one that was asked about"
OTHER_IMAGE = "the answers are about two images that are not both named"
SAME_PIXELS = "the two images have the same pixels"
UNREADABLE = "image cannot be read"


@dataclass
class _Pictures:
    """The pictures that a record holds itself, by the name that stands for them in it."""

    held: dict[str, tuple[bytes, str]] = field(default_factory=dict)

    def named(self, value: Any) -> Any:
        """`value`, in which each picture that is there as bytes or base64 has given way to a name."""
        if isinstance(value, bytes):
            return self._name(value, "")
        if isinstance(value, dict):
            inner = value.get("bytes")
            if isinstance(inner, str) and (found := _decoded(inner)) is not None:
                inner = found
            if isinstance(inner, bytes):
                return self._name(inner, str(value.get("path") or ""))
            # what parquet adds to a struct that lacks a key
            return {key: self.named(one) for key, one in value.items() if one is not None}
        if isinstance(value, list):
            return [self.named(one) for one in value]
        if isinstance(value, str) and (found := _decoded(value)) is not None:
            return self._name(found, "")
        return value

    def _name(self, image: bytes, path: str) -> str:
        name = f"held:{hashlib.sha256(image).hexdigest()}"
        self.held.setdefault(name, (image, path))
        return name


def _decoded(text: str) -> bytes | None:
    """The bytes of a picture that a text holds in base64, with or without `data:image/png;base64,` before it."""
    if (found := _PICTURE_TEXT.fullmatch(text)) is None:
        return None
    try:
        content = base64.b64decode(found[1])
        with open_header(content):  # an id, a hash or an answer may begin with the same letters
            return content
    except (binascii.Error, InputError):
        return None


@dataclass(frozen=True)
class _Read:
    """What a record says; `image` is the name of a file or one of `_Pictures`."""

    id: str
    texts: tuple[str, str, str]
    image: str
    weight: float | None = None
    why: str | None = None  # it makes no pair
    image_sha256: str = ""  # this and what follows: in our own files alone
    margin: float | None = None
    judges: tuple[str, ...] = ()
    rejected_image: str | None = None  # as `image`, of a rejected answer about another one; this in other files too
    rejected_image_sha256: str | None = None


# --- a file -----------------------------------------------------------------------------------------------------------


def read_published(path: Path, images: Path | None, allow_test_images: bool = False, progress: bool = True) -> PairSet:
    """Read the pairs of a file in one of the layouts that `KNOWN` names, or in ours.

    Each record is read by its keys, so a file may hold several layouts. Its answers are texts, turns, or whole
    conversations with the question inside; `records.read_turns` reads the turns. Its image is a name relative to
    `images` or to the file's folder, a whole path into `images`, or the picture itself: bytes, base64, a struct of
    bytes and path, or a list of one of these. A picture that is held in the file is written to
    `images` under a name made of its own and its hash. An id that comes again gets a number, and a record without one
    the number of the record.

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
        pictures = _Pictures()
        empty = [key for key, value in record.items() if value is None] if isinstance(record, dict) else []
        read = _read(location, number, pictures.named(record), empty)
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


def _file(place: str, image: str, pictures: _Pictures, id: str, path: Path, images: Path) -> str | None:
    """The name in `images` of what a record names or holds; None where it holds no picture that can be decoded."""
    if image not in pictures.held:
        return _located(place, image, path, images)
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
    kept = read_published(path, images, allow_test_images=True, progress=progress)
    if kept.skipped:
        whys = "; ".join(f"{why}: {number}" for why, number in kept.skipped.items())
        raise InputError(
            f"{path}: {sum(kept.skipped.values())} of its records make no pair ({whys}). `stllava-train pairs --from "
            f"{path} --images {images} --out pairs.jsonl` leaves them out."
        )
    return kept.pairs


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
    if isinstance(record, dict) and "image_sha256" not in record and _sides(record) is not None:
        raise InputError(f"{path}: it holds pairs in another tool's layout. {advice}")


def _is_ours(path: Path) -> bool:
    """Whether its first row has the hash of a pair's image."""
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
    """The file, or the parquet files of the folder, which are one file in pieces: RLAIF-V is published so.

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
        one, other, *_ = kinds.values()
        raise InputError(
            f"{path}: its files {one.name} and {other.name} are not shards of one file. Put those of one split into a "
            "folder of their own, or pass one file."
        )
    held = ", ".join(sorted(file.name for file in path.iterdir())[:4]) or "nothing"
    raise InputError(
        f"{path}: a folder that holds {held}, and no parquet. {READS} A folder that `datasets` saved becomes a file by "
        "`load_from_disk(FOLDER)[SPLIT].to_parquet(FILE)`."
    )


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, record), of a file or of a folder of shards."""
    for file in _shards(path):
        yield from _records_of(file)


def _records_of(path: Path) -> Iterator[tuple[str, Any]]:
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: no regular file. Pass a JSON or parquet file of pairs.")
    if not _is_parquet(path):
        try:
            yield from read_records(path, "pairs")
        except InputError as error:
            raise InputError(f"{error} {READS}") from None
        return
    import pyarrow

    columns = columns_of(path)
    try:
        for number, row in enumerate(parquet_rows(path, str(path)), 1):
            yield f"{path}: row {number}", under_our_names(row, columns)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as parquet ({one_line(error)}). Download it again.") from error


def _located(place: str, name: str, path: Path, images: Path) -> str:
    """The name, relative to `images`, of the file that a record names there or beside its own file."""
    if is_inside(name) and image_file(images, name) is not None:
        return Path(name).as_posix()  # ./a.png and a.png are one
    whole = Path(os.path.normpath(path.parent.absolute() / name)) if "\0" not in name else Path()
    for folder in (images.absolute(), images.resolve()):
        for file in (whole, whole.resolve()):
            if file != folder and file.is_relative_to(folder):
                return file.relative_to(folder).as_posix()
    if is_inside(name) and image_file(path.parent, name) is None:
        return name  # it is nowhere: counted as an image that cannot be read
    raise InputError(
        f"{place}: image is {short(name)}, not a file's name relative to --images {images}. Pass the folder that it is "
        "in, or fix it."
    )


def _written(image: bytes, name: str, images: Path) -> str:
    """The name in `images` of the file that holds these bytes now."""
    with open_header(image) as header:
        kind = header.format or ""
    stem = f"{safe_names([name])[name]}-{hashlib.sha256(image).hexdigest()[:12]}"
    path = images / f"{stem}{SUFFIXES.get(kind, f'.{kind.lower()}')}"
    if not path.exists():
        with whole_file(path) as unfinished:
            unfinished.write_bytes(image)
    return path.name


# --- a record ---------------------------------------------------------------------------------------------------------


def _read(place: str, number: int, record: Any, empty: Sequence[str]) -> _Read:
    """What a record says; its pictures have names, and its keys of null, `empty`, are left out.

    Raises:
        InputError: It is of no known layout, or of another form.
    """
    if isinstance(record, dict) and "image_sha256" in record:
        return _read_ours(place, record)
    sides = _sides(record) if isinstance(record, dict) else None
    if sides is None:
        what = f"its keys are {', '.join(record)}"[:200] if isinstance(record, dict) else f"it is {short(record)}"
        what += f" ({', '.join(empty)} is null)" if empty else ""
        raise InputError(
            f"{place}: {what}: no known layout of pairs. `stllava-train pairs --from` reads {KNOWN}; see "
            "docs/preferences/pairs.md. Name the keys image, question, chosen and rejected, or map them in "
            "LLaMA-Factory's dataset_info.json beside the file."
        )
    record = sides.record
    id = _id(place, number, record)
    place = f"{place}: {id}"
    weight = _weight(place, record)
    rest = _rest(record, sides.used)
    both = [_side(place, key, turns, rest) for key, turns in sides.turns.items()]
    (chosen, image), (rejected, image_too) = both
    if [turn.text for turn in chosen[:-1]] != [turn.text for turn in rejected[:-1]]:
        raise InputError(f"{place}: chosen and rejected do not answer the same question. Fix it, or delete it.")
    if len(chosen) > 2 or len(rejected) > 2:
        raise InputError(
            f"{place}: {len(chosen) // 2} rounds. A pair has one question: keep the last round, where it can be "
            "understood alone, or delete the record."
        )
    question = chosen[0].text
    for key, other in sides.prompts.items():
        if not isinstance(other, str) or _plain(other) != question:
            raise InputError(
                f"{place}: its {key} is {short(other)}, and the question that is read is {short(question)}. Keep one."
            )
    if image is None:
        raise InputError(f"{place}: it names no image. Add the one that it is about, or leave the record out.")
    others = {one for one in (image_too, *_rejected_images(record)) if one != image}
    if len(others) > 1:
        raise InputError(f"{place}: its rejected answer is about {len(others)} images, and one is read. Keep one.")
    why = OTHER_IMAGE if _has_other_image(record, image) or None in others else None
    texts = question, chosen[1].text, rejected[1].text
    return _Read(id, texts, image, weight, why, rejected_image=None if why else next(iter(others), None))


def _read_ours(place: str, record: Row) -> _Read:
    try:
        pair = pair_of({"margin": None} | record)
    except ValueError as error:
        raise InputError(f"{place}: {error}") from None
    texts = pair.question, pair.chosen, pair.rejected
    known = pair.image_sha256, pair.margin, pair.judges, pair.rejected_image, pair.rejected_image_sha256
    return _Read(pair.id, texts, pair.image, pair.weight, None, *known)


@dataclass(frozen=True)
class _Sides:
    """The conversation that each answer ends, by the key that it is from, as it is written.

    Attributes:
        record: Whose keys these are.
        turns: Of the chosen, then of the rejected answer.
        used: Keys that are read.
        prompts: Further keys with a question: each has to be the one that the conversations hold.
    """

    record: Row
    turns: dict[str, Any]
    used: tuple[str, ...]
    prompts: dict[str, Any] = field(default_factory=dict)


def _sides(record: Row) -> _Sides | None:
    """The two conversations of a record in a known layout; None where it is in none."""
    for chosen, rejected in BOTH:
        if chosen in record and rejected in record:
            return _Sides(record, {key: _list(record[key]) for key in (chosen, rejected)}, (chosen, rejected))
    turns = next((key for key in ("conversations", "messages") if key in record), None)
    if turns and "rejected_response" in record:  # ms-swift
        said = _list(record[turns])
        if not isinstance(said, list):
            said = [said]
        rejected_turns = [*said[:-1], *_answer(record["rejected_response"])]
        return _Sides(record, {turns: said, "rejected_response": rejected_turns}, (turns, "rejected_response"))
    if turns and "rejected_images" in record and "chosen" not in record:  # ms-swift: one answer about two images
        said = _list(record[turns])
        return _Sides(record, {turns: said, "rejected_images": said}, (turns,))
    if turns and "chosen" in record and "rejected" in record:  # LLaMA-Factory's ShareGPT and OpenAI formats
        said = _list(record[turns])
        if not isinstance(said, list):
            said = [said]
        ends = {key: _answer(record[key]) for key in ("chosen", "rejected")}
        if all(len(end) > 1 and end[0] == said[0] for end in ends.values()):  # UltraFeedback's `messages` is a copy
            return _asked({key: value for key, value in record.items() if key != turns}, ("chosen", "rejected"))
        ends = {key: [*said, *end] for key, end in ends.items()}
        return _Sides(record, ends, (turns, "chosen", "rejected"))
    if "text" in record and "chosen" not in record:  # RLHF-V: the texts are an object, or one as text
        inner = _object(record["text"])
        return _sides({key: value for key, value in record.items() if key != "text"} | inner) if inner else None
    for keys in (("chosen", "rejected"), ("response", "rejected_response")):
        if all(key in record for key in keys):
            return _asked(record, keys)
    return None


def _asked(record: Row, keys: tuple[str, str]) -> _Sides | None:
    """The two conversations of a record whose question has a key of its own, or is inside its answers."""
    asked = [key for key in QUESTIONS if record.get(key) not in (None, "", [])]
    prompts = {key: record[key] for key in asked}
    ends = {key: _answer(record[key]) for key in keys}
    whole = all(len(end) > 1 and all(isinstance(turn, dict) for turn in end) for end in ends.values())
    used = (*keys, *asked)
    if isinstance(prompts.get("instruction"), str) and isinstance(record.get("input"), str):
        used = (*used, "input")  # LLaMA-Factory's Alpaca format joins the two by a newline
        prompts["instruction"] = "\n".join(part for part in (prompts["instruction"], record["input"]) if part)
    if whole and all(isinstance(prompt, str) and len(_answer(prompt)) == 1 for prompt in prompts.values()):
        return _Sides(record, ends, used, prompts)  # as trl's `maybe_extract_prompt`
    if not asked:
        return None
    prompt = prompts.pop(asked[0])
    asks = [{"role": "user", "content": prompt}]
    if (turns := _turns(prompt)) or isinstance(prompt, list):
        asks = turns or prompt
    ends = {key: end if end[: len(asks)] == asks else [*asks, *end] for key, end in ends.items()}
    return _Sides(record, ends, used, prompts)


def _answer(value: Any) -> list[Any]:
    """An answer as turns: a text, a turn, turns (also as JSON), or a list of one text."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if turns := _turns(value):
        return turns
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return value if isinstance(value, list) else [value]


def _turns(value: Any) -> list[Any]:
    """The turns of a value that is some, one, or the JSON of one of these; empty where it is something else."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = loads(value)
        except (ValueError, RecursionError):
            return []
    turns = value if isinstance(value, list) else [value]
    return turns if all(isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in turns) else []


def _list(value: Any) -> Any:
    """Turns, which a column of parquet may hold as JSON."""
    if isinstance(value, str):
        try:
            read = loads(value)
        except (ValueError, RecursionError):
            return value
        return read if isinstance(read, list) else value
    return value


def _object(value: Any) -> Row:
    """An object, or one as JSON; empty where it is neither."""
    if isinstance(value, str):
        try:
            value = loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}


def _side(place: str, key: str, turns: Any, rest: Row) -> tuple[list[Turn], str | None]:
    """The turns of a conversation, without the image's tag, and its picture."""
    if not isinstance(turns, list):
        raise InputError(f"{place}: {key} is {short(turns)}, not turns of a question and an answer. Fix it.")
    if texts := [turn for turn in turns if isinstance(turn, str)]:
        raise InputError(
            f"{place}: {key}: {short(texts[0])} is in a list of texts, and a pair has one question, one chosen and one "
            "rejected answer. Make a record of each pair."
        )
    record = rest | {"messages": turns}
    wrong: list[str] = []
    # a tag in the text of an answer makes no pair, and `trouble` counts it
    first, *others = read_turns(record, wrong) or [Turn("", "", 0, ())]
    read = [first, *(replace(turn, tags=turn.tags - turn.text.count("<image>")) for turn in others)]
    picture = read_picture(record, read, wrong)
    if system := read_system(record, wrong):
        wrong.append(
            f"its system text is {short(system)}, and pairs are learnt with the template's own. Put it into the "
            "question, or take it out."
        )
    if not all(turn.learnt for turn in read):
        wrong.append("an answer's loss or weight is 0, and both answers of a pair are learnt. Leave the record out.")
    if not wrong and len(read) % 2:
        wrong.append(f"it ends with turn {len(read)}, a question without an answer. Add the answer.")
    if wrong:
        what = re.sub(r'"held:[0-9a-f]*(?:"|\.\.\.)', "one that it holds", wrong[0])
        raise InputError(f"{place}: {key}: {what}")
    return [
        replace(first, text=_plain(first.text)),
        *(replace(turn, text=turn.text.strip()) for turn in read[1:]),
    ], picture


def _plain(text: str) -> str:
    return text.replace("<image>", "").strip()


def _rest(record: Row, used: Sequence[str]) -> Row:
    """The keys beside the conversations that `record` has to read or to refuse.

    Facts about one of the answers (its model, its rating) go. Where the picture itself is held, its address and its
    former path go too.
    """
    plain = {
        key: value
        for key, value in record.items()
        if key not in (*used, *IDS) and not _WEIGHT.fullmatch(key) and not key.startswith(("chosen", "reject"))
    }
    if "origin_dataset" in plain and plain.get("image"):
        plain.pop("image_path", None)  # RLHF-V's and RLAIF-V's: where the image came from
    held = [key for key, value in plain.items() if '"held:' in json.dumps(value, default=str)]
    if not held:
        return plain
    others = {key: value for key, value in plain.items() if key not in held and key.lower() not in PICTURES}
    return others | {"images": [plain[key] for key in held]}


def _has_other_image(record: Row, image: str) -> bool:
    """Whether one of the two pictures is still to be noised (MMedPO's keys), or the chosen answer's is another one."""
    no = (None, 0, "", "0", "false", "no")
    if any((value.lower() if isinstance(value, str) else value) not in no for value in map(record.get, _NOISED)):
        return True
    return any(file != image for file in _named(record, ("chosen_image", "chosen_images")))


def _rejected_images(record: Row) -> list[Any]:
    """The pictures of the rejected answer, in MMedPO's key for them and in ms-swift's."""
    return _named(record, ("rejected_image", "rejected_images"))


def _named(record: Row, keys: Sequence[str]) -> list[Any]:
    """The files that these keys name; None for one that is named by nothing we read."""
    others = [record.get(key) for key in keys]
    named = [file for other in others for file in (other if isinstance(other, list) else [other])]
    files = [file.get("path") if isinstance(file, dict) else file for file in named]
    return [file if isinstance(file, str) else None for file in files if file not in (None, "")]


def _id(place: str, number: int, record: Row) -> str:
    key = next((key for key in IDS if key in record), None)
    if key is None:
        return f"record-{number}"
    id = record[key]
    if isinstance(id, float) and id.is_integer():  # pandas makes floats of a column in which a number lacks
        id = int(id)
    if not isinstance(id, str | int) or isinstance(id, bool) or id == "":
        raise InputError(f"{place}: {key} is {short(id)}. Give the record a text or a whole number.")
    return str(id)


def _weight(place: str, record: Row) -> float | None:
    """The record's weight, a number or one as text; None where it has none."""
    keys = [key for key in record if _WEIGHT.fullmatch(key) and record[key] is not None]
    if halves := [key for key in record if re.fullmatch(r"(?:chosen|rejected)_weights?", key)]:
        raise InputError(
            f"{place}: its {halves[0]} is {short(record[halves[0]])}, and a pair has one weight. Name it weight, or "
            "take it out."
        )
    if len(keys) > 1:
        raise InputError(f"{place}: it has {keys[0]} and {keys[1]}. Keep one of the two.")
    if not keys:
        return None
    value = record[keys[0]]
    try:
        weight = math.nan if isinstance(value, bool) or not isinstance(value, str | int | float) else float(value)
    except (ValueError, OverflowError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise InputError(f"{place}: {keys[0]} is {short(value)}, not a number from 0 on. Fix it, or delete the record.")
    return weight
