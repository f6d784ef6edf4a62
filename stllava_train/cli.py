"""stllava-train: data | check | sft | merge | card | tiny. Heavy imports sit inside the commands: help is instant."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval import __version__
from stllava_eval.errors import InputError, printable

if TYPE_CHECKING:
    from stllava_train.conversations import Encoder
    from stllava_train.data import Written

DATASETS = ("vqarad", "slake", "pathvqa")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0 done, 1 the data has problems, 2 wrong call, 130 stopped by Ctrl-C."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.command(arguments) or 0
    except InputError as error:
        print(printable(f"stllava-train: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stllava-train: stopped. `sft` goes on with --resume, `data` by the same call.", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The command line, whose help `docs/cli.md` repeats."""
    top = argparse.ArgumentParser(
        prog="stllava-train",
        description="Train medical vision-language models. Research only; not for clinical use.",
        epilog="examples:\n  stllava-train data vqarad slake --out data\n  stllava-train check data/vqarad.json\n"
        "  stllava-train sft --recipe tiny --data data/vqarad.json --out runs/a start=checkpoints/a",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"stllava-med {__version__}")
    commands = top.add_subparsers(dest="name", required=True, metavar="COMMAND")
    _add_data(commands)
    _add_check(commands)
    _add_sft(commands)
    _add_merge(commands)
    _add_card(commands)
    _add_tiny(commands)
    return top


def _add_tiny(commands: Any) -> None:
    tiny = commands.add_parser(
        "tiny",
        help="make the tiny network that recipe tiny starts from",
        description="Make a network of 1.8 million weights and teach its two towers apart, on prepared training\n"
        "splits, in two minutes on two cores: what CLIP and Vicuna are to the real one. `sft --recipe tiny` then\n"
        "teaches it to answer and to ask.",
        epilog="examples:\n  stllava-train tiny\n  stllava-train tiny vqarad slake --out checkpoints/start --seed 1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tiny.add_argument("sets", nargs="*", metavar="SET", help="of vqarad, slake, pathvqa (default: all three)")
    tiny.add_argument(
        "--out", type=Path, metavar="DIR", help="checkpoint folder (default: $STLLAVA_HOME/checkpoints/tiny-start)"
    )
    tiny.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default: 0)")
    tiny.set_defaults(command=_tiny)


def _add_data(commands: Any) -> None:
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
        f"questions, {left_out:,} left out: {printable(str(written.path))}"
    )
    for why, ids in written.left_out.items():
        print(f"  left out, {why}: {len(ids):,}: {printable(', '.join(ids))}")


def _add_sft(commands: Any) -> None:
    sft = commands.add_parser(
        "sft",
        help="stage 1: learn to answer and to ask",
        description="Train a checkpoint on conversations, by a recipe. RUN becomes a checkpoint that the harness "
        "evaluates, with the losses of every step, their curves and a model card beside it. Under torchrun or "
        "accelerate launch it trains on several devices, on the same batches.",
        epilog="examples:\n"
        "  stllava-train sft --recipe stllava-med-7b --data med-im.json --out runs/stage1 --dry-run\n"
        "  stllava-train sft --recipe stllava-med-7b --data med-im.json --out runs/stage1 epochs=3\n"
        "  stllava-train sft --recipe stllava-med-7b --data med-im.json --out runs/stage1 epochs=3 --resume",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sft.add_argument("--recipe", required=True, metavar="R", help="a YAML file, or the name of one of ours")
    sft.add_argument("--stage", metavar="NAME", help="the stage of a recipe that has several")
    sft.add_argument(
        "--data",
        required=True,
        action="append",
        type=Path,
        metavar="FILE",
        help="conversations, LLaVA's JSON or JSONL; may be given several times",
    )
    sft.add_argument("--images", type=Path, metavar="DIR", help="folder of the images (default: that of each FILE)")
    sft.add_argument("--out", required=True, type=Path, metavar="RUN", help="folder to write")
    sft.add_argument("--resume", action="store_true", help="go on with the run in RUN, which was broken off")
    sft.add_argument(
        "--allow-test-images",
        action="store_true",
        help="train on images of prepared test splits too; the run's manifest and card count them (default: refused)",
    )
    sft.add_argument("--dry-run", action="store_true", help="print tokens, steps, parameters and memory; train nothing")
    sft.add_argument("--default", action="store_true", help="make RUN the default checkpoint of the harness")
    sft.add_argument("--wandb", action="store_true", help="report to Weights & Biases as well as to TensorBoard")
    sft.add_argument("changes", nargs="*", metavar="key=value", help="changes of the recipe, such as epochs=3")
    sft.set_defaults(command=_sft)


def _add_merge(commands: Any) -> None:
    merge = commands.add_parser(
        "merge",
        help="write a run's adapter and its base as one whole checkpoint",
        description="Merge the LoRA of RUN into the checkpoint that it builds on, in float32, and write the whole "
        "network as a folder that from_pretrained, this harness and stage 2 read.",
        epilog="examples:\n  stllava-train merge runs/stage1 --out checkpoints/stage1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    merge.add_argument("run", metavar="RUN", help="folder of a training run, or any adapter that the harness loads")
    merge.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    merge.set_defaults(command=_merge)


def _add_card(commands: Any) -> None:
    card = commands.add_parser(
        "card",
        help="write a run's model card anew, with scores",
        description="Write README.md of a training run: data, recipe, losses, and the scores of its evaluations.",
        epilog="examples:\n  stllava-train card runs/stage1 --eval ~/.cache/stllava-med/runs/stage1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    card.add_argument("run", type=Path, metavar="RUN", help="folder of a training run")
    card.add_argument(
        "--eval", action="append", type=Path, default=[], metavar="DIR", help="folder of an evaluation of it"
    )
    card.set_defaults(command=_card)


def _let_threads_wait() -> None:
    """On a CPU, threads that wait do not keep the others from working. Of use before torch is imported."""
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _sft(arguments: argparse.Namespace) -> int:
    _let_threads_wait()
    from stllava_train.recipe import read_recipe

    recipe = read_recipe(arguments.recipe, arguments.changes, arguments.stage)
    from stllava_train.sft import first_process, open_work, report, train

    _check_images(arguments.images)
    work = open_work(recipe, arguments.data, arguments.images, arguments.allow_test_images)
    if arguments.dry_run:
        print(report(work))
        return 0
    train(work, arguments.out, arguments.resume, wandb=arguments.wandb)
    if first_process():
        if arguments.default:
            from stllava_eval.answering import record_default_checkpoint

            record_default_checkpoint(arguments.out)
        beside = "losses.jsonl, curves.png, tensorboard and README.md are beside it"
        print(printable(f"{arguments.out}: the checkpoint; {beside}"))
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    from stllava_eval.network.checkpoint import open_checkpoint
    from stllava_eval.network.convert import convert

    convert(open_checkpoint(arguments.run), arguments.out)
    print(printable(f"{arguments.out}: the whole checkpoint"))
    return 0


def _card(arguments: argparse.Namespace) -> int:
    from stllava_train.card import CARD, write_card

    write_card(arguments.run, arguments.eval)
    print(printable(str(arguments.run / CARD)))
    return 0


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
    _check_images(images)
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


def _check_images(images: Path | None) -> None:
    if images is not None and not images.is_dir():
        raise InputError(f"--images {images}: no such folder. Pass the one that the records' images are relative to.")


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
    _let_threads_wait()
    from stllava_eval.datasets import read_rows
    from stllava_eval.home import home
    from stllava_train.tiny import write_start

    out = arguments.out or home() / "checkpoints" / "tiny-start"
    write_start({name: read_rows(name, "train") for name in arguments.sets or DATASETS}, out, seed=arguments.seed)
    print(printable(f"{out}: a network to start from: stllava-train sft --recipe tiny start={out} ..."))
    return 0


if __name__ == "__main__":
    sys.exit(main())
