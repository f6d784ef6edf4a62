"""Answer questions by a model behind an OpenAI-compatible server."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

from stllava_eval.errors import InputError
from stllava_eval.inference.devices import progress_bar
from stllava_eval.inference.endpoint import MOST_PIXELS, Endpoint, Request, scaled
from stllava_eval.inference.replies import (
    Failure,
    Reply,
)
from stllava_eval.inference.types import Answer, Question, cut_at_stop
from stllava_eval.storage import has_lone_surrogate

if TYPE_CHECKING:
    import torch


THOUGHT = 8192  # most tokens of a reasoning model's thought before its answer (our choice)


class ServerAnswerer:
    """Answer questions about images with a server's model, as a `QuestionAnswerer`.

    The server applies its own chat template and image processor. It does not show which weights it has, so `sha256` is
    a hash of its address and the model's name.

    Args and errors are those of `Endpoint`, and:
        reasoning: The model thinks before it answers and takes neither a temperature nor `max_tokens`, as GPT-4o's
            successors: it decodes as it likes, and `THOUGHT` tokens of thinking are allowed on top of the answer's.
        system: The system prompt sent before each question; None sends none.
        enable_thinking: The thinking switch of the server's chat template, sent as vLLM and SGLang take it
            (`chat_template_kwargs`); None leaves it to the template.
        min_pixels, max_pixels: An image with fewer or more pixels is scaled before it is sent; see `scaled`.
    """

    dtype = "server"

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        concurrency: int = 16,
        retries: int = 5,
        timeout: float = 120.0,
        reasoning: bool = False,
        system: str | None = None,
        enable_thinking: bool | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        if not isinstance(reasoning, bool):
            raise InputError(f"reasoning={reasoning}: pass True or False.")
        if not isinstance(enable_thinking, bool | None):
            raise InputError(f"enable_thinking={enable_thinking}: pass True or False, or leave it out.")
        if system is not None and (not isinstance(system, str) or not system.strip() or has_lone_surrogate(system)):
            raise InputError(f"system={system!r}: pass the text of the system's message, or leave it out.")
        for name, pixels in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
            if pixels is not None and (type(pixels) is not int or not 1 <= pixels <= MOST_PIXELS):
                raise InputError(f"{name}={pixels}: pass a whole number of pixels from 1 to {MOST_PIXELS}.")
        if min_pixels is not None and max_pixels is not None and min_pixels > max_pixels:
            raise InputError(f"min_pixels={min_pixels}: more than max_pixels={max_pixels}. Pass at most as many.")
        self.reasoning, self.system, self.enable_thinking = reasoning, system, enable_thinking
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.endpoint = Endpoint(base_url, model, concurrency, retries, timeout)
        self.name = self.endpoint.model
        self.sha256 = hashlib.sha256(json.dumps([self.endpoint.base_url, self.name]).encode()).hexdigest()

    @property
    def device(self) -> torch.device:
        """Return the CPU, where lmms-eval gathers; the weights are elsewhere."""
        import torch

        return torch.device("cpu")

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Return what is known of what is done to questions and images, for a run's manifest."""
        given = {name: getattr(self, name) for name in ("system", "enable_thinking", "min_pixels", "max_pixels")}
        return {
            "backend": "openai_server",
            "device": "server",
            "base_url": self.endpoint.base_url,
            "model": self.name,
            "prompt": "the server's chat template",
            "decoding": "the server's own (reasoning)" if self.reasoning else "greedy (temperature 0)",
            **{name: value for name, value in given.items() if value is not None},
        }

    def answer(self, questions: Sequence[Question], progress: bool = True) -> Iterator[tuple[int, Answer | Failure]]:
        """Yield (index in `questions`, answer or failure) as they come.

        An answer has ended by itself unless the server says that its length was limited. Where it gives no reason, or
        one that nobody knows, an answer as long as was allowed counts as cut.

        Raises:
            InputError: As `Endpoint.replies`; or a question cannot be asked of a server.
        """
        for question in questions:
            if question.text is None or question.history or question.template:
                raise InputError(
                    f"{self.name}: a server is asked one question in one round, in its own template. Leave history and "
                    "template out."
                )
            if has_lone_surrogate(question.text):
                raise InputError(f"question {question.text!r}: it holds half a character. Fix its encoding.")
            if question.sampling and self.reasoning:
                raise InputError(f"{self.name}: with reasoning=True it takes no temperature. Leave the sampling out.")
        requests = [partial(self._request, question) for question in questions]
        with (
            closing(self.endpoint.replies(requests)) as replies,
            progress_bar(len(questions), progress) as bar,
        ):
            for index, reply in replies:
                bar.update()
                yield index, reply if isinstance(reply, Failure) else _answer(reply, questions[index])

    def _request(self, question: Question) -> Request:
        """Greedy, but for a model that reasons and where the question is drawn. Stop strings are cut off afterwards:
        `transformers serve` fails on them."""
        png = io.BytesIO()
        image = scaled(question.image(), self.min_pixels, self.max_pixels)
        image.save(png, "PNG", compress_level=1)  # our choice: bytes are cheap, the harness's CPU is not
        url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question.text}]
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        request: Request = {"messages": [*before, {"role": "user", "content": content}]}
        if self.reasoning:
            request["max_completion_tokens"] = question.max_new_tokens + THOUGHT
        else:
            request |= {"max_tokens": question.max_new_tokens, "temperature": 0}
        extra: Request = {}  # what OpenAI's own API does not have
        if sampling := question.sampling:
            request |= {"temperature": sampling.temperature, "seed": sampling.seed + question.sample_index}
            if sampling.top_p != 1:
                request["top_p"] = sampling.top_p
            if sampling.top_k:
                extra["top_k"] = sampling.top_k
        if self.enable_thinking is not None:
            extra["chat_template_kwargs"] = {"enable_thinking": self.enable_thinking}
        return {**request, "extra_body": extra} if extra else request


def _answer(reply: Reply, question: Question) -> Answer:
    text, stopped = cut_at_stop(reply.text, question.until)
    return Answer(text.strip(), reply.tokens, stopped or not reply.cut)
