"""How much memory `stllava-eval convert` takes, on a made-up checkpoint of a 7B's real shapes but few layers.

`python benchmarks/convert.py --json FILE [--layers 4] [--folder DIR]` writes the authors' full layout in float16 (three
shards of pickles, then of safetensors, then pickles with a LoRA of rank 128 on every layer), converts each in a process
of its own, and reports that process' peak memory beside the largest shard; and the same of loading the pickles in
bfloat16. It needs about 7 GB of disk for four layers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from figures import write
from safetensors.torch import save_file

WIDTH, INNER, ROWS, VISION, VISION_INNER, VISION_LAYERS = 4096, 11008, 32000, 1024, 4096, 24
LINEAR = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """The authors' name and shape of every tensor of the full layout."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (ROWS, WIDTH)}
    for layer in range(layers):
        place = f"model.layers.{layer}"
        found |= {f"{place}.{name}.weight": shape for name, shape in LINEAR.items()}
        found |= {f"{place}.{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
        found[f"{place}.self_attn.rotary_emb.inv_freq"] = (64,)
    found |= {"model.norm.weight": (WIDTH,), "lm_head.weight": (ROWS, WIDTH)}
    for name, shape in {"c": VISION, "v": VISION, "f": VISION, "mlp.0": WIDTH, "mlp.2": WIDTH}.items():
        wide = WIDTH if name == "mlp.2" else VISION
        found |= {f"model.mm_projector.{name}.weight": (shape, wide), f"model.mm_projector.{name}.bias": (shape,)}
    found |= {"model.mm_projector.sim_alpha": (1, 1, 1), "model.mm_projector.sim_beta": (1, 1, 1)}
    found |= {"model.mm_projector.ln_1.weight": (VISION,), "model.mm_projector.ln_1.bias": (VISION,)}
    tower = "model.vision_tower.vision_tower.vision_model"
    found |= {
        f"{tower}.embeddings.class_embedding": (VISION,),
        f"{tower}.embeddings.patch_embedding.weight": (VISION, 3, 14, 14),
        f"{tower}.embeddings.position_embedding.weight": (577, VISION),
    }
    norms = ["pre_layrnorm", "post_layernorm"]
    for layer in range(VISION_LAYERS):
        place = f"encoder.layers.{layer}"
        norms += [f"{place}.layer_norm1", f"{place}.layer_norm2"]
        for name, shape in {
            **dict.fromkeys([f"self_attn.{one}_proj" for one in ("q", "k", "v", "out")], (VISION, VISION)),
            "mlp.fc1": (VISION_INNER, VISION),
            "mlp.fc2": (VISION, VISION_INNER),
        }.items():
            found |= {f"{tower}.{place}.{name}.weight": shape, f"{tower}.{place}.{name}.bias": shape[:1]}
    return found | {f"{tower}.{norm}.{leaf}": (VISION,) for norm in norms for leaf in ("weight", "bias")}


def write_checkpoint(folder: Path, layers: int, suffix: str, shards: int = 3) -> int:
    """The layout, in `shards` files of about equal size. Returns the bytes of the largest."""
    folder.mkdir(parents=True)
    names = shapes(layers)
    total = sum(torch.Size(shape).numel() for shape in names.values())
    stem = "pytorch_model" if suffix == "bin" else "model"
    weight_map: dict[str, str] = {}
    part: dict[str, torch.Tensor] = {}
    filled, number = 0, 1
    for name, shape in names.items():
        part[name] = torch.full(shape, 0.01, dtype=torch.float16)
        filled += part[name].numel()
        if filled >= total * number / shards or name == list(names)[-1]:
            file = folder / f"{stem}-{number:05}-of-{shards:05}.{suffix}"
            torch.save(part, file) if suffix == "bin" else save_file(part, file)
            weight_map |= dict.fromkeys(part, file.name)
            part, number = {}, number + 1
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "mm_projector_type": "cluster",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": ROWS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return max(file.stat().st_size for file in folder.glob(f"*.{suffix}"))


def write_lora(folder: Path, base: Path, layers: int, rank: int = 128) -> None:
    """The authors' LoRA of the language model."""
    folder.mkdir(parents=True)
    tensors = {}
    for layer in range(layers):
        for name, (out, wide) in LINEAR.items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.full((rank, wide), 0.01, dtype=torch.float16)
            tensors[f"{stem}.lora_B.weight"] = torch.full((out, rank), 0.01, dtype=torch.float16)
    torch.save(tensors, folder / "adapter_model.bin")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": str(base)}
    settings["target_modules"] = sorted({name.split(".")[-1] for name in LINEAR})
    (folder / "adapter_config.json").write_text(json.dumps(settings))


CONVERT = "assert main(['convert', sys.argv[1], '--out', sys.argv[2]]) == 0"
LOAD = "open_checkpoint(sys.argv[1]).model(dtype=torch.bfloat16)"


def measure(what: str, source: Path, out: Path) -> dict[str, float]:
    """Peak bytes and seconds of `what` in a process of its own, of which `imports` before any file is read."""
    script = (
        "import sys, torch; from stllava_eval.cli import main; import stllava_eval.network.convert;"
        "from stllava_eval.network.checkpoint import open_checkpoint;"
        "peak = lambda: 1024 * int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]); before = peak();"
        f"{what}; print('PEAK', before, peak())"
    )
    start = time.perf_counter()
    command = [sys.executable, "-c", script, str(source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, peak = map(int, done.stdout.split("PEAK")[1].split())
    return {"peak_bytes": peak, "bytes_of_imports": before, "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="-", metavar="FILE", help="where to write the figures (default: stdout)")
    parser.add_argument("--layers", type=int, default=4, help="of the language model; a 7B has 32 (default: 4)")
    parser.add_argument("--folder", type=Path, help="where to write the checkpoints (default: a temporary folder)")
    given = parser.parse_args()
    result: dict[str, object] = {"format": 1, "layers": given.layers}
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        work = Path(name)
        for kind in ("bin", "safetensors", "lora"):
            largest = write_checkpoint(work / "full", given.layers, "safetensors" if kind == "safetensors" else "bin")
            source = work / "full"
            if kind == "lora":
                source = work / "stage"
                write_lora(source, work / "full", given.layers)
            found = measure(CONVERT, source, work / "out")
            above = found["peak_bytes"] - largest
            result[kind] = found | {"largest_shard_bytes": largest, "bytes_above_the_largest_shard": above}
            if kind == "bin":
                weights = sum(file.stat().st_size for file in source.glob("*.bin"))
                found = measure(LOAD, source, work / "out")
                above = found["peak_bytes"] - weights - largest
                result["load"] = found | {
                    "weights_bytes": weights,
                    "largest_shard_bytes": largest,
                    "bytes_above_both": above,
                }
            for folder in work.iterdir():
                shutil.rmtree(folder)
    write(result, given.json)


if __name__ == "__main__":
    main()
