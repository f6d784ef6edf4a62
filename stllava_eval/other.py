"""Any other image-text model of transformers -> answers: by the engine where its images lie in a common prefix."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loguru import logger

from stllava_eval.answering import Answer, Answerer, Question, image_key, progress_bar, torch_device, torch_dtype
from stllava_eval.errors import InputError
from stllava_eval.network.files import local_folder, one_line, read_json, refused, some

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from stllava_eval.engine import Prompt

OURS = ("llava", "stllava_med")  # what network.checkpoint reads, every tensor accounted for
ROWS = 8  # questions of a plain batch (our choice)


def is_other(name: str) -> bool:
    """Whether `name` is a folder or hub copy of a transformers image-text model that `network.checkpoint` cannot read.

    Raises:
        InputError: There is neither a folder nor a hub copy.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

    file = local_folder(name) / "config.json"
    kind = read_json(file).get("model_type") if file.is_file() else None
    return isinstance(kind, str) and kind in KNOWN and kind not in OURS


class OtherAnswerer(Answerer):
    """A model as `AutoModelForImageTextToText` loads it, with its own processor and chat template.

    The first prompt of a call is answered twice: if the engine's logits are not the model's own, questions are answered
    in plain padded batches, and a line in the log says why. Each image is also opened once before the first answer:
    only the processor knows how many tokens it becomes.

    Args:
        name: Folder or hub id.
        device: See `Answerer`.
        dtype: See `Answerer`.
        rows: See `Answerer`; of a plain batch, 8 if None.
        batch_tokens: See `Answerer`.

    Raises:
        InputError: The model cannot be loaded whole, or has no chat template.
    """

    def __init__(
        self,
        name: str,
        device: str | None = None,
        dtype: str | None = None,
        rows: int | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.name, self.rows, self.batch_tokens = name, rows, batch_tokens
        self.device = torch_device(device)
        self.dtype = torch_dtype(dtype, self.device)
        folder = local_folder(name)
        with refused(name, "transformers cannot load it"):
            self.processor: Any = AutoProcessor.from_pretrained(folder)
            load: Any = AutoModelForImageTextToText.from_pretrained
            model, told = load(folder, dtype=self.dtype, output_loading_info=True)
        if missing := sorted(told["missing_keys"]):
            raise InputError(f"{name}: {len(missing)} of its weights are missing ({some(missing)}). Copy it again.")
        if not getattr(self.processor, "chat_template", None):
            raise InputError(f"{name}: its processor has no chat template. Add chat_template.jinja to the folder.")
        self.model = model.to(self.device).eval()
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        ends = model.generation_config.eos_token_id or self.tokenizer.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.sha256 = _hash(folder)
        self._stops = {}
        self._prefixes: dict[Any, tuple[list[int], list[int]]] = {}
        self._misfit = ""

    @property
    def preprocessing(self) -> dict[str, Any]:
        """See `Answerer`."""
        return {
            "prompt": self.prompt("{question}"),
            "image_preprocessing": type(self.processor.image_processor).__name__,
            "decoding": "greedy",
            "four_bit": False,
        }

    def prompt(self, question: str | None, history: Sequence[tuple[str, str]] = (), template: str | None = None) -> str:
        """The prompt of the model's own chat template."""
        if question is None or history or template:
            raise InputError(f"{self.name}: only a model of our own network asks, or goes on with a conversation.")
        content: Any = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def answer(
        self,
        questions: Sequence[Question],
        progress: bool = True,
        follow: Callable[[int, Answer], Sequence[Question]] | None = None,
    ) -> Iterator[tuple[int, Answer]]:
        """See `Answerer.answer`."""
        self._prefixes = {}  # of this call's images
        if questions and not self._misfit:
            self._misfit = self._find_misfit(questions)
            if self._misfit:
                logger.warning("{}: answered in plain batches, images are not shared ({})", self.name, self._misfit)
        if not self._misfit:
            yield from super().answer(questions, progress, follow)
            return
        if follow or any(question.sampling for question in questions):
            raise InputError(f"{self.name}: draws need a model that the engine can share images of.")
        size = self.rows or ROWS
        with progress_bar(len(questions), progress) as bar:
            for start in range(0, len(questions), size):
                batch = questions[start : start + size]
                for place, ids in enumerate(self._generated(batch), start):
                    yield place, self._read(ids, questions[place])
                bar.update(len(batch))

    def _find_misfit(self, questions: Sequence[Question]) -> str:
        """Why the engine cannot answer these questions; empty if it can."""
        from stllava_eval.engine import misfit

        try:
            prompts = [self._prompt(place, question) for place, question in enumerate(questions)]
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            return one_line(error)
        whole = {name: self._moved(value) for name, value in self._inputs(questions[0], slice(None)).items()}
        return misfit(self.model, prompts[0], whole)

    def _generated(self, batch: Sequence[Question]) -> list[list[int]]:
        import torch
        from transformers import GenerationConfig

        inputs = self.processor(
            images=[[question.image()] for question in batch],
            text=[self._text(question) for question in batch],
            padding=True,
            add_special_tokens=not self._begins_by_itself(batch[0]),
            return_tensors="pt",
        )
        greedy = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max(question.max_new_tokens for question in batch),
            eos_token_id=sorted(self.ends),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        with torch.inference_mode():
            output = self.model.generate(
                **{key: self._moved(value) for key, value in inputs.items()}, generation_config=greedy
            )
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    def _text(self, question: Question) -> str:
        self._refuse_special_tokens([question.text or ""])
        return self.prompt(question.text, question.history, question.template)

    def _begins_by_itself(self, question: Question) -> bool:
        """Whether the template writes the token that a text begins with."""
        return bool(self.tokenizer.bos_token) and self._text(question).startswith(self.tokenizer.bos_token)

    def _moved(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)

    def _processed(self, question: Question, image: Image) -> Any:
        return self.processor(
            images=[image],
            text=self._text(question),
            add_special_tokens=not self._begins_by_itself(question),
            return_tensors="pt",
        )

    def _inputs(self, question: Question, part: slice) -> dict[str, torch.Tensor]:
        """What the model's forward takes beside the ids of `part` of the prompt."""
        made = self._processed(question, question.image())
        length = made["input_ids"].shape[1]
        return {
            key: value[:, part] if value.dim() == 2 and value.shape[1] == length else value
            for key, value in made.items()
            if key not in ("input_ids", "attention_mask")
        }

    def _prompt(self, place: int, question: Question) -> Prompt:
        """The processor writes out an image's tokens once for each image; what stands behind them is tokenized alone.

        Raises:
            ValueError: The written-out prompt does not end as the tokenized one does.
        """

        plain = self.tokenizer(self._text(question), add_special_tokens=not self._begins_by_itself(question)).input_ids
        key = image_key(place, question)
        if key not in self._prefixes:
            whole = self._processed(question, question.image())["input_ids"][0].tolist()
            common = next(
                (
                    number
                    for number, (one, other) in enumerate(zip(reversed(plain), reversed(whole), strict=False))
                    if one != other or one in self._image_ids
                ),
                0,
            )
            if not common:
                raise ValueError("its processor writes the image behind the question, or no tokens of it at all")
            self._prefixes[key] = whole[: len(whole) - common], plain[: len(plain) - common]
        prefix, start = self._prefixes[key]
        if plain[: len(start)] != start:
            raise ValueError("its prompts do not begin alike")
        return self._prompt_of(
            place, question, prefix, plain[len(start) :], lambda: self._inputs(question, slice(len(prefix)))
        )

    @property
    def _image_ids(self) -> set[int]:
        """The ids that stand for an image."""
        config = self.model.config
        names = ("image_token_id", "image_token_index", "vision_end_token_id", "vision_start_token_id")
        return {number for name in names if (number := getattr(config, name, None)) is not None}


def _hash(folder: Path) -> str:
    """Of every file that decides the answers."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".jinja", ".safetensors", ".bin", ".model", ".txt"):
            with file.open("rb") as opened:
                digest.update(f"{file.name}\0{hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
