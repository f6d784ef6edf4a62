"""`stllava-eval prepare`: check a data set's official files and write them as rows."""

from __future__ import annotations

import argparse
from typing import Any

from stllava_eval.cli.options import add_command, show, show_errors
from stllava_eval.data.catalog import DATASETS
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
    from stllava_eval.data import prepare, splits

    if arguments.sample:
        if arguments.source:
            raise InputError("--sample makes its own images; leave --from out.")
        from stllava_eval.data.sample.pictures import SPLITS
        from stllava_eval.data.sample.questions import sample_rows

        manifests = [
            splits.write_split(
                name,
                split,
                sample_rows(name, split),
                edition=f"sample {split}",
                official=False,
                sample=True,
                source="images in installed packages",
                licence="each image's own: docs/start/data.md",
            )
            for name in ([arguments.dataset] if arguments.dataset else DATASETS)
            for split in SPLITS
        ]
    elif not arguments.dataset:
        raise InputError(f"no data set named. Pass one of {', '.join(DATASETS)}, or --sample.")
    else:
        manifests = [prepare.prepare(arguments.dataset, arguments.split, arguments.source)]
    for manifest in manifests:
        counts, what = manifest.counts, f"{manifest.dataset} {manifest.split}"
        show(
            f"{what} ({manifest.edition}): {counts['rows']} questions = "
            f"{counts['closed']} closed + {counts['open']} open on {counts['images']} images"
        )
        for note in manifest.notes:
            show_errors(f"{what}: note: {note}")
        for other in splits.prepared_editions(manifest.dataset, manifest.split)[1:]:
            show_errors(
                f"{what}: the {other.edition} is kept beside it; {splits.how_to_use(other)} takes it into use again"
            )
    return 0
