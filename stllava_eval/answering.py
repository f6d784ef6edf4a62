"""Images + questions -> answers of a checkpoint: greedy, the same for every batch size and process count in fp32."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.errors import InputError
from stllava_eval.home import home, write_json

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

PUBLISHED = "ZachSun/stllava-med-7b"  # the authors' merged model


@dataclass(frozen=True)
class Question:
    """What is asked about one image. `image` opens it (RGB) when its batch is due, so that few lie in memory."""

    text: str
    image: Callable[[], Image]
    max_new_tokens: int
    until: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """The answer's text, stripped; how many tokens were generated; whether it ended by itself or was cut."""

    text: str
    tokens: int
    ended: bool


def default_checkpoint() -> str:
    """`$STLLAVA_CHECKPOINT`, else the one recorded under `$STLLAVA_HOME`, else the published model.

    Raises:
        InputError: The record cannot be read.
    """
    if named := os.environ.get("STLLAVA_CHECKPOINT"):
        return named
    record = home() / "checkpoint.json"
    if not record.exists():
        return PUBLISHED
    try:
        checkpoint = json.loads(record.read_text(encoding="utf-8"))["checkpoint"]
        if not isinstance(checkpoint, str):
            raise TypeError(f"{checkpoint!r} is no folder")
        return checkpoint
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'{record}: not a record of a checkpoint ({error!r}). It holds {{"checkpoint": FOLDER}}; delete or mend it.'
        ) from error


def record_default_checkpoint(folder: Path) -> None:
    """Make `folder` what the bare command evaluates, until another one is recorded."""
    write_json(home() / "checkpoint.json", {"checkpoint": str(folder.resolve())})


class Answerer:
    """A checkpoint that answers questions about images.

    Args:
        name: Folder or hub id, in any layout that `open_checkpoint` knows.
        device: As torch names it; None takes this process's GPU, else the CPU.
        dtype: float32, bfloat16 or float16; None takes float32 on a CPU and bfloat16 on a GPU (our choice).
        four_bit: Hold the language model in 4 bits (bitsandbytes, NF4); only for a folder of our own layout.
        parts: Further arguments of `open_checkpoint`.

    Raises:
        InputError: The checkpoint, device or dtype cannot be used, or weights are missing from it.
    """

    def __init__(
        self,
        name: str,
        device: str | None = None,
        dtype: str | None = None,
        four_bit: bool = False,
        **parts: Any,
    ) -> None:
        from stllava_eval.network.checkpoint import open_checkpoint

        self.name, self.four_bit = name, four_bit
        self.device = _device(device)
        self.dtype = _dtype(dtype, self.device)
        checkpoint = open_checkpoint(name, **parts)
        self.processor = checkpoint.processor()
        self.tokenizer = self.processor.tokenizer
        self.model: Any = checkpoint.model(self.device, self.dtype, four_bit)
        self.image_tokens = checkpoint.config.image_seq_length
        self.image_token = checkpoint.config.image_token_id
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.padding = self.model.generation_config.pad_token_id
        self.sha256 = checkpoint.sha256

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What is done to questions and images, for a run's manifest."""
        image = self.processor.image_processor
        return {
            "prompt": self.prompt("{question}"),
            "image_preprocessing": f"{'pad to' if image.do_pad else 'cut out'} a square, CLIP (PIL), "
            f"{image.crop_size['height']} px",
            "decoding": "greedy",
            "four_bit": self.four_bit,
        }

    def prompt(self, question: str) -> str:
        """The single-turn prompt of the checkpoint's template; `<image>` marks where the image's tokens go."""
        content: Any = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def token_ids(self, question: str) -> list[int]:
        """The prompt's token ids, with one image token for each vector that the image becomes.

        Raises:
            InputError: The question holds a special token, such as the image's own.
        """
        if named := [token for token in self.tokenizer.all_special_tokens if token in question]:
            raise InputError(f"question {question!r}: it holds the special token {named[0]}. Reword it.")
        ids = self.tokenizer(self.prompt(question), add_special_tokens=False).input_ids
        place = ids.index(self.image_token)
        return ids[:place] + [self.image_token] * self.image_tokens + ids[place + 1 :]

    def pixels(self, image: Image) -> torch.Tensor:
        """(1, 3, side, side) normalised pixels of `image`."""
        return self.processor.image_processor(image, return_tensors="pt")["pixel_values"]

    def answer(self, questions: Sequence[Question], batch_size: int, progress: bool = True) -> Iterator[Answer]:
        """The answers, in the questions' order, `batch_size` at a time."""
        from tqdm import tqdm

        with tqdm(
            total=len(questions), desc="answering", unit="question", disable=not progress, file=sys.stderr
        ) as bar:
            for start in range(0, len(questions), batch_size):
                batch = questions[start : start + batch_size]
                yield from self._answer_batch(batch)
                bar.update(len(batch))

    def _answer_batch(self, batch: Sequence[Question]) -> list[Answer]:
        import torch
        from transformers import GenerationConfig

        rows = [self.token_ids(question.text) for question in batch]
        width = max(map(len, rows))
        ids = torch.tensor([[self.padding] * (width - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.device)
        pixels = torch.cat([self.pixels(question.image()) for question in batch])
        greedy = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max(question.max_new_tokens for question in batch),
            eos_token_id=sorted(self.ends),
            pad_token_id=self.padding,
            suppress_tokens=self.model.generation_config.suppress_tokens,
        )
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                pixel_values=pixels.to(self.device, self.dtype),
                generation_config=greedy,
            )
        return [
            self._read(generated, question)
            for generated, question in zip(output[:, width:].tolist(), batch, strict=True)
        ]

    def _read(self, generated: list[int], question: Question) -> Answer:
        """The answer in a row of token ids: up to its end token, its own length limit, or a stop string."""
        ids = generated[: question.max_new_tokens]
        end = next((place for place, token in enumerate(ids) if token in self.ends), None)
        ended = end is not None
        ids = ids[:end]
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        for stop in question.until:
            if stop and stop in text:
                text, ended = text.split(stop, 1)[0], True
        return Answer(text.strip(), len(ids), ended)


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used ({reason}). Pass cpu, cuda or cuda:N.") from error
    return device


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    import torch

    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype {name!r} is unknown. Pass float32, bfloat16 or float16.")
    return getattr(torch, name)
