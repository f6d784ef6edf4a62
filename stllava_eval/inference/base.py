"""Prepare a model's chat template and decoding, and answer questions by the engine: what all local models share."""

from __future__ import annotations

import textwrap
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from loguru import logger

from stllava_eval.errors import InputError, one_line
from stllava_eval.inference.decoding import Decoding, decoding, mark_ids, special_ids
from stllava_eval.inference.devices import progress_bar
from stllava_eval.inference.replies import Failure
from stllava_eval.inference.types import Answer, Prompt, Question, cut_at_stop, image_key
from stllava_eval.storage import has_lone_surrogate

if TYPE_CHECKING:
    import torch

    from stllava_eval.inference.engine import Engine, Refused

PROBE, REPLY = "Is stllavaprobe seen?", "stllavareply"  # words that are in no template


class EngineAnswerer(ABC):
    """A local model with a processor, whose questions the engine answers.

    A subclass sets the attributes in its constructor, calls `_set_template` before it reads weights and `_set_decoding`
    after it, and says how a question becomes a `Prompt`.

    Attributes:
        name: Folder or hub id.
        sha256: Hash of everything that decides the answers.
        device: Of the weights.
        dtype: Of the computation.
        processor: With the chat template and the image processor.
        tokenizer: The processor's.
        model: The network.
        rows: Questions at work at a time, at most; None leaves it to the engine.
        batch_tokens: Tokens whose keys and values are held at a time; None finds it from the free memory.
        asks_with: The instruction by which it is made to ask a question; empty where a chat template does that.
    """

    asks_with = ""
    name: str
    sha256: str
    device: torch.device
    dtype: torch.dtype
    processor: Any
    tokenizer: Any
    model: Any
    rows: int | None
    batch_tokens: int | None

    @property
    @abstractmethod
    def preprocessing(self) -> dict[str, Any]:
        """Return what is done to questions and images, for a run's manifest."""

    @abstractmethod
    def prompt(self, question: str | None, history: Sequence[tuple[str, str]] = (), template: str | None = None) -> str:
        """Return the prompt of the model's chat template."""

    @abstractmethod
    def answer(
        self,
        questions: Sequence[Question],
        progress: bool = True,
        on_answer: Callable[[int, Answer], Sequence[Question]] | None = None,
    ) -> Iterator[tuple[int, Answer | Failure]]:
        """Yield (index of the question, answer or failure), as answers come."""

    @abstractmethod
    def _check_image(self, rendered: str) -> None:
        """Check that a rendered prompt contains its image."""

    @abstractmethod
    def _prompt(self, index: int, question: Question) -> Prompt:
        """Return the question as the engine takes it."""

    def _set_template(self, system: str | None, enable_thinking: bool | None) -> None:
        """Check that the chat template shows question and image, and takes what it is to be given.

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
        if PROBE not in rendered or written_out(rendered) or rendered == self._tried([user(PROBE, image=False)]):
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
            if rendered and system.strip() in rendered and not written_out(rendered):
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
        """Apply what `decoding` takes from generation_config.json, and log what it does not take."""
        head = self.model.get_output_embeddings()
        rows = self.model.config.get_text_config().vocab_size if head is None else head.weight.shape[0]
        self.decoding: Decoding = decoding(settings, self.tokenizer, rows, self._turn_end())
        self.ends = set(self.decoding.ends)
        self._marks = mark_ids(self.tokenizer)
        self._dropped = self._special.keys() - self._marks
        self._stops: dict[tuple[str, ...], Callable[[Sequence[int]], bool]] = {}
        if self.decoding.left_out:
            ignored = ", ".join(f"{name} {value}" for name, value in self.decoding.left_out.items())
            logger.info("{}: not taken over from its generation_config.json: {}", self.name, ignored)

    def _turn_end(self) -> int | None:
        """Return the special token that the chat template writes behind an answer, such as Qwen's <|im_end|>."""
        special = self._special
        for content in ([{"type": "text", "text": REPLY}], REPLY):
            messages = [user(PROBE), {"role": "assistant", "content": content}]
            rendered = self._tried(messages, add_generation_prompt=False)
            if REPLY in rendered and not written_out(rendered):
                behind = rendered.rpartition(REPLY)[2].lstrip()
                ends = [number for number, token in special.items() if token and behind.startswith(token)]
                ends = [number for number in ends if number != self.tokenizer.bos_token_id]
                end = max(ends, key=lambda number: len(special[number]), default=None)
                return None if end in mark_ids(self.tokenizer) else end
        return None

    @cached_property
    def _special(self) -> dict[int, str]:
        """Return the tokenizer's special tokens by id, read once: of Gemma's 6,400 added tokens that takes 20 ms."""
        return special_ids(self.tokenizer)

    def _render(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        """Return what the template makes of messages."""
        options = {"add_generation_prompt": True, **self._template_options, **options}
        return str(self.processor.apply_chat_template(list(messages), **options))

    def _tried(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        """Return what the template makes of messages; an empty text where it refuses them."""
        try:
            return self._render(messages, **options)
        except Exception:  # jinja's own, and whatever a template's code raises
            return ""

    def _messages(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages with the system message in front, if there is one."""
        return [*([self._system] if self._system else []), *messages]

    def _engine(self) -> Engine:
        from stllava_eval.inference.engine import Engine

        rows: dict[str, int] = {} if self.rows is None else {"rows": self.rows}
        return Engine(self.model, self.ends, self.decoding.never, batch_tokens=self.batch_tokens, **rows)

    def _by_engine(
        self,
        questions: Sequence[Question],
        prompts: Sequence[Prompt | Refused],
        progress: bool,
        on_answer: Callable[[int, Answer], Sequence[Question]] | None,
        engine: Engine | None = None,
    ) -> Iterator[tuple[int, Answer | Failure]]:
        """Answer by `engine`, in which prompts may wait already; None makes one."""
        from stllava_eval.inference.engine import Refused

        engine = engine or self._engine()
        asked = list(questions)
        refused: deque[tuple[int, Refused]] = deque()

        def add(index: int, prompt: Prompt | Refused) -> None:
            if isinstance(prompt, Refused):
                refused.append((index, prompt))
            else:
                engine.add(index, prompt)

        for index, prompt in enumerate(prompts):
            add(index, prompt)
        with progress_bar(len(asked), progress) as bar:
            answers = iter(engine)
            while True:
                came = refused.popleft() if refused else next(answers, None)
                if came is None:
                    return
                index, outcome = came
                if isinstance(outcome, Refused):
                    bar.update()
                    yield index, self._failure(asked[index], outcome)
                    continue
                answer = self._read(outcome, asked[index])
                for question in on_answer(index, answer) if on_answer else ():
                    add(len(asked), self._prompt_or_why(len(asked), question))
                    asked.append(question)
                    bar.total += 1
                rate = engine.work.generated / max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix_str(
                    f"{rate:.0f} tokens/s, {max(engine.work.saved, 0):.0%} of the work saved", refresh=False
                )
                bar.update()
                yield index, answer

    def _failure(self, question: Question, why: Refused) -> Failure:
        text = textwrap.shorten(question.text or "", 100, placeholder=" ...")
        return Failure(f"{self.name}: its processor refuses the image of question {text!r} ({why})", 1)

    def _prompt_or_why(self, index: int, question: Question) -> Prompt | Refused:
        """Return the question as the engine takes it, or why its image is refused."""
        from stllava_eval.inference.engine import Refused

        try:
            return self._prompt(index, question)
        except Refused as why:
            return why

    def _refuse_special_tokens(self, texts: Sequence[str], what: str = "question") -> None:
        for text in texts:
            if has_lone_surrogate(text):
                raise InputError(f"{what} {text!r}: it holds half a character. Fix its encoding.")
            if named := [token for token in self._special.values() if token in text]:
                raise InputError(f"{what} {text!r}: it holds the special token {named[0]}. Reword it.")

    def _prompt_of(
        self,
        index: int,
        question: Question,
        prefix: Sequence[int],
        suffix: Sequence[int],
        inputs: Callable[[], dict[str, torch.Tensor]],
    ) -> Prompt:
        unsaid = {self._special[number] for number in self._dropped}  # they end answers by their ids and are in no text
        until = tuple(stop for stop in question.until if stop and stop not in unsaid)
        if until and until not in self._stops:  # one function for equal stops: equal prompts are answered once
            self._stops[until] = partial(self._says, until)
        return Prompt(
            key=image_key(index, question),
            prefix=tuple(prefix),
            inputs=inputs,
            suffix=tuple(suffix),
            max_new_tokens=question.max_new_tokens,
            sampling=question.sampling,
            sample_index=question.sample_index,
            stop=self._stops.get(until),
        )

    def _says(self, until: Sequence[str], ids: Sequence[int]) -> bool:
        """Return whether the end of the text of `ids` holds one of `until`. A character has at most four tokens."""
        end = self._said(ids[-4 * max(map(len, until)) - 4 :])
        return any(stop in end for stop in until)

    def _read(self, generated: list[int], question: Question) -> Answer:
        """Return the answer in a row of token ids: up to its end token, its own length limit, or a stop string."""
        ids = generated[: question.max_new_tokens]
        end = next((position for position, token in enumerate(ids) if token in self.ends), None)
        ended = end is not None
        ids = ids[:end]
        text, stopped = cut_at_stop(self._said(ids), question.until)
        return Answer(text.strip(), len(ids), ended or stopped)

    def _said(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens but for `THOUGHT_MARKS`: they mark a thought."""
        if self._marks.isdisjoint(ids):
            return str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return str(
            self.tokenizer.decode([token for token in ids if token not in self._dropped], skip_special_tokens=False)
        )


@contextmanager
def refused_image() -> Iterator[None]:
    """Turn whatever a processor raises about an image into `Refused`, with its reason on one line.

    Raises:
        Refused: The processor refuses the image. Short memory of the device is not the image's fault.
    """
    from stllava_eval.inference.engine import Refused, out_of_memory

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


def written_out(rendered: str) -> bool:
    """Return whether a template that wants text has written out a list of parts as Python or JSON does."""
    return "'type'" in rendered or '"type"' in rendered


def set_in(settings: Any) -> dict[str, Any]:
    """Return what a `GenerationConfig` sets."""
    return {name: value for name, value in settings.to_dict().items() if value is not None}
