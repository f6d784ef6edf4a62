"""How fast answers are scored: every score of 451 invented VQA-RAD-like answers, with empty caches each time.

    python benchmarks/scoring.py --json FILE    (- prints)

The ratio is paired: each round times our BLEU-carrying `score` and the same with nltk's `sentence_bleu` for BLEU, which
is what the published script spends most of its time in, in turn.
"""

import argparse
import random
import statistics
import sys
import time
import warnings

from figures import write

from stllava_eval.scoring import llavamed, metrics, statements, verdict, verdict_v1, words

WORDS = ["the", "left", "right", "lung", "lobe", "upper", "mass", "effusion", "shows", "image", "of", "CT", "no", "yes"]


def cases(count: int, seed: int) -> list[tuple[str, str, str, str]]:
    draw = random.Random(seed)

    def text(longest: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, longest)))

    return [
        (text(30), "yes", "closed", "Is it?") if draw.random() < 0.6 else (text(30), text(5), "open", "What is it?")
        for _ in range(count)
    ]


def seconds(rows: list[tuple[str, str, str, str]], with_nltk: bool) -> float:
    from nltk.translate.bleu_score import sentence_bleu

    for module in (metrics, statements, verdict, verdict_v1, words):
        for remembered in vars(module).values():
            if hasattr(remembered, "cache_clear"):
                remembered.cache_clear()
    start = time.process_time()
    for answer, reference, kind, question in rows:
        metrics.score(answer, reference, kind, question)
        if with_nltk and kind == "open":
            sentence_bleu([llavamed.normalize_llavamed(reference).split()], llavamed.normalize_llavamed(answer).split())
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="-", metavar="FILE", help="where the figures go (default: printed)")
    parser.add_argument("--rounds", type=int, default=9, help="paired rounds (default: 9)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    ours, theirs = [], []
    for round_ in range(arguments.rounds):
        rows = cases(451, round_)
        pair = {flag: seconds(rows, flag) for flag in ((False, True) if round_ % 2 else (True, False))}
        ours.append(pair[False])
        theirs.append(pair[True])
    figures = {
        "questions_per_cpu_second": round(451 / statistics.median(ours)),
        "cost_with_nltk_bleu_too": round(statistics.median(b / a for a, b in zip(ours, theirs, strict=True)), 2),
    }
    write(figures, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
