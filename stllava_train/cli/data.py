"""`stllava-train data` and `check`: make conversations, and check files of conversations and pairs."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.data.catalog import DATASETS
from stllava_eval.errors import InputError, printable
from stllava_train.cli.options import check_data, counted, filled

if TYPE_CHECKING:
    from stllava_train.data.check import Found
    from stllava_train.data.export import Written
    from stllava_train.data.pmc import Fetched


def add_data(commands: Any) -> None:
    """Add `stllava-train data` to the commands."""
    data = commands.add_parser(
        "data",
        help="write training conversations and their images",
        description=filled(
            "Write training conversations to DIR/SET.json, one per line, and their images to DIR/images/SET. They come "
            "from prepared splits (`stllava-eval prepare`, samples too), or from med-im, LLaVA-Med's 60k instructions "
            "with inline mentions, whose figures are downloaded from PubMed Central. If a download was stopped, the "
            "same call continues it."
        ),
        epilog="examples:\n  stllava-train data vqarad slake pathvqa --out data\n"
        "  stllava-train data vqarad --out data/one-round --rounds 1\n"
        "  stllava-train data slake --out data/bilingual --language all\n"
        "  stllava-train data med-im --from downloads/llava_med --out data",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data.add_argument("sets", nargs="+", choices=(*DATASETS, "med-im"), metavar="SET", help="%(choices)s")
    data.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    data.add_argument(
        "--split",
        choices=("train", "validation"),
        default="train",
        help="split of the prepared sets; each needs its own --out (default: train)",
    )
    data.add_argument(
        "--language",
        choices=("en", "all"),
        default="en",
        help="language of SLAKE's questions; all adds the Chinese split, which leaks: 84 of the 96 English test images "
        "occur in Chinese train or validation rows (default: en)",
    )
    data.add_argument(
        "--rounds",
        type=int,
        default=12,
        metavar="N",
        help="questions in a conversation, at most; LLaVA-Med fine-tunes with 1 (default: 12; med-im has its own)",
    )
    data.add_argument("--format", choices=("llava",), default="llava", help="layout of SET.json (default: llava)")
    data.add_argument(
        "--from",
        dest="source",
        metavar="FOLDER_OR_URL",
        help="for med-im: folder or web address of LLaVA-Med's two files (default: the published address)",
    )
    data.add_argument("--workers", type=int, default=8, metavar="N", help="articles to download at a time (default: 8)")
    data.add_argument(
        "--retry-missing", action="store_true", help="for med-im: ask again for figures that were missing before"
    )
    data.set_defaults(command=_data)


def _data(arguments: argparse.Namespace) -> int:
    from stllava_eval.data.splits import read_manifest
    from stllava_train.data.export import MED_IM, write_med_im, write_vqa

    if arguments.workers < 1:
        raise InputError(f"--workers {arguments.workers}: nobody to download. Give how many, from 1 on.")
    if arguments.source and "med-im" not in arguments.sets:
        raise InputError("--from is for med-im. Other sets come from `stllava-eval prepare SET --split train --from`.")
    if arguments.language == "all" and "slake" not in arguments.sets:
        raise InputError("--language all: only slake has two languages. Leave it out.")
    for name in dict.fromkeys(arguments.sets):
        if name == "med-im":
            written, fetched, notes = write_med_im(
                arguments.source or MED_IM,
                arguments.out,
                workers=arguments.workers,
                retry_missing=arguments.retry_missing,
            )
            _print_written("med-im", written)
            _print_fetched(fetched, notes)
        else:
            language = arguments.language if name == "slake" else "en"
            written = write_vqa(name, arguments.out, split=arguments.split, language=language, rounds=arguments.rounds)
            sample = " (SAMPLE DATA)" if read_manifest(name, arguments.split).sample else ""
            _print_written(f"{name} {arguments.split}{sample}", written)
    return 0


def _print_fetched(fetched: Fetched, notes: Sequence[str]) -> None:
    """Print the paper's counts beside ours, and why figures were not downloaded."""
    print("  the paper: 37,452 images, 108,545 questions (arXiv:2406.19973, Table 1; its filter is unpublished)")
    for what, reasons in (("missing", fetched.missing), ("failed, the next run tries again", fetched.failed)):
        for reason, number in Counter(reasons.values()).most_common():
            print(f"  {what} {number:,}: {reason}")
    for note in notes:
        print(f"  {printable(note)}")


def _print_written(title: str, written: Written) -> None:
    """Print how many conversations, images and questions were written, and the ids of those that were left out."""
    skipped = sum(map(len, written.skipped.values()))
    print(
        f"{title}: {counted(written.conversations, 'conversation')}, {counted(written.images, 'image')}, "
        f"{counted(written.questions, 'question')}, {skipped:,} left out: {printable(str(written.path))}"
    )
    for why, ids in written.skipped.items():
        print(f"  left out, {why}: {len(ids):,}: {printable(', '.join(ids))}")


def add_check(commands: Any) -> None:
    """Add `stllava-train check` to the commands."""
    check = commands.add_parser(
        "check",
        help="list everything that is wrong with training data",
        description=filled(
            "List every problem of files of conversations, or of one file of pairs: their form, images that cannot be "
            "decoded, records that are too long, duplicates, pairs that contradict each other, and images that are in "
            "a prepared test split or look like one of it. The exit code is 0 if there is none, 1 if there are some, 2 "
            "for a wrong call."
        ),
        epilog="examples:\n  stllava-train check data/train.json --images data/images\n"
        "  stllava-train check a.json b.jsonl --images images --checkpoint ZachSun/stllava-med-7b --write sound.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument(
        "data",
        nargs="+",
        type=Path,
        metavar="DATA",
        help="JSON or JSONL file of conversations; or one of pairs that `stllava-train pairs` wrote (`pairs --from` "
        "reads those of other tools)",
    )
    check.add_argument(
        "--images", type=Path, metavar="DIR", help="folder that images are relative to (default: that of each file)"
    )
    check.add_argument(
        "--checkpoint",
        metavar="DIR_OR_HUB_ID",
        help="the model whose tokenizer counts tokens (default: lengths are not checked)",
    )
    check.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="longest record, in tokens with its image's (default: 2623, the authors' 2048 with the image as one)",
    )
    check.add_argument("--write", type=Path, metavar="FILE", help="write the records without a problem, unchanged")
    check.set_defaults(command=_check)


def _check(arguments: argparse.Namespace) -> int:
    from stllava_train.data.check import MAX_TOKENS, write_sound
    from stllava_train.preferences.check_files import check_files  # with torch

    files, images, out = arguments.data, arguments.images, arguments.write
    check_data(files, images)
    if out:
        _check_write(out, files, images)
    if arguments.max_tokens is not None and (arguments.max_tokens < 1 or not arguments.checkpoint):
        raise InputError(f"--max-tokens {arguments.max_tokens}: a number from 1 on, with --checkpoint to count.")
    if not arguments.checkpoint:
        print("lengths are not checked: pass --checkpoint DIR to count tokens with its tokenizer", file=sys.stderr)
    problems = check_files(
        files,
        images,
        arguments.checkpoint,
        arguments.max_tokens or MAX_TOKENS,
        conversations_only=out is not None,
        report=lambda line: print(line, file=sys.stderr),
    )
    _print_problems(problems)
    if out:
        print(printable(f"{out}: {counted(write_sound(files, problems, out), 'record')}"))
    return 1 if problems else 0


def _check_write(out: Path, files: Sequence[Path], images: Path | None) -> None:
    """Raise InputError where the sound records cannot be written to `out`."""
    if out.resolve() in {file.resolve() for file in files}:
        raise InputError(f"--write {out}: it is a DATA file. Choose another name.")
    if images is None and {file.parent.resolve() for file in files} != {out.parent.resolve()}:
        raise InputError(
            f"--write {out}: images are relative to the file's folder, and DATA lies elsewhere. Pass --images, or "
            f"write into {files[0].parent}."
        )


def _print_problems(problems: Sequence[Found]) -> None:
    """Print each problem on a line, and how many there are of each kind."""
    from stllava_train.data.check import KINDS

    for problem in problems:
        print(printable(str(problem)))
    if not problems:
        print("no problem was found", file=sys.stderr)
        return
    records = len({problem.location for problem in problems})
    number = Counter(problem.kind for problem in problems)
    counts = ", ".join(f"{number[kind]} {kind}" for kind in KINDS if number[kind])
    print(f"{counted(len(problems), 'problem')} in {counted(records, 'record')}: {counts}")
