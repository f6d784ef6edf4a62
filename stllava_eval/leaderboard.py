"""Run folders, published rows -> a board beside image-blind baselines, every measured mean with n and its interval."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from stllava_eval.errors import InputError, printable
from stllava_eval.runs import (
    DECIDING,
    NOT_RECORDED,
    QuestionScores,
    Run,
    RunTask,
    Scored,
    ScoreRow,
    dataset_of,
    labels,
    open_run,
    refuse_other_split,
    score_table,
)

OPEN = ("recall_llavamed", "f1_llavamed", "recall", "f1")
CLOSED = ("closed_llavamed", "closed_llavamed_batch", "closed_accuracy")
RANKED = (*OPEN, *CLOSED)
NOTICE = "Research only; not for clinical use."
SAMPLE = "SAMPLE DATA: these scores say nothing about the official data set."
SETTINGS = ("zero-shot", "fine-tuned", "training not recorded")
PAPER_GROUPS = ("zero-shot, without Med-IM", "zero-shot, with Med-IM")  # the two groups of the paper's Table 2
GROUPS = (
    *(f"measured, {setting}" for setting in SETTINGS),
    *(f"reported, {setting}" for setting in (*PAPER_GROUPS, *SETTINGS[:2])),
    "image-blind",
)
BEST, EQUAL = "best", "not distinguishable from the best"
FEW = 0.01  # share of a score's questions that a row may lack and still be compared on the others (our choice)


@dataclass(frozen=True)
class BoardRow:
    """One system on one task: its scores over all questions, by metric."""

    task: str
    system: str
    kind: Literal["measured", "reported", "blind"]
    setting: str
    """One of `SETTINGS`, whether the system has learnt from this data set; of a reported row `PAPER_GROUPS` too."""
    data: str  # "official", "sample", or the edition's name
    scores: dict[str, ScoreRow]
    unanswered: int
    marks: dict[str, str] = field(default_factory=dict)
    """By metric `BEST`, or `EQUAL`: a paired test, adjusted over the column, finds no difference from the best."""
    about: dict[str, str] = field(default_factory=dict)
    """What the row rests on: checkpoint, its hash, prompt, date, ...; of a reported row its source."""
    notes: dict[str, str] = field(default_factory=dict)
    """Of a reported row's figures, by metric."""
    answers: Mapping[str, str] = field(default_factory=dict)
    """By question id; none of a reported row."""
    scored: Scored | None = None
    """Everything that the scores are made of; None of a reported row."""
    at_limit: int = 0
    """Replies that were stopped at their limit of new tokens."""

    @property
    def group(self) -> str:
        """One of `GROUPS`."""
        return "image-blind" if self.kind == "blind" else f"{self.kind}, {self.setting}"


def board(
    runs: Sequence[Path], tasks: Sequence[str] | None = None, published: bool = False, progress: bool = False
) -> list[BoardRow]:
    """The rows of each task in the order of `GROUPS`, runs in the order given.

    A run that did not ask every question of a task (`--limit`) is scored on those it asked, so its n is smaller. A run
    that was shown black or other images stands among the image-blind rows.

    Args:
        runs: Run folders.
        tasks: Default: those of the runs, else all that are prepared.
        published: Reported rows too, where the official split is what was asked.
        progress: Whether to show a bar on stderr.

    Raises:
        InputError: A folder is no run, or a task's test split is not prepared or has changed since the run.
    """
    from tqdm import tqdm

    from stllava_eval.blind import blind_answers
    from stllava_eval.datasets import DATASETS, read_manifest

    read = _named({name: open_run(folder) for name, folder in zip(labels(runs), runs, strict=True)})
    if tasks and len(set(tasks)) < len(tasks):
        raise InputError(f"{', '.join(tasks)}: a task is named twice. Name each once.")
    for run in read.values():
        if tasks and not set(tasks) & run.tasks.keys():
            raise InputError(f"{run.folder}: it has none of {', '.join(tasks)}. Leave it out, or name its tasks too.")
    if tasks is None:
        tasks = list(dict.fromkeys(task for run in read.values() for task in run.tasks))
    if not tasks:
        tasks = [name for name in DATASETS if _is_prepared(name)]
    if not tasks:
        raise InputError("no data is prepared. Run `stllava-eval prepare --sample`, or prepare an official split.")
    rows: list[BoardRow] = []
    asked = sum(task in run.tasks for task in tasks for run in read.values())
    bar = tqdm(total=asked, desc="scoring", disable=not progress)
    for task in tasks:
        prepared = read_manifest(dataset_of(task), "test")
        data = "sample" if prepared.sample else "official" if prepared.official else prepared.edition
        of_task: list[BoardRow] = []
        for name, run in read.items():
            if task not in run.tasks:
                continue
            of = run.tasks[task]
            refuse_other_split(task, of, run.folder)
            scored = score_table(task, of.replies, of.prompt, of.settings)
            of_task.append(_measured(task, name, data, of, run.manifest, scored))
            bar.update()
        of_task = _marked(of_task)
        if published and data == "official":
            of_task += _published(task)
        for label, blind in blind_answers(dataset_of(task)).items():
            scored = score_table(task, blind)
            of_task.append(BoardRow(task, label, "blind", "", data, _overall(scored), 0, answers=blind, scored=scored))
        names = [row.system for row in of_task if row.kind != "reported"]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"{twice[0]}: two rows of {task} would have this name. Rename a run folder.")
        rows += sorted(of_task, key=lambda row: GROUPS.index(row.group))
    bar.close()
    return rows


def _named(runs: Mapping[str, Run]) -> dict[str, Run]:
    """The runs by the name of their system, where `score --system` gave one, else by their folder's."""
    given = [str(run.manifest.get("named") or label) for label, run in runs.items()]
    return {
        name if given.count(name) == 1 else f"{name} ({label})" if name != label else name: run
        for name, (label, run) in zip(given, runs.items(), strict=True)
    }


def _measured(task: str, name: str, data: str, of: RunTask, manifest: Mapping[str, Any], scored: Scored) -> BoardRow:
    checkpoint = manifest["checkpoint"]
    learnt = checkpoint.get("trained_on")
    own = f"{dataset_of(task)} sample" if data == "sample" else dataset_of(task)
    setting = SETTINGS[2] if learnt is None else SETTINGS[1] if own in learnt else SETTINGS[0]
    images = str(manifest.get("images") or "own")
    unknown = images == NOT_RECORDED
    about = {
        "model": manifest.get("model"),
        "checkpoint": checkpoint["name"],
        "sha256": checkpoint.get("sha256"),
        "prompt": of.prompt,
        "images": images,
        "preprocessing": manifest.get("image_preprocessing"),
        "decoding": manifest.get("decoding"),
        **{name: of.settings[name] for name in DECIDING if name in of.settings and name not in ("images", "decoding")},
        "dtype": manifest.get("dtype"),
        "date": manifest.get("date"),
        "commit": manifest.get("commit"),
    }
    return BoardRow(
        task,
        name if images == "own" else f"{name} (images {NOT_RECORDED})" if unknown else f"{name} ({images} images)",
        "measured" if images == "own" or unknown else "blind",
        setting,
        data,
        _overall(scored),
        len(scored.unanswered) - of.not_asked,
        about={key: str(value) for key, value in about.items() if value},
        answers=of.answers,
        scored=scored,
        at_limit=of.at_limit or 0,
    )


def _overall(scored: Scored) -> dict[str, ScoreRow]:
    return {row.metric: row for row in scored.rows if row.category == "all"}


def _marked(rows: Sequence[BoardRow]) -> list[BoardRow]:
    """Return the rows with `marks`: of measured rows of one setting, prompt and rule, score by score.

    A score's rivals are the rows that answered the same questions *that have it*: whoever left out open questions is a
    rival all the same in closed ones. A row that lacks `FEW` of the questions of the fullest one, or fewer, is a rival
    too, on the questions that all of them answered.
    """
    from stllava_eval.statistics import holm, sign_flips

    marks: dict[str, dict[str, str]] = defaultdict(dict)
    alike = defaultdict(list)
    for row in rows:
        if row.kind == "measured":
            alike[row.setting, row.about["prompt"], row.about["images"], row.about.get("extract")].append(row)
    for members in alike.values():
        for metric in RANKED:
            for asked, rivals in _rivals(members, metric):
                scores = {row.system: [questions(row)[id].scores[metric] for id in asked] for row in rivals}
                means = {system: math.fsum(of) for system, of in scores.items()}
                top = max(means.values())
                best = next(system for system, mean in means.items() if mean == top)
                others = [system for system, mean in means.items() if mean < top]
                images = [questions(rivals[0])[id].image_id for id in asked]
                columns = [
                    [first - second for first, second in zip(scores[best], scores[system], strict=True)]
                    for system in others
                ]
                for system in means.keys() - set(others):
                    marks[system][metric] = BEST
                for system, p in zip(others, holm(sign_flips(columns, images)), strict=True):
                    if p >= 0.05:
                        marks[system][metric] = EQUAL
    return [replace(row, marks=marks[row.system]) if row.kind == "measured" else row for row in rows]


def _rivals(rows: Sequence[BoardRow], metric: str) -> list[tuple[list[str], list[BoardRow]]]:
    """Groups of two rows or more that answered the same questions of a score, but for `FEW`, with what all answered."""
    groups: list[tuple[set[str], list[BoardRow]]] = []
    answered = {row.system: {id for id, of in questions(row).items() if metric in of.scores} for row in rows}
    for row in sorted(rows, key=lambda row: -len(answered[row.system])):
        own = answered[row.system]
        for fullest, members in groups:
            if len(fullest ^ own) <= FEW * len(fullest):
                members.append(row)
                break
        else:
            if own:
                groups.append((own, [row]))
    made = []
    for _, members in groups:
        if len(members) > 1:
            common = set.intersection(*(answered[row.system] for row in members))
            made.append(([id for id in questions(members[0]) if id in common], members))
    return made


def questions(row: BoardRow) -> dict[str, QuestionScores]:
    """The scores of each question that a row's system answered, by id; none of a reported row."""
    return row.scored.questions if row.scored else {}


def _published(task: str) -> list[BoardRow]:
    """The reported rows of a task in the paper's prompt; see published.json."""
    rows = json.loads(files("stllava_eval").joinpath("published.json").read_text(encoding="utf-8"))["rows"]
    made = []
    for row in rows:
        cells = {metric: value for metric, value in row["scores"].get(task, {}).items() if value is not None}
        if not cells:
            continue
        signature = f"reported|{row['source']}"
        made.append(
            BoardRow(
                task,
                row["system"],
                "reported",
                ", ".join(filter(None, (row["setting"], row["training"]))),
                "official",
                {
                    metric: ScoreRow(task, metric, f"{metric}|{signature}", "all", value / 100, 0, 0, None, None)
                    for metric, value in cells.items()
                },
                0,
                about={"source": row["source"], "table": row["table"], "row": row["row"]},
                notes={place.split()[1]: note for place, note in row["notes"].items() if place.split()[0] == task},
            )
        )
    return made


# --- the board as text ------------------------------------------------------------------------------------------------

COLUMNS = (*OPEN, "words", *CLOSED, "unparsed", "cut")
SIGNS = {BEST: "*", EQUAL: "~"}
EXPLAINED = (
    "Scores x100 with 95 % intervals clustered by image; words: mean per answer; unparsed: % of closed answers without "
    "a verdict; cut: % of replies that stopped inside their thought, which are never right. "
    f"* {BEST} of the measured rows of one group and prompt that answered the same questions of this score (1 % may be "
    f"missing, and is left out); ~ {EQUAL} (paired test by image, Holm over the column)."
)
Cell = Callable[[BoardRow, str], str]


def board_text(rows: Sequence[BoardRow]) -> str:
    """The board for a terminal, one table a task."""
    from tabulate import tabulate

    heads = ["", *(name.replace("_", "\n", 1) for name in COLUMNS)]  # two lines each, or the table is too wide
    parts = []
    for task, of_task in by_task(rows).items():
        body = []
        for group, members in _by_group(of_task).items():
            body.append([f"-- {group} --"] + [""] * len(COLUMNS))
            body += [[_plain(row.system), *(_cell(row, name) for name in COLUMNS)] for row in members]
        table = tabulate(
            body, heads, tablefmt="simple", disable_numparse=True, colalign=["left"] + ["right"] * len(COLUMNS)
        )
        heading = "\n".join(map(printable, title(task, of_task)))
        parts += [f"{heading}\n\n{table}", *map(printable, remarks(of_task)), signatures(of_task)]
    if systems := _systems(rows):
        parts.append(tabulate(systems[1:], systems[0], tablefmt="simple", disable_numparse=True))
    return "\n\n".join([*filter(None, parts), f"{EXPLAINED}\n{NOTICE}"])


def board_markdown(rows: Sequence[BoardRow]) -> str:
    """The board as Markdown: the columns of the paper's tables, then every column of each task, then the systems."""
    from tabulate import tabulate

    lines = ["# Leaderboard", "", f"**{NOTICE}**", ""]
    for family, metrics in FAMILIES.items():
        heads, sections = _paper_table(rows, metrics, _cell, " ‡")
        lines += [f"## {family}", ""]
        body = []
        for group, members in sections.items():
            body.append([f"**{group}**"] + [""] * (len(heads) - 1))
            body += [[markdown(system), *map(markdown, cells)] for system, cells in members]
        lines += [tabulate(body, heads, tablefmt="github", disable_numparse=True), ""]
        if any("‡" in cell for line in body for cell in line):
            lines += [f"‡ {markdown(BATCH)}", ""]
    for task, of_task in by_task(rows).items():
        heading, *more = title(task, of_task)
        lines += [f"## {markdown(heading)}", "", *(f"{markdown(line)}\n" for line in more)]
        body = [
            [markdown(row.system), group, *(markdown(_cell(row, name)) for name in COLUMNS)]
            for group, members in _by_group(of_task).items()
            for row in members
        ]
        lines += [tabulate(body, ["", "", *COLUMNS], tablefmt="github", disable_numparse=True), ""]
        lines += [f"- {markdown(line)}" for line in remarks(of_task)] + [""]
    if systems := _systems(rows):
        body = [[markdown(cell) for cell in line] for line in systems[1:]]
        lines += ["## Systems", "", tabulate(body, systems[0], tablefmt="github", disable_numparse=True), ""]
    return "\n".join([*lines, EXPLAINED.replace("*", r"\*").replace("~", r"\~"), ""])


ABOUT = ("model", "checkpoint", "sha256", "prompt", "images", "preprocessing", "decoding", "dtype", "date", "commit")
SOURCE = ("source", "table", "row")


def board_csv(rows: Sequence[BoardRow]) -> str:
    """A line for each score of each system, with everything that a row rests on."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    heads = ["task", "data", "system", "group", "metric", "value", "low", "high", "n", "images_asked", "unanswered"]
    lines.writerow([*heads, "mark", "note", "signature", *ABOUT, *SOURCE])
    for row in rows:
        for metric, score in row.scores.items():
            figures = [score.value, score.low, score.high, score.n or None, score.images or None, row.unanswered]
            about = [_no_formula(row.about.get(name, "")) for name in (*ABOUT, *SOURCE)]
            marks = [row.marks.get(metric), row.notes.get(metric), score.signature]
            lines.writerow([row.task, row.data, _no_formula(row.system), row.group, metric, *figures, *marks, *about])
    return text.getvalue()


def board_json(rows: Sequence[BoardRow]) -> dict[str, Any]:
    """Every number, for a program; scores are shares in [0, 1], words in words."""
    made = [
        {"group": row.group}
        | {
            name: value
            for name, value in asdict(replace(row, answers={}, scored=None)).items()
            if name not in ("answers", "scored")
        }
        for row in rows
    ]
    return {"format": 1, "rows": made, "notice": NOTICE}


def board_latex(rows: Sequence[BoardRow]) -> str:
    """Two tables in LaTeX, published and clean scores in the columns of the paper's tables; booktabs and graphicx."""
    parts = [f"% {NOTICE} In the preamble: \\usepackage{{booktabs,graphicx}}"]
    for family, metrics in FAMILIES.items():
        tasks = list(by_task(rows))
        _, sections = _paper_table(rows, metrics, _latex_cell, r"$^{\ddagger}$")
        width = 1 + 3 * len(tasks)
        heads = " & ".join(rf"\multicolumn{{3}}{{c}}{{{latex(task)}}}" for task in tasks)
        rules = " ".join(rf"\cmidrule(lr){{{2 + 3 * i}-{4 + 3 * i}}}" for i in range(len(tasks)))
        lines = [
            r"\begin{table*}",
            r"\centering",
            r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{l{'rrr' * len(tasks)}}}",
            r"\toprule",
            rf" & {heads} \\",
            rules,
            " & ".join(["", *["Recall", "F1", "Closed"] * len(tasks)]) + r" \\",
        ]
        for group, members in sections.items():
            lines += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{\emph{{{latex(group)}}}}} \\"]
            lines += [" & ".join([latex(system), *cells]) + r" \\" for system, cells in members]
        notes = [
            rf"$\dagger$ {latex(line)}" for of_task in by_task(rows).values() for line in _footnotes(of_task, metrics)
        ]
        if any(r"\ddagger" in cell for members in sections.values() for _, cells in members for cell in cells):
            notes.append(rf"$\ddagger$ {latex(BATCH)}")
        signs = r"Bold: best of its group and prompt; $\sim$: not distinguishable from it."
        caption = " ".join([f"{family}, $\\times 100$, with 95\\,\\% intervals.", signs, *notes, latex(NOTICE)])
        lines += [r"\bottomrule", r"\end{tabular}}", rf"\caption{{{caption}}}", r"\end{table*}"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


BATCH = "By the batch rule (closed_llavamed_batch), the one that its source reports."
FAMILIES = {
    "Published scores": ("recall_llavamed", "f1_llavamed", "closed_llavamed"),
    "Clean scores": ("recall", "f1", "closed_accuracy"),
}


def _paper_table(
    rows: Sequence[BoardRow], metrics: Sequence[str], cell: Cell, batch: str
) -> tuple[list[str], dict[str, list[tuple[str, list[str]]]]]:
    """Heads and, by group, a line for each system: three columns a task.

    Where a source reports the batch rule alone, its figure stands under `closed_llavamed`, with the sign `batch`.
    """
    tasks = list(by_task(rows))
    heads = ["", *(f"{task} {name}" for task in tasks for name in ("recall", "F1", "closed"))]
    sections: dict[str, dict[str, dict[str, BoardRow]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        sections[row.group][row.system][row.task] = row

    def shown(row: BoardRow | None, metric: str) -> str:
        if row is None:
            return "-"
        if metric == "closed_llavamed" and metric not in row.scores and "closed_llavamed_batch" in row.scores:
            return cell(row, "closed_llavamed_batch") + batch
        return cell(row, metric)

    made = {}
    for group in (group for group in GROUPS if group in sections):
        lines = []
        for system, of_system in sections[group].items():
            cells = [shown(of_system.get(task), metric) for task in tasks for metric in metrics]
            if set(cells) != {"-"}:  # a source may report the other family alone
                lines.append((system, cells))
        if lines:
            made[group] = lines
    return heads, made


def signatures(rows: Sequence[BoardRow]) -> str:
    """Return what a task's measured values rest on: how each system was asked, and the versions of the scores."""
    how: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.kind == "measured" and row.scores:
            how[next(iter(row.scores.values())).signature.split("|", 2)[2]].append(row.system)
    lines = [f"{printable(', '.join(systems))}: {printable(signature)}" for signature, systems in how.items()]
    versions = {name: f"{name} {of.signature.split('|')[1]}" for row in rows for name, of in row.scores.items()}
    shown = [versions[name] for name in COLUMNS if name in versions and "reported" not in versions[name]]
    return "\n".join([*lines, f"versions: {', '.join(shown)}"]) if lines else ""


def score_text(scored: Scored, details: bool = False) -> str:
    """Return one task's scores for a terminal.

    Args:
        scored: The scores.
        details: Those of every category too, not only the means over all questions.
    """
    from tabulate import tabulate

    shown = [row for row in scored.rows if details or row.category == "all"]
    body = [[*([printable(row.category)] * details), row.metric, _score(row), row.n, row.images] for row in shown]
    heads = [*(["questions"] * details), "score", "value [95 %]", "n", "images"]
    table = tabulate(body, heads, tablefmt="simple", disable_numparse=True)
    signature = scored.rows[0].signature.split("|", 2)[2] if scored.rows else ""
    more = "" if details else "\n--details prints the scores of every category."
    return f"{table}\n\n{printable(signature)}\nunanswered: {len(scored.unanswered)}{more}\n{NOTICE}"


def by_task(rows: Iterable[BoardRow]) -> dict[str, list[BoardRow]]:
    """The rows of each task."""
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
    """What a task's table is about, and whether it is only a sample."""
    open_n, closed_n = _count(rows, "recall"), _count(rows, "closed_accuracy")
    images = max((score.images for row in rows for score in row.scores.values()), default=0)
    line = f"{task} ({rows[0].data}): {open_n} open + {closed_n} closed questions, {images} images"
    return [line, SAMPLE] if rows[0].data == "sample" else [line]


def remarks(rows: Sequence[BoardRow]) -> list[str]:
    """What a reader of a task's table has to know besides."""
    every = _count(rows, "recall") + _count(rows, "closed_accuracy")
    made = [
        f"{row.system}: scored on {_n(row)} of {every} questions, {row.unanswered} unanswered"
        for row in rows
        if row.kind != "reported" and (_n(row) < every or row.unanswered)
    ]
    made += [f"{row.system}: {line}" for row in rows for line in stopped(row)]
    shown = {(row.about.get("sha256"), row.about.get("images")) for row in rows}
    for images in ("other", "black"):
        lacking = [
            row.system
            for row in rows
            if row.kind == "measured"
            and row.about.get("model") != "answers"
            and (row.about.get("sha256"), images) not in shown
        ]
        if lacking:
            made.append(
                f"Not shown {images} images, so it is not known what the right ones are worth to them: "
                f"{', '.join(lacking)}. `stllava-eval run --images {images}` does it, of a server "
                f"`--model_args ...,images={images}`."
            )
    if any(row.about.get("prompt", "").startswith("custom") for row in rows):
        made.append("custom: a prompt that is none of ours, by its hash.")
    return made + _footnotes(rows)


def stopped(row: BoardRow) -> list[str]:
    """Return what a reader has to know of a run's replies: sampled, stopped at a limit, empty, cut or refused."""
    if not row.about or row.scored is None:
        return []
    limit = row.about.get("max_new_tokens")
    where = f"the limit of {limit} new tokens." if limit else "their limit of new tokens."
    draws = row.about.get("draws", "1")
    made = [] if draws == "1" else [f"each score is a mean over {draws} sampled replies to a question."]
    made += [f"{row.at_limit} replies were stopped at {where}"] if row.at_limit else []
    return made + ([row.scored.doubts] if row.scored.doubts else [])


def _footnotes(rows: Sequence[BoardRow], metrics: Sequence[str] = RANKED) -> list[str]:
    return [
        f"{row.system} ({row.about['table']}): {note}"
        for row in rows
        for metric, note in row.notes.items()
        if metric in metrics
    ]


def _systems(rows: Sequence[BoardRow]) -> list[list[str]]:
    """Heads and a line for each system that was run or reported."""
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


def _is_prepared(name: str) -> bool:
    from stllava_eval.datasets import read_manifest

    try:
        read_manifest(name, "test")
    except InputError:
        return False
    return True


def _n(row: BoardRow) -> int:
    return sum(row.scores[name].n for name in ("recall", "closed_accuracy") if name in row.scores)


def _count(rows: Sequence[BoardRow], metric: str) -> int:
    return max((row.scores[metric].n for row in rows if metric in row.scores), default=0)


def _cell(row: BoardRow, metric: str) -> str:
    score = row.scores.get(metric)
    sign = SIGNS.get(row.marks.get(metric, ""), "") or ("†" if metric in row.notes else "")
    return "-" if score is None else f"{_score(score)} {sign}".rstrip()


def _score(score: ScoreRow) -> str:
    if score.low is None or score.high is None or score.metric in ("words", "unparsed", "cut"):
        return mean_text(score)
    return f"{mean_text(score)} [{100 * score.low:.0f}, {100 * score.high:.0f}]"


def mean_text(score: ScoreRow) -> str:
    """Return a mean as every board, file and page shows it: x100 with two decimals, words with one."""
    if score.value is None:
        return "-"
    return f"{score.value:.1f}" if score.metric == "words" else f"{100 * score.value:.2f}"


def _latex_cell(row: BoardRow, metric: str) -> str:
    score = row.scores.get(metric)
    if score is None or score.value is None:
        return "-"
    value = mean_text(score)
    if row.marks.get(metric) == BEST:
        value = rf"\textbf{{{value}}}"
    if row.marks.get(metric) == EQUAL:
        value = rf"{value}$^{{\sim}}$"
    if metric in row.notes:
        value += r"$^{\dagger}$"
    if score.low is None or score.high is None:
        return value
    return rf"{value} {{\scriptsize [{100 * score.low:.0f}, {100 * score.high:.0f}]}}"


def _plain(text: str) -> str:
    """On one line of at most 48 characters: a long path is cut in front."""
    text = printable(text)
    return text if len(text) <= 48 else f"...{text[-45:]}"


def _no_formula(text: str) -> str:
    """Printable, and not what a spreadsheet takes for a formula."""
    text = printable(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def markdown(text: str) -> str:
    """`text` as Markdown and HTML show it: on one line, nothing in it formats, links or starts a table cell."""
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = text.replace("@", "&#64;").replace("://", ":&#47;&#47;")  # GitHub makes links of names and addresses
    return re.sub(r"([\\`*_{}\[\]()|~!$]|(?<!&)#)", r"\\\1", text)


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}"}
_LATEX |= {">": r"\textgreater{}", "|": r"\textbar{}"} | {sign: f"\\{sign}" for sign in "&%$#_{}"}


def latex(text: str) -> str:
    """`text` as pdfLaTeX shows it; signs that are not Latin become `?`."""
    plain = printable(text).encode("latin-1", "replace").decode("latin-1")
    return "".join(_LATEX.get(sign, sign) for sign in plain)
