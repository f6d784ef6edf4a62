"""`stllava-train judge`: let judges say which of two answers is better."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.errors import InputError, printable
from stllava_train.cli.options import add_engine, amount, counted, filled

if TYPE_CHECKING:
    from stllava_train.preferences.judges.judge_candidates import JudgeResult, JudgingJob

MOST_REASONS = 5  # how many reasons are shown for verdicts without a score, and how many ids of each (our choice)


def add_judge(commands: Any) -> None:
    """Add `stllava-train judge` to the commands."""
    judge = commands.add_parser(
        "judge",
        help="let a model or a person say which of two answers is better",
        description=filled(
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
    _add_judges(judge)
    _add_asking(judge)
    _add_costs(judge)
    judge.set_defaults(command=_judge)


def _add_judges(judge: Any) -> None:
    """Add the options that say who judges what."""
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
    judge.add_argument("--human", metavar="NAME", help="your name: you judge on a page on this machine")
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


def _add_asking(judge: Any) -> None:
    """Add the options that say how a question is asked."""
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


def _add_costs(judge: Any) -> None:
    """Add the options that say what may be paid, and where the work is done."""
    judge.add_argument(
        "--budget", type=amount, metavar="USD", help="ceiling on what FILE costs, over all calls (default: none)"
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
    add_engine(judge)
    judge.add_argument(
        "--port", type=int, default=8400, metavar="N", help="port of the page for --human (default: 8400)"
    )


def _judge(arguments: argparse.Namespace) -> int:
    if not arguments.judge and not arguments.human:
        raise InputError("--judge: none is named. Name a model, exact for sample images, or --human NAME.")
    from stllava_train.preferences.judges.judge_candidates import (  # with numpy
        JudgeOptions,
        forecast_judging,
        judge_candidates,
        read_judging_job,
    )

    options = JudgeOptions(**{field.name: getattr(arguments, field.name) for field in fields(JudgeOptions)})
    job = read_judging_job(arguments.candidates, arguments.images, arguments.sample, arguments.preset)
    if job.left_out:
        print(f"left out, an answer speaks to its judge: {len(job.left_out)}: {printable(', '.join(job.left_out))}")
    all_judged = True
    for judge in arguments.judge:
        if arguments.dry_run:
            print(forecast_judging(job, judge, options))
        else:
            result = judge_candidates(job, judge, arguments.out, options)
            _print_result(result, arguments)
            all_judged &= result.is_complete
    if arguments.human:
        all_judged &= _judge_by_human(job, arguments)
    return 0 if all_judged else 1


def _print_result(result: JudgeResult, arguments: argparse.Namespace) -> None:
    """Print the new verdicts by outcome, what the file has cost, and what is missing."""
    print(printable(f"{arguments.out}: {result.judge}: {counted(result.outcomes.total(), 'new verdict')}"))
    _print_outcomes(result.outcomes, result.rows)
    if result.spent:
        estimate = ""
        if result.estimated >= 5e-5:  # four digits of it are shown
            estimate = f", of which {result.estimated:.4f} is an estimate (see docs/preferences/judges.md)"
        print(f"  cost of the file: {result.spent:.4f} USD{estimate}")
    if result.not_asked:
        print(f"  {_why_missing(result.not_asked, arguments)}")
    if result.failed > result.outcomes["failed"]:
        print("  nothing is scored: the same call asks again what the server refused, which nobody has paid")


def _why_missing(missing: int, arguments: argparse.Namespace) -> str:
    """Return why so many questions have no verdict after a call that was not stopped, and what to do."""
    if arguments.batch:
        return f"not answered yet: {missing:,}. The same call reads the batch when it is done."
    if arguments.budget is None:
        return f"not asked: {missing:,}. The same call asks them."
    return (
        f"not asked: {missing:,}, because the longest reply to one more could cost more than is left of --budget "
        f"{arguments.budget:g}. Raise it, or lower --max-tokens."
    )


def _print_outcomes(outcomes: Mapping[str, int], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print how many verdicts have each outcome, and the commonest reasons where there is no score."""
    for outcome, number in outcomes.items():
        print(printable(f"  {outcome}: {number:,}"))
        ids_by_reason: dict[str, list[str]] = {}
        for row in rows:
            if row["outcome"] == outcome and row["why"]:
                ids_by_reason.setdefault(row["why"], []).append(row["id"])
        commonest = sorted(ids_by_reason.items(), key=lambda item: -len(item[1]))
        for reason, ids in commonest[:MOST_REASONS]:
            candidates = list(dict.fromkeys(ids))  # a question is asked in two orders
            named = ", ".join(candidates[:MOST_REASONS]) + (", ..." if len(candidates) > MOST_REASONS else "")
            print(printable(f"    {reason}: {len(ids):,} ({named})"))


def _judge_by_human(job: JudgingJob, arguments: argparse.Namespace) -> bool:
    """Let a person judge and print how far they are; return whether they have judged everything."""
    from stllava_train.preferences.judges.judge_candidates import judge_by_human  # with numpy

    questions = job.human_questions
    if arguments.dry_run:
        print(printable(f"{arguments.human}: {counted(questions, 'question')}, on a local page"))
        return True
    judged = judge_by_human(job, arguments.human, arguments.out, arguments.port)
    print(printable(f"{arguments.out}: human:{arguments.human}: {judged:,} of {counted(questions, 'question')}"))
    return judged == questions
