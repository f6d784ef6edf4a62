"""Choose the device and the precision, and draw the progress bar."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from stllava_eval.errors import InputError

if TYPE_CHECKING:
    import torch


def progress_bar(total: int, shown: bool) -> Any:
    """Return a bar of questions on stderr, with the time left."""
    from tqdm import tqdm

    return tqdm(total=total, desc="answering", unit="question", disable=not shown, file=sys.stderr)


def torch_device(name: str | None) -> torch.device:
    """Return the device as torch names it; None takes this process's GPU, else the CPU.

    Raises:
        InputError: There is no such device here.
    """
    import torch

    if name is None:
        return (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used ({reason}). Pass cpu, cuda or cuda:N.") from error
    return device


def torch_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype by its name; None takes float32 on a CPU and bfloat16 on a GPU (our choice).

    Raises:
        InputError: It is none of the three.
    """
    import torch

    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype {name!r} is unknown. Pass float32, bfloat16 or float16.")
    return getattr(torch, name)
