"""`stllava-eval convert`: write a checkpoint in another layout."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.cli.options import add_command, show

if TYPE_CHECKING:
    from stllava_eval.network.checkpoint import Checkpoint


def add_convert(commands: Any) -> None:
    """Add `stllava-eval convert` to the commands."""
    convert = add_command(
        commands.add_parser,
        name="convert",
        help="write a checkpoint of any published layout as one folder that from_pretrained reads",
        description="Write a checkpoint of any published layout as one folder that from_pretrained reads, with "
        "audit.json beside the weights: every tensor of the source is used or on a named list, every parameter of the "
        "network is filled, or nothing is written.",
        examples=[
            "stllava-eval convert ZachSun/stllava-med-7b --out checkpoints/stllava-med-7b",
            "stllava-eval convert runs/stage1 --out checkpoints/stage1 --base checkpoints/llm",
            "stllava-eval convert llm --vision-tower vit --projector mm_projector.bin --out checkpoints/parts",
            "stllava-eval convert liuhaotian/llava-v1.5-7b --to llava-hf --out checkpoints/for-vllm",
        ],
    )
    convert.add_argument(
        "source", metavar="SOURCE", help="folder or hub id: a model, an adapter, or a projector with its config.json"
    )
    convert.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    convert.add_argument("--base", metavar="SOURCE", help="what an adapter builds on (default: what it names itself)")
    convert.add_argument(
        "--vision-tower", metavar="SOURCE", help="vision tower; wins over one in the weights (default: see config.json)"
    )
    convert.add_argument("--projector", metavar="FILE", help="mm_projector.bin; wins over one in the weights")
    convert.add_argument("--vision-lora", metavar="DIR", help="LoRA of the vision tower (default: Vit-lora in SOURCE)")
    convert.add_argument(
        "--prototypes", type=int, metavar="N", help="centres of the authors' prototype extractor (default: 256)"
    )
    convert.add_argument("--iterations", type=int, metavar="N", help="updates of its centres (default: 2)")
    convert.add_argument(
        "--to",
        choices=("stllava-med", "llava-hf"),
        default="stllava-med",
        help="layout to write; llava-hf, for servers, has no prototype extractor (default: stllava-med)",
    )
    convert.set_defaults(command=_convert)


def _convert(arguments: argparse.Namespace) -> int:
    from stllava_eval.network.convert_checkpoint import convert_checkpoint  # with torch

    checkpoint = convert_checkpoint(
        arguments.source,
        arguments.out,
        arguments.to,
        base=arguments.base,
        vision_tower=arguments.vision_tower,
        projector=arguments.projector,
        vision_lora=arguments.vision_lora,
        prototypes=arguments.prototypes,
        iterations=arguments.iterations,
    )
    _show_converted(checkpoint, arguments.source, arguments.out)
    return 0


def _show_converted(checkpoint: Checkpoint, source: str, out: Path) -> None:
    """Print what became of the tensors, and what the user must know before the checkpoint is used."""
    dropped = sum(map(len, checkpoint.audit.dropped.values()))
    merged = sum(checkpoint.audit.merged.values())
    show(
        f"{out}: {checkpoint.layout}, {len(checkpoint.taken)} tensors, all that the network has; "
        f"LoRA merged into {merged}, {dropped} left out as named in audit.json"
    )
    if checkpoint.assumed:
        numbers = ", ".join(f"{number} {name}" for name, number in checkpoint.assumed.items())
        show(f"note: {numbers}, which the files do not store, as in the authors' code; --prototypes and --iterations")
    if checkpoint.tokenizer is None:
        show(
            f"note: {source} has no tokenizer (tokenizer.model or tokenizer.json), and so {out} "
            "cannot answer; copy that of the model it was trained from into either"
        )
