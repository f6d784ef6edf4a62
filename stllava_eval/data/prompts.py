"""Turn a question into the text that a model is asked, by one of the prompts of the tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stllava_eval.errors import InputError

SHORT = "Answer the question using a single word or phrase."  # LLaVA-1.5's prompt for short answers
TWO_OPTIONS = "Please choose from the following two options:"  # LLaVA-Med's suffix of closed questions
OPTIONS = f"{TWO_OPTIONS} [yes, no]"
PROMPTS = {
    "bare": "the question alone, as the paper's figures imply (docs/evaluate/metrics.md)",
    "short": f"the question, then on its own line: {SHORT}",
    "options": f"a yes/no question, then: {OPTIONS}",
    "options_llavamed": "every closed question with that suffix, as LLaVA-Med's own file of VQA-RAD has it",
}


def text(row: Mapping[str, Any], kwargs: Mapping[str, str] | None = None) -> str:
    """Return the row's question in the prompt preset `kwargs["prompt"]`, one of `PROMPTS` (default: bare).

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
