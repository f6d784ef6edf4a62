"""Name the fields in which files of answers keep ids, answers, questions, references and images."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

log = logging.getLogger("stllava_eval")

# Fields that have the id of the question.
ID_FIELDS = ("id", "question_id", "qid")
# Fields that have what the model said.
ANSWER_FIELDS = (
    *("answer", "text", "model_answer", "response", "prediction", "pred", "output", "generated_text"),
    *("model_output", "model_response", "predicted_answer", "generation", "completion", "hypothesis", "predict"),
)
QUESTION_FIELDS = ("question", "query", "prompt", "input")
PROMPT_FIELDS = ("prompt", "input")  # these may have words around the question; `input` is in lmms-eval's samples
REFERENCE_FIELDS = (
    *("reference", "references", "gt_ans", "gt_answer", "answer_gt", "gt", "ground_truth", "gold", "gold_answer"),
    *(
        "target",
        "label",
        "labels",
        "answers",
        "correct_answer",
        "true_answer",
        "expected",
        "expected_answer",
        "solution",
    ),
)
IMAGE_FIELDS = ("image_name", "img_name", "image")
IMAGE_MARK = "<image>"  # the LLaVA family writes it into prompts where the image is
LANGUAGE_FIELDS = ("q_lang", "lang")  # SLAKE's own field, and MedEvalKit's
# Fields that show which question a row is about, beside its id.
CONTENT_FIELDS = (*QUESTION_FIELDS, *REFERENCE_FIELDS, *IMAGE_FIELDS)
# Smallest share of answers that equal their references letter for letter at which a warning asks whether the references
# were read (our choice: the best fine-tuned models reach 0.9).
EQUAL_TO_REFERENCES = 0.95
# What programs write if there is no answer; a model may also say "None".
NO_ANSWERS = ("", "nan", "none", "null", "<na>", "n/a", "#n/a")
# Tokens that end a reply: of Llama, of Gemma, and of templates that write `<|im_end|>` and the like.
END_TOKEN = re.compile(r"(</s>|<eos>|<end_of_turn>|<\|[a-z_]+\|>)\s*$")
# Largest share of rows in a file without ids that several questions fit (our choice). VQA-RAD's hub copy has 26 such
# rows of 451, and SLAKE 751 of 1,061.
MOST_AMBIGUOUS = 0.1


@dataclass(frozen=True)
class Reading:
    """What the user says about a file of answers: the options of `stllava-eval score`."""

    extract: str | None = None
    """The rule that extracts the final answer from each reply. None keeps the answers of a run folder and applies
    `final` to all other rows."""
    answer_field: str | None = None
    """The field with the model's answer; None finds it, if only one field can be meant."""
    id_field: str | None = None
    """The field with the question's id; None finds it."""
    ignore_unknown: bool = False
    """Whether to leave out rows whose question the split does not have, as in files that hold more than one split."""
    split: str = "test"
    """The prepared split that was asked."""
    prompt: str | None = None
    """The preset of `data.prompts.PROMPTS` that was asked, if neither the file nor the task's name says it."""
    images: str | None = None
    """The images that were shown (own, other, black), if the file does not say it."""
