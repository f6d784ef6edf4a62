"""Find out which process this is, and check that a run can use the devices it was given."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch

from stllava_eval.errors import InputError, one_line
from stllava_train.training.recipes import TrainingRecipe

# Our choice: the first process looks at every image while the others wait, for hours where there are a million
PATIENCE = timedelta(hours=6)


def first_process() -> bool:
    """Return whether this process is the one of several that prints and writes.

    The variable RANK alone does not say so, because a batch system may have set it.
    """
    return processes().is_main_process


def processes() -> Any:
    """Return accelerate's `PartialState`, which knows how many processes there are and which this is.

    Raises:
        InputError: The environment speaks of several processes, and no launcher started them.
    """
    from accelerate import PartialState

    try:
        return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    except ValueError as error:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        given = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
        raise InputError(
            f"{given} in the environment: {one_line(error)}. Start several processes with torchrun, or unset these."
        ) from error


def check_wandb() -> None:
    """Log in to Weights & Biases before any work.

    Raises:
        InputError: wandb is not installed, or has no key.
    """
    try:
        import wandb

        wandb.login()
    except ImportError as error:
        raise InputError("--wandb: wandb is not installed. Run `pip install wandb`, or leave it out.") from error
    except wandb.Error as error:
        raise InputError(f"--wandb: {one_line(error)}. Set WANDB_MODE=offline, or leave it out.") from error


def rows_of(recipe: TrainingRecipe, processes: int) -> int:
    """Return how many records one process computes at once.

    Raises:
        InputError: The batch cannot be dealt to the processes.
    """
    rows = min(recipe.micro_batch, recipe.batch // processes)
    if rows == 0 or recipe.batch % (rows * processes):
        raise InputError(
            f"batch {recipe.batch}: it cannot be dealt to {processes} process{'es' * (processes != 1)} of micro_batch "
            f"{recipe.micro_batch}. Choose a batch that is a multiple of both."
        )
    return rows


def check_gpus(processes: int) -> None:
    """Raise InputError where one process would leave other GPUs of the machine unused."""
    if processes == 1 and (gpus := torch.cuda.device_count()) > 1:
        raise InputError(
            f"{gpus} GPUs are visible to one process. Start one for each (accelerate launch, see "
            "docs/train/memory.md), or show it a single one: CUDA_VISIBLE_DEVICES=0."
        )
