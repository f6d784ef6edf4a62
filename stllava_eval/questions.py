"""A prepared row -> the request that a model sees; its answer -> score records. What `tasks/*.yaml` name.

lmms-eval swallows exceptions and exits 0, so a wrong input here prints its line and exits 2 by itself.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stllava_eval.errors import InputError, printable

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

log = logging.getLogger("stllava_eval")

SHORT = "Answer the question using a single word or phrase."  # LLaVA-1.5's prompt for short answers
TWO_OPTIONS = "Please choose from the following two options:"  # LLaVA-Med's suffix of closed questions
OPTIONS = f"{TWO_OPTIONS} [yes, no]"
PROMPTS = {
    "bare": "the question alone, as the paper's figures imply (docs/metrics.md)",
    "short": f"the question, then on its own line: {SHORT}",
    "options": f"a yes/no question, then: {OPTIONS}",
    "options_llavamed": "every closed question with that suffix, as LLaVA-Med's own file of VQA-RAD has it",
}


def vqarad_test(_: datasets.Dataset) -> datasets.Dataset:
    """The prepared test split of VQA-RAD, in place of the stub that the task file names."""
    return _test_split("vqarad")


def slake_test(_: datasets.Dataset) -> datasets.Dataset:
    """The prepared English test split of SLAKE, in place of the stub that the task file names."""
    return _test_split("slake")


def pathvqa_test(_: datasets.Dataset) -> datasets.Dataset:
    """The prepared test split of PathVQA, in place of the stub that the task file names."""
    return _test_split("pathvqa")


def _test_split(name: str) -> datasets.Dataset:
    from stllava_eval.datasets import prepare_on_first_use, read_manifest, read_split

    try:
        prepare_on_first_use(name, "test")
        if read_manifest(name, "test").sample:
            log.warning("%s: SAMPLE DATA. Its scores say nothing about the official test split.", name)
        return read_split(name, "test")
    except InputError as error:
        print(printable(f"stllava-eval: {error}"), file=sys.stderr)
        raise SystemExit(2) from error


def image(row: Mapping[str, Any]) -> list[Image]:
    """The row's image, alone in a list as lmms-eval wants it: RGB, EXIF orientation applied."""
    from stllava_eval.images import decode

    return [decode(row["image"]["bytes"])]


def text(row: Mapping[str, Any], kwargs: Mapping[str, str] | None = None) -> str:
    """The row's question in the prompt preset `kwargs["prompt"]`, one of `PROMPTS` (default: bare).

    `options` adds its suffix where the reference is yes or no; the other closed questions name their options
    themselves. `options_llavamed` is what LLaVA-Med asked on VQA-RAD, by the prompts in its published answers
    (microsoft/LLaVA-Med, llava/eval/eval_metrics/answer-file-llava-zeorshot.jsonl): every closed question has the
    suffix, also "Is this a CT or an MRI?", and the bracket is [Yes, No] where the reference begins with a capital. A
    copy of the data in lower case, as the hub's, makes every bracket [yes, no].
    """
    prompt = (kwargs or {}).get("prompt", "bare")
    if prompt == "short":
        return f"{row['question']}\n{SHORT}"
    if prompt == "options" and row["kind"] == "closed" and row["reference"].strip().lower() in ("yes", "no"):
        return f"{row['question']} {OPTIONS}"
    if prompt == "options_llavamed" and row["kind"] == "closed":
        return (
            f"{row['question']} {TWO_OPTIONS} {'[Yes, No]' if row['reference'].strip()[:1].isupper() else '[yes, no]'}"
        )
    if prompt not in PROMPTS:
        raise InputError(f"prompt {prompt!r} is unknown. A prompt is one of {', '.join(PROMPTS)}.")
    return row["question"]


def score_records(row: Mapping[str, Any], answers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return one record `{score, id, image_id}` per score of the row's kind; none for a request that failed.

    What is scored is the final answer in the reply (`extract.final_answer`); of several sampled replies, the mean. The
    scores of the other kind are absent, not zero, so that each mean is over its own questions; `image_id` is the
    cluster of lmms-eval's standard error, `id` lets `stllava-eval score` find the question again.
    """
    from stllava_eval.extract import opened
    from stllava_eval.metrics import score_replies

    scores = score_replies(opened(answers[0], row["question"]), row["reference"], row["kind"], row["question"])
    return {name: {"score": value, "id": row["id"], "image_id": row["image_id"]} for name, value in scores.items()}


def mean(records: Sequence[Mapping[str, Any]]) -> float:
    """Return the records' mean score, exact in every order, as `statistics.mean_clustered` has it."""
    return math.fsum(record["score"] for record in records) / len(records)
