"""stllava-train: data, check, sft, candidates, judge and so on. Heavy imports sit inside commands: help is instant."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from stllava_eval import __version__
from stllava_eval.errors import InputError, of_the_disk, printable
from stllava_eval.home import local, read_bytes
from stllava_train.card import kept_step, left_out_by_peft

if TYPE_CHECKING:
    from stllava_train.asking import Asked, Preset
    from stllava_train.candidates import Candidate, Settings
    from stllava_train.conversations import Encoder
    from stllava_train.data import Written
    from stllava_train.ledger import Ledger
    from stllava_train.pairs import Kept
    from stllava_train.prices import Price
    from stllava_train.verdicts import Verdict

DATASETS = ("vqarad", "slake", "pathvqa")
WHYS = 5  # reasons, and questions of each, that are shown for what is not scored (our choice)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0 done, 1 the data has problems, 2 wrong call, 130 stopped by Ctrl-C."""
    arguments = parser().parse_args(argv)
    try:
        with redirect_stdout(cast(TextIO, _Stdout(sys.stdout))):
            return arguments.command(arguments) or 0
    except InputError as error:
        print(printable(f"stllava-train: {error}"), file=sys.stderr)
        return 2
    except OSError as error:
        if not (line := of_the_disk(error)):
            raise
        print(printable(f"stllava-train: {line}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stllava-train: stopped. The same call goes on; those of `sft` and `dpo` with --resume.", file=sys.stderr)
        return 130


class _Stdout:
    """Standard output that its reader may leave, as `head` does: the command goes on, and what it prints is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


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
    _add_candidates(commands)
    _add_judge(commands)
    _add_pairs(commands)
    _add_audit(commands)
    _add_dpo(commands)
    _add_all(commands)
    _add_merge(commands)
    _add_card(commands)
    _add_tiny(commands)
    return top


def _add_tiny(commands: Any) -> None:
    tiny = commands.add_parser(
        "tiny",
        help="make the tiny network that recipe tiny starts from",
        description=_filled(
            "Make a network of 1.8 million weights and train its vision tower and its language model separately, on "
            "prepared training splits, in some minutes on two cores. It takes the place of CLIP and Vicuna: `sft "
            "--recipe tiny` then teaches it to answer and to ask."
        ),
        epilog="examples:\n  stllava-train tiny\n  stllava-train tiny vqarad slake --out checkpoints/start --seed 1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tiny.add_argument("sets", nargs="*", metavar="SET", help="of vqarad, slake, pathvqa (default: all three)")
    tiny.add_argument(
        "--out", type=Path, metavar="DIR", help="checkpoint folder (default: $STLLAVA_HOME/checkpoints/tiny-start)"
    )
    tiny.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default: 0)")
    tiny.set_defaults(command=_tiny)


def _filled(description: str) -> str:
    """A description in lines, which `RawDescriptionHelpFormatter` leaves to its caller."""
    return textwrap.fill(description, 90)


def _add_data(commands: Any) -> None:
    data = commands.add_parser(
        "data",
        help="write training conversations and their images",
        description=_filled(
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
        f"{title}: {_counted(written.conversations, 'conversation')}, {_counted(written.images, 'image')}, "
        f"{_counted(written.questions, 'question')}, {left_out:,} left out: {printable(str(written.path))}"
    )
    for why, ids in written.left_out.items():
        print(f"  left out, {why}: {len(ids):,}: {printable(', '.join(ids))}")


def _add_sft(commands: Any) -> None:
    sft = commands.add_parser(
        "sft",
        help="stage 1: learn to answer and to ask",
        description=_filled(
            "Train a checkpoint on conversations, by a recipe. RUN becomes a checkpoint that the harness "
            "evaluates, with "
            "the losses of every step, their curves and a model card. Under torchrun or accelerate launch it trains on "
            "several devices, on the same batches."
        ),
        epilog="examples:\n"
        "  stllava-train sft --recipe stllava-med-7b --data med-im.json --out runs/stage1 --dry-run\n"
        "  stllava-train sft --recipe stllava-med-7b --data med-im.json --out runs/stage1 epochs=3\n"
        "  stllava-train sft --recipe stllava-med-7b --data med-im.json --out runs/stage1 epochs=3 --resume",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sft.add_argument(
        "--recipe", required=True, metavar="R", help="a YAML file, or the name of a recipe in docs/train.md"
    )
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
    _add_training(sft)
    sft.set_defaults(command=_sft)


def _add_candidates(commands: Any) -> None:
    candidates = commands.add_parser(
        "candidates",
        help="let a checkpoint ask about images, and answer twice",
        description=_filled(
            "Let a checkpoint describe every image, ask questions about it, and answer each twice. A judge then "
            "chooses "
            "between the two answers. After a stop, the same call continues. docs/preferences.md lists the settings "
            "with their sources."
        ),
        epilog="examples:\n"
        "  stllava-train candidates --checkpoint runs/stage1 --images data/images --out runs/a/candidates.jsonl\n"
        "  stllava-train candidates --checkpoint runs/stage1 --images data/images --sample 10000 --preset authors \\\n"
        "    --out runs/b/candidates.jsonl questions=3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    candidates.add_argument("--checkpoint", required=True, metavar="DIR_OR_HUB_ID", help="that asks and answers")
    candidates.add_argument("--images", required=True, type=Path, metavar="DIR", help="folder of the images")
    candidates.add_argument(
        "--list", type=Path, metavar="FILE", help="names of images in DIR, one per line (default: all images in it)"
    )
    candidates.add_argument(
        "--sample", type=int, metavar="N", help="how many of the images, sampled by seed (default: all)"
    )
    candidates.add_argument("--out", required=True, type=Path, metavar="FILE", help="NAME.jsonl to write")
    candidates.add_argument(
        "--preset",
        choices=("ours", "authors"),
        default="ours",
        help="ours leaves out texts without a question mark, repeated questions and answers that are alike "
        "(default: ours)",
    )
    candidates.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    candidates.add_argument("--dtype", metavar="T", help="float32, bfloat16 or float16 (default: by device)")
    candidates.add_argument(
        "--allow-test-images", action="store_true", help="ask about images of prepared test splits (default: refused)"
    )
    _add_engine(candidates)
    candidates.add_argument(
        "changes", nargs="*", metavar="key=value", help="changes of the preset, such as questions=3"
    )
    candidates.set_defaults(command=_candidates)


def _candidates(arguments: argparse.Namespace) -> int:
    _let_threads_wait()
    from stllava_train.candidates import (
        PRESETS,
        check_settings,
        images_in,
        listed_images,
        sampled,
        write_candidates,
    )
    from stllava_train.recipe import changed

    settings = changed(PRESETS[arguments.preset], arguments.changes)
    check_settings(settings)
    folder = arguments.images
    names = listed_images(arguments.list, folder) if arguments.list else images_in(folder)
    names = sampled(names, arguments.sample, settings.seed)
    draw, checkpoint = (_drawn_by_ray if arguments.engine == "ray" else _drawn_here)(arguments, settings)
    counts = write_candidates(draw, checkpoint, names, folder, arguments.out, settings, arguments.allow_test_images)
    print(printable(f"{arguments.out}: {_counted(counts['candidates'], 'candidate')}"))
    _print_counts(counts)
    return 0


def _drawn_here(arguments: argparse.Namespace, settings: Settings) -> tuple[Any, dict[str, str]]:
    """What draws candidates, and of which checkpoint."""
    from functools import partial

    from stllava_eval.answering import Answerer
    from stllava_train.candidates import rows_of

    answerer = Answerer(arguments.checkpoint, device=arguments.device, dtype=arguments.dtype)
    checkpoint = {"name": answerer.name, "sha256": answerer.sha256, "dtype": str(answerer.dtype)}
    return partial(rows_of, answerer, settings=settings), checkpoint


def _drawn_by_ray(arguments: argparse.Namespace, settings: Settings) -> tuple[Any, dict[str, str]]:
    """As `_drawn_here`."""
    from functools import partial

    import torch

    from stllava_eval.answering import torch_dtype
    from stllava_eval.network.checkpoint import open_checkpoint
    from stllava_train.cluster import candidates_by_ray, workers_have_gpus

    if arguments.device:
        raise InputError("--device: with --engine ray every worker takes a GPU where there are some. Leave it out.")
    gpu = workers_have_gpus()
    folder = local(arguments.checkpoint)
    name = arguments.checkpoint if folder is None else str(folder.resolve())
    dtype = str(torch_dtype(arguments.dtype, torch.device("cuda" if gpu else "cpu")))
    checkpoint = {"name": arguments.checkpoint, "sha256": open_checkpoint(name).sha256, "dtype": dtype}
    draw = partial(
        candidates_by_ray, settings=settings, workers=arguments.workers, name=name, dtype=dtype.removeprefix("torch.")
    )
    return draw, checkpoint


def _add_engine(command: Any) -> None:
    command.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray maps the work over the cluster of $RAY_ADDRESS, or over this machine (default: local)",
    )
    command.add_argument("--workers", type=_count, default=2, metavar="N", help="of --engine ray (default: 2)")


def _amount(text: str) -> float:
    """A number from 0 on."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount from 0 on")
    return value


def _count(text: str) -> int:
    """A whole number from 1 on; argparse tells who gave another one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def _print_counts(counts: Mapping[str, int]) -> None:
    for what, number in counts.items():
        if number:
            print(printable(f"  {what}: {number:,}"))


def _add_judge(commands: Any) -> None:
    judge = commands.add_parser(
        "judge",
        help="let a model or a person say which of two answers is better",
        description=_filled(
            "Ask judges which of two answers is better, in both orders. A judge is a model of an OpenAI-compatible "
            "server (key: $OPENAI_API_KEY), a person, or `exact`, which knows what the sample images show. "
            "Several calls "
            "add their judges to one FILE. After a stop, the same call continues, and nothing is paid twice. The exit "
            "code is 0 if every question has a final outcome, 1 if the same call can still ask some, 2 for a "
            "wrong call."
        ),
        epilog="examples:\n"
        "  stllava-train judge runs/a/candidates.jsonl --judge gpt-4o --out runs/a/judged.jsonl --dry-run\n"
        "  stllava-train judge runs/a/candidates.jsonl --judge gpt-4o --judge gpt-4.1 --budget 20 \\\n"
        "    --out runs/a/judged.jsonl\n"
        "  stllava-train judge runs/a/candidates.jsonl --judge med@http://127.0.0.1:8000/v1 --out runs/a/judged.jsonl\n"
        "  stllava-train judge runs/a/candidates.jsonl --human ada --sample 200 --out runs/a/judged.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    judge.add_argument("candidates", type=Path, metavar="CANDIDATES", help="what `stllava-train candidates` wrote")
    judge.add_argument("--out", required=True, type=Path, metavar="FILE", help="NAME.jsonl to write or add to")
    judge.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="MODEL[@URL]",
        help="a model and the address of its server (default: https://api.openai.com/v1); or `exact`, for sample "
        "images; may "
        "be given several times",
    )
    judge.add_argument("--human", metavar="NAME", help="a person, you: opens a page on this machine")
    judge.add_argument("--images", type=Path, metavar="DIR", help="folder of the images (default: the candidates')")
    judge.add_argument(
        "--sample", type=int, metavar="N", help="how many of the candidates, sampled by seed 0 (default: all)"
    )
    judge.add_argument(
        "--preset",
        choices=("ours", "authors"),
        default="ours",
        help="authors ask in one order and read the first line alone (default: ours)",
    )
    judge.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="longest reply; questions whose reply was cut at a lower limit are asked again (default: 1024)",
    )
    judge.add_argument(
        "--reasoning",
        action="store_true",
        help="for a judge that thinks: 8,192 tokens more for its thought, and no temperature",
    )
    judge.add_argument(
        "--repeat", type=int, default=1, metavar="N", help="how often each question is asked (default: 1)"
    )
    judge.add_argument("--concurrency", type=int, default=16, metavar="N", help="requests at a time (default: 16)")
    judge.add_argument("--per-minute", type=float, metavar="N", help="requests per minute, at most (default: no limit)")
    judge.add_argument(
        "--retries", type=int, default=5, metavar="N", help="further attempts of a request that fails (default: 5)"
    )
    judge.add_argument(
        "--timeout", type=float, default=120.0, metavar="S", help="seconds that a request may take (default: 120)"
    )
    judge.add_argument(
        "--budget", type=_amount, metavar="USD", help="ceiling on what FILE costs, over all calls (default: none)"
    )
    judge.add_argument(
        "--prices",
        type=Path,
        metavar="FILE",
        help="prices of models, YAML such as `my-judge: {prompt: 2, reply: 8}` in USD per million tokens (default: "
        "prices.yaml of this package)",
    )
    judge.add_argument("--dry-run", action="store_true", help="estimate what it would cost; ask nothing")
    judge.add_argument(
        "--batch", action="store_true", help="use OpenAI's Batch API, at half the price; call again for the replies"
    )
    _add_engine(judge)
    judge.add_argument(
        "--port", type=int, default=8400, metavar="N", help="port of the page for --human (default: 8400)"
    )
    judge.set_defaults(command=_judge)


def _judge(arguments: argparse.Namespace) -> int:
    from stllava_train.asking import speaks_to_the_judge
    from stllava_train.candidates import read_candidates, sampled

    if not arguments.judge and not arguments.human:
        raise InputError("--judge: none is named. Name a model, exact for sample images, or --human NAME.")
    if arguments.engine == "ray" and (arguments.batch or arguments.budget is not None):
        raise InputError("--engine ray: workers know of no budget, and a batch needs none. Leave one of them out.")
    if arguments.repeat < 1:
        raise InputError(f"--repeat {arguments.repeat}: nothing to ask. Give 1 or more.")
    if arguments.max_tokens is not None and not 1 <= arguments.max_tokens < 10**6:
        raise InputError(f"--max-tokens {arguments.max_tokens}: no limit of a reply. Give from 1 to 999,999.")
    manifest = _manifest_of_candidates(arguments.candidates)
    if not manifest["finished"]:
        raise InputError(f"{arguments.candidates}: it is not finished. Call `stllava-train candidates` again.")
    images = arguments.images or Path(manifest["folder"])
    candidates = read_candidates(arguments.candidates)
    if arguments.sample is not None:
        kept = set(sampled([one.id for one in candidates], arguments.sample, 0, "candidates"))
        candidates = [one for one in candidates if one.id in kept]
    spoken = [one.id for one in candidates if speaks_to_the_judge(one)] if arguments.preset == "ours" else []
    if spoken:
        print(f"left out, an answer speaks to its judge: {len(spoken)}: {printable(', '.join(spoken))}")
        candidates = [one for one in candidates if one.id not in set(spoken)]
    all_judged = True
    for name in arguments.judge:
        all_judged &= _judge_by(name, arguments, candidates, images)
    if arguments.human:
        all_judged &= _judge_by_person(arguments, candidates, images)
    return 0 if all_judged else 1


def _judge_by(name: str, arguments: argparse.Namespace, candidates: Sequence[Candidate], images: Path) -> bool:
    """Whether everything has a verdict now."""
    from stllava_eval.server import THOUGHT
    from stllava_train import judge, prices
    from stllava_train.asking import PRESETS, questions
    from stllava_train.exact import EXACT, exact_verdicts, sample_truths
    from stllava_train.verdicts import PERSON

    preset = PRESETS[arguments.preset]
    if arguments.max_tokens is not None:
        preset = replace(preset, max_tokens=arguments.max_tokens)
    if arguments.reasoning:
        preset = replace(preset, thought=THOUGHT)
    asked = questions(candidates, preset.both_orders, arguments.repeat)
    model, _, address = name.partition("@")
    if model.startswith(PERSON) or (model == EXACT and address):
        raise InputError(
            f"--judge {name}: exact has no server, and a name that begins with {PERSON} is a person's: --human NAME."
        )
    price = prices.read_price(model, arguments.prices)
    if arguments.dry_run:
        print(prices.forecast(model, asked, images, price, sum(preset.room)))
        if not arguments.reasoning and model != EXACT:
            print("a model that thinks is billed for its thoughts too: --reasoning adds them to what it costs at most")
        return True
    truths = sample_truths() if model == EXACT else {}
    with judge.open_verdicts(arguments.out, arguments.candidates, arguments.preset) as ledger:
        due = judge.still_due(asked, model, ledger, preset)
        if model == EXACT:
            verdicts: Iterable[Verdict] = exact_verdicts(due, truths)
        else:
            verdicts = _verdicts_of_a_server(model, address, arguments, preset, images, price, due, ledger)
        try:
            counts = judge.judge(ledger, due, verdicts)
        except (InputError, KeyboardInterrupt):  # the file is left as short as it can be, each verdict once
            judge.finish(ledger, candidates, False)
            raise
        missing = len(due) - counts.total()
        failed = len(judge.still_due(asked, model, ledger, preset)) - missing  # or refused, and nothing is scored yet
        judge.finish(ledger, candidates, not missing and not failed, {model: {"failed": failed, "not_asked": missing}})
        rows = [ledger.rows[one.key(model)] for one in due if one.key(model) in ledger.rows]
        spent = prices.spent(ledger.rows.values())
        estimated = sum(row.get("estimated", 0.0) for row in ledger.rows.values())
    print(printable(f"{arguments.out}: {model}: {_counted(counts.total(), 'new verdict')}"))
    _print_outcomes(counts, rows)
    if spent:
        about = f", of which {estimated:.4f} is an estimate (see docs/preferences.md)" if estimated >= 5e-5 else ""
        print(f"  cost of the file: {spent:.4f} USD{about}")
    if missing:
        print(f"  {_why_missing(missing, arguments)}")
    if failed > counts["failed"]:
        print("  nothing is scored: the same call asks again what the server refused, which nobody has paid")
    return not missing and not failed


def _why_missing(missing: int, arguments: argparse.Namespace) -> str:
    """Why so many questions have no verdict after a call that was not stopped, and what to do."""
    if arguments.batch:
        return f"not answered yet: {missing:,}. The same call reads the batch when it is done."
    if arguments.budget is None:
        return f"not asked: {missing:,}. The same call asks them."
    return (
        f"not asked: {missing:,}, because the longest reply to one more could cost more than is left of --budget "
        f"{arguments.budget:g}. Raise it, or lower --max-tokens."
    )


def _verdicts_of_a_server(
    model: str,
    address: str,
    arguments: argparse.Namespace,
    preset: Preset,
    images: Path,
    price: Price | None,
    due: Sequence[Asked],
    ledger: Ledger,
) -> Iterable[Verdict]:
    """The verdicts of a model behind a server, which is not called where nothing is due."""
    from stllava_eval.server import OPENAI, Endpoint
    from stllava_train import judge, prices
    from stllava_train.batches import batches_under_way
    from stllava_train.verdicts import row_of

    file = arguments.out.with_suffix(".batches.json")
    under_way = batches_under_way(file, model)
    if under_way and not arguments.batch:
        raise InputError(
            f"{file}: {under_way[0]} is under way, and its replies are paid. Call with --batch to read it."
        )
    left = None if arguments.budget is None else arguments.budget - prices.spent(ledger.rows.values(), model, price)
    nothing_left = left is not None and left <= 0 and price is not None  # not even for asking what is served
    if not under_way and (nothing_left or not due):
        return []
    how = {
        "base_url": address or OPENAI,
        "model": model,
        "concurrency": arguments.concurrency,
        "retries": arguments.retries,
        "timeout": arguments.timeout,
        "per_minute": arguments.per_minute,
        "greets": not under_way,  # a call that only looks after a batch costs nothing
    }
    if arguments.engine == "ray":
        from stllava_train.cluster import verdicts_by_ray

        return verdicts_by_ray(due, preset, images, price, arguments.workers, how, model, ledger.rows)
    by = judge.EndpointJudge(Endpoint(**how), preset, images, price)

    def mark(verdict: Verdict) -> None:
        ledger.add([row_of(verdict)])

    if arguments.batch:
        return by.batch_verdicts(due, file, ledger.rows, left, mark)
    return by.verdicts(due, left, ledger.rows, mark)


def _print_outcomes(counts: Mapping[str, int], rows: Sequence[Mapping[str, Any]]) -> None:
    """How many have each outcome, and why where nothing is scored."""
    for outcome, number in counts.items():
        print(printable(f"  {outcome}: {number:,}"))
        whys: dict[str, list[str]] = {}
        for row in rows:
            if row["outcome"] == outcome and row["why"]:
                whys.setdefault(row["why"], []).append(row["id"])
        for why, ids in sorted(whys.items(), key=lambda item: -len(item[1]))[:WHYS]:
            once = list(dict.fromkeys(ids))  # a question is asked in two orders
            named = ", ".join(once[:WHYS]) + (", ..." if len(once) > WHYS else "")
            print(printable(f"    {why}: {len(ids):,} ({named})"))


def _judge_by_person(arguments: argparse.Namespace, candidates: Sequence[Candidate], images: Path) -> bool:
    from stllava_train import judge, person
    from stllava_train.asking import questions

    asked = len(questions(candidates, both_orders=False))
    if arguments.dry_run:
        print(printable(f"{arguments.human}: {_counted(asked, 'question')}, on a local page"))
        return True
    with judge.open_verdicts(arguments.out, arguments.candidates, arguments.preset) as ledger:
        done = person.serve(candidates, images, ledger, arguments.human, port=arguments.port)
        left = {f"human:{arguments.human}": {"failed": 0, "not_asked": asked - done}}
        judge.finish(ledger, candidates, done == asked, left)
    print(printable(f"{arguments.out}: human:{arguments.human}: {done:,} of {_counted(asked, 'question')}"))
    return done == asked


def _add_pairs(commands: Any) -> None:
    pairs = commands.add_parser(
        "pairs",
        help="write preference pairs: the chosen and the rejected answer",
        description=_filled(
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
    pairs.set_defaults(command=_pairs)


def _pairs(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from stllava_train.layouts import read_published, source_of
    from stllava_train.pairs import Options, check_options, make_pairs, rule_of, selected, write_pairs

    rule = rule_of(arguments.rule, arguments.min_margin)
    options = Options(
        arguments.per_image, arguments.balance_length, arguments.balance_verdict, arguments.held_out, arguments.seed
    )
    check_options(options)
    ways = [bool(arguments.files), arguments.source is not None, arguments.contrast is not None]
    if sum(ways) != 1 or len(arguments.files) not in (0, 2):
        raise InputError("pass two files, CANDIDATES and JUDGED, or one with --from, or one with --contrast.")
    if (arguments.contrast is None) != (arguments.boxes is None):
        raise InputError(
            "--contrast FILE and --boxes FOLDER go together: the conversations, and where their boxes are."
        )
    images = arguments.images
    if arguments.contrast:
        images = images or arguments.contrast.parent
        kept, source = _contrasted(arguments, images)
    elif arguments.source:
        kept = read_published(arguments.source, images, arguments.allow_test_images)
        source = source_of(arguments.source)
        images_shown = len({pair.image_sha256 for pair in kept.pairs})
        read = f"{_counted(len(kept.pairs), 'pair')} about {_counted(images_shown, 'image')}"
        print(printable(f"{arguments.source}: {read}; {sum(kept.left_out.values()):,} left out"))
    else:
        candidates, verdicts, folder = _judged(*arguments.files)
        images = images or folder
        kept = make_pairs(candidates, verdicts, rule, arguments.judge)
        source = {
            "candidates_sha256": _sha256_of(arguments.files[0]),
            "judged_sha256": _sha256_of(arguments.files[1]),
            "rule": asdict(rule),
            "judges": sorted(set(arguments.judge) or {one.judge for one in verdicts}),
        }
    made = selected(kept, options)
    written = write_pairs(made, arguments.out, source, arguments.format, images)
    print(f"{_counted(len(made.train), 'pair')} to learn from, {len(made.held_out):,} held out")
    listed = kept.left_out if arguments.contrast else {}  # with their ids, above
    _print_counts({f"left out, {why}": number for why, number in made.left_out.items() if why not in listed})
    for file in written:
        print(printable(str(file)))
    return 0


def _contrasted(arguments: argparse.Namespace, images: Path) -> tuple[Kept, dict[str, Any]]:
    """(pairs of one answer about two images, what they are made of); who is left out is printed with their ids."""
    from stllava_train.contrast import contrast_pairs, read_boxes, source_of
    from stllava_train.pairs import Kept, refusal_of_two_images

    if unfit := [format for format in arguments.format if format != "ms-swift"]:
        raise InputError(refusal_of_two_images(unfit[0]))
    _check_data([arguments.contrast], images)
    boxed = read_boxes(arguments.boxes)
    made = contrast_pairs(arguments.contrast, boxed, images, arguments.regions, arguments.allow_test_images)
    for why, ids in made.left_out.items():
        print(printable(f"left out, {why}: {len(ids):,}: {', '.join(ids)}"))
    source = source_of(_sha256_of(arguments.contrast), boxed, arguments.regions)
    return Kept(made.pairs, {why: len(ids) for why, ids in made.left_out.items()}), source


def _judged(candidates: Path, judged: Path) -> tuple[list[Candidate], list[Verdict], Path]:
    """(candidates, verdicts on them, folder of their images).

    Raises:
        InputError: The verdicts are on other candidates.
    """
    from stllava_train.candidates import read_candidates
    from stllava_train.ledger import read_manifest
    from stllava_train.verdicts import read_verdicts

    manifest, judging = _manifest_of_candidates(candidates), read_manifest(judged)
    sha256, of = _sha256_of(candidates), judging.get("candidates") or {}
    if of.get("sha256") != sha256:
        raise InputError(f"{judged}: it judges {of.get('file')} as it was, not {candidates}. Pass what was judged.")
    if not judging.get("finished"):
        print(printable(f"{judged}: not everything in it is judged"), file=sys.stderr)
    return read_candidates(candidates), read_verdicts(judged), Path(manifest["folder"])


def _manifest_of_candidates(file: Path) -> dict[str, Any]:
    """The manifest.

    Raises:
        InputError: It is missing, or of another stage.
    """
    from stllava_train.ledger import read_manifest

    if not file.is_file():
        raise InputError(f"{file}: no such file. Pass what `stllava-train candidates` wrote.")
    manifest = read_manifest(file)
    if manifest.get("stage") != "candidates":
        raise InputError(f"{file}: of stage {manifest.get('stage')}. Pass what `stllava-train candidates` wrote.")
    return {"finished": False, "folder": "."} | manifest


def _sha256_of(file: Path) -> str:
    import hashlib

    try:
        return hashlib.sha256(read_bytes(file)).hexdigest()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}). Pass another file.") from error


def _add_audit(commands: Any) -> None:
    audit = commands.add_parser(
        "audit",
        help="look at judges and data: a page and its figures",
        description=_filled(
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
    audit.add_argument("--examples", type=_count, default=24, metavar="N", help="pairs to look at (default: 24)")
    audit.set_defaults(command=_audit)


def _audit(arguments: argparse.Namespace) -> int:
    from stllava_train.audit import audit, examples, read_references, write_page
    from stllava_train.ledger import read_rows
    from stllava_train.verdicts import Rule

    candidates, verdicts, folder = _judged(arguments.candidates, arguments.judged)
    images = arguments.images or folder
    references = read_references(arguments.references, candidates) if arguments.references else None
    blind = None
    if arguments.checkpoint:
        from stllava_eval.answering import Answerer
        from stllava_train.candidates import blind_answers

        blind = blind_answers(Answerer(arguments.checkpoint), candidates)
    judges, rows = arguments.judge, read_rows(arguments.candidates)
    if strangers := sorted({*judges} - {one.judge for one in verdicts}):
        raise InputError(
            f"--judge {strangers[0]}: no verdict is its. Name one whose verdicts {arguments.judged} holds."
        )
    figures = audit(candidates, verdicts, images, Rule(), references, rows=rows, judges=judges, blind=blind)
    shown = examples(candidates, verdicts, images, Rule(), arguments.examples, judges=judges)
    write_page(figures, shown, arguments.out)
    print(printable(f"{arguments.out / 'audit.html'}"))
    return 0


def _add_dpo(commands: Any) -> None:
    dpo = commands.add_parser(
        "dpo",
        help="stage 2: learn to prefer the chosen answers",
        description=_filled(
            "Train a checkpoint on preference pairs, by a recipe. RUN becomes a checkpoint that the harness evaluates, "
            "with the losses of every step, their curves and a model card. Under torchrun or accelerate launch "
            "it trains "
            "on several devices, on the same batches."
        ),
        epilog="examples:\n"
        "  stllava-train dpo --recipe tiny --pairs runs/a/pairs.jsonl --images data/images --out runs/a/dpo \\\n"
        "    --dry-run start=runs/stage1\n"
        "  stllava-train dpo --recipe stllava-med-7b --pairs runs/b/pairs.jsonl --images images --out runs/b/dpo \\\n"
        "    start=runs/stage1-7b beta=0.3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    dpo.add_argument(
        "--recipe", required=True, metavar="R", help="a YAML file, or the name of a recipe in docs/train.md"
    )
    dpo.add_argument(
        "--pairs",
        required=True,
        type=Path,
        metavar="FILE",
        help="pairs that `stllava-train pairs` wrote, or a file in a layout that `pairs --from` reads",
    )
    dpo.add_argument("--images", required=True, type=Path, metavar="DIR", help="folder of the pairs' images")
    dpo.add_argument("--out", required=True, type=Path, metavar="RUN", help="folder to write")
    _add_training(dpo)
    dpo.set_defaults(command=_dpo)


def _add_all(commands: Any) -> None:
    every = commands.add_parser(
        "all",
        help="run both stages, the steps between them, and evaluations",
        description=_filled(
            "Run stage 1, candidates, judges, pairs, stage 2 and evaluations, one after the other, by a recipe. "
            "A stage "
            "is skipped if it is done and its inputs have not changed; after a stop, the same call continues. It ends "
            "with the scores and with tests of what stage 2 has changed."
        ),
        epilog="examples:\n"
        "  stllava-train all --recipe tiny --data data/vqarad.json --data data/slake.json --images data/images \\\n"
        "    --out runs/a sft.start=checkpoints/tiny-start\n"
        "  stllava-train all --recipe tiny --data data/vqarad.json --images data/images --out runs/b \\\n"
        "    rounds=2 dpo.beta=0.3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    every.add_argument(
        "--recipe", required=True, metavar="R", help="a YAML file, or the name of a recipe in docs/train.md"
    )
    every.add_argument(
        "--data",
        required=True,
        action="append",
        type=Path,
        metavar="FILE",
        help="conversations for stage 1, in the folder that their images are relative to; may be given several times",
    )
    every.add_argument("--images", required=True, type=Path, metavar="DIR", help="folder of the images to ask about")
    every.add_argument("--out", required=True, type=Path, metavar="RUN", help="folder to write")
    every.add_argument("--default", action="store_true", help="make the last checkpoint the default of the harness")
    every.add_argument(
        "changes",
        nargs="*",
        metavar="key=value",
        help="changes of the recipe, such as rounds=2; sft.KEY, candidates.KEY and dpo.KEY change that stage",
    )
    every.set_defaults(command=_all)


def _all(arguments: argparse.Namespace) -> int:
    _let_threads_wait()
    from stllava_train.pipeline import Pipeline, summary

    if not arguments.images.is_dir():
        raise InputError(f"--images {arguments.images}: no such folder. Pass the one of the images to ask about.")
    _check_data(arguments.data, None)
    pipeline = Pipeline(arguments.recipe, arguments.changes, arguments.data, arguments.images, arguments.out, call=main)
    if code := pipeline.run():
        return code
    rounds = pipeline.recipe.rounds
    if arguments.default:
        from stllava_eval.answering import record_default_checkpoint

        record_default_checkpoint(arguments.out / f"round-{rounds}" / "dpo")
    print(f"\n{summary(arguments.out, rounds)}")
    return 0


def _add_training(command: Any) -> None:
    """What both stages have."""
    command.add_argument("--resume", action="store_true", help="resume the interrupted run in RUN")
    command.add_argument(
        "--allow-test-images",
        action="store_true",
        help="train on images of prepared test splits too; the run's manifest and card count them (default: refused)",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="print tokens, steps, parameters and memory; train nothing"
    )
    command.add_argument("--default", action="store_true", help="make RUN the default checkpoint of the harness")
    command.add_argument("--wandb", action="store_true", help="report to Weights & Biases as well as to TensorBoard")
    command.add_argument("changes", nargs="*", metavar="key=value", help="changes of the recipe, such as epochs=3")


def _dpo(arguments: argparse.Namespace) -> int:
    _let_threads_wait()
    from stllava_train.recipe import read_dpo_recipe

    recipe = read_dpo_recipe(arguments.recipe, arguments.changes)
    from stllava_train import dpo

    if not arguments.images.is_dir():
        raise InputError(f"--images {arguments.images}: no such folder. Pass the one the pairs were made of.")
    return _train(arguments, dpo, recipe, arguments.pairs)


def _train(arguments: argparse.Namespace, stage: Any, recipe: Any, data: Any) -> int:
    """`stage`: `sft` or `dpo`, the module."""
    from stllava_train.training import check_folder, first_process

    if not arguments.dry_run:
        check_folder(arguments.out, arguments.resume)
    work = stage.open_work(recipe, data, arguments.images, arguments.allow_test_images)
    if arguments.dry_run:
        print(stage.report(work))
        return 0
    stage.train(work, arguments.out, arguments.resume, wandb=arguments.wandb)
    if first_process():
        if arguments.default:
            from stllava_eval.answering import record_default_checkpoint

            record_default_checkpoint(arguments.out)
        beside = "losses.jsonl, curves.png, tensorboard and README.md are in it too"
        print(printable(f"{arguments.out}: the checkpoint was written; {beside}"))
        for line in kept_step(arguments.out):
            print(printable(f"{arguments.out}: {line}"))
        if lost := left_out_by_peft(arguments.out):
            print(
                printable(
                    f"{arguments.out}: plain PEFT and transformers leave out {lost}, and say nothing. For them, write "
                    f"one whole checkpoint: stllava-train merge {shlex.quote(str(arguments.out))} --out DIR"
                )
            )
    return 0


def _add_merge(commands: Any) -> None:
    merge = commands.add_parser(
        "merge",
        help="write a run's adapter and its base as one whole checkpoint",
        description=_filled(
            "Merge the LoRA of RUN into the checkpoint that it builds on, in float32, and write the whole network as a "
            "folder that from_pretrained, this harness and stage 2 read."
        ),
        epilog="examples:\n  stllava-train merge runs/stage1 --out checkpoints/stage1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    merge.add_argument("run", metavar="RUN", help="folder of a training run, or any adapter that the harness loads")
    merge.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    merge.set_defaults(command=_merge)


def _add_card(commands: Any) -> None:
    card = commands.add_parser(
        "card",
        help="write a run's model card again, with scores",
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
    from stllava_train import sft

    _check_data(arguments.data, arguments.images)
    return _train(arguments, sft, recipe, arguments.data)


def _merge(arguments: argparse.Namespace) -> int:
    from stllava_eval.network.checkpoint import open_checkpoint
    from stllava_eval.network.convert import convert

    convert(open_checkpoint(arguments.run), arguments.out)
    print(printable(f"{arguments.out}: one whole checkpoint was written"))
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
        description=_filled(
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
    from stllava_train.check import KINDS, MAX_TOKENS, is_pairs, pair_problems, problems, write_sound
    from stllava_train.layouts import refuse_other_pairs

    files, images, out = arguments.data, arguments.images, arguments.write
    _check_data(files, images)
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
        records = len({problem.place for problem in every})
        kinds = Counter(problem.kind for problem in every)
        counts = ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS if kinds[kind])
        print(f"{_counted(len(every), 'problem')} in {_counted(records, 'record')}: {counts}")
    else:
        print("no problem was found", file=sys.stderr)
    if out:
        print(printable(f"{out}: {_counted(write_sound(files, every, out), 'record')}"))
    return 1 if every else 0


def _check_data(files: Sequence[Path], images: Path | None) -> None:
    if len({file.resolve() for file in files}) < len(files):
        raise InputError("a data file comes twice. Name each once.")
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
