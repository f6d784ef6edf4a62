"""How many answers of each family of models equal those of its own `generate`, one question at a time.

`python benchmarks/equality.py --json FILE` writes a tiny random checkpoint of every family of tests/families.py, asks
questions about images of noise in random groups, lengths, stops and earlier rounds, as tests/eval/inference/
test_families.py does, and counts the answers that are equal in float32 by family.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from figures import write

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "eval" / "inference")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="-", metavar="FILE", help="where to write the figures (default: stdout)")
    parser.add_argument("--rounds", type=int, default=10, help="of 20 questions for each family (default: 10)")
    given = parser.parse_args()
    torch.set_num_threads(1)

    from families import SHARED, write_family  # of the tests, whose folder is on the path now
    from test_families import answers, generated, same, some_questions

    from stllava_eval.inference.generic import TransformersAnswerer

    figures = {}
    with tempfile.TemporaryDirectory(prefix="stllava-families-") as folder:
        for name in SHARED:
            answerer = TransformersAnswerer(str(write_family(name, Path(folder) / name)), rows=7, batch_tokens=2000)
            equal = tokens = count = 0
            for seed in range(100, 100 + given.rounds):
                asked = some_questions(seed, 20)
                expected = [generated(answerer, question) for question in asked]
                came = answers(answerer, asked)
                equal += sum(map(same, came, expected))
                tokens += sum(answer.tokens for answer in expected)
                count += len(asked)
            figures[name] = {"equal": equal, "questions": count, "tokens": tokens}
            print(name, figures[name], file=sys.stderr, flush=True)
    write({"format": 1, "families": figures}, given.json)


if __name__ == "__main__":
    main()
