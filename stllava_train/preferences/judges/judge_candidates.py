"""Let a model, a person or the oracle judge a file of candidates in one call: candidates -> verdicts in a file.

`read_judging_job` reads what is to be judged, and `judge_candidates` and `judge_by_human` add verdicts to a file, from
which `stllava_train.preferences.pair_sources` makes pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stllava_eval.errors import InputError
from stllava_eval.inference.endpoint import OPENAI, Endpoint
from stllava_eval.inference.server import THOUGHT
from stllava_train.preferences.candidates import sampled
from stllava_train.preferences.judged import manifest_of_candidates
from stllava_train.preferences.judges import human_judge, judging, prices
from stllava_train.preferences.judges.batches import batches_under_way
from stllava_train.preferences.judges.endpoint import EndpointJudge
from stllava_train.preferences.judges.oracle import LOCAL_JUDGES
from stllava_train.preferences.judges.prices import Price
from stllava_train.preferences.judges.prompt import PRESETS, Comparison, Preset, questions, speaks_to_the_judge
from stllava_train.preferences.rows import Candidate, read_candidates
from stllava_train.preferences.verdicts import HUMAN_PREFIX, Verdict, row_of
from stllava_train.resumable import ResumableJsonl, Row


@dataclass(frozen=True)
class JudgeOptions:
    """How a model is asked to judge, what that may cost, and where the work is done.

    Attributes:
        max_tokens: Of a reply, at most (default: that of the preset, 1024). Questions whose reply was cut at a lower
            limit are asked again.
        reasoning: Whether the judge thinks before it replies: it gets 8,192 tokens more, and no temperature.
        repeat: How often each question is asked.
        concurrency: Requests at a time.
        per_minute: Requests per minute, at most; None sets no limit.
        retries: Further attempts of a request that fails.
        timeout: Seconds that a request may take.
        budget: Ceiling in USD on what the file of verdicts costs, over all calls; None sets none.
        prices: YAML file with the prices of models (default: `prices.yaml` of this package).
        batch: Whether to use OpenAI's Batch API, at half the price. The same call later reads the replies.
        engine: `local`, or `ray` to spread the requests over a cluster.
        workers: Of engine `ray`.

    Raises:
        InputError: A number is out of its range, or two options exclude each other.
    """

    max_tokens: int | None = None
    reasoning: bool = False
    repeat: int = 1
    concurrency: int = 16
    per_minute: float | None = None
    retries: int = 5
    timeout: float = 120.0
    budget: float | None = None
    prices: Path | None = None
    batch: bool = False
    engine: str = "local"
    workers: int = 2

    def __post_init__(self) -> None:
        if self.engine == "ray" and (self.batch or self.budget is not None):
            raise InputError("--engine ray: workers know of no budget, and a batch needs none. Leave one of them out.")
        if self.repeat < 1:
            raise InputError(f"--repeat {self.repeat}: nothing to ask. Give 1 or more.")
        if self.max_tokens is not None and not 1 <= self.max_tokens < 10**6:
            raise InputError(f"--max-tokens {self.max_tokens}: no limit of a reply. Give from 1 to 999,999.")


@dataclass(frozen=True)
class JudgingJob:
    """The candidates that judges are to compare.

    Attributes:
        file: The file of candidates, whose hash the file of verdicts holds.
        images: Folder of their images.
        preset: `ours` or `authors`: how judges are asked.
        candidates: Those that are judged.
        left_out: Ids of candidates that are not judged, because an answer speaks to its judge.
    """

    file: Path
    images: Path
    preset: str
    candidates: list[Candidate]
    left_out: list[str]

    @property
    def human_questions(self) -> int:
        """Number of questions to a person, who sees every two answers once."""
        return len(questions(self.candidates, both_orders=False))


@dataclass(frozen=True)
class JudgeResult:
    """What one call has added to the file of verdicts, and what is still missing.

    Attributes:
        judge: The model's name, without its address.
        outcomes: Number of new verdicts by outcome, such as "scored" or "failed".
        rows: The rows of all that this call was to ask and that have a verdict now; `why` says what was wrong.
        failed: Questions that have only failed, which the same call asks again.
        not_asked: Questions that were not asked, or whose batch is not done.
        spent: Cost of the whole file in USD, of all judges and calls.
        estimated: How much of it is an estimate, in USD.
    """

    judge: str
    outcomes: Counter[str]
    rows: list[Row]
    failed: int
    not_asked: int
    spent: float
    estimated: float

    @property
    def is_complete(self) -> bool:
        """Whether every question has a final outcome."""
        return not self.failed and not self.not_asked


def read_judging_job(
    file: Path, images: Path | None = None, sample: int | None = None, preset: str = "ours"
) -> JudgingJob:
    """Read the candidates that are to be judged; return them with the folder of their images.

    With preset `ours`, candidates of which an answer speaks to its judge are left out and listed.

    Args:
        file: What `make_candidates` or `stllava-train candidates` wrote.
        images: Folder of the images (default: the one that was asked about).
        sample: How many of the candidates to judge, sampled by seed 0 (default: all).
        preset: `ours`, or `authors`, who ask in one order and read the first line alone.

    Raises:
        InputError: The file cannot be read or is not finished, or has fewer candidates than `sample`.
    """
    manifest = manifest_of_candidates(file)
    if not manifest["finished"]:
        raise InputError(f"{file}: it is not finished. Call `stllava-train candidates` again.")
    candidates = read_candidates(file)
    if sample is not None:
        chosen = set(sampled([candidate.id for candidate in candidates], sample, 0, "candidates"))
        candidates = [candidate for candidate in candidates if candidate.id in chosen]
    left_out = []
    if preset == "ours":
        left_out = [candidate.id for candidate in candidates if speaks_to_the_judge(candidate)]
        candidates = [candidate for candidate in candidates if candidate.id not in set(left_out)]
    return JudgingJob(file, images or Path(manifest["folder"]), preset, candidates, left_out)


def forecast_judging(job: JudgingJob, judge: str, options: JudgeOptions = JudgeOptions()) -> str:
    """Estimate what it would cost to let a model judge; return lines about questions, tokens and USD. Nothing is asked.

    Args:
        job: What would be judged.
        judge: As of `judge_candidates`.
        options: How the model would be asked.

    Raises:
        InputError: The judge's name is reserved, an image cannot be read, or the prices cannot be read.
    """
    model, _, preset = _judge_of(judge, job, options)
    asked = questions(job.candidates, preset.both_orders, options.repeat)
    price = prices.read_price(model, options.prices)
    text = prices.forecast(model, asked, job.images, price, sum(preset.room))
    if not options.reasoning and model not in LOCAL_JUDGES:
        text += "\na model that thinks is billed for its thoughts too: --reasoning adds them to what it costs at most"
    return text


def judge_candidates(job: JudgingJob, judge: str, out: Path, options: JudgeOptions = JudgeOptions()) -> JudgeResult:
    """Ask a judge which of two answers is better, and add its verdicts to a file; return what was added and what lacks.

    Several calls with other judges add to the same file. After a stop the same call continues: nobody is asked, or
    paid, twice.

    Args:
        job: What is judged; see `read_judging_job`.
        judge: `MODEL` or `MODEL@URL` of an OpenAI-compatible server (key: `$OPENAI_API_KEY`; default
            https://api.openai.com/v1), or `exact`, which knows what the sample images show.
        out: `NAME.jsonl`, a new one or one with verdicts on the same candidates by the same preset.
        options: How the model is asked.

    Raises:
        InputError: The judge's name is reserved, `out` holds verdicts on other candidates, an image is missing, or the
            server refuses the first request. The verdicts that came before are in the file.
    """
    model, address, preset = _judge_of(judge, job, options)
    asked = questions(job.candidates, preset.both_orders, options.repeat)
    price = prices.read_price(model, options.prices)
    local = LOCAL_JUDGES[model]() if model in LOCAL_JUDGES else None
    with judging.open_verdicts(out, job.file, job.preset) as ledger:
        due = judging.still_due(asked, model, ledger, preset)
        if local:
            verdicts: Iterable[Verdict] = local(due)
        else:
            server = _Server(model, address or OPENAI, preset, price, job.images, options)
            verdicts = server.verdicts(due, ledger)
        try:
            outcomes = judging.judge(ledger, due, verdicts)
        except (InputError, KeyboardInterrupt):  # the file is left as short as it can be, each verdict once
            judging.finish(ledger, job.candidates, False)
            raise
        not_asked = len(due) - outcomes.total()
        # Questions that failed, and those that the server refused while nothing of this judge is scored.
        failed = len(judging.still_due(asked, model, ledger, preset)) - not_asked
        left = {model: {"failed": failed, "not_asked": not_asked}}
        judging.finish(ledger, job.candidates, not not_asked and not failed, left)
        keys = [comparison.key(model) for comparison in due]
        return JudgeResult(
            judge=model,
            outcomes=outcomes,
            rows=[ledger.rows[key] for key in keys if key in ledger.rows],
            failed=failed,
            not_asked=not_asked,
            spent=prices.spent(ledger.rows.values()),
            estimated=sum(row.get("estimated", 0.0) for row in ledger.rows.values()),
        )


def judge_by_human(job: JudgingJob, name: str, out: Path, port: int = 0) -> int:
    """Let a person judge on a local page until Ctrl-C; return how many questions this person has judged, of all calls.

    There are `job.human_questions` questions. Every verdict is saved at once, and the next call continues.

    Args:
        job: What is judged; see `read_judging_job`.
        name: Of the person; verdicts have the judge `human:NAME`.
        out: As of `judge_candidates`.
        port: Of the page on this machine; 0 takes one that is free.

    Raises:
        InputError: `out` holds verdicts on other candidates, the name is no plain one, or the port is taken.
    """
    with judging.open_verdicts(out, job.file, job.preset) as ledger:
        judged = human_judge.serve(job.candidates, job.images, ledger, name, port=port)
        questions_in_all = job.human_questions
        left = {f"{HUMAN_PREFIX}{name}": {"failed": 0, "not_asked": questions_in_all - judged}}
        judging.finish(ledger, job.candidates, judged == questions_in_all, left)
    return judged


def _judge_of(judge: str, job: JudgingJob, options: JudgeOptions) -> tuple[str, str, Preset]:
    """Return the name of a judge's model, the address of its server (empty for the default), and how it is asked."""
    model, _, address = judge.partition("@")
    if model.startswith(HUMAN_PREFIX) or (model in LOCAL_JUDGES and address):
        raise InputError(
            f"--judge {judge}: {', '.join(LOCAL_JUDGES)} has no server, and a name that begins with {HUMAN_PREFIX} is "
            "a person's: --human NAME."
        )
    preset = PRESETS[job.preset]
    if options.max_tokens is not None:
        preset = replace(preset, max_tokens=options.max_tokens)
    if options.reasoning:
        preset = replace(preset, thought=THOUGHT)
    return model, address, preset


@dataclass(frozen=True)
class _Server:
    """A model behind a server, and how it is asked about the images of a folder."""

    model: str
    address: str
    preset: Preset
    price: Price | None
    images: Path
    options: JudgeOptions

    def verdicts(self, due: Sequence[Comparison], ledger: ResumableJsonl) -> Iterable[Verdict]:
        """Return the model's verdicts, as they come. The server is not called if nothing is due, or can be paid."""
        options = self.options
        file = ledger.path.with_suffix(".batches.json")
        under_way = batches_under_way(file, self.model)
        if under_way and not options.batch:
            raise InputError(
                f"{file}: {under_way[0]} is under way, and its replies are paid. Call with --batch to read it."
            )
        left = self._budget_left(ledger.rows)
        # A model without a price costs nothing that is known. Another one is not even asked what it serves.
        nothing_left = left is not None and left <= 0 and self.price is not None
        if not under_way and (nothing_left or not due):
            return []
        endpoint: dict[str, Any] = {
            "base_url": self.address,
            "model": self.model,
            "concurrency": options.concurrency,
            "retries": options.retries,
            "timeout": options.timeout,
            "per_minute": options.per_minute,
            "greets": not under_way,  # a call that only reads a batch costs nothing
        }
        if options.engine == "ray":
            from stllava_train.preferences.ray import verdicts_by_ray  # with torch and ray

            return verdicts_by_ray(
                due, self.preset, self.images, self.price, options.workers, endpoint, self.model, ledger.rows
            )

        def save(verdict: Verdict) -> None:
            ledger.add([row_of(verdict)])

        judge = EndpointJudge(Endpoint(**endpoint), self.preset, self.images, self.price)
        if options.batch:
            return judge.batch_verdicts(due, file, ledger.rows, left, save)
        return judge.verdicts(due, left, ledger.rows, save)

    def _budget_left(self, rows: Mapping[object, Row]) -> float | None:
        """Return what is left of the budget in USD, given the verdicts so far; None without a budget."""
        if self.options.budget is None:
            return None
        return self.options.budget - prices.spent(rows.values(), self.model, self.price)
