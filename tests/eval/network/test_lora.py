"""Adapters as PEFT, LLaMA-Factory, ms-swift and unsloth leave them: what is merged has PEFT's logits, or is refused."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from rounding import assert_same
from safetensors.torch import load_file, save_file
from torch import Tensor

from stllava_eval.errors import InputError
from stllava_eval.network.checkpoint import open_checkpoint
from stllava_eval.network.layouts import CheckpointError

LIST = ["q_proj", "v_proj", "fc1"]
# what LLaMA-Factory, ms-swift and unsloth write, each in the names of the transformers that it ran on
REGEX = r"^(?!.*multi_modal_projector).*(?:q_proj|v_proj|fc1)"
SWIFT = r"^(language_model|model\.language_model)(?=\.).*\.(q_proj|down_proj)$"
UNSLOTH = r"(?:.*?(?:vision|image).*?(?:self_attn|mlp).*?(?:q_proj|fc1).*?)|(?:.*?(?:language).*?(?:k_proj|up_proj).*?)"
PROJECTOR = ["linear_1", "linear_2"]
OF_TOWER = r".*vision_tower\.(?:.*\.)?encoder\.layers\.\d+\.mlp\.fc[12]"


def logits(model) -> Tensor:
    """(1, 8, rows) logits of one fixed prompt about one fixed image."""
    torch.manual_seed(9)
    pixels = torch.randn(1, 3, 28, 28)
    with torch.inference_mode():
        return model(input_ids=torch.tensor([[1, 5, 3, 3, 3, 3, 7, 8]]), pixel_values=pixels).logits


def base_model(checkpoint: Path):
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(checkpoint)


def write_adapter(checkpoint: Path, folder: Path, **settings) -> Tensor:
    """A LoRA of `checkpoint` with random weights, as PEFT saves it; the logits of the network with it, unmerged."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, that it saves the vocabulary's layers as well
        adapted = get_peft_model(base_model(checkpoint), LoraConfig(**{"r": 4, "lora_alpha": 8} | settings))
        torch.manual_seed(6)
        with torch.no_grad():
            for weight in adapted.parameters():
                if weight.requires_grad:
                    weight.add_(0.1 * torch.randn_like(weight))
        adapted.save_pretrained(folder)
    change_settings(folder, target_modules=settings["target_modules"])  # PEFT writes names in the place of a word
    return logits(adapted.eval())


def peft_logits(checkpoint: Path, folder: Path) -> Tensor:
    """Of the network with the adapter in `folder`, as PEFT itself loads it."""
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(base_model(checkpoint), folder).eval())


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "adapter_model.safetensors")


def change_settings(folder: Path, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def as_of_4_52(key: str) -> str:
    return key.replace("model.vision_tower.", "model.vision_tower.vision_model.")


def as_before_4_52(key: str) -> str:
    for pattern, written in (
        (r"model\.model\.language_model\.", "model.language_model.model."),
        (r"model\.lm_head", "model.language_model.lm_head"),
        (r"model\.model\.vision_tower\.", "model.vision_tower.vision_model."),
        (r"model\.model\.multi_modal_projector", "model.multi_modal_projector"),
    ):
        key = re.sub(rf"^base_model\.{pattern}", f"base_model.{written}", key)
    return key


WRITTEN = {"5": str, "4.52": as_of_4_52, "before 4.52": as_before_4_52}


def rewrite(folder: Path, of: str) -> None:
    """The adapter in `folder` with the names of an older transformers."""
    write_tensors(folder, {WRITTEN[of](key): value for key, value in tensors_of(folder).items()})


# --- the same logits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", WRITTEN)
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"target_modules": LIST}, id="a list"),
        pytest.param({"target_modules": REGEX}, id="LLaMA-Factory"),
        pytest.param({"target_modules": SWIFT}, id="ms-swift"),
        pytest.param({"target_modules": UNSLOTH}, id="unsloth"),
        pytest.param({"target_modules": OF_TOWER}, id="the tower alone"),
        pytest.param({"target_modules": "all-linear"}, id="every linear layer"),
        pytest.param({"target_modules": PROJECTOR}, id="the projector alone"),
        pytest.param({"target_modules": LIST, "use_rslora": True, "rank_pattern": {"fc1": 2}}, id="rsLoRA"),
        pytest.param({"target_modules": ["q_proj"], "alpha_pattern": {"layers.1.self_attn.q_proj": 3}}, id="alpha"),
        pytest.param({"target_modules": LIST, "layers_to_transform": [1], "layers_pattern": "layers"}, id="one layer"),
        pytest.param({"target_modules": LIST, "exclude_modules": r".*vision.*"}, id="excluded"),
    ],
)
def test_an_adapter_of_any_transformers_has_the_logits_that_peft_gives_it(checkpoint, tmp_path, settings, of):
    wanted = write_adapter(checkpoint, tmp_path / "lora", **settings)
    rewrite(tmp_path / "lora", of)
    if of == "5" or settings["target_modules"] not in ("all-linear", PROJECTOR):  # PEFT loses an older projector
        assert_same(peft_logits(checkpoint, tmp_path / "lora"), wanted)
    assert_same(logits(open_checkpoint(str(tmp_path / "lora")).model()), wanted)
    assert not logits(open_checkpoint(str(checkpoint)).model()).allclose(wanted, atol=1e-2)


@pytest.mark.parametrize("of", WRITTEN)
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["q_proj", "lm_head", "embed_tokens"]])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_of_head_and_embedding_is_merged(checkpoint, tmp_path, targets, rslora, of):
    wanted = write_adapter(checkpoint, tmp_path / "lora", target_modules=targets, use_rslora=rslora)
    assert_same(peft_logits(checkpoint, tmp_path / "lora"), wanted)
    rewrite(tmp_path / "lora", of)
    assert_same(logits(open_checkpoint(str(tmp_path / "lora")).model()), wanted)


@pytest.mark.parametrize(
    ("of", "pattern", "ours"),
    [
        (
            "before 4.52",
            r"^language_model\.model\.layers\.\d\.mlp\.up_proj",
            r".*language_model\.layers\.\d\.mlp\.up_proj",
        ),
        ("before 4.52", r"vision_tower\.vision_model\..*\.fc1", r".*vision_tower\..*\.fc1"),
        ("before 4.52", r"language_model\.lm_head", "lm_head"),
        ("4.52", r"model\.vision_tower\.vision_model\.encoder\..*\.fc1", r".*vision_tower\..*\.fc1"),
    ],
)
def test_a_pattern_is_of_the_names_in_the_file(checkpoint, tmp_path, of, pattern, ours):
    """PEFT with the transformers of today looks for such names in vain; lost layers are missed under them as well."""
    wanted = write_adapter(checkpoint, tmp_path / "lora", target_modules=ours)
    rewrite(tmp_path / "lora", of)
    change_settings(tmp_path / "lora", target_modules=pattern)
    assert_same(logits(open_checkpoint(str(tmp_path / "lora")).model()), wanted)
    tensors = tensors_of(tmp_path / "lora")
    tensors.pop(sorted(tensors)[-1])
    write_tensors(tmp_path / "lora", tensors)
    with pytest.raises(CheckpointError, match="1 targeted by"):
        open_checkpoint(str(tmp_path / "lora"))


def test_a_lora_of_the_network_without_its_head_is_read(checkpoint, tmp_path):
    """As PEFT leaves it of `AutoModel`, which is LlavaModel."""
    wanted = write_adapter(checkpoint, tmp_path / "lora", target_modules=["q_proj", "embed_tokens"])
    tensors = tensors_of(tmp_path / "lora")
    write_tensors(tmp_path / "lora", {key.replace("model.model.", "model.", 1): one for key, one in tensors.items()})
    assert any(key.startswith("base_model.model.language_model.layers.") for key in tensors_of(tmp_path / "lora"))
    assert_same(logits(open_checkpoint(str(tmp_path / "lora")).model()), wanted)


@pytest.mark.parametrize("of", WRITTEN)
def test_a_projector_saved_whole_is_read_under_every_name(checkpoint, tmp_path, of):
    whole = {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]}
    wanted = write_adapter(checkpoint, tmp_path / "lora", **whole)
    rewrite(tmp_path / "lora", of)
    assert_same(logits(open_checkpoint(str(tmp_path / "lora")).model()), wanted)


@pytest.mark.parametrize("of", WRITTEN)
@pytest.mark.parametrize("name", ["non_lora_trainables.bin", "non_lora_state_dict.bin"])
def test_a_projector_beside_the_adapter_is_read(checkpoint, tmp_path, name, of):
    """LLaVA's trainer writes what was trained whole into a file of its own, and so do those made after it."""
    whole = {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]}
    wanted = write_adapter(checkpoint, tmp_path / "lora", **whole)
    rewrite(tmp_path / "lora", of)
    tensors = tensors_of(tmp_path / "lora")
    write_tensors(tmp_path / "lora", {key: value for key, value in tensors.items() if ".lora_" in key})
    change_settings(tmp_path / "lora", modules_to_save=None)
    apart = {key: value for key, value in tensors.items() if ".lora_" not in key}
    torch.save(apart, tmp_path / "lora" / name)
    assert_same(logits(open_checkpoint(str(tmp_path / "lora")).model()), wanted)
    torch.save(dict(list(apart.items())[1:]), tmp_path / "lora" / name)
    with pytest.raises(CheckpointError, match=rf"1 missing.*{name}.*multi_modal_projector\.linear_1\.bias\b.*complete"):
        open_checkpoint(str(tmp_path / "lora"))


def test_a_lora_of_padded_rows_loses_the_rows_that_the_network_loses(checkpoint, tmp_path):
    """As of llava-1.5-7b-hf, whose vocabulary has 64 rows behind its tokenizer's."""
    from transformers import AutoTokenizer

    padded = tmp_path / "padded"
    model = base_model(checkpoint)
    model.resize_token_embeddings(model.lm_head.out_features + 64, mean_resizing=False)
    model.save_pretrained(padded)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(padded)
    wanted = write_adapter(padded, tmp_path / "lora", target_modules=["lm_head", "embed_tokens"])
    opened = open_checkpoint(str(tmp_path / "lora"))
    ours = logits(opened.model())
    assert_same(ours, wanted[..., : ours.shape[-1]])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param({"target_modules": ["q_proj"]}, {"target_modules": ["q_proj"]}, id="a LoRA on a LoRA"),
        pytest.param(
            {"target_modules": PROJECTOR},
            {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]},
            id="a whole projector on its LoRA",
        ),
        pytest.param(
            {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]},
            {"target_modules": PROJECTOR},
            id="a LoRA on a whole projector",
        ),
        pytest.param(
            {"target_modules": ["embed_tokens", "lm_head"]},
            {"target_modules": ["embed_tokens", "lm_head"]},
            id="vocabularies, which PEFT saves whole as well",
        ),
    ],
)
def test_an_adapter_on_an_adapter_has_the_logits_of_the_two_merged_by_peft(checkpoint, tmp_path, first, second):
    """What a later stage saved whole has the earlier one's update in it."""
    from peft import PeftModel

    write_adapter(checkpoint, tmp_path / "first", **first)
    between = PeftModel.from_pretrained(base_model(checkpoint), tmp_path / "first").merge_and_unload()
    between.save_pretrained(tmp_path / "between")
    wanted = write_adapter(tmp_path / "between", tmp_path / "second", **second)
    change_settings(tmp_path / "second", base_model_name_or_path=str(tmp_path / "first"))
    assert_same(logits(open_checkpoint(str(tmp_path / "second")).model()), wanted)


def test_the_adapter_that_a_run_resumes_from_is_on_what_the_run_started_from(checkpoint, tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    wanted = write_adapter(checkpoint, folder, target_modules=LIST)
    change_settings(folder, base_model_name_or_path=None)
    start = {"name": str(checkpoint), "sha256": "a", "weights_sha256": open_checkpoint(str(checkpoint)).weights_sha256}
    (tmp_path / "run" / "run.json").write_text(json.dumps({"start": start}))
    assert_same(logits(open_checkpoint(str(folder)).model()), wanted)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"start": start | {"weights_sha256": "b"}}))
    with pytest.raises(InputError, match=r"trained on.*other weights.*back"):
        open_checkpoint(str(folder))


def test_a_base_on_the_hub_is_of_the_revision_that_the_adapter_names(checkpoint, tmp_path, monkeypatch):
    def snapshot_download(name, revision=None, **_):
        assert (name, revision) == ("them/their-model", "v1.2")
        return str(checkpoint)

    wanted = write_adapter(checkpoint, tmp_path / "lora", target_modules=LIST)
    change_settings(tmp_path / "lora", base_model_name_or_path="them/their-model", revision="v1.2")
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert_same(logits(open_checkpoint(str(tmp_path / "lora")).model()), wanted)


def test_what_peft_takes_no_notice_of_is_no_reason_to_refuse(checkpoint, tmp_path):
    wanted = write_adapter(checkpoint, tmp_path / "lora", target_modules=LIST)
    change_settings(tmp_path / "lora", fan_in_fan_out=True)
    assert_same(logits(open_checkpoint(str(tmp_path / "lora")).model()), wanted)


# --- what is lost is missed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lost", "of"),
    [("A", "5"), ("B", "5"), ("layer", "4.52"), *((lost, of) for lost in ("pair", "tower") for of in WRITTEN)],
)
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"target_modules": [*LIST, "lm_head"]}, id="a list"),
        pytest.param({"target_modules": REGEX}, id="a pattern"),
        pytest.param({"target_modules": "all-linear"}, id="every linear layer"),
        pytest.param(
            {"target_modules": LIST, "exclude_modules": ["k_proj"], "rank_pattern": {"fc1": 2}}, id="excluded"
        ),
        pytest.param({"target_modules": LIST, "layers_to_transform": [0, 1], "layers_pattern": "layers"}, id="layers"),
        pytest.param({"target_modules": LIST, "modules_to_save": ["multi_modal_projector"]}, id="saved whole"),
    ],
)
def test_a_layer_that_is_targeted_and_not_in_the_file_is_missed(checkpoint, tmp_path, settings, lost, of):
    write_adapter(checkpoint, tmp_path / "lora", **settings)
    rewrite(tmp_path / "lora", of)
    pattern = {
        "pair": r"language_model\..*layers\.1\.self_attn\.q_proj\.lora_",
        "A": r"language_model\..*layers\.1\.self_attn\.q_proj\.lora_A",
        "B": r"language_model\..*layers\.1\.self_attn\.q_proj\.lora_B",
        "tower": r"vision_tower\..*lora_",
        "layer": r"layers\.1\..*lora_",
    }[lost]
    left = {key: value for key, value in tensors_of(tmp_path / "lora").items() if not re.search(pattern, key)}
    assert len(left) < len(tensors_of(tmp_path / "lora"))
    write_tensors(tmp_path / "lora", left)
    with pytest.raises(
        CheckpointError,
        match=r"adapter_config\.json.*without lora_A and lora_B.*layers\.\d\..*complete",
    ) as error:
        open_checkpoint(str(tmp_path / "lora"))
    assert "\n" not in str(error.value)
    layer = "encoder.layers.0.mlp.fc1" if lost == "tower" else "layers.1.self_attn.q_proj"
    assert any(layer in name for name in error.value.report["lacking"])


def test_a_lost_pair_of_the_embedding_is_missed_though_its_own_weight_is_there(checkpoint, tmp_path):
    write_adapter(checkpoint, tmp_path / "lora", target_modules=["embed_tokens", "q_proj"])
    left = {key: value for key, value in tensors_of(tmp_path / "lora").items() if "lora_embedding" not in key}
    assert any("embed_tokens.base_layer" in key for key in left)
    write_tensors(tmp_path / "lora", left)
    with pytest.raises(CheckpointError, match=r"without lora_A and lora_B.*embed_tokens\b.*complete"):
        open_checkpoint(str(tmp_path / "lora"))


@pytest.mark.parametrize("name", ["q_proj.weight", "o_proj.base_layer.weight"])
def test_a_whole_weight_that_peft_would_pass_over_is_left_over(checkpoint, tmp_path, name):
    """That of a layer with a LoRA is its base_layer's, and of one without it is not."""
    write_adapter(checkpoint, tmp_path / "lora", target_modules=["q_proj"])
    key = f"base_model.model.model.language_model.layers.0.self_attn.{name}"
    write_tensors(tmp_path / "lora", tensors_of(tmp_path / "lora") | {key: torch.ones(64, 64)})
    with pytest.raises(CheckpointError, match=rf"1 left over.*{re.escape(name)}\b.*complete"):
        open_checkpoint(str(tmp_path / "lora"))


def test_a_layer_that_is_not_targeted_is_left_over_as_peft_leaves_it_out(checkpoint, tmp_path):
    write_adapter(checkpoint, tmp_path / "lora", target_modules=LIST)
    change_settings(tmp_path / "lora", target_modules=["q_proj", "fc1"])
    with pytest.raises(CheckpointError, match=r"left over .*v_proj"):
        open_checkpoint(str(tmp_path / "lora"))


@pytest.mark.parametrize("of", WRITTEN)
def test_a_tensor_of_a_module_saved_whole_is_missed(checkpoint, tmp_path, of):
    whole = {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]}
    write_adapter(checkpoint, tmp_path / "lora", **whole)
    rewrite(tmp_path / "lora", of)
    left = {key: value for key, value in tensors_of(tmp_path / "lora").items() if "linear_2.bias" not in key}
    write_tensors(tmp_path / "lora", left)
    with pytest.raises(InputError, match=r"modules_to_save.*lacks.*multi_modal_projector\.linear_2\.bias\b.*Copy"):
        open_checkpoint(str(tmp_path / "lora"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"target_modules": None}, "does not say which layers", id="no target"),
        pytest.param({"target_modules": []}, "does not say which layers", id="an empty list"),
        pytest.param({"target_modules": "(q_proj"}, "is not usable", id="no pattern"),
        pytest.param({"target_modules": 5}, "is not usable", id="a number"),
        pytest.param({"exclude_modules": 5}, "is not usable", id="a number to exclude"),
        pytest.param({"target_modules": "no_such_layer"}, "left over", id="none of the network"),
        pytest.param({"use_dora": True}, "merge_and_unload", id="DoRA"),
        pytest.param({"lora_bias": True}, "merge_and_unload", id="a bias"),
        pytest.param({"bias": "lora_only"}, "merge_and_unload", id="the base's bias"),
        pytest.param({"init_lora_weights": "pissa_niter_4"}, "merge_and_unload", id="PiSSA"),
        pytest.param({"init_lora_weights": "olora"}, "merge_and_unload", id="OLoRA"),
        pytest.param({"trainable_token_indices": [5]}, "merge_and_unload", id="tokens"),
        pytest.param({"target_parameters": ["mlp.gate"]}, "merge_and_unload", id="parameters"),
        pytest.param({"layer_replication": [[0, 2], [1, 2]]}, "merge_and_unload", id="layers that come twice"),
        pytest.param({"ensure_weight_tying": True}, "merge_and_unload", id="tied"),
    ],
)
def test_a_configuration_that_does_not_fit_its_file_is_one_line(checkpoint, tmp_path, changes, message):
    write_adapter(checkpoint, tmp_path / "lora", target_modules=LIST)
    change_settings(tmp_path / "lora", **changes)
    with pytest.raises(InputError, match=message) as error:
        open_checkpoint(str(tmp_path / "lora"))
    assert "\n" not in str(error.value)


def tied(checkpoint: Path, folder: Path) -> Path:
    """The network of `checkpoint` with one weight for embedding and head."""
    from transformers import AutoTokenizer

    model = base_model(checkpoint)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
)
def test_one_of_two_tied_weights_is_not_changed_alone(checkpoint, tmp_path, settings):
    base = tied(checkpoint, tmp_path / "tied")
    assert open_checkpoint(str(base)).config.tie_word_embeddings
    write_adapter(base, tmp_path / "lora", **settings)
    with pytest.raises(
        InputError, match=r"(lm_head|embed_tokens)\.weight\b.*config\.json ties.*tie_word_embeddings.*untied"
    ):
        open_checkpoint(str(tmp_path / "lora"))


def test_layers_beside_tied_weights_are_merged(checkpoint, tmp_path):
    base = tied(checkpoint, tmp_path / "tied")
    wanted = write_adapter(base, tmp_path / "lora", target_modules=LIST)
    assert_same(logits(open_checkpoint(str(tmp_path / "lora")).model()), wanted)


def test_an_adapter_of_another_network_is_refused(checkpoint, tmp_path):
    write_adapter(checkpoint, tmp_path / "lora", target_modules=["q_proj"])
    deeper = {key.replace(".layers.1.", ".layers.2."): value for key, value in tensors_of(tmp_path / "lora").items()}
    write_tensors(tmp_path / "lora", tensors_of(tmp_path / "lora") | deeper)
    with pytest.raises(CheckpointError, match="left over"):
        open_checkpoint(str(tmp_path / "lora"))
