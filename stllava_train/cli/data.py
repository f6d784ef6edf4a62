"""`stllava-train data` and `check`: make conversations, and check files of conversations and pairs."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.data.catalog import DATASETS
from stllava_eval.errors import InputError, printable
from stllava_train.cli.options import check_data, counted, filled

if TYPE_CHECKING:
    from stllava_train.data.encoding import Encoder
    from stllava_train.data.export import Written


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
        help="for SLAKE; all adds the Chinese split, and leaks: 84 of the 96 English test images occur in Chinese "
        "train or validation rows (default: en)",
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
            print(
                "  the paper: 37,452 images, 108,545 questions (arXiv:2406.19973, Table 1; its filter is unpublished)"
            )
            for what, whys in (("missing", fetched.missing), ("failed, the next run tries again", fetched.failed)):
                for why, times in Counter(whys.values()).most_common():
                    print(f"  {what} {times:,}: {why}")
            for note in notes:
                print(f"  {printable(note)}")
        else:
            language = arguments.language if name == "slake" else "en"
            written = write_vqa(name, arguments.out, split=arguments.split, language=language, rounds=arguments.rounds)
            sample = " (SAMPLE DATA)" if read_manifest(name, arguments.split).sample else ""
            _print_written(f"{name} {arguments.split}{sample}", written)
    return 0


def _print_written(title: str, written: Written) -> None:
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
        "--checkpoint", metavar="DIR_OR_HUB_ID", help="whose tokenizer counts tokens (default: lengths are not counted)"
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
    from stllava_train.data.check import KINDS, MAX_TOKENS, problems, write_sound
    from stllava_train.preferences.check_pairs import is_pairs, pair_problems
    from stllava_train.preferences.pair_layouts import refuse_other_pairs

    files, images, out = arguments.data, arguments.images, arguments.write
    check_data(files, images)
    if out and out.resolve() in {file.resolve() for file in files}:
        raise InputError(f"--write {out}: it is a DATA file. Choose another name.")
    if out and images is None and {file.parent.resolve() for file in files} != {out.parent.resolve()}:
        raise InputError(
            f"--write {out}: images are relative to the file's folder, and DATA lies elsewhere. Pass --images, or "
            f"write into {files[0].parent}."
        )
    if arguments.max_tokens is not None and (arguments.max_tokens < 1 or not arguments.checkpoint):
        raise InputError(f"--max-tokens {arguments.max_tokens}: a number from 1 on, with --checkpoint to count.")
    if not arguments.checkpoint:
        print("lengths are not checked: pass --checkpoint DIR to count tokens with its tokenizer", file=sys.stderr)
    encoder = _encoder(arguments.checkpoint) if arguments.checkpoint else None
    most = arguments.max_tokens or MAX_TOKENS
    for file in files:
        refuse_other_pairs(file)
    paired = [file for file in files if is_pairs(file)]
    if paired and (len(files) > 1 or out):
        raise InputError(f"{paired[0]}: it holds pairs. Check it by itself, without --write.")
    given = images, encoder, most, True, lambda line: print(line, file=sys.stderr)
    every = pair_problems(files[0], *given) if paired else problems(files, *given)
    for problem in every:
        print(printable(str(problem)))
    if every:
        records = len({problem.location for problem in every})
        kinds = Counter(problem.kind for problem in every)
        counts = ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS if kinds[kind])
        print(f"{counted(len(every), 'problem')} in {counted(records, 'record')}: {counts}")
    else:
        print("no problem was found", file=sys.stderr)
    if out:
        print(printable(f"{out}: {counted(write_sound(files, every, out), 'record')}"))
    return 1 if every else 0


def _encoder(checkpoint: str) -> Encoder:
    """With the template of the authors' stage 1, the longer one, where the checkpoint has it."""
    from stllava_eval.network.checkpoint import open_checkpoint
    from stllava_train.data.encoding import Encoder

    opened = open_checkpoint(checkpoint)
    processor = opened.processor()
    template = "v1_sq" if "v1_sq" in (processor.chat_template or ()) else "v1"
    return Encoder(processor, template, opened.config.image_seq_length)
