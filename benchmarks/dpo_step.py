"""What a step of stage 2 costs: ours against trl's DPOTrainer as it comes, on the same network, weights and pairs.

`python benchmarks/dpo_step.py --json FILE [--quick]`. Two pairs a step, 576 image tokens, answers of 60 to 120 tokens;
LoRA on both towers, the projector whole, AdamW, float32 on one thread. trl encodes each image and prompt four times a
pair, for chosen and rejected, policy and reference; ours once for each network. The three take turns, step by step, on
the same pairs, and every one trains its own copy.

`shared_prefix` and `cached_reference` are the medians of trl's CPU seconds / ours for a step (batch made, forward,
backward, optimizer), beside their quartiles: with the reference computed in the step, and read from the disk.
`shared_image` is the former where the two pairs of a step are about one image. `activations` is ours / trl's bytes
that autograd keeps for the backward pass. `max_loss_difference` is the largest between trl's loss and either of ours,
over 20 steps. `reference_seconds` a pair is what the cache costs once.

`--cuda` measures a network of the real size (7B, random weights, bfloat16, gradient checkpointing as in the recipe,
four pairs a step) by the wall clock instead, on one GPU with 80 GB; `memory` is then ours / trl's peak above what lies
there between steps. cuDNN's attention makes a plan for every new shape; `..._without_cudnn` are against trl with it
switched off.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from figures import write
from toy_llava import ask, jpeg, make_tokenizer, write_checkpoint

RATE = 5e-6  # paper
ANSWER_TOKENS = (60, 120)
PAIRS = 2  # in a step


def write_pairs(folder: Path, steps: int, per_image: int, seed: int = 0) -> Path:
    """The pairs of `steps` steps, `per_image` about each image."""
    from stllava_eval.images import decode, pixel_hash

    draw, pixels, tokenizer = random.Random(seed), np.random.default_rng(seed), make_tokenizer()

    def answer() -> str:
        wanted, words = draw.randint(*ANSWER_TOKENS), ask(draw).split()
        while len(tokenizer(" ".join(words)).input_ids) < wanted:
            words += ask(draw).split()
        while len(tokenizer(" ".join(words)).input_ids) > wanted:
            words.pop()
        return " ".join(words)

    rows = []
    for number in range(steps * PAIRS):
        name = f"{number // per_image}.jpg"
        if not (folder / name).exists():
            (folder / name).write_bytes(jpeg(pixels))
        texts = {"question": ask(draw), "chosen": answer(), "rejected": answer()}
        sha256 = pixel_hash(decode((folder / name).read_bytes()))
        rows.append({"id": str(number), "image": name, "image_sha256": sha256, **texts, "margin": None, "judges": []})
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


class Steps:
    """Training steps of a trainer, one at a time."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        trainer.create_optimizer()
        if trainer.args.activation_checkpointing:
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer.current_gradient_accumulation_steps = 1
        self.batches = iter(trainer.get_train_dataloader())

    def __call__(self) -> float:
        """Loss of the step."""
        import torch

        trainer = self.trainer
        (batch,), items = trainer.get_batch_samples(self.batches, 1, trainer.args.device)
        with torch.autocast(
            trainer.args.device.type, torch.bfloat16, enabled=trainer.args.bf16
        ):  # what accelerate does to a whole run
            loss = trainer.training_step(trainer.model, batch, items).item()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return loss


def recipe(checkpoint: Path, reference: str, cuda: bool = False) -> Any:
    from stllava_train.training.recipes import read_dpo_recipe

    rates = [f"{part}.learning_rate={RATE}" for part in ("language_model", "projector", "vision_tower")]
    if cuda:
        own = ["micro_batch=4", "batch=4", "language_model.dropout=0", "vision_tower.dropout=0", *rates]
        return read_dpo_recipe("stllava-med-7b", [f"start={checkpoint}", f"reference={reference}", *own])
    return read_dpo_recipe(
        "stllava-med-7b",
        [
            f"start={checkpoint}",
            f"batch={PAIRS}",
            f"micro_batch={PAIRS}",
            f"reference={reference}",
            "dtype=float32",
            "gradient_checkpointing=false",
            "evaluate_on=[]",
            "language_model.dropout=0",
            "vision_tower.dropout=0",
            *rates,
        ],
    )


def ours(work: Any, folder: Path) -> Steps:
    from stllava_train.training.dpo import make_trainer

    return Steps(make_trainer(work, folder, folder / "trace", progress=False))


@dataclass(frozen=True)
class RealSize:
    """In place of a checkpoint: Vicuna-7B, CLIP-L at 336 px and the prototype extractor, their weights drawn."""

    toy: Any
    sha256: str = "drawn"
    name: str = "drawn"

    @cached_property
    def config(self) -> Any:
        from transformers import CLIPVisionConfig, LlamaConfig

        from stllava_eval.network.configuration import StllavaMedConfig

        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        return StllavaMedConfig(
            vision_config=CLIPVisionConfig(**vision, image_size=336, patch_size=14),
            text_config=LlamaConfig(max_position_embeddings=4096, pad_token_id=0),
            image_token_id=self.toy.config.image_token_id,
            projector_type="prototype",
            num_prototypes=256,
            prototype_iterations=2,
            prototype_in_float32=True,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            image_seq_length=576,
        )

    def processor(self) -> Any:
        return self.toy.processor()

    def model(self, *_: Any) -> Any:
        import torch
        from transformers.initialization import no_init_weights

        from stllava_eval.network.modeling import StllavaMedForConditionalGeneration

        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("cuda"), no_init_weights():
                made: Any = StllavaMedForConditionalGeneration(self.config)
        finally:
            torch.set_default_dtype(torch.float32)
        torch.manual_seed(0)
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, 0, 0.02) if parameter.dim() > 1 else parameter.data.fill_(1.0)
        made.config._attn_implementation = made.config.text_config._attn_implementation = "sdpa"
        return made


def stock(work: Any, folder: Path) -> Steps:
    """trl's trainer with its own collator; the reference is the network without its adapter, as in ours."""
    from datasets import Dataset
    from PIL import Image
    from trl import DPOConfig, DPOTrainer

    from stllava_train.training.dpo import groups
    from stllava_train.training.parts import plan
    from stllava_train.training.run import trained_model

    rows = []
    for place, _ in plan(groups(work.pairs), work.recipe):
        pair = work.pairs[place]
        question = [{"type": "image"}, {"type": "text", "text": pair.question}]
        answers = {name: [{"role": "assistant", "content": getattr(pair, name)}] for name in ("chosen", "rejected")}
        image = str(work.collator.folder / pair.image)
        rows.append({"images": [image], "prompt": [{"role": "user", "content": question}], **answers})
    dataset = Dataset.from_list(rows).with_transform(
        lambda rows: rows | {"images": [[Image.open(file) for file in files] for files in rows["images"]]}
    )
    arguments = DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=work.recipe.micro_batch,
        learning_rate=RATE,
        bf16=work.recipe.dtype == "bfloat16",
        activation_checkpointing=work.recipe.gradient_checkpointing,
        use_cpu=work.recipe.dtype == "float32",
        train_sampling_strategy="sequential",
        max_length=None,
        weight_decay=0.0,
        dataloader_pin_memory=False,
        report_to=[],
        disable_tqdm=True,
        seed=work.recipe.seed,
    )
    trainer = DPOTrainer(
        model=work.checkpoint.model(),
        args=arguments,
        train_dataset=dataset,
        processing_class=work.checkpoint.processor(),
        peft_config=trained_model(work).peft_config["default"],
    )
    return Steps(trainer)


def kept(step: Callable[[], float]) -> int:
    """Bytes that autograd keeps of a step for its backward pass, weights aside; what shares memory counts once."""
    import torch

    weights = {one.untyped_storage().data_ptr() for one in step.trainer.model.parameters()}  # type: ignore[attr-defined]
    found: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(found.values())


def measure(folder: Path, steps: int, per_image: int) -> dict[str, Any]:
    import torch

    from stllava_train.training.dpo import prepare_run

    torch.set_num_threads(1)
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, "long")
    data = folder / str(per_image)
    data.mkdir()
    file = write_pairs(data, steps + 2, per_image)
    live, cached = (
        prepare_run(recipe(checkpoint, reference), file, data, progress=False) for reference in ("live", "cached")
    )
    began = time.process_time()
    runs = {"cached": ours(cached, data / "cached")}
    reference = (time.process_time() - began) / len(cached.pairs)
    runs |= {"shared": ours(live, data / "shared"), "trl": stock(live, data / "trl")}
    starts = {name: one for name, one in runs["shared"].trainer.model.state_dict().items() if "lora_" in name}
    runs["trl"].trainer.model.load_state_dict(starts, strict=False)  # drawn before or after others, so not equal
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    losses: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(steps + 1):
        for name in sorted(runs, key=lambda name: (list(runs).index(name) + number) % len(runs)):
            began = time.process_time()
            losses[name].append(runs[name]())
            seconds[name].append(time.process_time() - began)
    figures: dict[str, Any] = {}
    for figure, name in (("shared_prefix", "shared"), ("cached_reference", "cached")):
        ratios = [b / a for a, b in zip(seconds[name][1:], seconds["trl"][1:], strict=True)]  # the first warms up
        quartiles = statistics.quantiles(ratios if len(ratios) > 1 else ratios * 2, n=4, method="inclusive")
        figures |= {figure: quartiles[1], f"{figure}_quartiles": [quartiles[0], quartiles[2]]}
    bytes_kept = {name: kept(runs[name]) for name in ("trl", "shared")}
    return figures | {
        "activations": bytes_kept["shared"] / bytes_kept["trl"],
        "max_loss_difference": max(
            abs(one - other)
            for name in ("shared", "cached")
            for one, other in zip(losses[name], losses["trl"], strict=True)
        ),
        "steps": steps,
        "trl_seconds": statistics.median(seconds["trl"][1:]),
        "reference_seconds": reference,
    }


def measure_cuda(folder: Path, steps: int, per_image: int) -> dict[str, Any]:
    import dataclasses

    import torch

    from stllava_eval.network.checkpoint import open_checkpoint
    from stllava_train.training.dpo import prepare_run

    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, "long")
    data = folder / str(per_image)
    data.mkdir()
    file = write_pairs(data, 2 * steps + 6, per_image)
    figures: dict[str, Any] = {"device": torch.cuda.get_device_name(), "steps": steps}
    seconds: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    for name, reference, make in (
        ("trl", "live", stock),
        ("trl_without_cudnn", "live", stock),
        ("shared", "live", ours),
        ("cached", "cached", ours),
    ):
        torch.backends.cuda.enable_cudnn_sdp(name != "trl_without_cudnn")
        work = prepare_run(recipe(checkpoint, reference, cuda=True), file, data, progress=False)
        work = dataclasses.replace(work, checkpoint=RealSize(open_checkpoint(str(checkpoint))))
        began = time.perf_counter()
        step = make(work, data / name)
        draw = torch.Generator("cuda").manual_seed(0)
        for weight in (one for key, one in step.trainer.model.named_parameters() if "lora_A" in key):
            torch.nn.init.normal_(weight, 0, 0.01, generator=draw)  # the same for all
        figures[f"{name}_ready_seconds"] = time.perf_counter() - began
        losses[name] = [step(), step()]  # they warm up
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        seconds[name] = []
        for _ in range(steps):
            torch.cuda.synchronize()
            began = time.perf_counter()
            losses[name].append(step())
            torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
        figures[f"{name}_seconds"] = statistics.median(seconds[name])
        figures[f"{name}_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        figures[f"{name}_peak_above_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
        del step
        gc.collect()
        torch.cuda.empty_cache()
    return figures | {
        "shared_prefix": figures["trl_seconds"] / figures["shared_seconds"],
        "shared_prefix_without_cudnn": figures["trl_without_cudnn_seconds"] / figures["shared_seconds"],
        "cached_reference": figures["trl_seconds"] / figures["cached_seconds"],
        "cached_reference_without_cudnn": figures["trl_without_cudnn_seconds"] / figures["cached_seconds"],
        "memory": figures["shared_peak_above_gb"] / figures["trl_peak_above_gb"],
        "losses": losses,
    }


def measure_bfloat16(folder: Path, steps: int) -> dict[str, Any]:
    """CPU seconds of our step in float32 / in bfloat16, in turns on the same pairs."""
    import dataclasses

    import torch

    from stllava_train.training.dpo import prepare_run

    torch.set_num_threads(1)
    write_checkpoint(folder / "checkpoint", "long")
    file = write_pairs(folder, steps + 1, 1)
    seconds: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    losses: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    runs = {}
    for dtype in seconds:
        kind: Any = dataclasses.replace(recipe(folder / "checkpoint", "live"), dtype=dtype)
        runs[dtype] = ours(prepare_run(kind, file, folder, progress=False), folder / dtype)
    for _ in range(steps + 1):
        for dtype, step in runs.items():
            began = time.process_time()
            losses[dtype].append(step())
            seconds[dtype].append(time.process_time() - began)
    medians = {dtype: statistics.median(values[1:]) for dtype, values in seconds.items()}
    return {"bfloat16": medians["float32"] / medians["bfloat16"], "seconds": medians, "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", required=True, metavar="FILE", help="where the figures go, - for the terminal")
    parser.add_argument("--quick", action="store_true", help="two steps instead of twenty")
    parser.add_argument("--bfloat16", action="store_true", help="our step in float32 / in bfloat16, no more")
    parser.add_argument("--cuda", action="store_true", help="a network of the real size, on one GPU")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["STLLAVA_HOME"] = str(Path(folder) / "home")
        if arguments.bfloat16:
            write(measure_bfloat16(Path(folder), 1 if arguments.quick else 3), arguments.json)
            return
        if arguments.cuda:
            apart, together = (measure_cuda(Path(folder), 2 if arguments.quick else 8, each) for each in (1, 4))
            write({"apart": apart, "together": together}, arguments.json)
            return
        figures = measure(Path(folder), 2 if arguments.quick else 20, 1)
        together = measure(Path(folder), 2 if arguments.quick else 5, PAIRS)
    figures["shared_image"] = together["shared_prefix"]
    figures["shared_image_quartiles"] = together["shared_prefix_quartiles"]
    figures["shared_image_activations"] = together["activations"]
    figures["max_loss_difference"] = max(figures["max_loss_difference"], together["max_loss_difference"])
    write(figures, arguments.json)


if __name__ == "__main__":
    main()
