"""Run the training of either stage, and write its folder so that no kill harms it.

A prepared run (`preflight`) -> a trainer of the stage -> checkpoint, losses, curves, manifest, model card.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from stllava_eval.errors import InputError, one_line
from stllava_eval.network.modeling import StllavaMedForConditionalGeneration
from stllava_eval.runs.folder import commit, trained_on, version
from stllava_eval.storage import alone, read_json, whole_file, write_json
from stllava_eval.version import __version__
from stllava_train.training.card import draw_curves, write_card
from stllava_train.training.cost import memory
from stllava_train.training.parts import part_of, set_trainable
from stllava_train.training.preflight import PreparedRun
from stllava_train.training.processes import check_gpus, check_wandb, processes
from stllava_train.training.resume import (
    WHOLE,
    check_folder,
    check_same,
    kept_lines,
    last_whole,
    placed,
    step_of_folder,
)
from stllava_train.training.trainer import PartsTrainer

IGNORE = -100  # torch's `ignore_index` of cross_entropy: a label that is not learnt
Maker = Callable[["Any", Path, Path, bool, bool, int], "PartsTrainer"]  # (work, out, trace, progress, wandb, step)


# --- a run ------------------------------------------------------------------------------------------------------------


def run(work: PreparedRun, make_trainer: Maker, out: Path, resume: bool, progress: bool, wandb: bool) -> None:
    """Train, and write the folder `out`: the checkpoint, `losses.jsonl`, `curves.png`, `run.json`, a model card.

    The same work, seed, number of processes and threads give the same weights, whether or not the run was interrupted.

    Args:
        work: The prepared run.
        make_trainer: Makes the trainer of `work`, which keeps what it resumes from under `out`.
        out: A new folder; with `resume`, that of a run which was interrupted.
        resume: Continue from the last whole checkpoint under `out`.
        progress: Whether to show a bar on stderr.
        wandb: Report to Weights & Biases as well as to TensorBoard.

    Raises:
        InputError: The folder holds another run, or a loss is no number.
    """
    state = processes()
    check_folder(out, resume)
    with alone(out) if state.is_main_process else nullcontext():
        _run(work, make_trainer, out, resume, progress, wandb)


def _run(work: PreparedRun, make_trainer: Maker, out: Path, resume: bool, progress: bool, wandb: bool) -> None:
    """Do the work of `run`, once this process is the only one at the folder."""
    state = processes()
    manifest = _manifest(work)
    if resume:
        check_same(out, manifest)
    last = last_whole(out / "checkpoints")
    trace = out / "losses.jsonl"
    step = (step_of_folder(last) or 0) if last else 0
    kept = kept_lines(trace, step)
    check_gpus(state.num_processes)
    if wandb and state.is_main_process:
        check_wandb()
    state.wait_for_everyone()  # all processes have checked the folder before the first one writes to it
    if state.is_main_process:
        write_json(out / "run.json", manifest)
        with whole_file(trace) as unfinished:
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        for folder in (out / "checkpoints").glob("checkpoint-*"):
            if not (folder / WHOLE).is_file():  # a kill left it; it would count as one of the two that are kept
                shutil.rmtree(folder, ignore_errors=True)
    state.wait_for_everyone()
    with _report_disk_errors(out):
        trainer = make_trainer(work, out, trace, progress, wandb, step)
        if not trainer.was_stopped():
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        state.wait_for_everyone()
        facts = trainer.finalize()
        _save(trainer, work, out)
    if state.is_main_process:
        manifest |= facts
        draw_curves(trace, out / "curves.png")
        write_card(out, manifest=manifest)
        write_json(out / "run.json", manifest | {"finished": True})
    state.wait_for_everyone()


@contextmanager
def _report_disk_errors(out: Path) -> Iterator[None]:
    """Turn the errors of a full disk or an unreadable file, of which each library raises its own, into one line.

    Raises:
        InputError: Such an error came; the message has its reason.
    """
    try:
        yield
    except Exception as error:
        theirs = re.search(r"PytorchStream|inline_container|\(os error \d+\)", str(error))  # torch's, tokenizers'
        if not theirs and not isinstance(error, OSError | SafetensorError | pickle.UnpicklingError):
            raise
        raise InputError(
            f"{out}: its files cannot be written or read ({one_line(error)}). Free some space, or delete a broken "
            f"folder under {out / 'checkpoints'}; --resume continues from the last checkpoint that is complete."
        ) from error


def trained_model(work: PreparedRun) -> Any:
    """Return the network of `work` with what its recipe trains; sets the seed first, which draws the LoRAs."""
    from transformers import set_seed

    recipe = work.recipe
    set_seed(recipe.seed)
    dtype = torch.bfloat16 if recipe.dtype == "bfloat16" else torch.float32
    model: Any = work.checkpoint.model(processes().device if recipe.four_bit else "cpu", dtype, recipe.four_bit)
    # the mask of conversations that share an image is one of True and False, as sdpa takes it; "eager" would add it to
    # the scores as ones and zeros
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    return set_trainable(model, recipe)


def memory_report(work: PreparedRun, tokens: int) -> list[str]:
    """Return lines of a dry run: the weights of each part, the memory for records of `tokens` tokens, validation."""
    recipe = work.recipe
    shapes = parameters(work)
    sums = memory(recipe, shapes, work.checkpoint.config, tokens)
    lines = []
    for name, (held, trained) in shapes.items():
        lines.append(f"{name}: {recipe.parts()[name].train}, {trained:,} of {held:,} weights trained")
    lines.append(
        f"by arithmetic, on one device: {_gib(sums.total)} GiB: {_gib(sums.frozen)} frozen, "
        f"{_gib(sums.trained + sums.copies)} trained with gradients and moments, {_gib(sums.activations)} "
        f"activations, {_gib(sums.head)} head"
    )
    if recipe.evaluate_on:
        lines.append(
            f"validation: at most {recipe.evaluate_questions} questions of {', '.join(recipe.evaluate_on)} each, "
            f"before the first step, every {recipe.evaluate_every} steps and after the last"
        )
    return lines


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f}"


def parameters(work: PreparedRun) -> dict[str, tuple[int, int]]:
    """Return for each part its weights without adapters, and how many are trained, those of adapters included.

    No weight is read: the network is made without storage.
    """
    from accelerate import init_empty_weights

    with init_empty_weights():
        model: Any = StllavaMedForConditionalGeneration(work.checkpoint.config)
        held = dict.fromkeys(work.recipe.parts(), 0)
        for name, parameter in model.named_parameters():
            held[part_of(name)] += parameter.numel()
        model = set_trainable(model, dataclasses.replace(work.recipe, four_bit=False))
    trained = dict.fromkeys(held, 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained[part_of(name)] += parameter.numel()
    return {name: (held[name], trained[name]) for name in held}


def _manifest(work: PreparedRun) -> dict[str, Any]:
    """Return what decides the result, for `run.json`."""
    tower = work.recipe.start_vision_tower
    packages = ("torch", "transformers", "trl", "peft", "accelerate")
    return {
        "format": 1,
        "stage": work.recipe.command,
        "recipe": work.recipe.as_dict(),
        "data": work.data,
        "images_sha256": work.images_sha256,
        "start": {
            "name": work.checkpoint.name,
            "sha256": work.checkpoint.sha256,
            "weights_sha256": work.checkpoint.weights_sha256,  # compared by whoever loads an adapter
            "vision_tower": tower and placed(tower),  # read by whoever loads an adapter
        },
        "trained_on": sorted({*work.sets(), *(trained_on(work.checkpoint.name) or ())}),
        "counts": vars(work.counts),
        "test_images": work.test_images,
        "steps": work.steps,
        "versions": {"stllava-med": __version__} | {name: version(name) for name in packages},
        "commit": commit(),
        "machine": {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "processes": processes().num_processes,
            "threads": torch.get_num_threads(),
        },
    }


def _save(trainer: PartsTrainer, work: PreparedRun, out: Path) -> None:
    """Write the checkpoint, with everything that `stllava_med` needs to load it."""
    if trainer.is_fsdp_enabled:  # where each GPU saves its share, transformers' `save_model` writes no weights at all
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(out))
    if trainer.accelerator.is_main_process:
        if (settings := out / "adapter_config.json").is_file():
            # not before: PEFT would look on the hub for the config.json of a start that is an adapter itself
            write_json(settings, read_json(settings) | {"base_model_name_or_path": placed(work.recipe.start)})
        work.checkpoint.processor().save_pretrained(out)
        (out / "training_args.bin").unlink(missing_ok=True)
