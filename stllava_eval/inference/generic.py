"""Any other image-text model of transformers -> answers: by the engine where its images lie in a common prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from loguru import logger

from stllava_eval.errors import InputError, one_line
from stllava_eval.inference.base import PROBE, REPLY, EngineAnswerer, refused_image, set_in, user, written_out
from stllava_eval.inference.devices import progress_bar, torch_device, torch_dtype
from stllava_eval.inference.packing import pack_linears
from stllava_eval.inference.types import Answer, Question, image_key
from stllava_eval.network.files import refused
from stllava_eval.network.pretrained import open_pretrained

if TYPE_CHECKING:
    import torch

    from stllava_eval.inference.engine import Engine, Refused
    from stllava_eval.inference.replies import Failure
    from stllava_eval.inference.types import Prompt

ROWS = 8  # questions of a plain batch (our choice)


ASKING_TEMPLATE = "v1_sq"  # the template in which a model of our own asks
ASKING_INSTRUCTION = (  # our choice: what asks for a question where no template does
    "Now ask one question about this image that can be answered by looking at it. Reply with the question alone."
)


@dataclass(frozen=True)
class _ImagePrefix:
    """How the prompts about one image begin.

    Attributes:
        ids: Up to the last special token, the image's or one behind it.
        tail: Text that the processor writes behind that, as Gemma 3's writes two line breaks; often nothing.
        replaced: The tokens of a prompt with its image not written out, in whose place these are.
    """

    ids: list[int]
    tail: list[int]
    replaced: list[int]


class _Unshared(Exception):  # noqa: N818  the questions are answered in plain batches then
    """The engine cannot share the images of some prompts; the message says why."""


class TransformersAnswerer(EngineAnswerer):
    """A model as `AutoModelForImageTextToText` loads it, with its own processor and chat template.

    At the first call, two tokens of one answer are computed by the model's own forward too: if the engine's logits are
    not the model's own, questions are answered in plain padded batches, and a line in the log says why. If they are,
    each image is opened once before the first answer: only the processor knows how many tokens it becomes.

    Args:
        name: Folder or hub id of a model, or of a LoRA on one.
        device: See `Answerer`.
        dtype: See `Answerer`.
        rows: See `Answerer`; of a plain batch, 8 if None.
        batch_tokens: See `Answerer`.
        system: See `Answerer`.
        enable_thinking: See `Answerer`.
        min_pixels: Of a scaled image, where the processor takes that, as Qwen's do; None keeps the processor's own.
        max_pixels: The same.
        base: What an adapter is on; None takes what its adapter_config.json names.

    Raises:
        InputError: The model cannot be loaded whole, or an argument or its chat template cannot be used.
    """

    asks_with = ASKING_INSTRUCTION

    def __init__(
        self,
        name: str,
        device: str | None = None,
        dtype: str | None = None,
        rows: int | None = None,
        batch_tokens: int | None = None,
        system: str | None = None,
        enable_thinking: bool | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        base: str | None = None,
    ) -> None:
        self.name, self.rows, self.batch_tokens = name, rows, batch_tokens
        self.device = torch_device(device)
        self.dtype = torch_dtype(dtype, self.device)
        pretrained = open_pretrained(name, base)
        self._config: Any = pretrained.config()
        self.processor: Any = pretrained.processor()
        if not getattr(self.processor, "chat_template", None):
            raise InputError(f"{name}: its processor has no chat template. Add chat_template.jinja to the folder.")
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        pixels = self._set_pixels(min_pixels, max_pixels)
        self._set_template(system, enable_thinking)  # before the minutes that large weights take
        self._given |= pixels
        self.model = pretrained.model(self.device, self.dtype)
        self.sha256 = pretrained.sha256
        self._prefixes: dict[Any, _ImagePrefix | Refused] = {}
        self._reply_form: Callable[[str], Any] | None = None
        self._pixels: dict[Any, bytes] = {}
        self._mismatch, self._is_tried, self._warned = "", False, False
        self._set_decoding(set_in(self.model.generation_config))
        self.model.generation_config = self._bare(self.model.generation_config)
        pack_linears(self.model)

    def _set_pixels(self, min_pixels: int | None, max_pixels: int | None) -> dict[str, int]:
        """Give the image processor its bounds; return those that were given, as they apply.

        Raises:
            InputError: They are no bounds, or the processor has none.
        """
        given = {name: value for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)) if value}
        for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"{name}={value}: pass a whole number of pixels from 1 on.")
        if not given:
            return {}
        images = self.processor.image_processor
        size = dict(images.size or {})
        takes = getattr(getattr(images, "valid_kwargs", None), "__annotations__", {})
        if "max_pixels" not in takes or not {"shortest_edge", "longest_edge"} <= size.keys():
            raise InputError(
                f"{self.name}: its processor ({type(images).__name__}) takes no bounds of pixels, it scales images to "
                f"fixed sizes of its own. Leave {' and '.join(given)} out."
            )
        # both names are of a side's length elsewhere; these processors hold numbers of pixels in them
        least, most = min_pixels or size["shortest_edge"], max_pixels or size["longest_edge"]
        side = images.patch_size * getattr(images, "merge_size", 1)
        if most < side * side or least > most:
            raise InputError(
                f"{self.name}: min_pixels {least} and max_pixels {most} leave no size. Pass a max_pixels of "
                f"{max(least, side * side)} or more, or another min_pixels."
            )
        images.size = type(images.size)(**{**size, "shortest_edge": least, "longest_edge": most})
        return {name: images.size["shortest_edge" if name == "min_pixels" else "longest_edge"] for name in given}

    def _bare(self, settings: Any) -> Any:
        """Return what is left of a model's own settings, which `generate` merges into those that it is called with."""
        from transformers import GenerationConfig

        return GenerationConfig(
            do_sample=False,
            num_beams=1,
            bos_token_id=settings.bos_token_id,
            eos_token_id=sorted(self.ends) or None,
            pad_token_id=self.tokenizer.pad_token_id if settings.pad_token_id is None else settings.pad_token_id,
            decoder_start_token_id=settings.decoder_start_token_id,
        )

    @property
    def preprocessing(self) -> dict[str, Any]:
        """See `Answerer`."""
        return {
            "prompt": self.prompt("{question}"),
            "image_preprocessing": type(self.processor.image_processor).__name__,
            "decoding": self.decoding.named,
            "four_bit": False,
            **self._given,
        }

    def prompt(self, question: str | None, history: Sequence[tuple[str, str]] = (), template: str | None = None) -> str:
        """Return the prompt of the model's own chat template. See `Question`.

        Where the model asks, `ASKING_INSTRUCTION` is in the place of the question: only a model of our own stage 1 has
        learnt to ask by a template. `v1_sq`, in which such a model is asked, is the model's own template here.

        Raises:
            InputError: The processor has no such template, or leaves earlier answers out.
        """
        templates = self.processor.chat_template
        named = template if isinstance(templates, dict) and template in templates else None
        if template not in (None, ASKING_TEMPLATE, named):
            raise InputError(f"{self.name}: its processor has no chat template {template}. Leave the template out.")
        messages: list[dict[str, Any]] = []
        for number, (asked, answer) in enumerate(history):
            messages += [user(asked, image=not number), self._reply(answer)]
        messages.append(user(ASKING_INSTRUCTION if question is None else question, image=not history))
        return self._render(self._messages(messages), **({"chat_template": named} if named else {}))

    def _reply(self, text: str) -> dict[str, Any]:
        """Return the model's message in a conversation, in the form that its template takes."""
        if self._reply_form is None:
            for form in (lambda text: [{"type": "text", "text": text}], str):
                rendered = self._tried([user(PROBE), {"role": "assistant", "content": form(REPLY)}, user("", False)])
                if REPLY in rendered and not written_out(rendered):
                    self._reply_form = form
                    break
            else:
                raise InputError(f"{self.name}: its chat template leaves earlier answers out. Ask without a history.")
        return {"role": "assistant", "content": self._reply_form(text)}

    def _check_image(self, rendered: str) -> None:
        """Check that the processor joins a prompt and an image, before there are questions."""
        import PIL.Image

        try:
            made = self.processor(
                images=[PIL.Image.new("RGB", (64, 64))],
                text=rendered,
                add_special_tokens=not self._begins_by_itself(rendered),
                return_tensors="pt",
            )
        except ImportError:
            with refused(self.name, "its processor cannot be used"):
                raise
        except Exception as error:  # whatever a processor raises
            raise InputError(
                f"{self.name}: its processor cannot join its chat template's prompt and an image ({one_line(error)}). "
                "Put the model's own chat_template.jinja and processor files into the folder."
            ) from error
        names = ("image_token_id", "image_token_index")
        tokens = {number for name in names if (number := getattr(self._config, name, None)) is not None}
        if tokens and tokens.isdisjoint(made["input_ids"][0].tolist()):
            raise InputError(
                f"{self.name}: its chat template leaves the image out (no image token in a prompt). Put the model's "
                "own chat_template.jinja into the folder."
            )

    def answer(
        self,
        questions: Sequence[Question],
        progress: bool = True,
        on_answer: Callable[[int, Answer], Sequence[Question]] | None = None,
    ) -> Iterator[tuple[int, Answer | Failure]]:
        """See `Answerer.answer`."""
        self._prefixes, self._pixels = {}, {}  # of this call's images
        engine = self._tried_engine(questions)
        prompts: list[Prompt | Refused] = []
        if not self._mismatch:
            try:
                prompts = [self._prompt_or_why(index, question) for index, question in enumerate(questions)]
            except _Unshared as unshared:
                self._mismatch = str(unshared)
        if not self._mismatch:
            yield from self._by_engine(questions, prompts, progress, on_answer, engine)
            return
        if not self._warned:
            logger.warning("{}: answered in plain batches, images are not shared ({})", self.name, self._mismatch)
            self._warned = True
        yield from self._in_batches(questions, progress, on_answer)

    def _tried_engine(self, questions: Sequence[Question]) -> Engine | None:
        """Return an engine for these questions; at the first call, set `_mismatch` to why none can answer them."""
        from stllava_eval.inference.engine import Refused, engine_mismatch, engine_mismatch_of_class

        self._mismatch = self._mismatch or engine_mismatch_of_class(self.model)
        if self._mismatch:
            return None
        engine = self._engine()
        for index, question in enumerate(questions if not self._is_tried else ()):
            try:
                prompt = self._prompt(index, question)
                whole = {name: self._moved(value) for name, value in self._inputs(question, slice(None)).items()}
            except Refused:
                continue
            except _Unshared as unshared:
                self._mismatch = str(unshared)
            else:
                self._mismatch, self._is_tried = engine_mismatch(engine, prompt, whole), True
            break
        return engine

    def _in_batches(
        self,
        questions: Sequence[Question],
        progress: bool,
        on_answer: Callable[[int, Answer], Sequence[Question]] | None,
    ) -> Iterator[tuple[int, Answer | Failure]]:
        """Answer in padded batches by `generate`, with the engine's choice of each token."""
        asked, size, start = list(questions), self.rows or ROWS, 0
        with progress_bar(len(asked), progress) as bar:
            while start < len(asked):
                batch = list(enumerate(asked[start : start + size], start))
                start += len(batch)
                inputs, refused = self._taken(batch)
                for index, why in refused.items():
                    bar.update()
                    yield index, self._failure(asked[index], why)
                batch = [(index, question) for index, question in batch if index not in refused]
                for (index, question), ids in zip(batch, self._generated(batch, inputs) if batch else (), strict=True):
                    answer = self._read(ids, question)
                    further = on_answer(index, answer) if on_answer else ()
                    asked.extend(further)
                    bar.total += len(further)
                    bar.update()
                    yield index, answer

    def _taken(self, batch: Sequence[tuple[int, Question]]) -> tuple[Any, dict[int, Refused]]:
        """Return what the model takes for a batch without refused images, and by index why an image is refused."""
        from stllava_eval.inference.engine import Refused, out_of_memory

        refused_ones: dict[int, Refused] = {}
        try:
            return self._together([question for _, question in batch]), refused_ones
        except InputError:
            raise
        except Exception as error:  # about one of the images, which is found by handing over each alone
            if out_of_memory(error):
                raise
            for index, question in batch:
                try:
                    self._processed(question)
                except Refused as why:
                    refused_ones[index] = why
            if not refused_ones:
                raise
        left = [question for index, question in batch if index not in refused_ones]
        return self._together(left) if left else None, refused_ones

    def _together(self, batch: Sequence[Question]) -> Any:
        """Return what the model takes for a padded batch."""
        texts = [self._text(question) for question in batch]
        return self.processor(
            images=[[question.image()] for question in batch],
            text=texts,
            padding=True,
            add_special_tokens=not self._begins_by_itself(texts[0]),
            return_tensors="pt",
        )

    def _generated(self, batch: Sequence[tuple[int, Question]], inputs: Any) -> list[list[int]]:
        """Return the token ids of each answer, padded."""
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        from stllava_eval.inference.sampling import Choice

        start = 1 if getattr(self.model.config, "is_encoder_decoder", False) else inputs["input_ids"].shape[1]
        choice = Choice([self._sampling_key(index, question) for index, question in batch], start, self.decoding.never)
        most = max(question.max_new_tokens for _, question in batch)
        with torch.inference_mode():
            output = self.model.generate(
                **{key: self._moved(value) for key, value in inputs.items()},
                generation_config=GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=most),
                logits_processor=LogitsProcessorList([choice]),
            )
        return output[:, start:].tolist()

    def _sampling_key(self, index: int, question: Question) -> tuple[Prompt, bytes]:
        """Return what a sampled answer depends on, in the engine too: its prompt and the hash of its pixels."""
        from stllava_eval.inference.sampling import pixels_sha256
        from stllava_eval.inference.types import Prompt

        if question.sampling is None:
            return Prompt(None, (), dict, (0,), question.max_new_tokens), b""
        try:
            prompt = self._prompt(index, question)
        except _Unshared:
            ids = tuple(self._processed(question)["input_ids"][0].tolist())
            prompt = self._prompt_of(index, question, ids, (), lambda: self._inputs(question, slice(None)))
        key = prompt.group
        if key not in self._pixels:
            self._pixels[key] = pixels_sha256(prompt.inputs())
        return prompt, self._pixels[key]

    def _text(self, question: Question) -> str:
        self._refuse_special_tokens([question.text or "", *chain.from_iterable(question.history)])
        return self.prompt(question.text, question.history, question.template)

    def _begins_by_itself(self, text: str) -> bool:
        """Return whether the template writes the token that a text begins with."""
        return bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)

    def _moved(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)

    def _processed(self, question: Question) -> Any:
        """Return what the processor makes of one question.

        Raises:
            Refused: It refuses the image.
        """
        text, image = self._text(question), question.image()
        with refused_image():
            return self.processor(
                images=[image],
                text=text,
                add_special_tokens=not self._begins_by_itself(text),
                return_tensors="pt",
            )

    def _inputs(self, question: Question, part: slice) -> dict[str, torch.Tensor]:
        """Return what the model's forward takes beside the ids of `part` of the prompt."""
        made = self._processed(question)
        length = made["input_ids"].shape[1]
        return {
            key: value[:, part] if value.dim() == 2 and value.shape[1] == length else value
            for key, value in made.items()
            if key not in ("input_ids", "attention_mask")
        }

    def _prompt(self, index: int, question: Question) -> Prompt:
        """Return the prompt. The processor writes an image's tokens out once per image; the rest is tokenized alone.

        Where that may give other tokens than the processor's, the processor makes this prompt too.

        Raises:
            Refused: The processor refuses the image.
            _Unshared: The written-out prompt does not end as the tokenized one does.
        """
        from stllava_eval.inference.engine import Refused

        text = self._text(question)
        plain = self.tokenizer(text, add_special_tokens=not self._begins_by_itself(text)).input_ids
        key = image_key(index, question)
        if key not in self._prefixes:
            self._prefixes[key] = self._prefix(question, plain)
        known = self._prefixes[key]
        if isinstance(known, Refused):
            raise known
        rest = plain[len(known.replaced) :]
        if plain[: len(known.replaced)] == known.replaced and self._joins(known.tail, rest):
            prefix, suffix = known.ids, [*known.tail, *rest]
        else:
            whole = self._processed(question)["input_ids"][0].tolist()
            end = 1 + max(number for number, token in enumerate(whole) if token in self._image_ids)
            prefix, suffix = whole[:end], whole[end:]
        return self._prompt_of(index, question, prefix, suffix, lambda: self._inputs(question, slice(len(prefix))))

    def _joins(self, tail: list[int], rest: list[int]) -> bool:
        """Return whether a text tokenized after `tail` has the tokens that it has alone: no token spans both."""
        if not tail:
            return True  # a special token ends the prefix, and text behind it is tokenized alone
        text = self.tokenizer.decode([*tail, *rest], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return bool(self.tokenizer(text, add_special_tokens=False).input_ids == [*tail, *rest])

    def _prefix(self, question: Question, plain: list[int]) -> _ImagePrefix | Refused:
        """Return how a prompt begins, up to the end of its image, and the tokens of `plain` that this replaces."""
        from stllava_eval.inference.engine import Refused

        try:
            whole = self._processed(question)["input_ids"][0].tolist()
        except Refused as why:
            return why
        common = next(
            (
                number
                for number, (token, written) in enumerate(zip(reversed(plain), reversed(whole), strict=False))
                if token != written or token in self._image_ids
            ),
            0,
        )
        if not common:
            raise _Unshared("its processor writes the image behind the question, or no tokens of it at all")
        end = len(whole) - common
        special = self._special.keys() | self._image_ids
        last = max((number for number in range(end) if whole[number] in special), default=end - 1)
        return _ImagePrefix(whole[: last + 1], whole[last + 1 : end], plain[: len(plain) - common])

    @property
    def _image_ids(self) -> set[int]:
        """Return the ids that represent an image."""
        config = self._config
        names = ("image_token_id", "image_token_index", "vision_end_token_id", "vision_start_token_id")
        return {number for name in names if (number := getattr(config, name, None)) is not None}
