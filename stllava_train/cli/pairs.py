"""`stllava-train pairs` and `audit`: make preference pairs, and report how far judges can be trusted."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.errors import InputError, printable
from stllava_train.cli.options import check_data, count, counted, filled, print_counts

if TYPE_CHECKING:
    from stllava_train.preferences.pair_selection import PairOptions
    from stllava_train.preferences.pair_sources import SourcedPairs


def add_pairs(commands: Any) -> None:
    """Add `stllava-train pairs` to the commands."""
    pairs = commands.add_parser(
        "pairs",
        help="write preference pairs: the chosen and the rejected answer",
        description=filled(
            "Write a preference pair for every two answers of which the judges prefer one, as JSONL and in the "
            "layouts of "
            "other trainers. Candidates that make no pair are counted by reason. --from reads published pairs and "
            "those of other tools instead. --contrast makes pairs of one answer about two images: the true one, and a "
            "copy whose region is noise."
        ),
        epilog="examples:\n"
        "  stllava-train pairs runs/a/candidates.jsonl runs/a/judged.jsonl --out runs/a/pairs.jsonl --held-out 0.1\n"
        "  stllava-train pairs runs/a/candidates.jsonl runs/a/judged.jsonl --out runs/b/pairs.jsonl \\\n"
        "    --balance-length --format trl --format llama-factory\n"
        "  stllava-train pairs --from STLLaVA-Med-DPO.parquet --images data/images --out runs/c/pairs.jsonl\n"
        "  stllava-train pairs --from slake_mmedpo.json --images data/slake/imgs --out runs/d/pairs.jsonl\n"
        "  stllava-train pairs --contrast data/slake.json --boxes SLAKE/imgs --out runs/e/contrast.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_sources(pairs)
    _add_selection(pairs)
    pairs.set_defaults(command=_pairs)


def _add_sources(pairs: Any) -> None:
    """Add the options that say what pairs are made of."""
    pairs.add_argument(
        "files", nargs="*", type=Path, metavar="CANDIDATES JUDGED", help="what `candidates` and `judge` wrote"
    )
    pairs.add_argument("--out", required=True, type=Path, metavar="FILE", help="NAME.jsonl to write")
    pairs.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="pairs as JSON, JSONL or parquet, laid out for trl, LLaMA-Factory or ms-swift, or published as RLHF-V, "
        "RLAIF-V, MMedPO (with weights) or STLLaVA-Med-DPO",
    )
    pairs.add_argument(
        "--contrast",
        type=Path,
        metavar="FILE",
        help="conversations with true answers, as `stllava-train data` writes; the noised copies go to DIR/contrast",
    )
    pairs.add_argument(
        "--boxes",
        type=Path,
        metavar="FOLDER",
        help="with --contrast: SLAKE's imgs, with NAME/source.jpg and its boxes in NAME/detection.json",
    )
    pairs.add_argument(
        "--regions",
        choices=("named", "lesions"),
        default="named",
        help="with --contrast: boxes that question and answer name, or every lesion's as in MMedPO (default: named)",
    )
    pairs.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder of the images (default: the candidates'; with --contrast that of FILE)",
    )


def _add_selection(pairs: Any) -> None:
    """Add the options that say which pairs are written, and how."""
    pairs.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="NAME",
        help="judge whose verdicts count; may be given several times (default: the majority of all)",
    )
    pairs.add_argument(
        "--rule",
        choices=("ours", "authors"),
        default="ours",
        help="ours: both orders must agree; authors: one order, and the second answer wins a tie (default: ours)",
    )
    pairs.add_argument(
        "--min-margin",
        type=float,
        metavar="POINTS",
        help="smallest difference of the two scores (default: 1; with authors 0)",
    )
    pairs.add_argument("--per-image", type=int, metavar="N", help="pairs of an image, at most (default: all)")
    pairs.add_argument(
        "--balance-length", action="store_true", help="as many pairs with the longer answer chosen as rejected"
    )
    pairs.add_argument("--balance-verdict", action="store_true", help="as many pairs with yes chosen as with no chosen")
    pairs.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the images whose pairs go to a file of their own (default: 0)",
    )
    pairs.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all sampling (default: 0)")
    pairs.add_argument(
        "--format",
        action="append",
        default=[],
        choices=("trl", "authors", "llama-factory", "ms-swift"),
        help="write the pairs for this trainer as well; may be given several times",
    )
    pairs.add_argument(
        "--allow-test-images",
        action="store_true",
        help="with --from and --contrast: keep images of test splits (default: left out)",
    )


def _pairs(arguments: argparse.Namespace) -> int:
    from stllava_train.preferences.pair_selection import PairOptions
    from stllava_train.preferences.pair_sources import build_pairs  # with numpy

    options = PairOptions(
        arguments.per_image, arguments.balance_length, arguments.balance_verdict, arguments.held_out, arguments.seed
    )
    sourced = _sourced_pairs(arguments, options)
    built = build_pairs(sourced, arguments.out, options, arguments.format)
    print(f"{counted(len(built.split.train), 'pair')} to learn from, {len(built.split.held_out):,} held out")
    skipped = built.split.skipped.items()
    # Reasons with ids have been printed already.
    print_counts({f"left out, {why}": number for why, number in skipped if why not in sourced.skipped_ids})
    for file in built.files:
        print(printable(str(file)))
    return 0


def _sourced_pairs(arguments: argparse.Namespace, options: PairOptions) -> SourcedPairs:
    """Return the pairs of the source that the options name, before any are selected; print what was read.

    Raises:
        InputError: PairOptions do not fit each other, or the source cannot be read.
    """
    from stllava_train.preferences.pair_selection import check_options, rule_of
    from stllava_train.preferences.pair_sources import pairs_of_contrast, pairs_of_judged, pairs_of_published

    rule = rule_of(arguments.rule, arguments.min_margin)
    check_options(options)
    sources = [bool(arguments.files), arguments.source is not None, arguments.contrast is not None]
    if sum(sources) != 1 or len(arguments.files) not in (0, 2):
        raise InputError("pass two files, CANDIDATES and JUDGED, or one with --from, or one with --contrast.")
    if (arguments.contrast is None) != (arguments.boxes is None):
        raise InputError(
            "--contrast FILE and --boxes FOLDER go together: the conversations, and where their boxes are."
        )
    if arguments.contrast:
        images = arguments.images or arguments.contrast.parent
        _check_contrast(arguments, images)
        sourced = pairs_of_contrast(
            arguments.contrast, arguments.boxes, images, arguments.regions, arguments.allow_test_images
        )
        for why, ids in sourced.skipped_ids.items():
            print(printable(f"left out, {why}: {len(ids):,}: {', '.join(ids)}"))
    elif arguments.source:
        sourced = pairs_of_published(arguments.source, arguments.images, arguments.allow_test_images)
        pairs, skipped = sourced.pairs.pairs, sourced.pairs.skipped
        images_shown = len({pair.image_sha256 for pair in pairs})
        read = f"{counted(len(pairs), 'pair')} about {counted(images_shown, 'image')}"
        print(printable(f"{arguments.source}: {read}; {sum(skipped.values()):,} left out"))
    else:
        candidates, judged = arguments.files
        sourced = pairs_of_judged(candidates, judged, rule, arguments.judge, arguments.images)
    return sourced


def _check_contrast(arguments: argparse.Namespace, images: Path) -> None:
    """Raise InputError where a trainer that was asked for has no place for a second image, or a folder is missing."""
    from stllava_train.preferences.pair_formats import refusal_of_two_images  # with numpy

    if without_second_image := [name for name in arguments.format if name != "ms-swift"]:
        raise InputError(refusal_of_two_images(without_second_image[0]))
    check_data([arguments.contrast], images)


def add_audit(commands: Any) -> None:
    """Add `stllava-train audit` to the commands."""
    audit = commands.add_parser(
        "audit",
        help="look at judges and data: a page and its figures",
        description=filled(
            "Write audit.html and audit.json: how far the judges can be trusted, what the data is made of, whether it "
            "contains test images or test questions, and examples to read."
        ),
        epilog="examples:\n"
        "  stllava-train audit runs/a/candidates.jsonl runs/a/judged.jsonl --out runs/a/audit\n"
        "  stllava-train audit runs/a/candidates.jsonl runs/a/judged.jsonl --out runs/a/audit \\\n"
        "    --references data/slake.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    audit.add_argument("candidates", type=Path, metavar="CANDIDATES", help="what `stllava-train candidates` wrote")
    audit.add_argument("judged", type=Path, metavar="JUDGED", help="what `stllava-train judge` wrote")
    audit.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    audit.add_argument("--images", type=Path, metavar="DIR", help="folder of the images (default: the candidates')")
    audit.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="NAME",
        help="judge whose verdicts make pairs; may be given several times (default: all)",
    )
    audit.add_argument(
        "--references",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="conversations with true answers about the same images, as `stllava-train data` writes",
    )
    audit.add_argument(
        "--checkpoint",
        metavar="DIR_OR_HUB_ID",
        help="model that is asked with a black image: what it answers by the text alone (default: none)",
    )
    audit.add_argument("--examples", type=count, default=24, metavar="N", help="pairs to look at (default: 24)")
    audit.set_defaults(command=_audit)


def _audit(arguments: argparse.Namespace) -> int:
    from stllava_train.preferences.audit.write_audit import write_audit  # with numpy

    page = write_audit(
        arguments.candidates,
        arguments.judged,
        arguments.out,
        images=arguments.images,
        judges=arguments.judge,
        references=arguments.references,
        checkpoint=arguments.checkpoint,
        number=arguments.examples,
    )
    print(printable(str(page)))
    return 0
