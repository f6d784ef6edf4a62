"""Find the local folder of a checkpoint and read its JSON files, without torch, so that a wrong name ends at once."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stllava_eval.errors import InputError, one_line
from stllava_eval.storage import loads, local_path, read_text

PROJECTOR_FILES = ("mm_projector.bin", "mm_projector.safetensors")


def read_json(file: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        InputError: There is none.
    """
    try:
        value = loads(read_text(file))
        if not isinstance(value, dict):
            raise TypeError(f"a {type(value).__name__}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{file}: not a JSON object ({error}). Copy the checkpoint again.") from error
    return value


def find_folder(named: str, folders: Sequence[Path]) -> Path | None:
    """Find the folder that a checkpoint in `folders` may mean by the path `named`: in them, beside them, or here."""
    try:
        path = Path(named).expanduser()
        candidates = []
        for folder in folders:
            candidates += [folder / path, folder.parent / path]
        return next((candidate for candidate in [*candidates, path] if candidate.is_dir()), None)
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a zero byte: no path at all
        return None


def local_folder(name: str, revision: str | None = None) -> Path:
    """Return the local folder of `name`; a hub id is downloaded, at `revision`: a branch, tag or commit.

    Raises:
        InputError: There is neither.
    """
    return find_folder(name, []) or _download(name, revision or None)


def _download(name: str, revision: str | None) -> Path:
    """Return the hub's copy of `name` (of None, its main branch): safetensors if it has them, else pickles."""
    if (path := local_path(name)) is not None and path.is_file():
        raise InputError(f"{name} is a file. Pass the folder that it is in.")
    missing = f"{name[:200] or 'an empty name'}: no such folder"
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise InputError(f"{missing}. Pass a folder or a hub id such as llava-hf/llava-1.5-7b-hf.")
    from huggingface_hub import HfApi, snapshot_download

    try:
        allowed = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.bin", "Vit-lora/*"]
        allowed += ["vocab.txt", "merges.txt"]  # of tokenizers without a tokenizer.json
        if not os.environ.get("HF_HUB_OFFLINE"):
            files = (
                HfApi().model_info(name, revision=revision, timeout=10).siblings or []
            )  # says at once that there is no hub
            if any(re.fullmatch(r"model.*\.safetensors", file.rfilename) for file in files):
                allowed.remove("*.bin")
        return Path(snapshot_download(name, revision=revision, allow_patterns=allowed, etag_timeout=10))
    except Exception as error:  # the hub's errors have no common base; offline, gated and unknown all end here
        raise InputError(
            f"{missing}, and not to be had from the hub ({type(error).__name__}: {one_line(error)}). Pass a folder "
            "that is there, or make the demo's checkpoint with `stllava-train tiny`."
        ) from error


def refuse_no_checkpoint(folder: Path, name: str) -> None:
    """Check that `folder`, which was given as `name`, has a configuration, before anything heavy is imported.

    Raises:
        InputError: It has none, or one that is no JSON object.
    """
    if (folder / "adapter_config.json").is_file():
        return
    if not (folder / "config.json").is_file():
        alone = next((file for file in PROJECTOR_FILES if (folder / file).is_file()), None)
        hint = f"Pass {name}/{alone} as --projector." if alone else "Pass a folder with one and weights."
        if inner := sorted(file.parent.name for file in folder.glob("*/adapter_config.json")):
            hint = f"It holds adapters in folders of their own: pass one of them, such as {name}/{inner[0]}."
        if (folder / "losses.jsonl").is_file():
            hint = "It is a training run that is not finished: continue it with --resume."
        raise InputError(f"{name} is not a checkpoint: it has no config.json. {hint}")
    read_json(folder / "config.json")
