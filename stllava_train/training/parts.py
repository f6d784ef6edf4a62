"""Choose which weights are trained: the parts of the network, whole or by LoRA, and their learning rates."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from stllava_train.training.cost import read_layers
from stllava_train.training.recipes import TrainingRecipe

PATHS = {  # where each part of a recipe is in the network
    "language_model": "model.language_model",
    "projector": "model.multi_modal_projector",
    "vision_tower": "model.vision_tower",
}
# Every linear layer of a block gets a LoRA, as LLaVA's `find_all_linear_names` (train.py) chooses them
LANGUAGE_LINEAR = r"self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj"
VISION_LINEAR = r"self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12]"


# --- the order of work ------------------------------------------------------------------------------------------------


def steps_of(records: int, recipe: TrainingRecipe) -> int:
    """Return the optimizer steps of a run that sees every record `epochs` times; the last step is full."""
    return math.ceil(records * recipe.epochs / recipe.batch - 1e-9)  # 1e-9, as 100 * 0.07 / 7 is a little above 1


def plan(groups: Sequence[Sequence[int]], recipe: TrainingRecipe) -> list[tuple[int, int]]:
    """Return (index of a record, epoch), in the order in which the records are learnt from.

    Each epoch is an order of the groups, drawn from (seed, epoch); the records of a group stay together. Steps are
    full: the last one takes the first records of the epoch that would follow. So every step weighs the same on any
    number of processes, and a run that resumes from a checkpoint sees exactly the records that are left.

    Args:
        groups: Indexes of records, each once.
        recipe: Its `epochs`, `batch` and `seed` count.
    """
    order: list[tuple[int, int]] = []
    count = steps_of(sum(map(len, groups)), recipe) * recipe.batch
    epoch = 0
    while len(order) < count:
        # a prime larger than any number of epochs, so that no two (seed, epoch) draw the same order
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
        for group in torch.randperm(len(groups), generator=generator).tolist():
            order += [(index, epoch) for index in groups[group]]
        epoch += 1
    return order[:count]


def set_trainable(model: Any, recipe: TrainingRecipe) -> Any:
    """Return the network in which what the recipe trains, and only that, asks for gradients.

    LoRA on language model and vision tower is one PEFT configuration of path patterns, in which the projector is saved
    whole. The tower's layers behind the last one that is read get none, because no gradient would reach them.
    """
    from peft import LoraConfig, get_peft_model

    model.requires_grad_(False)
    read = "|".join(map(str, range(read_layers(model.config))))
    loras = {name: part for name, part in recipe.parts().items() if part.train == "lora"}
    for name, part in recipe.parts().items():
        if part.train == "full":
            model.get_submodule(PATHS[name]).requires_grad_(True)
    if recipe.language_model.train == "full":
        model.lm_head.requires_grad_(True)
    for name, parameter in model.model.vision_tower.named_parameters():
        if re.match(rf"encoder\.layers\.(?!(?:{read})\.)|post_layernorm", name):
            parameter.requires_grad_(False)
    if not loras:
        return model
    patterns = {
        "language_model": rf".*\.language_model\.layers\.\d+\.(?:{LANGUAGE_LINEAR})",
        "vision_tower": rf".*\.vision_tower\.encoder\.layers\.(?:{read})\.(?:{VISION_LINEAR})",
    }
    first = loras.get("language_model") or loras["vision_tower"]
    vision = {r".*\.vision_tower\..*": loras["vision_tower"]} if "vision_tower" in loras else {}
    configuration = LoraConfig(
        target_modules="|".join(f"(?:{patterns[name]})" for name in loras),
        r=first.rank,
        lora_alpha=first.alpha,
        lora_dropout=first.dropout,
        rank_pattern={pattern: part.rank for pattern, part in vision.items()},
        alpha_pattern={pattern: part.alpha for pattern, part in vision.items()},
        modules_to_save=["multi_modal_projector"] if recipe.projector.train == "full" else None,
        task_type="CAUSAL_LM",
    )
    if recipe.four_bit:
        from peft import prepare_model_for_kbit_training

        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    with warnings.catch_warnings():  # peft 0.21 asks by a name that transformers 5.23 has renamed
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
        model = get_peft_model(model, configuration)
    if "vision_tower" in loras:  # a PEFT configuration has one dropout, so the tower's own is put in here
        dropout = loras["vision_tower"].dropout
        for name, module in model.named_modules():
            if ".vision_tower." in name and name.endswith(".lora_dropout"):
                module["default"] = torch.nn.Dropout(dropout) if dropout else torch.nn.Identity()
    return model


def part_of(parameter: str) -> str:
    """Return the part that a parameter belongs to, by its name; the head belongs to the language model."""
    for name, path in PATHS.items():
        if f"{path.rpartition('.')[2]}." in parameter:
            return name
    return "language_model"
