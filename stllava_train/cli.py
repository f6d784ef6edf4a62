"""stllava-train: tiny. Heavy imports sit inside the commands, so that help is instant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from stllava_eval import __version__
from stllava_eval.errors import InputError, printable

DATASETS = ("vqarad", "slake", "pathvqa")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0 done, 2 wrong call."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.command(arguments) or 0
    except InputError as error:
        print(printable(f"stllava-train: {error}"), file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The command line, whose help `docs/cli.md` repeats."""
    top = argparse.ArgumentParser(
        prog="stllava-train",
        description="Train medical vision-language models. Research only; not for clinical use.",
        epilog="examples:\n  stllava-train tiny\n  stllava-train tiny --out runs/tiny --seed 1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"stllava-med {__version__}")
    commands = top.add_subparsers(dest="name", required=True, metavar="COMMAND")
    tiny = commands.add_parser(
        "tiny",
        help="train a tiny LLaVA from scratch on the sample sets",
        description="Train a tiny LLaVA (1.6 million weights) from scratch on the sample training splits, in about "
        "five minutes on two cores, and make it the default checkpoint. It shows that the whole pipeline works; it "
        "knows nothing beyond the sample sets.",
        epilog="examples:\n  stllava-train tiny\n  stllava-train tiny --out runs/tiny --seed 1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tiny.add_argument(
        "--out", type=Path, metavar="DIR", help="checkpoint folder (default: $STLLAVA_HOME/checkpoints/tiny)"
    )
    tiny.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default: 0)")
    tiny.set_defaults(command=_tiny)
    return top


def _tiny(arguments: argparse.Namespace) -> int:
    from stllava_eval.answering import record_default_checkpoint
    from stllava_eval.datasets import read_manifest, read_rows
    from stllava_eval.home import home
    from stllava_train.tiny import train_tiny

    for name in DATASETS:
        if not read_manifest(name, "train").sample:
            raise InputError(
                f"{name} train is the official split, and the tiny model learns from the samples only. Set "
                "STLLAVA_HOME to another folder and run `stllava-eval prepare --sample` there."
            )
    out = arguments.out or home() / "checkpoints" / "tiny"
    train = {name: read_rows(name, "train") for name in DATASETS}
    validation = {name: read_rows(name, "validation") for name in DATASETS}
    train_tiny(train, validation, out, seed=arguments.seed)
    record_default_checkpoint(out)
    print(f"{out}: the default checkpoint from now on ({home() / 'checkpoint.json'})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
