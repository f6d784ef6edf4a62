"""Define what goes into answering and what comes out: a question, an answer, and how tokens are sampled."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from stllava_eval.inference.replies import Failure


@dataclass(frozen=True)
class Question:
    """What is asked about one image.

    Args:
        text: The question; None lets the model ask the next one (`VUSER:`, template `v1_sq`).
        image: Opens the image (RGB) shortly before it is needed, so that few are in memory.
        max_new_tokens: Of the answer.
        until: Texts before which the answer ends.
        image_key: Equal for questions about the same image, which is then encoded once; None shares nothing.
        history: Earlier (question, answer) rounds about the image; the first holds the image.
        sampling: How the answer is sampled; None takes the likeliest tokens.
        sample_index: Which of several sampled answers to one question this is, from 0 on.
        template: Of the processor's chat templates; None takes `v1_sq` where the model asks, else the default one.
    """

    text: str | None
    image: Callable[[], Image]
    max_new_tokens: int
    until: tuple[str, ...] = ()
    image_key: Hashable = None
    history: tuple[tuple[str, str], ...] = ()
    sampling: Sampling | None = None
    sample_index: int = 0
    template: str | None = None


@dataclass(frozen=True)
class Answer:
    """The answer's text, stripped; how many tokens were generated; whether it ended by itself or was cut."""

    text: str
    tokens: int
    ended: bool


class QuestionAnswerer(Protocol):
    """What a run needs of whoever answers: a local model, or a model behind a server."""

    name: str
    sha256: str  # of everything that is known to decide the answers

    @property
    def device(self) -> Any:
        """Return the torch device."""

    @property
    def dtype(self) -> Any:
        """Return the dtype of the computation, or `server`."""

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Return what is done to questions and images, for a run's manifest."""

    def answer(self, questions: Sequence[Question], progress: bool = True) -> Iterator[tuple[int, Answer | Failure]]:
        """Yield (index of the question, answer or failure), as answers come."""


def cut_at_stop(text: str, until: Sequence[str]) -> tuple[str, bool]:
    """Return the text before the first of `until`, and whether there was one.

    >>> cut_at_stop("a mass.\\n\\nThe end", ["\\n\\n", "end"])
    ('a mass.', True)
    """
    whole = text
    for stop in until:
        if stop:
            text = text.split(stop, 1)[0]
    return text, text != whole


def image_key(index: int, question: Question) -> Hashable:
    """Return the key of a question's image; a question without one gets a key of its own and shares nothing."""
    return ("alone", index) if question.image_key is None else question.image_key


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled: `top_k` and `top_p` of 0 and 1 keep every token. Equal seeds give equal answers."""

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Prompt:
    """What the engine answers.

    Args:
        key: Equal for prompts about the same image.
        prefix: Token ids up to the image's last.
        inputs: Makes what the model's forward takes beside these ids, (1, 3, side, side) `pixel_values` for one. May
            raise `Refused`.
        suffix: Token ids behind the prefix, at least one.
        max_new_tokens: At least 1.
        sampling: None takes the likeliest token.
        sample_index: Which of several sampled answers to one prompt this is, from 0 on.
        stop: Whether an answer that ends in these ids has said all that is wanted.
    """

    key: Hashable
    prefix: tuple[int, ...]
    inputs: Callable[[], dict[str, Tensor]]
    suffix: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling | None = None
    sample_index: int = 0
    stop: Callable[[Sequence[int]], bool] | None = None

    @property
    def group(self) -> Hashable:
        """Equal for prompts that share a prefix."""
        return self.key, self.prefix
