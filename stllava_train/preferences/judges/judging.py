"""Write the verdicts of any judge to the file of verdicts, and find what it has still to be asked."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from stllava_eval.storage import file_sha256
from stllava_train.preferences.judges.prompt import Comparison, Preset
from stllava_train.preferences.rows import Candidate
from stllava_train.preferences.verdicts import Verdict, row_of, verdict_of
from stllava_train.resumable import ResumableJsonl, read_manifest


def open_verdicts(out: Path, candidates: Path, preset: str) -> ResumableJsonl:
    """Open the file of verdicts on these candidates, a new one or one to be resumed.

    Raises:
        InputError: It holds verdicts on others, or by another preset.
    """
    sha256 = file_sha256(candidates)
    return ResumableJsonl(
        out,
        lambda row: verdict_of(row).key,
        {"stage": "judge", "candidates": {"file": candidates.name, "sha256": sha256}, "preset": preset},
    )


def still_due(
    asked: Iterable[Comparison], judge: str, ledger: ResumableJsonl, preset: Preset | None = None
) -> list[Comparison]:
    """Return the comparisons without a verdict: nobody is asked, or paid, twice.

    Those that failed are asked again; by a preset with more room, those whose reply was cut before its scores; and, as
    long as the file has no score of this judge, those that its server refused without a reply, which nobody has paid:
    what it refuses then may be how all are asked, such as an option or a model that is not loaded.
    """
    room = preset.room if preset else (0, 0)
    scored = any(row["judge"] == judge and row["outcome"] == "scored" for row in ledger.rows.values())
    due = []
    for comparison in asked:
        row = ledger.rows.get(comparison.key(judge))
        cut_at = row and row.get("cut_at")
        more = cut_at and any(now > then for now, then in zip(room, cut_at, strict=True))
        refused = row and row["outcome"] == "refused" and row["reply"] is None and row["tokens"] is None
        if row is None or row["outcome"] == "failed" or more or (refused and not scored):
            due.append(comparison)
    return due


# --- the file ---------------------------------------------------------------------------------------------------------


def judge(
    ledger: ResumableJsonl, asked: Sequence[Comparison], verdicts: Iterable[Verdict], progress: bool = True
) -> Counter[str]:
    """Put verdicts into the file as they come; return how many have each outcome.

    Args:
        ledger: See `open_verdicts`.
        asked: What they answer, for the bar.
        verdicts: Each is on the disk before the next one is looked at.
        progress: Whether to show a bar on stderr.
    """
    from tqdm import tqdm

    counts: Counter[str] = Counter()
    cost = 0.0
    hidden = None if progress else True  # None: where stderr is no terminal
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=len(asked), desc="judging", unit="verdict", disable=hidden, file=sys.stderr)
        )
        if isinstance(verdicts, Generator):
            stack.enter_context(closing(verdicts))  # then no request of it is under way any more, whatever ends it
        for verdict in verdicts:
            ledger.add([row_of(verdict)])
            counts[verdict.outcome] += 1
            cost += verdict.cost or 0.0
            bar.set_postfix_str(f"{cost:.4f} USD" if cost else "", refresh=False)
            bar.update()
    return counts


def finish(
    ledger: ResumableJsonl,
    candidates: Sequence[Candidate],
    finished: bool = True,
    left: Mapping[str, Mapping[str, int]] = {},
) -> None:
    """Write the file again, by judge and then in the order of the candidates; see `ResumableJsonl.finish`.

    Args:
        ledger: The file.
        candidates: What was judged.
        finished: Whether nothing is left to do for the judge of this call.
        left: That judge -> how many questions `failed` and were `not_asked`; those of other judges are kept.
    """
    index = {candidate.id: number for number, candidate in enumerate(candidates)}
    # a key is (candidate, judge, shown, repetition), see `Verdict.key`
    order = sorted(ledger.rows, key=lambda key: (key[1], index.get(key[0], len(index)), sorted(key[2]), key[2], key[3]))
    known = read_manifest(ledger.path).get("left")
    every = {**(known if isinstance(known, dict) else {}), **left}
    ledger.finish(order, finished and not any(sum(counts.values()) for counts in every.values()), left=every)
