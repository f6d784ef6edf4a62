"""Compute the reference's log-probabilities once, and store them for later runs."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stllava_eval.errors import InputError
from stllava_train.preferences.pairs import Pair

CHUNK = 64  # our choice: pairs whose reference is computed between two writes to the disk


@contextmanager
def trl_behind_transformers() -> Iterator[None]:
    """Silence a warning: trl 1.16 switches gradient checkpointing by names that transformers 5.23 has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
        yield


def log_probabilities(row: Mapping[str, Any], file: Path) -> tuple[float, float]:
    """Return the stored log-probabilities (chosen, rejected) of a row, in nats."""
    values = row.get("chosen"), row.get("rejected")
    if not all(isinstance(value, float) and math.isfinite(value) for value in values):
        raise InputError(
            f"{file}: pair {str(row.get('id'))[:16]} has {values} for log-probabilities. Delete the file: they are "
            "computed again."
        )
    return values  # type: ignore[return-value]


def reference_key(pair: Pair, ld_alpha: float | None) -> str:
    """Return a hash of what decides the reference's log-probabilities of a pair.

    With `ld_alpha` each depends on both answers: LD-DPO (arXiv:2409.06411) weighs the tokens behind the length of the
    shorter one.
    """
    deciding = [pair.image_sha256, pair.question, pair.chosen, pair.rejected, ld_alpha]
    if pair.rejected_image:
        deciding.append(pair.rejected_image_sha256)
    return hashlib.sha256(json.dumps(deciding).encode()).hexdigest()


def from_main(value: Any) -> Any:
    """Return the main process's value on every process."""
    from accelerate.utils import broadcast_object_list

    held = [value]
    broadcast_object_list(held)
    return held[0]


def from_all(value: Any) -> list[Any]:
    """Return the values of all processes, in their order."""
    from accelerate.utils import gather_object

    return gather_object([value])
