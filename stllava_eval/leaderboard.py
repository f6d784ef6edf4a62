"""The rows of a board -> tables for a terminal, Markdown, CSV, JSON and LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from typing import Any

from stllava_eval.board_rows import (
    ACCURACIES,
    BEST,
    CLOSED,
    EQUAL,
    GROUPS,
    OPEN,
    BoardRow,
    questions,
)
from stllava_eval.board_rows import RANKED as RANKED  # also for the users of this module
from stllava_eval.board_rows import board as board
from stllava_eval.errors import InputError, printable
from stllava_eval.home import json_text
from stllava_eval.metrics import SCORES
from stllava_eval.runs import Scored, ScoreRow, dataset_of

NOTICE = "Research only; not for clinical use."
SAMPLE = "SAMPLE DATA: these scores say nothing about the official data set."


# --- columns and notes ------------------------------------------------------------------------------------------------

WORDS = ("words", "words_open", "words_closed")
COLUMNS = (*OPEN, "words_open", *CLOSED, "words_closed", "unparsed", "cut")
KNOWN = (*SCORES, *WORDS[1:], *ACCURACIES)
SIGNS = {BEST: "*", EQUAL: "~"}
EXPLAINED = (
    "Scores x100 with 95 % intervals clustered by image; words: mean per answer; unparsed: % of closed answers without "
    "a verdict; cut: % of replies that were cut off while the model was thinking, which are never right. "
    f"* {BEST} of the measured rows of one group and prompt that answered the same questions of this score (a row may "
    "lack 1 % of them; all are then compared on the questions that they share); "
    f"~ {EQUAL} (paired test by image, Holm over the column)."
)
Cell = Callable[[BoardRow, str], str]


def read_columns(given: str | None) -> tuple[str, ...]:
    """Return the columns that a comma-separated list names; none for None, so that each output uses its own columns.

    Raises:
        InputError: A name is not that of a score, or appears twice.
    """
    names = tuple(name.strip() for name in given.split(",")) if given is not None else ()
    if unknown := [name for name in names if name not in KNOWN]:
        raise InputError(f"--columns {unknown[0]}: unknown. Known columns: {', '.join(KNOWN)}.")
    if len(set(names)) < len(names):
        raise InputError(f"--columns {given}: a column appears twice. Name each column once.")
    return names


def _columns(rows: Iterable[BoardRow], chosen: Sequence[str]) -> tuple[str, ...]:
    """Return the chosen columns; by default `COLUMNS`, and each accuracy of a paper that a row has."""
    reported = [name for name in ACCURACIES if any(name in row.scores for row in rows)]
    return tuple(chosen) or (*COLUMNS, *reported)


class _Notes:
    """The notes of one table, each with its own letter, in the order in which the table first shows them."""

    def __init__(self) -> None:
        self.letters: dict[str, str] = {}

    def letter(self, line: str) -> str:
        return self.letters.setdefault(line, _letter(len(self.letters)))

    def of(self, row: BoardRow, metric: str) -> str:
        """Return the letter of the note on a figure; empty if it has no note."""
        return self.letter(_note(row, metric)) if metric in row.notes and metric in row.scores else ""

    def cell(self, row: BoardRow, metric: str) -> str:
        """Return a figure with its marks and the letter of its note, for a terminal or Markdown."""
        letter = self.of(row, metric)
        return " ".join(filter(None, (_cell(row, metric), letter and f"[{letter}]")))

    def lines(self) -> list[str]:
        return [f"[{letter}] {line}" for line, letter in self.letters.items()]


def _letter(number: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    more, last = divmod(number, 26)
    return (_letter(more - 1) if more else "") + chr(ord("a") + last)


def _note(row: BoardRow, metric: str) -> str:
    return f"{row.system} ({row.about['table']}): {row.notes[metric]}"


# --- the board as text ------------------------------------------------------------------------------------------------


def board_text(rows: Sequence[BoardRow], chosen: Sequence[str] = ()) -> str:
    """Return the board for a terminal, one table per task.

    Args:
        rows: The rows of a board.
        chosen: Columns, as `read_columns` returns them.
    """
    from tabulate import tabulate

    parts = []
    for task, of_task in by_task(rows).items():
        columns, notes = _columns(of_task, chosen), _Notes()
        heads = ["", *(name.replace("_", "\n", 1) for name in columns)]  # two lines each, or the table is too wide
        body = []
        for group, members in _by_group(of_task).items():
            body.append([f"-- {group} --"] + [""] * len(columns))
            body += [[_plain(row.system), *(notes.cell(row, name) for name in columns)] for row in members]
        align = ["left"] + ["right"] * len(columns)
        table = tabulate(body, heads, tablefmt="simple", disable_numparse=True, colalign=align)
        heading = "\n".join(map(printable, title(task, of_task)))
        told = [*_remarks(of_task), *notes.lines()]
        parts += [f"{heading}\n\n{table}", *map(printable, told), signatures(of_task, columns)]
    if systems := _systems(rows):
        parts.append(tabulate(systems[1:], systems[0], tablefmt="simple", disable_numparse=True))
    return "\n\n".join([*filter(None, parts), f"{EXPLAINED}\n{NOTICE}"])


def board_markdown(rows: Sequence[BoardRow], chosen: Sequence[str] = ()) -> str:
    """Return the board as Markdown: the columns of the paper's tables, then all columns of each task, then the systems.

    Args:
        rows: The rows of a board.
        chosen: Columns of all tables but the last, as `read_columns` returns them.
    """
    from tabulate import tabulate

    lines = ["# Leaderboard", "", f"**{NOTICE}**", ""]
    for family, metrics in _families(chosen).items():
        notes = _Notes()
        sections = _paper_table(rows, metrics, notes.cell, " ‡", notes)
        if not sections:
            continue
        heads = ["", *(f"{task} {head}" for task in by_task(rows) for head in _heads(metrics))]
        lines += [f"## {family}", ""]
        body = []
        for group, members in sections.items():
            body.append([f"**{group}**"] + [""] * (len(heads) - 1))
            for line in members:
                name = " ".join([line.row.system, *(f"[{letter}]" for letter in line.letters)])
                body.append([markdown(name), *map(markdown, line.cells)])
        lines += [tabulate(body, heads, tablefmt="github", disable_numparse=True), ""]
        lines += [f"{markdown(note)}\n" for note in notes.lines()]
        if any("‡" in cell for of_row in body for cell in of_row):
            lines += [f"‡ {markdown(BATCH)}", ""]
    for task, of_task in by_task(rows).items():
        columns, notes = _columns(of_task, chosen), _Notes()
        heading, *more = title(task, of_task)
        lines += [f"## {markdown(heading)}", "", *(f"{markdown(line)}\n" for line in more)]
        body = [
            [markdown(row.system), group, *(markdown(notes.cell(row, name)) for name in columns)]
            for group, members in _by_group(of_task).items()
            for row in members
        ]
        lines += [tabulate(body, ["", "", *columns], tablefmt="github", disable_numparse=True), ""]
        lines += [f"- {markdown(line)}" for line in [*_remarks(of_task), *notes.lines()]] + [""]
    if systems := _systems(rows):
        body = [[markdown(cell) for cell in line] for line in systems[1:]]
        lines += ["## Systems", "", tabulate(body, systems[0], tablefmt="github", disable_numparse=True), ""]
    return "\n".join([*lines, EXPLAINED.replace("*", r"\*").replace("~", r"\~"), ""])


ABOUT = ("model", "checkpoint", "sha256", "prompt", "images", "preprocessing", "decoding", "dtype", "date", "commit")
SOURCE = ("source", "table", "row")


def board_csv(rows: Sequence[BoardRow], chosen: Sequence[str] = ()) -> str:
    """Return a CSV line for each score of each system, with how the row was made; `chosen` as in `board_text`."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    heads = ["task", "data", "system", "group", "metric", "value", "low", "high", "n", "images_asked", "unanswered"]
    lines.writerow([*heads, "empty", "mark", "note", "signature", *ABOUT, *SOURCE])
    for row in rows:
        for metric, score in _scores(row, chosen).items():
            figures = [score.value, score.low, score.high, score.n or None, score.images or None]
            about = [_no_formula(row.about.get(name, "")) for name in (*ABOUT, *SOURCE)]
            marks = [row.unanswered, row.empty, row.marks.get(metric), row.notes.get(metric), score.signature]
            lines.writerow([row.task, row.data, _no_formula(row.system), row.group, metric, *figures, *marks, *about])
    return text.getvalue()


def board_json(rows: Sequence[BoardRow], chosen: Sequence[str] = ()) -> dict[str, Any]:
    """Return every number, for programs: shares in [0, 1], and words as numbers; `chosen` as in `board_text`."""
    made = [
        {"group": row.group}
        | {
            name: value
            for name, value in asdict(replace(row, scores=_scores(row, chosen), answers={}, scored=None)).items()
            if name not in ("answers", "scored")
        }
        for row in rows
    ]
    return {"format": 1, "rows": made, "notice": NOTICE}


def _scores(row: BoardRow, chosen: Sequence[str]) -> dict[str, ScoreRow]:
    return {name: row.scores[name] for name in chosen if name in row.scores} if chosen else row.scores


def board_files(rows: Sequence[BoardRow], chosen: Sequence[str] = (), intervals: bool = False) -> dict[str, str]:
    """Return the board's files by name: Markdown, CSV, JSON, LaTeX, and the sources that the LaTeX tables cite.

    Args:
        rows: The rows of a board.
        chosen: Columns, as `read_columns` returns them.
        intervals: Whether the LaTeX tables show intervals.
    """
    return {
        "board.md": board_markdown(rows, chosen),
        "board.csv": board_csv(rows, chosen),
        "board.json": json_text(board_json(rows, chosen)),
        "board.tex": board_latex(rows, chosen, intervals),
        "board.bib": files("stllava_eval").joinpath("published.bib").read_text(encoding="utf-8"),
    }


# --- the paper's tables -----------------------------------------------------------------------------------------------

BATCH = "By the batch rule (closed_llavamed_batch), which is the one that its source reports."
FAMILIES: dict[str, tuple[str, ...]] = {
    "Published scores": ("recall_llavamed", "f1_llavamed", "closed_llavamed"),
    "Clean scores": ("recall", "f1", "closed_accuracy"),
}
HEADS = {  # as the paper prints them
    **dict.fromkeys(("recall_llavamed", "recall"), "Recall"),
    **dict.fromkeys(("f1_llavamed", "f1"), "F1"),
    **dict.fromkeys(("closed_llavamed", "closed_llavamed_batch", "closed_accuracy"), "Closed"),
    "words": "Words",
    "words_open": "Words, open",
    "words_closed": "Words, closed",
    "unparsed": "Unparsed",
    "cut": "Cut",
    "accuracy_open_reported": "Accuracy, open",
    "accuracy_closed_reported": "Accuracy, closed",
}


def _families(chosen: Sequence[str]) -> dict[str, tuple[str, ...]]:
    return {"Scores": tuple(chosen)} if chosen else FAMILIES


def _heads(columns: Sequence[str]) -> list[str]:
    """Return the head of each column: as the paper prints it, or the score's name if two heads would be alike."""
    short = [HEADS.get(name, name) for name in columns]
    return [head if short.count(head) == 1 else name for head, name in zip(short, columns, strict=True)]


@dataclass(frozen=True)
class _Line:
    """One system in a table like the paper's: the letters of its notes, and its cells."""

    row: BoardRow  # the system's row of one of the tasks
    letters: list[str]
    cells: list[str]


def _paper_table(
    rows: Sequence[BoardRow], columns: Sequence[str], cell: Cell, batch: str, notes: _Notes
) -> dict[str, list[_Line]]:
    """Return, by group, a line for each system that has one of the scores, with the columns of each task.

    If a source reports only the batch rule, its figure is shown under `closed_llavamed`, with the sign `batch`.
    """
    tasks = list(by_task(rows))
    by_system: dict[tuple[str, str, str], dict[str, BoardRow]] = defaultdict(dict)
    for row in rows:
        by_system[row.group, row.system, row.about.get("table", "")][row.task] = row

    def shown(row: BoardRow | None, metric: str) -> str:
        if row is None:
            return "-"
        if metric == "closed_llavamed" and metric not in row.scores and "closed_llavamed_batch" in row.scores:
            return cell(row, "closed_llavamed_batch") + batch
        return cell(row, metric)

    made: dict[str, list[_Line]] = defaultdict(list)
    for (group, _, _), of_system in sorted(by_system.items(), key=lambda one: GROUPS.index(one[0][0])):
        names = {name for row in of_system.values() for name in row.scores}
        if "closed_llavamed_batch" in names:
            names.add("closed_llavamed")
        if names & set(columns):  # a source may report only the other family
            letters = [
                notes.letter(f"{_set_name(row.task)}: {line}")
                for row in of_system.values()
                for line in (*_answered(row), *stopped(row))
            ]
            cells = [shown(of_system.get(task), metric) for task in tasks for metric in columns]
            made[group].append(_Line(next(iter(of_system.values())), letters, cells))
    return made


SETS = {"vqarad": "VQA-RAD", "slake": "SLAKE", "pathvqa": "PathVQA"}


def _set_name(task: str) -> str:
    """Return the data set's name as papers print it, with the prompt that the task adds."""
    name = dataset_of(task)
    return SETS[name] + (f" ({task.removeprefix(name + '_')})" if task != name else "")


def board_latex(rows: Sequence[BoardRow], chosen: Sequence[str] = (), intervals: bool = False) -> str:
    """Return the board as LaTeX tables of published and of clean scores, with the columns of the paper's tables.

    They need the packages booktabs and graphicx.

    Args:
        rows: The rows of a board.
        chosen: Columns of a single table, as `read_columns` returns them.
        intervals: Whether to show the interval of each measured score.
    """
    parts = [f"% {NOTICE} In the preamble: \\usepackage{{booktabs,graphicx}}"]
    parts += [f"% {_set_name(task)}: {line}" for task, of in by_task(rows).items() for line in _provenance(of, chosen)]
    tables = [_latex_table(rows, family, columns, intervals) for family, columns in _families(chosen).items()]
    return "\n\n".join(["\n".join(parts), *filter(None, tables)]) + "\n"


def _provenance(rows: Sequence[BoardRow], chosen: Sequence[str]) -> list[str]:
    return signatures(rows, _columns(rows, chosen)).splitlines()


def _latex_table(rows: Sequence[BoardRow], family: str, columns: Sequence[str], intervals: bool) -> str:
    tasks, notes = list(by_task(rows)), _Notes()

    def cell(row: BoardRow, metric: str) -> str:
        return _latex_cell(row, metric, notes.of(row, metric), intervals)

    sections = _paper_table(rows, columns, cell, r"$^{\ddagger}$", notes)
    if not sections:
        return ""
    of_each = len(columns)
    above = " & ".join(rf"\multicolumn{{{of_each}}}{{c}}{{{latex(_set_name(task))}}}" for task in tasks)
    rules = " ".join(rf"\cmidrule(lr){{{2 + of_each * i}-{1 + of_each * (i + 1)}}}" for i in range(len(tasks)))
    lines = [
        r"\begin{table*}",
        r"\centering",
        r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * of_each * len(tasks)}}}",
        r"\toprule",
        rf" & {above} \\",
        rules,
        " & ".join(["", *map(latex, _heads(columns) * len(tasks))]) + r" \\",
    ]
    for group, members in sections.items():
        lines += [r"\midrule", rf"\multicolumn{{{1 + of_each * len(tasks)}}}{{l}}{{\emph{{{latex(group)}}}}} \\"]
        for line in members:
            lines.append(" & ".join([_latex_name(line.row) + _raised(",".join(line.letters)), *line.cells]) + r" \\")
    caption = _caption(rows, family, columns, intervals, "".join(lines), notes)
    lines += [r"\bottomrule", r"\end{tabular}}", rf"\caption{{{caption}}}", r"\end{table*}"]
    return "\n".join(lines)


def _caption(
    rows: Sequence[BoardRow], family: str, columns: Sequence[str], intervals: bool, table: str, notes: _Notes
) -> str:
    """Return the caption: what the table shows, and the meaning of each mark in it."""
    named = {head: name for head, name in zip(_heads(columns), columns, strict=True) if head.lower() != name}
    parts = [f"{family}, " + r"$\times 100$"]
    parts[0] += ", words per answer" if set(columns) & set(WORDS) else ""
    parts[0] += r", with 95\,\% intervals" if intervals else ""
    parts[0] += f" ({latex('; '.join(f'{head}: {name}' for head, name in named.items()))})." if named else "."
    if any(row.data == "sample" for row in rows):
        parts.append(latex(SAMPLE))
    if r"\textbf" in table:
        parts.append("Bold: best of the measured rows of its group and prompt.")
    if r"\sim" in table:
        parts.append(r"$\sim$: not distinguishable from that one.")
    if r"\ddagger" in table:
        parts.append(rf"$\ddagger$: {latex(BATCH)}")
    parts += [rf"$^{{{letter}}}$ {latex(line)}" for line, letter in notes.letters.items()]
    return " ".join([*parts, latex(NOTICE)])


def _latex_name(row: BoardRow) -> str:
    cited = row.about.get("cite")
    return latex(row.system) + (rf"~\cite{{{cited}}}" if cited else "")


def _raised(letters: str) -> str:
    return rf"$^{{{letters}}}$" if letters else ""


def signatures(rows: Sequence[BoardRow], columns: Sequence[str]) -> str:
    """Return how each measured system of a task was asked, and the versions of the scores in the columns."""
    how: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.kind == "measured" and row.scores:
            how[next(iter(row.scores.values())).signature.split("|", 2)[2]].append(row.system)
    lines = [f"{printable(', '.join(systems))}: {printable(signature)}" for signature, systems in how.items()]
    versions = {
        name: f"{name} {of.signature.split('|')[1]}"
        for row in rows
        if row.kind != "reported"
        for name, of in row.scores.items()
    }
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
    body = [[*([printable(row.category)] * details), row.metric, _score(row), row.n, row.images] for row in shown]
    heads = [*(["questions"] * details), "score", "value [95 %]", "n", "images"]
    table = tabulate(body, heads, tablefmt="simple", disable_numparse=True)
    signature = scored.rows[0].signature.split("|", 2)[2] if scored.rows else ""
    versions: dict[str, list[str]] = defaultdict(list)
    for row in scored.rows:
        if row.category == "all":
            versions[row.signature.split("|")[1]].append(row.metric)
    newer = "; ".join(f"{version} of {', '.join(of)}" for version, of in sorted(versions.items()) if version != "v1")
    told = f"versions: {newer}; v1 of the others\n" if newer else ""
    more = "" if details else "\n--details prints the scores of every category."
    counts = f"unanswered: {len(scored.unanswered)}" + (f", empty: {scored.empty}" if scored.empty else "")
    return f"{table}\n\n{printable(signature)}\n{told}{counts}{more}\n{NOTICE}"


def by_task(rows: Iterable[BoardRow]) -> dict[str, list[BoardRow]]:
    """Return the rows of each task."""
    made: dict[str, list[BoardRow]] = {}
    for row in rows:
        made.setdefault(row.task, []).append(row)
    return made


def _by_group(rows: Iterable[BoardRow]) -> dict[str, list[BoardRow]]:
    made: dict[str, list[BoardRow]] = {}
    for row in rows:
        made.setdefault(row.group, []).append(row)
    return made


def title(task: str, rows: Sequence[BoardRow]) -> list[str]:
    """Return the heading of a task's table, and a warning if it is about sample data."""
    line = f"{task} ({rows[0].data})"
    if asked := max((questions(row) for row in rows), key=len):
        open_n, closed_n = (sum(name in of.scores for of in asked.values()) for name in (OPEN[0], CLOSED[0]))
        images = len({of.image_id for of in asked.values()})
        line += f": {open_n} open + {closed_n} closed questions, {images} images"
    return [line, SAMPLE] if rows[0].data == "sample" else [line]


def remarks(rows: Sequence[BoardRow]) -> list[str]:
    """Return the remarks below a task's table, including the notes on figures."""
    noted = {_note(row, metric): None for row in rows for metric in row.notes if metric in row.scores}
    return [*_remarks(rows), *noted]


def _remarks(rows: Sequence[BoardRow]) -> list[str]:
    made = [f"{row.system}: {line}" for row in rows for line in _answered(row)]
    made += [f"{row.system}: {line}" for row in rows for line in stopped(row)]
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


def _answered(row: BoardRow) -> list[str]:
    """Return how many questions a row was scored on, if these are not all of the split."""
    if row.scored is None:
        return []
    scored, every = len(row.scored.questions), len(row.scored.questions) + len(row.scored.unanswered)
    if scored == every:
        return []
    return [f"scored on {scored} of {every} questions, {row.unanswered} unanswered."]


def stopped(row: BoardRow) -> list[str]:
    """Return remarks on a run's replies: how many were sampled, stopped at a limit, empty, cut off or refusals."""
    if not row.about or row.scored is None:
        return []
    limit = row.about.get("max_new_tokens")
    where = f"the limit of {limit} new tokens." if limit else "their limit of new tokens."
    draws = row.about.get("draws", "1")
    made = [] if draws == "1" else [f"each score is a mean over {draws} sampled replies to a question."]
    made += [f"{row.at_limit} replies were stopped at {where}"] if row.at_limit else []
    made += [f"{row.empty} {'answers are' if row.empty > 1 else 'answer is'} empty."] if row.empty else []
    return made + ([row.scored.doubts] if row.scored.doubts else [])


def _systems(rows: Sequence[BoardRow]) -> list[list[str]]:
    """Return the heads and a line for each system that was run or reported."""
    made: dict[tuple[str, str], list[BoardRow]] = defaultdict(list)
    for row in rows:
        if row.about:
            made[row.kind, row.system].append(row)
    body = []
    for (kind, system), of in made.items():
        about = of[0].about
        reported = f"{about.get('table')}; {about.get('source')}"[:48]
        cells = [
            system,
            "image-blind" if kind == "blind" else f"{kind}, {' or '.join(dict.fromkeys(row.setting for row in of))}",
            about.get("checkpoint", reported),
            about.get("sha256", "")[:12],
            about.get("prompt", ""),
            about.get("date", "")[:10],
            about.get("commit", "")[:8],
        ]
        body.append(list(map(_plain, cells)))
    heads = ["system", "", "checkpoint or source", "weights", "prompt", "date", "commit"]
    return [heads, *body] if body else []


def _cell(row: BoardRow, metric: str) -> str:
    score = row.scores.get(metric)
    return "-" if score is None else f"{_score(score)} {SIGNS.get(row.marks.get(metric, ''), '')}".rstrip()


def _score(score: ScoreRow) -> str:
    if score.low is None or score.high is None or score.metric in (*WORDS, "unparsed", "cut"):
        return mean_text(score)
    return f"{mean_text(score)} [{100 * score.low:.0f}, {100 * score.high:.0f}]"


def mean_text(score: ScoreRow) -> str:
    """Return a mean as every board, file and page shows it.

    Shares are multiplied by 100 and have two decimals; words, and accuracies of papers, have one.
    """
    if score.value is None:
        return "-"
    if score.metric in WORDS:
        return f"{score.value:.1f}"
    return f"{100 * score.value:.{1 if score.metric in ACCURACIES else 2}f}"  # the papers print one decimal


def _latex_cell(row: BoardRow, metric: str, letter: str, interval: bool) -> str:
    score = row.scores.get(metric)
    if score is None or score.value is None:
        return "-"
    value = mean_text(score)
    if row.marks.get(metric) == BEST:
        value = rf"\textbf{{{value}}}"
    if row.marks.get(metric) == EQUAL:
        value = rf"{value}$^{{\sim}}$"
    value += _raised(letter)
    if not interval or score.low is None or score.high is None or metric in WORDS:
        return value
    return rf"{value} {{\scriptsize [{100 * score.low:.0f}, {100 * score.high:.0f}]}}"


def _plain(text: str) -> str:
    """Return a text on one line of at most 48 characters; a longer one loses its beginning."""
    text = printable(text)
    return text if len(text) <= 48 else f"...{text[-45:]}"


def _no_formula(text: str) -> str:
    """Make a text printable, and quote it if a spreadsheet would take it for a formula."""
    text = printable(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def markdown(text: str) -> str:
    """Escape a text for Markdown and HTML: it is on one line, and nothing in it formats, links or starts a cell."""
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = text.replace("@", "&#64;").replace("://", ":&#47;&#47;")  # GitHub makes links of names and addresses
    return re.sub(r"([\\`*_{}\[\]()|~!$]|(?<!&)#)", r"\\\1", text)


_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    **dict.fromkeys("«»ÐÞðþ", "?"),  # Latin, but not in the encoding that LaTeX takes by default
}


def latex(text: str) -> str:
    """Escape a text for pdfLaTeX; characters that are not Latin become `?`, and straight quotes become typographic."""
    plain = printable(text).encode("latin-1", "replace").decode("latin-1")
    parts = "".join(_LATEX.get(sign, sign) for sign in plain).split('"')
    return (parts[0] + "".join(("''" if number % 2 else "``") + part for number, part in enumerate(parts[1:]))).replace(
        "--",
        "-{}-{}",  # not a dash
    )
