"""`stllava-train judge`: let judges say which of two answers is better."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.errors import InputError, printable
from stllava_train.cli.options import add_engine, amount, counted, filled
from stllava_train.preferences.judged import manifest_of_candidates

if TYPE_CHECKING:
    from stllava_train.preferences.judges.prices import Price
    from stllava_train.preferences.judges.prompt import Comparison, Preset
    from stllava_train.preferences.rows import Candidate
    from stllava_train.preferences.verdicts import Verdict
    from stllava_train.resumable import ResumableJsonl


MOST_REASONS = 5  # reasons, and questions of each, that are shown for what is not scored (our choice)


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
    from stllava_train.preferences.candidates import sampled
    from stllava_train.preferences.judges.prompt import speaks_to_the_judge
    from stllava_train.preferences.rows import read_candidates

    if not arguments.judge and not arguments.human:
        raise InputError("--judge: none is named. Name a model, exact for sample images, or --human NAME.")
    if arguments.engine == "ray" and (arguments.batch or arguments.budget is not None):
        raise InputError("--engine ray: workers know of no budget, and a batch needs none. Leave one of them out.")
    if arguments.repeat < 1:
        raise InputError(f"--repeat {arguments.repeat}: nothing to ask. Give 1 or more.")
    if arguments.max_tokens is not None and not 1 <= arguments.max_tokens < 10**6:
        raise InputError(f"--max-tokens {arguments.max_tokens}: no limit of a reply. Give from 1 to 999,999.")
    manifest = manifest_of_candidates(arguments.candidates)
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
    from stllava_eval.inference.server import THOUGHT
    from stllava_train.preferences.judges import judging, prices
    from stllava_train.preferences.judges.oracle import EXACT, exact_verdicts, sample_truths
    from stllava_train.preferences.judges.prompt import PRESETS, questions
    from stllava_train.preferences.verdicts import HUMAN_PREFIX

    preset = PRESETS[arguments.preset]
    if arguments.max_tokens is not None:
        preset = replace(preset, max_tokens=arguments.max_tokens)
    if arguments.reasoning:
        preset = replace(preset, thought=THOUGHT)
    asked = questions(candidates, preset.both_orders, arguments.repeat)
    model, _, address = name.partition("@")
    if model.startswith(HUMAN_PREFIX) or (model == EXACT and address):
        raise InputError(
            f"--judge {name}: exact has no server, and a name that begins with {HUMAN_PREFIX} is a person's: "
            "--human NAME."
        )
    price = prices.read_price(model, arguments.prices)
    if arguments.dry_run:
        print(prices.forecast(model, asked, images, price, sum(preset.room)))
        if not arguments.reasoning and model != EXACT:
            print("a model that thinks is billed for its thoughts too: --reasoning adds them to what it costs at most")
        return True
    truths = sample_truths() if model == EXACT else {}
    with judging.open_verdicts(arguments.out, arguments.candidates, arguments.preset) as ledger:
        due = judging.still_due(asked, model, ledger, preset)
        if model == EXACT:
            verdicts: Iterable[Verdict] = exact_verdicts(due, truths)
        else:
            verdicts = _verdicts_of_a_server(model, address, arguments, preset, images, price, due, ledger)
        try:
            counts = judging.judge(ledger, due, verdicts)
        except (InputError, KeyboardInterrupt):  # the file is left as short as it can be, each verdict once
            judging.finish(ledger, candidates, False)
            raise
        missing = len(due) - counts.total()
        failed = len(judging.still_due(asked, model, ledger, preset)) - missing  # or refused, and nothing is scored yet
        judging.finish(
            ledger, candidates, not missing and not failed, {model: {"failed": failed, "not_asked": missing}}
        )
        rows = [ledger.rows[one.key(model)] for one in due if one.key(model) in ledger.rows]
        spent = prices.spent(ledger.rows.values())
        estimated = sum(row.get("estimated", 0.0) for row in ledger.rows.values())
    print(printable(f"{arguments.out}: {model}: {counted(counts.total(), 'new verdict')}"))
    _print_outcomes(counts, rows)
    if spent:
        about = (
            f", of which {estimated:.4f} is an estimate (see docs/preferences/judges.md)" if estimated >= 5e-5 else ""
        )
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
    due: Sequence[Comparison],
    ledger: ResumableJsonl,
) -> Iterable[Verdict]:
    """The verdicts of a model behind a server, which is not called where nothing is due."""
    from stllava_eval.inference.endpoint import OPENAI, Endpoint
    from stllava_train.preferences.judges import endpoint, prices
    from stllava_train.preferences.judges.batches import batches_under_way
    from stllava_train.preferences.verdicts import row_of

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
        from stllava_train.preferences.ray import verdicts_by_ray

        return verdicts_by_ray(due, preset, images, price, arguments.workers, how, model, ledger.rows)
    by = endpoint.EndpointJudge(Endpoint(**how), preset, images, price)

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
        for why, ids in sorted(whys.items(), key=lambda item: -len(item[1]))[:MOST_REASONS]:
            once = list(dict.fromkeys(ids))  # a question is asked in two orders
            named = ", ".join(once[:MOST_REASONS]) + (", ..." if len(once) > MOST_REASONS else "")
            print(printable(f"    {why}: {len(ids):,} ({named})"))


def _judge_by_person(arguments: argparse.Namespace, candidates: Sequence[Candidate], images: Path) -> bool:
    from stllava_train.preferences.judges import human_judge, judging
    from stllava_train.preferences.judges.prompt import questions

    asked = len(questions(candidates, both_orders=False))
    if arguments.dry_run:
        print(printable(f"{arguments.human}: {counted(asked, 'question')}, on a local page"))
        return True
    with judging.open_verdicts(arguments.out, arguments.candidates, arguments.preset) as ledger:
        done = human_judge.serve(candidates, images, ledger, arguments.human, port=arguments.port)
        left = {f"human:{arguments.human}": {"failed": 0, "not_asked": asked - done}}
        judging.finish(ledger, candidates, done == asked, left)
    print(printable(f"{arguments.out}: human:{arguments.human}: {done:,} of {counted(asked, 'question')}"))
    return done == asked
