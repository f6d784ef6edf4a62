"""Make a file of candidates in one call: a checkpoint and a folder of images -> questions, each with two answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stllava_eval.errors import InputError
from stllava_eval.inference.devices import torch_dtype
from stllava_eval.inference.generic import ASKING_INSTRUCTION
from stllava_eval.inference.open import open_answerer
from stllava_eval.network.checkpoint import Checkpoint, open_checkpoint
from stllava_eval.network.pretrained import Pretrained, is_generic, open_pretrained
from stllava_eval.storage import local_path
from stllava_train.preferences.candidates import (
    PRESETS,
    CandidateSettings,
    Images,
    check_settings,
    images_in,
    listed_images,
    rows_of,
    sampled,
    write_candidates,
)
from stllava_train.preferences.ray import candidates_by_ray, workers_have_gpus

RowsOfImages = Callable[[Images], Iterator[Any]]
"""Makes the rows (`resumable.Row`) of some images; see `candidates.write_candidates`."""


def make_candidates(
    checkpoint: str,
    images: Path,
    out: Path,
    settings: CandidateSettings = PRESETS["ours"],
    *,
    names: Path | None = None,
    sample: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    engine: str = "local",
    workers: int = 2,
    allow_test_images: bool = False,
    progress: bool = True,
) -> Counter[str]:
    """Let a checkpoint ask about images and answer each question twice; write a row for each image, and return counts.

    After a stop, the same call continues with the images that have no row.

    Args:
        checkpoint: Folder or hub id of the model that asks and answers.
        images: Folder of the images.
        out: `NAME.jsonl` to write.
        settings: How many questions and answers are sampled, and how.
        names: Text file with the names of images in the folder, one per line (default: all images in it).
        sample: How many of the images, sampled by the settings' seed (default: all).
        device: `cpu`, `cuda` or `cuda:N` (default: a GPU if there is one).
        dtype: `float32`, `bfloat16` or `float16` (default: by device).
        engine: `local`, or `ray` to spread the images over a cluster.
        workers: Of engine `ray`.
        allow_test_images: Whether to ask about images of prepared test splits too.
        progress: Whether to show bars on stderr.

    Returns:
        How many "images", "images that cannot be decoded", "questions" and "candidates" there are, and how many
        questions are skipped by each of `rows.SKIP_REASONS`.

    Raises:
        InputError: A setting is out of its range, there is no image, one is in a test split, the checkpoint cannot be
            opened, or `out` holds the rows of another job.
    """
    check_settings(settings)
    names_in_folder = listed_images(names, images) if names else images_in(images)
    chosen = sampled(names_in_folder, sample, settings.seed)
    if engine == "ray":
        make_rows, identity = _by_ray(checkpoint, device, dtype, workers, settings)
    else:
        make_rows, identity = _on_this_machine(checkpoint, device, dtype, settings)
    return write_candidates(make_rows, identity, chosen, images, out, settings, allow_test_images, progress)


def _on_this_machine(
    checkpoint: str, device: str | None, dtype: str | None, settings: CandidateSettings
) -> tuple[RowsOfImages, dict[str, str]]:
    """Return what makes rows on one device of this machine, and name, hash and dtype of the checkpoint."""
    answerer = open_answerer(checkpoint, device=device, dtype=dtype)
    identity = {"name": answerer.name, "sha256": answerer.sha256, "dtype": str(answerer.dtype)}
    if answerer.asks_with:  # questions depend on it, and it may change from release to release
        identity["asks_with"] = answerer.asks_with
    return partial(rows_of, answerer, settings=settings), identity


def _by_ray(
    checkpoint: str, device: str | None, dtype: str | None, workers: int, settings: CandidateSettings
) -> tuple[RowsOfImages, dict[str, str]]:
    """Return what makes rows on the workers of a cluster, and name, hash and dtype of the checkpoint."""
    if device:
        raise InputError("--device: with --engine ray every worker takes a GPU where there are some. Leave it out.")
    worker_device = torch.device("cuda" if workers_have_gpus() else "cpu")
    folder = local_path(checkpoint)
    name = checkpoint if folder is None else str(folder.resolve())  # workers have other working directories
    used_dtype = str(torch_dtype(dtype, worker_device))
    generic = is_generic(name)
    opened: Pretrained | Checkpoint = open_pretrained(name) if generic else open_checkpoint(name)
    identity = {"name": checkpoint, "sha256": opened.sha256, "dtype": used_dtype}
    if generic:
        identity["asks_with"] = ASKING_INSTRUCTION
    make_rows = partial(
        candidates_by_ray, settings=settings, workers=workers, name=name, dtype=used_dtype.removeprefix("torch.")
    )
    return make_rows, identity
