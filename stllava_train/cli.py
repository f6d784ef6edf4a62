"""stllava-train: check | tiny. Heavy imports sit inside the commands, so that help is instant."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval import __version__
from stllava_eval.errors import InputError, printable

if TYPE_CHECKING:
    from stllava_train.conversations import Encoder

DATASETS = ("vqarad", "slake", "pathvqa")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0 done, 1 the data has problems, 2 wrong call."""
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
        epilog="examples:\n  stllava-train check data/train.json --images data/images\n  stllava-train tiny",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"stllava-med {__version__}")
    commands = top.add_subparsers(dest="name", required=True, metavar="COMMAND")
    _add_check(commands)
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


def _add_check(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        help="list everything that is wrong with training data",
        description="List every problem of files of conversations: their form, images that cannot be decoded, records "
        "that are too long, duplicates, and images that are in a prepared test split or look like one of it. The exit "
        "code is 0 where there is none, 1 where there are some, 2 for a wrong call.",
        epilog="examples:\n  stllava-train check data/train.json --images data/images\n"
        "  stllava-train check a.json b.jsonl --images images --checkpoint ZachSun/stllava-med-7b --write sound.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("data", nargs="+", type=Path, metavar="DATA", help="JSON or JSONL file of conversations")
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
    from stllava_train.check import KINDS, MAX_TOKENS, problems, write_sound

    files, images, out = arguments.data, arguments.images, arguments.write
    if len({file.resolve() for file in files}) < len(files):
        raise InputError("a DATA file comes twice. Name each once.")
    if images is not None and not images.is_dir():
        raise InputError(f"--images {images}: no such folder. Pass the one that the records' images are relative to.")
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
        print("lengths are not counted: name the model whose tokenizer does, --checkpoint DIR", file=sys.stderr)
    every = problems(
        files,
        images,
        _encoder(arguments.checkpoint) if arguments.checkpoint else None,
        arguments.max_tokens or MAX_TOKENS,
    )
    for problem in every:
        print(printable(str(problem)))
    if every:
        records = len({problem.place for problem in every})
        kinds = Counter(problem.kind for problem in every)
        counts = ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS if kinds[kind])
        print(f"{_counted(len(every), 'problem')} in {_counted(records, 'record')}: {counts}")
    if out:
        print(printable(f"{out}: {_counted(write_sound(files, every, out), 'record')}"))
    return 1 if every else 0


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _encoder(checkpoint: str) -> Encoder:
    """With the template of the authors' stage 1, the longer one, where the checkpoint has it."""
    from stllava_eval.network.checkpoint import open_checkpoint
    from stllava_train.conversations import Encoder

    opened = open_checkpoint(checkpoint)
    processor = opened.processor()
    template = "v1_sq" if "v1_sq" in (processor.chat_template or ()) else "v1"
    return Encoder(processor, template, opened.config.image_seq_length)


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
