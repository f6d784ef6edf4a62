"""Images + questions -> answers of a checkpoint: greedy, the same for every batch size and process count in fp32."""

from __future__ import annotations

import hashlib
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
# conversation.py of the authors, template v1 (= vicuna_v1)
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PAD_COLOUR = (122, 116, 104)  # int(255 x CLIP's mean), as the authors' expand2square
# the files of a checkpoint folder that decide its answers
DECIDING_FILES = (
    "*.safetensors",
    "*.bin",
    "*config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "*.jinja",
    "*index.json",
)


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


def prompt(question: str) -> str:
    """The authors' single-turn prompt (template v1): `<image>` marks where the image's tokens go."""
    return f"{SYSTEM} USER: <image>\n{question} ASSISTANT:"


def pad_to_square(image: Image) -> Image:
    """`image` centred on a square canvas of CLIP's mean colour, as in the authors' training (expand2square)."""
    import PIL.Image

    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    canvas = PIL.Image.new("RGB", (side, side), PAD_COLOUR)
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


def image_processor(side: int) -> Any:
    """CLIP's processor at `side` px, resizing with PIL: bit-exact to the authors' stack, which torchvision is not."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


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


def checkpoint_folder(name: str) -> Path:
    """The local folder of checkpoint `name`, a folder or a hub id; a hub id is downloaded first.

    Raises:
        InputError: Neither is there, or the folder is not a LLaVA that transformers can load.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _download(name)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise InputError(
            f"{name} is not a checkpoint: it has no config.json. Pass a folder with config.json and weights."
        )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        architectures = list(config.get("architectures") or [])
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{config_file}: not a JSON object ({error}). Copy the checkpoint again.") from error
    if "LlavaForConditionalGeneration" not in architectures:
        raise InputError(
            f"{name}: architecture {', '.join(map(str, architectures)) or 'not named'} cannot be loaded. "
            "This version loads LlavaForConditionalGeneration (the llava-hf layout)."
        )
    return folder


def _download(name: str) -> Path:
    missing = f"{name}: no such folder"
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"{missing}. Pass pretrained=FOLDER or a hub id such as llava-hf/llava-1.5-7b-hf.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[*DECIDING_FILES, "tokenizer.model"], etag_timeout=10))
    except Exception as error:  # the hub's errors have no common base; offline, gated and unknown all end here
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{missing}, and not to be had from the hub ({type(error).__name__}: {reason[:120]}). Pass --model_args "
            "pretrained=FOLDER, set STLLAVA_CHECKPOINT, or make the demo's checkpoint with `stllava-train tiny`."
        ) from error


def checkpoint_sha256(folder: Path) -> str:
    """Hash of every file that decides the answers: weights, configuration, tokenizer, processor."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in DECIDING_FILES for file in folder.glob(pattern)}):
        with file.open("rb") as opened:
            digest.update(f"{file.name}\0{hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


class Answerer:
    """A LLaVA-1.5-shaped checkpoint that answers questions about images.

    Args:
        name: Folder or hub id.
        device: As torch names it; None takes this process's GPU, else the CPU.
        dtype: float32, bfloat16 or float16; None takes float32 on a CPU and bfloat16 on a GPU (our choice).

    Raises:
        InputError: The checkpoint, device or dtype cannot be used, or weights are missing from it.
    """

    def __init__(self, name: str, device: str | None = None, dtype: str | None = None) -> None:
        from transformers import AutoTokenizer, LlavaForConditionalGeneration

        self.name = name
        self.folder = checkpoint_folder(name)
        self.device = _device(device)
        self.dtype = _dtype(dtype, self.device)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder, padding_side="left")
            load: Any = LlavaForConditionalGeneration.from_pretrained  # its type does not know the second result
            model, loading = load(self.folder, dtype=self.dtype, output_loading_info=True)
        except Exception as error:  # a broken file raises nearly anything here: OSError, KeyError, SafetensorError, ...
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"{self.folder}: cannot be loaded as a LLaVA ({reason}). Copy it again.") from error
        lost = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
        if lost:
            raise InputError(
                f"{self.folder}: {len(lost)} weights are missing or of the wrong shape ({', '.join(lost[:3])}, ...). "
                "They would be random numbers; use a complete checkpoint."
            )
        self.model = model.to(self.device).eval()
        vision = model.config.vision_config
        self.side = int(vision.image_size)
        patches = (self.side // int(vision.patch_size)) ** 2
        self.image_tokens = patches + (model.config.vision_feature_select_strategy == "full")
        self.processor = image_processor(self.side)
        if not isinstance(model.config.image_token_id, int):
            raise InputError(f"{self.folder}/config.json: no image_token_id. Use a checkpoint that names it.")
        self.image_token = model.config.image_token_id
        ends = model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [self.tokenizer.eos_token_id if ends is None else ends])
        self.padding = self.tokenizer.pad_token_id
        if self.padding is None:
            self.padding = self.tokenizer.eos_token_id
        self.sha256 = checkpoint_sha256(self.folder)

    def token_ids(self, question: str) -> list[int]:
        """The prompt's token ids, with one image token for each vector that the image becomes.

        Raises:
            InputError: The question holds the image's token itself.
        """
        ids = self.tokenizer(prompt(question)).input_ids
        if ids.count(self.image_token) != 1:
            raise InputError(f"question {question!r}: it names the image's own token. Reword it.")
        place = ids.index(self.image_token)
        return ids[:place] + [self.image_token] * self.image_tokens + ids[place + 1 :]

    def pixels(self, image: Image) -> torch.Tensor:
        """(1, 3, side, side) normalised pixels of `image`, padded to a square."""
        return self.processor(pad_to_square(image), return_tensors="pt")["pixel_values"]

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
