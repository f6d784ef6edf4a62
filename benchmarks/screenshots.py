"""Take pictures of the leaderboard's page: official questions -> docs/compare/*.png.

    python benchmarks/screenshots.py [--out docs/compare]

The questions are the real test splits of VQA-RAD and SLAKE (from $STLLAVA_SHARED, by default ../shared), and the
reported rows those of the papers. The measured systems are simulated, each right with a chance of its own, and their
names say so. `board-blind.png` has no simulated system: it shows reported and image-blind rows. Needs Chromium.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
LIMIT = 300_000  # bytes of a picture (our choice)
WIDE, PHONE = 1280, 400  # pixels

RANK_BY_CLOSED = """(() => {
    const select = [...document.querySelectorAll("select")].find((s) => s.textContent.includes("closed_llavamed ("))
    select.value = [...select.options].find((o) => o.textContent.startsWith("closed_llavamed (")).value
    select.dispatchEvent(new Event("change", { bubbles: true }))
})()"""

# file, width, dark, section at the top, height
PICTURES = (
    ("leaderboard-wide", WIDE, False, None, 1500),
    ("leaderboard-wide-dark", WIDE, True, None, 1500),
    ("leaderboard-phone", PHONE, False, None, 1500),
    ("leaderboard-phone-dark", PHONE, True, None, 1500),
    ("leaderboard-intervals-dark", WIDE, True, "intervals", 900),
    ("leaderboard-categories", WIDE, False, "breakdown", 900),
    ("leaderboard-errors", WIDE, False, "errors", 900),
    ("leaderboard-errors-phone", PHONE, False, "errors", 1500),
    ("leaderboard-questions", WIDE, False, "questions", 900),
    ("leaderboard-questions-phone-dark", PHONE, True, "questions", 1500),
)


def chance(*parts: str) -> float:
    """A number in [0, 1) that depends on `parts` alone."""
    return int.from_bytes(hashlib.sha256("\n".join(parts).encode()).digest()[:6]) / 2**48


Row = Mapping[str, str]


def system(name: str, skill: float, sentence: str) -> Callable[[Row, list[Row]], str]:
    """Right with a chance of `skill`; else it gives the reference of another question of the same kind."""

    def say(row: Row, rows: list[Row]) -> str:
        if chance("empty", name, row["id"]) < 0.01:
            return ""
        likely = skill / 3 if "plane" in row["question"].lower() else skill
        right = chance("skill", row["id"]) < likely or chance(name, row["id"]) < likely / 3
        same = [other for other in rows if other["kind"] == row["kind"]]
        of = row if right else same[int(chance("other", name, row["id"]) * len(same))]
        return sentence.format(of["reference"])

    return say


def runs(folder: Path) -> list[Path]:
    """Run folders of simulated systems, as `stllava-eval run` writes them."""
    from stllava_eval.data.prompts import text
    from stllava_eval.runs.folder import answer_row, write_run
    from stllava_eval.runs.scores import split_rows
    from stllava_eval.scoring.final_answer import final_answers

    long = "Simulated C, a checkpoint whose folder has a long name/epoch-3-of-3-dpo-beta-0.1-lr-5e-7-seed-17"
    about = {
        "Simulated A, stage 1": (0.35, "{}", "bare", "own", "aa", ["vqarad", "slake"], []),
        "Simulated A, DPO": (0.42, "The image shows {}.", "bare", "own", "ab", ["vqarad", "slake"], []),
        "Simulated A, DPO, black": (0.18, "The image shows {}.", "bare", "black", "ab", ["vqarad", "slake"], []),
        "Simulated B, fine-tuned on SLAKE": (0.60, "{}", "short", "own", "ba", ["vqarad", "slake"], ["slake"]),
        "Simulated B, base": (
            0.30,
            "It is {}, as far as I can see here.",
            "short",
            "own",
            "bb",
            ["slake"],
            [],
        ),
        long: (0.40, "{}", "bare", "own", "ca", ["slake"], []),
        "Simulated D, closed questions alone": (0.55, "{}", "options", "own", "da", ["slake"], []),
    }
    made = []
    for number, (name, (skill, sentence, prompt, images, sha256, tasks, learnt)) in enumerate(about.items()):
        say, lines = system(name, skill, sentence), []
        for task in tasks:
            rows = split_rows(task)
            for row in rows:
                answer = say(row, rows)
                if "closed" in name and row["kind"] == "open":
                    answer = "[LMMS_EVAL_REQUEST_FAILED after 0 attempts] closed.jsonl has no answer"
                if name == long and chance("lost", row["id"]) < 0.004:
                    answer = "[LMMS_EVAL_REQUEST_FAILED after 5 attempts] HTTP 503: the server is overloaded"
                asked = text(row, {"prompt": prompt})
                lines.append(answer_row(task, row, asked, final_answers([answer], asked, "final")[0]))
        checkpoint = {"name": name, "sha256": sha256 * 32, "trained_on": learnt}
        decided = {"model": "stllava_med", "named": name, "checkpoint": checkpoint, "images": images}
        made.append(write_run(lines, {**decided, "decoding": "greedy"}, folder=folder / f"run-{number}"))
    return made


def smaller(file: Path) -> None:
    """Save a picture with as few colours as it takes to stay below `LIMIT`."""
    picture = Image.open(file).convert("RGB")
    for colours in (256, 128, 64):
        buffer = io.BytesIO()
        picture.quantize(colours, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
        if buffer.tell() < LIMIT:
            break
    file.write_bytes(buffer.getvalue())


def main() -> None:
    """Make the board and its pictures."""
    from browser import Browser

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=ROOT / "docs" / "compare", help="default: docs/compare"
    )
    parser.add_argument("--board", metavar="DIR", type=Path, help="keep the board there too")
    given = parser.parse_args()
    shared = Path(os.environ.get("STLLAVA_SHARED") or ROOT.parent / "shared")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["STLLAVA_HOME"] = folder
        from stllava_eval.data.prepare import prepare
        from stllava_eval.reports.board_rows import board
        from stllava_eval.reports.page import write_board

        for name in ("vqarad", "slake"):
            for split in ("test", "train"):
                prepare(name, split, shared / "data" / name)
        out = given.board or Path(folder) / "board"
        write_board(out, board(runs(Path(folder) / "runs"), published=True))
        blind = Path(folder) / "blind"
        write_board(blind, board([], ["vqarad", "slake"], published=True))
        with Browser(Path(folder) / "profile") as browser:
            for file, width, dark, section, height in PICTURES:
                browser.open(f"file://{out.resolve()}/index.html", width=width, height=height, dark=dark)
                browser.wait("document.body && document.body.dataset.ready === 'yes'")
                if section:
                    browser.value(f"document.getElementById({section!r}).scrollIntoView()")
                time.sleep(0.5)  # images load late
                browser.picture(given.out / f"{file}.png")
                smaller(given.out / f"{file}.png")
            browser.open(f"file://{blind.resolve()}/index.html", width=WIDE, height=1220, dark=False)
            browser.wait("document.body && document.body.dataset.ready === 'yes'")
            browser.value(RANK_BY_CLOSED)
            time.sleep(0.5)
            browser.picture(given.out / "board-blind.png")
            smaller(given.out / "board-blind.png")


if __name__ == "__main__":
    main()
