"""Images + questions -> answers of a checkpoint: the same for every batch size and process count in float32."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.errors import InputError
from stllava_eval.home import home, read_json, write_json

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from stllava_eval.engine import Prompt, Sampling

PUBLISHED = "ZachSun/stllava-med-7b"  # the authors' merged model


@dataclass(frozen=True)
class Question:
    """What is asked about one image.

    Args:
        text: The question; None lets the model ask the next one (`VUSER:`, template `v1_sq`).
        image: Opens the image (RGB) shortly before it is due, so that few lie in memory.
        max_new_tokens: Of the answer.
        until: Texts before which the answer ends.
        image_key: Equal for questions about the same image, which is then encoded once; None shares nothing.
        history: Earlier (question, answer) rounds about the image; the first holds the image.
        sampling: How the answer is drawn; None takes the likeliest words.
        draw: The number of the draw, where several answers to one question are drawn.
        template: Of the processor's chat templates; None takes `v1_sq` where the model asks, else the default one.
    """

    text: str | None
    image: Callable[[], Image]
    max_new_tokens: int
    until: tuple[str, ...] = ()
    image_key: Hashable = None
    history: tuple[tuple[str, str], ...] = ()
    sampling: Sampling | None = None
    draw: int = 0
    template: str | None = None


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
        checkpoint = read_json(record)["checkpoint"]
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
        rows: Questions at work at a time, at most; None leaves it to the engine.
        batch_tokens: Tokens whose keys and values are held at a time; None finds it from the free memory.
        model: The network that answers, on its own device, while it is being trained; `name` is what it started as.
            None reads the weights of `name`.
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
        rows: int | None = None,
        batch_tokens: int | None = None,
        model: Any = None,
        **parts: Any,
    ) -> None:
        from stllava_eval.network.checkpoint import open_checkpoint

        self.name, self.four_bit = name, four_bit
        self.rows, self.batch_tokens = rows, batch_tokens
        self.device = torch_device(device) if model is None else model.device
        self.dtype = torch_dtype(dtype, self.device)
        checkpoint = open_checkpoint(name, **parts)
        self.processor = checkpoint.processor()
        self.tokenizer = self.processor.tokenizer
        self.model: Any = checkpoint.model(self.device, self.dtype, four_bit) if model is None else model
        self.image_tokens = checkpoint.config.image_seq_length
        self.image_token = checkpoint.config.image_token_id
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.sha256 = checkpoint.sha256
        self._stops: dict[tuple[str, ...], Callable[[Sequence[int]], bool]] = {}

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

    def prompt(self, question: str | None, history: Sequence[tuple[str, str]] = (), template: str | None = None) -> str:
        """The prompt of the checkpoint's template; `<image>` marks where the image's tokens go. See `Question`.

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
            image = [] if number else [{"type": "image"}]
            messages.append({"role": "user", "content": [*image, {"type": "text", "text": text}]})
            if number < len(history):
                messages.append({"role": "assistant", "content": history[number][1]})
        return self.processor.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, ask=asks
        )

    def token_ids(
        self, question: str | None, history: Sequence[tuple[str, str]] = (), template: str | None = None
    ) -> list[int]:
        """The prompt's token ids, with one image token for each vector that the image becomes.

        Raises:
            InputError: The question holds a special token, such as the image's own.
        """
        self._refuse_special_tokens([question or "", *(part for of_round in history for part in of_round)])
        ids = self.tokenizer(self.prompt(question, history, template), add_special_tokens=False).input_ids
        place = ids.index(self.image_token)
        return ids[:place] + [self.image_token] * self.image_tokens + ids[place + 1 :]

    def pixels(self, image: Image) -> torch.Tensor:
        """(1, 3, side, side) normalised pixels of `image`."""
        return self.processor.image_processor(image, return_tensors="pt")["pixel_values"]

    def answer(
        self,
        questions: Sequence[Question],
        progress: bool = True,
        follow: Callable[[int, Answer], Sequence[Question]] | None = None,
    ) -> Iterator[tuple[int, Answer]]:
        """(place of the question, answer), as answers come: every place once, in no order that should be relied on.

        Args:
            questions: They share the work of images whose keys are equal.
            progress: Show a bar on stderr: questions, time left, tokens a second, share of work saved.
            follow: Called with every answer; the questions that it returns are asked too and numbered on from the last
                one. What they have in common with the question before, its answer included, is not computed again.
        """
        from stllava_eval.engine import Engine

        rows: dict[str, int] = {} if self.rows is None else {"rows": self.rows}
        suppressed = self.model.generation_config.suppress_tokens or ()
        engine = Engine(self.model, self.ends, suppressed, batch_tokens=self.batch_tokens, **rows)
        asked = list(questions)
        for place, question in enumerate(asked):
            engine.add(place, self._prompt(place, question))
        with progress_bar(len(asked), progress) as bar:
            for place, ids in engine:
                answer = self._read(ids, asked[place])
                for question in follow(place, answer) if follow else ():
                    engine.add(len(asked), self._prompt(len(asked), question))
                    asked.append(question)
                    bar.total += 1
                rate = engine.work.generated / max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix_str(
                    f"{rate:.0f} tokens/s, {max(engine.work.saved, 0):.0%} of the work saved", refresh=False
                )
                bar.update()
                yield place, answer

    def _refuse_special_tokens(self, texts: Sequence[str]) -> None:
        for text in texts:
            if any("\ud800" <= sign <= "\udfff" for sign in text):
                raise InputError(f"question {text!r}: it holds half a character. Mend its encoding.")
            if named := [token for token in self.tokenizer.all_special_tokens if token in text]:
                raise InputError(f"question {text!r}: it holds the special token {named[0]}. Reword it.")

    def _prompt(self, place: int, question: Question) -> Prompt:
        """The question as the engine takes it."""
        ids = self.token_ids(question.text, question.history, question.template)
        end = len(ids) - ids[::-1].index(self.image_token)
        return self._prompt_of(
            place, question, ids[:end], ids[end:], lambda: {"pixel_values": self.pixels(question.image())}
        )

    def _prompt_of(
        self,
        place: int,
        question: Question,
        prefix: Sequence[int],
        suffix: Sequence[int],
        inputs: Callable[[], dict[str, torch.Tensor]],
    ) -> Prompt:
        from stllava_eval.engine import Prompt

        ends = self.tokenizer.all_special_tokens  # they end answers by their ids and are in no text
        until = tuple(stop for stop in question.until if stop and stop not in ends)
        if until and until not in self._stops:  # one function for equal stops: equal prompts are answered once
            self._stops[until] = partial(self._says, until)
        return Prompt(
            key=image_key(place, question),
            prefix=tuple(prefix),
            inputs=inputs,
            suffix=tuple(suffix),
            max_new_tokens=question.max_new_tokens,
            sampling=question.sampling,
            draw=question.draw,
            stop=self._stops.get(until),
        )

    def _says(self, until: Sequence[str], ids: Sequence[int]) -> bool:
        """Whether the text of `ids` holds one of `until` in its end. A character has at most four tokens."""
        end = self.tokenizer.decode(ids[-4 * max(map(len, until)) - 4 :], skip_special_tokens=True)
        return any(stop in end for stop in until)

    def _read(self, generated: list[int], question: Question) -> Answer:
        """The answer in a row of token ids: up to its end token, its own length limit, or a stop string."""
        ids = generated[: question.max_new_tokens]
        end = next((place for place, token in enumerate(ids) if token in self.ends), None)
        ended = end is not None
        ids = ids[:end]
        text, stopped = cut(str(self.tokenizer.decode(ids, skip_special_tokens=True)), question.until)
        return Answer(text.strip(), len(ids), ended or stopped)


def cut(text: str, until: Sequence[str]) -> tuple[str, bool]:
    """What stands before the first of the texts in `until`, and whether there was one.

    >>> cut("a mass.\\n\\nThe end", ["\\n\\n", "end"])
    ('a mass.', True)
    """
    whole = text
    for stop in until:
        if stop:
            text = text.split(stop, 1)[0]
    return text, text != whole


def image_key(place: int, question: Question) -> Hashable:
    """The key of a question's image; a question without one gets a key of its own and shares nothing."""
    return ("alone", place) if question.image_key is None else question.image_key


def open_answerer(name: str, **arguments: Any) -> Answerer:
    """The answerer of a checkpoint: of our network or LLaVA's, else of any image-text model of transformers.

    Args:
        name: Folder or hub id.
        arguments: Of `Answerer`; another model takes device, dtype, rows and batch_tokens of them.

    Raises:
        InputError: As `Answerer`, or the model is another one and gets arguments that only ours has.
    """
    from stllava_eval.other import OtherAnswerer, is_other

    if not is_other(name):
        return Answerer(name, **arguments)
    given = {argument: value for argument, value in arguments.items() if value is not None and value is not False}
    if wrong := sorted(set(given) - {"device", "dtype", "rows", "batch_tokens"}):
        raise InputError(f"{name}: {', '.join(wrong)} is for models of our own network and LLaVA's. Leave it out.")
    return OtherAnswerer(name, **given)


def progress_bar(total: int, shown: bool) -> Any:
    """A bar of questions on stderr, with the time left."""
    from tqdm import tqdm

    return tqdm(total=total, desc="answering", unit="question", disable=not shown, file=sys.stderr)


def torch_device(name: str | None) -> torch.device:
    """As torch names it; None takes this process's GPU, else the CPU.

    Raises:
        InputError: There is no such device here.
    """
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


def torch_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """By its name; None takes float32 on a CPU and bfloat16 on a GPU (our choice).

    Raises:
        InputError: It is none of the three.
    """
    import torch

    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype {name!r} is unknown. Pass float32, bfloat16 or float16.")
    return getattr(torch, name)
