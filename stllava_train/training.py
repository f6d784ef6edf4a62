"""What both stages share: which weights are trained, in which order, and a run's folder that no kill harms."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import TrainerCallback

from stllava_eval import __version__
from stllava_eval.errors import InputError
from stllava_eval.home import alone, local, read_json, refuse_file, whole_file, write_json
from stllava_train.card import fault
from stllava_train.cost import memory, read_layers
from stllava_train.recipe import Training

if TYPE_CHECKING:
    from stllava_eval.network.checkpoint import Checkpoint
    from stllava_train.examination import Examination

IGNORE = -100
Maker = Callable[["Any", Path, Path, bool, bool, int], "PartsTrainer"]  # (work, out, trace, progress, wandb, step)

PATIENCE = timedelta(hours=6)  # for the first process, which looks at every image while the others wait
PATHS = {  # of each part of a recipe in the network
    "language_model": "model.language_model",
    "projector": "model.multi_modal_projector",
    "vision_tower": "model.vision_tower",
}
LANGUAGE_LINEAR = r"self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj"
VISION_LINEAR = r"self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12]"
# what may change when a run goes on: memory and safety, not what is learnt
FREE_TO_CHANGE = {"micro_batch", "gradient_checkpointing", "save_every"}
PER_MICRO_BATCH = {"sft", "aot", "aot_unpaired", "bco_pair"}  # losses of trl that are no mean over pairs
STARTS = {"start", "start_vision_tower"}


# --- the order of work ------------------------------------------------------------------------------------------------


def steps_of(records: int, recipe: Training) -> int:
    """Optimizer steps of a run: every record `epochs` times, the last step full."""
    return math.ceil(records * recipe.epochs / recipe.batch - 1e-9)


def plan(groups: Sequence[Sequence[int]], recipe: Training) -> list[tuple[int, int]]:
    """(place of a record, epoch), in the order in which they are learnt from.

    Each epoch is an order of the groups, drawn from (seed, epoch); the records of a group stay together. Steps are
    full: the last one takes the first records of the epoch that would follow. So every step weighs the same on any
    number of processes, and a run that goes on from a checkpoint sees exactly what it has not seen.

    Args:
        groups: Places of records, each once.
        recipe: Of its `epochs`, `batch` and `seed`.
    """
    due: list[tuple[int, int]] = []
    count = steps_of(sum(map(len, groups)), recipe) * recipe.batch
    epoch = 0
    while len(due) < count:
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch))
        due += [(place, epoch) for group in order.tolist() for place in groups[group]]
        epoch += 1
    return due[:count]


# --- the network, ready to be trained ---------------------------------------------------------------------------------


def open_start(recipe: Training) -> Checkpoint:
    """Open the checkpoint that training starts from.

    Raises:
        InputError: There is none, it cannot be read, or it cannot be loaded in 4 bits and the recipe asks for that.
    """
    from stllava_eval.network.checkpoint import open_checkpoint

    try:
        checkpoint = open_checkpoint(recipe.start, vision_tower=recipe.start_vision_tower)
    except InputError as error:
        if f"{recipe.start}: no such folder" not in str(error):
            raise
        how = " `stllava-train tiny` makes the one that stage 1 of the recipe tiny starts from."
        raise InputError(
            f"start: {error} Name it with start=DIR.{how if recipe.start == 'tiny-start' else ''}"
        ) from error
    if recipe.four_bit:
        checkpoint.check_four_bit()
    return checkpoint


def prepare(model: Any, recipe: Training) -> Any:
    """The network with what the recipe trains, and only that, asking for gradients; held in float32.

    LoRA on language model and vision tower is one PEFT configuration of path patterns, in which the projector is saved
    whole. The tower's layers behind the one that is read get none: no gradient would reach them.
    """
    from peft import LoraConfig, get_peft_model

    model.requires_grad_(False)
    read = "|".join(map(str, range(read_layers(model.config))))
    loras = {name: part for name, part in recipe.parts().items() if part.train == "lora"}
    for name, part in recipe.parts().items():
        if part.train == "full":
            model.get_submodule(PATHS[name]).requires_grad_(True)
    if recipe.language_model.train == "full":
        model.lm_head.requires_grad_(True)
    for name, parameter in model.model.vision_tower.named_parameters():
        if re.match(rf"encoder\.layers\.(?!(?:{read})\.)|post_layernorm", name):
            parameter.requires_grad_(False)
    if not loras:
        return model
    patterns = {
        "language_model": rf".*\.language_model\.layers\.\d+\.(?:{LANGUAGE_LINEAR})",
        "vision_tower": rf".*\.vision_tower\.encoder\.layers\.(?:{read})\.(?:{VISION_LINEAR})",
    }
    first = loras.get("language_model") or loras["vision_tower"]
    vision = {r".*\.vision_tower\..*": loras["vision_tower"]} if "vision_tower" in loras else {}
    configuration = LoraConfig(
        target_modules="|".join(f"(?:{patterns[name]})" for name in loras),
        r=first.rank,
        lora_alpha=first.alpha,
        lora_dropout=first.dropout,
        rank_pattern={pattern: part.rank for pattern, part in vision.items()},
        alpha_pattern={pattern: part.alpha for pattern, part in vision.items()},
        modules_to_save=["multi_modal_projector"] if recipe.projector.train == "full" else None,
        task_type="CAUSAL_LM",
    )
    if recipe.four_bit:
        from peft import prepare_model_for_kbit_training

        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    with warnings.catch_warnings():  # peft 0.21 asks by a name that transformers 5.23 has renamed
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
        model = get_peft_model(model, configuration)
    if "vision_tower" in loras:  # one configuration has one dropout
        dropout = loras["vision_tower"].dropout
        for name, module in model.named_modules():
            if ".vision_tower." in name and name.endswith(".lora_dropout"):
                module["default"] = torch.nn.Dropout(dropout) if dropout else torch.nn.Identity()
    return model


def part_of(parameter: str) -> str:
    """The part that a parameter belongs to, by its name; the head is the language model's."""
    parts = (name for name, path in PATHS.items() if f"{path.rpartition('.')[2]}." in parameter)
    return next(parts, "language_model")


class PartsTrainer:
    """What our trainers add to trl's, before whose class this one stands: a learning rate for each part, and a trace.

    Args:
        recipe: How each part is trained.
        trace: `losses.jsonl`, to which every step adds its line.
        examination: Asks validation questions on the way, where the recipe evaluates on some.
        others: Of trl's trainer.

    Raises:
        InputError: There is an examination, and the network is split over devices.
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

    def __init__(self, recipe: Training, trace: Path, examination: Examination | None, **others: Any) -> None:
        self.recipe, self.trace, self.examination = recipe, trace, examination
        super().__init__(**others)
        if examination is not None:
            if self.is_fsdp_enabled:
                raise InputError(
                    "evaluate_on: under FSDP the network lies on several devices and cannot answer. Set it to []."
                )
            self.add_callback(examination)
        for parameter in self.model.parameters():
            if parameter.requires_grad:  # 16 bits would swallow most updates of a small learning rate
                parameter.data = parameter.data.float()
        checkpointing: Any = self.args.gradient_checkpointing_kwargs or {}
        if hasattr(self.model, "peft_config") and not checkpointing.get("use_reentrant"):
            self.model.disable_input_require_grads()  # trl's hooks: gradients would go back through a frozen tower too

    def step_record(self, logs: Mapping[str, float]) -> dict[str, Any]:
        """What the trace tells of a step besides its number, gradient and learning rates; `loss` is among it."""
        raise NotImplementedError

    def over(self) -> bool:
        """Whether the run had been stopped early when it was broken off."""
        return self.examination is not None and self.examination.collapsed

    def ended(self) -> dict[str, Any]:
        """The best step's weights take the place of the last one's, where there was an examination.

        Called before the weights are saved; what it returns goes into `run.json`.
        """
        return self.examination.keep_best(self.model) if self.examination else {}

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW with a group for each part that is trained, the language model's first."""
        if self.optimizer is None:
            by_part: dict[str, list[Any]] = {name: [] for name in self.recipe.parts()}
            for name, parameter in (self.model if model is None else model).named_parameters():
                if parameter.requires_grad:
                    by_part[part_of(name)].append(parameter)
            rates = {name: part.learning_rate for name, part in self.recipe.parts().items()}
            groups = [{"params": found, "lr": rates[name], "name": name} for name, found in by_part.items() if found]
            self.optimizer = torch.optim.AdamW(groups, betas=self.recipe.betas, weight_decay=self.recipe.weight_decay)
        return self.optimizer

    def refuse(self, loss: Tensor, records: Sequence[str]) -> None:
        """Raises InputError where the loss is no number; `records`: those of the batch, with their places."""
        if not torch.isfinite(loss):
            raise InputError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()} for {', '.join(records)}. Look at these "
                "records, or lower the learning rates and train again with another --out."
            )

    def training_step(self, *given: Any, **named: Any) -> Any:
        """As transformers' own; the learning rates are noted before they move on."""
        self._rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        return super().training_step(*given, **named)  # type: ignore[misc]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A step's line, to the trace and to whatever else listens.

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
        """None in the folders to resume from; the run's own is written at its end."""


class _Bar(TrainerCallback):
    """Steps done, time left, and of the last step what is `shown`: key of the trace -> its short name; on stderr."""

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
    """`WHOLE` in every folder to resume from, once all processes have written theirs."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / WHOLE, {"step": state.global_step, "files": _sizes(folder)})


WHOLE = "whole.json"  # the last file of a folder to resume from


def last_whole(folder: Path) -> Path | None:
    """The latest of the folders `checkpoint-N` in `folder` that was written to its end.

    Raises:
        InputError: A file in it is not as it was written: without its optimizer's state, training would go another way.
    """
    whole = [file.parent for file in folder.glob(f"checkpoint-*/{WHOLE}") if _step(file.parent) is not None]
    last = max(whole, key=lambda one: _step(one) or 0, default=None)
    if last is not None:
        try:
            written = read_json(last / WHOLE)["files"]
            found = _sizes(last)
            changed = sorted(name for name, size in written.items() if found.get(name) != size)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            changed = [WHOLE]
        if changed:
            raise InputError(
                f"{last}: {', '.join(changed)}: not as the run wrote it. Put it back, or delete this folder: --resume "
                "then goes on from the one before it, or begins again."
            )
    return last


def _step(folder: Path) -> int | None:
    """The N of a folder `checkpoint-N`."""
    number = folder.name.rpartition("-")[2]
    return int(number) if re.fullmatch(r"[0-9]{1,15}", number) else None


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file, but of the one that lists them."""
    return {
        file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file() and file.name != WHOLE
    }


# --- a run ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """A run before its first step, as far as both stages have it in common."""

    recipe: Training
    checkpoint: Checkpoint  # to start from
    counts: Any  # what the data comes to: a dataclass of whole numbers
    steps: int
    data: list[dict[str, Any]]  # file, sha256 and records of each
    images_sha256: str  # of the decoded images; empty on all processes but the first, which looks at them
    test_images: int  # records whose image is in a prepared test split

    def sets(self) -> set[str]:
        """Data sets that the records come from, as far as they are known; those of `start` not among them."""
        return set()


def first_process() -> bool:
    """Of several, the one that speaks and writes. RANK alone says nothing: a batch system may have set it."""
    return processes().is_main_process


def processes() -> Any:
    """accelerate's `PartialState`.

    Raises:
        InputError: The environment speaks of several processes, and no launcher started them.
    """
    from accelerate import PartialState

    from stllava_eval.errors import one_line

    try:
        return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    except ValueError as error:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        given = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
        raise InputError(
            f"{given} in the environment: {one_line(error)}. Start several processes with torchrun, or unset these."
        ) from error


def _check_wandb() -> None:
    """Log in before any work.

    Raises:
        InputError: wandb is not installed, or has no key.
    """
    from stllava_eval.errors import one_line

    try:
        import wandb

        wandb.login()
    except ImportError as error:
        raise InputError("--wandb: wandb is not installed. Run `pip install wandb`, or leave it out.") from error
    except wandb.Error as error:
        raise InputError(f"--wandb: {one_line(error)}. Set WANDB_MODE=offline, or leave it out.") from error


def run(work: Work, make_trainer: Maker, out: Path, resume: bool, progress: bool, wandb: bool) -> None:
    """Train, and write the folder `out`: the checkpoint, `losses.jsonl`, `curves.png`, `run.json`, a model card.

    The same work, seed, number of processes and threads give the same weights, whether or not the run was broken off.

    Args:
        work: What is to be done.
        make_trainer: Makes the trainer of `work`, which keeps what it resumes from under `out`.
        out: A new folder; with `resume`, that of a run which was broken off.
        resume: Go on from the last whole checkpoint under `out`.
        progress: Whether to show a bar on stderr.
        wandb: Report to Weights & Biases as well as to TensorBoard.

    Raises:
        InputError: The folder holds another run, or a loss is no number.
    """
    state = processes()
    check_folder(out, resume)
    with alone(out) if state.is_main_process else nullcontext():
        _run(work, make_trainer, out, resume, progress, wandb)


def _run(work: Work, make_trainer: Maker, out: Path, resume: bool, progress: bool, wandb: bool) -> None:
    state = processes()
    manifest = _manifest(work)
    if resume:
        _check_same(out, manifest)
    last = last_whole(out / "checkpoints")
    trace = out / "losses.jsonl"
    step = (_step(last) or 0) if last else 0
    kept = _kept(trace, step)
    _check_gpus(state.num_processes)
    if wandb and state.is_main_process:
        _check_wandb()
    state.wait_for_everyone()  # all have looked before one writes
    if state.is_main_process:
        write_json(out / "run.json", manifest)
        with whole_file(trace) as unfinished:
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        for folder in (out / "checkpoints").glob("checkpoint-*"):
            if not (folder / WHOLE).is_file():  # a kill left it; it would count as one of the two that are kept
                shutil.rmtree(folder, ignore_errors=True)
    state.wait_for_everyone()
    with _disk_told(out):
        trainer = make_trainer(work, out, trace, progress, wandb, step)
        if not trainer.over():
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        state.wait_for_everyone()
        facts = trainer.ended()
        _save(trainer, work, out)
    if state.is_main_process:
        from stllava_train.card import draw_curves, write_card

        manifest |= facts
        draw_curves(trace, out / "curves.png")
        write_card(out, manifest=manifest)
        write_json(out / "run.json", manifest | {"finished": True})
    state.wait_for_everyone()


@contextmanager
def _disk_told(out: Path) -> Iterator[None]:
    """A full disk, or a file that cannot be read, as one line: transformers, torch and safetensors raise their own.

    Raises:
        InputError: With the reason.
    """
    from stllava_eval.errors import one_line

    try:
        yield
    except Exception as error:
        theirs = re.search(r"PytorchStream|inline_container|\(os error \d+\)", str(error))  # torch's, tokenizers'
        if not theirs and not isinstance(error, OSError | SafetensorError | pickle.UnpicklingError):
            raise
        raise InputError(
            f"{out}: its files cannot be written or read ({one_line(error)}). Free some space, or delete a broken "
            f"folder under {out / 'checkpoints'}; --resume goes on from the last whole one."
        ) from error


def rows_of(recipe: Training, processes: int) -> int:
    """Conversations that one process computes at once.

    Raises:
        InputError: The batch cannot be dealt to the processes.
    """
    rows = min(recipe.micro_batch, recipe.batch // processes)
    if rows == 0 or recipe.batch % (rows * processes):
        raise InputError(
            f"batch {recipe.batch}: it cannot be dealt to {processes} process{'es' * (processes != 1)} of micro_batch "
            f"{recipe.micro_batch}. Choose a batch that is a multiple of both."
        )
    return rows


def _check_gpus(processes: int) -> None:
    if processes == 1 and (gpus := torch.cuda.device_count()) > 1:
        raise InputError(
            f"{gpus} GPUs are visible to one process. Start one for each (accelerate launch, see docs/train.md), or "
            "show it a single one: CUDA_VISIBLE_DEVICES=0."
        )


def arguments(work: Work, out: Path, wandb: bool) -> dict[str, Any]:
    """What both stages tell transformers' trainer.

    Raises:
        InputError: The batch cannot be dealt to the processes, or one process sees several GPUs.
    """
    recipe, world = work.recipe, processes().num_processes
    rows = rows_of(recipe, world)
    _check_gpus(world)
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
        "train_sampling_strategy": "sequential",
        "dataloader_num_workers": 4 if cuda else 0,
        "dataloader_pin_memory": cuda,
        "remove_unused_columns": False,
        "max_length": None,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_steps": recipe.save_every,
        "save_total_limit": 2,  # one is whole while the other is written
        # some micro-batches show no image: without it the towers' gradients are waited for, for ever. And it keeps
        # DDP's buckets as they are, so that a run that goes on adds in the same order
        "ddp_find_unused_parameters": True,
        "disable_tqdm": True,
        "report_to": ["wandb"] if wandb else [],
    }


def trained_model(work: Work) -> Any:
    """The network of `work` with what its recipe trains; the seed is set before."""
    from transformers import set_seed

    recipe = work.recipe
    set_seed(recipe.seed)
    dtype = torch.bfloat16 if recipe.dtype == "bfloat16" else torch.float32
    model: Any = work.checkpoint.model(processes().device if recipe.four_bit else "cpu", dtype, recipe.four_bit)
    # the mask of conversations that share an image is one of True and False, which "eager" would add to the scores
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    return prepare(model, recipe)


def listeners(out: Path, title: str, shown: Mapping[str, str], progress: bool, step: int) -> list[TrainerCallback]:
    """The bar, the marks on folders to resume from, and TensorBoard of a run that has taken `step` steps before."""
    callbacks: list[TrainerCallback] = [_Bar(title, shown, progress), _Mark()]
    if first_process():
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        # steps behind the checkpoint that a broken run had taken would be shown twice
        writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)
        callbacks.append(TensorBoardCallback(writer))
    return callbacks


def quiet(trainer: Any) -> Any:
    """The trainer, without its own printer of every line."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def needs(work: Work, tokens: int) -> list[str]:
    """Lines of a dry run: the weights of each part, the memory for records of at most `tokens` tokens, validation."""
    recipe = work.recipe
    shapes = parameters(work)
    sums = memory(recipe, shapes, work.checkpoint.config, tokens)
    return [
        *(
            f"{name}: {recipe.parts()[name].train}, {trained:,} of {held:,} weights trained"
            for name, (held, trained) in shapes.items()
        ),
        f"by arithmetic, on one device: {_gib(sums.total)} GiB: {_gib(sums.frozen)} frozen, "
        f"{_gib(sums.trained + sums.copies)} trained with gradients and moments, {_gib(sums.activations)} "
        f"activations, {_gib(sums.head)} head",
        *(
            [
                f"validation: at most {recipe.evaluate_questions} questions of {', '.join(recipe.evaluate_on)} each, "
                f"before the first step, every {recipe.evaluate_every} steps and after the last"
            ]
            if recipe.evaluate_on
            else []
        ),
    ]


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f}"


def parameters(work: Work) -> dict[str, tuple[int, int]]:
    """For each part: its weights without adapters, and how many are trained, adapters' included. No weight is read."""
    from accelerate import init_empty_weights

    from stllava_eval.network import StllavaMedForConditionalGeneration

    with init_empty_weights():
        model: Any = StllavaMedForConditionalGeneration(work.checkpoint.config)
        held = dict.fromkeys(work.recipe.parts(), 0)
        for name, parameter in model.named_parameters():
            held[part_of(name)] += parameter.numel()
        model = prepare(model, dataclasses.replace(work.recipe, four_bit=False))
    trained = dict.fromkeys(held, 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained[part_of(name)] += parameter.numel()
    return {name: (held[name], trained[name]) for name in held}


def _manifest(work: Work) -> dict[str, Any]:
    """What decides the result, for `run.json`."""
    from stllava_eval.runs import commit, trained_on, version

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
            "vision_tower": tower and _placed(tower),  # read by whoever loads an adapter
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


def check_folder(out: Path, resume: bool) -> None:
    """Look at a run's folder before any work.

    Raises:
        InputError: It holds something; with `resume`, no run.
    """
    if resume:
        _run_in(out)
        return
    refuse_file(out, "--out")
    if out.is_dir() and any(out.iterdir()):
        if (out / "run.json").is_file():
            raise InputError(f"{out}: it is not empty. Pass --resume to go on with the run in it, or another folder.")
        raise InputError(f"{out}: it is not empty and holds no run. Choose another --out.")


def _run_in(out: Path) -> dict[str, Any]:
    """What decided the result of the run in `out`.

    Raises:
        InputError: There is none.
    """
    try:
        before = read_json(out / "run.json")
        return {
            "recipe": dict(before["recipe"]),
            "data": [_known_as(one) for one in before["data"]],
            "images": before["images_sha256"],
            "start": before["start"]["sha256"],
            "finished": before.get("finished"),
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{out}: no run to go on with ({fault(error)}). Leave --resume out, or name the folder of a run."
        ) from error


def _known_as(data: Mapping[str, Any]) -> str:
    """The hashes of a data file; see `columns.data_hash`."""
    return " ".join([data["sha256"], *([f"columns {data['columns']}"] if "columns" in data else [])])


def _check_same(out: Path, manifest: Mapping[str, Any]) -> None:
    """Whether the run in `out` is this one.

    Raises:
        InputError: It is another, or finished.
    """
    before = _run_in(out)
    # a folder can be named in several ways: what counts is what lies in it
    free = FREE_TO_CHANGE | (STARTS if manifest["start"]["sha256"] == before["start"] else set())
    if set(manifest["recipe"].get("loss", ())) & PER_MICRO_BATCH:
        free = free - {"micro_batch"}
    recipe = {key: value for key, value in manifest["recipe"].items() if key not in free}
    for name, now, then in (
        *((f"recipe: {key}", value, before["recipe"].get(key)) for key, value in recipe.items()),
        ("data", [_known_as(one) for one in manifest["data"]], before["data"]),
        ("images", manifest["images_sha256"] or before["images"], before["images"]),  # the first process knows
        ("start", manifest["start"]["sha256"], before["start"]),
    ):
        if now != then:
            raise InputError(
                f"{out}: {name}: the run in it has {then}, this call {now}. Call it as before, or without --resume "
                "and with another --out."
            )
    if before["finished"]:  # no file tells it: PEFT writes a README.md of its own before any weight
        raise InputError(f"{out}: the run in it is finished. Nothing is left to do.")


def _kept(trace: Path, step: int) -> list[dict[str, Any]]:
    """The lines of the trace up to `step`; those behind it will be computed again.

    Raises:
        InputError: One is missing.
    """
    kept = [line for line in read_trace(trace) if line["step"] <= step] if step else []
    for number in range(1, step + 1):
        if number > len(kept) or kept[number - 1]["step"] != number:
            raise InputError(
                f"{trace}:{number}: no losses of step {number}, and the run goes on from step {step}. Put the file "
                "back, or train again with another --out."
            )
    return kept


def read_trace(trace: Path) -> list[dict[str, Any]]:
    """The steps of `losses.jsonl`, up to a line that is none: a kill cuts the last one short."""
    lines = []
    try:
        for line in trace.read_bytes().splitlines():
            made = json.loads(line)
            if not isinstance(made, dict) or not isinstance(made.get("step"), int):
                break
            lines.append(made)
    except (OSError, ValueError, RecursionError):
        pass
    return lines


def _placed(source: str) -> str:
    """A folder's full path, so that it is found from wherever; a hub id as it is."""
    folder = local(source)
    return source if folder is None else str(folder.resolve())


def _save(trainer: PartsTrainer, work: Work, out: Path) -> None:
    """The checkpoint, with everything that `stllava_med` needs to load it."""
    if trainer.is_fsdp_enabled:  # where each GPU saves its share, transformers' `save_model` writes no weights at all
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(out))
    if trainer.accelerator.is_main_process:
        if (settings := out / "adapter_config.json").is_file():
            # not before: PEFT would look on the hub for the config.json of a start that is an adapter itself
            write_json(settings, read_json(settings) | {"base_model_name_or_path": _placed(work.recipe.start)})
        work.checkpoint.processor().save_pretrained(out)
        (out / "training_args.bin").unlink(missing_ok=True)
