"""Images + questions -> answers of a checkpoint: the same for every batch size and process count in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from stllava_eval.errors import InputError
from stllava_eval.inference.base import EngineAnswerer, refused_image, set_in, user
from stllava_eval.inference.devices import torch_device, torch_dtype
from stllava_eval.inference.packing import pack_linears
from stllava_eval.inference.types import Answer, Prompt, Question

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from stllava_eval.inference.replies import Failure


class Answerer(EngineAnswerer):
    """A checkpoint that answers questions about images.

    Args:
        name: Folder or hub id, in any layout that `open_checkpoint` knows.
        device: As torch names it; None takes this process's GPU, else the CPU.
        dtype: float32, bfloat16 or float16; None takes float32 on a CPU and bfloat16 on a GPU (our choice).
        four_bit: Hold the language model in 4 bits (bitsandbytes, NF4); only for a folder of our own layout.
        rows: Questions at work at a time, at most; None leaves it to the engine.
        batch_tokens: Tokens whose keys and values are held at a time; None finds it from the free memory.
        model: The network that answers, on its own device, while it is being trained; `name` is what it started as.
            None reads the weights of `name`.
        system: The chat template's system message; None leaves it to the template.
        enable_thinking: Handed to the chat template; None leaves it to the template.
        min_pixels: Of a scaled image, where the processor takes that; our network's has one size.
        max_pixels: The same.
        parts: Further arguments of `open_checkpoint`.

    Raises:
        InputError: The checkpoint, device or dtype cannot be used, weights are missing from it, or its chat template
            cannot be rendered, leaves the image out, or does not take what is handed to it.
    """

    def __init__(
        self,
        name: str,
        device: str | None = None,
        dtype: str | None = None,
        four_bit: bool = False,
        rows: int | None = None,
        batch_tokens: int | None = None,
        model: Any = None,
        system: str | None = None,
        enable_thinking: bool | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **parts: Any,
    ) -> None:
        from stllava_eval.network.checkpoint import open_checkpoint

        if min_pixels is not None or max_pixels is not None:
            raise InputError(
                f"{name}: its processor scales every image to one fixed size. Leave min_pixels and max_pixels out."
            )

        self.name, self.four_bit = name, four_bit
        self.rows, self.batch_tokens = rows, batch_tokens
        self.device = torch_device(device) if model is None else model.device
        self.dtype = torch_dtype(dtype, self.device)
        checkpoint = open_checkpoint(name, **parts)
        self.processor = checkpoint.processor()
        self.tokenizer = self.processor.tokenizer
        self.image_tokens = checkpoint.config.image_seq_length
        self.image_token = checkpoint.config.image_token_id
        self._set_template(system, enable_thinking)  # before the minutes that large weights take
        self.model: Any = checkpoint.model(self.device, self.dtype, four_bit) if model is None else model
        self.sha256 = checkpoint.sha256
        self._set_decoding({**checkpoint.generation_settings(), **set_in(self.model.generation_config)})
        if model is None:  # one that is being trained keeps its weights
            pack_linears(self.model)

    def _check_image(self, rendered: str) -> None:
        """Check that the prompt contains the image."""
        ids = self.tokenizer(rendered, add_special_tokens=False).input_ids
        if ids.count(self.image_token) != 1:
            raise InputError(
                f"{self.name}: its chat template writes {ids.count(self.image_token)} image tokens for an image, not "
                "one. Put the model's own chat_template.jinja into the folder."
            )

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Return what is done to questions and images, for a run's manifest."""
        image = self.processor.image_processor
        return {
            "prompt": self.prompt("{question}"),
            "image_preprocessing": f"{'pad to' if image.do_pad else 'cut out'} a square, CLIP (PIL), "
            f"{image.crop_size['height']} px",
            "decoding": self.decoding.named,
            "four_bit": self.four_bit,
            **self._given,
        }

    def prompt(self, question: str | None, history: Sequence[tuple[str, str]] = (), template: str | None = None) -> str:
        """Return the prompt of the checkpoint's template; `<image>` marks where the image's tokens go. See `Question`.

        Where the model asks, the template is `v1_sq`: what stage 1 trains it to ask in and the authors' `visual_sq.py`
        is run with (`--conv-mode v1_sq`).

        Raises:
            InputError: The processor has no such template.
        """
        asks = question is None
        template = template or ("v1_sq" if asks else None)
        templates = self.processor.chat_template
        if template and not (isinstance(templates, dict) and template in templates):
            cannot = "it cannot ask. Pass a question" if asks else "it cannot be asked so. Leave the template out"
            raise InputError(f"{self.name}: its processor has no chat template {template}, so {cannot}.")
        asked = [text for text, _ in history] + ([] if question is None else [question])
        messages: list[dict[str, Any]] = []
        for number, text in enumerate(asked):
            messages.append(user(text, image=not number))
            if number < len(history):
                messages.append({"role": "assistant", "content": history[number][1]})
        options = {"chat_template": template} | ({"ask": True} if asks else {})
        return self._render(self._messages(messages), **options)

    def token_ids(
        self, question: str | None, history: Sequence[tuple[str, str]] = (), template: str | None = None
    ) -> list[int]:
        """Return the prompt's token ids, with one image token for each vector that the image becomes.

        Raises:
            InputError: The question holds a special token, such as the image's own.
        """
        self._refuse_special_tokens([question or "", *chain.from_iterable(history)])
        ids = self.tokenizer(self.prompt(question, history, template), add_special_tokens=False).input_ids
        at_image = ids.index(self.image_token)
        return ids[:at_image] + [self.image_token] * self.image_tokens + ids[at_image + 1 :]

    def pixels(self, image: Image) -> torch.Tensor:
        """Return the (1, 3, side, side) normalised pixels of `image`."""
        return self.processor.image_processor(image, return_tensors="pt")["pixel_values"]

    def answer(
        self,
        questions: Sequence[Question],
        progress: bool = True,
        on_answer: Callable[[int, Answer], Sequence[Question]] | None = None,
    ) -> Iterator[tuple[int, Answer | Failure]]:
        """Yield (index of the question, answer), as answers come: every index once, in no order to rely on.

        A question whose image the processor refuses has a failure instead of an answer.

        Args:
            questions: They share the work of images whose keys are equal.
            progress: Show a bar on stderr: questions, time left, tokens a second, share of work saved.
            on_answer: Called with every answer. The questions that it returns are asked too, and their indices continue
                those of `questions`. Tokens that they share with the question before, its answer included, are not
                computed again.
        """
        prompts = [self._prompt_or_why(index, question) for index, question in enumerate(questions)]
        yield from self._by_engine(questions, prompts, progress, on_answer)

    def _prompt(self, index: int, question: Question) -> Prompt:
        """Return the question as the engine takes it."""
        ids = self.token_ids(question.text, question.history, question.template)
        end = len(ids) - ids[::-1].index(self.image_token)
        return self._prompt_of(
            index, question, ids[:end], ids[end:], lambda: {"pixel_values": self._pixels_or_why(question)}
        )

    def _pixels_or_why(self, question: Question) -> torch.Tensor:
        image = question.image()
        with refused_image():
            return self.pixels(image)


def only_answers(outcomes: Iterator[tuple[int, Answer | Failure]]) -> Iterator[tuple[int, Answer]]:
    """Return `outcomes`, each of which must be an answer.

    Raises:
        InputError: One has none.
    """
    for index, outcome in outcomes:
        if not isinstance(outcome, Answer):
            raise InputError(f"{outcome.reason}. Take the image out of the data.")
        yield index, outcome
