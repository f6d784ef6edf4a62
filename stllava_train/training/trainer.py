"""Define what both trainers add to trl's: optimiser groups, losses by step, progress, marks of whole checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from stllava_eval.errors import InputError
from stllava_eval.storage import write_json
from stllava_train.training.parts import part_of
from stllava_train.training.preflight import PreparedRun
from stllava_train.training.processes import check_gpus, first_process, processes, rows_of
from stllava_train.training.recipes import TrainingRecipe
from stllava_train.training.resume import WHOLE, sizes

if TYPE_CHECKING:
    from stllava_train.training.validation import ValidationCallback


class PartsTrainer:
    """What our trainers add to trl's, before whose class this one comes: a learning rate for each part, and a trace.

    Args:
        recipe: How each part is trained.
        trace: `losses.jsonl`, to which every step adds its line.
        validation: Asks validation questions on the way, where the recipe evaluates on some.
        others: Of trl's trainer.

    Raises:
        InputError: The run has validation, and the network is split over devices.
    """

    model: Any  # trl's and transformers' types leave these open
    args: Any
    accelerator: Any
    state: Any
    optimizer: Any
    train: Any
    save_model: Any
    add_callback: Any
    is_fsdp_enabled: bool

    def __init__(
        self, recipe: TrainingRecipe, trace: Path, validation: ValidationCallback | None, **others: Any
    ) -> None:
        self.recipe, self.trace, self.validation = recipe, trace, validation
        super().__init__(**others)
        if validation is not None:
            if self.is_fsdp_enabled:
                raise InputError(
                    "evaluate_on: under FSDP the network is split over several devices and cannot answer. Set it to []."
                )
            self.add_callback(validation)
        for parameter in self.model.parameters():
            if parameter.requires_grad:  # 16 bits would swallow most updates of a small learning rate
                parameter.data = parameter.data.float()
        checkpointing: Any = self.args.gradient_checkpointing_kwargs or {}
        if hasattr(self.model, "peft_config") and not checkpointing.get("use_reentrant"):
            self.model.disable_input_require_grads()  # trl's hooks: gradients would go back through a frozen tower too

    def step_record(self, logs: Mapping[str, float]) -> dict[str, Any]:
        """Return what the trace says of a step besides its number, gradient and learning rates; `loss` is among it."""
        raise NotImplementedError

    def was_stopped(self) -> bool:
        """Return whether the run had been stopped early by its validation before it was interrupted."""
        return self.validation is not None and self.validation.collapsed

    def finalize(self) -> dict[str, Any]:
        """Load the weights of the best step, where the run has validation; return what `run.json` says of it.

        It is called before the weights are saved.
        """
        return self.validation.keep_best(self.model) if self.validation else {}

    def create_optimizer(self, model: Any = None) -> Any:
        """Return AdamW with a parameter group for each part that is trained, the language model's first."""
        if self.optimizer is None:
            by_part: dict[str, list[Any]] = {name: [] for name in self.recipe.parts()}
            for name, parameter in (self.model if model is None else model).named_parameters():
                if parameter.requires_grad:
                    by_part[part_of(name)].append(parameter)
            rates = {name: part.learning_rate for name, part in self.recipe.parts().items()}
            groups = []
            for name, parameters in by_part.items():
                if parameters:
                    groups.append({"params": parameters, "lr": rates[name], "name": name})
            self.optimizer = torch.optim.AdamW(groups, betas=self.recipe.betas, weight_decay=self.recipe.weight_decay)
        return self.optimizer

    def refuse(self, loss: Tensor, records: Sequence[str]) -> None:
        """Raise InputError where the loss is no number; `records` names those of the batch, with their locations."""
        if not torch.isfinite(loss):
            raise InputError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()} for {', '.join(records)}. Look at these "
                "records, or lower the learning rates and train again with another --out."
            )

    def training_step(self, *given: Any, **named: Any) -> Any:
        """Take a step as transformers does, and note the learning rates before the scheduler changes them."""
        self._rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        return super().training_step(*given, **named)  # type: ignore[misc]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a step's line to the trace, and pass it on to the callbacks.

        Raises:
            InputError: The gradient is no number. Its step has been taken, but is never saved.
        """
        if "loss" not in logs:
            return
        record = {"step": self.state.global_step} | self.step_record(logs)
        record["gradient_norm"] = float(logs["grad_norm"])
        if not math.isfinite(record["gradient_norm"]):  # its weights are no numbers now, and would be saved next
            raise InputError(
                f"step {record['step']}: the gradient is {record['gradient_norm']}. Lower the learning rates and train "
                "again with another --out."
            )
        record |= {f"learning_rate_{name}": rate for name, rate in self._rates.items()}
        if self.accelerator.is_main_process:
            with self.trace.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        shown = {key: value for key, value in record.items() if value is not None and key != "step"}
        super().log(shown)  # type: ignore[misc]

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write no model card into the folders to resume from; `card.write_card` writes the run's at its end."""


class _Bar(TrainerCallback):
    """Show steps done, time left and the last step's figures on stderr; `shown` has their keys and short names."""

    def __init__(self, title: str, shown: Mapping[str, str], progress: bool) -> None:
        self.title, self.shown, self.progress = title, shown, progress
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        from tqdm import tqdm

        hidden = None if self.progress and state.is_world_process_zero else True
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.title, unit="step", disable=hidden)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        figures = {shown: f"{logs[name]:.3f}" for name, shown in self.shown.items() if name in (logs or {})}
        self.bar.set_postfix(figures, refresh=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


class _Mark(TrainerCallback):
    """Write `WHOLE` into every folder to resume from, once all processes have written their files."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / WHOLE, {"step": state.global_step, "files": sizes(folder)})


def trainer_arguments(work: PreparedRun, out: Path, wandb: bool) -> dict[str, Any]:
    """Return the arguments of transformers' trainer that both stages have in common.

    Raises:
        InputError: The batch cannot be dealt to the processes, or one process sees several GPUs.
    """
    recipe, world = work.recipe, processes().num_processes
    rows = rows_of(recipe, world)
    check_gpus(world)
    cuda = torch.cuda.is_available()
    return {
        "output_dir": str(out / "checkpoints"),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": recipe.batch // (rows * world),
        "num_train_epochs": 1,  # the plan holds all epochs
        "lr_scheduler_type": "cosine",
        # the first warm step has a rate of 0: a run of one step would learn nothing
        "warmup_steps": min(math.ceil(recipe.warmup * work.steps), work.steps - 1),
        "max_grad_norm": recipe.max_grad_norm,
        "bf16": recipe.dtype == "bfloat16",
        "activation_checkpointing": recipe.gradient_checkpointing,
        "seed": recipe.seed,
        "use_cpu": not cuda,
        "train_sampling_strategy": "sequential",  # the plan is in the order of the steps already
        "dataloader_num_workers": 4 if cuda else 0,
        "dataloader_pin_memory": cuda,
        "remove_unused_columns": False,
        "max_length": None,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # `log` refuses such a step; the filter would hide it
        "save_steps": recipe.save_every,
        "save_total_limit": 2,  # one is whole while the other is written
        # some micro-batches show no image: without it the towers' gradients are waited for, for ever. And it keeps
        # DDP's buckets as they are, so that a resumed run adds in the same order
        "ddp_find_unused_parameters": True,
        "disable_tqdm": True,
        "report_to": ["wandb"] if wandb else [],
    }


def callbacks(out: Path, title: str, shown: Mapping[str, str], progress: bool, step: int) -> list[TrainerCallback]:
    """Return the callbacks of a run that has taken `step` steps: the bar, the marks of whole folders, TensorBoard."""
    callbacks: list[TrainerCallback] = [_Bar(title, shown, progress), _Mark()]
    if first_process():
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        # steps behind the checkpoint that a broken run had taken would be shown twice
        writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)
        callbacks.append(TensorBoardCallback(writer))
    return callbacks


def silence(trainer: Any) -> Any:
    """Return the trainer without the callback of transformers that prints every line."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer
