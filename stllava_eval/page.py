"""A board, its runs -> files: Markdown, CSV, JSON, LaTeX and one page that needs no network."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from stllava_eval.blind import PRIOR
from stllava_eval.home import json_text, refuse_file, write_together
from stllava_eval.inspection import INSPECTED, inspect
from stllava_eval.leaderboard import (
    BEST,
    EXPLAINED,
    GROUPS,
    NOTICE,
    RANKED,
    BoardRow,
    board_csv,
    board_json,
    board_latex,
    board_markdown,
    by_task,
    mean_text,
    questions,
    remarks,
    title,
)
from stllava_eval.runs import QuestionScores, categories_of, dataset_of, split_rows

LIMIT = 5_000_000  # bytes of the page; beyond it, the viewer shows fewer questions
SIDE = 200  # pixels of a thumbnail's longer side; our choice
CUT = 400  # characters of an answer that the page shows; our choice


def write_board(out: Path, rows: Sequence[BoardRow], images: str = "page", pathvqa_images: bool = False) -> None:
    """Write board.md, .csv, .json, .tex and index.html into `out`.

    Args:
        out: A folder; files of these names in it are replaced.
        rows: What `board` makes of run folders.
        images: `page`: thumbnails in index.html; `folder`: in a folder `images` beside it; `none`.
        pathvqa_images: Show PathVQA's images too, unless it is the sample anyway. They belong to publishers.

    Raises:
        InputError: The folder cannot be written; what was in it stays as it was.
    """
    refuse_file(out, "--out")
    pictures = _Pictures(images)
    text = _page(rows, pictures, pathvqa_images)
    write_together(
        out,
        {
            "board.md": board_markdown(rows),
            "board.csv": board_csv(rows),
            "board.json": json_text(board_json(rows)),
            "board.tex": board_latex(rows),
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
    base = {
        "notice": NOTICE,
        "explained": EXPLAINED,
        "groups": GROUPS,
        "best": BEST,
        "inspected": INSPECTED,
        "metrics": _metrics(),
        "tasks": [
            {"name": task, "data": of[0].data, "title": title(task, of), "remarks": remarks(of)}
            for task, of in by_task(rows).items()
        ],
        "rows": [_row(row) for row in rows],
        "inspections": [
            {
                "task": one.task,
                "run": one.run,
                **{name: list(map(asdict, getattr(one, name))) for name in ("consistency", "blind")},
            }
            for one in inspect(rows)
        ],
    }
    keep = max((len(of["questions"]) for of in viewer.values()), default=0)
    while True:
        text = _html(base | _packed(viewer, keep, pictures.made))
        if len(text) <= LIMIT or keep <= 20:
            return text
        keep = keep * 3 // 4


def _metrics() -> list[dict[str, str]]:
    from stllava_eval.metrics import SCORES

    titles = {
        "words": "mean words of an answer",
        "unparsed": "closed answers without a verdict, x100",
        "cut": "replies that stopped inside their thought, x100",
    }
    return [
        {
            "name": name,
            "kind": SCORES[name].kind,
            "title": titles.get(name)
            or ("as the published script counts" if SCORES[name].published else "our definition"),
        }
        for name in (*RANKED, "words", "unparsed", "cut")
    ]


def _row(row: BoardRow) -> dict[str, Any]:
    categories: dict[str, dict[str, Any]] = {}
    for one in row.scored.rows if row.scored else ():
        if one.metric in INSPECTED and one.category != "all" and one.value is not None:
            categories.setdefault(one.metric, {})[one.category] = [
                _short(one.value),
                _short(one.low),
                _short(one.high),
                one.n,
            ]
    wanted = (*RANKED, "words", "unparsed", "cut")
    return {
        **{
            name: getattr(row, name)
            for name in ("task", "system", "kind", "group", "marks", "about", "notes", "unanswered")
        },
        "scores": {
            name: [_short(of.value), _short(of.low), _short(of.high), of.n, mean_text(of)]
            for name, of in row.scores.items()
            if name in wanted and of.value is not None
        },
        "categories": categories,
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
                "answers": [_cut(of.answers[row["id"]]) if row["id"] in of.answers else None for row in rows],
            }
            for of in shown
        ],
    }


def _sign(row: Mapping[str, Any], scored: Mapping[str, QuestionScores]) -> str:
    """R right, W wrong, U no verdict; of open questions X all words of the reference, else tenths; - unanswered."""
    if row["id"] not in scored:
        return "-"
    scores = scored[row["id"]].scores
    if row["kind"] == "closed":
        return "R" if scores.get("closed_accuracy") else "U" if scores.get("unparsed") else "W"
    recall = scores.get("recall", 0.0)
    return "X" if recall == 1 else str(int(10 * recall))


def _cut(answer: str) -> str:
    return answer if len(answer) <= CUT else answer[:CUT] + " ..."


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
                    "answers": [
                        -1 if (said := system["answers"][place]) is None else strings.setdefault(said, len(strings))
                        for place in places
                    ],
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
