"""What a step of stage 1 costs: ours against trl's SFTTrainer as it comes, on the same network, weights and data.

`python benchmarks/sft.py --json FILE [--quick]`. Two shapes. `dialogue`: conversations of four rounds about an image of
their own, as Med-IM's; both train on the same rows. `vqa`: eleven questions about each image, as SLAKE has them; plain
rows hold one question each, as LLaVA-Med fine-tunes, and ours one image with all of its questions.

Both train the LoRA of `set_trainable` with AdamW at one learning rate, in float32 on one thread; trl learns
answers by `assistant_only_loss` through our processor's template. They take turns, step by step, on the same
conversations. `dialogue` and `vqa` are the medians of trl's CPU seconds / ours for a step (batches made, forward,
backward, optimizer), beside their quartiles; `..._memory` is ours / trl's peak resident memory, each in a process of
its own; `..._loss_difference` the largest difference between their losses, and `..._weights` that between their
weights after the last step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from figures import status, write  # noqa: F401  the program of `peak` calls status
from toy_llava import ask, jpeg, write_checkpoint

HERE = Path(__file__).resolve().parent
SHAPES = {"dialogue": (4, 2), "vqa": (11, 1)}  # rounds about an image, images in a step
ANSWERS = ("yes", "no", "the left lung", "a mass in the upper lobe", "CT", "it is normal", "pleural effusion")
RATE = 1e-4


def write_data(folder: Path, shape: str, steps: int, seed: int = 0) -> tuple[Path, Path]:
    """The conversations of `steps` steps, for ours and for trl (in `vqa` a question a row)."""
    rounds, images = SHAPES[shape]
    draw, pixels = random.Random(seed), np.random.default_rng(seed)
    ours, plain = [], []
    for number in range(steps * images):
        (folder / f"{shape}-{number}.jpg").write_bytes(jpeg(pixels))
        turns = [(ask(draw), draw.choice(ANSWERS)) for _ in range(rounds)]
        record = {"id": str(number), "image": f"{shape}-{number}.jpg", "unordered": shape == "vqa"}
        ours.append(record | {"conversations": _turns(turns)})
        for part, some in enumerate([[turn] for turn in turns] if shape == "vqa" else [turns]):
            plain.append(record | {"id": f"{number}-{part}", "unordered": False, "conversations": _turns(some)})
    files = folder / f"{shape}.json", folder / f"{shape}-plain.json"
    for file, records in zip(files, (ours, plain), strict=True):
        file.write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")
    return files


def _turns(rounds: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"from": role, "value": text}
        for question, answer in rounds
        for role, text in (("human", question), ("gpt", answer))
    ]


class Steps:
    """Training steps of a trainer, one at a time."""

    def __init__(self, trainer: Any, rows: int) -> None:
        self.trainer, self.rows = trainer, rows
        trainer.create_optimizer()
        self.batches = iter(trainer.get_train_dataloader())

    def __call__(self) -> float:
        """Loss of the step, in nats a token."""
        trainer = self.trainer
        batches, items = trainer.get_batch_samples(self.batches, self.rows, trainer.args.device)
        loss = sum(trainer.training_step(trainer.model, batch, items).item() for batch in batches)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return loss


def ours(checkpoint: Path, file: Path, shape: str, folder: Path) -> Steps:
    from stllava_train.training.sft import make_trainer, prepare_run

    return Steps(
        make_trainer(prepare_run(_recipe(checkpoint, shape), [file], progress=False), folder, folder / "trace"), 1
    )


def plain(checkpoint: Path, file: Path, shape: str, folder: Path) -> Steps:
    """trl's trainer with its own collator."""
    from datasets import Dataset
    from PIL import Image
    from trl import SFTConfig, SFTTrainer

    from stllava_eval.network.checkpoint import open_checkpoint
    from stllava_train.data.conversations import read_conversations
    from stllava_train.training.parts import set_trainable

    opened = open_checkpoint(str(checkpoint))
    recipe = _recipe(checkpoint, shape)
    conversations, _ = read_conversations(file)
    rows = []
    for one in _in_order(conversations, shape, recipe):
        messages = []
        for question, answer in one.rounds:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "images": [str(one.image)]})
    images = SHAPES[shape][1]
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=1 if shape == "vqa" else images,
        learning_rate=RATE,
        bf16=False,
        activation_checkpointing=False,
        use_cpu=True,
        train_sampling_strategy="sequential",
        assistant_only_loss=True,
        max_length=None,
        weight_decay=0.0,
        dataloader_pin_memory=False,
        report_to=[],
        disable_tqdm=True,
    )
    dataset = Dataset.from_list(rows)
    dataset = dataset.with_transform(
        lambda batch: batch | {"images": [[Image.open(path) for path in paths] for paths in batch["images"]]}
    )
    trainer = SFTTrainer(
        model=set_trainable(opened.model(), recipe),
        args=arguments,
        train_dataset=dataset,
        processing_class=opened.processor(),
    )
    return Steps(trainer, SHAPES[shape][0] if shape == "vqa" else 1)


def _in_order(conversations: Sequence[Any], shape: str, recipe: Any) -> list[Any]:
    """The plain rows as our plan shows their images."""
    from stllava_train.training.parts import plan

    each = SHAPES[shape][0] if shape == "vqa" else 1
    return [
        conversations[place * each + part]
        for place, epoch in plan([[place] for place in range(len(conversations) // each)], recipe)
        if epoch == 0
        for part in range(each)
    ]


def _recipe(checkpoint: Path, shape: str) -> Any:
    from stllava_train.training.recipes import read_recipe

    images = SHAPES[shape][1]
    changes = [
        f"start={checkpoint}",
        "start_vision_tower=null",
        "template=v1",
        "sq_r=0",
        f"batch={images}",
        f"micro_batch={images}",
        "dtype=float32",
        "gradient_checkpointing=false",
        "seed=0",
        *(f"{part}.learning_rate={RATE}" for part in ("language_model", "projector", "vision_tower")),
        "language_model.dropout=0",
        "vision_tower.dropout=0",
    ]
    return read_recipe("stllava-med-7b", changes)


SYSTEMS: dict[str, Callable[[Path, Path, str, Path], Steps]] = {"ours": ours, "plain": plain}


def peak(system: str, checkpoint: Path, file: Path, shape: str) -> int:
    """Bytes of resident memory at most, of two steps in a process of their own.

    VmHWM and not getrusage, which hands the parent's peak on to a child.
    """
    program = (
        "import sys, tempfile, torch; from pathlib import Path\n"
        f"sys.path.insert(0, {str(HERE)!r}); import sft; torch.set_num_threads(1)\n"
        f"step = sft.SYSTEMS[{system!r}](Path({str(checkpoint)!r}), Path({str(file)!r}), {shape!r}, "
        "Path(tempfile.mkdtemp()))\n"
        "step(); step(); print(sft.status('VmHWM'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def measure(shape: str, steps: int, folder: Path) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, "short")
    mine, theirs = write_data(folder, shape, steps + 1)
    runs = {}
    for name, file in (("ours", mine), ("plain", theirs)):
        (folder / f"{shape}-{name}").mkdir()
        runs[name] = SYSTEMS[name](checkpoint, file, shape, folder / f"{shape}-{name}")
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    differences = []
    for number in range(steps + 1):
        losses = {}
        for name in sorted(runs, reverse=bool(number % 2)):
            began = time.process_time()
            losses[name] = runs[name]()
            seconds[name].append(time.process_time() - began)
        differences.append(abs(losses["ours"] - losses["plain"]))
    ratios = [b / a for a, b in zip(seconds["ours"][1:], seconds["plain"][1:], strict=True)]  # the first warms up
    weights = [dict(run.trainer.model.named_parameters()) for run in runs.values()]
    quartiles = statistics.quantiles(ratios if len(ratios) > 1 else ratios * 2, n=4, method="inclusive")
    return {
        shape: quartiles[1],
        f"{shape}_quartiles": [quartiles[0], quartiles[2]],
        f"{shape}_seconds": statistics.median(seconds["ours"][1:]),
        f"{shape}_memory": peak("ours", checkpoint, mine, shape) / peak("plain", checkpoint, theirs, shape),
        f"{shape}_loss_difference": max(differences),
        f"{shape}_weights": max((weights[0][name] - one).abs().max().item() for name, one in weights[1].items()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", required=True, metavar="FILE", help="where the figures go, - for the terminal")
    parser.add_argument("--quick", action="store_true", help="one step of each instead of five")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for shape in SHAPES:
            figures |= measure(shape, 1 if arguments.quick else 5, Path(folder))
    write(figures, arguments.json)


if __name__ == "__main__":
    main()
