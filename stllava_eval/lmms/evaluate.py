"""Answer the questions of tasks with a checkpoint through lmms-eval, and write the run folder: `stllava-eval run`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from stllava_eval.data.catalog import DATASETS
from stllava_eval.data.prepare import prepare_on_first_use
from stllava_eval.hub import local_folder, refuse_no_checkpoint
from stllava_eval.inference.open import default_checkpoint
from stllava_eval.runs.folder import refuse_old_folder
from stllava_eval.runs.scores import dataset_of


def evaluate(
    tasks: Sequence[str],
    checkpoint: str | None = None,
    out: Path | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    images: str = "own",
) -> None:
    """Answer and score tasks as `lmms-eval --model stllava_med` does, with wrong input refused before any work.

    A failure ends the process (exit code 2 for a wrong input, 1 for a bug), because lmms-eval would swallow it.

    Args:
        tasks: Names of our tasks.
        checkpoint: Folder or hub id (default: see `inference.open.default_checkpoint`).
        out: The run folder to write (default: `$STLLAVA_RUN`, or a new one under `$STLLAVA_HOME/runs`).
        batch_size: Largest number of questions at a time (default: what the memory holds).
        limit: Number of questions of each task, from the first on (default: all).
        images: What each question is shown: its `own` image, an `other` question's, or a `black` one.

    Raises:
        InputError: The folder holds a run, the checkpoint cannot be used, or a data set cannot be prepared.
    """
    if out is not None:
        os.environ["STLLAVA_RUN"] = str(out)
    refuse_old_folder()
    checkpoint = checkpoint or default_checkpoint()
    refuse_no_checkpoint(local_folder(checkpoint), checkpoint)  # before the seconds that torch and transformers take

    from stllava_eval.network.checkpoint import open_checkpoint  # with torch
    from stllava_eval.network.pretrained import is_generic  # with torch

    if not is_generic(checkpoint):
        open_checkpoint(checkpoint).processor()
    os.environ["STLLAVA_CHECKPOINT"] = checkpoint  # not in --model_args, which splits a path at its commas
    for name in DATASETS if "medvqa" in tasks else dict.fromkeys(map(dataset_of, tasks)):
        prepare_on_first_use(name, "test")
    _call_lmms_eval(
        [
            *("--model", "stllava_med", "--tasks", ",".join(tasks)),
            *("--model_args", f"images={images}"),
            *(("--batch_size", str(batch_size)) if batch_size else ()),
            *(("--limit", str(limit)) if limit else ()),
        ]
    )


def _call_lmms_eval(arguments: Sequence[str]) -> None:
    """Call lmms-eval's command line in this process.

    Its Python function `evaluator.simple_evaluate` (0.7.3) would need neither `sys.argv` nor environment variables,
    but it is only the middle of a run. Around it, `lmms_eval.__main__.cli_evaluate` and `cli_evaluate_single` start the
    process group of a launch with several processes (`Accelerator` with its own time limit) and wait for all ranks,
    set up the log, build the task manager and the evaluation tracker, match task names, pass the four seeds, report
    errors and token usage, and print the tables. We would have to repeat these some 60 lines and follow them with every
    release. `cli_evaluate` also takes a namespace, but parses `sys.argv` before it looks at it, so `sys.argv` would
    have to be replaced all the same. run.json records `sys.argv` as the command that gives the same answers.
    """
    from lmms_eval.__main__ import cli_evaluate  # with torch

    sys.argv = ["lmms-eval", *arguments]
    cli_evaluate()
