"""The arithmetic of memory and time, against numbers worked out by hand."""

import dataclasses
import re

import pytest
from conftest import ROOT

from stllava_eval.network.configuration import StllavaMedConfig
from stllava_train.training.cost import Stack, hours, memory, operations, stacks
from stllava_train.training.recipe_yaml import Part
from stllava_train.training.recipes import SftRecipe, read_recipe, recipe_names

CONFIG = StllavaMedConfig()  # the 7B
# weights without adapters, and trained: LoRA of rank 128, the projector, LoRA of rank 32 on the 23 layers that are read
WEIGHTS = {
    "language_model": (6_738_415_616, 319_815_680),
    "projector": (24_128_514, 24_128_514),
    "vision_tower": (303_507_456, 13_565_952),
}
LANGUAGE = Stack(layers=32, hidden=4096, intermediate=11008, key_value=4096, gated=True)
VISION = Stack(layers=23, hidden=1024, intermediate=4096, key_value=1024, gated=False)


@pytest.fixture(scope="module")
def recipe() -> SftRecipe:
    return read_recipe("stllava-med-7b")


def test_the_stacks_are_vicuna_7b_and_the_23_layers_of_clip_that_are_read():
    assert stacks(CONFIG) == (LANGUAGE, VISION)
    # 32 x (4 x 4096 x 4096 + 3 x 4096 x 11008); less embedding, head and norms of 6.738 billion
    assert LANGUAGE.layers * LANGUAGE.matrix == 6_476_005_376
    assert VISION.matrix == 4 * 1024**2 + 2 * 1024 * 4096


def test_weights_of_the_parts_are_those_of_the_network(recipe):
    from accelerate import init_empty_weights

    from stllava_eval.network.modeling import StllavaMedForConditionalGeneration

    with init_empty_weights():
        network = StllavaMedForConditionalGeneration(CONFIG)
    held = dict.fromkeys(WEIGHTS, 0)
    for name, parameter in network.named_parameters():
        part = next((part for part, word in (("projector", "projector"), ("vision_tower", "tower")) if word in name), 0)
        held[part or "language_model"] += parameter.numel()
    assert held == {name: every for name, (every, _) in WEIGHTS.items()}
    # a LoRA of rank r on a matrix of m x n trains r (m + n): 4 of 4096 x 4096 and 3 of 4096 x 11008, in 32 layers
    assert WEIGHTS["language_model"][1] == 32 * 128 * (4 * 8192 + 3 * (4096 + 11008))
    assert WEIGHTS["vision_tower"][1] == 23 * 32 * (4 * 2048 + 2 * (1024 + 4096))


def test_llama_layer_keeps_by_hand():
    # q, k, v, attention's output (4096 each), gate, its activation, up (11008 each); both norms' input in float32
    insides = 2 * (4 * 4096 + 3 * 11008) + 2 * 4 * 4096
    assert LANGUAGE.activations(2, "frozen") == insides
    # what enters q, k, v, o, gate, up (4096 each) and down, in 16 bits, and a byte of dropout's mask
    assert LANGUAGE.activations(2, "lora") == insides + 3 * (6 * 4096 + 11008)
    # what enters q, k, v, gate, up and down, and the normalised state in float32
    assert LANGUAGE.activations(2, "full") == insides + 2 * (5 * 4096 + 11008) + 2 * 4 * 4096


@pytest.mark.parametrize("train", ["frozen", "lora", "full"])
def test_what_a_layer_keeps_is_what_autograd_keeps(train):
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.autograd.graph import saved_tensors_hooks
    from transformers import LlamaConfig, LlamaForCausalLM

    stack, tokens = Stack(1, 128, 344, 128, True), 256

    def kept(layers: int) -> int:
        network = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=stack.hidden,
                intermediate_size=stack.intermediate,
                num_hidden_layers=layers,
                num_attention_heads=2,
                vocab_size=16,
                attn_implementation="sdpa",
            )
        )
        if train != "full":
            network = network.to(torch.bfloat16).requires_grad_(False)
        if train == "lora":  # rank 1, whose own activations are nothing beside the rest
            network = get_peft_model(network, LoraConfig(r=1, lora_dropout=0.0, target_modules="all-linear"))
            for parameter in network.parameters():
                parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
        embedded = network.get_input_embeddings()(torch.zeros(1, tokens, dtype=torch.long)).detach().requires_grad_()
        weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
        seen = {}

        def pack(tensor):
            if tensor.dim() > 2 or tensor.shape[0] == tokens:  # not a weight or its copy in bfloat16
                seen.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(pack, lambda tensor: tensor):
            network(inputs_embeds=embedded, use_cache=False)
        return sum(one.untyped_storage().nbytes() for at, one in seen.items() if at not in weights)

    found = (kept(4) - kept(1)) / 3 / tokens
    mask = (5 + stack.gated) * stack.hidden + stack.intermediate if train == "lora" else 0  # no dropout here
    assert stack.activations(2, train) - mask == pytest.approx(found, rel=0.05)


def test_fewer_key_value_heads_make_smaller_layers():
    mistral = Stack(layers=1, hidden=4096, intermediate=14336, key_value=1024, gated=True)
    assert mistral.matrix == 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336


def test_memory_of_the_7b_by_hand(recipe):
    one = memory(dataclasses.replace(recipe, micro_batch=1), WEIGHTS, CONFIG, tokens=1000)
    assert one.frozen == 2 * (6_738_415_616 + 303_507_456)
    assert one.trained == 16 * (319_815_680 + 24_128_514 + 13_565_952)
    assert one.trained == pytest.approx(5.7e9, rel=0.01)
    states = 1000 * 32 * 4096 * 2 + 577 * 23 * 1024 * 2  # each layer's input; 577 is the patches and CLS
    assert one.activations == states + 1000 * LANGUAGE.activations(2, "lora")
    assert one.copies == one.trained / 8
    assert one.head == 1000 * 4096 * 6 + 1000 * 32000 * 2
    assert one.total == one.frozen + one.trained + one.copies + one.activations + one.head


def test_activations_grow_with_the_conversations_computed_at_once(recipe):
    one, eight = (
        memory(dataclasses.replace(recipe, micro_batch=count), WEIGHTS, CONFIG, tokens=900) for count in (1, 8)
    )
    assert eight.activations == 8 * one.activations
    assert (eight.frozen, eight.trained) == (one.frozen, one.trained)


def test_without_checkpointing_every_layer_is_kept(recipe):
    plain = dataclasses.replace(recipe, micro_batch=1, gradient_checkpointing=False)
    layers = 32 * 900 * LANGUAGE.activations(2, "lora") + 23 * 577 * VISION.activations(2, "lora")
    assert memory(plain, WEIGHTS, CONFIG, tokens=900).activations == layers


def test_four_bits_hold_the_matrices_in_nf4_and_the_rest_in_float32():
    found = memory(read_recipe("stllava-med-7b-qlora"), WEIGHTS, CONFIG, tokens=2623)
    rest = 6_738_415_616 - 6_476_005_376 + 303_507_456
    assert found.frozen == 0.5625 * 6_476_005_376 + 4 * rest
    assert found.total < 24e9 * 0.8  # a card of 24 GB, with room for what is left out


def test_the_whole_language_model_needs_108_gb_of_trained_weights():
    recipe = read_recipe("llava-med-curriculum", stage="instruct")
    weights = {
        "language_model": (6_738_415_616,) * 2,
        "projector": (20_979_712,) * 2,  # mlp2x_gelu
        "vision_tower": (303_507_456, 0),
    }
    found = memory(recipe, weights, CONFIG, tokens=2048)
    assert found.trained == pytest.approx(108.2e9, rel=1e-3)
    assert found.frozen == 2 * 303_507_456


def test_operations_of_the_three_ways_to_train(recipe):
    config = StllavaMedConfig(image_seq_length=576)
    spoken = 6_476_005_376 + 32000 * 4096
    frozen, plain = Part("frozen"), dataclasses.replace(recipe, gradient_checkpointing=False)
    full = dataclasses.replace(plain, language_model=Part("full", 1e-5), vision_tower=frozen)
    image = 576 * (6 * 24_128_514 + 2 * 23 * VISION.matrix)
    whole = WEIGHTS | {"language_model": (6_738_415_616,) * 2}
    assert operations(full, whole, config, 1000) == 1000 * 6 * spoken + image

    lora = dataclasses.replace(plain, vision_tower=frozen)
    assert operations(lora, WEIGHTS, config, 1000) == 1000 * (4 * spoken + 6 * 319_815_680) + image
    again = dataclasses.replace(lora, gradient_checkpointing=True)
    assert operations(again, WEIGHTS, config, 1000) == 1000 * (6 * spoken + 8 * 319_815_680) + image

    aligned = dataclasses.replace(plain, language_model=frozen, vision_tower=frozen)
    nothing = WEIGHTS | {"language_model": (6_738_415_616, 0)}
    assert operations(aligned, nothing, config, 1000) == 1000 * 4 * spoken + image  # through it, to the projector


def test_hours_are_operations_over_what_the_devices_reach():
    assert hours(4 * 312e12 * 0.4 * 3600, devices=4) == pytest.approx(1)
    assert hours(3.6e15, devices=1, peak=1e12, share=0.5) == pytest.approx(2)


def test_the_papers_epoch_is_under_an_hour_of_four_a100(recipe):
    """docs/train/memory.md sets this beside the paper's 10 h."""
    assert hours(37_452 * operations(recipe, WEIGHTS, CONFIG, tokens=900), devices=4) == pytest.approx(0.82, abs=0.01)


def billions(found: float) -> str:
    return f"{found / 1e9:.1f}"


def test_the_table_of_the_documentation_is_this_arithmetic():
    text = (ROOT / "docs" / "train" / "memory.md").read_text()
    rows = dict(re.findall(r"^\| `([\w -]+)` \| (\d+ \|(?: [\d.]+ \|)+)$", text, re.MULTILINE))
    assert {name.split()[0] for name in rows} == set(recipe_names()) - {"tiny"}
    for name, cells in rows.items():
        recipe = read_recipe(name.split()[0], stage=name.partition(" ")[2] or None)
        held = {part: every for part, (every, _) in WEIGHTS.items()}
        if "llava-med-curriculum" in name:
            held["projector"] = 20_979_712  # mlp2x_gelu
        weights = {
            part: (held[part], {"frozen": 0, "lora": WEIGHTS[part][1], "full": held[part]}[how.train])
            for part, how in recipe.parts().items()
        }
        usual = memory(recipe, weights, CONFIG, 900)
        most = memory(recipe, weights, CONFIG, recipe.max_tokens)
        kinds = (usual.frozen, usual.trained, usual.copies, usual.activations, usual.head, usual.total, most.total)
        assert cells.split(" | ")[1:] == [*map(billions, kinds[:-1]), billions(kinds[-1]) + " |"], name
