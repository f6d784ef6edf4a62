"""An image-blind baseline of the prepared sets -> a file of its answers for each set, which `stllava-eval score` reads.

    python benchmarks/blind_run.py "commonest answer" answers/commonest

writes answers/commonest-vqarad.jsonl and so on. It takes the place of a model's answers where a board is tried.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from stllava_eval.data.catalog import DATASETS
from stllava_eval.data.splits import is_prepared
from stllava_eval.scoring.image_blind import image_blind_answers


def main(arguments: Sequence[str]) -> None:
    """Write the files of the baseline with the label `arguments[0]`, whose names begin with `arguments[1]`."""
    label, begin = arguments
    for name in DATASETS:
        if is_prepared(name, "test"):
            lines = [
                json.dumps({"id": id, "answer": said}) for id, said in image_blind_answers(name).answers[label].items()
            ]
            file = Path(f"{begin}-{name}.jsonl")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
