"""Write a checked checkpoint as a folder that `from_pretrained` reads: the last step of checkpoint -> network."""

from __future__ import annotations

import math
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from stllava_eval.errors import InputError, one_line
from stllava_eval.network.checkpoint import Checkpoint
from stllava_eval.network.files import refused
from stllava_eval.network.layouts import VOCABULARY_ROWS
from stllava_eval.storage import write_json

SHARD_BYTES = 5 * 10**8  # of a written file: what is held in memory (our choice)


def convert(checkpoint: Checkpoint, out: Path, to: str = "stllava-med", progress: bool = True) -> None:
    """Write `checkpoint` as a folder that `from_pretrained` reads: weights, configuration, processor, audit.json.

    Memory: one tensor of the source and one written shard (SHARD_BYTES) at a time. The folder appears when it is whole.

    Args:
        checkpoint: What to write.
        out: A folder that is not there yet, or is empty.
        to: `stllava-med`, or `llava-hf` for servers that know LLaVA only (vLLM, SGLang, `transformers serve`).
        progress: Whether to show a bar on stderr.

    Raises:
        InputError: `out` holds something, the disk is full, or `llava-hf` is asked for a prototype extractor.
    """
    with refused(f"--out {out}", "no place for a folder"):
        target = out.resolve()
    if not target.name or target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise InputError(f"--out {out}: there is something already. Pass a folder that does not exist yet.")
    if to == "llava-hf" and checkpoint.config.projector_type != "mlp2x_gelu":
        raise InputError(
            f"{checkpoint.name}: llava-hf has no prototype extractor; only models with mlp2x_gelu can be written so."
        )
    processor = None
    if checkpoint.tokenizer is not None or to == "llava-hf":
        processor = checkpoint.processor()  # before any work: what is wrong with it is no fault of `out`
    generation = checkpoint.generation_config()
    partial: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
        partial.chmod(0o755)
        write = _write_llava_hf if to == "llava-hf" else _write_ours
        write(checkpoint, processor, generation, partial, progress)
        write_json(partial / "audit.json", checkpoint.report())
        if target.is_dir():
            target.rmdir()
        partial.replace(target)
    except (OSError, SafetensorError) as error:
        raise InputError(f"--out {out}: cannot be written ({one_line(error)}). Choose a place with room.") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _write_ours(checkpoint: Checkpoint, processor: Any, generation: Any, out: Path, progress: bool) -> None:
    config = checkpoint.config
    config.architectures = ["StllavaMedForConditionalGeneration"]
    config.dtype = _most_common_dtype(checkpoint)
    sizes = [(taken.name, math.prod(taken.shape) * taken.dtype.itemsize) for taken in checkpoint.taken]
    _write_weights(checkpoint.weights(), sizes, out, progress)
    config.save_pretrained(out)
    generation.save_pretrained(out)
    if processor is not None:
        processor.save_pretrained(out)


def _write_llava_hf(checkpoint: Checkpoint, processor: Any, generation: Any, out: Path, progress: bool) -> None:
    """Write transformers' LLaVA, in the key layout of its hub copies, with rows for `<image>` and `<pad>`.

    The rows behind the vocabulary repeat `<unk>`'s, the token that no training text holds: such a row can tie with
    `<unk>` but never win, so that no server generates it greedily.
    """
    ours = checkpoint.config
    rows = ours.text_config.vocab_size
    # a multiple of 64 rows, as the hub copies have, with room for <image> and <pad>
    wide = rows if ours.image_token_id < rows else 64 * math.ceil((rows + 2) / 64)

    def padded() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in checkpoint.weights():
            if name in VOCABULARY_ROWS and wide > rows:  # (rows, width) -> (wide, width); row 0 is <unk>'s
                tensor = torch.cat([tensor, tensor[:1].expand(wide - rows, -1)])
            yield _llava_hf_name(name), tensor

    sizes = []
    for taken in checkpoint.taken:
        first = wide if taken.name in VOCABULARY_ROWS else taken.shape[0]
        size = first * math.prod(taken.shape[1:]) * taken.dtype.itemsize
        sizes.append((_llava_hf_name(taken.name), size))
    _write_weights(padded(), sizes, out, progress)
    _llava_hf_config(checkpoint, rows, wide).save_pretrained(out)
    converted = _llava_hf_processor(checkpoint, processor, rows, wide)
    generation.pad_token_id = converted.tokenizer.pad_token_id
    generation.suppress_tokens = sorted({*range(rows, wide), *(generation.suppress_tokens or ())}) or None
    generation.save_pretrained(out)
    converted.save_pretrained(out)


def _llava_hf_name(name: str) -> str:
    """Return the hub copies' key of a weight of our network."""
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    for part, hub in (("language_model", "language_model.model"), ("vision_tower", "vision_tower.vision_model")):
        if name.startswith(f"model.{part}."):
            return f"{hub}.{name.removeprefix(f'model.{part}.')}"
    return name.removeprefix("model.")


def _llava_hf_config(checkpoint: Checkpoint, rows: int, wide: int) -> Any:
    """Return transformers' LLaVA configuration for a vocabulary of `rows` that is padded to `wide`."""
    from transformers import LlavaConfig

    ours = checkpoint.config
    text = ours.text_config.to_dict() | {"vocab_size": wide}
    if wide > rows:
        text["pad_token_id"] = rows + 1  # behind <image>
    config = LlavaConfig(
        vision_config=ours.vision_config.to_dict(),
        text_config=text,
        image_token_index=ours.image_token_id,
        image_seq_length=ours.image_seq_length,
        vision_feature_layer=ours.vision_feature_layer,
        vision_feature_select_strategy=ours.vision_feature_select_strategy,
        projector_hidden_act=ours.projector_hidden_act,
        multimodal_projector_bias=ours.multimodal_projector_bias,
        tie_word_embeddings=ours.tie_word_embeddings,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = _most_common_dtype(checkpoint)
    return config


def _llava_hf_processor(checkpoint: Checkpoint, processor: Any, rows: int, wide: int) -> Any:
    """Return transformers' LLaVA processor with our tokenizer, image settings and default chat template."""
    from transformers import LlavaImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    tokenizer, image = processor.tokenizer, processor.image_processor
    plain = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        unk_token=tokenizer.unk_token,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token="<pad>" if wide > rows else tokenizer.pad_token,
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    return LlavaProcessor(
        image_processor=LlavaImageProcessor(
            do_pad=image.do_pad,
            size=dict(image.size),
            crop_size=dict(image.crop_size),
            image_mean=image.image_mean,
            image_std=image.image_std,
        ),
        tokenizer=plain,
        patch_size=checkpoint.config.vision_config.patch_size,
        vision_feature_select_strategy=checkpoint.config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=processor.chat_template["default"],
    )


def _most_common_dtype(checkpoint: Checkpoint) -> torch.dtype:
    return Counter(taken.dtype for taken in checkpoint.taken).most_common(1)[0][0]


def _write_weights(
    weights: Iterator[tuple[str, Tensor]], sizes: Sequence[tuple[str, int]], out: Path, progress: bool
) -> None:
    """Write files of at most SHARD_BYTES (or of one tensor), and their index if there are several."""
    shard_of: dict[str, int] = {}
    filled, shard = 0, 0
    for name, size in sizes:
        if filled and filled + size > SHARD_BYTES:
            filled, shard = 0, shard + 1
        shard_of[name] = shard
        filled += size
    last = shard

    def file_name(number: int) -> str:
        return f"model-{number + 1:05}-of-{last + 1:05}.safetensors" if last else "model.safetensors"

    held: dict[str, Tensor] = {}
    addresses: set[int] = set()
    current = 0
    total = sum(size for _, size in sizes)
    with tqdm(total=total, desc="converting", unit="B", unit_scale=True, disable=not progress, file=sys.stderr) as bar:
        for name, tensor in weights:
            if shard_of[name] != current:
                save_file(held, out / file_name(current), {"format": "pt"})
                held, addresses, current = {}, set(), shard_of[name]
            held[name] = tensor.contiguous()
            address = held[name].untyped_storage().data_ptr()
            if address in addresses:  # a pickle may hold one tensor under two names; safetensors may not
                held[name] = held[name].clone()
            addresses.add(address)
            bar.update(tensor.numel() * tensor.dtype.itemsize)
        save_file(held, out / file_name(current), {"format": "pt"})
    if last:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file_name(shard_of[name]) for name, _ in sizes},
        }
        write_json(out / "model.safetensors.index.json", index)
