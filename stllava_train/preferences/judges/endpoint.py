"""Ask a judge behind an OpenAI-compatible server, within a budget, and lose no reply."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.errors import InputError
from stllava_eval.images import decode, pixel_hash
from stllava_eval.inference.replies import Bill, Failure, Reply
from stllava_train.preferences.judges.batches import Batches
from stllava_train.preferences.judges.prices import Price, Purse, cost_of, estimated_tokens, paid, spent
from stllava_train.preferences.judges.prompt import FORM, Comparison, Preset, image_url, prompt, read_image
from stllava_train.preferences.judges.scores import read_verdict
from stllava_train.preferences.rows import Candidate
from stllava_train.preferences.verdicts import Verdict, verdict_of
from stllava_train.resumable import Row

if TYPE_CHECKING:
    from stllava_eval.inference.endpoint import Endpoint, Request


IMAGES_KEPT = 64  # in memory, ready to be sent (our choice)
IN_A_ROW = 20  # replies without two scores after which a judge is asked no more (our choice)

Key = tuple[Any, ...]


# --- what a server takes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RequestOptions:
    """What a server takes of all that is sent with a question.

    Attributes:
        form: `FORM`.
        temperature: A temperature.
        limit: Name of the limit of a reply: `max_tokens`, or `max_completion_tokens` for models that think.
        thought: Tokens that are allowed for the thought, on top of the reply's.
    """

    form: bool
    temperature: bool
    limit: str
    thought: int

    def adapted(self, refusal: Failure) -> RequestOptions | None:
        """Return the options without what a refusal names; None where it names nothing that can be left out."""
        reason = refusal.reason
        if refusal.status not in (400, 404, 415, 422, 501):
            return None
        if self.form and re.search(r"response_format|json_schema|structured|guided|grammar", reason):
            return replace(self, form=False)
        if self.limit == "max_tokens" and _not_taken("max_tokens", reason):
            from stllava_eval.inference.server import THOUGHT

            return replace(self, limit="max_completion_tokens", thought=THOUGHT)
        if self.temperature and "temperature" in reason:
            return replace(self, temperature=False)
        return None

    def too_much(self, refusal: Failure) -> bool:
        """Return whether a refusal names the limit of a reply, which is that of every question."""
        return refusal.status in (400, 422) and bool(re.search(r"max_(?:completion_)?tokens", refusal.reason))

    def both(self, other: RequestOptions) -> RequestOptions:
        """Return what neither has left out."""
        limit = max((self.limit, other.limit), key=len)
        form, temperature = self.form and other.form, self.temperature and other.temperature
        return RequestOptions(form, temperature, limit, max(self.thought, other.thought))


def _not_taken(name: str, reason: str) -> bool:
    """Return whether a server does not know a parameter, or not for this model; too large a value is something else.

    OpenAI's words: "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'
    instead." vLLM's for a value: "'max_tokens' or 'max_completion_tokens' is too large: 9216."
    """
    if re.search(r"too large|too long|maximum context|at most|exceed|less than|greater than", reason, re.I):
        return False
    unknown = r"unsupported|not support|unrecognized|unknown|unexpected|not (?:allowed|permitted)|extra|deprecated"
    return "max_completion_tokens" in reason or (name in reason and bool(re.search(unknown, reason, re.I)))


# --- asking -----------------------------------------------------------------------------------------------------------


class EndpointJudge:
    """A model behind an OpenAI-compatible server.

    What a server does not take is left out from the first refusal on: see `RequestOptions`.

    Args:
        endpoint: The server and model.
        preset: How it is asked.
        images: The folder of the candidates' images.
        price: Of its tokens; None where none is known.
        name: That verdicts bear; the model's name if None.
    """

    def __init__(
        self, endpoint: Endpoint, preset: Preset, images: Path, price: Price | None = None, name: str | None = None
    ) -> None:
        self.endpoint, self.preset, self.images, self.price = endpoint, preset, images, price
        self.name = name or endpoint.model
        limit = "max_completion_tokens" if preset.thought else "max_tokens"
        self.how = RequestOptions(preset.form, not preset.thought, limit, preset.thought)
        self.most = 0.0  # tokens of the longest prompt billed so far
        self._greeted: Key | None = None  # the first question asked: it bears what `endpoint.hello` cost, which is paid
        self._urls: dict[str, str] = {}  # of the last images: the questions about one follow each other

    @property
    def limit(self) -> int:
        """Return the tokens of a reply, its thought included, at most."""
        return self.preset.max_tokens + self.how.thought

    def request(self, asked: Comparison, how: RequestOptions | None = None) -> Request:
        """Return what is sent: the text, then the image, as the authors' script has them."""
        how = how or self.how
        content = [
            {"type": "text", "text": prompt(*asked.texts(), self.preset.guarded)},
            {"type": "image_url", "image_url": {"url": self._image(asked.candidate)}},
        ]
        return {
            "messages": [{"role": "user", "content": content}],
            how.limit: self.preset.max_tokens + how.thought,
            **({"temperature": self.preset.temperature} if how.temperature else {}),
            **({"response_format": FORM} if how.form else {}),
        }

    def _image(self, candidate: Candidate) -> str:
        """Return the data URL of a candidate's image.

        Raises:
            InputError: The file is not there, or shows something else than what was asked about.
        """
        if (known := self._urls.get(candidate.image)) is not None:
            return known
        image = read_image(self.images, candidate)
        try:
            same = pixel_hash(decode(image)) == candidate.image_sha256
        except InputError:
            same = False
        if not same:
            raise InputError(
                f"{self.images / candidate.image}: not the image that {candidate.id} asks about. Put it back, or pass "
                "the images' folder with --images."
            )
        if len(self._urls) >= IMAGES_KEPT:
            self._urls.pop(next(iter(self._urls)), None)
        return self._urls.setdefault(candidate.image, image_url(image))

    def verdicts(
        self,
        asked: Sequence[Comparison],
        budget: float | None = None,
        earlier: Mapping[Key, Row] | None = None,
        mark: Callable[[Verdict], None] | None = None,
    ) -> Generator[Verdict, None, None]:
        """A verdict for each, as they come. With a budget, in USD, it ends before what could cost more than is left,
        as long as no prompt is billed with more tokens than the longest one before it.

        Args:
            asked: The questions.
            budget: In USD.
            earlier: Verdicts by their keys, of which those that failed have been paid all the same: what they cost is
                part of the cost of those that take their place.
            mark: Called before every request, in a thread, with a verdict that says that it is under way and the most
                that it can cost, for a file that is to be right after a kill.

        Raises:
            InputError: As `Endpoint.replies`; a budget is given and no price is known; or `IN_A_ROW` replies in a row
                hold no two scores.
        """
        self._check_budget(budget)
        if not asked:
            return
        rows = dict(earlier or {})
        purse, due = Purse(budget), list(asked)
        streak = _Streak(self.name, rows, {comparison.key(self.name) for comparison in due})
        if budget is not None:
            self.most = max([self.most, *(estimated_tokens(comparison, self.images) for comparison in due)])
        at_once = 1  # until it is known what the server takes
        while due:
            wave = _Wave(self, due[:at_once], purse, rows, mark)
            again: list[Comparison] = []
            requests = [partial(wave.request, index) for index in range(len(wave.asked))]
            with closing(self.endpoint.replies(requests, wave.may)) as replies:
                for index, reply in replies:
                    comparison, how = wave.asked[index], wave.how[index]
                    wave.come.add(index)
                    verdict = self._verdict(comparison, reply, (self.preset.max_tokens, how.thought), rows)
                    if isinstance(reply, Failure) and (adapted := self._adapted(how, reply, streak.scored)) is not how:
                        wave.settle(index, replace(verdict, outcome="failed"), mark)
                        self._takes(adapted, reply)
                        again.append(comparison)
                        continue
                    wave.settle(index, verdict)
                    self.most = max(self.most, reply.prompt_tokens)
                    streak.add(verdict)
                    wave.stopped |= streak.ends
                    yield verdict
            streak.check()
            if not wave.come:
                return
            unasked = [comparison for index, comparison in enumerate(wave.asked) if index not in wave.come]
            due = again + unasked + due[at_once:]
            at_once = 1 if again else max(1, len(due) if streak.scored else streak.left)

    def _adapted(self, how: RequestOptions, refusal: Failure, scored: bool) -> RequestOptions | None:
        """How to ask where a refusal names something that can be left out, `how` where it names nothing, and None where
        it names the limit of a reply before any reply was scored."""
        if (other := how.adapted(refusal)) is not None:
            return other
        return None if not scored and how.too_much(refusal) else how

    def _takes(self, how: RequestOptions | None, refusal: Failure) -> None:
        """Ask so from now on.

        Raises:
            InputError: There is no way to.
        """
        if how is not None:
            if how.limit != self.how.limit:
                print(
                    f"{self.name}: the server refuses max_tokens. Questions are sent with max_completion_tokens "
                    f"instead, {how.thought:,} tokens more, for the model may think first.",
                    file=sys.stderr,
                )
            self.how = self.how.both(how)
            return
        if _not_taken(self.how.limit, refusal.reason):
            raise InputError(
                f"{self.name}: the server does not take {self.how.limit} ({refusal.reason}). Leave --reasoning out and "
                "give the thought its room with --max-tokens."
            )
        raise InputError(
            f"{self.name}: the server refuses replies of {self.limit} tokens ({refusal.reason}). Give it fewer "
            "with --max-tokens."
        )

    def batch_verdicts(
        self,
        asked: Sequence[Comparison],
        file: Path,
        earlier: Mapping[Key, Row],
        budget: float | None = None,
        mark: Callable[[Verdict], None] | None = None,
    ) -> Iterator[Verdict]:
        """Through OpenAI's Batch API: what earlier calls handed in and is done; then the rest is handed in.

        Before that, questions are asked directly until one is scored, at the full price: in a batch nothing can be
        adapted to what the server takes.

        Args:
            asked: The questions without a verdict.
            file: Of the batches of all judges; see `Batches`.
            earlier: As in `verdicts`.
            budget: In USD.
            mark: As in `verdicts`.

        Raises:
            InputError: The server has no Batch API, or declines, or has not begun a batch; a batch has replies to other
                questions than these; or the budget is less than all could cost.
        """
        self._check_budget(budget)
        batches = Batches(self.endpoint, file, self.name)
        due = {_custom_id(comparison.key(self.name)): comparison for comparison in asked}
        before = spent(earlier.values())

        def left() -> float | None:
            return None if budget is None else budget - (spent(earlier.values()) - before)

        for verdict in self._ended(batches, due, earlier):
            del due[_custom_id(verdict.key)]
            yield verdict
        if due and not batches.under_way:
            self._check_batch(due.values(), left())
            for verdict in self._first_ones(list(due.values()), left, earlier, mark):
                due.pop(_custom_id(verdict.key), None)
                yield verdict
            self._check_batch(due.values(), left())
            if due:
                model = self.endpoint.model
                requests = ((id, {"model": model, **self.request(comparison)}) for id, comparison in due.items())
                batches.hand_in(requests, (self.preset.max_tokens, self.how.thought))
        if batches.under_way:
            print(f"{self.name}: {batches.state()}. Call again later, within a day.", file=sys.stderr)

    def _ended(self, batches: Batches, due: Mapping[str, Comparison], earlier: Mapping[Key, Row]) -> Iterator[Verdict]:
        """Yield the verdicts of the batches that have ended; each batch is read once.

        Raises:
            InputError: One has replies to other questions, or was not begun.
        """
        known = {_custom_id(key) for key in earlier}
        not_begun = {}
        for batch in batches.ended():
            if error := batches.error(batch):
                not_begun[batch] = error
            room = batches.room(batch, (self.preset.max_tokens, self.how.thought))
            replies = batches.replies(batch, sum(room))
            if others := len(replies.keys() - due.keys() - known):
                raise InputError(
                    f"{batches.file}: {batch} has replies to {others} questions that are not asked now. Call with the "
                    "--sample, --repeat and --preset that it was handed in with."
                )
            for name, reply in replies.items():
                one = due.get(name)
                if one is None or (earlier.get(one.key(self.name)) or {}).get("batch") == batch:
                    continue  # it was written before a kill that came before the batch was noted as read
                yield self._verdict(one, reply, room, earlier, batch)
            batches.forget(batch)
        if not_begun:
            raise InputError(_not_begun(self.name, not_begun))

    def _first_ones(
        self,
        due: Sequence[Comparison],
        left: Callable[[], float | None],
        earlier: Mapping[Key, Row],
        mark: Callable[[Verdict], None] | None,
    ) -> Iterator[Verdict]:
        """Yield verdicts asked directly, until one is scored.

        Raises:
            InputError: A question was not answered, or `IN_A_ROW` have no scores.
        """
        streak = _Streak(self.name, earlier, {comparison.key(self.name) for comparison in due})
        for one in due:
            verdict = None
            with closing(self.verdicts([one], left(), earlier, mark)) as found:
                for verdict in found:
                    streak.add(verdict)
                    yield verdict
            if verdict is None:
                raise InputError("--budget: too little is left for a question. Raise it.")
            if verdict.outcome == "scored":
                return
            if verdict.outcome == "failed":
                raise InputError(
                    f"{self.name}: no batch is handed in, as a question that was asked directly failed "
                    f"({verdict.why}). Call again later."
                )
            streak.check()

    def _check_batch(self, due: Iterable[Comparison], budget: float | None) -> None:
        if budget is None or self.price is None:
            return
        one_by_one = [self.price.of(estimated_tokens(one, self.images), self.limit) for one in due]
        if (most := sum(one_by_one) * self.price.batch) > budget:
            raise InputError(
                f"--budget: {len(one_by_one)} questions in a batch could cost {most:.2f} USD, and {budget:.2f} is "
                "left. Raise it, or judge fewer (--sample)."
            )

    def _check_budget(self, budget: float | None) -> None:
        if budget is not None and self.price is None:
            raise InputError(
                f"--budget: no price of {self.name} is known. Write one into a file, in USD per million tokens: "
                f"`{self.name}: {{prompt: 2, reply: 8}}`. Pass it with --prices."
            )

    # --- a verdict

    def _verdict(
        self,
        asked: Comparison,
        reply: Reply | Failure,
        room: tuple[int, int],
        earlier: Mapping[Key, Row],
        batch: str | None = None,
    ) -> Verdict:
        text, limit = reply.text if isinstance(reply, Reply) else None, sum(room)
        outcome, why, scores = read_verdict(reply, self.preset.strict, limit)
        came = reply if isinstance(reply, Reply) else reply.came
        cut = came is not None and came.cut and outcome == "unparsable"
        verdict = self._blank(asked, earlier)
        return replace(
            self._paid(verdict, asked, reply.before, came, limit, self.price.batch if batch and self.price else 1.0),
            outcome=outcome,
            scores=scores,
            reply=text,
            why=why,
            model=reply.model,
            cut_at=room if cut else None,
            batch=batch or verdict.batch,
        )

    def under_way(self, asked: Comparison, before: Bill, how: RequestOptions, earlier: Mapping[Key, Row]) -> Verdict:
        """Return what is written before a request: it failed, unless something else takes its place."""
        before = replace(before, unknown=before.unknown + 1)
        verdict = self._paid(self._blank(asked, earlier), asked, before, None, self.preset.max_tokens + how.thought)
        return replace(verdict, why="it was asked, and the call ended before a reply came")

    def _blank(self, asked: Comparison, earlier: Mapping[Key, Row]) -> Verdict:
        """Return a verdict that failed, with what the question has cost so far."""
        row = earlier.get(asked.key(self.name))
        before = verdict_of(row) if row else None
        verdict = replace(
            asked.unscored(self.name),
            date=now(),
            prompt_sha256=hashlib.sha256(prompt(*asked.texts(), self.preset.guarded).encode()).hexdigest(),
        )
        if before is None:
            return verdict
        return replace(
            verdict,
            tokens=before.tokens,
            cost=cost_of(before, self.price),
            estimated=before.estimated,
            unsettled=before.unsettled,
            batch=before.batch,
        )

    def _paid(
        self, verdict: Verdict, asked: Comparison, before: Bill, came: Reply | None, limit: int, share: float = 1.0
    ) -> Verdict:
        """As `prices.paid`."""
        if self.endpoint.hello is not None:
            self._greeted = self._greeted or verdict.key
            if self._greeted == verdict.key:
                before = before.plus_reply(self.endpoint.hello)
        estimate = partial(estimated_tokens, asked, self.images)
        return paid(verdict, before, came, self.price, estimate, self.most, limit, share)


class _Wave:
    """Questions that are sent together: how each is asked, and what it could cost.

    Args:
        judge: Who is asked.
        asked: The questions.
        purse: What may be spent on them.
        earlier: As in `EndpointJudge.verdicts`.
        mark: As there.
    """

    def __init__(
        self,
        judge: EndpointJudge,
        asked: Sequence[Comparison],
        purse: Purse,
        earlier: Mapping[Key, Row],
        mark: Callable[[Verdict], None] | None,
    ) -> None:
        self.judge, self.asked, self.purse, self.earlier, self.mark = judge, asked, purse, earlier, mark
        self.how: dict[int, RequestOptions] = {}
        self.come: set[int] = set()
        self.stopped = False
        self._marked: dict[int, Bill] = {}

    def request(self, place: int) -> Request:
        """As `EndpointJudge.request`."""
        self.how[place] = self.judge.how
        return self.judge.request(self.asked[place], self.how[place])

    def may(self, place: int, before: Bill) -> bool:
        """Return whether an attempt may be made, by what is left. It is marked if it may."""
        if self.stopped:
            return False
        if self.judge.price is None:
            return True
        verdict = self.judge.under_way(self.asked[place], before, self.how[place], self.earlier)
        if not self.purse.holds(place, self._new(verdict)):
            return False
        if self.mark is not None and self._marked.get(place) != before:
            self.mark(verdict)
            self._marked[place] = before
        return True

    def settle(self, place: int, verdict: Verdict, mark: Callable[[Verdict], None] | None = None) -> None:
        """Pay for what came; `mark` takes back what was marked where no verdict follows."""
        self.purse.pays(place, self._new(verdict))
        if mark is not None:
            mark(verdict)

    def _new(self, verdict: Verdict) -> float:
        """Return what a verdict costs more than the one before it."""
        row = self.earlier.get(verdict.key)
        before = cost_of(verdict_of(row), self.judge.price) if row else None
        return (verdict.cost or 0.0) - (before or 0.0)


class _Streak:
    """Count replies in a row without two scores. Until a first one is scored, what is refused or failed counts as well.

    Args:
        judge: Who is asked.
        earlier: Verdicts by their keys.
        due: Keys of those that are asked again.
    """

    def __init__(self, judge: str, earlier: Mapping[Key, Row], due: set[Key]) -> None:
        own = [row for key, row in earlier.items() if key not in due and row["judge"] == judge]
        self.judge, self.scored = judge, any(row["outcome"] == "scored" for row in own)
        useless = [] if self.scored else [row for row in own if row["outcome"] == "unparsable"]
        self._count, self._outcomes, self._why = len(useless), Counter({"unparsable": len(useless)}), ""
        if useless:
            self._why = useless[-1]["why"]
        self.check()

    @property
    def left(self) -> int:
        """Return how many more there may be."""
        return IN_A_ROW - self._count

    @property
    def ends(self) -> bool:
        return self._count >= IN_A_ROW

    def add(self, verdict: Verdict) -> None:
        if verdict.outcome == "scored":
            self.scored, self._count = True, 0
            self._outcomes.clear()
        elif verdict.outcome == "unparsable" or not self.scored:
            self._count += 1
            self._outcomes[verdict.outcome] += 1
            self._why = verdict.why or ""

    def check(self) -> None:
        """Stop where there were as many as may be.

        Raises:
            InputError: There were.
        """
        if self.ends:
            kinds = ", ".join(f"{number} {outcome}" for outcome, number in self._outcomes.items() if number)
            said = f"{self._count} replies in a row have no two scores ({kinds}; the last: {self._why})"
            if self._outcomes["unparsable"]:
                what = (
                    "Replies are paid, so no more are asked for. Look at them in FILE. Another judge can be named with "
                    "the same --out; so can this one with more room (--max-tokens, --reasoning), which asks again what "
                    "was cut. To ask this one again about the others, choose another --out."
                )
            else:
                what = (
                    "Fix what the server names, or name another judge; then the same call continues and asks again "
                    "what was refused or failed, with the same --out."
                )
            raise InputError(f"{self.judge}: {said}. {what}")


def _custom_id(key: Key) -> str:
    """Return the id of a question in a batch, by what it asks."""
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:40]


def _not_begun(judge: str, wrong: Mapping[str, str]) -> str:
    batch, said = next(iter(wrong.items()))
    full = "token_limit" in said or "enqueued" in said.lower()
    what = (
        "Wait until other batches of yours have ended, or hand in fewer questions at a time with --sample"
        if full
        else "Fix what it names"
    )
    return (
        f"{judge}: {batch} was not begun ({said}). Nothing of it was asked or paid. {what}; the next call hands it in."
    )


def now() -> str:
    """Return the time, UTC, in seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
