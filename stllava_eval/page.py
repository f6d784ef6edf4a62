"""A board, its runs -> files: Markdown, CSV, JSON, LaTeX and one page that needs no network."""

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

from stllava_eval.blind import PRIOR
from stllava_eval.board_rows import ACCURACIES, BEST, CLOSED, FEW, GROUPS, OPEN, RANKED, BoardRow, questions
from stllava_eval.home import refuse_file, write_together
from stllava_eval.inspection import INSPECTED, Inspection, below, inspect, interval_text, share_text
from stllava_eval.leaderboard import EXPLAINED, NOTICE, WORDS, board_files, by_task, mean_text, remarks, title
from stllava_eval.metrics import SCORES, is_failed_request
from stllava_eval.runs import QuestionScores, ScoreRow, categories_of, dataset_of, split_rows

LIMIT = 5_000_000  # bytes of the page; beyond it, the viewer shows fewer questions
SIDE = 200  # pixels of a thumbnail's longer side; our choice
CUT = 400  # characters of an answer that the page shows; our choice


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
        out: A folder; files of these names in it are replaced.
        rows: What `board` makes of run folders.
        images: `page`: thumbnails in index.html; `folder`: in a folder `images` beside it; `none`.
        pathvqa_images: Show PathVQA's images too, unless it is the sample anyway. They belong to publishers.
        columns: Of the files; see `leaderboard.read_columns`. The page has all.
        intervals: Whether the LaTeX tables show them.

    Raises:
        InputError: The folder cannot be written; what was in it stays as it was.
    """
    refuse_file(out, "--out")
    pictures = _Pictures(images)
    text = _page(rows, pictures, pathvqa_images)
    write_together(
        out,
        {
            **board_files(rows, columns, intervals),
            **pictures.files,
            "index.html": text,
        },
        # of an earlier board: a picture that was withdrawn must not stay
        stale=[
            old
            for old in (out / "images").glob("*.jpg")
            if re.fullmatch(r"(?:vqarad|slake|pathvqa)-[0-9a-f]{16}\.jpg", old.name)
        ],
    )


def page(rows: Sequence[BoardRow], images: str = "none", pathvqa_images: bool = False) -> str:
    """The page: one HTML file with its data gzipped inside, under `LIMIT` bytes; with fewer questions where it must.

    The arguments are those of `write_board`.
    """
    return _page(rows, _Pictures(images), pathvqa_images)


def _page(rows: Sequence[BoardRow], pictures: _Pictures, pathvqa_images: bool) -> str:
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
            {"name": task, "data": of[0].data, "title": title(task, of), "remarks": remarks(of), "ranks": ranks(of)}
            for task, of in tasks.items()
        ],
        "rows": [_row(row) for row in rows],
        "inspections": [_inspection(one) for one in inspect(rows)],
    }
    keep = max((len(of["questions"]) for of in viewer.values()), default=0)
    while True:
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
            "as a paper reports it, by a rule that is none of our scores",
        )
        for name, kind in ACCURACIES.items()
    },
    "words_open": ("words", "open", "mean words of an answer to an open question"),
    "words_closed": ("words", "closed", "mean words of an answer to a closed question"),
    "unparsed": ("unparsed", "closed", "closed answers without a verdict, x100"),
    "cut": ("cut", "both", "replies that stopped inside their thought, x100"),
    "empty": ("empty", "both", "answers without any text: a count"),
}


def _columns() -> list[dict[str, Any]]:
    """The columns of the first table in their order: their heads, the questions they are about, what they mean."""
    published = {True: "as the published script counts", False: "our definition"}
    about = {name: (name, SCORES[name].kind, published[bool(SCORES[name].published)]) for name in RANKED}
    return [
        {"name": name, "label": label, "kind": kind, "title": means, "ranked": name in RANKED}
        for name in COLUMNS
        for label, kind, means in [(about | _OTHER_COLUMNS)[name]]
    ]


RANKING = (
    "Ranks compare measured rows of one training group on the questions that all of them answered; a tie shares its "
    f"rank. Partial: the row lacks more than {100 * FEW:g} % of the questions, or answered others, so it has no rank. "
    "Reported figures rest on answers that are not at hand: no rank, no n. Image-blind rows have no rank."
)


def ranks(rows: Sequence[BoardRow]) -> dict[str, dict[str, Any]]:
    """Return the ranks of a task's measured rows, by score.

    Rows are ranked in their own training group (`GROUPS`), in each score on the questions that have it: on those that
    all ranked rows answered, where each lacks `FEW` of the questions of the fullest one or fewer. Of several such sets
    of questions, that of the most rows is ranked. Scores that are equal as printed share a rank.

    Args:
        rows: Of one task.

    Returns:
        By score, `places`: system -> [rank, rows ranked with it]; and `notes`: a sentence for each group whose ranks
        rest on fewer questions than its fullest row answered.
    """
    made: dict[str, dict[str, Any]] = {}
    for metric in RANKED:
        places: dict[str, tuple[int, int]] = {}
        notes = []
        for group in GROUPS:
            members = [row for row in rows if row.kind == "measured" and row.group == group]
            values = {
                row.system: {id: of.scores[metric] for id, of in questions(row).items() if metric in of.scores}
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
                notes.append(f"{group}: {metric} is ranked on the {len(common)} of {most} questions that all answered.")
        if places:
            made[metric] = {"places": places, "notes": notes}
    return made


def _fullest(values: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The systems of the largest set that answered the same questions but for `FEW`; of equal sets the fullest one."""
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
    whole = {of.metric: of for of in row.scored.rows if of.category == "all"} if row.scored else {}
    categories: dict[str, dict[str, Any]] = {}
    for one in row.scored.rows if row.scored else ():
        if one.metric in INSPECTED and one.category != "all" and one.value is not None:
            categories.setdefault(one.metric, {})[one.category] = [*_figure(one), below(one, whole)]
    return {
        **{
            name: getattr(row, name)
            for name in ("task", "system", "kind", "group", "marks", "about", "notes", "unanswered")
        },
        "scores": {
            name: _figure(of)
            for name, of in (row.scores | _empty(row)).items()
            if name in COLUMNS and of.value is not None
        },
        "categories": categories,
    }


def _figure(score: ScoreRow) -> list[Any]:
    """The value, its interval, n, and mean and interval as text: every figure is rounded here, none in the page."""
    text = f"{score.value:.0f}" if score.metric == "empty" else mean_text(score)
    plain = score.metric in (*WORDS, "unparsed", "cut", "empty")
    spread = "" if plain else interval_text(score.low, score.high).strip()
    return [_short(score.value), _short(score.low), _short(score.high), score.n, text, spread]


def _empty(row: BoardRow) -> dict[str, ScoreRow]:
    """How many answers hold no text, as a figure of the first table; none of a reported row."""
    if "words" not in row.scores:
        return {}
    return {"empty": replace(row.scores["words"], metric="empty", value=float(row.empty), low=None, high=None)}


def _inspection(one: Inspection) -> dict[str, Any]:
    """The two tables of "Why it errs", of one run and task: cells of text."""
    return {
        "task": one.task,
        "run": one.run,
        "consistency": [
            [
                of.what,
                share_text(of.value) + interval_text(of.low, of.high),
                share_text(of.both_right),
                str(of.pairs),
                str(of.images),
            ]
            for of in one.consistency
        ],
        "blind": [
            [
                of.metric,
                share_text(of.value),
                "-" if of.prior is None else share_text(of.prior),
                share_text(of.best),
                of.best_of,
            ]
            for of in one.blind
        ],
    }


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _viewed(task: str, shown: Sequence[BoardRow], pictures: _Pictures | None) -> dict[str, Any]:
    """Every question of a task, every system's answer to it, and a sign for how good that is."""
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
                "name": of.system,
                "signs": [_sign(row, questions(of)) for row in rows],
                "answers": [_shown(of.answers.get(row["id"])) for row in rows],
            }
            for of in shown
        ],
    }


def _sign(row: Mapping[str, Any], scored: Mapping[str, QuestionScores]) -> str:
    """R right, W wrong, U no verdict, by most of the sampled replies; open: X all words of the reference, else tenths;
    - no answer: what `_shown` gives is then the reason."""
    if row["id"] not in scored:
        return "-"
    scores = scored[row["id"]].scores
    if row["kind"] == "closed":
        return "R" if scores.get("closed_accuracy", 0) >= 0.5 else "U" if scores.get("unparsed", 0) >= 0.5 else "W"
    recall = scores.get("recall", 0.0)
    return "X" if recall == 1 else str(int(10 * recall))


_FAILED = re.compile(r"\[LMMS_EVAL_REQUEST_FAILED after (\d+) (?:attempts|retries)\]\s*(.*)", re.DOTALL)


def _shown(answer: str | None) -> str:
    """An answer as the viewer shows it, cut where it is long; where there is none, why."""
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


class _Pictures:
    """Thumbnails by image, each made once: as data, or as files beside the page, by their names there."""

    def __init__(self, images: str) -> None:
        self.images = images
        self.made: list[str] = []
        self.files: dict[str, bytes] = {}

    def of(self, name: str) -> dict[str, int]:
        """Image id -> its place in `made`, for a data set's test split."""
        from stllava_eval.datasets import read_split
        from stllava_eval.images import decode

        places: dict[str, int] = {}
        for row in read_split(name, "test"):
            if row["image_id"] in places:
                continue
            picture = decode(row["image"]["bytes"])
            picture.thumbnail((SIDE, SIDE))
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=70)
            places[row["image_id"]] = len(self.made)
            if self.images == "folder":
                file = f"images/{name}-{row['image_sha256'][:16]}.jpg"
                self.files[file] = buffer.getvalue()
                self.made.append(file)
            else:
                self.made.append("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode())
        return places


def _packed(viewer: Mapping[str, Mapping[str, Any]], keep: int, pictures: Sequence[str]) -> dict[str, Any]:
    """The viewer with at most `keep` questions a task, those on which systems differ most, in the split's order; equal
    answers and images held once."""
    strings: dict[str, int] = {}
    used: dict[int, int] = {}
    made = {}
    for task, of in viewer.items():
        columns = [system["signs"] for system in of["systems"]]
        interest = [len({signs[place] for signs in columns}) for place in range(len(of["questions"]))]
        places = sorted(sorted(range(len(interest)), key=lambda place: (-interest[place], place))[:keep])
        questions = []
        for place in places:
            question = dict(of["questions"][place])
            picture = of["images"].get(question["image_id"])
            question["image"] = None if picture is None else used.setdefault(picture, len(used))
            questions.append(question)
        made[task] = {
            "of": len(of["questions"]),
            "questions": questions,
            "systems": [
                {
                    "name": system["name"],
                    "signs": "".join(system["signs"][place] for place in places),
                    "answers": [strings.setdefault(system["answers"][place], len(strings)) for place in places],
                }
                for system in of["systems"]
            ],
        }
    return {"viewer": made, "strings": list(strings), "images": [pictures[place] for place in used]}


def _html(data: Mapping[str, Any]) -> str:
    script = files("stllava_eval").joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    packed = gzip.compress(
        json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace"), mtime=0
    )
    return Template(files("stllava_eval").joinpath("page.html").read_text(encoding="utf-8")).substitute(
        script=script, script_hash=f"sha256-{digest}", data=base64.b64encode(packed).decode()
    )
