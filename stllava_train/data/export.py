"""Write prepared splits, and LLaVA-Med's instructions with figures of PubMed Central, as conversations and images.

Every set becomes `<set>.json`, a list with one conversation a line, and `images/<set>/`. docs/train/data.md shows
a line.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from stllava_eval.data.catalog import Row
from stllava_eval.data.splits import read_rows
from stllava_eval.errors import InputError
from stllava_eval.images import open_header
from stllava_eval.storage import file_sha256, has_lone_surrogate, loads, read_json, whole_file
from stllava_train.data.pmc import WORKERS, Fetched, Figure, fetch_figures, fetch_file
from stllava_train.data.records import tags

# `stage 1` splits a conversation at these: in a text they would end a turn or begin one, or call for a second image
MARKS = ("</s>", "<image>", "VUSER:", "USER:", "ASSISTANT:")
SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}  # Pillow's format -> suffix, where not its own name
LONGEST_NAME = 100  # characters of a file name before its suffix. Our choice

# microsoft/LLaVA-Med, README.md; the hashes are those of the repository's LFS pointers (commit d406e3f)
MED_IM = "https://hanoverprod.z21.web.core.windows.net/med_llava"
INSTRUCTIONS = "llava_med_instruct_60k_inline_mention.json"
ADDRESSES = "llava_med_image_urls.jsonl"
PUBLISHED = {
    INSTRUCTIONS: "b3649f4193a51215aee4519b44d8436a4200e182d6a78a3cb78672d97bea948a",
    ADDRESSES: "2604441ec3d1f6324d21846cfd44f92eab29454beed1da42a98d943b41731e44",
}


@dataclass(frozen=True)
class Written:
    """What a set became."""

    path: Path
    conversations: int
    images: int
    questions: int
    skipped: dict[str, list[str]]  # why -> ids of questions, or of conversations of med-im


@dataclass(frozen=True)
class _Instruction:
    """A record of LLaVA-Med's instruction file."""

    id: str
    figure: str  # LLaVA-Med's pair_id
    turns: list[Any]


def write_vqa(name: str, out: Path, *, split: str = "train", language: str = "en", rounds: int = 12) -> Written:
    """Write a prepared split under `$STLLAVA_HOME` as conversations: `<out>/<name>.json` and `<out>/images/<name>/`.

    The questions of an image stand in the split's order, at most `rounds` to a conversation, white space around them
    and their answers removed. Equal splits give equal bytes.

    Args:
        name: vqarad, slake or pathvqa.
        out: Folder to write.
        split: train or validation.
        language: en; or all: SLAKE's Chinese split too, in conversations of its own after the English ones.
        rounds: From 1 on. LLaVA-Med fine-tunes with 1.

    Raises:
        InputError: The split is not prepared, every row is left out, or the disk is full.
    """
    if rounds < 1:
        raise InputError(f"--rounds {rounds}: no conversation. Give questions per conversation, from 1 on.")
    asked: dict[tuple[str, str], list[Row]] = {}
    images: dict[str, bytes] = {}
    skipped: dict[str, list[str]] = defaultdict(list)
    for part in (split, f"{split}_zh") if language == "all" else (split,):
        for row in read_rows(name, part):
            trouble = _trouble(row.question, row.reference)
            if trouble:
                skipped[trouble].append(row.id)
                continue
            if images.setdefault(row.image_id, row.image) != row.image:
                raise InputError(
                    f"{name} {part}: {row.id}: {row.image_id} is another image than in {split}. Prepare both from one "
                    "source."
                )
            asked.setdefault((part, row.image_id), []).append(row)
    if not asked:
        raise InputError(f"{name} {split}: no row can be used: {_reasons(skipped)}. Prepare another copy.")
    stems = safe_names(images)
    files = {id: f"images/{name}/{stems[id]}{_suffix(image)}" for id, image in images.items()}
    for id, image in images.items():
        _write_image(out / files[id], image)
    taken: set[str] = set()
    records = []
    for (_, image_id), rows in asked.items():
        for first in range(0, len(rows), rounds):
            texts: list[str] = []
            for row in rows[first : first + rounds]:
                texts += [row.question.strip(), row.reference.strip()]
            record = _record(_unused(f"{name}-{image_id}", taken), files[image_id], texts)
            records.append(record | {"unordered": True})  # no question builds on the one before
    return _write(out / f"{name}.json", records, skipped)


def write_med_im(
    source: str, out: Path, *, workers: int = WORKERS, retry_missing: bool = False
) -> tuple[Written, Fetched, list[str]]:
    """Write LLaVA-Med's 60k instructions with inline mentions as `<out>/med-im.json`, of the figures that can be had.

    Figures go to `<out>/images/med-im/<pair_id>.jpg`, and one that is there is used; what became of each is in
    `<out>/med-im-manifest.jsonl`. Texts stay as published, the image tag where it stands.

    STLLaVA-Med's authors trained on 37,452 of these images (arXiv:2406.19973, Table 1), "filtered" by a rule that they
    did not publish: this is what the rule was applied to, not its outcome.

    Args:
        source: Folder with the two published files, or the web address that has them as `MED_IM` had. Downloaded
            files go to `<out>/med-im-source`.
        out: Folder to write.
        workers: See `fetch_figures`.
        retry_missing: See `fetch_figures`.

    Returns:
        What was written, what became of the figures, and what is unusual about the two files.

    Raises:
        InputError: A file cannot be had or read, no image was found, or see `fetch_figures`.
    """
    files, notes = _source_files(source, out / "med-im-source")
    usable = []
    skipped: dict[str, list[str]] = defaultdict(list)
    for instruction in _instructions(files[INSTRUCTIONS]):
        trouble = _turn_trouble(instruction.turns)
        if trouble:
            skipped[trouble].append(instruction.id)
        else:
            usable.append(instruction)
    stems = safe_names(instruction.figure for instruction in usable)
    places = {figure: f"images/med-im/{stem}.jpg" for figure, stem in stems.items()}
    known = _addresses(files[ADDRESSES], stems.keys())
    figures = {figure: Figure(out / place, *known.get(figure, (None, ""))) for figure, place in places.items()}
    fetched = fetch_figures(figures, out / "med-im-manifest.jsonl", workers=workers, retry_missing=retry_missing)
    taken: set[str] = set()
    records = [
        _record(_unused(one.id, taken), places[one.figure], [turn["value"] for turn in one.turns], tag="")
        for one in usable
        if one.figure in fetched.found
    ]
    if not records:
        whys = {**fetched.missing, **fetched.failed}.values()
        raise InputError(
            f"{source}: none of the {len(figures)} images could be had ({next(iter(whys), 'none is named')}). "
            f"Run again later, or put images you have into {out / 'images' / 'med-im'} as PAIR_ID.jpg."
        )
    return _write(out / "med-im.json", records, skipped), fetched, notes


def safe_names(ids: Iterable[str]) -> dict[str, str]:
    """Return id -> a file name without suffix that no system takes for a folder, a hidden file or another id's.

    >>> safe_names(["xmlab1/source.jpg", "../../etc/passwd"])
    {'xmlab1/source.jpg': 'xmlab1_source', '../../etc/passwd': 'etc_passwd'}
    """
    names = {}
    owners: dict[str, set[str]] = defaultdict(set)
    for id in ids:
        stem = re.sub(r"\.(jpe?g|png|bmp|gif|tiff?|webp)$", "", id, flags=re.IGNORECASE)
        names[id] = re.sub(r"[^A-Za-z0-9._-]+", "_", stem).lstrip("._-")[:LONGEST_NAME] or "image"
        owners[names[id].lower()].add(id)  # some disks do not tell A from a
    return {
        id: name if len(owners[name.lower()]) == 1 else f"{name}-{hashlib.sha256(id.encode()).hexdigest()[:12]}"
        for id, name in names.items()
    }


def _trouble(question: str, answer: str) -> str | None:
    """Return why a question and its answer cannot be trained on; None where they can."""
    for what, text in (("question", question), ("answer", answer)):
        if not text.strip():
            return f"empty {what}"
        for mark in MARKS:
            if mark in text:
                return f"{mark} in the {what}"
        if others := tags(text):
            return f"{others[0]} in the {what}"
        if has_lone_surrogate(text):
            return f"half a character in the {what}"
    return None


def _turn_trouble(turns: Sequence[Any]) -> str | None:
    """Return why a conversation cannot be trained on; None where it can.

    The tag of its image is there once, in its first question.
    """
    roles = [turn.get("from") for turn in turns if isinstance(turn, dict) and isinstance(turn.get("value"), str)]
    if not turns or len(turns) % 2 or roles != ["human", "gpt"] * (len(turns) // 2):
        return "turns are not human, gpt, human, gpt, ..."
    texts = [turn["value"] for turn in turns]
    if texts[0].count("<image>") != 1:
        return "not one <image> in the first question"
    texts[0] = texts[0].replace("<image>", "")
    troubles = (_trouble(question, answer) for question, answer in zip(texts[::2], texts[1::2], strict=True))
    return next(filter(None, troubles), None)


def _record(id: str, image: str, texts: Sequence[str], tag: str = "<image>\n") -> dict[str, Any]:
    """Return a conversation as LLaVA's training reads it, `tag` before its first question."""
    turns = [
        {"from": "gpt" if number % 2 else "human", "value": text if number else tag + text}
        for number, text in enumerate(texts)
    ]
    return {"id": id, "image": image, "conversations": turns}


def _unused(id: str, taken: set[str]) -> str:
    number, unused = 1, id
    while unused in taken:
        number += 1
        unused = f"{id}-{number}"
    taken.add(unused)
    return unused


def _write(path: Path, records: Sequence[Mapping[str, Any]], skipped: Mapping[str, list[str]]) -> Written:
    with whole_file(path) as unfinished:
        lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        unfinished.write_text(f"[\n{lines}\n]\n", encoding="utf-8", newline="\n")
    return Written(
        path,
        conversations=len(records),
        images=len({record["image"] for record in records}),
        questions=sum(len(record["conversations"]) for record in records) // 2,
        skipped=dict(skipped),
    )


def _write_image(path: Path, image: bytes) -> None:
    if not path.is_file() or path.stat().st_size != len(image) or path.read_bytes() != image:
        with whole_file(path) as unfinished:
            unfinished.write_bytes(image)


def _suffix(image: bytes) -> str:
    """Return the suffix of an image by what the file is, not by what it was called."""
    with open_header(image) as header:
        kind = header.format or ""
    return SUFFIXES.get(kind, f".{kind.lower()}")


def _reasons(skipped: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{why}: {len(ids)}" for why, ids in skipped.items())


def _source_file(source: str, name: str, downloads: Path) -> Path:
    """The published file, in the folder `source` or downloaded from the address `source`."""
    if source.startswith(("http://", "https://")):
        path = downloads / name
        if not path.exists():
            fetch_file(f"{source.rstrip('/')}/{'instruct/' if name == INSTRUCTIONS else ''}{name}", path)
        return path
    folder = Path(source).expanduser()
    for path in (folder / name, folder / "instruct" / name):  # LLaVA-Med's own script sorts them so
        if path.is_file():
            return path
    raise InputError(f"--from {source}: it has no {name}. Pass the folder that holds {INSTRUCTIONS} and {ADDRESSES}.")


def _source_files(source: str, downloads: Path) -> tuple[dict[str, Path], list[str]]:
    """The two published files by name, and which of them differ from what LLaVA-Med published."""
    files = {name: _source_file(source, name, downloads) for name in (INSTRUCTIONS, ADDRESSES)}
    notes = []
    for name, file in files.items():
        sha256 = file_sha256(file)
        if sha256 == PUBLISHED[name]:
            continue
        if source == MED_IM:
            file.unlink()
            raise InputError(
                f"{MED_IM}: {name} is not the published file: its sha256 is {sha256}, not {PUBLISHED[name]}. "
                "Get it elsewhere and pass its folder with --from."
            )
        notes.append(f"{file}: not the published file (sha256 {sha256[:16]}..., published {PUBLISHED[name][:16]}...)")
    return files, notes


def _instructions(path: Path) -> list[_Instruction]:
    try:
        records = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}). Download it again.") from error
    if not isinstance(records, list) or not records:
        raise InputError(f"{path}: not a list of conversations. Download LLaVA-Med's {INSTRUCTIONS}.")
    instructions = []
    for number, record in enumerate(records, 1):
        fields = record if isinstance(record, dict) else {}
        id, image = fields.get("id"), fields.get("image")
        turns = fields.get("conversations", fields.get("conversatons"))  # both spellings are about
        if not (_is_name(id) and _is_name(image) and isinstance(turns, list)):
            raise InputError(
                f"{path}: record {number}: {str(record)[:80]!r} has no id, image or conversations. Download "
                f"LLaVA-Med's {INSTRUCTIONS} again."
            )
        instructions.append(_Instruction(id, image.removesuffix(".jpg"), turns))
    return instructions


def _is_name(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and value != "" and value.isprintable()


def _addresses(path: Path, wanted: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Pair id -> (address of the article's package, the image's name in it), of those wanted."""
    sought = set(wanted)
    found: dict[str, tuple[str, str]] = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    record = loads(line)
                    id, package, member = record["pair_id"], record["pmc_tar_url"], record["image_file_path"]
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise InputError(
                        f"{path}:{number}: {line[:80]!r} has no pair_id, pmc_tar_url and image_file_path. Download "
                        f"LLaVA-Med's {ADDRESSES} again."
                    ) from error
                if id in sought:
                    found.setdefault(id, (str(package), str(member)))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}). Download it again.") from error
    return found
