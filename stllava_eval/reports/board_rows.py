"""Collect the rows of a leaderboard: measured ones from run folders, reported ones from papers, and image-blind ones.

Each row has its scores with intervals and marks. `page.py`, `board_formats.py` and `inspect_run.py` show them.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from stllava_eval.data.catalog import DATASETS
from stllava_eval.data.splits import is_prepared, read_manifest
from stllava_eval.errors import InputError
from stllava_eval.runs.folder import Run, RunTask, labels, open_run, refuse_other_split
from stllava_eval.runs.scores import DECIDING, NOT_RECORDED, QuestionScores, Scored, ScoreRow, dataset_of, score_table
from stllava_eval.scoring.image_blind import image_blind_answers
from stllava_eval.scoring.statistics import holm, mean_clustered, sign_flips

OPEN = ("recall_llavamed", "f1_llavamed", "recall", "f1")
CLOSED = ("closed_llavamed", "closed_llavamed_batch", "closed_accuracy")
RANKED = (*OPEN, *CLOSED)
ACCURACIES = {"accuracy_open_reported": "open", "accuracy_closed_reported": "closed"}
"""Scores that a paper calls accuracy and that follow none of our rules -> the kind of their questions."""
SETTINGS = ("zero-shot", "fine-tuned", "training not recorded")
PAPER_GROUPS = ("zero-shot, without Med-IM", "zero-shot, with Med-IM")  # the two groups of the paper's Table 2
GROUPS = (
    *(f"measured, {setting}" for setting in SETTINGS),
    *(f"reported, {setting}" for setting in (*PAPER_GROUPS, *SETTINGS)),
    "image-blind",
)
BEST, EQUAL = "best", "not distinguishable from the best"
# A row that lacks at most this share of a score's questions is still compared, on the others (our choice: a few
# failed requests must not take a system out of the comparison).
FEW = 0.01


@dataclass(frozen=True)
class BoardRow:
    """One system on one task: its scores over all questions, by metric."""

    task: str
    system: str
    kind: Literal["measured", "reported", "blind"]
    setting: str
    """Whether the system was trained on this data set: one of `SETTINGS`, or for a reported row of `PAPER_GROUPS`."""
    data: str  # "official", "sample", or the edition's name
    scores: dict[str, ScoreRow]
    """By metric; `words_open` and `words_closed` are the mean words of answers to questions of that kind."""
    unanswered: int
    marks: dict[str, str] = field(default_factory=dict)
    """By metric: `BEST`, or `EQUAL` if a paired test, adjusted over the column, finds no difference from the best."""
    about: dict[str, str] = field(default_factory=dict)
    """How the row was made: checkpoint, its hash, prompt, date, ...; the source of a reported row."""
    notes: dict[str, str] = field(default_factory=dict)
    """Notes on the figures of a reported row, by metric."""
    answers: Mapping[str, str] = field(default_factory=dict)
    """By question id; empty for a reported row."""
    scored: Scored | None = None
    """The scores of every question and category; None for a reported row."""
    at_limit: int = 0
    """Number of replies that were stopped at the limit of new tokens."""
    empty: int = 0
    """Number of replies with an empty final answer, without those that were cut off while the model was thinking."""
    not_shown: tuple[str, ...] = ()
    """Of "other" and "black": the images that no run on this board showed to the weights of this measured row."""
    remarks: tuple[str, ...] = ()
    """Further remarks for the reader; the rows of a task share some of them."""

    @property
    def group(self) -> str:
        """The row's group, one of `GROUPS`."""
        return "image-blind" if self.kind == "blind" else f"{self.kind}, {self.setting}"


def board(
    runs: Sequence[Path],
    tasks: Sequence[str] | None = None,
    published: bool = False,
    progress: bool = False,
    chosen: Sequence[str] | None = None,
    blind: bool = True,
) -> list[BoardRow]:
    """Return the rows of each task in the order of `GROUPS`, with the runs of a group in the given order.

    A run that did not ask every question of a task (`--limit`) is scored on those it asked, so its n is smaller. A run
    that was shown black or other images is among the image-blind rows. Marks compare the rows that are returned.

    Args:
        runs: Run folders.
        tasks: The tasks (default: those of the runs, or all that are prepared).
        published: Whether to add reported rows, if the official split is prepared.
        progress: Whether to show a progress bar on stderr.
        chosen: The rows to return, by names as in `choose` (default: all).
        blind: Whether to return image-blind rows.

    Raises:
        InputError: A folder is not a run, a task's test split is not prepared or has changed since the run, or a
            chosen row does not exist.
    """
    from tqdm import tqdm

    read = _named({name: open_run(folder) for name, folder in zip(labels(runs), runs, strict=True)})
    tasks = _tasks(read, tasks)
    with tqdm(
        total=sum(task in run.tasks for task in tasks for run in read.values()), desc="scoring", disable=not progress
    ) as bar:
        rows = [row for task in tasks for row in _of_task(task, read, published, blind, bar)]
    if chosen is not None:
        rows = choose(rows, chosen)
    made = []
    for task in tasks:
        made += sorted(_marked([row for row in rows if row.task == task]), key=lambda row: GROUPS.index(row.group))
    if not made:
        raise InputError("the board has no rows. Name runs, leave out --no-blind, or pass --published.")
    return made


def _tasks(read: Mapping[str, Run], tasks: Sequence[str] | None) -> list[str]:
    if tasks and len(set(tasks)) < len(tasks):
        raise InputError(f"{', '.join(tasks)}: a task is named twice. Name each task once.")
    for run in read.values():
        if tasks and not set(tasks) & run.tasks.keys():
            raise InputError(f"{run.folder}: it has none of {', '.join(tasks)}. Leave it out, or name its tasks too.")
    if tasks is None:
        tasks = list(dict.fromkeys(task for run in read.values() for task in run.tasks))
    tasks = list(tasks) or [name for name in DATASETS if is_prepared(name, "test")]
    if not tasks:
        raise InputError("no data is prepared. Run `stllava-eval prepare --sample`, or prepare an official split.")
    return tasks


def _of_task(task: str, read: Mapping[str, Run], published: bool, blind: bool, bar: Any) -> list[BoardRow]:
    """Return the rows of one task without marks: measured ones in the order of their runs, reported and blind ones."""
    if published and not is_prepared(dataset_of(task), "test") and not any(task in run.tasks for run in read.values()):
        reported, _ = _published(task, "official", "")
        if reported:
            remark = f"{task} is not prepared here, so it has neither measured nor image-blind rows."
            return [replace(row, remarks=(*row.remarks, remark)) for row in reported]
    prepared = read_manifest(dataset_of(task), "test")
    data = "sample" if prepared.sample else "official" if prepared.official else prepared.edition
    rows: list[BoardRow] = []
    for name, run in read.items():
        if task in run.tasks:
            run_task = run.tasks[task]
            refuse_other_split(task, run_task, run.folder)
            scored = score_table(task, run_task.replies, run_task.prompt, run_task.settings)
            rows.append(_measured(task, name, data, run_task, run.manifest, scored))
            bar.update()
    shown = {(row.about.get("sha256"), row.about["images"]) for row in rows}
    rows = [replace(row, not_shown=_not_shown(row, shown)) for row in rows]
    reported, reason = _published(task, data, prepared.edition) if published else ([], "")
    rows += reported + (_baselines(task, data) if blind else [])
    names = [row.system for row in rows if row.kind != "reported"]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{twice[0]}: two rows of {task} would have this name. Rename one of the run folders.")
    shared = (reason,) if reason else ()
    return [replace(row, remarks=(*shared, *row.remarks)) for row in rows if blind or row.kind != "blind"]


def _baselines(task: str, data: str) -> list[BoardRow]:
    """Return the image-blind rows of a task; a remark on each says which training answers they are computed from."""
    baselines = image_blind_answers(dataset_of(task))
    rows = []
    for label, answers in baselines.answers.items():
        scored = score_table(task, answers)
        scores, remarks = _overall(scored), (baselines.note,)
        rows.append(
            BoardRow(task, label, "blind", "", data, scores, 0, answers=answers, scored=scored, remarks=remarks)
        )
    return rows


def _not_shown(row: BoardRow, shown: set[tuple[str | None, str]]) -> tuple[str, ...]:
    if row.kind != "measured" or row.about.get("model") == "answers":  # answers cannot be asked again
        return ()
    return tuple(images for images in ("other", "black") if (row.about.get("sha256"), images) not in shown)


def _named(runs: Mapping[str, Run]) -> dict[str, Run]:
    """Return the runs by the system's name if `score --system` gave one, else by the folder's name."""
    given = [str(run.manifest.get("named") or label) for label, run in runs.items()]
    named = {}
    for name, (label, run) in zip(given, runs.items(), strict=True):
        is_shared = given.count(name) > 1 and name != label  # then the folder's name tells the systems apart
        named[f"{name} ({label})" if is_shared else name] = run
    return named


def _measured(
    task: str, name: str, data: str, run_task: RunTask, manifest: Mapping[str, Any], scored: Scored
) -> BoardRow:
    checkpoint = manifest["checkpoint"]
    learnt = checkpoint.get("trained_on")
    own = f"{dataset_of(task)} sample" if data == "sample" else dataset_of(task)
    setting = SETTINGS[2] if learnt is None else SETTINGS[1] if own in learnt else SETTINGS[0]
    images = str(manifest.get("images") or "own")
    unknown = images == NOT_RECORDED
    # a mean over images of another kind is an image-blind row, whose name says which images were shown
    if images != "own":
        name = f"{name} (images {NOT_RECORDED})" if unknown else f"{name} ({images} images)"
    about = {
        "model": manifest.get("model"),
        "checkpoint": checkpoint["name"],
        "sha256": checkpoint.get("sha256"),
        "prompt": run_task.prompt,
        "images": images,
        "preprocessing": manifest.get("image_preprocessing"),
        "decoding": manifest.get("decoding"),
        **{
            name: run_task.settings[name]
            for name in DECIDING
            if name in run_task.settings and name not in ("images", "decoding")
        },
        "dtype": manifest.get("dtype"),
        "date": manifest.get("date"),
        "commit": manifest.get("commit"),
    }
    return BoardRow(
        task,
        name,
        "measured" if images == "own" or unknown else "blind",
        setting,
        data,
        _overall(scored),
        len(scored.unanswered) - run_task.not_asked,
        about={key: str(value) for key, value in about.items() if value},
        answers=run_task.answers,
        scored=scored,
        at_limit=run_task.at_limit or 0,
        empty=scored.empty,
    )


def _overall(scored: Scored) -> dict[str, ScoreRow]:
    """Return the means over all questions by metric, and the mean words of answers to each kind of question."""
    made = {row.metric: row for row in scored.rows if row.category == "all"}
    # a question is open or closed; that shows in a score which only questions of its kind have
    for kind, score_of_kind in (("open", OPEN[0]), ("closed", CLOSED[0])):
        asked = [question for question in scored.questions.values() if score_of_kind in question.scores]
        if asked:
            words = [question.scores["words"] for question in asked]
            mean = mean_clustered(words, [question.image_id for question in asked])
            name = f"words_{kind}"
            made[name] = replace(
                made["words"],
                metric=name,
                signature=made["words"].signature.replace("words", name, 1),
                value=mean.value,
                n=mean.n,
                images=mean.clusters,
                low=mean.low,
                high=mean.high,
            )
    return made


def choose(rows: Sequence[BoardRow], names: Sequence[str]) -> list[BoardRow]:
    """Return the rows that have one of the names, in the order of `rows`.

    Args:
        rows: The rows of a board.
        names: Each is a system, a group (see `GROUPS`) or a part of one ("measured", "reported", "fine-tuned"), a
            reported table ("Table 2"), or a system of such a table, "STLLaVA-Med (Table 2)". Letter case is ignored. A
            text may contain several names, separated by commas.

    Raises:
        InputError: No row has one of the names.
    """
    names_of_rows = [{name.casefold() for name in _names(row)} for row in rows]
    known = set().union(*names_of_rows)
    wanted: set[str] = set()
    for given in names:
        parts = [part.strip() for part in given.split(",")]
        while parts:  # names of systems and groups may contain commas, so the longest known name counts
            length = next((n for n in range(len(parts), 0, -1) if ", ".join(parts[:n]).casefold() in known), 0)
            if not length:
                shown = dict.fromkeys([*(row.system for row in rows), *(row.group for row in rows)])
                tables = dict.fromkeys(row.about["table"] for row in rows if row.kind == "reported")
                raise InputError(f"--rows {parts[0]}: unknown. Known names: {'; '.join((*shown, *tables))}.")
            wanted.add(", ".join(parts[:length]).casefold())
            parts = parts[length:]
    return [row for row, row_names in zip(rows, names_of_rows, strict=True) if row_names & wanted]


def _names(row: BoardRow) -> list[str]:
    names = [row.system, row.group, *row.group.split(", ")]
    if row.kind == "measured":
        names.append(row.about["checkpoint"])  # as it was named, without what the board adds
    if row.kind == "reported":
        names += [row.about["table"], f"{row.system} ({row.about['table']})"]
    return names


def comparable_rows(rows: Sequence[BoardRow]) -> list[list[BoardRow]]:
    """Return the measured rows in groups that may be compared: one training group, prompt, images and extraction."""
    alike = defaultdict(list)
    for row in rows:
        if row.kind == "measured":
            alike[row.group, row.about["prompt"], row.about["images"], row.about.get("extract")].append(row)
    return list(alike.values())


def _marked(rows: Sequence[BoardRow]) -> list[BoardRow]:
    """Return the rows with `marks`, which compare measured rows of one setting, prompt, kind of images and rule.

    Each score is compared among the rows that answered the same of its questions, so a run without open questions is
    still compared in closed accuracy. A row that lacks at most `FEW` of the questions of the most complete row is
    compared too, on the questions that all of them answered.
    """
    marks: dict[str, dict[str, str]] = defaultdict(dict)
    for members in comparable_rows(rows):
        for metric in RANKED:
            for asked, rivals in _rivals(members, metric):
                for system, mark in _marks_among(asked, rivals, metric).items():
                    marks[system][metric] = mark
    return [replace(row, marks=marks[row.system]) if row.kind == "measured" else row for row in rows]


def _marks_among(asked: Sequence[str], rivals: Sequence[BoardRow], metric: str) -> dict[str, str]:
    """Return the marks of rows that are compared in one score on the questions `asked`, by system.

    The best rows are marked `BEST`. Each other row is tested against the first of them by sign flips of images'
    differences, with Holm's adjustment over the rows; it is marked `EQUAL` unless the test finds a difference at 5 %.
    """
    scores = {row.system: [questions(row)[id].scores[metric] for id in asked] for row in rivals}
    sums = {system: math.fsum(values) for system, values in scores.items()}
    top = max(sums.values())
    best = next(system for system, value in sums.items() if value == top)
    others = [system for system, value in sums.items() if value < top]
    columns = []
    for system in others:
        columns.append([high - low for high, low in zip(scores[best], scores[system], strict=True)])
    images = [questions(rivals[0])[id].image_id for id in asked]
    marks = dict.fromkeys(sums.keys() - set(others), BEST)
    for system, p in zip(others, holm(sign_flips(columns, images)), strict=True):
        if p >= 0.05:
            marks[system] = EQUAL
    return marks


def _rivals(rows: Sequence[BoardRow], metric: str) -> list[tuple[list[str], list[BoardRow]]]:
    """Return groups of two rows or more that answered the same questions of a score but for `FEW`.

    Each comes with the ids of the questions that all of its rows answered.
    """
    groups: list[tuple[set[str], list[BoardRow]]] = []
    answered = {row.system: {id for id, scored in questions(row).items() if metric in scored.scores} for row in rows}
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
    """Return the scores of each question that a row's system answered, by id; empty for a reported row."""
    return row.scored.questions if row.scored else {}


def _published(task: str, data: str, edition: str) -> tuple[list[BoardRow], str]:
    """Return the reported rows of a task (from published.json), or no rows and a sentence with the reason."""
    if data != "official":
        return [], (
            f"No reported row is shown: papers report the official test split, and the prepared split is the {edition}."
        )
    rows = json.loads(files("stllava_eval.reports").joinpath("published.json").read_text(encoding="utf-8"))["rows"]
    made = []
    for row in rows:
        cells = {metric: value for metric, value in row["scores"].get(task, {}).items() if value is not None}
        if not cells:
            continue
        signature = f"reported|{row['source']}"
        scores = {}
        for metric, value in cells.items():  # the file has percentages, as the papers print them
            scores[metric] = ScoreRow(task, metric, f"{metric}|{signature}", "all", value / 100, 0, 0, None, None)
        notes = {}
        for key, note in row["notes"].items():
            noted_task, metric = key.split()[:2]  # "vqarad closed_llavamed"
            if noted_task == task:
                notes[metric] = note
        made.append(
            BoardRow(
                task,
                row["system"],
                "reported",
                ", ".join(filter(None, (row["setting"], row["training"]))),
                "official",
                scores,
                0,
                about={name: row[name] for name in ("source", "table", "row")} | {"cite": ",".join(row["cite"])},
                notes=notes | _accuracies(cells),
            )
        )
    reason = (
        f"No reported row is shown: papers ask the bare question, and {task} adds a prompt to it. The board of "
        f"{dataset_of(task)} shows their rows."
    )
    return made, "" if made else reason


def _accuracies(cells: Mapping[str, float]) -> dict[str, str]:
    """Return the note on figures that a paper calls accuracy, by metric; empty if it has none."""
    names = [name for name in ACCURACIES if name in cells]
    figures = " and ".join(f"{cells[name]} on {ACCURACIES[name]} questions" for name in names)
    note = (
        f"the paper reports an accuracy of {figures}. Its rule for right answers and the system's training data are "
        "not public, so it cannot be compared with any of our scores."
    )
    return dict.fromkeys(names, note)
