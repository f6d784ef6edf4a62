"""Make preference pairs from any of their three sources: judged candidates, published pairs, or regions of images.

Each `pairs_of_...` returns pairs with what they were made of, and `build_pairs` selects of them and writes the files
that stage 2 and other trainers read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stllava_train.preferences.contrast import contrast_pairs, read_boxes
from stllava_train.preferences.contrast import source_of as source_of_contrast
from stllava_train.preferences.judged import hash_of_input, read_judged
from stllava_train.preferences.pair_formats import write_pairs
from stllava_train.preferences.pair_layouts import read_published
from stllava_train.preferences.pair_layouts import source_of as source_of_published
from stllava_train.preferences.pair_selection import PairOptions, Split, select_pairs
from stllava_train.preferences.pairs import PairSet, make_pairs
from stllava_train.preferences.verdicts import Rule

OUR_RULE = Rule()  # both orders must agree, and scores differ by a point or more
ALL_PAIRS = PairOptions()  # none is left out, and none is held out


@dataclass(frozen=True)
class SourcedPairs:
    """Pairs before any of them are selected, and what they were made of.

    Attributes:
        pairs: The pairs, and how many candidates or records made none, by reason.
        source: Files, hashes and settings that decide the pairs, for the manifest of the written file.
        images: Folder of the pairs' images; None where it is not known.
        skipped_ids: The ids of those that made no pair, by reason; of `pairs_of_contrast` alone.
    """

    pairs: PairSet
    source: Mapping[str, Any]
    images: Path | None
    skipped_ids: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class BuiltPairs:
    """The pairs to learn from and those held out, and the files that hold them (manifests aside)."""

    split: Split
    files: list[Path]


def pairs_of_judged(
    candidates: Path, judged: Path, rule: Rule = OUR_RULE, judges: Sequence[str] = (), images: Path | None = None
) -> SourcedPairs:
    """Make a pair of every two answers of which the judges prefer one; return the pairs and their source.

    Args:
        candidates: What `make_candidates` wrote.
        judged: What `judge_candidates` wrote about them.
        rule: How verdicts become preferences.
        judges: Names of the judges whose verdicts count (default: the majority of all).
        images: Folder of the images (default: the one that was asked about).

    Raises:
        InputError: A file cannot be read, the verdicts are on other candidates, or a judge has no verdict.
    """
    read, verdicts, folder = read_judged(candidates, judged)
    made = make_pairs(read, verdicts, rule, judges)
    source = {
        "candidates_sha256": hash_of_input(candidates),
        "judged_sha256": hash_of_input(judged),
        "rule": asdict(rule),
        "judges": sorted(set(judges) or {verdict.judge for verdict in verdicts}),
    }
    return SourcedPairs(made, source, images or folder)


def pairs_of_published(file: Path, images: Path | None = None, allow_test_images: bool = False) -> SourcedPairs:
    """Read published pairs, or those of another trainer; return the pairs and their source.

    Args:
        file: JSON, JSONL or Parquet in a layout of docs/preferences/pairs.md.
        images: Folder of the images.
        allow_test_images: Whether pairs about images of prepared test splits are kept.

    Raises:
        InputError: The file cannot be read, or a record has no known layout.
    """
    return SourcedPairs(read_published(file, images, allow_test_images), source_of_published(file), images)


def pairs_of_contrast(
    conversations: Path, boxes: Path, images: Path, regions: str = "named", allow_test_images: bool = False
) -> SourcedPairs:
    """Make pairs of one answer about two images: the true one, and a copy whose region is noise.

    The copies are written to `images/contrast`.

    Args:
        conversations: True answers, as `stllava-train data` writes them.
        boxes: SLAKE's folder `imgs`, with NAME/source.jpg and its boxes in NAME/detection.json.
        images: Folder of the conversations' images.
        regions: `named`, boxes that question and answer name, or `lesions`, every lesion's as in MMedPO.
        allow_test_images: Whether images of prepared test splits are kept.

    Raises:
        InputError: A file or folder cannot be read, or a box leaves its image.
    """
    boxed = read_boxes(boxes)
    made = contrast_pairs(conversations, boxed, images, regions, allow_test_images)
    source = source_of_contrast(hash_of_input(conversations), boxed, regions)
    skipped = {reason: len(ids) for reason, ids in made.skipped.items()}
    return SourcedPairs(PairSet(made.pairs, skipped), source, images, made.skipped)


def build_pairs(
    sourced: SourcedPairs, out: Path, options: PairOptions = ALL_PAIRS, formats: Sequence[str] = ()
) -> BuiltPairs:
    """Select pairs and write them, for our trainer and for others; return both files' pairs and the files' names.

    Args:
        sourced: What a `pairs_of_...` returned.
        out: `NAME.jsonl` to write; pairs that are held out go to `NAME-held-out.jsonl`.
        options: How many pairs of an image, how they are balanced, and which share is held out.
        formats: Other trainers to write for: `trl`, `authors`, `llama-factory`, `ms-swift`.

    Raises:
        InputError: An option is out of its range, no pair is left, an image is missing, or `out` holds other pairs.
    """
    split = select_pairs(sourced.pairs, options)
    return BuiltPairs(split, write_pairs(split, out, sourced.source, formats, sourced.images))
