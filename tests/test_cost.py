"""The arithmetic of memory and time, against numbers worked out by hand."""

import dataclasses

import pytest

from stllava_eval.network.configuration import StllavaMedConfig
from stllava_train.cost import Stack, hours, memory, operations, stacks
from stllava_train.recipe import Part, Recipe, read_recipe

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
def recipe() -> Recipe:
    return read_recipe("stllava-med-7b")


def test_the_stacks_are_vicuna_7b_and_the_23_layers_of_clip_that_are_read():
    assert stacks(CONFIG) == (LANGUAGE, VISION)
    # 32 x (4 x 4096 x 4096 + 3 x 4096 x 11008); less embedding, head and norms of 6.738 billion
    assert LANGUAGE.layers * LANGUAGE.matrix == 6_476_005_376
    assert VISION.matrix == 4 * 1024**2 + 2 * 1024 * 4096


def test_weights_of_the_parts_are_those_of_the_network(recipe):
    from accelerate import init_empty_weights

    from stllava_eval.network import StllavaMedForConditionalGeneration

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


def test_gpt_layer_without_dropout_and_scores_keeps_32_bytes_where_korthikanti_count_34():
    gpt = Stack(layers=1, hidden=10, intermediate=40, key_value=10, gated=False)
    assert gpt.activations(width=2, lora=False) == 32 * 10  # theirs has two masks of dropout of 1 byte more


def test_llama_layer_keeps_8_widths_of_the_hidden_state_and_4_of_the_mlp():
    assert LANGUAGE.activations(2, lora=False) == 2 * (8 * 4096 + 4 * 11008)
    # and 3 bytes of what enters q, k, v, o, gate, up (4096 each) and down
    assert LANGUAGE.activations(2, lora=True) == 2 * (8 * 4096 + 4 * 11008) + 3 * (6 * 4096 + 11008)


def test_fewer_key_value_heads_make_smaller_layers():
    mistral = Stack(layers=1, hidden=4096, intermediate=14336, key_value=1024, gated=True)
    assert mistral.matrix == 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336


def test_memory_of_the_7b_by_hand(recipe):
    one = memory(dataclasses.replace(recipe, micro_batch=1), WEIGHTS, CONFIG, tokens=1000)
    assert one.frozen == 2 * (6_738_415_616 + 303_507_456)
    assert one.trained == 16 * (319_815_680 + 24_128_514 + 13_565_952)
    assert one.trained == pytest.approx(5.7e9, rel=0.01)
    states = 1000 * 32 * 4096 * 2 + 577 * 23 * 1024 * 2  # each layer's input; 577 is the patches and CLS
    assert one.activations == states + 1000 * LANGUAGE.activations(2, lora=True)
    assert one.head == 1000 * 4096 * 6 + 1000 * 32000 * 2
    assert one.total == one.frozen + one.trained + one.activations + one.head


def test_activations_grow_with_the_conversations_computed_at_once(recipe):
    one, eight = (
        memory(dataclasses.replace(recipe, micro_batch=count), WEIGHTS, CONFIG, tokens=900) for count in (1, 8)
    )
    assert eight.activations == 8 * one.activations
    assert (eight.frozen, eight.trained) == (one.frozen, one.trained)


def test_without_checkpointing_every_layer_is_kept(recipe):
    plain = dataclasses.replace(recipe, micro_batch=1, gradient_checkpointing=False)
    layers = 32 * 900 * LANGUAGE.activations(2, True) + 23 * 577 * VISION.activations(2, True)
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
    """docs/train.md sets this beside the paper's 10 h."""
    assert hours(37_452 * operations(recipe, WEIGHTS, CONFIG, tokens=900), devices=4) == pytest.approx(0.82, abs=0.01)
