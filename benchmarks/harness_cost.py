"""What the harness costs beside the model: CPU milliseconds per question of lmms-eval's loop, our adapter and scores.

`python benchmarks/harness_cost.py --json FILE` runs `lmms-eval --model stllava_med --tasks slake` on as many questions
and images as SLAKE's English test has (1,061 on 96), with the random network of toy_llava.py, whose answers are a
constant here: no image is decoded and no token computed. `evaluate_ms` is lmms-eval's `evaluate` per question, which
builds requests, calls the model, scores and writes the run; `generate_until_ms` is our part of it.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from figures import write
from toy_llava import write_checkpoint, write_questions

COUNTS = (11,) * 91 + (12,) * 5  # 1,061 questions on 96 images


def timed(function: Callable[..., Any], into: dict[str, float], name: str) -> Callable[..., Any]:
    """Return `function`, whose CPU seconds are added to `into[name]`."""

    def call(*arguments: Any, **named: Any) -> Any:
        start = time.process_time()
        try:
            return function(*arguments, **named)
        finally:
            into[name] = into.get(name, 0.0) + time.process_time() - start

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="-", metavar="FILE", help="where to write the figures (default: stdout)")
    given = parser.parse_args()
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="stllava-cost-") as folder:
        os.environ |= {"STLLAVA_HOME": f"{folder}/home", "STLLAVA_RUN": f"{folder}/run", "OMP_NUM_THREADS": "1"}
        os.environ["STLLAVA_CHECKPOINT"] = f"{folder}/model"
        write_checkpoint(Path(folder) / "model", "short")
        write_questions(Path(folder) / "home", "slake", COUNTS, seed=0)

        from lmms_eval import evaluator  # with torch, and after the environment is set

        from stllava_eval.inference.answerer import Answerer
        from stllava_eval.inference.types import Answer, Question
        from stllava_eval.lmms.model import StllavaMed

        def answer(_: Answerer, questions: Sequence[Question], *__: Any, **___: Any) -> Iterator[tuple[int, Answer]]:
            return ((index, Answer("yes", 1, True)) for index in range(len(questions)))

        Answerer.answer = answer  # type: ignore[method-assign,assignment]
        StllavaMed.generate_until = timed(StllavaMed.generate_until, seconds, "generate_until")  # type: ignore
        evaluator.evaluate = timed(evaluator.evaluate, seconds, "evaluate")
        sys.argv = ["lmms-eval", "--model", "stllava_med", "--tasks", "slake"]
        try:
            runpy.run_module("lmms_eval", run_name="__main__", alter_sys=True)
        finally:
            count = sum(COUNTS)
            figures = {f"{name}_ms": 1000 * spent / count for name, spent in seconds.items()}
            write({"format": 1, "questions": count, **figures}, given.json)


if __name__ == "__main__":
    main()
