"""Decide by judges' verdicts on two answers which of them is preferred, or why none is.

Every judge writes `Verdict`s; `pairs` makes preference pairs of the `Preference`s that come of them here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.errors import InputError
from stllava_train.resumable import Row, read_rows

if TYPE_CHECKING:
    from stllava_train.preferences.rows import Candidate

# What can come of one question to a judge. Only the first has scores; none of the others is ever taken for a score:
# the judge declined, said no two scores, could not be asked, or does not know (exact knowledge; a person who undid it)
VERDICT_OUTCOMES = ("scored", "refused", "unparsable", "failed", "unknown")
HUMAN_PREFIX = "human:"  # begins the name of a judge who is one
# What can come of all of a pair's verdicts. Only the first makes a preference
PAIR_OUTCOMES = ("preferred", "tie", "small margin", "orders disagree", "judges disagree", "not scored")


@dataclass(frozen=True)
class Verdict:
    """What a judge said of two answers to one question, a row of `judged.jsonl`.

    Attributes:
        id: Of the candidate.
        image: Its image, and `pixel_hash` of it.
        judge: Who was asked: a model's name as we asked for it, `human:NAME`, or `exact`.
        shown: Places in the candidate's answers of the two answers, in the order in which they were shown.
        repetition: From 0, where the same is asked several times.
        outcome: One of `VERDICT_OUTCOMES`.
        scores: Of the two answers in the order shown, 1 to 10; None unless scored.
        reply: All that the judge said; None where nothing came back.
        why: What was wrong, where nothing was scored.
        model: As the server names what answered, which can be a snapshot of what was asked for.
        date: UTC, ISO 8601; None of exact knowledge, which does not depend on it.
        prompt_sha256: Of the text put to the judge.
        tokens: Of prompt and reply, as the server counts them, of all requests for this verdict.
        cost: In USD, of all requests for this verdict, those that failed included; None where no price is known.
        estimated: How much of `cost` is an estimate: of replies whose tokens the server did not count, and of requests
            whose reply never came.
        unsettled: The number of requests whose reply never came and that no reply has followed yet, such as one that
            was under way when a kill came; and how much of `cost` they are, the most that they can have cost. With the
            next reply to the same question, each is counted as much as that one. None where there is none.
        cut_at: The limit in tokens, and the room to think on top of it, where it cut the reply before its scores.
        batch: The batch of OpenAI's Batch API that a reply came with.
    """

    id: str
    image: str
    image_sha256: str
    judge: str
    shown: tuple[int, int]
    repetition: int
    outcome: str
    scores: tuple[float, float] | None
    reply: str | None
    why: str | None
    model: str | None
    date: str | None
    prompt_sha256: str | None
    tokens: tuple[int, int] | None
    cost: float | None
    estimated: float = 0.0
    unsettled: tuple[int, float] | None = None
    cut_at: tuple[int, int] | None = None
    batch: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What it answers: no two verdicts of a file share one."""
        return self.id, self.judge, self.shown, self.repetition


def verdict_of(row: Row) -> Verdict:
    """Return the verdict that a row of a file holds.

    Raises:
        ValueError: It is none.
    """
    try:
        made: Row = {"estimated": 0.0, "unsettled": None, "cut_at": None, "batch": None} | row
        for name in ("shown", "scores", "tokens", "unsettled", "cut_at"):
            if made[name] is not None:
                made[name] = tuple(made[name])
                if len(made[name]) != 2:
                    raise ValueError(f"{name}: {row[name]}")
        if not all(_is_number(one) for one in made["scores"] or ()):
            raise ValueError(f"scores: {str(made['scores'])[:60]}")
        for name, right in (
            *((name, isinstance(made[name], str)) for name in ("id", "image", "image_sha256", "judge")),
            *((name, made[name] is None or isinstance(made[name], str)) for name in ("reply", "why", "model", "date")),
            ("shown", made["shown"] is not None and all(map(_is_count, made["shown"])) and len({*made["shown"]}) == 2),
            ("repetition", _is_count(made["repetition"])),
            ("tokens", made["tokens"] is None or all(map(_is_count, made["tokens"]))),
            ("cost", made["cost"] is None or _is_amount(made["cost"])),
            ("estimated", _is_amount(made["estimated"])),
            ("unsettled", made["unsettled"] is None or all(map(_is_amount, made["unsettled"]))),
            ("cut_at", made["cut_at"] is None or all(map(_is_count, made["cut_at"]))),
            ("batch", made["batch"] is None or isinstance(made["batch"], str)),
        ):
            if not right:
                raise ValueError(f"{name}: {str(made[name])[:60]!r}")
        if made["outcome"] not in VERDICT_OUTCOMES or (made["outcome"] == "scored") != (made["scores"] is not None):
            raise ValueError(f"outcome {made['outcome']!r} with scores {made['scores']}")
        return Verdict(**made)
    except (KeyError, TypeError) as error:
        raise ValueError(str(error)) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9


def _is_amount(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9


def row_of(verdict: Verdict) -> Row:
    """Return the verdict as a row of its file."""
    return asdict(verdict)


def read_verdicts(path: Path) -> list[Verdict]:
    """Read the verdicts in a file that `stllava-train judge` wrote; of several with one key the last counts.

    Raises:
        InputError: It cannot be read, or a row is no verdict.
    """
    latest: dict[Any, Verdict] = {}
    for number, row in enumerate(read_rows(path), 1):
        try:
            verdict = verdict_of(row)
        except ValueError as error:
            raise InputError(
                f"{path}:{number}: no verdict ({error}). Pass what `stllava-train judge` wrote."
            ) from error
        latest[verdict.key] = verdict  # what failed first, and came when it was asked again
    return list(latest.values())


# --- verdicts to preferences ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preference:
    """What all verdicts on two answers of a candidate come to.

    Attributes:
        id: Of the candidate.
        answers: Places of the two answers, the lower one first.
        outcome: One of `PAIR_OUTCOMES`.
        chosen, rejected: Places of the answers, where one is preferred.
        margin: Score of the chosen less that of the rejected, mean over orders, repetitions and the judges who prefer
            it; 0 where none is preferred.
        judges: Those who prefer it.
    """

    id: str
    answers: tuple[int, int]
    outcome: str
    chosen: int | None = None
    rejected: int | None = None
    margin: float = 0.0
    judges: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rule:
    """How verdicts become preferences. The default is ours; `AUTHORS_RULE` theirs.

    Attributes:
        both_orders: A judge's verdict counts only where it prefers the same answer in both orders. Else the first order
            alone counts, the answer with the lower place shown first.
        min_margin: Of the scores, mean over what a judge was asked, in points of 10; 0 or more.
        tie_to_second: A tie prefers the answer with the higher place, which one order alone shows second.
    """

    both_orders: bool = True
    min_margin: float = 1.0  # our choice: a point is the least that a judge of whole numbers can tell
    tie_to_second: bool = False


# authors' eval_gpt4v_review.py: one order, `score1 > score2` or else the second answer
AUTHORS_RULE = Rule(both_orders=False, min_margin=0.0, tie_to_second=True)


def preferences(
    candidates: Sequence[Candidate], verdicts: Iterable[Verdict], rule: Rule = Rule(), judges: Sequence[str] = ()
) -> list[Preference]:
    """Return a preference, or why there is none, for every two answers of every candidate, in their order.

    Of several judges more than half of those who scored the two answers must prefer the same one. Ties and orders that
    disagree are votes against both; a refusal is no vote.

    Args:
        candidates: What was judged.
        verdicts: On them; others are passed over.
        rule: How verdicts count.
        judges: Whose verdicts count (default: all that occur).
    """
    # (candidate id, two answers) -> judge -> verdicts
    by_answers: dict[tuple[str, tuple[int, int]], dict[str, list[Verdict]]] = defaultdict(lambda: defaultdict(list))
    names = dict.fromkeys(judges)
    for verdict in verdicts:
        if not judges:
            names[verdict.judge] = None
        if verdict.judge in names:
            by_answers[verdict.id, (min(verdict.shown), max(verdict.shown))][verdict.judge].append(verdict)
    found = []
    for candidate in candidates:
        for answers in combinations(range(len(candidate.answers)), 2):
            by_judge = by_answers[candidate.id, answers]
            found.append(_preference(candidate.id, answers, {name: judged(by_judge[name], rule) for name in names}))
    return found


def judged(verdicts: Sequence[Verdict], rule: Rule = Rule()) -> tuple[str, float]:
    """Return (outcome, score of the lower index less that of the higher) by one judge's verdicts on two answers.

    The outcome is one of `PAIR_OUTCOMES` but "judges disagree". Repetitions of an order are averaged before orders are
    compared. A tie in one order is a tie, whatever the other one says.
    """
    by_order: dict[bool, list[float]] = defaultdict(list)
    for verdict in verdicts:
        in_order = verdict.shown[0] < verdict.shown[1]
        if verdict.scores is not None:
            first, second = verdict.scores
            by_order[in_order].append(first - second if in_order else second - first)
    means = {order: sum(differences) / len(differences) for order, differences in by_order.items()}
    needed: tuple[bool, ...] = (True, False) if rule.both_orders else (True,)
    person = bool(verdicts) and verdicts[0].judge.startswith(HUMAN_PREFIX)
    if person:  # sees one order, drawn blindly: asked twice, one remembers
        needed = tuple(means) or needed
    if any(order not in means for order in needed):
        return "not scored", 0.0
    values = [means[order] for order in needed]
    margin = sum(values) / len(values)
    if min(values) < 0 < max(values):
        return "orders disagree", margin
    if 0 in values:
        second = rule.tie_to_second and not person and not any(values)
        return ("preferred", -0.0) if second else ("tie", margin)
    return ("preferred" if abs(margin) >= rule.min_margin else "small margin"), margin


def _preference(id: str, answers: tuple[int, int], by_judge: Mapping[str, tuple[str, float]]) -> Preference:
    """Return the preference of most judges, given each one's outcome and margin; see `judged`."""
    lower, higher = answers
    by_judge = {name: said for name, said in by_judge.items() if said[0] != "not scored"}
    preferring = {name: margin for name, (outcome, margin) in by_judge.items() if outcome == "preferred"}
    for_lower = {name: margin for name, margin in preferring.items() if margin > 0}
    for_higher = {name: -margin for name, margin in preferring.items() if margin <= 0}
    for chosen, rejected, margins in ((lower, higher, for_lower), (higher, lower, for_higher)):
        if 2 * len(margins) > len(by_judge):
            mean = sum(margins.values()) / len(margins)
            return Preference(id, answers, "preferred", chosen, rejected, mean, tuple(margins))
    found = {outcome for outcome, _ in by_judge.values()}
    if not found:
        return Preference(id, answers, "not scored")
    return Preference(id, answers, found.pop() if len(found) == 1 and found != {"preferred"} else "judges disagree")


def count_outcomes(found: Iterable[Preference]) -> Mapping[str, int]:
    """Count how many preferences have each outcome, in the order of `PAIR_OUTCOMES`."""
    counts = dict.fromkeys(PAIR_OUTCOMES, 0)
    for preference in found:
        counts[preference.outcome] += 1
    return counts
