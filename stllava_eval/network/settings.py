"""Read a checkpoint's configuration in any published layout, and check that it can be computed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig

from stllava_eval.errors import InputError
from stllava_eval.hub import find_folder, read_json
from stllava_eval.network.configuration import StllavaMedConfig
from stllava_eval.network.files import (
    WeightFile,
)
from stllava_eval.network.layouts import Draft

PROTOTYPES, ITERATIONS = 256, 2  # authors' multimodal_projector/builder.py; their files store neither
# tokens behind the pieces of LLaMA's tokenizer that only ever stand in a prompt
PROMPT_TOKENS = {"<image>", "<pad>", "[PAD]", "<im_start>", "<im_end>", "<im_patch>"}
NOT_SHAPES = {"architectures", "dtype", "transformers_version", "model_type"}  # what config.json says beside shapes
# the tower of LLaVA-1.5, recognised by its shapes where its own folder is not at hand
VIT_L_336: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
MOST_PADDING = 128  # rows behind a vocabulary; llava-hf has 64 (our choice)


def check_configuration(config: Any, tensors: Mapping[str, Any]) -> None:
    """Raise ValueError on what the shapes of the tensors cannot show, or would show only after a long time."""
    vision, text = config.vision_config, config.text_config
    config.validate()
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for part, names in ((vision, (*sizes, "image_size", "patch_size")), (text, (*sizes, "vocab_size"))):
        for name in names:
            whole_number(name, getattr(part, name))
    for name in ("num_prototypes", "prototype_iterations"):
        whole_number(name, getattr(config, name), 10**5)
    for name, part, pattern in (
        ("vision_config", vision, r"model\.vision_tower\.encoder\.layers\.(\d+)\."),
        ("text_config", text, r"model\.language_model\.layers\.(\d+)\."),
    ):
        layers = {int(match[1]) for key in tensors if (match := re.match(pattern, key))}
        if part.num_hidden_layers != len(layers):
            raise ValueError(f"{name}: num_hidden_layers is {part.num_hidden_layers}, its weights have {len(layers)}")
    if vision.image_size % vision.patch_size:
        raise ValueError(f"image_size {vision.image_size} is no multiple of patch_size {vision.patch_size}")
    layer, count = config.vision_feature_layer, vision.num_hidden_layers
    if not isinstance(layer, int) or not -count - 1 <= layer <= count:
        raise ValueError(f"vision_feature_layer is {layer!r}; the tower has {count} layers")
    if not isinstance(config.image_token_id, int) or config.image_token_id < 0:
        raise ValueError(f"image_token_index is {config.image_token_id!r}, not a token's id")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        check_ids(name, getattr(text, name), text.vocab_size)


def whole_number(name: str, value: Any, most: int = 10**9) -> None:
    """Raise ValueError unless `value` is one, from 1 on."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"{name} is {value!r}, not a whole number from 1 to {most}")


def check_ids(name: str, value: Any, rows: int) -> None:
    """Raise ValueError unless `value` is None, an id of the vocabulary or a list of them."""
    for token in value if isinstance(value, list) else [value]:
        if token is not None and (not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < rows):
            raise ValueError(f"{name} is {value!r}, not an id of {rows} tokens")


def equal_tensors(first: tuple, second: tuple | None) -> bool:
    """Return whether two tensors, each as (file, key, shape, ...), hold the same values."""
    if second is None or first[2] != second[2]:
        return False
    with WeightFile(first[0]) as first_file, WeightFile(second[0]) as second_file:
        return bool(first_file.get(first[1]).equal(second_file.get(second[1])))


# --- configuration ----------------------------------------------------------------------------------------------------


def read_configuration(
    source: str, draft: Draft, tensors: Mapping[str, Any], prototypes: int | None, iterations: int | None
) -> Any:
    """Return the network's configuration, from transformers' kind of config.json or from the original flat one."""
    if draft.original:
        config = _original_configuration(source, draft, tensors, prototypes, iterations)
    else:
        raw = {name: value for name, value in draft.raw.items() if name not in ("architectures", "model_type")}
        if raw.get("image_token_index", raw.get("image_token_id")) is None:
            raise InputError(f"{draft.source}/config.json: no image_token_index. Use a checkpoint that names it.")
        config = StllavaMedConfig(**(raw if draft.ours else raw | {"projector_type": "mlp2x_gelu"}))
        for name, given in (("num_prototypes", prototypes), ("prototype_iterations", iterations)):
            if given is not None and given != getattr(config, name):
                raise InputError(
                    f"{source}: {name} is {getattr(config, name)} in its config.json, not {given}. Leave the option "
                    "out; it is for the authors' files, which do not store the number."
                )
    return config


def _original_configuration(
    source: str, draft: Draft, tensors: Mapping[str, Any], prototypes: int | None, iterations: int | None
) -> Any:
    raw = draft.raw
    if raw.get("mm_use_im_start_end"):
        raise InputError(f"{source}: mm_use_im_start_end is true; images between markers are not supported.")
    aspect = raw.get("image_aspect_ratio", "pad")
    if aspect not in ("pad", "square", None):
        raise InputError(f"{source}: image_aspect_ratio {aspect!r} is not supported. It may be pad or square.")
    vision = _vision_configuration(source, draft, tensors)
    strategies = {"patch": "default", "cls_patch": "full"}
    mistral = "mistral" in f"{raw.get('model_type')} {raw.get('architectures')}".lower()
    text_class: Any = MistralConfig if mistral else LlamaConfig
    names = {*text_class.__dataclass_fields__, "rope_theta", "rope_scaling"} - NOT_SHAPES
    return StllavaMedConfig(
        **{
            "vision_config": vision.to_dict(),
            "text_config": {name: value for name, value in raw.items() if name in names}
            | {"model_type": text_class.model_type},
            "image_token_index": raw.get("vocab_size"),
            "vision_feature_layer": raw.get("mm_vision_select_layer", -2),
            "vision_feature_select_strategy": strategies.get(raw.get("mm_vision_select_feature", "patch")),
            "projector_type": _projector_type(source, raw, tensors),
            "num_prototypes": prototypes or PROTOTYPES,
            "prototype_iterations": iterations or ITERATIONS,
            "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        }
    )


def trim_vocabulary(source: str, config: Any, tokenizer: Any) -> None:
    """Leave out the rows behind the tokenizer's pieces, unless a token that can stand in an answer is among them."""
    if tokenizer is None:
        return
    rows, added = config.text_config.vocab_size, tokenizer.get_added_vocab()
    last_piece = max((number for token, number in tokenizer.get_vocab().items() if token not in added), default=0)
    if last_piece >= rows:
        raise InputError(f"{source}: its tokenizer has {last_piece + 1} pieces, its network {rows} rows for them.")
    first = min(number for token, number in added.items() if token in PROMPT_TOKENS)
    behind = {token for token, number in added.items() if number >= first}
    if last_piece < first <= rows and behind <= PROMPT_TOKENS:
        if rows - first > MOST_PADDING:
            raise InputError(f"{source}: its tokenizer has {first} pieces, its network {rows} rows. Copy both again.")
        config.text_config.vocab_size = first
        if (config.text_config.pad_token_id or 0) >= first:
            config.text_config.pad_token_id = 0  # unk: the authors' padding
    if config.image_token_id >= config.text_config.vocab_size:
        config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")


def _projector_type(source: str, raw: Mapping[str, Any], tensors: Mapping[str, Any]) -> str:
    named = raw.get("mm_projector_type")
    if named is None:
        named = "cluster" if "model.multi_modal_projector.prototypes.similarity_scale" in tensors else "mlp2x_gelu"
    if named not in ("cluster", "mlp2x_gelu"):
        raise InputError(f"{source}: mm_projector_type {named!r} is not supported. It may be cluster or mlp2x_gelu.")
    return {"cluster": "prototype"}.get(named, named)


def _vision_configuration(source: str, draft: Draft, tensors: Mapping[str, Any]) -> CLIPVisionConfig:
    """Return the tower's configuration from its folder; else LLaVA-1.5's, if the shapes are."""
    named = draft.raw.get("mm_vision_tower")
    folder = draft.vision or (find_folder(named, draft.folders) if isinstance(named, str) else None)
    if folder is not None and (folder / "config.json").is_file():
        raw = read_json(folder / "config.json")
        raw = raw.get("vision_config") or raw.get("vision_config_dict") or raw
        names = set(CLIPVisionConfig.__dataclass_fields__) - NOT_SHAPES
        draft.folders.append(folder)
        return CLIPVisionConfig(**{name: value for name, value in raw.items() if name in names})
    shape = tensors.get("model.vision_tower.embeddings.position_embedding.weight", (None, None, ()))[2]
    if shape == (577, 1024):  # (336 / 14)^2 patches and CLS, hidden_size
        return CLIPVisionConfig(**VIT_L_336)
    raise InputError(
        f"{source}: the shape of its vision tower ({named}) is not known. Pass --vision-tower FOLDER, with config.json."
    )
