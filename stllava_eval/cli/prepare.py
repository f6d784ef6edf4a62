"""`stllava-eval prepare`: check a data set's official files and write them as rows."""

from __future__ import annotations

import argparse
from typing import Any

from stllava_eval.cli.options import add_command, show, show_errors
from stllava_eval.data.catalog import DATASETS, Manifest
from stllava_eval.errors import InputError


def add_prepare(commands: Any) -> None:
    """Add `stllava-eval prepare` to the commands."""
    prepare = add_command(
        commands.add_parser,
        name="prepare",
        help="check an official split and write it under $STLLAVA_HOME/data",
        description="Check an official split, counts and images, and write it as one Parquet file with a manifest "
        "under $STLLAVA_HOME/data. A split with other counts is refused. All prepared editions are "
        "kept, and the one prepared last is in use; to switch back to another one, repeat its call.",
        examples=[
            "stllava-eval prepare --sample",
            "stllava-eval prepare vqarad --from ~/downloads/vqa_rad",
            "stllava-eval prepare slake --from ~/downloads/slake --split train",
            "stllava-eval prepare pathvqa --from flaviagiammarino/path-vqa",
        ],
    )
    prepare.add_argument("dataset", nargs="?", choices=DATASETS, help="data set (default with --sample: all three)")
    prepare.add_argument(
        "--from", dest="source", metavar="SOURCE", help="folder, archive or hub id (default: the data set's hub copy)"
    )
    prepare.add_argument("--split", default="test", help="test, train, validation, ... (default: test)")
    prepare.add_argument(
        "--sample",
        action="store_true",
        help="write the small sample sets, all splits, from images in installed packages",
    )
    prepare.set_defaults(command=_prepare)


def _prepare(arguments: argparse.Namespace) -> int:
    if arguments.sample and arguments.source:
        raise InputError("--sample makes its own images; leave --from out.")
    if not arguments.sample and not arguments.dataset:
        raise InputError(f"no data set named. Pass one of {', '.join(DATASETS)}, or --sample.")
    if arguments.sample:
        from stllava_eval.data.sample.prepare_sample import prepare_sample  # with numpy

        manifests = prepare_sample([arguments.dataset] if arguments.dataset else tuple(DATASETS))
    else:
        from stllava_eval.data.prepare import prepare  # with numpy

        manifests = [prepare(arguments.dataset, arguments.split, arguments.source)]
    for manifest in manifests:
        _show_prepared(manifest)
    return 0


def _show_prepared(manifest: Manifest) -> None:
    """Print the counts of a prepared split, and on stderr its notes and the other editions of it that are kept."""
    from stllava_eval.data.splits import how_to_use, prepared_editions  # with numpy

    counts, split = manifest.counts, f"{manifest.dataset} {manifest.split}"
    show(
        f"{split} ({manifest.edition}): {counts['rows']} questions = "
        f"{counts['closed']} closed + {counts['open']} open on {counts['images']} images"
    )
    for note in manifest.notes:
        show_errors(f"{split}: note: {note}")
    for kept in prepared_editions(manifest.dataset, manifest.split)[1:]:
        show_errors(f"{split}: the {kept.edition} is kept beside it; {how_to_use(kept)} takes it into use again")
