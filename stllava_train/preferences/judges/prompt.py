"""Define what is put to a judge: a candidate's question, two of its answers in an order, and the image."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import PIL.Image

from stllava_eval.errors import InputError
from stllava_eval.images import IMAGE_BYTES, decode, open_header
from stllava_eval.storage import read_bytes
from stllava_train.preferences.rows import Candidate
from stllava_train.preferences.verdicts import Verdict

# Paper, Fig. 3; the code's rule.json was not published
RULE_TEXT = (
    "We would like to request your feedback on the quality of two answers in response to the user question displayed "
    "above. The user asks the question on observing an image. For your reference, you will see an image. \n"
    "Please rate the helpfulness, relevance, accuracy, level of details of the answers. Each answer receives an "
    "overall score on a scale of 1 to 10, where a higher score indicates better overall performance.\n"
    "Please first output a single line containing only two values indicating the scores for Answer 1 and 2, "
    "respectively. The two scores are separated by a space."
)
# The reply where the server keeps to a form. Scores come first, as in the paper's prompt
FORM = {
    "type": "json_schema",
    "json_schema": {
        "name": "scores",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {
                "score_1": {"type": "number", "description": "of Answer 1, 1 to 10"},
                "score_2": {"type": "number", "description": "of Answer 2, 1 to 10"},
                "reason": {"type": "string"},
            },
            "required": ["score_1", "score_2", "reason"],
            "additionalProperties": False,
        },
    },
}
# A bracket that the prompt's own marks begin with, in a text of the model's
MARK = re.compile(r"\[(?=\s*(?:/\s*)?(?:end\b|answer\b|question\b|system\b|image\b))", re.IGNORECASE)
# An answer that speaks to its judge, not to who asked. Our choice; it finds what is blunt, not what is clever
TO_THE_JUDGE = re.compile(
    r"\b(?:score|rate|grade)\s+(?:this|my|answer [12])\s+(?:answer|response|reply|10|ten|highest)\b"
    r"|\b(?:score|rate|grade|give|award)\s+(?:this|my|me|it|answer [12])\b.{0,30}\b(?:10|ten|points?|scores?|best)\b"
    r"|\b(?:ignore|disregard|forget)\b.{0,30}\b(?:instructions?|rules?|prompt|other answer|answer [12])\b"
    r"|\b(?:prefer|choose|pick|select)\s+(?:(?:this|my)\s+(?:answer|response|reply)|answer [12])\b"
    r"|\b(?:dear|note to the|attention:?) (?:judge|grader|evaluator)\b",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Preset:
    """How a judge is asked. `PRESETS` has ours and the authors'.

    Attributes:
        temperature: Of the judge's words.
        max_tokens: Of its reply, at most.
        both_orders: Ask with each answer shown first once.
        form: Ask for `FORM`, where the server knows it.
        guarded: Marks of the prompt in the model's texts lose their bracket; answers that speak to the judge are not
            judged.
        strict: Read scores as the authors' code does.
        thought: Tokens in which it may think, on top of its reply. Above 0 it is asked as a model that thinks: with
            `max_completion_tokens` and without a temperature.
    """

    temperature: float
    max_tokens: int
    both_orders: bool
    form: bool
    guarded: bool
    strict: bool
    thought: int = 0

    @property
    def room(self) -> tuple[int, int]:
        """Return the tokens of the reply and of its thought, at most."""
        return self.max_tokens, self.thought


PRESETS = {
    "ours": Preset(0.0, 1024, both_orders=True, form=True, guarded=True, strict=False),  # temperature: our choice
    "authors": Preset(0.2, 1024, both_orders=False, form=False, guarded=False, strict=True),  # eval_gpt4v_review.py
}


def prompt(question: str, first: str, second: str, guarded: bool = True) -> str:
    """Return what a judge reads, beside the image.

    Source: the template of the authors' `eval_gpt4v_review.py` with the rule of the paper's Fig. 3. Where `guarded`,
    what the model wrote cannot end its own part of it: "[End of Answer 1]" in an answer becomes "(End of Answer 1]".
    """
    texts = [MARK.sub("(", text) if guarded else text for text in (question, first, second)]
    return (
        f"[Question]\n{texts[0]}\n\n[Answer 1]\n{texts[1]}\n\n[End of Answer 1]\n\n"
        f"[Answer 2]\n{texts[2]}\n\n[End of Answer 2]\n\n[System]\n{RULE_TEXT}\n\n"
    )


LONGEST_SIDE = 2048  # px. OpenAI's vision guide: a larger image is scaled down to it before the model sees it
QUALITY = 95  # of a JPEG file that was scaled (our choice)


def image_url(image: bytes) -> str:
    """Return a data URL: a JPEG or PNG file of 8 bits, upright, as it is; else what `decode` makes of it, as PNG.

    An image with a side of more than `LONGEST_SIDE` is scaled down to it, bicubically (Pillow), its aspect kept: as
    the server would, and as the estimate of its tokens assumes. A JPEG file stays one.

    Raises:
        InputError: It cannot be decoded.
    """
    picture = decode(image)
    with open_header(image) as header:
        kind, plain = header.format, header.mode in ("RGB", "L") and not header.has_transparency_data
        plain = plain and header.getexif().get(0x0112, 1) == 1  # EXIF's orientation
    if max(picture.size) > LONGEST_SIDE:
        scale = LONGEST_SIDE / max(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), PIL.Image.Resampling.BICUBIC)
    elif plain and kind in ("JPEG", "PNG"):
        return f"data:image/{kind.lower()};base64,{base64.b64encode(image).decode()}"
    kind = "JPEG" if plain and kind == "JPEG" else "PNG"
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": QUALITY} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


@dataclass(frozen=True)
class Comparison:
    """One question to a judge: which of two answers of a candidate is better. See `Verdict` for the attributes."""

    candidate: Candidate
    shown: tuple[int, int]
    repetition: int = 0

    def texts(self) -> tuple[str, str, str]:
        """Return the question, and the two answers in the order shown."""
        answers = self.candidate.answers
        return self.candidate.question, answers[self.shown[0]], answers[self.shown[1]]

    def key(self, judge: str) -> tuple[Any, ...]:
        """Return the key of the verdict that answers it, see `Verdict.key`."""
        return self.candidate.id, judge, self.shown, self.repetition

    def unscored(self, judge: str) -> Verdict:
        """Return the verdict of a judge who has not said anything: it failed, and cost nothing."""
        return Verdict(
            id=self.candidate.id,
            image=self.candidate.image,
            image_sha256=self.candidate.image_sha256,
            judge=judge,
            shown=self.shown,
            repetition=self.repetition,
            outcome="failed",
            scores=None,
            reply=None,
            why=None,
            model=None,
            date=None,
            prompt_sha256=None,
            tokens=None,
            cost=None,
        )


def questions(candidates: Iterable[Candidate], both_orders: bool, repetitions: int = 1) -> list[Comparison]:
    """List all that a judge is asked about these candidates: every two answers, one order after the other."""
    return [
        Comparison(candidate, shown, repetition)
        for candidate in candidates
        for low, high in combinations(range(len(candidate.answers)), 2)
        for shown in ([(low, high), (high, low)] if both_orders else [(low, high)])
        for repetition in range(repetitions)
    ]


def speaks_to_the_judge(candidate: Candidate) -> bool:
    """Return whether an answer tries to tell its judge what to say, in a way that `TO_THE_JUDGE` knows."""
    return any(TO_THE_JUDGE.search(text) for text in candidate.answers)


def read_image(folder: Path, candidate: Candidate) -> bytes:
    """Read the encoded image of a candidate.

    Raises:
        InputError: It is not there, or see `images.read_image`.
    """
    file = folder / candidate.image
    try:
        return read_bytes(file, IMAGE_BYTES)
    except OSError as error:
        raise InputError(
            f"{file}: cannot be read ({error.strerror}). Put it back, or pass the images' folder with --images."
        ) from error
