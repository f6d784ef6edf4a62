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

# what may change when a run resumes: memory and safety, not what is learnt
FREE_TO_CHANGE = {"micro_batch", "gradient_checkpointing", "save_every"}
PER_MICRO_BATCH = {"sft", "aot", "aot_unpaired", "bco_pair"}  # losses of trl that are no mean over pairs
STARTS = {"start", "start_vision_tower"}


WHOLE = "whole.json"  # the last file of a folder to resume from


def last_whole(folder: Path) -> Path | None:
    """The latest of the folders `checkpoint-N` in `folder` that was written to its end.

    Raises:
        InputError: A file in it is not as it was written: without its optimizer's state, training would go another way.
    """
    whole = [file.parent for file in folder.glob(f"checkpoint-*/{WHOLE}") if step_of_folder(file.parent) is not None]
    last = max(whole, key=lambda one: step_of_folder(one) or 0, default=None)
    if last is not None:
        try:
            written = read_json(last / WHOLE)["files"]
            found = sizes(last)
            changed = sorted(name for name, size in written.items() if found.get(name) != size)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            changed = [WHOLE]
        if changed:
            raise InputError(
                f"{last}: {', '.join(changed)}: missing, or changed since the run wrote it. Restore it, or delete this "
                "folder; --resume then continues from the checkpoint before it, or from the start."
            )
    return last


def step_of_folder(folder: Path) -> int | None:
    """The N of a folder `checkpoint-N`."""
    number = folder.name.rpartition("-")[2]
    return int(number) if re.fullmatch(r"[0-9]{1,15}", number) else None


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file, but of the one that lists them."""
    return {
        file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file() and file.name != WHOLE
    }


def check_folder(out: Path, resume: bool) -> None:
    """Look at a run's folder before any work.

    Raises:
        InputError: It holds something; with `resume`, no run.
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
    """What decided the result of the run in `out`.

    Raises:
        InputError: There is none.
    """
    try:
        before = read_json(out / "run.json")
        return {
            "recipe": dict(before["recipe"]),
            "data": [_known_as(one) for one in before["data"]],
            "images": before["images_sha256"],
            "start": before["start"]["sha256"],
            "finished": before.get("finished"),
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{out}: no run to continue ({fault(error)}). Leave --resume out, or name the folder of a run."
        ) from error


def _known_as(data: Mapping[str, Any]) -> str:
    """The hashes of a data file; see `columns.data_hash`."""
    return " ".join([data["sha256"], *([f"columns {data['columns']}"] if "columns" in data else [])])


def check_same(out: Path, manifest: Mapping[str, Any]) -> None:
    """Whether the run in `out` is this one.

    Raises:
        InputError: It is another, or finished.
    """
    before = _run_in(out)
    # a folder can be named in several ways: what counts is what is in it
    free = FREE_TO_CHANGE | (STARTS if manifest["start"]["sha256"] == before["start"] else set())
    if set(manifest["recipe"].get("loss", ())) & PER_MICRO_BATCH:
        free = free - {"micro_batch"}
    recipe = {key: value for key, value in manifest["recipe"].items() if key not in free}
    for name, now, then in (
        *((f"recipe: {key}", value, before["recipe"].get(key)) for key, value in recipe.items()),
        ("data", [_known_as(one) for one in manifest["data"]], before["data"]),
        ("images", manifest["images_sha256"] or before["images"], before["images"]),  # the first process knows
        ("start", manifest["start"]["sha256"], before["start"]),
    ):
        if now != then:
            raise InputError(
                f"{out}: {name}: the run in it has {then}, this call {now}. Call it as before, or without --resume "
                "and with another --out."
            )
    if before["finished"]:  # no file tells it: PEFT writes a README.md of its own before any weight
        raise InputError(f"{out}: the run in it is finished. Nothing is left to do.")


def kept_lines(trace: Path, step: int) -> list[dict[str, Any]]:
    """The lines of the trace up to `step`; those behind it will be computed again.

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
    """The steps of `losses.jsonl`, up to a line that is none: a kill cuts the last one short."""
    lines = []
    try:
        for line in trace.read_bytes().splitlines():
            made = json.loads(line)
            if not isinstance(made, dict) or not isinstance(made.get("step"), int):
                break
            lines.append(made)
    except (OSError, ValueError, RecursionError):
        pass
    return lines


def placed(source: str) -> str:
    """A folder's full path, so that it is found from wherever; a hub id as it is."""
    folder = local_path(source)
    return source if folder is None else str(folder.resolve())
