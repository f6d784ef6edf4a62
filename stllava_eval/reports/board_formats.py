"""Write the rows of a leaderboard as text, Markdown, CSV, JSON and LaTeX."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from typing import Any

from stllava_eval.data.catalog import DATASETS
from stllava_eval.errors import InputError, printable
from stllava_eval.reports.board_rows import (
    ACCURACIES,
    BEST,
    CLOSED,
    EQUAL,
    GROUPS,
    OPEN,
    BoardRow,
)
from stllava_eval.reports.cells import (
    NOTICE,
    WORDS,
    cell_text,
    latex,
    latex_cell,
    markdown,
    no_formula,
    note_text,
    raised,
    short_name,
)
from stllava_eval.reports.leaderboard import (
    SAMPLE,
    answered_remarks,
    board_remarks,
    by_group,
    by_task,
    reply_remarks,
    signatures,
    system_lines,
    title,
)
from stllava_eval.runs.scores import ScoreRow, dataset_of
from stllava_eval.scoring.metrics import SCORES
from stllava_eval.storage import json_text

COLUMNS = (*OPEN, "words_open", *CLOSED, "words_closed", "unparsed", "cut")
KNOWN = (*SCORES, *WORDS[1:], *ACCURACIES)
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
        return self.letter(note_text(row, metric)) if metric in row.notes and metric in row.scores else ""

    def cell(self, row: BoardRow, metric: str) -> str:
        """Return a figure with its marks and the letter of its note, for a terminal or Markdown."""
        letter = self.of(row, metric)
        return " ".join(filter(None, (cell_text(row, metric), letter and f"[{letter}]")))

    def lines(self) -> list[str]:
        return [f"[{letter}] {line}" for line, letter in self.letters.items()]


def _letter(number: int) -> str:
    """Return the letters that number a note: a, b, ..., z, aa, ab, ... for 0, 1, ..."""
    more, last = divmod(number, 26)
    return (_letter(more - 1) if more else "") + chr(ord("a") + last)


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
        for group, members in by_group(of_task).items():
            body.append([f"-- {group} --"] + [""] * len(columns))
            body += [[short_name(row.system), *(notes.cell(row, name) for name in columns)] for row in members]
        align = ["left"] + ["right"] * len(columns)
        table = tabulate(body, heads, tablefmt="simple", disable_numparse=True, colalign=align)
        heading = "\n".join(map(printable, title(task, of_task)))
        remarks = [*board_remarks(of_task), *notes.lines()]
        parts += [f"{heading}\n\n{table}", *map(printable, remarks), signatures(of_task, columns)]
    if systems := system_lines(rows):
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
        body = []
        for group, of_group in by_group(of_task).items():
            for row in of_group:
                body.append([markdown(row.system), group, *(markdown(notes.cell(row, name)) for name in columns)])
        lines += [tabulate(body, ["", "", *columns], tablefmt="github", disable_numparse=True), ""]
        lines += [f"- {markdown(line)}" for line in [*board_remarks(of_task), *notes.lines()]] + [""]
    if systems := system_lines(rows):
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
            about = [no_formula(row.about.get(name, "")) for name in (*ABOUT, *SOURCE)]
            marks = [row.unanswered, row.empty, row.marks.get(metric), row.notes.get(metric), score.signature]
            lines.writerow([row.task, row.data, no_formula(row.system), row.group, metric, *figures, *marks, *about])
    return text.getvalue()


def board_json(rows: Sequence[BoardRow], chosen: Sequence[str] = ()) -> dict[str, Any]:
    """Return every number, for programs: shares in [0, 1], and words as numbers; `chosen` as in `board_text`."""
    made = []
    for row in rows:
        # the answers and the scores of every question are in the run folders
        fields = asdict(replace(row, scores=_scores(row, chosen), answers={}, scored=None))
        del fields["answers"], fields["scored"]
        made.append({"group": row.group, **fields})
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
        "board.bib": files("stllava_eval.reports").joinpath("published.bib").read_text(encoding="utf-8"),
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
    for (group, _, _), of_system in sorted(by_system.items(), key=lambda item: GROUPS.index(item[0][0])):
        names = {name for row in of_system.values() for name in row.scores}
        if "closed_llavamed_batch" in names:
            names.add("closed_llavamed")
        if names & set(columns):  # a source may report only the other family
            letters = []
            for row in of_system.values():
                for line in (*answered_remarks(row), *reply_remarks(row)):
                    letters.append(notes.letter(f"{_set_name(row.task)}: {line}"))
            cells = [shown(of_system.get(task), metric) for task in tasks for metric in columns]
            made[group].append(_Line(next(iter(of_system.values())), letters, cells))
    return made


def _set_name(task: str) -> str:
    """Return the data set's name as papers print it, with the prompt that the task adds."""
    name = dataset_of(task)
    return DATASETS[name].title + (f" ({task.removeprefix(name + '_')})" if task != name else "")


def board_latex(rows: Sequence[BoardRow], chosen: Sequence[str] = (), intervals: bool = False) -> str:
    """Return the board as LaTeX tables of published and of clean scores, with the columns of the paper's tables.

    They need the packages booktabs and graphicx.

    Args:
        rows: The rows of a board.
        chosen: Columns of a single table, as `read_columns` returns them.
        intervals: Whether to show the interval of each measured score.
    """
    parts = [f"% {NOTICE} In the preamble: \\usepackage{{booktabs,graphicx}}"]
    parts += [
        f"% {_set_name(task)}: {line}"
        for task, of_task in by_task(rows).items()
        for line in _provenance(of_task, chosen)
    ]
    tables = [_latex_table(rows, family, columns, intervals) for family, columns in _families(chosen).items()]
    return "\n\n".join(["\n".join(parts), *filter(None, tables)]) + "\n"


def _provenance(rows: Sequence[BoardRow], chosen: Sequence[str]) -> list[str]:
    return signatures(rows, _columns(rows, chosen)).splitlines()


def _latex_table(rows: Sequence[BoardRow], family: str, columns: Sequence[str], intervals: bool) -> str:
    tasks, notes = list(by_task(rows)), _Notes()

    def cell(row: BoardRow, metric: str) -> str:
        return latex_cell(row, metric, notes.of(row, metric), intervals)

    sections = _paper_table(rows, columns, cell, r"$^{\ddagger}$", notes)
    if not sections:
        return ""
    per_task = len(columns)
    above = " & ".join(rf"\multicolumn{{{per_task}}}{{c}}{{{latex(_set_name(task))}}}" for task in tasks)
    rules = " ".join(rf"\cmidrule(lr){{{2 + per_task * i}-{1 + per_task * (i + 1)}}}" for i in range(len(tasks)))
    lines = [
        r"\begin{table*}",
        r"\centering",
        r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * per_task * len(tasks)}}}",
        r"\toprule",
        rf" & {above} \\",
        rules,
        " & ".join(["", *map(latex, _heads(columns) * len(tasks))]) + r" \\",
    ]
    for group, members in sections.items():
        lines += [r"\midrule", rf"\multicolumn{{{1 + per_task * len(tasks)}}}{{l}}{{\emph{{{latex(group)}}}}} \\"]
        for line in members:
            lines.append(" & ".join([_latex_name(line.row) + raised(",".join(line.letters)), *line.cells]) + r" \\")
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
