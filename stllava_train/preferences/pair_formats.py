"""Write preference pairs for our trainer and in the layouts of other trainers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stllava_eval.errors import InputError
from stllava_eval.storage import whole_file
from stllava_train.data.conversations import image_file
from stllava_train.preferences.pair_selection import Split
from stllava_train.preferences.pairs import Pair, row_of
from stllava_train.resumable import ResumableJsonl, Row, line

FORMATS = ("trl", "authors", "llama-factory", "ms-swift")


# --- files ------------------------------------------------------------------------------------------------------------


def write_pairs(
    made: Split, out: Path, source: Mapping[str, Any], formats: Sequence[str] = (), images: Path | None = None
) -> list[Path]:
    """Write `NAME.jsonl`, where pairs are held out `NAME-held-out.jsonl` too, and the same pairs for other trainers.

    Beside each file of pairs lies its manifest: the source, the options, and how many pairs were left out by why. Other
    trainers' files are `NAME.trl.jsonl`, `NAME.authors.json`, `NAME.ms-swift.jsonl` and the folder
    `NAME.llama-factory/`, LLaMA-Factory's `dataset_dir`. All but the authors' hold whole paths of the images.

    Args:
        made: See `pair_selection.select_pairs`.
        out: `NAME.jsonl`.
        source: What the pairs were made of, for the manifest.
        formats: Of `FORMATS`.
        images: The folder of the images; formats other than the authors' need it.

    Returns:
        The files written, manifests aside.

    Raises:
        InputError: `out` holds other pairs or something else, an image is missing, or the disk is full.
    """
    if unknown := [format for format in formats if format not in FORMATS]:
        raise InputError(f"--format {unknown[0]}: unknown. Choose of {', '.join(FORMATS)}.")
    parts = {"train": (out, made.train)}
    if made.held_out:
        parts["held-out"] = (out.with_name(f"{out.stem}-held-out{out.suffix}"), made.held_out)
    exports: dict[Path, str] = {}
    for format in dict.fromkeys(formats):
        exports |= _exports(dict(parts.values()), out, format, images)
    for part, (path, pairs) in parts.items():
        decided_by = {"stage": "pairs", "part": part, "source": source, "options": asdict(made.options)}
        ledger = ResumableJsonl(path, lambda row: row["id"], decided_by | {"rows_sha256": _sha256(pairs)})
        ledger.add(row_of(pair) for pair in pairs if pair.id not in ledger.rows)
        counts = {"train": len(made.train), "held_out": len(made.held_out), "left_out": made.skipped}
        ledger.finish([pair.id for pair in pairs], counts=counts)
    for file, text in exports.items():
        with whole_file(file) as unfinished:
            unfinished.write_text(text, encoding="utf-8", newline="\n")
    return [*(path for path, _ in parts.values()), *exports]


def _exports(parts: Mapping[Path, Sequence[Pair]], out: Path, format: str, images: Path | None) -> dict[Path, str]:
    """Return the text of each file of a format; `parts` by their files of pairs."""
    texts: dict[Path, str] = {}
    listed: Row = {}
    for path, pairs in parts.items():
        lines = [line(exported(pair, format, *_image_paths(pair, format, images))) for pair in pairs]
        if format in ("trl", "ms-swift"):
            texts[path.with_suffix(f".{format}.jsonl")] = "".join(lines)
            continue
        array = "[\n" + ",\n".join(text.rstrip("\n") for text in lines) + "\n]\n"
        if format == "authors":
            texts[path.with_suffix(".authors.json")] = array
            continue
        folder = out.with_suffix(".llama-factory")
        texts[folder / f"{path.stem}.json"] = array
        columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"}
        known = {"file_name": f"{path.stem}.json", "formatting": "sharegpt", "ranking": True, "columns": columns}
        listed[path.stem] = known  # LLaMA-Factory finds a file by this entry alone
        texts[folder / "dataset_info.json"] = json.dumps(listed, indent=2, ensure_ascii=False) + "\n"
    return texts


def refusal_of_two_images(format: str) -> str:
    """Return the line that refuses to export image-contrast pairs in a format other than ms-swift's."""
    return (
        f"--format {format}: its chosen and rejected answers are about two images, and {format} has one image for "
        "both. Write --format ms-swift, or none."
    )


def exported(pair: Pair, format: str, image: str, rejected_image: str = "") -> Row:
    """Return the pair as another trainer reads it, one of `FORMATS`; `pair_records` reads it back.

    `id` and `weight` (where the pair has one) go with it. The other trainers pass over both keys.

    Args:
        pair: The pair.
        format: Of `FORMATS`.
        image: Its image, as the format names it.
        rejected_image: The same of the rejected answer's, where that is another one.

    Raises:
        InputError: The pair has two images, and the format one.
    """
    asked = {"from": "human", "value": f"<image>\n{pair.question}"}
    chosen, rejected = ({"from": "gpt", "value": text} for text in (pair.chosen, pair.rejected))
    named: Row = {"id": pair.id}
    weight = {} if pair.weight is None else {"weight": pair.weight}
    if pair.rejected_image and format != "ms-swift":
        raise InputError(f"{pair.id}: {refusal_of_two_images(format)}")
    if format == "authors":  # train_dpo.py:945-975
        conversations = {"chosen_conversations": [asked, chosen], "reject_conversations": [asked, rejected]}
        return named | {"image": image} | conversations | weight
    if format == "llama-factory":
        # hiyouga/LLaMA-Factory, data/README.md, "Sharegpt Format": "Preference Dataset", "Multimodal Image Dataset"
        return named | {"conversations": [asked], "chosen": chosen, "rejected": rejected, "images": [image]} | weight
    if format == "ms-swift":
        # modelscope/ms-swift, docs/source_en/Customization/Custom-dataset.md, "RLHF", "Multimodal"; no newline behind
        # the tag: its templates for LLaVA add one
        turns = [{"role": "user", "content": f"<image>{pair.question}"}, {"role": "assistant", "content": pair.chosen}]
        if pair.rejected_image:  # ms-swift 3.8 and later, the same page: "rejected_messages", "rejected_images"
            rejected_turns = [turns[0], {"role": "assistant", "content": pair.rejected}]
            two = {"rejected_messages": rejected_turns, "rejected_images": [rejected_image]}
            return named | {"messages": turns, "images": [image]} | two | weight
        return named | {"messages": turns, "rejected_response": pair.rejected, "images": [image]} | weight
    # trl 1.16, DataCollatorForVisionPreference in trainer/dpo_trainer.py
    question = [{"type": "image"}, {"type": "text", "text": pair.question}]
    answers = {
        name: [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
        for name, text in (("chosen", pair.chosen), ("rejected", pair.rejected))
    }
    return named | {"images": [image], "prompt": [{"role": "user", "content": question}]} | answers | weight


def _image_paths(pair: Pair, format: str, images: Path | None) -> list[str]:
    """Return the paths of its one image or of its two, the chosen answer's before the rejected one's."""
    if format == "authors":
        return list(pair.pictures)
    if images is None:
        raise InputError(f"--format {format}: its rows hold the images' paths. Pass their folder with --images.")
    files = []
    for image in pair.pictures:
        if (file := image_file(images.resolve(), image)) is None:
            raise InputError(
                f"{pair.id}: its image {image} is not in {images}. Pass the folder of the images with --images."
            )
        files.append(str(file))
    return files


def _sha256(pairs: Sequence[Pair]) -> str:
    return hashlib.sha256(json.dumps([row_of(pair) for pair in pairs]).encode()).hexdigest()
