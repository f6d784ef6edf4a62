"""Give lmms-eval the functions that `tasks/*.yaml` name: a prepared row becomes a request, its answer score records.

lmms-eval swallows exceptions and exits 0, so a wrong input here prints its line and exits 2 by itself.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stllava_eval.data.prepare import prepare_on_first_use
from stllava_eval.data.splits import read_manifest, read_split
from stllava_eval.errors import InputError, printable
from stllava_eval.images import decode
from stllava_eval.scoring.final_answer import unpack_final_answers
from stllava_eval.scoring.metrics import score_replies

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image


log = logging.getLogger("stllava_eval")


def vqarad_test(_: datasets.Dataset) -> datasets.Dataset:
    """Return the prepared test split of VQA-RAD, in place of the stub that the task file names."""
    return _test_split("vqarad")


def slake_test(_: datasets.Dataset) -> datasets.Dataset:
    """Return the prepared English test split of SLAKE, in place of the stub that the task file names."""
    return _test_split("slake")


def pathvqa_test(_: datasets.Dataset) -> datasets.Dataset:
    """Return the prepared test split of PathVQA, in place of the stub that the task file names."""
    return _test_split("pathvqa")


def _test_split(name: str) -> datasets.Dataset:
    try:
        prepare_on_first_use(name, "test")
        if read_manifest(name, "test").sample:
            log.warning("%s: SAMPLE DATA. Its scores say nothing about the official test split.", name)
        return read_split(name, "test")
    except InputError as error:
        print(printable(f"stllava-eval: {error}"), file=sys.stderr)
        raise SystemExit(2) from error


def image(row: Mapping[str, Any]) -> list[Image]:
    """Return the row's image in a list, as lmms-eval wants it: RGB, with the EXIF orientation applied."""
    return [decode(row["image"]["bytes"])]


def score_records(row: Mapping[str, Any], answers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return one record `{score, id, image_id}` per score of the row's kind; none for a request that failed.

    The final answer in the reply is scored (`scoring.final_answer`); for several sampled replies it is the mean. The
    scores of the other kind are absent, not zero, so that each mean is over its own questions; `image_id` is the
    cluster of lmms-eval's standard error, `id` lets `stllava-eval score` find the question again.
    """
    scores = score_replies(
        unpack_final_answers(answers[0], row["question"]), row["reference"], row["kind"], row["question"]
    )
    return {name: {"score": value, "id": row["id"], "image_id": row["image_id"]} for name, value in scores.items()}


def mean(records: Sequence[Mapping[str, Any]]) -> float:
    """Return the records' mean score, exact in every order, as `statistics.mean_clustered` has it."""
    return math.fsum(record["score"] for record in records) / len(records)
