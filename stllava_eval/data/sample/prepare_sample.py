"""Write the small sample sets, all splits, under `$STLLAVA_HOME/data`: generated rows -> prepared splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stllava_eval.data.catalog import DATASETS, Manifest
from stllava_eval.data.sample.pictures import SPLITS
from stllava_eval.data.sample.questions import sample_rows
from stllava_eval.data.splits import write_split


def prepare_sample(names: Sequence[str] = tuple(DATASETS), home_folder: Path | None = None) -> list[Manifest]:
    """Write all splits of the sample of each data set; return their manifests, with counts of questions and images.

    The samples are made from images in installed packages, with answers that are known by construction. A sample
    replaces a sample, and never an official split.

    Args:
        names: Keys of `DATASETS` (default: all of them).
        home_folder: Where the splits are written (default: `$STLLAVA_HOME`).

    Raises:
        InputError: A package with the images is not installed, an official split is prepared there, or the disk is
            full.
    """
    return [
        write_split(
            name,
            split,
            sample_rows(name, split),
            edition=f"sample {split}",
            official=False,
            sample=True,
            source="images in installed packages",
            licence="each image's own: docs/start/data.md",
            home_folder=home_folder,
        )
        for name in names
        for split in SPLITS
    ]
