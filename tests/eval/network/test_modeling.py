import json
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from author_layouts import make
from conftest import ROOT
from PIL import Image
from rounding import FLOAT32, assert_same
from torch import nn

from stllava_eval.network.configuration import StllavaMedConfig
from stllava_eval.network.modeling import PrototypeExtractor, StllavaMedForConditionalGeneration
from stllava_eval.network.processing import make_processor


def config(**options) -> StllavaMedConfig:
    return make(**options).config


network = make  # the small network of tests/author_layouts.py, with the weights of seed 0


# --- the golden values of the authors' modules ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_folder(shared):
    return shared / "golden"


PROJECTORS = (
    "ratio_L36_N16_B3_fp32",
    "real_counts_C64_N256_L576_fp64",  # its float32 twin has exact ties: golden/README.md
    "small_default_init_fp32",
    "small_default_init_fp64",
    "small_negative_alpha_fp32",
    "small_perturbed_fp32",
    "uneven_pool_L100_N16_fp64",
)


@pytest.mark.parametrize("name", PROJECTORS)
def test_the_prototype_extractor_is_the_authors(golden_folder, name):
    worst = golden.projector(golden_folder / "a_projector" / f"{name}.safetensors")
    assert max(worst.values()) <= (1e-13 if name.endswith("64") else FLOAT32), worst  # as many roundings of a float64


@pytest.mark.parametrize("variant", ["cluster", "mlp2x_gelu"])
def test_the_whole_network_is_the_authors(golden_folder, tmp_path, variant):
    worst = golden.tiny_model(golden_folder, variant, tmp_path / variant)
    assert worst.pop("compared gradients") > 5
    assert worst.pop("greedy ids that differ") == 0
    assert max(worst.values()) <= FLOAT32, worst


# --- the equations, whether the golden values are here or not ---------------------------------------------------------


def by_the_equations(layer: PrototypeExtractor, x: np.ndarray) -> np.ndarray:
    """Section 1.2 of the reference text original.md, one token at a time, in float64."""

    def linear(part, rows):
        return rows @ part.weight.detach().double().numpy().T + part.bias.detach().double().numpy()

    def unit(row):
        return row / max(np.linalg.norm(row), 1e-12)

    length, count = len(x), layer.num_prototypes
    features, values = linear(layer.feature, x), linear(layer.value, x)
    values = np.stack([unit(channel) for channel in values.T], axis=1)
    windows = [(n * length // count, -(-(n + 1) * length // count)) for n in range(count)]
    centers = np.stack([x[start:end].mean(0) for start, end in windows])
    pooled = np.stack([features[start:end].mean(0) for start, end in windows])
    for _ in range(layer.iterations):
        centers = np.stack([unit(center) for center in linear(layer.center, centers)])
        scores = np.exp(centers @ values.T)
        centers = (scores / scores.sum(0)) @ features
    cosine = np.array([[unit(center) @ unit(token) for token in x] for center in centers])
    similarity = 1 / (1 + np.exp(-(layer.similarity_shift.item() + layer.similarity_scale.item() * cosine)))
    chosen = similarity.argmax(0)
    out = np.empty_like(x)
    for token in range(length):
        members = [other for other in range(length) if chosen[other] == chosen[token]]
        given = sum(similarity[chosen[token], other] * features[other] for other in members)
        prototype = (given + pooled[chosen[token]]) / (len(members) + 1)
        out[token] = x[token] + similarity[chosen[token], token] * prototype
    return out


@pytest.mark.parametrize(
    ("tokens", "prototypes", "iterations", "scale"),
    [
        pytest.param(12, 4, 2, 1.0, id="windows of three"),
        pytest.param(11, 4, 2, 1.7, id="windows that overlap"),
        pytest.param(9, 3, 1, 1.0, id="one iteration"),
        pytest.param(9, 3, 3, 1.0, id="three iterations"),
        pytest.param(10, 4, 2, -1.0, id="a negative scale takes the least similar"),
        pytest.param(4, 6, 2, 1.0, id="more prototypes than tokens"),
    ],
)
def test_the_prototype_extractor_follows_the_equations(tokens, prototypes, iterations, scale):
    torch.manual_seed(tokens)
    layer = PrototypeExtractor(8, prototypes, iterations).double()
    with torch.no_grad():
        layer.similarity_scale.fill_(scale)
        layer.similarity_shift.fill_(-0.3)
    x = torch.randn(2, tokens, 8, dtype=torch.float64)
    expected = np.stack([by_the_equations(layer, image) for image in x.numpy()])
    assert_same(layer(x), torch.from_numpy(expected), 1e-13)


def test_its_gradients_are_those_of_finite_differences():
    torch.manual_seed(1)
    layer = PrototypeExtractor(4, 2, 2).double()
    x = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    (layer(x) ** 2).sum().backward()
    for name, parameter in layer.named_parameters():
        place = tuple(0 for _ in parameter.shape)
        with torch.no_grad():
            losses = []
            for step in (1e-6, -1e-6):
                parameter[place] += step
                losses.append((layer(x) ** 2).sum().item())
                parameter[place] -= step
        assert parameter.grad[place].item() == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-4, abs=1e-6), name


def test_an_image_does_not_depend_on_its_neighbours_in_the_batch():
    torch.manual_seed(2)
    layer = PrototypeExtractor(8, 3, 2).double()
    x = torch.randn(3, 9, 8, dtype=torch.float64)
    assert_same(layer(x)[1], layer(x[1:2])[0], 1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_tokens_are_clustered_in_float32(dtype):
    torch.manual_seed(3)
    layer = PrototypeExtractor(32, 8, 2)
    x = torch.randn(1, 36, 32).to(dtype)
    assert layer(x).equal(layer(x.float()).to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).equal(layer(x.float()).to(dtype))
    theirs = PrototypeExtractor(32, 8, 2, in_float32=False).to(dtype)
    theirs.load_state_dict(layer.state_dict())
    assert theirs(x).dtype == dtype
    assert not theirs(x).equal(layer(x))


def test_an_adapter_inside_the_extractor_is_never_passed_over():
    """In 16 bits its forward could not be kept: an error, not the weights without it."""
    from peft import LoraConfig, get_peft_model

    layer = PrototypeExtractor(8, 3, 2)
    adapted = get_peft_model(layer, LoraConfig(r=2, target_modules=["center"], init_lora_weights=False))
    x = torch.randn(1, 9, 8)
    with adapted.disable_adapter():
        without = adapted(x)
    assert not adapted(x).equal(without)
    with pytest.raises(ValueError, match="Leave `prototypes` out of target_modules"):
        adapted.bfloat16()(x.bfloat16())


# --- the network as transformers knows it -----------------------------------------------------------------------------


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor([[1, 5, *[60] * 4, *row] for row in rows])


@pytest.mark.parametrize("projector", ["prototype", "mlp2x_gelu"])
def test_saved_and_loaded_by_the_auto_classes_it_is_the_same_network(tmp_path, projector):
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

    model = network(projector_type=projector)
    model.save_pretrained(tmp_path)
    loaded, loading = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    saved = AutoConfig.from_pretrained(tmp_path)
    assert (saved.projector_type, saved.num_prototypes, saved.image_token_id) == (projector, 3, 60)
    inputs = {"input_ids": ids([7, 8]), "pixel_values": torch.randn(1, 3, 28, 28)}
    with torch.inference_mode():
        assert loaded(**inputs).logits.equal(model(**inputs).logits)
        backbone = AutoModel.from_pretrained(tmp_path)
        assert backbone(**inputs).last_hidden_state.equal(model.model(**inputs).last_hidden_state)


def test_loaded_in_sixteen_bits_it_answers_and_clusters_in_float32(tmp_path):
    network().save_pretrained(tmp_path)
    loaded = StllavaMedForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}
    logits = loaded(input_ids=ids([7]), pixel_values=torch.randn(1, 3, 28, 28).bfloat16()).logits
    assert logits.dtype == torch.bfloat16
    layer, x = loaded.model.multi_modal_projector.prototypes, torch.randn(1, 4, 32).bfloat16()
    wide = PrototypeExtractor(32, 3, 2)
    wide.load_state_dict(layer.state_dict())
    assert layer(x).equal(wide(x.float()).bfloat16())


def test_the_image_token_has_no_row_and_is_never_generated():
    model = network()
    assert (
        model.lm_head.out_features == model.get_input_embeddings().num_embeddings == model.config.image_token_id == 60
    )
    out = model.generate(input_ids=ids([7]), pixel_values=torch.randn(1, 3, 28, 28), max_new_tokens=30, do_sample=False)
    assert out[0, 7:].max() < 60


def test_generation_with_a_cache_is_that_without(monkeypatch):
    model = network()
    inputs = {"input_ids": ids([7, 8], [9, 10]), "pixel_values": torch.randn(2, 3, 28, 28)}
    with_cache, without = (
        model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=cache) for cache in (True, False)
    )
    assert with_cache.equal(without)
    assert not with_cache[0, 8:].equal(with_cache[1, 8:])


def test_images_that_are_encoded_once_give_the_logits_of_pixels():
    model, pixels = network(), torch.randn(1, 3, 28, 28)
    encoded = model.get_image_features(pixel_values=pixels, return_dict=True)
    once = model(input_ids=ids([7]), mm_encoder_outputs={"image": encoded})
    assert_same(once.logits, model(input_ids=ids([7]), pixel_values=pixels).logits)
    held = once.image_outputs.pooler_output if hasattr(once, "image_outputs") else [once.image_hidden_states]
    assert torch.cat(list(held)).equal(torch.cat(list(encoded.pooler_output)))
    with pytest.raises(ValueError, match="Pass one of them"):
        model(input_ids=ids([7]), pixel_values=pixels, mm_encoder_outputs={"image": encoded})


def test_as_many_image_tokens_as_vectors_or_nothing():
    with pytest.raises(ValueError, match="do not match"):
        network()(input_ids=torch.tensor([[1, 60, 60, 7]]), pixel_values=torch.randn(1, 3, 28, 28))


def test_every_parameter_that_takes_part_has_a_gradient():
    model = network()
    model.train()
    labels = ids([7, 8]).masked_fill(ids([7, 8]) == 60, -100)
    model(input_ids=ids([7, 8]), pixel_values=torch.randn(1, 3, 28, 28), labels=labels).loss.backward()
    without = {name for name, weight in model.named_parameters() if weight.grad is None}
    last = "model.vision_tower.encoder.layers.2."  # the features are those before it
    assert without
    assert all(name.startswith(last) or "post_layernorm" in name for name in without)


def test_gradient_checkpointing_changes_no_gradient():
    found = []
    for checkpointing in (False, True):
        model = network()
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(5)
        pixels = torch.randn(1, 3, 28, 28)
        model(input_ids=ids([7, 8]), pixel_values=pixels, labels=ids([7, 8]).clamp(max=59)).loss.backward()
        found.append(model.model.multi_modal_projector.prototypes.center.weight.grad)
    assert_same(*found)


def test_a_new_network_starts_as_the_authors_do():
    layer = network().model.multi_modal_projector.prototypes
    torch.manual_seed(0)
    assert layer.similarity_scale.item() == 1
    assert layer.similarity_shift.item() == 0
    assert layer.center.weight.abs().max() <= 32**-0.5
    assert layer.center.weight.std().item() == pytest.approx(32**-0.5 / 3**0.5, rel=0.1)  # uniform, as nn.Linear's own
    assert not isinstance(layer.center, nn.Identity)


def test_the_pipeline_answers_about_an_image(tmp_path, llama_tokenizer):
    from transformers import AutoProcessor, pipeline

    from stllava_eval.network.checkpoint import open_checkpoint

    folder = write_network(tmp_path / "network", llama_tokenizer)
    ask = pipeline("image-text-to-text", model=str(folder), device="cpu")
    content = [{"type": "image", "image": Image.new("RGB", (40, 30), "red")}, {"type": "text", "text": "Is it normal?"}]
    (answer,) = ask(text=[{"role": "user", "content": content}], max_new_tokens=5, return_full_text=False)
    processor, model = AutoProcessor.from_pretrained(folder), open_checkpoint(str(folder)).model()
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    new = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    assert answer["generated_text"] == processor.decode(new, skip_special_tokens=True)
    assert answer["generated_text"]


def write_network(folder, tokenizer_folder):
    from stllava_eval.network.processing import StllavaMedTokenizer, read_pieces

    tokenizer = StllavaMedTokenizer.from_pieces(*read_pieces(tokenizer_folder))
    shape = config(image_token_index=32000)
    shape.text_config.vocab_size = 32000
    torch.manual_seed(0)
    StllavaMedForConditionalGeneration(shape).save_pretrained(folder)
    make_processor(tokenizer, 28, 14).save_pretrained(folder)
    return folder


def test_push_to_hub_sends_weights_and_configuration(monkeypatch):
    import huggingface_hub

    sent = {}

    def create_repo(self, repo_id, **options):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id, operations, **options):
        sent[repo_id] = {one.path_in_repo: one.path_or_fileobj for one in operations}
        sent["config"] = json.loads(Path(sent[repo_id]["config.json"]).read_text())

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    network().push_to_hub("someone/a-network", token="none")
    assert {"config.json", "model.safetensors"} <= set(sent["someone/a-network"])
    assert sent["config"]["model_type"] == "stllava_med"
    assert sent["config"]["num_prototypes"] == 3


def test_the_example_of_the_documentation_runs(tmp_path, llama_tokenizer, monkeypatch):
    import re

    text = (ROOT / "docs" / "evaluate" / "checkpoints.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    folder = write_network(tmp_path / "network", llama_tokenizer)
    Image.new("L", (40, 30), 90).save(tmp_path / "scan.png")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace("checkpoints/stllava-med-7b", str(folder)), names)
    assert names["inputs"]["input_ids"].shape[0] == 1
