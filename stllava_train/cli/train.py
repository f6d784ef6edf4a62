"""`stllava-train sft`, `dpo`, `merge`, `card` and `tiny`: train, and work with a trained run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from stllava_eval.data.catalog import DATASETS
from stllava_eval.errors import InputError, printable
from stllava_train.cli.options import add_training, check_data, filled, let_threads_wait, train


def add_tiny(commands: Any) -> None:
    """Add `stllava-train tiny` to the commands."""
    tiny = commands.add_parser(
        "tiny",
        help="make the tiny network that recipe tiny starts from",
        description=filled(
            "Make a network of 1.8 million weights and train its vision tower and its language model separately, on "
            "prepared training splits, in some minutes on two cores. It takes the place of CLIP and Vicuna: `sft "
            "--recipe tiny` then teaches it to answer and to ask."
        ),
        epilog="examples:\n  stllava-train tiny\n  stllava-train tiny vqarad slake --out checkpoints/start --seed 1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tiny.add_argument(
        "sets", nargs="*", metavar="SET", help="a data set: vqarad, slake or pathvqa (default: all three)"
    )
    tiny.add_argument(
        "--out", type=Path, metavar="DIR", help="checkpoint folder (default: $STLLAVA_HOME/checkpoints/tiny-start)"
    )
    tiny.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default: 0)")
    tiny.set_defaults(command=_tiny)


def add_sft(commands: Any) -> None:
    """Add `stllava-train sft` to the commands."""
    sft = commands.add_parser(
        "sft",
        help="stage 1: learn to answer and to ask",
        description=filled(
            "Train a checkpoint on conversations, by a recipe. RUN becomes a checkpoint that the harness "
            "evaluates, with "
            "the losses of every step, their curves and a model card. Under torchrun or accelerate launch it trains on "
            "several devices, on the same batches."
        ),
        epilog="examples:\n"
        "  stllava-train sft --recipe stllava-med-7b --data med-im.json --out runs/stage1 --dry-run\n"
        "  stllava-train sft --recipe stllava-med-7b --data med-im.json --out runs/stage1 epochs=3\n"
        "  stllava-train sft --recipe stllava-med-7b --data med-im.json --out runs/stage1 epochs=3 --resume",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sft.add_argument(
        "--recipe", required=True, metavar="R", help="a YAML file, or the name of a recipe in docs/train/recipes.md"
    )
    sft.add_argument("--stage", metavar="NAME", help="the stage of a recipe that has several")
    sft.add_argument(
        "--data",
        required=True,
        action="append",
        type=Path,
        metavar="FILE",
        help="conversations, LLaVA's JSON or JSONL; may be given several times",
    )
    sft.add_argument("--images", type=Path, metavar="DIR", help="folder of the images (default: that of each FILE)")
    sft.add_argument("--out", required=True, type=Path, metavar="RUN", help="folder to write")
    add_training(sft)
    sft.set_defaults(command=_sft)


def add_dpo(commands: Any) -> None:
    """Add `stllava-train dpo` to the commands."""
    dpo = commands.add_parser(
        "dpo",
        help="stage 2: learn to prefer the chosen answers",
        description=filled(
            "Train a checkpoint on preference pairs, by a recipe. RUN becomes a checkpoint that the harness evaluates, "
            "with the losses of every step, their curves and a model card. Under torchrun or accelerate launch "
            "it trains "
            "on several devices, on the same batches."
        ),
        epilog="examples:\n"
        "  stllava-train dpo --recipe tiny --pairs runs/a/pairs.jsonl --images data/images --out runs/a/dpo \\\n"
        "    --dry-run start=runs/stage1\n"
        "  stllava-train dpo --recipe stllava-med-7b --pairs runs/b/pairs.jsonl --images images --out runs/b/dpo \\\n"
        "    start=runs/stage1-7b beta=0.3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    dpo.add_argument(
        "--recipe", required=True, metavar="R", help="a YAML file, or the name of a recipe in docs/train/recipes.md"
    )
    dpo.add_argument(
        "--pairs",
        required=True,
        type=Path,
        metavar="FILE",
        help="pairs that `stllava-train pairs` wrote, or a file in a layout that `pairs --from` reads",
    )
    dpo.add_argument("--images", required=True, type=Path, metavar="DIR", help="folder of the pairs' images")
    dpo.add_argument("--out", required=True, type=Path, metavar="RUN", help="folder to write")
    add_training(dpo)
    dpo.set_defaults(command=_dpo)


def _dpo(arguments: argparse.Namespace) -> int:
    let_threads_wait()
    from stllava_train.training.recipes import read_dpo_recipe

    recipe = read_dpo_recipe(arguments.recipe, arguments.changes)
    from stllava_train.training import dpo

    if not arguments.images.is_dir():
        raise InputError(f"--images {arguments.images}: no such folder. Pass the one the pairs were made of.")
    return train(arguments, dpo, recipe, arguments.pairs)


def add_merge(commands: Any) -> None:
    """Add `stllava-train merge` to the commands."""
    merge = commands.add_parser(
        "merge",
        help="write a run's adapter and its base as one whole checkpoint",
        description=filled(
            "Merge the LoRA of RUN into the checkpoint that it builds on, in float32, and write the whole network as a "
            "folder that from_pretrained, this harness and stage 2 read."
        ),
        epilog="examples:\n  stllava-train merge runs/stage1 --out checkpoints/stage1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    merge.add_argument("run", metavar="RUN", help="folder of a training run, or any adapter that the harness loads")
    merge.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    merge.set_defaults(command=_merge)


def add_card(commands: Any) -> None:
    """Add `stllava-train card` to the commands."""
    card = commands.add_parser(
        "card",
        help="write a run's model card again, with scores",
        description="Write README.md of a training run: data, recipe, losses, and the scores of its evaluations.",
        epilog="examples:\n  stllava-train card runs/stage1 --eval ~/.cache/stllava-med/runs/stage1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    card.add_argument("run", type=Path, metavar="RUN", help="folder of a training run")
    card.add_argument(
        "--eval", action="append", type=Path, default=[], metavar="DIR", help="folder of an evaluation of it"
    )
    card.set_defaults(command=_card)


def _sft(arguments: argparse.Namespace) -> int:
    let_threads_wait()
    from stllava_train.training.recipes import read_recipe

    recipe = read_recipe(arguments.recipe, arguments.changes, arguments.stage)
    from stllava_train.training import sft

    check_data(arguments.data, arguments.images)
    return train(arguments, sft, recipe, arguments.data)


def _merge(arguments: argparse.Namespace) -> int:
    from stllava_eval.network.checkpoint import open_checkpoint
    from stllava_eval.network.convert import convert

    convert(open_checkpoint(arguments.run), arguments.out)
    print(printable(f"{arguments.out}: one whole checkpoint was written"))
    return 0


def _card(arguments: argparse.Namespace) -> int:
    from stllava_train.training.card import CARD, write_card

    write_card(arguments.run, arguments.eval)
    print(printable(str(arguments.run / CARD)))
    return 0


def _tiny(arguments: argparse.Namespace) -> int:
    let_threads_wait()
    from stllava_eval.data.splits import read_rows
    from stllava_eval.storage import home
    from stllava_train.tiny import write_start

    out = arguments.out or home() / "checkpoints" / "tiny-start"
    write_start({name: read_rows(name, "train") for name in arguments.sets or DATASETS}, out, seed=arguments.seed)
    print(printable(f"{out}: a network to start from: stllava-train sft --recipe tiny start={out} ..."))
    return 0
