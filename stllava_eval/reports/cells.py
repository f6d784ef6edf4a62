"""Format single scores and names of a leaderboard as text, Markdown or LaTeX."""

from __future__ import annotations

import re

from stllava_eval.errors import printable
from stllava_eval.reports.board_rows import (
    ACCURACIES,
    BEST,
    EQUAL,
    BoardRow,
)
from stllava_eval.runs.scores import ScoreRow

NOTICE = "Research only; not for clinical use."


# --- columns and notes ------------------------------------------------------------------------------------------------

WORDS = ("words", "words_open", "words_closed")
SIGNS = {BEST: "*", EQUAL: "~"}


def note_text(row: BoardRow, metric: str) -> str:
    """Return a reported score's note with the system and the table it is from."""
    return f"{row.system} ({row.about['table']}): {row.notes[metric]}"


def raised(letters: str) -> str:
    """Return LaTeX of superscript letters; nothing for none."""
    return rf"$^{{{letters}}}$" if letters else ""


def cell_text(row: BoardRow, metric: str) -> str:
    """Return a score with its interval and its mark, or `-` where the row has none."""
    score = row.scores.get(metric)
    return "-" if score is None else f"{interval_text(score)} {SIGNS.get(row.marks.get(metric, ''), '')}".rstrip()


def interval_text(score: ScoreRow) -> str:
    """Return a mean with its 95 % interval, where the score has one."""
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


def latex_cell(row: BoardRow, metric: str, letter: str, interval: bool) -> str:
    """Return a score as LaTeX, with its mark, a note's letter and, if asked, its interval."""
    score = row.scores.get(metric)
    if score is None or score.value is None:
        return "-"
    value = mean_text(score)
    if row.marks.get(metric) == BEST:
        value = rf"\textbf{{{value}}}"
    if row.marks.get(metric) == EQUAL:
        value = rf"{value}$^{{\sim}}$"
    value += raised(letter)
    if not interval or score.low is None or score.high is None or metric in WORDS:
        return value
    return rf"{value} {{\scriptsize [{100 * score.low:.0f}, {100 * score.high:.0f}]}}"


def short_name(text: str) -> str:
    """Return a text on one line of at most 48 characters (our choice); a longer one loses its beginning."""
    text = printable(text)
    return text if len(text) <= 48 else f"...{text[-45:]}"


def no_formula(text: str) -> str:
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
