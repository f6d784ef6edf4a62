"""`stllava-eval run`: answer the questions of tasks by lmms-eval, as its own command line does."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from stllava_eval.cli.options import IMAGES, TASKS, add_command
from stllava_eval.data.catalog import DATASETS
from stllava_eval.errors import InputError


def add_run(commands: Any) -> None:
    """Add `stllava-eval run` to the commands."""
    run = add_command(
        commands.add_parser,
        name="run",
        help="answer and score the tasks with a checkpoint, through lmms-eval",
        description="Answer and score the tasks with a checkpoint. The same as `lmms-eval --model stllava_med`, "
        "with wrong input refused before any work and the run folder where you want it.",
        examples=[
            "stllava-eval run --tasks vqarad,slake",
            "stllava-eval run --tasks medvqa --checkpoint llava-hf/llava-1.5-7b-hf --out runs/llava",
        ],
    )
    run.add_argument(
        "--tasks", default=",".join(DATASETS), help=f"comma-separated, of {', '.join(TASKS)} (default: %(default)s)"
    )
    run.add_argument(
        "--checkpoint", metavar="DIR_OR_HUB_ID", help="what to evaluate (default: see docs/reference/cli.md)"
    )
    run.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: a new one under $STLLAVA_HOME/runs)")
    run.add_argument(
        "--batch-size", type=int, metavar="N", help="questions at a time, at most (default: what the memory holds)"
    )
    run.add_argument("--limit", type=int, metavar="N", help="first N questions of each task (default: all)")
    run.add_argument(
        "--images",
        choices=IMAGES,
        default="own",
        help="show each question its own image, another question's, or a black one (default: own)",
    )
    run.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> int:
    tasks = arguments.tasks.split(",")
    if unknown := [task for task in tasks if task not in TASKS]:
        raise InputError(f"--tasks {', '.join(unknown)}: unknown. Tasks are {', '.join(TASKS)}.")
    if any(given is not None and given < 1 for given in (arguments.batch_size, arguments.limit)):
        raise InputError("--batch-size and --limit are whole numbers from 1 on.")
    if len(set(tasks)) < len(tasks):
        raise InputError(f"--tasks {arguments.tasks}: a task comes twice. Name each once.")
    from stllava_eval.lmms.evaluate import evaluate  # which explains why it calls lmms-eval by its command line

    evaluate(tasks, arguments.checkpoint, arguments.out, arguments.batch_size, arguments.limit, arguments.images)
    return 0
