"""Return what all forms of a leaderboard share: titles, remarks, groups, signatures and the list of systems."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from stllava_eval.errors import printable
from stllava_eval.reports.board_rows import (
    CLOSED,
    OPEN,
    BoardRow,
    questions,
)
from stllava_eval.reports.cells import NOTICE, interval_text, note_text, short_name
from stllava_eval.runs.scores import Scored

SAMPLE = "SAMPLE DATA: these scores say nothing about the official data set."


def signatures(rows: Sequence[BoardRow], columns: Sequence[str]) -> str:
    """Return how each measured system of a task was asked, and the versions of the scores in the columns."""
    how: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.kind == "measured" and row.scores:
            how[next(iter(row.scores.values())).signature.split("|", 2)[2]].append(row.system)
    lines = [f"{printable(', '.join(systems))}: {printable(signature)}" for signature, systems in how.items()]
    versions: dict[str, str] = {}
    for row in rows:
        if row.kind != "reported":
            versions |= {name: f"{name} {score.signature.split('|')[1]}" for name, score in row.scores.items()}
    shown = [versions[name] for name in columns if name in versions]
    return "\n".join([*lines, f"versions: {', '.join(shown)}"]) if lines else ""


def score_text(scored: Scored, details: bool = False) -> str:
    """Return one task's scores for a terminal.

    Args:
        scored: The scores.
        details: Whether to show those of every category too, not only the means over all questions.
    """
    from tabulate import tabulate

    shown = [row for row in scored.rows if details or row.category == "all"]
    body = [
        [*([printable(row.category)] * details), row.metric, interval_text(row), row.n, row.images] for row in shown
    ]
    heads = [*(["questions"] * details), "score", "value [95 %]", "n", "images"]
    table = tabulate(body, heads, tablefmt="simple", disable_numparse=True)
    signature = scored.rows[0].signature.split("|", 2)[2] if scored.rows else ""
    versions: dict[str, list[str]] = defaultdict(list)
    for row in scored.rows:
        if row.category == "all":
            versions[row.signature.split("|")[1]].append(row.metric)
    newer = "; ".join(
        f"{version} of {', '.join(metrics)}" for version, metrics in sorted(versions.items()) if version != "v1"
    )
    versions_line = f"versions: {newer}; v1 of the others\n" if newer else ""
    more = "" if details else "\n--details prints the scores of every category."
    counts = f"unanswered: {len(scored.unanswered)}" + (f", empty: {scored.empty}" if scored.empty else "")
    return f"{table}\n\n{printable(signature)}\n{versions_line}{counts}{more}\n{NOTICE}"


def by_task(rows: Iterable[BoardRow]) -> dict[str, list[BoardRow]]:
    """Return the rows of each task."""
    made: dict[str, list[BoardRow]] = {}
    for row in rows:
        made.setdefault(row.task, []).append(row)
    return made


def by_group(rows: Iterable[BoardRow]) -> dict[str, list[BoardRow]]:
    """Return the rows by their group, in the order in which groups first appear."""
    made: dict[str, list[BoardRow]] = {}
    for row in rows:
        made.setdefault(row.group, []).append(row)
    return made


def title(task: str, rows: Sequence[BoardRow]) -> list[str]:
    """Return the heading of a task's table, and a warning if it is about sample data."""
    line = f"{task} ({rows[0].data})"
    if asked := max((questions(row) for row in rows), key=len):
        open_n, closed_n = (sum(name in scored.scores for scored in asked.values()) for name in (OPEN[0], CLOSED[0]))
        images = len({scored.image_id for scored in asked.values()})
        line += f": {open_n} open + {closed_n} closed questions, {images} images"
    return [line, SAMPLE] if rows[0].data == "sample" else [line]


def remarks(rows: Sequence[BoardRow]) -> list[str]:
    """Return the remarks below a task's table, including the notes on figures."""
    noted = {note_text(row, metric): None for row in rows for metric in row.notes if metric in row.scores}
    return [*board_remarks(rows), *noted]


def board_remarks(rows: Sequence[BoardRow]) -> list[str]:
    """Return the sentences below a board: unanswered and cut questions, and which image controls are lacking."""
    made = []
    for remarks_of in (answered_remarks, reply_remarks):
        for row in rows:
            made += [f"{row.system}: {line}" for line in remarks_of(row)]
    for images in ("other", "black"):
        if lacking := [row.system for row in rows if images in row.not_shown]:
            made.append(
                f"Not run with {images} images, so it is not known how much the right images help them: "
                f"{', '.join(lacking)}. Use `stllava-eval run --images {images}`, or for a server "
                f"`--model_args ...,images={images}`."
            )
    if any(row.about.get("prompt", "").startswith("custom") for row in rows):
        made.append("A prompt called custom is none of our presets; the hash after it identifies its text.")
    return list(dict.fromkeys([*made, *(line for row in rows for line in row.remarks)]))


def answered_remarks(row: BoardRow) -> list[str]:
    """Return how many questions a row was scored on, if these are not all of the split."""
    if row.scored is None:
        return []
    scored, every = len(row.scored.questions), len(row.scored.questions) + len(row.scored.unanswered)
    if scored == every:
        return []
    return [f"scored on {scored} of {every} questions, {row.unanswered} unanswered."]


def reply_remarks(row: BoardRow) -> list[str]:
    """Return remarks on a run's replies: how many were sampled, stopped at a limit, empty, cut off or refusals."""
    if not row.about or row.scored is None:
        return []
    limit = row.about.get("max_new_tokens")
    where = f"the limit of {limit} new tokens." if limit else "their limit of new tokens."
    samples = row.about.get("draws", "1")
    made = [] if samples == "1" else [f"each score is a mean over {samples} sampled replies to a question."]
    made += [f"{row.at_limit} replies were stopped at {where}"] if row.at_limit else []
    made += [f"{row.empty} {'answers are' if row.empty > 1 else 'answer is'} empty."] if row.empty else []
    return made + ([row.scored.doubts] if row.scored.doubts else [])


def system_lines(rows: Sequence[BoardRow]) -> list[list[str]]:
    """Return the heads and a line for each system that was run or reported."""
    made: dict[tuple[str, str], list[BoardRow]] = defaultdict(list)
    for row in rows:
        if row.about:
            made[row.kind, row.system].append(row)
    body = []
    for (kind, system), of_system in made.items():
        about = of_system[0].about
        reported = f"{about.get('table')}; {about.get('source')}"[:48]
        cells = [
            system,
            "image-blind"
            if kind == "blind"
            else f"{kind}, {' or '.join(dict.fromkeys(row.setting for row in of_system))}",
            about.get("checkpoint", reported),
            about.get("sha256", "")[:12],
            about.get("prompt", ""),
            about.get("date", "")[:10],
            about.get("commit", "")[:8],
        ]
        body.append(list(map(short_name, cells)))
    heads = ["system", "", "checkpoint or source", "weights", "prompt", "date", "commit"]
    return [heads, *body] if body else []
