"""`stllava-train candidates`: let a checkpoint ask about images and answer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.errors import InputError, printable
from stllava_eval.storage import local_path
from stllava_train.cli.options import add_engine, counted, filled, let_threads_wait, print_counts

if TYPE_CHECKING:
    from stllava_train.preferences.candidates import Settings


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
    candidates.add_argument("--checkpoint", required=True, metavar="DIR_OR_HUB_ID", help="that asks and answers")
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
    from stllava_train.preferences.candidates import (
        PRESETS,
        check_settings,
        images_in,
        listed_images,
        sampled,
        write_candidates,
    )
    from stllava_train.training.recipe_yaml import changed

    settings = changed(PRESETS[arguments.preset], arguments.changes)
    check_settings(settings)
    folder = arguments.images
    names = listed_images(arguments.list, folder) if arguments.list else images_in(folder)
    names = sampled(names, arguments.sample, settings.seed)
    draw, checkpoint = (_drawn_by_ray if arguments.engine == "ray" else _drawn_here)(arguments, settings)
    counts = write_candidates(draw, checkpoint, names, folder, arguments.out, settings, arguments.allow_test_images)
    print(printable(f"{arguments.out}: {counted(counts['candidates'], 'candidate')}"))
    print_counts(counts)
    return 0


def _drawn_here(arguments: argparse.Namespace, settings: Settings) -> tuple[Any, dict[str, str]]:
    """What draws candidates, and of which checkpoint."""
    from functools import partial

    from stllava_eval.inference.answerer import Answerer
    from stllava_train.preferences.candidates import rows_of

    answerer = Answerer(arguments.checkpoint, device=arguments.device, dtype=arguments.dtype)
    checkpoint = {"name": answerer.name, "sha256": answerer.sha256, "dtype": str(answerer.dtype)}
    return partial(rows_of, answerer, settings=settings), checkpoint


def _drawn_by_ray(arguments: argparse.Namespace, settings: Settings) -> tuple[Any, dict[str, str]]:
    """As `_drawn_here`."""
    from functools import partial

    import torch

    from stllava_eval.inference.devices import torch_dtype
    from stllava_eval.network.checkpoint import open_checkpoint
    from stllava_train.preferences.ray import candidates_by_ray, workers_have_gpus

    if arguments.device:
        raise InputError("--device: with --engine ray every worker takes a GPU where there are some. Leave it out.")
    gpu = workers_have_gpus()
    folder = local_path(arguments.checkpoint)
    name = arguments.checkpoint if folder is None else str(folder.resolve())
    dtype = str(torch_dtype(arguments.dtype, torch.device("cuda" if gpu else "cpu")))
    checkpoint = {"name": arguments.checkpoint, "sha256": open_checkpoint(name).sha256, "dtype": dtype}
    draw = partial(
        candidates_by_ray, settings=settings, workers=arguments.workers, name=name, dtype=dtype.removeprefix("torch.")
    )
    return draw, checkpoint
