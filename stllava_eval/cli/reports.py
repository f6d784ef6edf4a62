"""`stllava-eval leaderboard`, `compare`, `inspect` and `gate`: report on runs."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stllava_eval.cli.options import (
    TASKS,
    add_command,
    add_page_options,
    refuse_without_out,
    show,
    show_json,
)
from stllava_eval.errors import InputError


def add_leaderboard(commands: Any) -> None:
    """Add `stllava-eval leaderboard` to the commands."""
    board = add_command(
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
    add_page_options(board)
    board.add_argument("--json", action="store_true", help="print every number as JSON")
    board.set_defaults(command=_leaderboard)


def _leaderboard(arguments: argparse.Namespace) -> int:
    from stllava_eval.reports.board_formats import board_json, board_text, read_columns
    from stllava_eval.reports.board_rows import board

    tasks = arguments.tasks.split(",") if arguments.tasks else None
    if tasks and (unknown := [task for task in tasks if task not in TASKS[:-1]]):
        raise InputError(f"--tasks {', '.join(unknown)}: unknown. Tasks are {', '.join(TASKS[:-1])}.")
    refuse_without_out(arguments)
    if arguments.out is None and arguments.intervals:
        raise InputError("--intervals is about board.tex. Pass --out DIR too, or leave it out.")
    columns = read_columns(arguments.columns)
    progress = len(arguments.runs) > 4 and sys.stderr.isatty()
    rows = board(arguments.runs, tasks, arguments.published, progress, arguments.rows, not arguments.no_blind)
    if arguments.out is not None:
        from stllava_eval.reports.page import write_board

        images, pathvqa_images = arguments.images or "page", arguments.pathvqa_images
        write_board(arguments.out, rows, images, pathvqa_images, columns, arguments.intervals)
    if arguments.json:
        show_json(board_json(rows, columns))
    else:
        show(board_text(rows, columns))
    return 0


def add_compare(commands: Any) -> None:
    """Add `stllava-eval compare` to the commands."""
    compare = add_command(
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


def _compare(arguments: argparse.Namespace) -> int:
    from stllava_eval.reports.compare import compare, compare_text, power, power_text

    if arguments.power:
        powers = power(arguments.runs)
        shown, text = {"format": 1, "power": [asdict(of_metric) for of_metric in powers]}, power_text(powers)
    else:
        comparison = compare(arguments.runs)
        shown, text = {"format": 1, **asdict(comparison)}, compare_text(comparison)
    if arguments.json:
        show_json(shown)
    else:
        show(text)
    return 0


def add_inspect(commands: Any) -> None:
    """Add `stllava-eval inspect` to the commands."""
    inspect = add_command(
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
    add_page_options(inspect)
    inspect.add_argument("--json", action="store_true", help="print every number as JSON")
    inspect.set_defaults(command=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    from stllava_eval.reports.board_rows import board
    from stllava_eval.reports.inspect_run import inspect, inspect_text

    refuse_without_out(arguments)
    rows = board(arguments.runs)
    inspections = inspect(rows)
    if not inspections:
        raise InputError(f"{arguments.runs[0]}: no run here was shown its own images. Pass one that was.")
    if not any(inspection.overall for inspection in inspections):
        raise InputError(f"{arguments.runs[0]}: none of its questions is answered. Look at its log, and run again.")
    if arguments.out is not None:
        from stllava_eval.reports.page import write_board

        write_board(arguments.out, rows, arguments.images or "page", arguments.pathvqa_images)
    if arguments.json:
        show_json([asdict(inspection) for inspection in inspections])
    else:
        show(inspect_text(inspections))
    return 0


def add_gate(commands: Any) -> None:
    """Add `stllava-eval gate` to the commands."""
    gate = add_command(
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
        "--policy",
        type=Path,
        metavar="FILE",
        help="YAML file of margins and guards (default: see docs/compare/gate.md)",
    )
    gate.add_argument("--out", type=Path, metavar="DIR", help="write gate.json, gate.md and gate.xml (JUnit) there")
    gate.set_defaults(command=_gate)


def _gate(arguments: argparse.Namespace) -> int:
    from stllava_eval.reports.gate import gate, gate_json, gate_junit, gate_markdown, gate_text
    from stllava_eval.reports.gate_policy import read_policy
    from stllava_eval.storage import json_text, refuse_file, write_together

    if arguments.out is not None:
        refuse_file(arguments.out, "--out")
    decision = gate(arguments.candidate, arguments.baseline, read_policy(arguments.policy))
    if arguments.out is not None:
        files = {"json": json_text(gate_json(decision)), "md": gate_markdown(decision), "xml": gate_junit(decision)}
        write_together(arguments.out, {f"gate.{suffix}": text for suffix, text in files.items()})
    show(gate_text(decision))
    return decision.exit_code
