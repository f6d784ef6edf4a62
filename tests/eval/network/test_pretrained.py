"""Adapters of other families: the merged network is PEFT's own, and whatever does not fit is one line."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from families import write_family
from PIL import Image
from safetensors.torch import load_file, save_file

from stllava_eval.errors import InputError
from stllava_eval.inference.open import open_answerer
from stllava_eval.inference.types import Question
from stllava_eval.network.pretrained import is_generic, open_pretrained

CPU = torch.device("cpu")
OLD_NAMES = {  # of today -> of transformers 4.51 and before
    "qwen2_5_vl": [("model.language_model.", "model."), ("model.visual.", "visual.")],
    "gemma3": [
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("lm_head", "language_model.lm_head"),
    ],
    "idefics3": [],
}
SUFFIXES = ["q_proj", "v_proj", "down_proj"]
# as unsloth writes it: by words that the names of language layers hold, in any release
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|v_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r"\.(?:(?:q_proj|v_proj|down_proj)))"
)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "gemma3", "idefics3"])
def base(request, tmp_path_factory) -> Path:
    return write_family(request.param, tmp_path_factory.mktemp("base") / request.param)


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    """A LoRA of the language and the vision layers, as trl writes it: with its processor."""
    folder = write_adapter(base, tmp_path / "adapter", SUFFIXES)
    for file in base.iterdir():
        if file.suffix != ".safetensors" and file.name not in ("config.json", "generation_config.json"):
            shutil.copy(file, folder)
    return folder


def write_adapter(base: Path, folder: Path, targets, **settings) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(base)
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=targets, **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.1)
    peft.save_pretrained(folder)
    change(folder, base_model_name_or_path=str(base))
    return folder


def change(folder: Path, **settings) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def rename_keys(folder: Path, renamings: list[tuple[str, str]]) -> None:
    """Write the adapter's keys as an earlier release of transformers named them."""
    tensors = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.")
        today, then = next(((today, then) for today, then in renamings if name.startswith(today)), ("", ""))
        tensors[f"base_model.model.{then}{name[len(today) :]}"] = tensor
    save_file(tensors, folder / "adapter_model.safetensors")


def logits(model, folder: Path) -> torch.Tensor:
    """(vocab,) logits behind one prompt."""
    processor = open_pretrained(str(folder)).processor()
    image = Image.frombytes("RGB", (40, 30), bytes(range(240)) * 15)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a mass?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    with torch.no_grad():
        return model(**processor(images=[image], text=text, return_tensors="pt")).logits[0, -1]


def by_peft(base: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(base)
    return logits(PeftModel.from_pretrained(model, adapter).eval(), base)


def merged(adapter: Path) -> torch.Tensor:
    return logits(open_pretrained(str(adapter)).model(CPU, torch.float32), adapter)


@pytest.mark.parametrize("layout", ["trl", "ms-swift", "unsloth", "transformers 4.51", "ms-swift, transformers 4.51"])
def test_an_adapter_of_any_trainer_is_pefts_own(base, adapter, layout):
    """ms-swift writes a pattern of whole names and no tokenizer; unsloth one of words that the names hold."""
    expected = by_peft(base, adapter)
    assert not torch.allclose(expected, logits(open_pretrained(str(base)).model(CPU, torch.float32), base), atol=0.01)
    front = {"qwen2_5_vl": "model.language_model", "gemma3": "model.language_model", "idefics3": "model.text_model"}
    if layout.startswith(("ms-swift", "unsloth")):
        keys = load_file(adapter / "adapter_model.safetensors")
        language = {key: tensor for key, tensor in keys.items() if re.search("language_model|text_model", key)}
        save_file(language, adapter / "adapter_model.safetensors")
        change(adapter, target_modules=UNSLOTH)
        expected = by_peft(base, adapter)
    if layout.startswith("ms-swift"):
        for file in list(adapter.iterdir()):
            if not file.name.startswith("adapter_"):
                file.unlink()
        written = front[base.name]
        if layout.endswith("4.51"):
            written = {"qwen2_5_vl": "model", "gemma3": "language_model.model"}.get(base.name, written)
        change(adapter, target_modules=rf"^({re.escape(written)}(?=\.).*\.(q_proj|v_proj|down_proj))$")
        (adapter / "args.json").write_text("{}")
    if layout.endswith("4.51"):
        rename_keys(adapter, OLD_NAMES[base.name])
    torch.testing.assert_close(merged(adapter), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_answers_and_names_its_base(base, adapter):
    assert is_generic(str(adapter))
    asked = [Question("Is there a mass?", partial(Image.new, "RGB", (40, 30), "red"), 8)]
    plain, tuned = open_answerer(str(base)), open_answerer(str(adapter))
    assert dict(tuned.answer(asked, progress=False)) != dict(plain.answer(asked, progress=False))
    assert tuned.sha256 != plain.sha256
    change(adapter, base_model_name_or_path="nobody/has-this")
    with pytest.raises(InputError, match=r"base is not to be had.*pass base"):
        open_pretrained(str(adapter))
    moved = open_answerer(str(adapter), base=str(base))
    assert dict(moved.answer(asked, progress=False)) == dict(tuned.answer(asked, progress=False))


def test_whole_modules_beside_a_lora_are_taken(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "adapter", ["q_proj"], modules_to_save=["lm_head"])
    torch.testing.assert_close(merged(adapter), by_peft(base, adapter), rtol=1e-4, atol=1e-4)


def test_an_adapter_on_an_adapter_is_merged_after_it(base, adapter, tmp_path):
    first = open_pretrained(str(adapter)).model(CPU, torch.float32)
    whole = tmp_path / "whole"
    first.save_pretrained(whole)
    open_pretrained(str(base)).processor().save_pretrained(whole)
    second = write_adapter(whole, tmp_path / "second", ["k_proj"])
    expected = by_peft(whole, second)
    change(second, base_model_name_or_path="../adapter")
    torch.testing.assert_close(merged(second), expected, rtol=1e-4, atol=1e-4)
    assert open_pretrained(str(second)).adapters == (adapter.resolve(), second.resolve())


def without_a_layer(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {key: tensor for key, tensor in tensors.items() if ".layers.1.mlp" not in key},
        adapter / "adapter_model.safetensors",
    )


def with_a_stray(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = next(key for key in tensors if "layers.1" in key and "q_proj.lora_A" in key)
    more = {key.replace("layers.1", "layers.7"): tensors[key].clone()}
    save_file(tensors | more, adapter / "adapter_model.safetensors")


def of_another_rank(adapter: Path) -> None:
    change(adapter, r=8)


def with_dora(adapter: Path) -> None:
    change(adapter, use_dora=True)


def without_targets(adapter: Path) -> None:
    change(adapter, target_modules=None)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (without_a_layer, r"targeted by adapter_config.json and without lora_A and lora_B.*layers\.1\.mlp"),
        (with_a_stray, r"of no layer that adapter_config.json targets.*layers\.7"),
        (of_another_rank, "of another shape.*not rank 8"),
        (with_dora, "use_dora.*[Mm]erge it with PEFT"),
        (without_targets, "target_modules is None"),
    ],
)
def test_what_does_not_fit_is_one_line(adapter, spoil, says):
    spoil(adapter)
    with pytest.raises(InputError, match=says) as caught:
        open_pretrained(str(adapter)).model(CPU, torch.float32)
    assert "\n" not in str(caught.value)


def test_a_whole_model_takes_no_base_and_an_adapter_no_weights_beside_it(base, adapter):
    with pytest.raises(InputError, match="whole model; base is for adapters"):
        open_answerer(str(base), base=str(base))
    shutil.copy(base / "model.safetensors", adapter)
    with pytest.raises(InputError, match="an adapter and a whole model"):
        open_pretrained(str(adapter))


def test_a_tokenizer_with_other_tokens_is_refused_and_one_with_the_same_brings_its_template(base, adapter):
    for file in list(adapter.iterdir()):
        if "processor" in file.name:
            file.unlink()
    template = open_pretrained(str(base)).processor().chat_template
    (adapter / "chat_template.jinja").write_text("TRAINED " + template)
    assert open_pretrained(str(adapter)).processor().chat_template == "TRAINED " + template
    file = adapter / "tokenizer.json"
    file.write_text(file.read_text().replace('"<s>"', '"<t>"'))
    with pytest.raises(InputError, match="Put the whole processor"):
        open_pretrained(str(adapter)).processor()


def test_an_adapter_on_itself_is_one_line(base, adapter):
    change(adapter, base_model_name_or_path=str(adapter))
    with pytest.raises(InputError, match="builds on itself"):
        open_pretrained(str(adapter))


def test_a_template_in_the_tokenizers_file_alone_is_taken(base, tmp_path):
    """Merged fine-tunes hold it there where only their tokenizer was saved again."""
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    assert open_pretrained(str(folder)).processor().chat_template == template


def test_an_adapter_on_a_quantised_copy_is_one_line_that_names_base(base, adapter, tmp_path):
    """As unsloth leaves it."""
    copy = tmp_path / "base-bnb-4bit"
    shutil.copytree(base, copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (copy / "config.json").write_text(json.dumps(config))
    change(adapter, base_model_name_or_path=str(copy))
    with pytest.raises(InputError, match=r"quantised copy.*Pass base with the 16-bit model"):
        open_pretrained(str(adapter)).model(CPU, torch.float32)
    open_pretrained(str(adapter), base=str(base)).model(CPU, torch.float32)


def test_a_head_that_is_not_there_is_one_line_that_names_the_tie(tmp_path):
    folder = write_family("idefics3", tmp_path / "model")
    file = folder / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != "lm_head.weight"}, file)
    with pytest.raises(InputError, match=r"lm_head\.weight.*tie_word_embeddings to true"):
        open_pretrained(str(folder)).model(CPU, torch.float32)
