"""Describe the data sets, their splits and the published counts by which an edition is recognised.

`DATASETS` is the only list of data sets. Command lines read it too, so this module imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass

from stllava_eval.errors import InputError

FORMAT = 1  # the version of the manifest's layout


@dataclass(frozen=True)
class Row:
    """One question about one image. The texts are exactly as distributed, VQA-RAD's tabs included."""

    id: str  # the data set's own: public qid of VQA-RAD, qid of SLAKE, row number of the official PathVQA split
    image: bytes  # encoded file as distributed
    image_id: str  # image name; the cluster of the statistics
    question: str
    reference: str
    kind: str  # "open" | "closed"
    categories: dict[str, str]  # organ, modality, question_type, ... as the set names them


@dataclass(frozen=True)
class Edition:
    """A known form of a split. A count that is not documented anywhere is None, and is not checked."""

    name: str
    rows: int
    closed: int | None
    images: int | None
    official: bool = False  # the split as its authors published it
    text: str | None = None  # first 16 hex digits of its `_text_hash`
    ids: str | None = None  # first 16 hex digits of its `_ids_hash`
    # what its ids begin with, if they are row numbers and another edition's are too, so that no answer fits both
    prefix: str = ""

    @property
    def open(self) -> int | None:
        """Return the number of open questions; None if unknown."""
        return None if self.closed is None else self.rows - self.closed

    @property
    def verified(self) -> bool:
        """Whether every count is documented, and therefore checked."""
        return self.closed is not None and self.images is not None

    def __str__(self) -> str:
        return f"the {self.name} {counted_rows(self.rows, self.closed, self.images)}"


@dataclass(frozen=True)
class Dataset:
    """One of the three sets: whose it is, what it holds, where it comes from."""

    title: str
    licence: str
    citation: str
    hub: str  # the copy prepared when no source is named
    categories: dict[str, str]  # our column -> the set's own field
    splits: dict[str, tuple[Edition, ...]]


@dataclass(frozen=True)
class Manifest:
    """The description and origin of a prepared split: the JSON file beside its Parquet file."""

    dataset: str
    split: str
    edition: str
    official: bool
    sample: bool
    source: str  # as the user gave it
    resolved: str  # absolute path, or owner/name@commit
    licence: str
    counts: dict[str, int]  # rows, open, closed, images
    sha256_rows: str  # hash of all fields but the images, in the split's order
    sha256_pixels: str  # hash of the decoded images, in the order of image_id
    sha256_file: str  # hash of the Parquet file
    notes: tuple[str, ...]


# We counted VQA-RAD and SLAKE in the authors' files; the counts of PathVQA's test are published with it.
DATASETS = {
    "vqarad": Dataset(
        title="VQA-RAD",
        licence="CC0 1.0",
        citation="Lau et al., Scientific Data 5:180251 (2018)",
        hub="flaviagiammarino/vqa-rad",
        categories={"organ": "image_organ", "question_type": "question_type", "phrase_type": "phrase_type"},
        splits={
            "train": (
                Edition(
                    "public train", 1797, 1027, 313, official=True, text="10ec52e1429fbbb2", ids="de228a16f9808fc3"
                ),
                Edition("data_RAD train (with frame questions)", 3064, 1823, 314, text="0005cb3367a26284"),
                # the hub copy drops 3 repeated rows and 1 shared with the test; no kinds, 940 answers are yes or no
                Edition("deduplicated train", 1793, 940, 313),
            ),
            "validation": (),  # VQA-RAD has none of its own; the sample set has
            "test": (Edition("official test", 451, 272, 203, official=True, text="7f22162af081b04c"),),
        },
    ),
    "slake": Dataset(
        title="SLAKE",
        licence="CC BY 4.0",
        citation="Liu et al., ISBI 2021 (arXiv:2102.09542)",
        hub="BoKelvin/SLAKE",
        categories={
            "modality": "modality",
            "location": "location",
            "content_type": "content_type",
            "base_type": "base_type",
            "language": "q_lang",
        },
        splits={
            "train": (
                Edition(
                    "official train", 4919, 1943, 450, official=True, text="af4ea7976131c395", ids="ac410672b60664c0"
                ),
                Edition("train and validation in one", 5972, 2365, 546),  # OctoMed/SLAKE
            ),
            "validation": (
                Edition(
                    "official validation", 1053, 422, 96, official=True, text="a09e7ad95540d526", ids="fb346c9b3a645bf5"
                ),
            ),
            "test": (
                Edition("official test", 1061, 416, 96, official=True, text="8530e509e563fd91", ids="bcceb71850c2e290"),
            ),
            "train_zh": (
                Edition(
                    "official Chinese train",
                    4916,
                    1938,
                    450,
                    official=True,
                    text="2ef053f3ba6f8045",
                    ids="ef4c13593a47789a",
                ),
            ),
            "validation_zh": (
                Edition(
                    "official Chinese validation",
                    1046,
                    422,
                    96,
                    official=True,
                    text="e682e3734c1ebe39",
                    ids="13dbe52c05310502",
                ),
            ),
            "test_zh": (
                Edition(
                    "official Chinese test",
                    1033,
                    420,
                    96,
                    official=True,
                    text="4cf2b024334cbb27",
                    ids="8ba276b114770a48",
                ),
            ),
        },
    ),
    "pathvqa": Dataset(
        title="PathVQA",
        licence="MIT on the hub; the images belong to the publishers of the books: do not redistribute",
        citation="He et al. (arXiv:2003.10286)",
        hub="flaviagiammarino/path-vqa",
        categories={"question_type": "question_type"},
        # Train and validation: the hub card gives 32,795 rows in all, 32,632 without repeated ones, and its splits;
        # published loaders give 6,279, which leaves 19,755. We found no reliable count of their closed questions.
        splits={
            "train": (
                Edition("original train", 19755, None, None, official=True),
                Edition("deduplicated train", 19654, None, None, prefix="dedup-"),
            ),
            "validation": (
                Edition("original validation", 6279, None, None, official=True),
                Edition("deduplicated validation", 6259, None, None, prefix="dedup-"),
            ),
            "test": (
                Edition("official test", 6761, 3391, 858, official=True),
                Edition("deduplicated test", 6719, 3362, None, prefix="dedup-"),
            ),
        },
    ),
}


@dataclass(frozen=True)
class SourceRow:
    """A row as its source has it; what the source lacks is None."""

    location: str  # its id, or file and number, for messages
    id: str | None
    image: str | bytes  # its name in the source, or the file itself
    image_id: str | None
    question: str
    reference: str
    kind: str | None
    categories: dict[str, str]
    path_alone: bool  # its image has a path and no bytes


def known_data_set(name: str, split: str) -> Dataset:
    """Return the data set of this name.

    Raises:
        InputError: It, or its split, does not exist.
    """
    if name not in DATASETS:
        raise InputError(f"{name}: no such data set. There are {', '.join(DATASETS)}.")
    if split not in DATASETS[name].splits:
        raise InputError(f"{name} has no split {split}. It has {', '.join(DATASETS[name].splits)}.")
    return DATASETS[name]


def counted_rows(rows: int, closed: int | None, images: int | None, verb: str = "has ") -> str:
    """Return the counts of a split as a text, such as `has 451 = 272 closed + 179 open on 203 images`."""
    kinds = "" if closed is None else f" = {closed} closed + {rows - closed} open"
    return f"{verb}{rows}{kinds}" + ("" if images is None else f" on {images} images")
