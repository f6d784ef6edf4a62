"""Hold what several commands of `stllava-train` share: options, checks and printing."""

from __future__ import annotations

import argparse
import os
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stllava_eval.errors import InputError, printable
from stllava_train.training.card import kept_step, left_out_by_peft


def filled(description: str) -> str:
    """Return a description wrapped at 90 columns, which `RawDescriptionHelpFormatter` leaves to its caller."""
    return textwrap.fill(description, 90)


def add_engine(command: Any) -> None:
    """Add the options that spread a command's work over several machines."""
    command.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray maps the work over the cluster of $RAY_ADDRESS, or over this machine (default: local)",
    )
    command.add_argument(
        "--workers", type=count, default=2, metavar="N", help="number of workers of --engine ray (default: 2)"
    )


def amount(text: str) -> float:
    """Return a number from 0 on; argparse reports which option was given another one."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount from 0 on")
    return value


def count(text: str) -> int:
    """Return a whole number from 1 on; argparse reports which option was given another one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def print_counts(counts: Mapping[str, int]) -> None:
    """Print each count that is not 0 on a line of its own."""
    for what, number in counts.items():
        if number:
            print(printable(f"  {what}: {number:,}"))


def add_training(command: Any) -> None:
    """Add the options that both stages of training have."""
    command.add_argument("--resume", action="store_true", help="resume the interrupted run in RUN")
    command.add_argument(
        "--allow-test-images",
        action="store_true",
        help="train on images of prepared test splits too; the run's manifest and card count them (default: refused)",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="print tokens, steps, parameters and memory; train nothing"
    )
    command.add_argument("--default", action="store_true", help="make RUN the default checkpoint of the harness")
    command.add_argument("--wandb", action="store_true", help="report to Weights & Biases as well as to TensorBoard")
    command.add_argument("changes", nargs="*", metavar="key=value", help="changes of the recipe, such as epochs=3")


def train(arguments: argparse.Namespace, stage: Any, recipe: Any, data: Any) -> int:
    """Prepare a training run and train it, or with --dry-run print what it would take; return the exit code.

    Args:
        arguments: The options of the command.
        stage: The module `sft` or `dpo`.
        recipe: Of this stage.
        data: The files of conversations, or the file of pairs.
    """
    from stllava_train.training.processes import first_process
    from stllava_train.training.resume import check_folder

    if not arguments.dry_run:
        check_folder(arguments.out, arguments.resume)
    prepared = stage.prepare_run(recipe, data, arguments.images, arguments.allow_test_images)
    if arguments.dry_run:
        print(stage.report(prepared))
        return 0
    stage.train(prepared, arguments.out, arguments.resume, wandb=arguments.wandb)
    if first_process():
        if arguments.default:
            from stllava_eval.inference.open import record_default_checkpoint

            record_default_checkpoint(arguments.out)
        contents = "losses.jsonl, curves.png, tensorboard and README.md are in it too"
        print(printable(f"{arguments.out}: the checkpoint was written; {contents}"))
        for line in kept_step(arguments.out):
            print(printable(f"{arguments.out}: {line}"))
        if lost := left_out_by_peft(arguments.out):
            print(
                printable(
                    f"{arguments.out}: plain PEFT and transformers leave out {lost}, and say nothing. For them, write "
                    f"one whole checkpoint: stllava-train merge {shlex.quote(str(arguments.out))} --out DIR"
                )
            )
    return 0


def let_threads_wait() -> None:
    """Let waiting threads sleep on a CPU, so that the others can work; this must be called before torch is imported."""
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def check_data(files: Sequence[Path], images: Path | None) -> None:
    """Raise InputError where a data file is named twice, or is not there."""
    if len({file.resolve() for file in files}) < len(files):
        raise InputError("a data file comes twice. Name each once.")
    if images is not None and not images.is_dir():
        raise InputError(f"--images {images}: no such folder. Pass the one that the records' images are relative to.")


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where that is right."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
