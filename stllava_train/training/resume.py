"""Find where a stopped run can continue, and check that it is the same run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stllava_eval.errors import InputError
from stllava_eval.storage import local_path, read_json, refuse_file
from stllava_train.training.card import fault

# The keys that may change when a run resumes: they decide memory and safety, not what is learnt
FREE_TO_CHANGE = {"micro_batch", "gradient_checkpointing", "save_every"}
PER_MICRO_BATCH = {"sft", "aot", "aot_unpaired", "bco_pair"}  # losses of trl 1.16 that are no mean over pairs
STARTS = {"start", "start_vision_tower"}
WHOLE = "whole.json"  # the last file written to a folder to resume from: where it is, all others are


def last_whole(folder: Path) -> Path | None:
    """Return the latest of the folders `checkpoint-N` in `folder` that was written to its end; None without one.

    Raises:
        InputError: A file in it is not as it was written: without its optimizer's state, training would go another way.
    """
    whole = [file.parent for file in folder.glob(f"checkpoint-*/{WHOLE}") if step_of_folder(file.parent) is not None]
    last = max(whole, key=lambda checkpoint: step_of_folder(checkpoint) or 0, default=None)
    if last is not None:
        try:
            written = read_json(last / WHOLE)["files"]
            present = sizes(last)
            changed = sorted(name for name, size in written.items() if present.get(name) != size)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            changed = [WHOLE]
        if changed:
            raise InputError(
                f"{last}: {', '.join(changed)}: missing, or changed since the run wrote it. Restore it, or delete this "
                "folder; --resume then continues from the checkpoint before it, or from the start."
            )
    return last


def step_of_folder(folder: Path) -> int | None:
    """Return the N of a folder `checkpoint-N`; None where its name is another."""
    number = folder.name.rpartition("-")[2]
    return int(number) if re.fullmatch(r"[0-9]{1,15}", number) else None


def sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each file in a folder, without the file that lists them."""
    return {
        file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file() and file.name != WHOLE
    }


def check_folder(out: Path, resume: bool) -> None:
    """Check a run's folder before any work.

    Raises:
        InputError: The folder is not empty, or, with `resume`, holds no run.
    """
    if resume:
        _run_in(out)
        return
    refuse_file(out, "--out")
    if out.is_dir() and any(out.iterdir()):
        if (out / "run.json").is_file():
            raise InputError(
                f"{out}: it is not empty. Pass --resume to continue the run in it, or choose another folder."
            )
        raise InputError(f"{out}: it is not empty and holds no run. Choose another --out.")


def _run_in(out: Path) -> dict[str, Any]:
    """Return what decided the result of the run in `out`.

    Raises:
        InputError: It holds no run.
    """
    try:
        before = read_json(out / "run.json")
        return {
            "recipe": dict(before["recipe"]),
            "data": [_known_as(file) for file in before["data"]],
            "images": before["images_sha256"],
            "start": before["start"]["sha256"],
            "finished": before.get("finished"),
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{out}: no run to continue ({fault(error)}). Leave --resume out, or name the folder of a run."
        ) from error


def _known_as(data: Mapping[str, Any]) -> str:
    """Return the hashes of a data file as one text; see `columns.data_hash`."""
    return " ".join([data["sha256"], *([f"columns {data['columns']}"] if "columns" in data else [])])


def check_same(out: Path, manifest: Mapping[str, Any]) -> None:
    """Check that the run in `out` is this one, and is not finished.

    Raises:
        InputError: It is another run, or finished.
    """
    before = _run_in(out)
    # a folder can be named in several ways: what counts is what is in it
    free = FREE_TO_CHANGE | (STARTS if manifest["start"]["sha256"] == before["start"] else set())
    if set(manifest["recipe"].get("loss", ())) & PER_MICRO_BATCH:
        free = free - {"micro_batch"}
    recipe = {key: value for key, value in manifest["recipe"].items() if key not in free}
    for name, now, then in (
        *((f"recipe: {key}", value, before["recipe"].get(key)) for key, value in recipe.items()),
        ("data", [_known_as(file) for file in manifest["data"]], before["data"]),
        ("images", manifest["images_sha256"] or before["images"], before["images"]),  # the first process knows
        ("start", manifest["start"]["sha256"], before["start"]),
    ):
        if now != then:
            raise InputError(
                f"{out}: {name}: the run in it has {then}, this call {now}. Call it as before, or without --resume "
                "and with another --out."
            )
    if before["finished"]:  # no file could show it: PEFT writes a README.md of its own before any weight
        raise InputError(f"{out}: the run in it is finished. Nothing is left to do.")


def kept_lines(trace: Path, step: int) -> list[dict[str, Any]]:
    """Return the lines of the trace up to `step`; those behind it will be computed again.

    Raises:
        InputError: One is missing.
    """
    kept = [line for line in read_trace(trace) if line["step"] <= step] if step else []
    for number in range(1, step + 1):
        if number > len(kept) or kept[number - 1]["step"] != number:
            raise InputError(
                f"{trace}:{number}: the losses of step {number} are missing, and the run continues from step {step}. "
                "Restore the file, or train again with another --out."
            )
    return kept


def read_trace(trace: Path) -> list[dict[str, Any]]:
    """Read the lines of `losses.jsonl`, up to the first that is damaged: a kill cuts the last one short."""
    lines = []
    try:
        for line in trace.read_bytes().splitlines():
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                break
            lines.append(record)
    except (OSError, ValueError, RecursionError):
        pass
    return lines


def placed(source: str) -> str:
    """Return a folder's full path, so that it is found from any working directory; a hub id stays as it is."""
    folder = local_path(source)
    return source if folder is None else str(folder.resolve())
