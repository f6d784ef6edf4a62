"""Write a leaderboard's files: Markdown, CSV, JSON, LaTeX, and one HTML page that needs no network.

The page has the data as gzipped JSON; `page.js` draws it, and never computes a figure by itself.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from stllava_eval.data.catalog import DATASETS
from stllava_eval.data.splits import read_split
from stllava_eval.images import decode
from stllava_eval.reports.board_formats import EXPLAINED, board_files
from stllava_eval.reports.board_rows import (
    ACCURACIES,
    BEST,
    CLOSED,
    FEW,
    GROUPS,
    OPEN,
    RANKED,
    BoardRow,
    comparable_rows,
    questions,
)
from stllava_eval.reports.cells import NOTICE, WORDS, mean_text
from stllava_eval.reports.inspect_run import (
    INSPECTED,
    Inspection,
    consistency_cells,
    inspect,
    interval_text,
    is_worse,
    share_text,
)
from stllava_eval.reports.leaderboard import by_task, remarks, title
from stllava_eval.runs.scores import QuestionScores, ScoreRow, categories_of, dataset_of, split_rows
from stllava_eval.scoring.final_answer import is_failed_request
from stllava_eval.scoring.image_blind import PRIOR
from stllava_eval.scoring.metrics import SCORES
from stllava_eval.storage import refuse_file, write_together

LIMIT = 5_000_000  # largest size of the page in bytes (our choice); the viewer shows fewer questions in a larger page
SIDE = 200  # longer side of a thumbnail in pixels (our choice)
CUT = 400  # the page shows at most this many characters of an answer (our choice)


def write_board(
    out: Path,
    rows: Sequence[BoardRow],
    images: str = "page",
    pathvqa_images: bool = False,
    columns: Sequence[str] = (),
    intervals: bool = False,
) -> None:
    """Write the files of `leaderboard.board_files` and index.html into `out`.

    Args:
        out: A folder, in which files of these names are replaced.
        rows: The rows that `board` returns.
        images: Where thumbnails are: `page` (in index.html), `folder` (in a folder `images` beside it) or `none`.
        pathvqa_images: Whether to show PathVQA's images too, which belong to publishers. Its sample's are always shown.
        columns: Columns of the files, as `leaderboard.read_columns` returns them. The page has its own.
        intervals: Whether the LaTeX tables show intervals.

    Raises:
        InputError: The folder cannot be written; its files are not changed.
    """
    refuse_file(out, "--out")
    pictures = _Thumbnails(images)
    text = _page(rows, pictures, pathvqa_images)
    write_together(
        out,
        {
            **board_files(rows, columns, intervals),
            **pictures.files,
            "index.html": text,
        },
        # pictures of an earlier board: one that was withdrawn since must not stay
        stale=[
            old
            for old in (out / "images").glob("*.jpg")
            if re.fullmatch(rf"(?:{'|'.join(DATASETS)})-[0-9a-f]{{16}}\.jpg", old.name)
        ],
    )


def page(rows: Sequence[BoardRow], images: str = "none", pathvqa_images: bool = False) -> str:
    """Return the page: one HTML file with gzipped data, under `LIMIT` bytes, perhaps with fewer questions.

    The arguments are those of `write_board`.
    """
    return _page(rows, _Thumbnails(images), pathvqa_images)


def _page(rows: Sequence[BoardRow], pictures: _Thumbnails, pathvqa_images: bool) -> str:
    viewer = {}
    for task, of_task in by_task(rows).items():
        if shown := [row for row in of_task if row.about and row.answers]:
            shown += [row for row in of_task if row.system == PRIOR and not row.about]
            hidden = dataset_of(task) == "pathvqa" and of_task[0].data != "sample" and not pathvqa_images
            viewer[task] = _viewed(task, shown, None if hidden or pictures.images == "none" else pictures)
    tasks = by_task(rows)
    base = {
        "notice": NOTICE,
        "explained": EXPLAINED,
        "ranking": RANKING,
        "groups": GROUPS,
        "best": BEST,
        "inspected": INSPECTED,
        "columns": _columns(),
        "opens": max(tasks, key=lambda task: sum(row.kind == "measured" for row in tasks[task]), default=None),
        "tasks": [
            {
                "name": task,
                "data": of_task[0].data,
                "title": title(task, of_task),
                "remarks": remarks(of_task),
                "ranks": ranks(of_task),
            }
            for task, of_task in tasks.items()
        ],
        "rows": [_row(row) for row in rows],
        "inspections": [_inspection(inspection) for inspection in inspect(rows)],
    }
    keep = max((len(viewed["questions"]) for viewed in viewer.values()), default=0)
    while True:  # drop a quarter of the questions at a time until the page fits (our choice)
        text = _html(base | _packed(viewer, keep, pictures.made))
        if len(text) <= LIMIT or keep <= 20:
            return text
        keep = keep * 3 // 4


_OPEN_ACCURACY, _CLOSED_ACCURACY = ACCURACIES
COLUMNS = (
    *(*OPEN, _OPEN_ACCURACY, "words_open"),
    *(*CLOSED, _CLOSED_ACCURACY, "words_closed", "unparsed"),
    *("cut", "empty"),
)
_OTHER_COLUMNS = {
    **{
        name: (
            "accuracy (paper)",
            kind,
            "as a paper reports it, by a rule that none of our scores follows",
        )
        for name, kind in ACCURACIES.items()
    },
    "words_open": ("words", "open", "mean words of an answer to an open question"),
    "words_closed": ("words", "closed", "mean words of an answer to a closed question"),
    "unparsed": ("unparsed", "closed", "closed answers without a verdict, x100"),
    "cut": ("cut", "both", "replies that were cut off while the model was thinking, x100"),
    "empty": ("empty", "both", "number of answers without any text"),
}


def _columns() -> list[dict[str, Any]]:
    """Return the columns of the first table in order, each with its head, kind of questions and meaning."""
    published = {True: "as the published script counts", False: "our definition"}
    about = {name: (name, SCORES[name].kind, published[bool(SCORES[name].published)]) for name in RANKED}
    columns = []
    for name in COLUMNS:
        label, kind, means = (about | _OTHER_COLUMNS)[name]
        columns.append({"name": name, "label": label, "kind": kind, "title": means, "ranked": name in RANKED})
    return columns


RANKING = (
    "Ranks compare measured rows of one training group that were asked with the same prompt, images and extraction "
    "rule, on the questions that all of them answered; equal scores share a rank. A row is partial, and has no rank, "
    f"if it lacks more than {100 * FEW:g} % of the questions or answered others. Reported figures have neither rank "
    "nor n, because their answers are not available. Image-blind rows have no rank."
)


def ranks(rows: Sequence[BoardRow]) -> dict[str, dict[str, Any]]:
    """Return the ranks of a task's measured rows, by score.

    Rows are ranked among those that were asked alike (`comparable_rows`), for each score on its questions that all
    ranked rows answered. A row is ranked if it lacks at most `FEW` of the questions of the most complete row. If there
    are several such sets of rows, the largest one is ranked. Scores that are printed alike share a rank.

    Args:
        rows: The rows of one task.

    Returns:
        By score, `places`: system -> (its rank, the number of ranked rows); and `notes`: a sentence for each group
        whose ranks are computed on fewer questions than its most complete row answered.
    """
    made: dict[str, dict[str, Any]] = {}
    for metric in RANKED:
        places: dict[str, tuple[int, int]] = {}
        notes = []
        for members in comparable_rows(rows):
            values = {
                row.system: {
                    id: scored.scores[metric] for id, scored in questions(row).items() if metric in scored.scores
                }
                for row in members
            }
            systems = _fullest(values)
            if not systems:
                continue
            common = set.intersection(*(set(values[system]) for system in systems))
            means = {
                system: float(share_text(math.fsum(values[system][id] for id in common) / len(common)))
                for system in systems
            }
            for system, mean in means.items():
                places[system] = (1 + sum(other > mean for other in means.values()), len(means))
            if len(common) < (most := max(len(values[system]) for system in systems)):
                group = f"{members[0].group}, prompt {members[0].about['prompt']}"
                notes.append(f"{group}: {metric} is ranked on the {len(common)} of {most} questions that all answered.")
        if places:
            made[metric] = {"places": places, "notes": notes}
    return made


def _fullest(values: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the largest set of systems that answered the same questions but for `FEW`.

    Of sets of one size, it is the one that answered the most questions.
    """
    sets: list[tuple[set[str], list[str]]] = []
    for system in sorted(values, key=lambda system: -len(values[system])):
        own = set(values[system])
        for fullest, systems in sets:
            if len(fullest ^ own) <= FEW * len(fullest):
                systems.append(system)
                break
        else:
            if own:
                sets.append((own, [system]))
    return max((systems for _, systems in sets), key=len, default=[])


def _row(row: BoardRow) -> dict[str, Any]:
    """Return a row as the page reads it: how it was made, its figures by score, and those of each category."""
    scored = row.scored.rows if row.scored else []
    overall = {score.metric: score for score in scored if score.category == "all"}
    categories: dict[str, dict[str, Any]] = {}
    for score in scored:
        if score.metric in INSPECTED and score.category != "all" and score.value is not None:
            categories.setdefault(score.metric, {})[score.category] = [*_figure(score), is_worse(score, overall)]
    figures = {}
    for name, score in (row.scores | _empty(row)).items():
        if name in COLUMNS and score.value is not None:
            figures[name] = _figure(score)
    fields = ("task", "system", "kind", "group", "marks", "about", "notes", "unanswered")
    return {**{name: getattr(row, name) for name in fields}, "scores": figures, "categories": categories}


def _figure(score: ScoreRow) -> list[Any]:
    """Return a value, its interval, n, and value and interval as text; figures are rounded here and not in the page."""
    text = f"{score.value:.0f}" if score.metric == "empty" else mean_text(score)
    plain = score.metric in (*WORDS, "unparsed", "cut", "empty")
    spread = "" if plain else interval_text(score.low, score.high).strip()
    return [_short(score.value), _short(score.low), _short(score.high), score.n, text, spread]


def _empty(row: BoardRow) -> dict[str, ScoreRow]:
    """Return the number of empty answers as a figure of the first table; nothing for a reported row."""
    if "words" not in row.scores:
        return {}
    return {"empty": replace(row.scores["words"], metric="empty", value=float(row.empty), low=None, high=None)}


def _inspection(inspection: Inspection) -> dict[str, Any]:
    """Return the cells of the two tables of "Why it errs" for one run and task, as text."""
    return {
        "task": inspection.task,
        "run": inspection.run,
        "consistency": [consistency_cells(consistency) for consistency in inspection.consistency],
        "blind": [
            [
                share.metric,
                share_text(share.value),
                "-" if share.prior is None else share_text(share.prior),
                share_text(share.best),
                share.best_of,
            ]
            for share in inspection.blind
        ],
    }


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _viewed(task: str, shown: Sequence[BoardRow], pictures: _Thumbnails | None) -> dict[str, Any]:
    """Return every question of a task, and for each system its answers and a sign that rates each answer."""
    name = dataset_of(task)
    rows = split_rows(name)
    return {
        "questions": [
            {
                "id": row["id"],
                "image_id": row["image_id"],
                "image": None,
                "question": row["question"],
                "reference": row["reference"],
                "kind": row["kind"],
                "categories": categories_of(row),
            }
            for row in rows
        ],
        "images": pictures.of(name) if pictures else {},
        "systems": [
            {
                "name": row_of_system.system,
                "signs": [_sign(row, questions(row_of_system)) for row in rows],
                "answers": [_shown(row_of_system.answers.get(row["id"])) for row in rows],
            }
            for row_of_system in shown
        ],
    }


def _sign(row: Mapping[str, Any], scored: Mapping[str, QuestionScores]) -> str:
    """Rate a system's answer to a question by one character.

    Closed questions: R right, W wrong, U without a verdict, by most of the sampled replies. Open questions: X if the
    answer has all words of the reference, otherwise the recall in tenths. `-` if there is no answer; `_shown` then
    returns the reason.
    """
    if row["id"] not in scored:
        return "-"
    scores = scored[row["id"]].scores
    if row["kind"] == "closed":
        return "R" if scores.get("closed_accuracy", 0) >= 0.5 else "U" if scores.get("unparsed", 0) >= 0.5 else "W"
    recall = scores.get("recall", 0.0)
    return "X" if recall == 1 else str(int(10 * recall))


_FAILED = re.compile(r"\[LMMS_EVAL_REQUEST_FAILED after (\d+) (?:attempts|retries)\]\s*(.*)", re.DOTALL)


def _shown(answer: str | None) -> str:
    """Return an answer as the viewer shows it, cut after `CUT` characters; if there is no answer, the reason."""
    if answer is None:
        return "not asked"
    if not is_failed_request(answer):
        return answer if len(answer) <= CUT else answer[:CUT] + " ..."
    failed = _FAILED.fullmatch(answer)
    attempts, reason = failed.groups() if failed else ("", answer)
    reason = reason if len(reason) <= CUT else reason[:CUT] + " ..."
    if attempts == "0":  # `runs.write_answers`: the file has no line for this question
        return f"not asked: {reason}" if reason else "not asked"
    return f"no answer: {reason or 'no reason is given'}" + (f" ({attempts} attempts)" if attempts else "")


class _Thumbnails:
    """Thumbnails by image, each made once: as data, or as files beside the page, by their names there."""

    def __init__(self, images: str) -> None:
        self.images = images
        self.made: list[str] = []
        self.files: dict[str, bytes] = {}

    def of(self, name: str) -> dict[str, int]:
        """Return, by image id, the index of its thumbnail in `made`, for a data set's test split."""
        indices: dict[str, int] = {}
        for row in read_split(name, "test"):
            if row["image_id"] in indices:
                continue
            picture = decode(row["image"]["bytes"])
            picture.thumbnail((SIDE, SIDE))
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=70)
            indices[row["image_id"]] = len(self.made)
            if self.images == "folder":
                file = f"images/{name}-{row['image_sha256'][:16]}.jpg"
                self.files[file] = buffer.getvalue()
                self.made.append(file)
            else:
                self.made.append("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode())
        return indices


def _packed(viewer: Mapping[str, Mapping[str, Any]], keep: int, pictures: Sequence[str]) -> dict[str, Any]:
    """Return the viewer with at most `keep` questions per task: those on which systems differ most.

    The questions are in the split's order. Equal answers and images are stored once.
    """
    strings: dict[str, int] = {}
    used: dict[int, int] = {}
    made = {}
    for task, viewed in viewer.items():
        columns = [system["signs"] for system in viewed["systems"]]
        interest = [len({signs[index] for signs in columns}) for index in range(len(viewed["questions"]))]
        indices = sorted(sorted(range(len(interest)), key=lambda index: (-interest[index], index))[:keep])
        questions = []
        for index in indices:
            question = dict(viewed["questions"][index])
            picture = viewed["images"].get(question["image_id"])
            question["image"] = None if picture is None else used.setdefault(picture, len(used))
            questions.append(question)
        made[task] = {
            "of": len(viewed["questions"]),
            "questions": questions,
            "systems": [
                {
                    "name": system["name"],
                    "signs": "".join(system["signs"][index] for index in indices),
                    "answers": [strings.setdefault(system["answers"][index], len(strings)) for index in indices],
                }
                for system in viewed["systems"]
            ],
        }
    return {"viewer": made, "strings": list(strings), "images": [pictures[index] for index in used]}


def _html(data: Mapping[str, Any]) -> str:
    script = files("stllava_eval.reports").joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    packed = gzip.compress(
        json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace"), mtime=0
    )
    return Template(files("stllava_eval.reports").joinpath("page.html").read_text(encoding="utf-8")).substitute(
        script=script, script_hash=f"sha256-{digest}", data=base64.b64encode(packed).decode()
    )
