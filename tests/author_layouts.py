"""One small network with the weights of a seed -> the files of the authors' layouts, written by hand."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from stllava_eval.network.configuration import StllavaMedConfig
from stllava_eval.network.layouts import PROTOTYPE_PARTS
from stllava_eval.network.modeling import StllavaMedForConditionalGeneration

ROWS, PATCHES = 60, 4


LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": ROWS,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
}


CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 16,
}


AUTHORS = {ours: theirs for theirs, ours in PROTOTYPE_PARTS.items()}


def make(projector: str = "prototype", rows: int = ROWS, text: type = LlamaConfig, **options):
    """A network with the weights of seed 0."""
    torch.manual_seed(0)
    config = StllavaMedConfig(
        vision_config=CLIPVisionConfig(**CLIP).to_dict(),
        text_config=text(**LLAMA | {"vocab_size": rows}).to_dict(),
        **{
            "image_token_index": rows,
            "projector_type": projector,
            "num_prototypes": 3,
            "image_seq_length": PATCHES,
        }
        | options,
    )
    return StllavaMedForConditionalGeneration(config).eval()


def original_names(model) -> dict[str, Tensor]:
    """The authors' name of every tensor, with what their files hold beside: inv_freq, ln_1 and position_ids."""
    made = {}
    for name, value in model.state_dict().items():
        if name.startswith("model.multi_modal_projector."):
            stem, _, leaf = name.removeprefix("model.multi_modal_projector.").rpartition(".")
            if model.config.projector_type == "mlp2x_gelu":
                made[f"model.mm_projector.{({'linear_1': 0, 'linear_2': 2})[stem]}.{leaf}"] = value
            elif f"{stem}.{leaf}" in AUTHORS:
                made[f"model.mm_projector.{AUTHORS[f'{stem}.{leaf}']}"] = value.reshape(1, 1, 1)
            else:
                made[f"model.mm_projector.{AUTHORS[stem]}.{leaf}"] = value
        elif name.startswith("model.vision_tower."):
            tail = name.removeprefix("model.vision_tower.")
            made[f"model.vision_tower.vision_tower.vision_model.{tail}"] = value
        else:
            made[name.replace("model.language_model.", "model.")] = value
    made["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    if model.config.projector_type == "prototype":
        made["model.mm_projector.ln_1.weight"] = torch.ones(32)
    return made


def without(tensors: dict[str, Tensor], *parts: str) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if not any(part in name for part in parts)}


def only(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if part in name}


def write_flat_config(folder: Path, model, **options) -> None:
    kind = "cluster" if model.config.projector_type == "prototype" else "mlp2x_gelu"
    multimodal = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "mm_projector_type": kind,
        "mm_vision_tower": "./vit",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "mm_use_im_start_end": False,
        "num_latents": 256,
    }
    folder.mkdir(parents=True, exist_ok=True)
    shape = LLAMA | {"vocab_size": model.config.text_config.vocab_size}
    (folder / "config.json").write_text(json.dumps(shape | multimodal | options))


def write_tower(folder: Path, model, prefix: str = "vision_model.", **extra: Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CLIP | {"model_type": "clip_vision_model"}))
    tower = {f"{prefix}{name}": value for name, value in model.model.vision_tower.state_dict().items()}
    torch.save(tower | extra, folder / "pytorch_model.bin")
    return folder


def write_shards(folder: Path, tensors: dict[str, Tensor], suffix: str = "bin", shards: int = 3) -> None:
    stem = "pytorch_model" if suffix == "bin" else "model"
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number in range(shards):
        name = f"{stem}-{number + 1:05}-of-{shards:05}.{suffix}"
        part = {key: value for place, (key, value) in enumerate(tensors.items()) if place % shards == number}
        if suffix == "bin":
            torch.save(part, folder / name)
        else:
            save_file({key: value.contiguous() for key, value in part.items()}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def lora(tensors: dict[str, Tensor], rank: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    return {
        name: (0.1 * torch.randn(rank, value.shape[1]), 0.1 * torch.randn(value.shape[0], rank))
        for name, value in tensors.items()
    }


def lora_file(updates: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    made = {}
    for name, (a, b) in updates.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        made |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    return made
