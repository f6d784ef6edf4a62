"""`stllava-train candidates`: let a checkpoint ask about images and answer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from stllava_eval.errors import printable
from stllava_train.cli.options import add_engine, counted, filled, let_threads_wait, print_counts


def add_candidates(commands: Any) -> None:
    """Add `stllava-train candidates` to the commands."""
    candidates = commands.add_parser(
        "candidates",
        help="let a checkpoint ask about images, and answer twice",
        description=filled(
            "Let a checkpoint describe every image, ask questions about it, and answer each twice. A judge then "
            "chooses between the two answers. After a stop, the same call continues. "
            "docs/preferences/candidates.md lists the settings with their sources."
        ),
        epilog="examples:\n"
        "  stllava-train candidates --checkpoint runs/stage1 --images data/images --out runs/a/candidates.jsonl\n"
        "  stllava-train candidates --checkpoint runs/stage1 --images data/images --sample 10000 --preset authors \\\n"
        "    --out runs/b/candidates.jsonl questions=3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    candidates.add_argument(
        "--checkpoint", required=True, metavar="DIR_OR_HUB_ID", help="the model that asks and answers"
    )
    candidates.add_argument("--images", required=True, type=Path, metavar="DIR", help="folder of the images")
    candidates.add_argument(
        "--list", type=Path, metavar="FILE", help="names of images in DIR, one per line (default: all images in it)"
    )
    candidates.add_argument(
        "--sample", type=int, metavar="N", help="how many of the images, sampled by seed (default: all)"
    )
    candidates.add_argument("--out", required=True, type=Path, metavar="FILE", help="NAME.jsonl to write")
    candidates.add_argument(
        "--preset",
        choices=("ours", "authors"),
        default="ours",
        help="ours leaves out texts without a question mark, repeated questions and answers that are alike "
        "(default: ours)",
    )
    candidates.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    candidates.add_argument("--dtype", metavar="T", help="float32, bfloat16 or float16 (default: by device)")
    candidates.add_argument(
        "--allow-test-images", action="store_true", help="ask about images of prepared test splits (default: refused)"
    )
    add_engine(candidates)
    candidates.add_argument(
        "changes", nargs="*", metavar="key=value", help="changes of the preset, such as questions=3"
    )
    candidates.set_defaults(command=_candidates)


def _candidates(arguments: argparse.Namespace) -> int:
    let_threads_wait()
    from stllava_train.preferences.candidates import PRESETS  # with numpy
    from stllava_train.preferences.make_candidates import make_candidates  # with torch
    from stllava_train.training.recipe_yaml import changed

    counts = make_candidates(
        arguments.checkpoint,
        arguments.images,
        arguments.out,
        changed(PRESETS[arguments.preset], arguments.changes),
        names=arguments.list,
        sample=arguments.sample,
        device=arguments.device,
        dtype=arguments.dtype,
        engine=arguments.engine,
        workers=arguments.workers,
        allow_test_images=arguments.allow_test_images,
    )
    print(printable(f"{arguments.out}: {counted(counts['candidates'], 'candidate')}"))
    print_counts(counts)
    return 0
