"""Images + questions -> answers of a checkpoint: the same for every batch size and process count in float32."""

from __future__ import annotations

import os
import sys
import textwrap
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loguru import logger

from stllava_eval.decoding import Decoding, decoding, mark_ids, special_ids
from stllava_eval.errors import InputError, one_line
from stllava_eval.home import home, read_json, write_json

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from stllava_eval.engine import Prompt, Refused, Sampling
    from stllava_eval.server import Failure

PROBE, REPLY = "Is stllavaprobe seen?", "stllavareply"  # words that stand in no template
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

    def _set_template(self, system: str | None, enable_thinking: bool | None) -> None:
        """Look whether the chat template shows question and image, and takes what it is to be given.

        Raises:
            InputError: It does not.
        """
        self._system: dict[str, Any] | None = None
        self._template_options: dict[str, Any] = {}
        self._given: dict[str, Any] = {}  # for a run's manifest
        try:
            rendered = self._render([user(PROBE)])
        except Exception as error:  # jinja's own, and whatever a template's code raises about the messages
            raise InputError(
                f"{self.name}: its chat template cannot be rendered ({one_line(error)}). Put the model's own "
                "chat_template.jinja into the folder."
            ) from error
        if PROBE not in rendered or _written_out(rendered) or rendered == self._tried([user(PROBE, image=False)]):
            left_out = "question" if PROBE not in rendered else "image"
            raise InputError(
                f"{self.name}: its chat template leaves the {left_out} out. Put the chat_template.jinja of a model "
                "that takes images into the folder."
            )
        self._check_image(rendered)
        if system is not None:
            self._set_system(system)
        if enable_thinking is not None:
            if not isinstance(enable_thinking, bool):
                raise InputError(f"enable_thinking={enable_thinking!r}: pass True or False.")
            named = "enable_thinking" in str(self.processor.chat_template)
            messages = self._messages([user(PROBE)])
            if not named or len({self._tried(messages, enable_thinking=value) for value in (True, False)}) == 1:
                raise InputError(f"{self.name}: its chat template has no enable_thinking. Leave it out.")
            self._template_options = {"enable_thinking": enable_thinking}
            self._given["enable_thinking"] = enable_thinking

    def _set_system(self, system: str) -> None:
        """Put a system message in front, in the form that the template takes: as text, or as a list of parts.

        Raises:
            InputError: The template leaves its words out, or renders it as it does a user's.
        """
        if not isinstance(system, str):
            raise InputError(f"system={system!r}: pass text.")
        self._refuse_special_tokens([system], "system prompt")
        for content in ([{"type": "text", "text": system}], system):
            rendered = self._tried([{"role": "system", "content": content}, user(PROBE)])
            as_users = self._tried([{"role": "user", "content": content}, user(PROBE)])
            without = self._tried([user(PROBE)])
            if rendered and system.strip() in rendered and not _written_out(rendered):
                if rendered in (as_users, without):
                    break
                self._system = {"role": "system", "content": content}
                self._given["system"] = system
                return
        raise InputError(
            f"{self.name}: its chat template leaves the system prompt out, or has fixed words of its own. Leave system "
            "out, or ask it in the question."
        )

    def _set_decoding(self, settings: Mapping[str, Any]) -> None:
        """Take over what `decoding` takes over from generation_config.json, and say what it does not."""
        head = self.model.get_output_embeddings()
        rows = self.model.config.get_text_config().vocab_size if head is None else head.weight.shape[0]
        self.decoding: Decoding = decoding(settings, self.tokenizer, rows, self._turn_end())
        self.ends = set(self.decoding.ends)
        self._marks = mark_ids(self.tokenizer)
        self._dropped = special_ids(self.tokenizer).keys() - self._marks
        self._stops: dict[tuple[str, ...], Callable[[Sequence[int]], bool]] = {}
        if self.decoding.left_out:
            told = ", ".join(f"{name} {value}" for name, value in self.decoding.left_out.items())
            logger.info("{}: not taken over from its generation_config.json: {}", self.name, told)

    def _turn_end(self) -> int | None:
        """The special token that the chat template writes behind an answer, such as Qwen's <|im_end|>."""
        special = special_ids(self.tokenizer)
        for content in ([{"type": "text", "text": REPLY}], REPLY):
            messages = [user(PROBE), {"role": "assistant", "content": content}]
            rendered = self._tried(messages, add_generation_prompt=False)
            if REPLY in rendered and not _written_out(rendered):
                behind = rendered.rpartition(REPLY)[2].lstrip()
                ends = [number for number, token in special.items() if token and behind.startswith(token)]
                ends = [number for number in ends if number != self.tokenizer.bos_token_id]
                end = max(ends, key=lambda number: len(special[number]), default=None)
                return None if end in mark_ids(self.tokenizer) else end
        return None

    def _render(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        options = {"add_generation_prompt": True, **self._template_options, **options}
        return str(self.processor.apply_chat_template(list(messages), **options))

    def _tried(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        """What the template makes of messages; empty where it refuses them."""
        try:
            return self._render(messages, **options)
        except Exception:  # jinja's own, and whatever a template's code raises
            return ""

    def _messages(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """With the system message in front, if there is one."""
        return [*([self._system] if self._system else []), *messages]

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
        """What is done to questions and images, for a run's manifest."""
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
            messages.append(user(text, image=not number))
            if number < len(history):
                messages.append({"role": "assistant", "content": history[number][1]})
        options = {"chat_template": template} | ({"ask": True} if asks else {})
        return self._render(self._messages(messages), **options)

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
    ) -> Iterator[tuple[int, Answer | Failure]]:
        """(place of the question, answer), as answers come: every place once, in no order that should be relied on.

        A question whose image the processor refuses has a failure in place of an answer.

        Args:
            questions: They share the work of images whose keys are equal.
            progress: Show a bar on stderr: questions, time left, tokens a second, share of work saved.
            follow: Called with every answer; the questions that it returns are asked too and numbered on from the last
                one. What they have in common with the question before, its answer included, is not computed again.
        """
        prompts = [self._prompt_or_why(place, question) for place, question in enumerate(questions)]
        yield from self._by_engine(questions, prompts, progress, follow)

    def _by_engine(
        self,
        questions: Sequence[Question],
        prompts: Sequence[Prompt | Refused],
        progress: bool,
        follow: Callable[[int, Answer], Sequence[Question]] | None,
    ) -> Iterator[tuple[int, Answer | Failure]]:
        from stllava_eval.engine import Engine, Refused

        rows: dict[str, int] = {} if self.rows is None else {"rows": self.rows}
        engine = Engine(self.model, self.ends, self.decoding.never, batch_tokens=self.batch_tokens, **rows)
        asked = list(questions)
        refused: deque[tuple[int, Refused]] = deque()

        def add(place: int, prompt: Prompt | Refused) -> None:
            if isinstance(prompt, Refused):
                refused.append((place, prompt))
            else:
                engine.add(place, prompt)

        for place, prompt in enumerate(prompts):
            add(place, prompt)
        with progress_bar(len(asked), progress) as bar:
            answers = iter(engine)
            while True:
                came = refused.popleft() if refused else next(answers, None)
                if came is None:
                    return
                place, outcome = came
                if isinstance(outcome, Refused):
                    bar.update()
                    yield place, self._failure(asked[place], outcome)
                    continue
                answer = self._read(outcome, asked[place])
                for question in follow(place, answer) if follow else ():
                    add(len(asked), self._prompt_or_why(len(asked), question))
                    asked.append(question)
                    bar.total += 1
                rate = engine.work.generated / max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix_str(
                    f"{rate:.0f} tokens/s, {max(engine.work.saved, 0):.0%} of the work saved", refresh=False
                )
                bar.update()
                yield place, answer

    def _failure(self, question: Question, why: Refused) -> Failure:
        from stllava_eval.server import Failure

        text = textwrap.shorten(question.text or "", 100, placeholder=" ...")
        return Failure(f"{self.name}: its processor refuses the image of question {text!r} ({why})", 1)

    def _prompt_or_why(self, place: int, question: Question) -> Prompt | Refused:
        """The question as the engine takes it, or why its image is refused."""
        from stllava_eval.engine import Refused

        try:
            return self._prompt(place, question)
        except Refused as why:
            return why

    def _refuse_special_tokens(self, texts: Sequence[str], what: str = "question") -> None:
        for text in texts:
            if any("\ud800" <= sign <= "\udfff" for sign in text):
                raise InputError(f"{what} {text!r}: it holds half a character. Mend its encoding.")
            if named := [token for token in self.tokenizer.all_special_tokens if token in text]:
                raise InputError(f"{what} {text!r}: it holds the special token {named[0]}. Reword it.")

    def _prompt(self, place: int, question: Question) -> Prompt:
        """The question as the engine takes it."""
        ids = self.token_ids(question.text, question.history, question.template)
        end = len(ids) - ids[::-1].index(self.image_token)
        return self._prompt_of(
            place, question, ids[:end], ids[end:], lambda: {"pixel_values": self._pixels_or_why(question)}
        )

    def _pixels_or_why(self, question: Question) -> torch.Tensor:
        image = question.image()
        with refused_image():
            return self.pixels(image)

    def _prompt_of(
        self,
        place: int,
        question: Question,
        prefix: Sequence[int],
        suffix: Sequence[int],
        inputs: Callable[[], dict[str, torch.Tensor]],
    ) -> Prompt:
        from stllava_eval.engine import Prompt

        special = special_ids(self.tokenizer)
        unsaid = {special[number] for number in self._dropped}  # they end answers by their ids and are in no text
        until = tuple(stop for stop in question.until if stop and stop not in unsaid)
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
        end = self._said(ids[-4 * max(map(len, until)) - 4 :])
        return any(stop in end for stop in until)

    def _read(self, generated: list[int], question: Question) -> Answer:
        """The answer in a row of token ids: up to its end token, its own length limit, or a stop string."""
        ids = generated[: question.max_new_tokens]
        end = next((place for place, token in enumerate(ids) if token in self.ends), None)
        ended = end is not None
        ids = ids[:end]
        text, stopped = cut(self._said(ids), question.until)
        return Answer(text.strip(), len(ids), ended or stopped)

    def _said(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens but for `THOUGHT_MARKS`: a reply's thought is known by them."""
        if self._marks.isdisjoint(ids):
            return str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return str(self.tokenizer.decode([one for one in ids if one not in self._dropped], skip_special_tokens=False))


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


def only_answers(outcomes: Iterator[tuple[int, Answer | Failure]]) -> Iterator[tuple[int, Answer]]:
    """Return `outcomes`, each of which must be an answer.

    Raises:
        InputError: One has none.
    """
    for place, outcome in outcomes:
        if not isinstance(outcome, Answer):
            raise InputError(f"{outcome.reason}. Take the image out of the data.")
        yield place, outcome


@contextmanager
def refused_image() -> Iterator[None]:
    """Turn whatever a processor raises about an image into `Refused`, with its reason on one line.

    Raises:
        Refused: The processor refuses the image. Short memory of the device is not the image's fault.
    """
    from stllava_eval.engine import Refused, out_of_memory

    try:
        yield
    except InputError:
        raise
    except Exception as error:  # ValueError, ZeroDivisionError, MemoryError, torch's own, ...
        if out_of_memory(error):
            raise
        raise Refused(one_line(error)) from error


def user(text: str, image: bool = True) -> dict[str, Any]:
    """Return a user's message, as chat templates take it."""
    return {"role": "user", "content": [*([{"type": "image"}] if image else []), {"type": "text", "text": text}]}


def _written_out(rendered: str) -> bool:
    """Whether a template that wants text has written out a list of parts as Python or JSON does."""
    return "'type'" in rendered or '"type"' in rendered


def set_in(settings: Any) -> dict[str, Any]:
    """Return what a `GenerationConfig` sets."""
    return {name: value for name, value in settings.to_dict().items() if value is not None}


def image_key(place: int, question: Question) -> Hashable:
    """The key of a question's image; a question without one gets a key of its own and shares nothing."""
    return ("alone", place) if question.image_key is None else question.image_key


def open_answerer(name: str, **arguments: Any) -> Answerer:
    """The answerer of a checkpoint: of our network or LLaVA's, else of any image-text model of transformers.

    Args:
        name: Folder or hub id.
        arguments: Of `Answerer`; another model takes device, dtype, rows, batch_tokens, system, enable_thinking,
            min_pixels and max_pixels of them.

    Raises:
        InputError: As `Answerer`, or the model is another one and gets arguments that only ours has.
    """
    from stllava_eval.other import OtherAnswerer, is_other

    if not is_other(name):
        return Answerer(name, **arguments)
    given = {argument: value for argument, value in arguments.items() if value is not None}
    if given.get("four_bit") is False:
        del given["four_bit"]
    of_any = {"device", "dtype", "rows", "batch_tokens", "system", "enable_thinking", "min_pixels", "max_pixels"}
    if wrong := sorted(set(given) - of_any):
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
