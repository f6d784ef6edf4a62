"""Open the answerer of a checkpoint: our own engine for LLaVA, transformers for every other model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.errors import InputError
from stllava_eval.storage import home, read_json, write_json

if TYPE_CHECKING:
    from stllava_eval.inference.base import EngineAnswerer

PUBLISHED = "ZachSun/stllava-med-7b"  # the authors' merged model


def default_checkpoint() -> str:
    """Return `$STLLAVA_CHECKPOINT`, else the one recorded under `$STLLAVA_HOME`, else the published model.

    Raises:
        InputError: The record cannot be read.
    """
    if named := os.environ.get("STLLAVA_CHECKPOINT"):
        return named
    record = home() / "checkpoint.json"
    if not record.exists():
        return PUBLISHED
    try:
        checkpoint = read_json(record)["checkpoint"]
        if not isinstance(checkpoint, str):
            raise TypeError(f"{checkpoint!r} is no folder")
        return checkpoint
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'{record}: not a record of a checkpoint ({error!r}). It holds {{"checkpoint": FOLDER}}; delete or fix it.'
        ) from error


def record_default_checkpoint(folder: Path) -> None:
    """Make `folder` what the bare command evaluates, until another one is recorded."""
    write_json(home() / "checkpoint.json", {"checkpoint": str(folder.resolve())})


def open_answerer(name: str, **arguments: Any) -> EngineAnswerer:
    """Return the answerer of a checkpoint: of our network or LLaVA's, else of any image-text model of transformers.

    Args:
        name: Folder or hub id.
        arguments: Of `Answerer`; another model takes device, dtype, rows, batch_tokens, system, enable_thinking,
            min_pixels, max_pixels and base of them.

    Raises:
        InputError: As `Answerer`, or the model is another one and gets arguments that only ours has.
    """
    # with torch and transformers, which a call without a checkpoint must not wait for
    from stllava_eval.inference.answerer import Answerer
    from stllava_eval.inference.generic import TransformersAnswerer
    from stllava_eval.network.pretrained import is_generic

    if not is_generic(name, arguments.get("base")):
        return Answerer(name, **arguments)
    given = {argument: value for argument, value in arguments.items() if value is not None}
    if given.get("four_bit") is False:
        del given["four_bit"]
    of_any = {
        "device",
        "dtype",
        "rows",
        "batch_tokens",
        "system",
        "enable_thinking",
        "min_pixels",
        "max_pixels",
        "base",
    }
    if wrong := sorted(set(given) - of_any):
        raise InputError(f"{name}: {', '.join(wrong)} is for models of our own network and LLaVA's. Leave it out.")
    return TransformersAnswerer(name, **given)
