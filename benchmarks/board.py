"""Time and memory of `leaderboard`, `compare`, `inspect` and `gate` on three sets of official size and 20 models.

    python benchmarks/board.py --json FILE [--models 20]

VQA-RAD and SLAKE are the real test splits (from $STLLAVA_SHARED, by default ../shared); PathVQA's images cannot be
passed on, so its split is simulated: 6,761 questions in the official proportion on 858 images of noise. Every other
model answers in sentences of 25 words, as models of the paper's table do. Each command runs as a process of its own,
twice; the faster run counts.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from figures import write
from PIL import Image

SENTENCE = (
    "In this image the findings are best described as {answer}, although clinical correlation and a comparison with "
    "earlier studies would be needed to be sure of it."
)


DRIVER = """
import sys
from pathlib import Path
from stllava_eval.cli import main
code = main(sys.argv[1:])
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(code, 1024 * int(peak.split()[1]), file=sys.stderr)
"""


def pathvqa() -> None:
    """The simulated split, prepared as if official."""
    from stllava_eval.data.catalog import Row
    from stllava_eval.data.splits import write_split

    random = np.random.default_rng(0)
    images = []
    for _ in range(858):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    words = [
        "necrosis",
        "fibrosis",
        "tumor cells",
        "the renal cortex",
        "chronic inflammation",
        "lymphocytes",
        "a gross specimen",
    ]
    rows = []
    for number in range(6761):
        place, closed = int(random.integers(858)), number < 3391
        rows.append(
            Row(
                id=f"q{number:04}",
                image=images[place],
                image_id=f"test_{place:04}.jpg",
                question=f"Is {words[number % 7]} present in field {number}?"
                if closed
                else f"What is seen in field {number}?",
                reference=("yes", "no")[int(random.integers(2))] if closed else words[int(random.integers(7))],
                kind="closed" if closed else "open",
                categories={"question_type": "is" if closed else "what"},
            )
        )
    write_split(
        "pathvqa", "test", rows, edition="simulated", official=True, sample=False, source="noise", licence="CC0-1.0"
    )


def runs(folder: Path, models: int) -> list[Path]:
    """A run folder for each model: each right with a chance of its own, every other one in sentences."""
    from stllava_eval.runs.folder import answer_row, write_run
    from stllava_eval.runs.scores import split_rows

    made = []
    for model in range(models):
        random = np.random.default_rng(model)
        lines = []
        for task in ("vqarad", "slake", "pathvqa"):
            rows = split_rows(task)
            for row in rows:
                of = row if random.random() < 0.4 + 0.02 * model else rows[int(random.integers(len(rows)))]
                answer = SENTENCE.format(answer=of["reference"]) if model % 2 else of["reference"]
                lines.append(answer_row(task, row, row["question"], answer, None))
        checkpoint = {"name": f"model-{model}", "sha256": f"{model:064}", "trained_on": None}
        made.append(
            write_run(
                lines,
                {"model": "stllava_med", "checkpoint": checkpoint, "images": "own"},
                folder=folder / f"model-{model:02}",
            )
        )
    return made


def measured(command: list[str]) -> dict[str, float]:
    """Seconds, and the peak of resident memory in MB, of the faster of two runs."""
    best: dict[str, float] = {}
    for _ in range(2):
        begun = time.monotonic()
        ran = subprocess.run(
            [sys.executable, "-c", DRIVER, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        seconds = time.monotonic() - begun
        code, peak = map(int, ran.stderr.decode().split()[-2:])
        assert code in (0, 1, 2), command
        if not best or seconds < best["seconds"]:
            best = {"seconds": round(seconds, 2), "peak_mb": round(peak / 2**20)}
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", default="-", help="where the figures go (default: -, stdout)")
    parser.add_argument("--models", type=int, default=20, help="how many (default: 20)")
    arguments = parser.parse_args()
    shared = Path(os.environ.get("STLLAVA_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["STLLAVA_HOME"] = folder
        from stllava_eval.data.prepare import prepare

        for name in ("vqarad", "slake"):
            for split in ("test", "train"):
                prepare(name, split, shared / "data" / name)
        pathvqa()
        made = [str(run) for run in runs(Path(folder) / "runs", arguments.models)]
        out = Path(folder) / "out"
        figures = {
            "models": arguments.models,
            "leaderboard": measured(["leaderboard", *made]),
            "leaderboard_with_files": measured(["leaderboard", *made, "--published", "--out", str(out)]),
            "page_bytes": (out / "index.html").stat().st_size,
            "leaderboard_of_4_with_files": measured(["leaderboard", *made[:4], "--published", "--out", str(out)]),
            "page_bytes_of_4": (out / "index.html").stat().st_size,
            "compare_2": measured(["compare", *made[:2]]),
            "compare_all": measured(["compare", *made]),
            "inspect_1": measured(["inspect", made[0]]),
            "gate": measured(["gate", made[2], "--baseline", made[0]]),
        }
    write(figures, arguments.json)


if __name__ == "__main__":
    main()
