"""The golden values of the authors' own modules -> how far our network is from them.

`python tests/golden.py` prints the table of docs/evaluate/checkpoints.md; the tests hold each line to its tolerance.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from rounding import apart
from safetensors.torch import load_file

from stllava_eval.network.checkpoint import open_checkpoint
from stllava_eval.network.layouts import PROTOTYPE_PARTS
from stllava_eval.network.modeling import PrototypeProjector
from stllava_eval.network.processing import StllavaMedImageProcessor

IMAGE, PATCHES = 128, 36  # of the tiny golden model: the image token's id behind 128 pieces, its vectors


def shared_folder() -> Path:
    return Path(os.environ.get("STLLAVA_SHARED") or Path(__file__).resolve().parents[2] / "shared")


def our_name(part: str) -> str:
    """The authors' name of a projector's parameter -> ours."""
    if part in PROTOTYPE_PARTS:
        return PROTOTYPE_PARTS[part]
    stem, _, leaf = part.rpartition(".")
    return f"{PROTOTYPE_PARTS[stem]}.{leaf}"


def projector(file: Path) -> dict[str, float]:
    """Worst differences of output and gradients for one file of a_projector; see `apart`."""
    values, facts = load_file(file), json.loads(file.with_suffix(".json").read_text())
    config = SimpleNamespace(
        vision_config=SimpleNamespace(hidden_size=facts["channels"]),
        text_config=SimpleNamespace(hidden_size=facts["channels_out"]),
        num_prototypes=facts["num_centers"],
        prototype_iterations=facts["clust_iter"],
        prototype_in_float32=True,
    )
    ours = PrototypeProjector(config).to(values["input.x"].dtype)
    state = {
        our_name(name.removeprefix("weights.")): value.reshape(1) if value.dim() == 3 else value
        for name, value in values.items()
        if name.startswith("weights.") and "ln_1" not in name
    }
    ours.load_state_dict(state)
    x = values["input.x"].requires_grad_()
    y = ours(x)
    (y * values["grad.upstream"]).sum().backward()
    gradients = {"x": x.grad} | {name: one.grad for name, one in ours.named_parameters()}
    pairs = [
        (gradients["x" if name == "grad.x" else our_name(name.removeprefix("grad."))], value)
        for name, value in values.items()
        if name.startswith("grad.") and name != "grad.upstream"
    ]
    return {"output": apart((y, values["output.y"])), "gradients": apart(*pairs)}


def spliced(ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The authors' ids (-200 an image) as ours: the image's token 36 times; padded on the right. Ids, mask, labels."""
    rows = []
    for place, (row, kept) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True)):
        wanted = labels[place].tolist() if labels is not None else row
        out = []
        for token, keep, label in zip(row, kept, wanted, strict=True):
            if keep:
                out += [(IMAGE, -100)] * PATCHES if token == -200 else [(token, label)]
        rows.append(out)
    width = max(map(len, rows))
    filled = [row + [(0, -100)] * (width - len(row)) for row in rows]
    attention = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return [
        torch.tensor([[token for token, _ in row] for row in filled]),
        torch.tensor(attention),
        torch.tensor([[label for _, label in row] for row in filled]),
    ]


def write_original(folder: Path, golden: Path, variant: str) -> Path:
    """b_tiny_model's state dict as a folder of the authors' full layout, its vision tower in the weights."""
    facts = json.loads((golden / "b_tiny_model" / f"{variant}.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vit").mkdir(exist_ok=True)
    (folder / "vit" / "config.json").write_text((golden / "b_tiny_model" / "tiny_vit_config.json").read_text())
    config = facts["llm_config"] | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "mm_projector_type": variant,
        "mm_vision_tower": "./vit",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(load_file(golden / "b_tiny_model" / f"{variant}_state_dict.safetensors"), folder / "pytorch_model.bin")
    return folder


def tiny_model(golden: Path, variant: str, folder: Path) -> dict[str, float]:
    """Worst differences of the tiny network: tower, projector, logits, loss, gradients; greedy ids that differ."""
    values = load_file(golden / "b_tiny_model" / f"{variant}_io.safetensors")
    prototypes = 16 if variant == "cluster" else None
    model = open_checkpoint(str(write_original(folder, golden, variant)), prototypes=prototypes).model()
    model.requires_grad_(True)
    ids, mask, labels = spliced(values["input_ids"], values["attention_mask"], values["labels"])
    has_image = (ids == IMAGE).any(1)
    encoded = model.get_image_features(pixel_values=values["pixel_values"], return_dict=True)
    tower = encoded.hidden_states[-2][:, 1:]
    result = model(input_ids=ids, attention_mask=mask, pixel_values=values["pixel_values"][has_image], labels=labels)
    result.loss.backward()
    names = dict(model.named_parameters())
    gradients = {name.removeprefix("grad."): value for name, value in values.items() if name.startswith("grad.")}
    with torch.inference_mode():
        prompt, prompt_mask, _ = spliced(values["greedy.prompt_ids"], torch.ones_like(values["greedy.prompt_ids"]))
        wanted = values["greedy.new_ids_original_generate"]
        new = model.generate(
            input_ids=prompt,
            attention_mask=prompt_mask,
            pixel_values=values["pixel_values"][:1],
            max_new_tokens=wanted.shape[1],
            do_sample=False,
            eos_token_id=None,
        )[:, prompt.shape[1] :]
    return {
        "tower": apart((tower, values["tower_features"])),
        "projector": apart((torch.stack(list(encoded.pooler_output)), values["projector_output"])),
        "logits": apart((result.logits[mask.bool()], values["batch.logits"][mask.bool()])),
        "loss": apart((result.loss, values["batch.loss"][0])),
        "gradients": apart(*((_gradient(names, name), value) for name, value in gradients.items())),
        "compared gradients": float(len(gradients)),
        "greedy ids that differ": float((new != wanted).sum()),
    }


def _gradient(names: dict[str, torch.nn.Parameter], original: str) -> torch.Tensor:
    from stllava_eval.network.layouts import flat_name

    gradient = names[flat_name(original)].grad
    return torch.zeros(()) if gradient is None else gradient


def checkpoint_layouts(golden: Path) -> dict[str, float]:
    """Worst differences of every layout in e_checkpoints: logits, and the tower and loss of those with adapters.

    The three parts alone are b_tiny_model's network, and are held to its logits.
    """
    folder = golden / "e_checkpoints"
    values = load_file(golden / "b_tiny_model" / "cluster_io.safetensors")
    expected = load_file(folder / "expected.safetensors")
    ids, mask, labels = spliced(values["input_ids"], values["attention_mask"], values["labels"])
    pixels = values["pixel_values"][(ids == IMAGE).any(1)]
    parts = {"vision_tower": str(folder / "vit"), "projector": str(folder / "projector" / "mm_projector.bin")}
    cases = {
        "full_merged": ({}, expected["batch.logits_merged"]),
        "lora_stage": ({}, expected["batch.logits_with_adapters"]),
        "base_llm": (parts, values["batch.logits"]),
    }
    worst = {}
    for name, (options, logits) in cases.items():
        model = open_checkpoint(str(folder / name), prototypes=16, **options).model()
        with torch.inference_mode():
            ours = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels)
            encoded = model.get_image_features(pixel_values=values["pixel_values"], return_dict=True)
        worst[name] = apart((ours.logits[mask.bool()], logits[mask.bool()]))
        if name != "base_llm":  # both have the tower with its LoRA merged
            tower = encoded.hidden_states[-2][:, 1:]
            worst[f"{name}, tower"] = apart((tower, expected["tower_features_merged"]))
        if name == "lora_stage":
            worst[f"{name}, loss"] = apart((ours.loss, expected["batch.loss_with_adapters"][0]))
    return worst


def preprocessing(golden: Path) -> dict[str, float]:
    """Worst pixel difference of every image and mode; `.pad336` is stored in 16 bits."""
    folder = golden / "f_image_preprocess"
    worst = {}
    for name, value in load_file(folder / "pixel_values.safetensors").items():
        stem, _, mode = name.rpartition(".")
        side = int(mode.lstrip("padcro"))
        size = {"height": side, "width": side}
        ours = StllavaMedImageProcessor(size={"shortest_edge": side}, crop_size=size, do_pad=mode.startswith("pad"))
        with Image.open(folder / f"{stem}.png") as image:
            pixels = ours(image, return_tensors="pt")["pixel_values"]
        worst[name] = apart((pixels.reshape(value.shape).to(value.dtype), value))
    return worst


def table(golden: Path, work: Path) -> list[tuple[str, str, float]]:
    """(golden file, quantity, worst difference as a share of the largest value)."""
    rows = []
    for file in sorted((golden / "a_projector").glob("*.safetensors")):
        rows += [(f"a_projector/{file.stem}", what, worst) for what, worst in projector(file).items()]
    for variant in ("cluster", "mlp2x_gelu"):
        found = tiny_model(golden, variant, work / variant)
        rows += [(f"b_tiny_model/{variant}", what, worst) for what, worst in found.items()]
    rows += [
        (f"e_checkpoints/{name}", "logits" if "," not in name else "", worst)
        for name, worst in checkpoint_layouts(golden).items()
    ]
    rows += [(f"f_image_preprocess/{name}", "pixels", worst) for name, worst in preprocessing(golden).items()]
    return rows


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as work:
        for name, what, worst in table(shared_folder() / "golden", Path(work)):
            print(f"| {name} | {what} | {worst:.3g} |")
