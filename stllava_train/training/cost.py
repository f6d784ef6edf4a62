"""Estimate the memory and the time of a run from its recipe and the network's sizes, by arithmetic alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stllava_train.training.recipe_yaml import Part
from stllava_train.training.recipes import TrainingRecipe

WIDTH = {"float32": 4, "bfloat16": 2}  # bytes of a number
TRAINED = 16  # bytes per trained weight: the weight, its gradient and AdamW's two moments, each in float32
NF4 = 0.5625  # bytes per weight: half a byte, and a float32 scale for every 64 weights (QLoRA, arXiv:2305.14314)
A100 = 312e12  # operations per second in bfloat16 at most, by NVIDIA's data sheet
TILE = (4096, 32768)  # positions and vocabulary entries whose logits trl 1.16 holds at once
SHARE = 0.4  # of the peak that is reached: our assumption, and what depends most on hardware and data


@dataclass(frozen=True)
class Stack:
    """Transformer layers of one size.

    Attributes:
        key_value: Width of keys and of values; below `hidden` where heads share them.
        gated: The MLP has three matrices (LLaMA), not two (CLIP).
    """

    layers: int
    hidden: int
    intermediate: int
    key_value: int
    gated: bool

    @property
    def matrix(self) -> int:
        """Return the number of weights in the matrices of one layer."""
        return 2 * self.hidden * (self.hidden + self.key_value) + (2 + self.gated) * self.hidden * self.intermediate

    def activations(self, width: int, train: str) -> int:
        """Return the bytes per token that one layer keeps for its backward pass; a test counts what autograd keeps.

        Queries, keys, values, what leaves the attention, the MLP's insides, and what enters both norms, in float32;
        attention scores are kept by no fused kernel. A matrix that is trained keeps what enters it as well, and a LoRA
        does after dropout, with a byte for the mask. A frozen one keeps nothing. Korthikanti et al. 2022
        (arXiv:2205.05198, section 4.1) count the same way for GPT: 34 bytes for each number of the hidden state.

        Args:
            width: Bytes of a number in the computation.
            train: As of `Part`.
        """
        insides = 2 * self.hidden + 2 * self.key_value + (2 + self.gated) * self.intermediate
        norms = 2 * WIDTH["float32"] * self.hidden
        kept = width * insides + norms
        if train == "full":  # autocast makes a copy of its input for each matrix; what leaves the attention is kept
            kept += norms + width * ((4 + self.gated) * self.hidden + self.intermediate)
        if train == "lora":
            kept += (width + 1) * ((5 + self.gated) * self.hidden + self.intermediate)
        return kept


@dataclass(frozen=True)
class Memory:
    """Bytes on one device that holds everything, by what they hold; without CUDA's own and unused space between."""

    frozen: float
    trained: float
    copies: float  # of trained weights in bfloat16, which autocast holds until a forward pass ends
    activations: float
    head: float

    @property
    def total(self) -> float:
        """Return the sum, in bytes."""
        return self.frozen + self.trained + self.copies + self.activations + self.head


def read_layers(config: Any) -> int:
    """Return how many layers of the vision tower, from the first on, the features pass through; no other is read."""
    read, count = config.vision_feature_layer, config.vision_config.num_hidden_layers
    return max(layer if layer >= 0 else count + 1 + layer for layer in (read if isinstance(read, list) else [read]))


def stacks(config: Any) -> tuple[Stack, Stack]:
    """Return the stacks of a StllavaMedConfig: the language model, and as much of the vision tower as is read."""
    text, vision = config.text_config, config.vision_config
    key_value = text.hidden_size * text.num_key_value_heads // text.num_attention_heads
    return (
        Stack(text.num_hidden_layers, text.hidden_size, text.intermediate_size, key_value, True),
        Stack(read_layers(config), vision.hidden_size, vision.intermediate_size, vision.hidden_size, False),
    )


def memory(recipe: TrainingRecipe, weights: Mapping[str, tuple[int, int]], config: Any, tokens: int) -> Memory:
    """Return the memory of a training step on one device that shares nothing with others (DDP, without its buckets).

    Args:
        recipe: How each part is trained, in which precision, and how many conversations at once.
        weights: For each part its weights without adapters, and how many are trained, adapters' included.
        config: The network's.
        tokens: Of the longest conversation, those of the image counted.
    """
    width = WIDTH[recipe.dtype]
    language, vision = stacks(config)
    rest = WIDTH["float32"] if recipe.four_bit else width  # peft's prepare_model_for_kbit_training widens the rest
    frozen: float = 0
    for name, (held, trained) in weights.items():
        # weights that are trained themselves are counted below; those under a LoRA are frozen
        frozen += rest * (held - trained if recipe.parts()[name].train == "full" else held)
    if recipe.four_bit:
        frozen -= (rest - NF4) * language.layers * language.matrix
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1
    kept, peak = 0, 0
    for stack, part, vectors in (
        (language, recipe.language_model, tokens),
        (vision, recipe.vision_tower, patches),
    ):
        if stack is vision and part.train == "frozen":
            continue  # nothing before the projector needs a gradient
        vectors *= recipe.micro_batch
        layer = vectors * stack.activations(width, part.train)
        if recipe.gradient_checkpointing:  # a layer's input, and all of one layer at a time
            wide = recipe.four_bit or part.train == "full"  # then embeddings are float32, and what is added to them
            kept += vectors * stack.layers * stack.hidden * (WIDTH["float32"] if wide else width)
            peak = max(peak, layer)
        else:
            kept += stack.layers * layer
    trained = sum(trained for _, trained in weights.values())
    return Memory(
        frozen=frozen,
        trained=TRAINED * trained,
        copies=width * trained if recipe.dtype == "bfloat16" else 0,
        activations=kept + peak,
        head=_head(recipe.micro_batch * tokens, language.hidden, config.text_config.vocab_size, width),
    )


def _head(positions: int, hidden: int, vocabulary: int, width: int) -> int:
    """Return the bytes of trl's fused head, if all positions were learnt: a tile of the logits, and a gradient."""
    tile = min(positions, TILE[0]) * min(vocabulary, TILE[1])
    return positions * hidden * (width + WIDTH["float32"]) + tile * width


def operations(recipe: TrainingRecipe, weights: Mapping[str, tuple[int, int]], config: Any, tokens: float) -> float:
    """Return the floating-point operations that it takes to learn from one conversation about an image.

    Each weight of a matrix costs 2 for each vector in the forward pass, 2 for the gradient of its input, 2 for its own
    where it is trained, and 2 more where gradient checkpointing computes it again. So 6 in ordinary training (Kaplan et
    al. 2020, arXiv:2001.08361, section 2.1), and 4 for a matrix under a LoRA. Attention scores, under 2 % here, are
    left out.

    Args:
        recipe: As of `memory`.
        weights: As of `memory`.
        config: As of `memory`.
        tokens: Of the conversation, those of the image counted.
    """
    language, vision = stacks(config)
    image = config.image_seq_length
    seen = vision.layers * vision.matrix
    head = config.text_config.vocab_size * config.text_config.hidden_size
    again = recipe.gradient_checkpointing
    spoken = language.layers * language.matrix + head
    return (
        tokens * _passes(recipe.language_model, spoken, weights["language_model"][1], True, again)
        + image * _passes(recipe.projector, weights["projector"][0], weights["projector"][1], True, False)
        + image * _passes(recipe.vision_tower, seen, weights["vision_tower"][1], False, again)
    )


def _passes(part: Part, matrices: int, trained: int, below: bool, again: bool) -> float:
    """Return the operations for one vector; `below` says that something under this part is trained, or could be."""
    backward = below or part.train != "frozen"
    own = matrices if part.train == "full" else 0
    adapters = trained if part.train == "lora" else 0
    return 2 * ((1 + backward + (again and backward)) * (matrices + adapters) + own + adapters)


def hours(operations: float, devices: int, peak: float = A100, share: float = SHARE) -> float:
    """Return the hours that `operations` take on devices that reach `share` of `peak` operations per second."""
    return operations / (devices * peak * share) / 3600
