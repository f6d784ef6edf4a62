"""How fast candidates are drawn: our engine against the authors' procedure, one question after another.

`python benchmarks/candidates.py --json FILE [--quick]`, on the random network of toy_llava.py (576 image tokens),
float32, one thread. For every image: a description, five questions, two answers to each, with the authors' prompts and
settings. Nothing ends by itself, so that both write the same number of tokens: 60, 16 and 60.

The authors' procedure is `visual_sq.py` and `model_collectA.py`: each prompt alone, its image prepared, encoded and put
through the language model again, in `generate` with sampling. It is given the very prompts that ours asked. Its tower
runs once for each prompt; their own code ran it twice.

`speedup` is the median over rounds of the authors' CPU seconds / ours, new images in each round, beside the least and
the greatest; `seconds` are ours, for an image.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from figures import write
from toy_llava import jpeg, write_checkpoint

IMAGES, QUICK_IMAGES, ROUNDS = 6, 2, 3
LENGTHS = {"describe_tokens": 60, "question_tokens": 16, "answer_tokens": 60}  # our choice


def measure(folder: Path, images: int, rounds: int) -> dict[str, Any]:
    import torch

    from stllava_eval.inference.answerer import Answerer
    from stllava_train.preferences.candidates import PRESETS, rows_of

    torch.set_num_threads(1)
    write_checkpoint(folder / "checkpoint", "long")
    answerer = Answerer(str(folder / "checkpoint"))
    answerer.ends = {-1}
    settings = replace(PRESETS["authors"], **LENGTHS)
    draw = np.random.default_rng(0)
    ratios, seconds, asked_in_all = [], [], 0
    for number in range(rounds + 1):  # the first one warms up
        files = [folder / f"{number}-{image}.jpg" for image in range(images if number else 1)]
        for file in files:
            file.write_bytes(jpeg(draw))
        with Recorded(answerer) as asked:
            began = time.process_time()
            rows = list(rows_of(answerer, [(file.name, file, file.name) for file in files], settings))
            ours = time.process_time() - began
        assert len(rows) == len(files)
        began = time.process_time()
        one_by_one(answerer, asked)
        theirs = time.process_time() - began
        if number:
            ratios.append(theirs / ours)
            seconds.append(ours / len(files))
            asked_in_all += len(asked)
    return {
        "speedup": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
        "seconds": statistics.median(seconds),
        "prompts_an_image": asked_in_all / (images * rounds),
        "rounds": rounds,
    }


class Recorded(list):
    """The questions that an answerer is asked meanwhile."""

    def __init__(self, answerer: Any) -> None:
        super().__init__()
        self.answerer, self.prompt = answerer, answerer._prompt

    def __enter__(self) -> Recorded:
        def prompt(place: int, question: Any) -> Any:
            self.append(question)
            return self.prompt(place, question)

        self.answerer._prompt = prompt
        return self

    def __exit__(self, *_: object) -> None:
        self.answerer._prompt = self.prompt


def one_by_one(answerer: Any, asked: list[Any]) -> None:
    """Each prompt through `generate`, as the authors' scripts do."""
    import torch

    for question in asked:
        ids = torch.tensor([answerer.token_ids(question.text, question.history, question.template)])
        how: dict[str, Any] = {"do_sample": False}
        if sampling := question.sampling:
            torch.manual_seed(40 + 2 * question.sample_index)  # authors' model_collectA.py
            how = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
            }
        with torch.inference_mode():
            made = answerer.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=answerer.pixels(question.image()),
                min_new_tokens=question.max_new_tokens,
                max_new_tokens=question.max_new_tokens,
                **how,
            )
        assert made.shape[1] == ids.shape[1] + question.max_new_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", required=True, metavar="FILE", help="where the figures go, - for the terminal")
    parser.add_argument("--quick", action="store_true", help="one round of two images instead of three of six")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        images, rounds = (QUICK_IMAGES, 1) if arguments.quick else (IMAGES, ROUNDS)
        figures = measure(Path(folder), images, rounds)
    write(figures, arguments.json)


if __name__ == "__main__":
    main()
