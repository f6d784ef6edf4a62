"""stllava-train: data | tiny. Heavy imports sit inside the commands, so that help is instant."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stllava_eval import __version__
from stllava_eval.errors import InputError, printable

if TYPE_CHECKING:
    from stllava_train.data import Written

DATASETS = ("vqarad", "slake", "pathvqa")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0 done, 2 wrong call."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.command(arguments) or 0
    except InputError as error:
        print(printable(f"stllava-train: {error}"), file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The command line, whose help `docs/cli.md` repeats."""
    top = argparse.ArgumentParser(
        prog="stllava-train",
        description="Train medical vision-language models. Research only; not for clinical use.",
        epilog="examples:\n  stllava-train data vqarad slake --out data\n  stllava-train tiny",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"stllava-med {__version__}")
    commands = top.add_subparsers(dest="name", required=True, metavar="COMMAND")
    _add_data(commands)
    tiny = commands.add_parser(
        "tiny",
        help="train a tiny LLaVA from scratch on the sample sets",
        description="Train a tiny LLaVA (1.6 million weights) from scratch on the sample training splits, in about "
        "five minutes on two cores, and make it the default checkpoint. It shows that the whole pipeline works; it "
        "knows nothing beyond the sample sets.",
        epilog="examples:\n  stllava-train tiny\n  stllava-train tiny --out runs/tiny --seed 1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tiny.add_argument(
        "--out", type=Path, metavar="DIR", help="checkpoint folder (default: $STLLAVA_HOME/checkpoints/tiny)"
    )
    tiny.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default: 0)")
    tiny.set_defaults(command=_tiny)
    return top


def _add_data(commands: argparse._SubParsersAction) -> None:
    data = commands.add_parser(
        "data",
        help="write training conversations and their images",
        description=textwrap.fill(
            "Write training conversations, DIR/SET.json with one a line, and their images, DIR/images/SET: of prepared "
            "splits (`stllava-eval prepare`, samples too), or of med-im, LLaVA-Med's 60k instructions with inline "
            "mentions, whose figures are downloaded from PubMed Central; a stopped download goes on.",
            90,
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
        help="of the prepared sets; each needs its own --out (default: train)",
    )
    data.add_argument(
        "--language",
        choices=("en", "all"),
        default="en",
        help="of SLAKE; all takes the Chinese split too, and leaks: 84 of the 96 English test images occur in Chinese "
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
        help="of med-im: folder or web address of LLaVA-Med's two files (default: the published address)",
    )
    data.add_argument("--workers", type=int, default=8, metavar="N", help="articles to download at a time (default: 8)")
    data.add_argument("--retry-missing", action="store_true", help="of med-im: ask again for figures known as missing")
    data.set_defaults(command=_data)


def _data(arguments: argparse.Namespace) -> int:
    from stllava_eval.datasets import read_manifest
    from stllava_train.data import MED_IM, write_med_im, write_vqa

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
    left_out = sum(map(len, written.left_out.values()))
    print(
        f"{title}: {written.conversations:,} conversations, {written.images:,} images, {written.questions:,} "
        f"questions, {left_out:,} left out: {written.path}"
    )
    for why, ids in written.left_out.items():
        print(f"  left out, {why}: {len(ids):,}: {printable(', '.join(ids))}")


def _tiny(arguments: argparse.Namespace) -> int:
    from stllava_eval.answering import record_default_checkpoint
    from stllava_eval.datasets import read_manifest, read_rows
    from stllava_eval.home import home
    from stllava_train.tiny import train_tiny

    for name in DATASETS:
        if not read_manifest(name, "train").sample:
            raise InputError(
                f"{name} train is the official split, and the tiny model learns from the samples only. Set "
                "STLLAVA_HOME to another folder and run `stllava-eval prepare --sample` there."
            )
    out = arguments.out or home() / "checkpoints" / "tiny"
    train = {name: read_rows(name, "train") for name in DATASETS}
    validation = {name: read_rows(name, "validation") for name in DATASETS}
    train_tiny(train, validation, out, seed=arguments.seed)
    record_default_checkpoint(out)
    print(f"{out}: the default checkpoint from now on ({home() / 'checkpoint.json'})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
