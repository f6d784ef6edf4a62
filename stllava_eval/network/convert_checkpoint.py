"""Convert a checkpoint of any published layout in one call: open and check it, and write it as one folder."""

from __future__ import annotations

from pathlib import Path

from stllava_eval.errors import InputError
from stllava_eval.network.checkpoint import Checkpoint, open_checkpoint
from stllava_eval.network.convert import convert
from stllava_eval.network.layouts import CheckpointError
from stllava_eval.storage import write_json


def convert_checkpoint(
    source: str,
    out: Path,
    layout: str = "stllava-med",
    *,
    base: str | None = None,
    vision_tower: str | None = None,
    projector: str | None = None,
    vision_lora: str | None = None,
    prototypes: int | None = None,
    iterations: int | None = None,
    progress: bool = True,
) -> Checkpoint:
    """Write a checkpoint of any published layout as one folder that `from_pretrained` reads; return what was written.

    Every tensor of the source is used or on a named list, and every parameter of the network is filled, or nothing is
    written; `out/audit.json` accounts for all of them.

    Args:
        source: Folder or hub id: a model, an adapter, or a projector with its config.json.
        out: Folder to write: a new or an empty one.
        layout: `stllava-med`, or `llava-hf` for servers, which has no prototype extractor.
        base, vision_tower, projector, vision_lora, prototypes, iterations: As of `open_checkpoint`.
        progress: Whether to show a bar on stderr.

    Raises:
        InputError: The tensors of the source do not fill the network (`NAME.refused.json` beside `out` then lists every
            one), `out` holds something, or the disk is full.
    """
    try:
        checkpoint = open_checkpoint(source, base, vision_tower, projector, vision_lora, prototypes, iterations)
    except CheckpointError as error:
        listed = out.with_name(f"{out.name}.refused.json")
        write_json(listed, error.report)
        raise InputError(f"{error} All of them are listed in {listed}.") from error
    convert(checkpoint, out, layout, progress)
    return checkpoint
