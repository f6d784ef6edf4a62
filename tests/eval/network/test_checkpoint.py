"""Every layout is written by hand from one small network; what comes back must be that network."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import golden
import pytest
import torch
from author_layouts import (
    CLIP,
    LLAMA,
    PATCHES,
    ROWS,
    lora,
    lora_file,
    make,
    only,
    original_names,
    without,
    write_flat_config,
    write_shards,
    write_tower,
)
from conftest import write_llama_tokenizer
from PIL import Image
from rounding import FLOAT32, assert_same
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MistralConfig

from stllava_eval.cli.main import main
from stllava_eval.errors import InputError
from stllava_eval.network.checkpoint import open_checkpoint
from stllava_eval.network.convert import convert
from stllava_eval.network.layouts import CheckpointError
from stllava_eval.network.modeling import StllavaMedForConditionalGeneration
from stllava_eval.network.processing import make_processor

FC1 = r"vision_tower\.vision_model\.encoder\.layers\.0\.mlp\.fc1"  # a pattern of target_modules


def logits(model, rows: int = ROWS) -> Tensor:
    """(1, 8, rows) logits of one fixed prompt about one fixed image."""
    torch.manual_seed(9)
    pixels = torch.randn(1, 3, 28, 28)
    ids = torch.tensor([[1, 5, *[model.config.image_token_id] * PATCHES, 7, 8]])
    with torch.inference_mode():
        return model(input_ids=ids, pixel_values=pixels).logits[..., :rows]


def assert_same_network(source, model, **options) -> None:
    """The network at `source` has the logits of `model`, read on the fly and converted."""
    checkpoint = open_checkpoint(str(source), **options)
    assert_same(logits(checkpoint.model()), logits(model))
    out = Path(source).with_name(f"{Path(source).name}-converted")
    convert(checkpoint, out, progress=False)
    again = open_checkpoint(str(out))
    assert again.layout == "stllava-med"
    assert again.config.num_prototypes == checkpoint.config.num_prototypes
    assert_same(logits(again.model()), logits(checkpoint.model()))
    theirs, loading = StllavaMedForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert logits(theirs.eval()).equal(logits(again.model()))
    assert json.loads((out / "audit.json").read_text())["source"] == str(source)
    shutil.rmtree(out)


@pytest.fixture
def full(tmp_path) -> tuple[Path, StllavaMedForConditionalGeneration]:
    """The authors' merged model: vision tower and projector in the weights."""
    model, folder = make(), tmp_path / "full"
    write_flat_config(folder, model)
    write_tower(folder / "vit", model)
    torch.save(original_names(model), folder / "pytorch_model.bin")
    return folder, model


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_every_golden_layout_has_the_authors_logits(shared):
    worst = golden.checkpoint_layouts(shared / "golden")
    assert {"full_merged", "lora_stage", "base_llm", "lora_stage, loss", "lora_stage, tower"} <= set(worst)
    assert max(worst.values()) <= FLOAT32, worst


def test_the_authors_full_model(full):
    folder, model = full
    assert_same_network(folder, model, prototypes=3)
    assert open_checkpoint(str(folder)).config.num_prototypes == 256  # what their code has


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_shards(tmp_path, suffix):
    model = make()
    write_flat_config(tmp_path / "sharded", model)
    write_tower(tmp_path / "sharded" / "vit", model)
    write_shards(tmp_path / "sharded", original_names(model), suffix)
    assert_same_network(tmp_path / "sharded", model, prototypes=3)


def test_safetensors_win_over_pickles(full):
    folder, model = full
    save_file({name: one.contiguous() for name, one in original_names(model).items()}, folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert_same_network(folder, model, prototypes=3)


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_three_parts(tmp_path, prefix):
    model = make()
    language = without(original_names(model), "mm_projector", "vision_tower")
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text(json.dumps(LLAMA | {"architectures": ["LlamaForCausalLM"]}))
    torch.save(language, tmp_path / "llm" / "pytorch_model.bin")
    torch.save(only(original_names(model), "mm_projector"), tmp_path / "mm_projector.bin")
    write_tower(tmp_path / "vit", model, prefix)
    parts = {"vision_tower": str(tmp_path / "vit"), "projector": str(tmp_path / "mm_projector.bin")}
    assert_same_network(tmp_path / "llm", model, prototypes=3, **parts)


def test_a_tower_of_its_own_wins_and_a_whole_clip_is_one(full, tmp_path):
    folder, model = full
    other = make()
    with torch.no_grad():
        for weight in other.model.vision_tower.parameters():
            weight.mul_(1.1)
    extra = {"text_model.final_layer_norm.bias": torch.ones(2), "logit_scale": torch.ones(())}
    write_tower(tmp_path / "clip", other, **extra)
    (tmp_path / "clip" / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": CLIP}))
    assert_same_network(folder, other, prototypes=3, vision_tower=str(tmp_path / "clip"))
    dropped = open_checkpoint(str(folder), prototypes=3, vision_tower=str(tmp_path / "clip")).audit.dropped
    assert len(dropped["CLIP's text side"]) == 2
    assert len(dropped["replaced by pytorch_model.bin"]) == len(model.model.vision_tower.state_dict())


def test_a_projector_folder_on_its_base(full, tmp_path):
    _folder, _ = full
    other = make()
    with torch.no_grad():
        other.model.multi_modal_projector.linear_2.weight.mul_(1.5)
    stage = tmp_path / "pretrained"
    write_flat_config(stage, other, _name_or_path="./full")
    torch.save(only(original_names(other), "mm_projector"), stage / "mm_projector.bin")
    assert_same_network(stage, other, prototypes=3)


def test_a_projector_file_beside_whole_weights_fills_in_and_does_not_win(full):
    folder, model = full
    other = {name: 2 * value for name, value in only(original_names(model), "mm_projector").items()}
    torch.save(other, folder / "mm_projector.bin")
    assert_same_network(folder, model, prototypes=3)
    change(folder, lambda tensors: [tensors.pop(name) for name in other])
    with torch.no_grad():
        for weight in model.model.multi_modal_projector.parameters():
            weight.mul_(2)
    assert_same_network(folder, model, prototypes=3)


@pytest.mark.parametrize("strays", [True, False])
def test_the_authors_lora_stage(full, tmp_path, strays):
    _folder, model = full
    stage = tmp_path / "stage"
    write_flat_config(stage, model)
    names = original_names(model)
    language = lora(
        {name: one for name, one in without(names, "vision").items() if ".layers." in name and "_proj.weight" in name},
        4, 1,
    )  # fmt: skip
    vision = lora({name: one for name, one in names.items() if "vision_model.encoder" in name and one.dim() == 2}, 2, 2)
    file = lora_file(language) | (lora_file(vision) if strays else {})
    settings = {"r": 4, "lora_alpha": 8, "peft_type": "LORA", "base_model_name_or_path": "./full"}
    settings["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    (stage / "adapter_config.json").write_text(json.dumps(settings))
    torch.save(file, stage / "adapter_model.bin")
    (stage / "Vit-lora").mkdir()
    of_vit = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]}
    (stage / "Vit-lora" / "adapter_config.json").write_text(json.dumps(settings | of_vit))
    of_tower = {name.removeprefix("model.vision_tower."): one for name, one in vision.items()}
    torch.save(lora_file(of_tower), stage / "Vit-lora" / "adapter_model.bin")
    trained = {f"base_model.model.{name}": 1.25 * one for name, one in only(names, "mm_projector").items()}
    torch.save(trained, stage / "non_lora_trainables.bin")

    merged = make()
    with torch.no_grad():
        for weight in merged.model.multi_modal_projector.parameters():
            weight.mul_(1.25)
        ours = dict(merged.named_parameters())
        for updates, scale in ((language, 8 / 4), (vision, 6 / 2)):
            for name, (a, b) in updates.items():
                own = name.replace("model.layers", "model.language_model.layers")
                own = own.replace("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.")
                ours[own] += scale * b @ a
    assert_same_network(stage, merged, prototypes=3)
    audit = open_checkpoint(str(stage), prototypes=3).audit
    assert len(audit.dropped.get("copies of the vision tower's own LoRA", [])) == (2 * len(vision) if strays else 0)

    shutil.rmtree(stage / "Vit-lora")
    if strays:  # nobody knows their alpha
        with pytest.raises(CheckpointError, match="left over"):
            open_checkpoint(str(stage), prototypes=3)


def test_a_lora_of_the_tower_alone(full, tmp_path):
    folder, _model = full
    vision = lora({"vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": torch.empty(64, 32)}, 2, 3)
    (tmp_path / "Vit-lora").mkdir()
    settings = {"r": 2, "lora_alpha": 4, "peft_type": "LORA", "task_type": None, "target_modules": FC1}
    (tmp_path / "Vit-lora" / "adapter_config.json").write_text(json.dumps(settings))
    torch.save(lora_file(vision), tmp_path / "Vit-lora" / "adapter_model.bin")
    ((a, b),) = vision.values()
    merged = make()
    with torch.no_grad():
        merged.model.vision_tower.encoder.layers[0].mlp.fc1.weight += 2 * b @ a
    assert_same_network(folder, merged, prototypes=3, vision_lora=str(tmp_path / "Vit-lora"))


def test_llava_of_the_original_kind_and_a_share4v_base(tmp_path):
    model = make("mlp2x_gelu")
    for architecture, kind in (("LlavaLlamaForCausalLM", "llava"), ("Share4VLlamaForCausalLM", "share4v")):
        folder = tmp_path / kind
        write_flat_config(folder, model, architectures=[architecture], model_type=kind)
        write_tower(folder / "vit", model)
        torch.save(original_names(model), folder / "pytorch_model.bin")
        assert_same_network(folder, model)


def test_llava_med_v15_is_a_mistral(tmp_path):
    model = make("mlp2x_gelu", text=MistralConfig)
    folder = tmp_path / "mistral"
    options = {"architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_mistral", "sliding_window": None}
    write_flat_config(folder, model, **options)
    write_tower(folder / "vit", model)
    write_shards(folder, original_names(model), "safetensors", 4)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.config.text_config.model_type == "mistral"
    assert checkpoint.config.text_config.sliding_window is None
    assert checkpoint.config.text_config.rope_parameters["rope_theta"] == 5e5
    assert_same_network(folder, model)


def test_a_mistral_is_asked_as_llava_med_asks_it(tmp_path):
    model = make("mlp2x_gelu", rows=32000, text=MistralConfig)
    folder = tmp_path / "mistral"
    write_flat_config(folder, model, architectures=["LlavaMistralForCausalLM"], model_type="llava_mistral")
    write_tower(folder / "vit", model)
    torch.save(original_names(model), folder / "pytorch_model.bin")
    write_llama_tokenizer(folder)
    processor = open_checkpoint(str(folder)).processor()
    content = [{"type": "image"}, {"type": "text", "text": "Is it?"}]
    asked = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert asked == "<s>[INST] <image>\nIs it? [/INST]"


def write_llava_hf(folder: Path, model, rows: int, new_keys: bool = False) -> None:
    """transformers' own LLaVA, in the layout of the hub: `rows` rows, those behind the vocabulary at random."""
    made = {}
    torch.manual_seed(4)
    for name, value in model.state_dict().items():
        if name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
            value = torch.cat([value, 3 * torch.randn(rows - len(value), value.shape[1])])
        if not new_keys and name == "lm_head.weight":
            name = "language_model.lm_head.weight"
        elif not new_keys:
            name = name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)
            name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        made[name] = value.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    base = model.config.text_config.vocab_size
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": base,
        "projector_hidden_act": "gelu",
        "text_config": LLAMA | {"model_type": "llama", "vocab_size": rows, "pad_token_id": base + 1},
        "vision_config": CLIP | {"model_type": "clip_vision_model"},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("new_keys", [False, True])
def test_llava_hf_and_its_padded_rows(tmp_path, new_keys):
    model, folder = make("mlp2x_gelu", rows=32000), tmp_path / "hf"
    write_llava_hf(folder, model, 32064, new_keys)
    write_llama_tokenizer(folder, legacy=False)
    added = {"32000": {"content": "<image>"}, "32001": {"content": "<pad>"}}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": added}))
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.layout == "llava-hf"
    assert len(checkpoint.audit.trimmed) == 2
    ours = checkpoint.model()
    assert ours.lm_head.out_features == 32000  # the padded rows cannot be generated: they are not there
    assert ours.config.text_config.pad_token_id == 0
    assert_same(logits(ours, 32000), logits(model, 32000))
    assert checkpoint.tokenizer.legacy is False

    from transformers import LlavaForConditionalGeneration

    theirs = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    assert_same(logits(theirs, 32000), logits(ours, 32000))


def test_a_small_llava_hf_keeps_its_rows_and_never_generates_its_image_token(checkpoint):
    opened = open_checkpoint(str(checkpoint))
    model = opened.model()
    assert opened.config.image_token_id == 3
    assert model.generation_config.suppress_tokens == [3]
    with torch.no_grad():
        model.lm_head.weight[3] = 100 * model.lm_head.weight[5]
    ids = torch.tensor([[1, 9, 3, 3, 3, 3, 8]])
    out = model.generate(input_ids=ids, pixel_values=torch.randn(1, 3, 28, 28), max_new_tokens=20)
    assert 3 not in out[0, 7:]


def test_rows_that_a_tokenizer_does_not_know_are_never_generated(tmp_path):
    """With a word of its own behind `<image>`, the rows stay; those beyond the tokenizer are suppressed."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    model, folder = make("mlp2x_gelu"), tmp_path / "own"
    write_llava_hf(folder, model, 64)
    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(ROWS - 3))]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens(["<image>"])
    core.add_tokens(["lesion"])
    PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", bos_token="<s>", pad_token="<pad>"
    ).save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("lesion") == 61
    opened = open_checkpoint(str(folder)).model()
    assert opened.lm_head.out_features == 64
    assert opened.generation_config.suppress_tokens == [60, 62, 63]


# --- our own adapters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_our_adapter_folder_on_any_base(full, tmp_path, rslora):
    from peft import LoraConfig, get_peft_model

    folder, _ = full
    base = open_checkpoint(str(folder), prototypes=3)
    convert(base, tmp_path / "base", progress=False)
    for source in (tmp_path / "base",):
        model = StllavaMedForConditionalGeneration.from_pretrained(source)
        adapter = get_peft_model(
            model,
            LoraConfig(
                r=4,
                lora_alpha=8,
                target_modules=r".*language_model\.layers\.\d+\.self_attn\.[qv]_proj|.*vision_tower\.encoder\.layers\.[01]\.mlp\.fc1",
                rank_pattern={".*vision_tower.*": 2},
                alpha_pattern={".*vision_tower.*": 6},
                modules_to_save=["multi_modal_projector"],
                use_rslora=rslora,
            ),
        )
        torch.manual_seed(6)
        with torch.no_grad():
            for weight in adapter.parameters():
                if weight.requires_grad:
                    weight.add_(0.1 * torch.randn_like(weight))
        stage = tmp_path / f"stage-{rslora}"
        adapter.save_pretrained(stage)
        settings = json.loads((stage / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(source)
        wanted = logits(adapter.eval())
        checkpoint = open_checkpoint(str(stage))
        assert checkpoint.layout == "adapter on stllava-med"
        assert_same(logits(checkpoint.model()), wanted)
        merged = adapter.merge_and_unload()
        assert_same_network(stage, merged)
        merged.save_pretrained(tmp_path / f"merged-{rslora}")
        assert_same(logits(open_checkpoint(str(tmp_path / f"merged-{rslora}")).model()), wanted)
        # an adapter on the authors' files, named by hand
        assert_same(logits(open_checkpoint(str(stage), base=str(folder), prototypes=3).model()), wanted)


@pytest.mark.parametrize(("name", "value"), [("use_dora", True), ("bias", "all"), ("peft_type", "IA3")])
def test_an_adapter_that_is_no_plain_lora_is_refused(full, tmp_path, name, value):
    folder, _ = full
    stage = tmp_path / "stage"
    stage.mkdir()
    settings = {"r": 4, "lora_alpha": 8, "peft_type": "LORA", "base_model_name_or_path": str(folder)}
    (stage / "adapter_config.json").write_text(json.dumps(settings | {name: value}))
    torch.save(
        lora_file(lora({"model.layers.0.self_attn.q_proj.weight": torch.empty(48, 48)}, 4, 0)),
        stage / "adapter_model.bin",
    )
    with pytest.raises(InputError, match=f"{name} is"):
        open_checkpoint(str(stage), prototypes=3)


# --- broken checkpoints -----------------------------------------------------------------------------------------------


def drop_a_shard(folder: Path) -> None:
    model = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    write_shards(folder, model)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()


def change(folder: Path, edit) -> None:
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    edit(tensors)
    torch.save(tensors, folder / "pytorch_model.bin")


def add_a_tensor(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"model.image_newline": torch.ones(48)}))


def reshape_a_tensor(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(47)}))


def remove_the_tower(folder: Path) -> None:
    shutil.rmtree(folder / "vit")
    change(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "vision_tower" in name])


def cut(folder: Path) -> None:
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])


def quantise(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}))


def lose_a_tensor(folder: Path) -> None:
    change(folder, lambda tensors: tensors.pop("lm_head.weight"))


def lie_about_rows(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"lm_head.weight": torch.ones(ROWS + 4, 48)}))


def shard_beside_the_whole(folder: Path) -> None:
    write_shards(folder, torch.load(folder / "pytorch_model.bin", weights_only=True))


BROKEN = [
    pytest.param(shard_beside_the_whole, r"pytorch_model\.bin\b.*pytorch_model\.bin\.index\.json.*Move", id="both"),
    pytest.param(
        drop_a_shard, r"1 of 3 shards.*missing.*pytorch_model-00002-of-00003\.bin\b.*Copy", id="missing shard"
    ),
    pytest.param(
        add_a_tensor, r"1 left over.*pytorch_model\.bin\b.*model\.image_newline\b.*complete", id="extra tensor"
    ),
    pytest.param(
        reshape_a_tensor, r"1 of the wrong shape.*model\.norm\.weight is \[47\].*\[48\].*complete", id="wrong shape"
    ),
    pytest.param(remove_the_tower, r"'\./vit'.*vision tower.*no such folder.*--vision-tower", id="no tower"),
    pytest.param(cut, r"pytorch_model\.bin.*read.*cut short.*copy", id="truncated"),
    pytest.param(quantise, r"model\.norm\.weight.*torch\.int8\b.*floating point.*complete", id="wrong type"),
    pytest.param(lose_a_tensor, r"1 missing.*lm_head\.weight\b.*complete", id="missing tensor"),
    pytest.param(lie_about_rows, r"lm_head\.weight is \[64, 48\].*network.*\[60, 48\].*complete", id="rows"),
]


@pytest.mark.parametrize(("break_it", "message"), BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line(full, break_it, message):
    folder, _ = full
    break_it(folder)
    with pytest.raises(InputError, match=message) as error:
        open_checkpoint(str(folder), prototypes=3)
    assert "\n" not in str(error.value)


def test_a_cut_safetensors_file_is_refused(full):
    folder, model = full
    file = folder / "model.safetensors"
    save_file({name: one.contiguous() for name, one in original_names(model).items()}, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors.*read.*cut short.*copy"):
        open_checkpoint(str(folder), prototypes=3)


class Payload:
    def __reduce__(self):
        return os.system, ("touch $STLLAVA_HOME-was-run",)


@pytest.mark.parametrize("kind", ["torch", "old torch", "bare pickle"])
def test_code_in_a_pickle_never_runs(full, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("STLLAVA_HOME", str(tmp_path / "home"))
    folder, _ = full
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True) | {"x": Payload()}
    if kind == "bare pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(tensors))
    else:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(InputError, match=r"pytorch_model\.bin.*pickle.*not loaded.*safetensors"):
        open_checkpoint(str(folder), prototypes=3)
    assert not (tmp_path / "home-was-run").exists()


def test_a_shard_outside_the_folder_is_refused(full):
    folder, _ = full
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(InputError, match="outside the folder"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"mm_projector_type": "linear"}, r"mm_projector_type 'linear'.*cluster.*mlp2x_gelu", id="projector"
        ),
        pytest.param({"mm_use_im_start_end": True}, "mm_use_im_start_end", id="markers"),
        pytest.param({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres'", id="LLaVA-1.6"),
        pytest.param({"mm_vision_select_feature": "best"}, "not a configuration", id="feature"),
        pytest.param({"hidden_size": "48"}, "cannot be loaded", id="a word for a number"),
        pytest.param({"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel.*checkpoints\.md", id="another kind"),
        pytest.param({"architectures": 5}, r"config\.json.*architectures.*\b5\b.*list.*Copy", id="no list"),
    ],
)
def test_a_configuration_that_cannot_be_loaded_is_one_line(full, options, message):
    folder, _ = full
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | options))
    with pytest.raises(InputError, match=message) as error:
        open_checkpoint(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param(None, "has no config.json", id="none"),
        pytest.param("{", "not a JSON object", id="broken"),
        pytest.param("[]", "not a JSON object", id="a list"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match=message):
        open_checkpoint(str(tmp_path))


def test_numbers_that_a_checkpoint_knows_itself_are_not_overruled(tmp_path):
    make().save_pretrained(tmp_path / "ours")
    assert open_checkpoint(str(tmp_path / "ours"), prototypes=3).config.num_prototypes == 3
    with pytest.raises(InputError, match=r"num_prototypes.*\b3\b.*config\.json.*\b5\b.*option"):
        open_checkpoint(str(tmp_path / "ours"), prototypes=5)


def test_a_checkpoint_without_a_tokenizer_converts_but_does_not_answer(full):
    folder, _ = full
    with pytest.raises(InputError, match="no tokenizer"):
        open_checkpoint(str(folder), prototypes=3).processor()


def test_words_added_to_llamas_tokenizer_are_refused(full):
    folder, _ = full
    write_llama_tokenizer(folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<lesion>": 32000}))
    with pytest.raises(InputError, match="<lesion>"):
        open_checkpoint(str(folder))


def test_a_tokenizer_with_more_pieces_than_the_network_has_rows_is_refused(full):
    folder, _ = full
    write_llama_tokenizer(folder)
    with pytest.raises(InputError, match=r"tokenizer.*32000 pieces.*60 rows"):
        open_checkpoint(str(folder), prototypes=3)


# --- hashes, dtypes, loading ------------------------------------------------------------------------------------------


def test_the_hash_changes_with_everything_that_decides_and_not_with_notes(checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)

    def sha256() -> str:
        return open_checkpoint(str(copy)).sha256

    before = open_checkpoint(str(checkpoint)).sha256
    (copy / "README.md").write_text("notes")
    assert sha256() == before
    weights = load_file(copy / "model.safetensors")
    save_file({name: one + 1e-6 for name, one in weights.items()}, copy / "model.safetensors")
    assert sha256() != before
    shutil.copy(checkpoint / "model.safetensors", copy)
    assert sha256() == before
    for file in ("tokenizer.json", "config.json"):
        with (copy / file).open("ab") as opened:
            opened.write(b" ")
        assert sha256() != before
        shutil.copy(checkpoint / file, copy)


def test_the_number_of_prototypes_is_part_of_the_hash(full):
    folder, _ = full
    assert open_checkpoint(str(folder), prototypes=3).sha256 != open_checkpoint(str(folder), prototypes=4).sha256


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_the_dtype_of_the_files_is_kept_and_that_of_the_network_is_chosen(full, tmp_path, stored):
    folder, _ = full
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({name: value.to(stored) for name, value in tensors.items()}, folder / "pytorch_model.bin")
    checkpoint = open_checkpoint(str(folder), prototypes=3)
    convert(checkpoint, tmp_path / "out", progress=False)
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {stored}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(stored).removeprefix("torch.")
    model = checkpoint.model(dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in checkpoint.model().parameters()} == {torch.float32}


def test_a_loaded_network_does_not_look_through_to_its_file(full, tmp_path):
    folder, model = full
    loaded = open_checkpoint(str(folder), prototypes=3).model()
    with (folder / "pytorch_model.bin").open("r+b") as file:
        file.write(bytes(len((folder / "pytorch_model.bin").read_bytes())))
    assert_same(logits(loaded), logits(model))


def test_four_bits_hold_the_language_model_only(tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs the extra four-bit: pip install 'stllava-med[four-bit]'")
    make().save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    model = checkpoint.model(four_bit=True)
    quantised = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert quantised
    assert all(name.startswith("model.language_model.layers.") for name in quantised)


def test_four_bits_of_a_layout_that_is_not_ours_are_refused(full):
    folder, _ = full
    with pytest.raises(InputError, match="four_bit"):
        open_checkpoint(str(folder), prototypes=3).model(four_bit=True)


def test_four_bits_of_two_folders_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)  # bitsandbytes needs not be here
    model = make()
    model.save_pretrained(tmp_path / "whole")
    model.model.vision_tower.save_pretrained(tmp_path / "tower")
    checkpoint = open_checkpoint(str(tmp_path / "whole"), vision_tower=str(tmp_path / "tower"))
    with pytest.raises(InputError, match=r"four_bit.*own layout.*vision tower.*stllava-eval convert"):
        checkpoint.model(four_bit=True)


# --- convert ----------------------------------------------------------------------------------------------------------


def test_convert_writes_a_folder_that_every_loader_reads(full, tmp_path, capsys):
    folder, model = full
    assert main(["convert", str(folder), "--out", str(tmp_path / "out"), "--prototypes", "3"]) == 0
    said = capsys.readouterr()
    assert "all that the network has" in said.out
    assert "has no tokenizer" in said.out
    assert "prototypes, which" not in said.out
    report = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert report["parameters_filled"] == len(model.state_dict())
    assert report["dropped"]["takes no part in the authors' forward"] == [
        "pytorch_model.bin: model.mm_projector.ln_1.weight"
    ]


def test_convert_writes_shards_and_their_index(full, tmp_path, monkeypatch):
    folder, model = full
    monkeypatch.setattr("stllava_eval.network.convert.SHARD_BYTES", 40_000)
    convert(open_checkpoint(str(folder), prototypes=3), tmp_path / "out", progress=False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(4 * one.numel() for one in model.state_dict().values())
    for file in files:
        sizes = [4 * one.numel() for one in load_file(tmp_path / "out" / file).values()]
        assert sum(sizes) <= 40_000 or len(sizes) == 1
    assert_same(logits(open_checkpoint(str(tmp_path / "out")).model()), logits(model))


def test_convert_refuses_and_lists_every_tensor(full, tmp_path, capsys):
    folder, _ = full
    lose_a_tensor(folder)
    assert main(["convert", str(folder), "--out", str(tmp_path / "out"), "--prototypes", "3"]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert "nothing is ever filled with random numbers" in said
    assert not (tmp_path / "out").exists()
    listed = json.loads((tmp_path / "out.refused.json").read_text())
    assert listed["missing"] == ["lm_head.weight"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--prototypes", "0"], "prototypes is 0, not a whole number from 1", id="no prototypes"),
        pytest.param(["--projector", "nowhere.bin"], "projector nowhere.bin: no such file", id="no projector"),
        pytest.param(["--vision-tower", "./nowhere"], "./nowhere: no such folder", id="no tower"),
        pytest.param(["--to", "llava-hf"], "llava-hf has no prototype extractor", id="prototypes to llava-hf"),
    ],
)
def test_convert_says_what_is_wrong_with_an_option(full, tmp_path, capsys, arguments, message):
    folder, _ = full
    assert main(["convert", str(folder), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_convert_overwrites_nothing(full, tmp_path, capsys):
    folder, _ = full
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert main(["convert", str(folder), "--out", str(tmp_path / "out"), "--prototypes", "3"]) == 2
    assert "there is something already" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_to_llava_hf_is_a_model_that_servers_know(tmp_path, capsys):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model, folder = make("mlp2x_gelu", rows=32000), tmp_path / "llava"
    write_flat_config(folder, model)
    write_tower(folder / "vit", model)
    torch.save(original_names(model), folder / "pytorch_model.bin")
    write_llama_tokenizer(folder)
    assert main(["convert", str(folder), "--out", str(tmp_path / "hf"), "--to", "llava-hf"]) == 0
    theirs, loading = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.text_config.vocab_size == 32064
    assert_same(logits(theirs.eval(), 32000), logits(model, 32000))
    head = theirs.lm_head.weight
    assert all(row.equal(head[0]) for row in head[32000:])  # they tie with <unk> and never win
    names = set(load_file(tmp_path / "hf" / "model.safetensors"))
    assert {"language_model.lm_head.weight", "language_model.model.norm.weight"} <= names
    assert any(name.startswith("vision_tower.vision_model.encoder.") for name in names)

    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    ours = open_checkpoint(str(folder))
    content = [{"type": "image"}, {"type": "text", "text": "Is the CT normal?"}]
    prompts = [
        one.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        for one in (processor, ours.processor())
    ]
    assert prompts[0] == prompts[1]
    image = Image.new("RGB", (40, 30), "red")
    inputs = [
        one(text=prompts[0], images=image, return_tensors="pt", add_special_tokens=False)
        for one in (processor, ours.processor())
    ]
    assert inputs[0]["input_ids"].equal(inputs[1]["input_ids"])
    answers = [
        one.generate(**given, max_new_tokens=6, do_sample=False)[0].tolist()
        for one, given in zip((theirs, ours.model()), inputs, strict=True)
    ]
    assert answers[0] == answers[1]
    # and it comes back as it was
    assert_same(logits(open_checkpoint(str(tmp_path / "hf")).model(), 32000), logits(model, 32000))


def test_the_harness_answers_with_a_checkpoint_of_the_authors(prepared, tmp_path):
    from stllava_eval.inference.answerer import Answerer
    from stllava_eval.inference.types import Question

    model, folder = make(rows=32000), tmp_path / "authors"
    write_flat_config(folder, model)
    write_tower(folder / "vit", model)
    torch.save(original_names(model), folder / "pytorch_model.bin")
    write_llama_tokenizer(folder)
    question = Question("Is the CT normal?", lambda: Image.new("RGB", (40, 30), "red"), 5)
    on_the_fly = Answerer(str(folder), prototypes=3)
    convert(open_checkpoint(str(folder), prototypes=3), tmp_path / "converted", progress=False)
    converted = Answerer(str(tmp_path / "converted"))
    answers = [list(one.answer([question], progress=False)) for one in (on_the_fly, converted)]
    assert answers[0] == answers[1]
    assert answers[0][0][1].tokens > 0
    assert on_the_fly.preprocessing == converted.preprocessing
    assert make_processor(converted.tokenizer, 28, 14).chat_template == converted.processor.chat_template


@pytest.mark.parametrize(("name", "value"), [("prototypes", "x"), ("prototypes", 2.5), ("iterations", 0)])
def test_numbers_of_model_args_are_checked(full, name, value):
    with pytest.raises(InputError, match=rf"{name}.*{value!r}.*whole.*from 1\b"):
        open_checkpoint(str(full[0]), **{name: value})


# --- what an attack found ---------------------------------------------------------------------------------------------


@pytest.fixture
def stage(full, tmp_path) -> tuple[Path, dict[str, Tensor]]:
    """The authors' LoRA stage on `full`: two weights of the language model, one of the tower; its adapter's tensors."""
    _, model = full
    folder = tmp_path / "stage"
    write_flat_config(folder, model)
    names = original_names(model)
    language = {name: names[name] for name in names if re.search(r"layers\.0\.self_attn\.[qv]_proj", name)}
    tensors = lora_file(lora(without(language, "vision"), 4, 1))
    settings = {"r": 4, "lora_alpha": 8, "peft_type": "LORA", "base_model_name_or_path": "./full"}
    targets = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | targets))
    torch.save(tensors, folder / "adapter_model.bin")
    torch.save({}, folder / "non_lora_trainables.bin")
    tower = {"vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": torch.empty(64, 32)}
    (folder / "Vit-lora").mkdir()
    (folder / "Vit-lora" / "adapter_config.json").write_text(
        json.dumps(settings | {"r": 2, "lora_alpha": 4, "target_modules": FC1})
    )
    torch.save(lora_file(lora(tower, 2, 2)), folder / "Vit-lora" / "adapter_model.bin")
    return folder, tensors


def settings_of(folder: Path, **options) -> None:
    given = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(given | options))


def test_a_source_beside_out_is_not_touched(full, tmp_path):
    folder, _ = full
    source = tmp_path / "out.partial"
    shutil.copytree(folder, source)
    assert main(["convert", str(source), "--out", str(tmp_path / "out"), "--prototypes", "3"]) == 0
    assert (source / "pytorch_model.bin").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "out", "out.partial"]


@pytest.mark.parametrize("where", ["stage", "Vit-lora"])
def test_whole_tensors_in_a_lora_file_replace_the_bases(stage, where):
    folder, tensors = stage
    name = "lm_head.weight" if where == "stage" else "model.vision_tower.post_layernorm.weight"
    file = folder / "adapter_model.bin" if where == "stage" else folder / "Vit-lora" / "adapter_model.bin"
    key = "base_model.model.lm_head.weight"
    if where == "Vit-lora":
        key, tensors = "base_model.model.vision_tower.vision_model.post_layernorm.weight", torch.load(file)
    wanted = make().state_dict()[name] + 7
    torch.save(tensors | {key: wanted}, file)
    checkpoint = open_checkpoint(str(folder), prototypes=3)
    assert dict(checkpoint.weights())[name].equal(wanted)
    assert sum(map(len, checkpoint.audit.dropped.values())) > 2


@pytest.mark.parametrize("embedding", [True, False])
def test_the_authors_lora_of_head_and_embedding(stage, embedding):
    folder, _ = stage
    tensors = {"base_model.model.lm_head.lora_A.weight": 0.1 * torch.randn(4, 48)}
    tensors["base_model.model.lm_head.lora_B.weight"] = 0.1 * torch.randn(ROWS, 4)
    if embedding:
        stem = "base_model.model.model.embed_tokens.lora_embedding"
        tensors |= {f"{stem}_A": 0.1 * torch.randn(4, ROWS), f"{stem}_B": 0.1 * torch.randn(48, 4)}
    torch.save(tensors, folder / "adapter_model.bin")
    targets = ["lm_head", *(["embed_tokens"] if embedding else [])]
    settings_of(folder, target_modules=targets, layers_to_transform=None, layers_pattern=None)
    shutil.rmtree(folder / "Vit-lora")
    opened = open_checkpoint(str(folder), prototypes=3)
    assert opened.layout == "authors' LoRA stage on original"
    ours, plain = dict(opened.weights()), make().state_dict()
    a, b = (tensors[f"base_model.model.lm_head.lora_{side}.weight"] for side in "AB")
    assert_same(ours["lm_head.weight"], plain["lm_head.weight"] + 8 / 4 * b @ a)
    if embedding:
        a, b = (tensors[f"{stem}_{side}"] for side in "AB")
        name = "model.language_model.embed_tokens.weight"
        assert_same(ours[name], plain[name] + 8 / 4 * (b @ a).T)


def test_a_stage_without_its_projector_is_refused(stage):
    folder, _ = stage
    (folder / "non_lora_trainables.bin").unlink()
    with pytest.raises(InputError, match=r"non_lora_trainables\.bin\b.*projector.*Copy"):
        open_checkpoint(str(folder), prototypes=3)


@pytest.mark.parametrize("where", ["stage", "projector", "tower"])
def test_half_a_part_is_not_filled_up_with_the_bases(full, stage, tmp_path, where):
    """Each of these is whole by itself, and the base has the same part: which half is whose no tensor would show."""
    folder, model = full
    projector = only(original_names(model), "mm_projector")
    tower = write_tower(tmp_path / "other-tower", model)
    options = {}
    if where == "stage":
        source, file = stage[0], stage[0] / "non_lora_trainables.bin"
        torch.save({f"base_model.model.{key}": value for key, value in projector.items()}, file)
    elif where == "projector":
        source, file = folder, tmp_path / "mm_projector.bin"
        torch.save(projector, file)
        options = {"projector": str(file)}
    else:
        source, file = folder, tower / "pytorch_model.bin"
        options = {"vision_tower": str(tower)}
    open_checkpoint(str(source), prototypes=3, **options)
    tensors = torch.load(file, weights_only=True)
    (gone,) = (key for key in tensors if key.endswith(("mlp.2.bias", "encoder.layers.2.mlp.fc1.weight")))
    torch.save({key: value for key, value in tensors.items() if key != gone}, file)
    with pytest.raises(CheckpointError, match="missing") as error:
        open_checkpoint(str(source), prototypes=3, **options)
    assert all(one.startswith(f"{file.name}: model.") for one in error.value.report["missing"])


def test_a_folder_of_several_adapters_names_one(tmp_path):
    for name in ("first", "second"):
        (tmp_path / "named" / name).mkdir(parents=True)
        (tmp_path / "named" / name / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=rf"adapters.*pass.*{tmp_path}.*/first"):
        open_checkpoint(str(tmp_path / "named"))


@pytest.mark.parametrize("prefix", ["", "base_model.model.model."])
def test_one_weight_gets_one_lora(stage, prefix):
    folder, tensors = stage
    twice = {key.replace("base_model.model.", prefix, 1): value for key, value in tensors.items()}
    torch.save(tensors | twice, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="left over"):
        open_checkpoint(str(folder), prototypes=3)


def test_a_lora_of_the_tower_is_merged_once_and_touches_nothing_else(stage):
    folder, _ = stage
    once = open_checkpoint(str(folder), prototypes=3)
    named = open_checkpoint(str(folder), prototypes=3, vision_lora=str(folder / "Vit-lora"))
    assert named.deltas == once.deltas
    with pytest.raises(InputError, match="given twice"):
        open_checkpoint(str(folder), prototypes=3, vision_lora=str(folder))


def test_a_language_lora_is_no_lora_of_the_tower(full, stage):
    with pytest.raises(CheckpointError, match="left over"):
        open_checkpoint(str(full[0]), prototypes=3, vision_lora=str(stage[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"init_lora_weights": "pissa"}, r"init_lora_weights.*'pissa'.*merge_and_unload", id="changes the base"
        ),
        pytest.param({"alora_invocation_tokens": [5]}, "alora_invocation_tokens", id="a kind that peft has"),
        pytest.param({"a_kind_to_come": True}, "a_kind_to_come is True", id="a kind that nobody has"),
        pytest.param({"use_rslora": "false"}, "use_rslora is 'false'", id="a word for a truth"),
        pytest.param({"r": None}, "r is None", id="no rank"),
        pytest.param({"lora_alpha": float("nan")}, "lora_alpha is nan", id="no alpha"),
        pytest.param({"lora_alpha": 0}, "lora_alpha is 0", id="alpha 0"),
        pytest.param({"rank_pattern": ["q"]}, r"rank_pattern.*not usable.*'q'.*Copy", id="a list of patterns"),
        pytest.param({"modules_to_save": ["multi_modal_projector"]}, "modules_to_save names", id="not saved"),
    ],
)
def test_an_adapter_that_is_not_what_it_says_is_one_line(stage, options, message):
    folder, _ = stage
    settings_of(folder, **options)
    with pytest.raises(InputError, match=message) as error:
        open_checkpoint(str(folder), prototypes=3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_lora_and_weights_are_numbers_of_sixteen_bits_or_more(full, stage, dtype):
    folder, tensors = stage
    torch.save({key: value.to(dtype) for key, value in tensors.items()}, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="wrong shape or type"):
        open_checkpoint(str(folder), prototypes=3)
    change(full[0], lambda weights: weights.update({"model.norm.weight": torch.ones(48).to(dtype)}))
    with pytest.raises(CheckpointError, match=r"wrong shape or type.*model\.norm\.weight.*torch\..*complete"):
        open_checkpoint(str(full[0]), prototypes=3)


def test_an_adapter_without_tensors_is_refused(stage):
    folder, _ = stage
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.bin.*without tensors.*Copy"):
        open_checkpoint(str(folder), prototypes=3)


@pytest.mark.parametrize("base", [".", "../stage"])
def test_an_adapter_that_builds_on_itself_is_refused(stage, base):
    folder, _ = stage
    settings_of(folder, base_model_name_or_path=base)
    with pytest.raises(InputError, match="builds on itself"):
        open_checkpoint(str(folder), prototypes=3)


def test_an_adapter_beside_a_whole_model_is_refused(full, stage):
    shutil.copy(full[0] / "pytorch_model.bin", stage[0])
    with pytest.raises(InputError, match=r"adapter.*whole model.*Move"):
        open_checkpoint(str(stage[0]), prototypes=3)


def test_a_base_for_a_whole_model_is_refused(full):
    with pytest.raises(InputError, match="base is for adapters"):
        open_checkpoint(str(full[0]), base=str(full[0]), prototypes=3)


@pytest.mark.parametrize("pieces", [1, 20000])
def test_a_cut_tokenizer_takes_no_rows_away(tmp_path, pieces):
    from transformers.utils import sentencepiece_model_pb2_new as proto

    model, folder = make("mlp2x_gelu", rows=32000), tmp_path / "llava"
    write_flat_config(folder, model)
    write_tower(folder / "vit", model)
    torch.save(original_names(model), folder / "pytorch_model.bin")
    write_llama_tokenizer(folder)
    whole, part = proto.ModelProto(), proto.ModelProto()
    whole.ParseFromString((folder / "tokenizer.model").read_bytes())
    part.CopyFrom(whole)
    del part.pieces[max(pieces, 259) :]
    (folder / "tokenizer.model").write_bytes(part.SerializeToString())
    with pytest.raises(InputError, match=rf"tokenizer.*\b{max(pieces, 259)} pieces.*32000 rows.*Copy"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_written(full, tmp_path, capsys, value):
    folder, _ = full
    change(folder, lambda tensors: tensors["model.norm.weight"].__setitem__(3, value))
    assert main(["convert", str(folder), "--out", str(tmp_path / "out"), "--prototypes", "3"]) == 2
    assert "model.norm.weight holds numbers that are not finite" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_lora_that_overflows_sixteen_bits_is_refused(full, stage):
    change(full[0], lambda tensors: tensors.update({name: one.half() for name, one in tensors.items()}))
    folder, tensors = stage
    torch.save({key: torch.full_like(value, 300) for key, value in tensors.items()}, folder / "adapter_model.bin")
    with pytest.raises(InputError, match="overflows with its LoRA"):
        open_checkpoint(str(folder), prototypes=3).model()


def test_to_llava_hf_keeps_the_projectors_shape(tmp_path):
    from transformers import LlavaForConditionalGeneration

    model = make("mlp2x_gelu", rows=32000, projector_hidden_act="relu", multimodal_projector_bias=False)
    folder = tmp_path / "hf"
    write_llava_hf(folder, model, 32064)
    raw = json.loads((folder / "config.json").read_text())
    own = {"projector_hidden_act": "relu", "multimodal_projector_bias": False}
    (folder / "config.json").write_text(json.dumps(raw | own))
    write_llama_tokenizer(folder)
    convert(open_checkpoint(str(folder)), tmp_path / "out", to="llava-hf", progress=False)
    theirs, loading = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"]
    assert_same(logits(theirs.eval(), 32000), logits(model, 32000))


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        pytest.param("config.json", {"num_hidden_layers": 10**9}, "its weights have 2", id="layers without end"),
        pytest.param(
            "config.json",
            {"mm_vision_select_layer": 99},
            r"vision_feature_layer.*\b99\b.*3 layers.*Copy",
            id="no such layer",
        ),
        pytest.param("config.json", {"eos_token_id": 10**12}, "eos_token_id is 10", id="an end that never comes"),
        pytest.param("config.json", {"hidden_act": "nosuch"}, "nosuch", id="no such function"),
        pytest.param("config.json", {"rope_theta": "x"}, "not a configuration", id="no angle"),
        pytest.param("config.json", {"quantization_config": {"bits": 4}}, "quantised", id="quantised"),
        pytest.param("vit/config.json", {"num_attention_heads": -2}, r"num_attention_heads.* -2\b.*Copy", id="heads"),
        pytest.param(
            "vit/config.json", {"image_size": 29}, r"image_size 29\b.*multiple.*patch_size 14\b.*Copy", id="image size"
        ),
        pytest.param("vit/config.json", {"layer_norm_eps": "x"}, "not a configuration", id="a word"),
        pytest.param("vit/config.json", {"patch_size": 0}, "patch_size", id="no patch"),
    ],
)
def test_numbers_that_no_tensor_shows_are_checked(full, file, options, message):
    folder, _ = full
    raw = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(raw | options))
    with pytest.raises(InputError, match=message) as error:
        open_checkpoint(str(folder), prototypes=3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        pytest.param("generation_config.json", {"eos_token_id": -1}, "eos_token_id is -1", id="an end"),
        pytest.param(
            "preprocessor_config.json", {"image_std": [0, 0, 0]}, "image_std is .*, not above 0", id="deviation"
        ),
        pytest.param("preprocessor_config.json", {"image_mean": "x"}, "image_mean is 'x'", id="mean"),
        pytest.param("tokenizer_config.json", {"legacy": "false"}, "legacy is 'false'", id="legacy"),
        pytest.param("tokenizer_config.json", {"added_tokens_decoder": 5}, "tokenizer cannot be read", id="added"),
    ],
)
def test_files_beside_the_weights_are_checked(tmp_path, capsys, file, content, message):
    model, folder = make(rows=32000), tmp_path / "full"
    write_flat_config(folder, model)
    write_tower(folder / "vit", model)
    torch.save(original_names(model), folder / "pytorch_model.bin")
    write_llama_tokenizer(folder)
    (folder / file).write_text(json.dumps(content))
    assert main(["convert", str(folder), "--out", str(tmp_path / "out"), "--prototypes", "3"]) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(message, said)
    assert "\n" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(full):
    folder, _ = full
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*differs.*embedding.*complete"):
        open_checkpoint(str(folder), prototypes=3)
    change(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    checkpoint = open_checkpoint(str(folder), prototypes=3)
    assert checkpoint.audit.dropped["tied to the embedding"] == ["pytorch_model.bin: lm_head.weight"]
    model = checkpoint.model()
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_one_storage_under_two_names_is_written_twice(full, tmp_path):
    folder, _ = full
    change(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    convert(open_checkpoint(str(folder), prototypes=3), tmp_path / "out", progress=False)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["lm_head.weight"].equal(written["model.language_model.embed_tokens.weight"])


def test_a_shard_holds_what_the_index_says(tmp_path):
    model, folder = make(), tmp_path / "sharded"
    write_flat_config(folder, model)
    write_tower(folder / "vit", model)
    write_shards(folder, original_names(model), "safetensors")
    stale = folder / "model-00003-of-00003.safetensors"
    first = load_file(folder / "model-00001-of-00003.safetensors")
    save_file(load_file(stale) | dict([next(iter(first.items()))]), stale)
    with pytest.raises(InputError, match=r"model-00003-of-00003\.safetensors.*hold.*lm_head\.weight\b.*Copy"):
        open_checkpoint(str(folder), prototypes=3)


@pytest.mark.parametrize("out", [".", "/"])
def test_out_needs_a_name_of_its_own(full, tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(full[0]), "--out", out, "--prototypes", "3"]) == 2
    assert "\n" not in capsys.readouterr().err.strip()


@pytest.mark.parametrize("tensors", [{5: torch.ones(1)}, {"x": torch.ones(1).to_sparse()}, {"x": 1}, [1]])
def test_a_table_of_named_tensors_or_nothing(full, tensors):
    torch.save(tensors, full[0] / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin.*named tensors.*Copy"):
        open_checkpoint(str(full[0]))
