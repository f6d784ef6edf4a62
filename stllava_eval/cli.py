"""The command line of stllava-eval. Heavy imports sit inside commands: help is instant."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from stllava_eval import __version__
from stllava_eval.errors import InputError, of_the_disk, printable

DATASETS = ("vqarad", "slake", "pathvqa")
TASKS = (
    *(name + prompt for name in DATASETS for prompt in ("", "_short", "_options")),
    *("vqarad_options_llavamed", "medvqa"),
)
PROMPTS = ("bare", "short", "options", "options_llavamed")
IMAGES = ("own", "other", "black")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0 done, 1 the gate said no, 2 wrong call, or the gate cannot decide."""
    arguments = parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter is shown its number
    try:
        return arguments.command(arguments) or 0
    except InputError as error:
        _tell(str(error))
        return 2
    except OSError as error:
        if not (line := of_the_disk(error)):
            raise
        _tell(line)
        return 2
    except KeyboardInterrupt:
        return 130  # as a shell has it; what a run has answered is kept


def _tell(text: str) -> None:
    """Print a line to stderr, if anybody can read it."""
    try:
        print(printable(f"stllava-eval: {text}"), file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _show(text: str) -> None:
    """Print a command's result. A reader that has left, such as `head`, changes nothing about the command's exit code.

    Raises:
        InputError: It cannot be written.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise InputError(
            f"stdout: cannot be written ({error.strerror}). Free some space, or write elsewhere."
        ) from error


def _show_json(value: object) -> None:
    """As `_show`; raises what it raises."""
    _show(json.dumps(value, indent=1, ensure_ascii=False))


def parser() -> argparse.ArgumentParser:
    """The command line, whose help `docs/cli.md` repeats."""
    top = _command(
        argparse.ArgumentParser,
        prog="stllava-eval",
        description="Evaluate medical vision-language models. Research only; not for clinical use.",
        examples=["stllava-eval prepare --sample", "stllava-eval run --tasks vqarad", "stllava-eval leaderboard"],
    )
    top.add_argument("--version", action="version", version=f"stllava-med {__version__}")
    commands = top.add_subparsers(dest="name", required=True, metavar="COMMAND")

    prepare = _command(
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

    run = _command(
        commands.add_parser,
        name="run",
        help="answer and score the tasks with a checkpoint, through lmms-eval",
        description="Answer and score the tasks with a checkpoint. The same as `lmms-eval --model stllava_med`, "
        "with wrong input refused before any work and the run folder where you want it.",
        examples=[
            "stllava-eval run --tasks vqarad,slake",
            "stllava-eval run --tasks medvqa --checkpoint llava-hf/llava-1.5-7b-hf --out runs/llava",
        ],
    )
    run.add_argument(
        "--tasks", default=",".join(DATASETS), help=f"comma-separated, of {', '.join(TASKS)} (default: %(default)s)"
    )
    run.add_argument("--checkpoint", metavar="DIR_OR_HUB_ID", help="what to evaluate (default: see docs/cli.md)")
    run.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: a new one under $STLLAVA_HOME/runs)")
    run.add_argument(
        "--batch-size", type=int, metavar="N", help="questions at a time, at most (default: what the memory holds)"
    )
    run.add_argument("--limit", type=int, metavar="N", help="first N questions of each task (default: all)")
    run.add_argument(
        "--images",
        choices=IMAGES,
        default="own",
        help="show each question its own image, another question's, or a black one (default: own)",
    )
    run.set_defaults(command=_run)

    score = _command(
        commands.add_parser,
        name="score",
        help="score a file of answers, without a model",
        description="Score a file of answers (JSON lines, a JSON array, CSV, TSV, Parquet, xlsx) against the prepared "
        "test split. A row has id and answer, or question_id and text (LLaVA family), or another known field of the "
        "answer; lmms-eval's samples are read too. Ids are the data set's own, and a question, reference or image in a "
        "row must match its id. MedEvalKit's and VLMEvalKit's files have no ids and are read by question and "
        "reference (docs/answer-files.md).",
        examples=[
            "stllava-eval score --task vqarad --answers runs/a/answers.jsonl",
            "stllava-eval score --task slake --answers samples_slake.jsonl --json",
            "stllava-eval score --task vqarad --answers a.jsonl --task slake --answers b.jsonl --out runs/medvint",
        ],
    )
    score.add_argument(
        "--task",
        required=True,
        action="append",
        choices=TASKS[:-1],
        metavar="TASK",
        help="the task that was answered; may be given several times, each with a file of answers",
    )
    score.add_argument("--answers", required=True, action="append", type=Path, metavar="FILE", help="file of answers")
    score.add_argument(
        "--extract",
        choices=("final", "none"),
        help="take the final answer out of each reply (thoughts, tags, boxes, ...; docs/answers.md), or score replies "
        "as they are (default: final; of a run folder's answers, what the run did)",
    )
    score.add_argument(
        "--answer-field",
        metavar="NAME",
        help="field with the model's answer (default: the only one that can be meant)",
    )
    score.add_argument(
        "--id-field", metavar="NAME", help="field with the question's id (default: id, question_id, qid)"
    )
    score.add_argument(
        "--ignore-unknown",
        action="store_true",
        help="leave out rows whose question the split does not have (default: refuse them)",
    )
    score.add_argument(
        "--split",
        default="test",
        help="the prepared split that was asked; test@NAME is an edition that is not in use (default: test)",
    )
    score.add_argument(
        "--prompt",
        choices=PROMPTS,
        help="prompt that was asked, for the signature (default: what the file or the task's name says, else "
        '"not recorded")',
    )
    score.add_argument(
        "--images",
        choices=IMAGES,
        help="images that were shown: own, another question's, black (default: what a run folder says, else "
        '"not recorded")',
    )
    score.add_argument(
        "--out", type=Path, metavar="RUN", help="write a run folder too, for leaderboard, compare, inspect and gate"
    )
    score.add_argument(
        "--system",
        metavar="NAME",
        help="the system that gave the answers, as boards name it (default: the file's name)",
    )
    score.add_argument(
        "--details",
        action="store_true",
        help="print the scores of every category too (default: those over all questions)",
    )
    score.add_argument(
        "--json", action="store_true", help="print value, n, images, low and high of every score as JSON"
    )
    score.set_defaults(command=_score)

    board = _command(
        commands.add_parser,
        name="leaderboard",
        help="the scores of runs beside reported and image-blind ones; with --out as files and a page",
        description="Print the scores of run folders beside reported ones and beside answers that never look at an "
        "image: constants, the commonest training words, the commonest training answer to each question, and runs that "
        "were shown black or other images. Intervals are 95 %, clustered by image.",
        examples=[
            "stllava-eval leaderboard runs/a runs/b",
            "stllava-eval leaderboard runs/a runs/b --published --out board",
            "stllava-eval leaderboard --tasks vqarad,slake",
            "stllava-eval leaderboard runs/a --published --rows 'measured,Table 2' --no-blind --out board",
        ],
    )
    board.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders (default: image-blind rows only)")
    board.add_argument("--tasks", help="comma-separated (default: those of the runs, else all that are prepared)")
    board.add_argument(
        "--published", action="store_true", help="also show what papers report on the official test splits"
    )
    board.add_argument(
        "--rows",
        action="append",
        metavar="NAMES",
        help="systems, groups or reported tables to show, comma-separated; may be given several times (default: all)",
    )
    board.add_argument(
        "--columns",
        metavar="NAMES",
        help="scores to show, except on the page, comma-separated; LaTeX then has one table (default: differs)",
    )
    board.add_argument("--no-blind", action="store_true", help="leave out the image-blind rows")
    board.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write board.md, .csv, .json, .tex, the .bib that it cites and the page index.html there",
    )
    board.add_argument("--intervals", action="store_true", help="also show 95 %% intervals in board.tex")
    _page_options(board)
    board.add_argument("--json", action="store_true", help="print every number as JSON")
    board.set_defaults(command=_leaderboard)

    compare = _command(
        commands.add_parser,
        name="compare",
        help="test whether runs differ from the first",
        description="Print by how much later runs' scores differ from the first's on the same questions, with 95 % "
        "intervals and tests, both clustered by image, the latter adjusted for their number. Runs on another split, "
        "other questions, image files or prompts are refused; other settings that differ are listed.",
        examples=[
            "stllava-eval compare runs/stage1 runs/dpo",
            "stllava-eval compare runs/llava runs/stage1 runs/dpo --json",
            "stllava-eval compare runs/stage1 --power",
        ],
    )
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders; the first is the baseline")
    compare.add_argument(
        "--power", action="store_true", help="print what difference these questions can show instead; one run is enough"
    )
    compare.add_argument("--json", action="store_true", help="print every number as JSON")
    compare.set_defaults(command=_compare)

    inspect = _command(
        commands.add_parser,
        name="inspect",
        help="show where runs err: by category, between paraphrases and opposites, beside answers without an image",
        description="Print a run's scores by category (the data set's own, and what is asked by declared rules: "
        "negation, laterality, counting, size, modality, plane), how far answers to paraphrases and to opposite "
        "questions fit each other, and how much of each score is reached without the image.",
        examples=[
            "stllava-eval inspect runs/dpo",
            "stllava-eval inspect runs/dpo runs/dpo-other-images --out why",
        ],
    )
    inspect.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run folders; those of other or black images are set beside them",
    )
    inspect.add_argument(
        "--out", type=Path, metavar="DIR", help="write the leaderboard's files and page of these runs there"
    )
    _page_options(inspect)
    inspect.add_argument("--json", action="store_true", help="print every number as JSON")
    inspect.set_defaults(command=_inspect)

    gate = _command(
        commands.add_parser,
        name="gate",
        help="say whether a candidate may take a baseline's place: exit code 0 pass, 1 fail, 2 cannot decide",
        description="Test a candidate's run against a baseline's on the same questions: no score may have lost more "
        "than its margin, no guard may have drifted. Exit code 0: pass; 1: fail; 2: cannot decide, since the runs "
        "cannot be compared or the questions are too few; it says how many are needed.",
        examples=[
            "stllava-eval gate runs/candidate --baseline runs/main",
            "stllava-eval gate runs/candidate --baseline runs/main --policy gate.yaml --out report",
        ],
    )
    gate.add_argument("candidate", type=Path, metavar="CANDIDATE", help="run folder")
    gate.add_argument("--baseline", required=True, type=Path, metavar="RUN", help="run folder to compare it with")
    gate.add_argument(
        "--policy", type=Path, metavar="FILE", help="YAML file of margins and guards (default: see docs/gate.md)"
    )
    gate.add_argument("--out", type=Path, metavar="DIR", help="write gate.json, gate.md and gate.xml (JUnit) there")
    gate.set_defaults(command=_gate)

    convert = _command(
        commands.add_parser,
        name="convert",
        help="write a checkpoint of any published layout as one folder that from_pretrained reads",
        description="Write a checkpoint of any published layout as one folder that from_pretrained reads, with "
        "audit.json beside the weights: every tensor of the source is used or on a named list, every parameter of the "
        "network is filled, or nothing is written.",
        examples=[
            "stllava-eval convert ZachSun/stllava-med-7b --out checkpoints/stllava-med-7b",
            "stllava-eval convert runs/stage1 --out checkpoints/stage1 --base checkpoints/llm",
            "stllava-eval convert llm --vision-tower vit --projector mm_projector.bin --out checkpoints/parts",
            "stllava-eval convert liuhaotian/llava-v1.5-7b --to llava-hf --out checkpoints/for-vllm",
        ],
    )
    convert.add_argument(
        "source", metavar="SOURCE", help="folder or hub id: a model, an adapter, or a projector with its config.json"
    )
    convert.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    convert.add_argument("--base", metavar="SOURCE", help="what an adapter builds on (default: what it names itself)")
    convert.add_argument(
        "--vision-tower", metavar="SOURCE", help="vision tower; wins over one in the weights (default: see config.json)"
    )
    convert.add_argument("--projector", metavar="FILE", help="mm_projector.bin; wins over one in the weights")
    convert.add_argument("--vision-lora", metavar="DIR", help="LoRA of the vision tower (default: Vit-lora in SOURCE)")
    convert.add_argument(
        "--prototypes", type=int, metavar="N", help="centres of the authors' prototype extractor (default: 256)"
    )
    convert.add_argument("--iterations", type=int, metavar="N", help="updates of its centres (default: 2)")
    convert.add_argument(
        "--to",
        choices=("stllava-med", "llava-hf"),
        default="stllava-med",
        help="layout to write; llava-hf, for servers, has no prototype extractor (default: stllava-med)",
    )
    convert.set_defaults(command=_convert)
    return top


def _command(make: type | object, examples: Sequence[str], **options: str) -> argparse.ArgumentParser:
    epilog = "examples:\n" + "\n".join(f"  {example}" for example in examples)
    name = [options.pop("name")] if "name" in options else []
    options["description"] = textwrap.fill(options["description"], 90)
    return make(*name, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, **options)  # type: ignore


def _prepare(arguments: argparse.Namespace) -> int:
    from stllava_eval import datasets

    if arguments.sample:
        if arguments.source:
            raise InputError("--sample makes its own images; leave --from out.")
        from stllava_eval.sample import SPLITS, sample_rows

        manifests = [
            datasets.write_split(
                name,
                split,
                sample_rows(name, split),
                edition=f"sample {split}",
                official=False,
                sample=True,
                source="images in installed packages",
                licence="each image's own: docs/data.md",
            )
            for name in ([arguments.dataset] if arguments.dataset else DATASETS)
            for split in SPLITS
        ]
    elif not arguments.dataset:
        raise InputError(f"no data set named. Pass one of {', '.join(DATASETS)}, or --sample.")
    else:
        manifests = [datasets.prepare(arguments.dataset, arguments.split, arguments.source)]
    for manifest in manifests:
        counts, what = manifest.counts, f"{manifest.dataset} {manifest.split}"
        _show(
            f"{what} ({manifest.edition}): {counts['rows']} questions = "
            f"{counts['closed']} closed + {counts['open']} open on {counts['images']} images"
        )
        for note in manifest.notes:
            _tell(f"{what}: note: {note}")
        for other in datasets.prepared_editions(manifest.dataset, manifest.split)[1:]:
            _tell(
                f"{what}: the {other.edition} is kept beside it; {datasets.how_to_use(other)} takes it into use again"
            )
    return 0


def _run(arguments: argparse.Namespace) -> int:
    tasks = arguments.tasks.split(",")
    if unknown := [task for task in tasks if task not in TASKS]:
        raise InputError(f"--tasks {', '.join(unknown)}: unknown. Tasks are {', '.join(TASKS)}.")
    if any(given is not None and given < 1 for given in (arguments.batch_size, arguments.limit)):
        raise InputError("--batch-size and --limit are whole numbers from 1 on.")
    if len(set(tasks)) < len(tasks):
        raise InputError(f"--tasks {arguments.tasks}: a task comes twice. Name each once.")
    if arguments.out is not None:
        os.environ["STLLAVA_RUN"] = str(arguments.out)
    from stllava_eval.answering import default_checkpoint
    from stllava_eval.hub import local_folder, refuse_no_checkpoint
    from stllava_eval.runs import dataset_of, refuse_old_folder

    refuse_old_folder()
    checkpoint = arguments.checkpoint or default_checkpoint()
    refuse_no_checkpoint(local_folder(checkpoint), checkpoint)  # before the seconds that torch and transformers take

    from stllava_eval.datasets import prepare_on_first_use
    from stllava_eval.network.checkpoint import open_checkpoint
    from stllava_eval.other import is_other

    if not is_other(checkpoint):
        open_checkpoint(checkpoint).processor()
    os.environ["STLLAVA_CHECKPOINT"] = checkpoint  # not in --model_args, which splits a path at its commas
    for name in DATASETS if "medvqa" in tasks else dict.fromkeys(map(dataset_of, tasks)):
        prepare_on_first_use(name, "test")

    from lmms_eval.__main__ import cli_evaluate

    sys.argv = [
        *("lmms-eval", "--model", "stllava_med", "--tasks", arguments.tasks),
        *("--model_args", f"images={arguments.images}"),
        *(("--batch_size", str(arguments.batch_size)) if arguments.batch_size else ()),
        *(("--limit", str(arguments.limit)) if arguments.limit else ()),
    ]
    cli_evaluate()
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from stllava_eval.answer_files import Reading, read_answers
    from stllava_eval.leaderboard import score_text
    from stllava_eval.runs import score_table, some, write_answers

    tasks, given = arguments.task, arguments.answers
    if len(tasks) != len(given) or len(set(tasks)) < len(tasks):
        raise InputError(
            f"{len(tasks)} --task and {len(given)} --answers: name each task once, with its file of answers behind it."
        )
    if arguments.system and arguments.out is None:
        raise InputError("--system names a run folder's system. Pass --out too, or leave it out.")
    if arguments.out is not None and arguments.split != "test":
        raise InputError(f"--out with --split {arguments.split}: a run folder is of the test split. Leave --out out.")
    if arguments.prompt and all("_" in task for task in tasks):
        raise InputError(
            f"--prompt {arguments.prompt}: {', '.join(tasks)} is asked with the prompt in its name. Leave it out, or "
            "name another task."
        )
    files = dict(zip(tasks, given, strict=True))
    reading = Reading(**{one.name: getattr(arguments, one.name) for one in fields(Reading)})
    answers = {task: read_answers(file, task, reading) for task, file in files.items()}
    scored = {
        task: score_table(task, of.replies, of.prompt, of.settings, arguments.split) for task, of in answers.items()
    }
    for task, of in scored.items():
        if left_out := answers[task].left_out:
            _tell(f"{task}: {left_out} rows whose questions the split does not have are left out")
        if of.unanswered:
            _tell(f"{task}: {len(of.unanswered)} questions have no answer and are in no mean: {some(of.unanswered)}")
        if of.doubts and arguments.out is None:  # a run folder that is written says so by itself
            _tell(f"{task}: {of.doubts}")
    if arguments.out is not None:
        folder = write_answers(arguments.out, arguments.system, answers, files)
        _tell(f"run folder: {folder}")
    if arguments.json:
        rows = [asdict(row) for of in scored.values() for row in of.rows]
        unanswered = {task: of.unanswered for task, of in scored.items()}
        _show_json({"format": 1, "scores": rows, "unanswered": unanswered})
    else:
        _show("\n\n".join(score_text(of, arguments.details) for of in scored.values()))
    return 0


def _page_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--images",
        choices=("page", "folder", "none"),
        help="thumbnails inside index.html, in a folder beside it, or none (default: page)",
    )
    command.add_argument(
        "--pathvqa-images",
        action="store_true",
        help="show PathVQA's images too; they belong to publishers, so keep such a page to yourself",
    )


def _refuse_without_out(arguments: argparse.Namespace) -> None:
    if arguments.out is None and (arguments.images is not None or arguments.pathvqa_images):
        raise InputError("--images and --pathvqa-images are about the page. Pass --out DIR too, or leave them out.")


def _leaderboard(arguments: argparse.Namespace) -> int:
    from stllava_eval.leaderboard import board, board_json, board_text, read_columns

    tasks = arguments.tasks.split(",") if arguments.tasks else None
    if tasks and (unknown := [task for task in tasks if task not in TASKS[:-1]]):
        raise InputError(f"--tasks {', '.join(unknown)}: unknown. Tasks are {', '.join(TASKS[:-1])}.")
    _refuse_without_out(arguments)
    if arguments.out is None and arguments.intervals:
        raise InputError("--intervals is about board.tex. Pass --out DIR too, or leave it out.")
    columns = read_columns(arguments.columns)
    progress = len(arguments.runs) > 4 and sys.stderr.isatty()
    rows = board(arguments.runs, tasks, arguments.published, progress, arguments.rows, not arguments.no_blind)
    if arguments.out is not None:
        from stllava_eval.page import write_board

        images, pathvqa_images = arguments.images or "page", arguments.pathvqa_images
        write_board(arguments.out, rows, images, pathvqa_images, columns, arguments.intervals)
    if arguments.json:
        _show_json(board_json(rows, columns))
    else:
        _show(board_text(rows, columns))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from stllava_eval.compare import compare, compare_text, power, power_text

    if arguments.power:
        powers = power(arguments.runs)
        shown, text = {"format": 1, "power": [asdict(one) for one in powers]}, power_text(powers)
    else:
        found = compare(arguments.runs)
        shown, text = {"format": 1, **asdict(found)}, compare_text(found)
    if arguments.json:
        _show_json(shown)
    else:
        _show(text)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from stllava_eval.inspection import inspect, inspect_text
    from stllava_eval.leaderboard import board

    _refuse_without_out(arguments)
    rows = board(arguments.runs)
    found = inspect(rows)
    if not found:
        raise InputError(f"{arguments.runs[0]}: no run here was shown its own images. Pass one that was.")
    if not any(one.overall for one in found):
        raise InputError(f"{arguments.runs[0]}: none of its questions is answered. Look at its log, and run again.")
    if arguments.out is not None:
        from stllava_eval.page import write_board

        write_board(arguments.out, rows, arguments.images or "page", arguments.pathvqa_images)
    if arguments.json:
        _show_json([asdict(one) for one in found])
    else:
        _show(inspect_text(found))
    return 0


def _gate(arguments: argparse.Namespace) -> int:
    from stllava_eval.gate import gate, gate_json, gate_junit, gate_markdown, gate_text, read_policy
    from stllava_eval.home import json_text, refuse_file, write_together

    if arguments.out is not None:
        refuse_file(arguments.out, "--out")
    found = gate(arguments.candidate, arguments.baseline, read_policy(arguments.policy))
    if arguments.out is not None:
        files = {"json": json_text(gate_json(found)), "md": gate_markdown(found), "xml": gate_junit(found)}
        write_together(arguments.out, {f"gate.{suffix}": text for suffix, text in files.items()})
    _show(gate_text(found))
    return found.exit_code


def _convert(arguments: argparse.Namespace) -> int:
    from stllava_eval.home import write_json
    from stllava_eval.network.checkpoint import CheckpointError, open_checkpoint
    from stllava_eval.network.convert import convert

    parts = {
        name: getattr(arguments, name)
        for name in ("base", "vision_tower", "projector", "vision_lora", "prototypes", "iterations")
    }
    try:
        checkpoint = open_checkpoint(arguments.source, **parts)
    except CheckpointError as error:
        listed = arguments.out.with_name(f"{arguments.out.name}.refused.json")
        write_json(listed, error.report)
        raise InputError(f"{error} All of them are listed in {listed}.") from error
    convert(checkpoint, arguments.out, arguments.to)
    dropped = sum(map(len, checkpoint.audit.dropped.values()))
    merged = sum(checkpoint.audit.merged.values())
    _show(
        f"{arguments.out}: {checkpoint.layout}, {len(checkpoint.taken)} tensors, all that the network has; "
        f"LoRA merged into {merged}, {dropped} left out as named in audit.json"
    )
    if checkpoint.assumed:
        numbers = ", ".join(f"{number} {name}" for name, number in checkpoint.assumed.items())
        _show(f"note: {numbers}, which the files do not store, as in the authors' code; --prototypes and --iterations")
    if checkpoint.tokenizer is None:
        _show(
            f"note: {arguments.source} has no tokenizer (tokenizer.model or tokenizer.json), and so {arguments.out} "
            "cannot answer; copy that of the model it was trained from into either"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
