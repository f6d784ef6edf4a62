"""Preference pairs -> a checkpoint that prefers the chosen answers: stage 2, on trl's DPOTrainer.

With y_w the chosen answer, y_l the rejected one, x the image and the question, DPO minimises (arXiv:2305.18290, eq. 7;
eq. 1 of the STLLaVA-Med paper, arXiv:2406.19973, is meant to be the same, with a bracket misplaced)

    -log sigmoid(beta * (log pi(y_w|x) - log ref(y_w|x)) - beta * (log pi(y_l|x) - log ref(y_l|x)))

where log pi(y|x) is the sum over the tokens of y. LD-DPO (arXiv:2409.06411) multiplies by alpha the terms of that sum
behind the length of the shorter answer. ODPO (arXiv:2402.10571) subtracts an offset inside the sigmoid.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from trl import DPOConfig, DPOTrainer

from stllava_eval.errors import InputError
from stllava_eval.storage import home
from stllava_train.data.columns import data_hash
from stllava_train.data.conversations import image_file
from stllava_train.data.leaks import ImageRef
from stllava_train.preferences.pair_layouts import pairs_to_learn
from stllava_train.preferences.pairs import Pair, weights_in_words
from stllava_train.resumable import ResumableJsonl
from stllava_train.training.parts import plan, steps_of
from stllava_train.training.preflight import PreparedRun, refuse_test_images, screen_run, start_of, validation_of
from stllava_train.training.processes import processes, rows_of
from stllava_train.training.recipes import OFFSET, DpoRecipe
from stllava_train.training.reference import (
    CHUNK,
    from_all,
    from_main,
    log_probabilities,
    reference_key,
    trl_behind_transformers,
)
from stllava_train.training.run import IGNORE, memory_report, run, trained_model
from stllava_train.training.trainer import PartsTrainer, callbacks, silence, trainer_arguments
from stllava_train.training.trees import MIXED, DpoCollator, share_prefixes, tree
from stllava_train.training.validation import ValidationCallback

# --- the loss ---------------------------------------------------------------------------------------------------------


class DpoTrainer(PartsTrainer, DPOTrainer):
    """trl's DPOTrainer on batches of `DpoCollator`, with the reference's log-probabilities on disk, and a trace.

    The reference is the whole network that training starts from, its vision tower and projector included. (The
    authors' took image features of the policy's projector, which moves: `llava_dpo_trainer.py`, line 353.)
    """

    recipe: DpoRecipe

    def __init__(self, work: PreparedDpo, trace: Path, validation: ValidationCallback | None, **others: Any) -> None:
        self.pairs, self.collator = work.pairs, work.collator
        super().__init__(work.recipe, trace, validation, **others)
        if "ref" in getattr(self.model, "peft_config", {}):  # trl's copy of an adapter that adds nothing yet
            self.model.delete_adapter("ref")  # the network without adapters is the reference, and costs less
        self._sums = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        if work.recipe.reference == "cached":
            self.precompute_ref_logps = True
            self.collator.reference = self._reference(work)

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset  # the collator tokenises

    def _precompute_ref_logps(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset  # trl's would be for texts alone

    def _reference(self, work: PreparedDpo) -> dict[int, tuple[float, float]]:
        """Return the reference's log-probabilities of the chosen and the rejected answer, in nats, by index of pair.

        Every pair is computed by itself, so that its figures do not depend on the other pairs, and written to
        `$STLLAVA_HOME/reference`, where runs with the same start find them, whatever their pairs, losses and rates.
        """
        recipe, state = work.recipe, processes()
        decided_by = {
            "stage": "reference",
            "start": work.checkpoint.sha256,
            "template": recipe.template,
            "dtype": recipe.dtype,
            "four_bit": recipe.four_bit,
            "ld_alpha": recipe.ld_alpha,
            "device": "cpu" if state.device.type == "cpu" else torch.cuda.get_device_name(),
            "torch": torch.__version__,
        }
        name = hashlib.sha256(json.dumps(decided_by).encode()).hexdigest()[:32]
        keys = [reference_key(pair, recipe.ld_alpha) for pair in work.pairs]
        file = home() / "reference" / f"{name}.jsonl"
        with (
            ResumableJsonl(file, lambda row: row["id"], decided_by, wait=True)
            if state.is_main_process
            else nullcontext() as ledger
        ):
            known = {key: log_probabilities(row, file) for key, row in ledger.rows.items()} if ledger else {}
            known = from_main(known)
            self._add_missing(known, keys, ledger)
        return {index: known[key] for index, key in enumerate(keys)}

    def _add_missing(
        self, known: dict[str, tuple[float, float]], keys: Sequence[str], ledger: ResumableJsonl | None
    ) -> None:
        """Compute what is not known, every process its share; the first process writes it to the file."""
        state = processes()
        due = list({key: index for index, key in enumerate(keys) if key not in known}.values())
        hidden = None if state.is_main_process else True
        size = CHUNK * state.num_processes
        with tqdm(total=len(due), desc="reference", unit="pair", disable=hidden, file=sys.stderr) as bar:
            for begin in range(0, len(due), size):
                chunk = due[begin : begin + size]
                own_rows: list[dict[str, Any]] = []
                for index in chunk[state.process_index :: state.num_processes]:
                    batch = self._prepare_inputs(self.collator([{"place": index}]))
                    for key in ("pairs", "weights", "offsets"):  # trl knows of none of them
                        batch.pop(key, None)
                    with trl_behind_transformers():
                        chosen, rejected = self.compute_ref_log_probs(self.ref_model or self.model, batch)
                    own_rows.append({"id": keys[index], "chosen": chosen.item(), "rejected": rejected.item()})
                rows: list[dict[str, Any]] = []
                for of_process in from_all(own_rows):
                    rows += of_process
                if ledger is not None:
                    ledger.add(rows)
                known |= {row["id"]: (row["chosen"], row["rejected"]) for row in rows}
                bar.update(len(chunk))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return trl's loss, in nats; of pairs with weights the mean of weight times loss; or the loss of ODPO.

        Raises:
            InputError: The loss is no number; the message names the pairs of the batch.
        """
        indexes = inputs.pop("pairs").tolist()
        weights, offsets = inputs.pop("weights", None), inputs.pop("offsets", None)
        with trl_behind_transformers():
            if weights is None and offsets is None:
                loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            else:
                loss = self._pairwise_loss(model, inputs, weights, offsets)
        self.refuse(loss, [f"pair {self.pairs[index].id}" for index in indexes])
        with torch.no_grad():
            chosen, rejected = inputs["completion_mask"].sum(1).chunk(2)  # (2B, width) -> (B,) tokens of each answer
            tokens = [chosen.sum(), rejected.sum(), torch.tensor(len(indexes), device=chosen.device)]
            self._sums += torch.stack([loss.detach() * len(indexes), *tokens]).to(self._sums)
        return loss

    def _pairwise_loss(
        self, model: Any, inputs: dict[str, Any], weights: Tensor | None, offsets: Tensor | None
    ) -> Tensor:
        """Return the mean over the batch of weight times loss, where the loss is trl's of one pair, or ODPO's.

        trl takes the mean of the losses inside its method. So the network computes the batch once, and the method is
        called with each pair's rows of what came out: all of trl's losses and figures hold. With offsets its figures
        hold, and the loss is -log sigmoid(beta * (log-ratio of the chosen - log-ratio of the rejected) - offset): that
        of ODPO (arXiv:2402.10571; rycolab/odpo, `trainers.py`, `preference_loss`).
        """
        inputs = dict(inputs)
        if "ref_chosen_logps" not in inputs:
            reference = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = reference
        scored = ("input_ids", "attention_mask", "completion_mask")
        known = ("ref_chosen_logps", "ref_rejected_logps")
        read = {key: value for key, value in inputs.items() if key not in ("completion_mask", *known)}
        # (2B, width); -100 where nothing is scored: padding, and the prompt's last token
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE)
        outputs = model(**read, use_cache=False, labels=labels, fused_lm_head=True)
        whole = {key: value for key, value in vars(outputs).items() if isinstance(value, Tensor) and value.dim() == 2}
        pairs = len(inputs["ref_chosen_logps"])
        before, self.precompute_ref_logps = self.precompute_ref_logps, True
        losses = []
        for number in range(pairs):
            rows = [number, pairs + number]  # the chosen and the rejected answer of a pair, a batch of 2 rows to trl
            of_pair = {key: inputs[key][rows] for key in scored} | {key: inputs[key][[number]] for key in known}
            outputs_of_pair = SimpleNamespace(**{key: value[rows] for key, value in whole.items()})
            losses.append(super().compute_loss(lambda made=outputs_of_pair, **_: made, of_pair))
        self.precompute_ref_logps = before
        each = torch.stack(losses)  # (B,)
        if offsets is not None:
            # (2B, width - 1): log-probabilities of the tokens behind the first, 0 where nothing is scored -> (2B,) sums
            logps = outputs.log_probs[:, 1 - inputs["input_ids"].shape[1] :].sum(1)
            chosen, rejected = logps.chunk(2)  # (B,) each
            # the difference of log-ratios in eq. 7 of DPO (arXiv:2305.18290), less ODPO's offset (arXiv:2402.10571)
            difference = chosen - inputs["ref_chosen_logps"] - (rejected - inputs["ref_rejected_logps"])
            logits = self.beta * difference - offsets.to(difference)
            each = -self.loss_weights[0] * torch.nn.functional.logsigmoid(logits)
        return (each if weights is None else each * weights.to(each)).mean()

    def step_record(self, logs: Mapping[str, float]) -> dict[str, Any]:
        """Return what trl measures of a step: means over its pairs, log-probabilities in nats per answer.

        `kl` is the mean over both answers of the reference's log-probability less the policy's: an estimate of
        KL(reference || policy) per answer, as the reference wrote them (at the temperature of the candidates).
        """
        loss, chosen, rejected, pairs = self.accelerator.reduce(self._sums, "sum").tolist()
        self._sums.zero_()
        means = {key: sum(values) / len(values) for key, values in self._metrics["train"].items()}
        self._metrics["train"].clear()
        rewards = means["rewards/chosen"], means["rewards/rejected"]
        return {
            "loss": loss / pairs,
            "chosen_logps": means["logps/chosen"],
            "rejected_logps": means["logps/rejected"],
            "chosen_reward": rewards[0],
            "rejected_reward": rewards[1],
            "margin": means["rewards/margins"],
            "accuracy": means["rewards/accuracies"],
            "kl": -sum(rewards) / (2 * self.beta),  # a reward is beta * (log pi - log ref)
            "chosen_tokens": chosen / pairs,
            "rejected_tokens": rejected / pairs,
        }


def offsets_of(file: Path, pairs: Sequence[Pair]) -> list[float]:
    """Return the offset of each pair in ODPO's loss: the natural logarithm of its margin, which is in points of 10.

    The paper's offset (arXiv:2402.10571) is alpha * log(score of the chosen - score of the rejected); alpha is 1 in
    its code.

    Raises:
        InputError: A pair has no margin, or none above 0.
    """
    for line, pair in enumerate(pairs, 1):
        if not pair.margin:
            what = "no margin" if pair.margin is None else "a margin of 0"
            raise InputError(
                f"{file}:{line}: {pair.id}: it has {what}, and the loss {OFFSET} takes its logarithm. Leave the pair "
                "out, or choose another loss, such as loss=[sigmoid]."
            )
    return [math.log(pair.margin or 1.0) for pair in pairs]


# --- a run ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DpoCounts:
    """The size of a file of pairs, in tokens; `shared` counts those that the trees of all its images hold."""

    pairs: int
    images: int
    tokens: int
    shared: int
    longest: int  # of one answer behind its prompt
    longest_tree: int  # of a pair; the sum of both where its answers are about two images
    chosen_tokens: int
    rejected_tokens: int
    chosen_longer: int
    contrasts: int  # pairs whose answers are about two images


@dataclass(frozen=True)
class PreparedDpo(PreparedRun):
    """What stage 2 learns from."""

    recipe: DpoRecipe
    counts: DpoCounts
    pairs: Sequence[Pair]
    collator: DpoCollator


def prepare_run(
    recipe: DpoRecipe,
    file: Path,
    images: Path,
    allow_test_images: bool = False,
    progress: bool = True,
) -> PreparedDpo:
    """Read and check everything that a run needs; no weights yet.

    Args:
        recipe: How to train.
        file: What `stllava-train pairs` wrote.
        images: The folder that the pairs' images are relative to.
        allow_test_images: Train on images of prepared test splits too. They are counted in the run's manifest.
        progress: Whether to show bars on stderr.

    Raises:
        InputError: A pair is none, is too long, or shows a test image or other pixels than it was made of; or recipe,
            checkpoint and the number of processes do not fit together.
    """
    rows_of(recipe, processes().num_processes)
    pairs = pairs_to_learn(file, images, progress)
    data = [{"file": file.name, **data_hash(file), "pairs": len(pairs)}]
    validation = validation_of(recipe, len(pairs))
    lines = [f"{file}:{line}" for line, _ in enumerate(pairs, 1)]
    shown = images_shown(pairs, lines, images)
    check_losses(recipe, pairs, file)
    offsets = offsets_of(file, pairs) if OFFSET in recipe.loss else []
    start = start_of(recipe)
    collator = DpoCollator(pairs, images, start.processor, start.encoder, start.padding)
    collator.offsets = offsets
    counts = count(collator, recipe, lines)
    screened = screen_run([image.record for image in shown], validation, "pair", progress)
    check_pixels(shown, screened.pixels)
    test_images = refuse_test_images(screened, f"{len(pairs)} pairs", allow_test_images)
    return PreparedDpo(
        recipe=recipe,
        checkpoint=start.checkpoint,
        counts=counts,
        steps=steps_of(len(pairs), recipe),
        data=data,
        images_sha256=screened.sha256,
        test_images=test_images,
        pairs=pairs,
        collator=collator,
    )


@dataclass(frozen=True)
class ShownImage:
    """An image of a pair, its name, and the hash of the pixels that it must have."""

    record: ImageRef
    name: str
    sha256: str


def images_shown(pairs: Sequence[Pair], lines: Sequence[str], folder: Path) -> list[ShownImage]:
    """Return the images of each pair, one or two.

    Args:
        pairs: The pairs.
        lines: FILE:LINE of each pair.
        folder: The folder that image names are relative to.

    Raises:
        InputError: An image is not in the folder.
    """
    shown = []
    for line, pair in zip(lines, pairs, strict=True):
        for name, sha256 in pair.pictures.items():
            if (image := image_file(folder, name)) is None:
                name = name if len(name) < 256 else f"{name[:60]}..."
                raise InputError(
                    f"{line}: {pair.id}: its image {name} is not in {folder}. Pass their folder with --images."
                )
            shown.append(ShownImage(ImageRef(line, pair.id, image), name, sha256))
    return shown


def check_losses(recipe: DpoRecipe, pairs: Sequence[Pair], file: Path) -> None:
    """Raise InputError where pairs have weights and a loss of the recipe has no value for one pair by itself."""
    if pairs[0].weight is not None and (mixed := [name for name in recipe.loss if name in MIXED]):
        raise InputError(
            f"{file}: its pairs have weights, and the loss {mixed[0]} is made of several pairs at once. Choose another "
            "loss, such as loss=[sigmoid], or take the weights out."
        )


def check_pixels(shown: Sequence[ShownImage], pixels: Mapping[Path, str]) -> None:
    """Raise InputError where an image has other pixels than the one that was asked about.

    Args:
        shown: As `images_shown` returns it.
        pixels: The `pixel_hash` of each image that was decoded; on all processes but the first there are none.
    """
    for image in shown:
        pair = image.record
        if pixels.get(pair.image, image.sha256) != image.sha256:
            raise InputError(
                f"{pair.location}: {pair.id}: its image {image.name} has other pixels than the one that was asked "
                "about. Put that one back, or ask and judge again."
            )


def count(collator: DpoCollator, recipe: DpoRecipe, locations: Sequence[str]) -> DpoCounts:
    """Return the size of the pairs, tokenised; `locations` has FILE:LINE of each.

    Raises:
        InputError: An answer with its prompt is longer than the recipe allows.
    """
    tokens = longest = longest_tree = chosen_tokens = rejected_tokens = longer = 0
    about: dict[str, list[tuple[int, ...]]] = {}  # sequences by image
    for index, pair in enumerate(collator.pairs):
        answers = collator.encoded(index)
        ids = [answer.ids for answer in answers]  # each with its prompt
        most = max(map(len, ids))
        if most > recipe.max_tokens:
            raise InputError(
                f"{locations[index]}: {pair.id}: {most} tokens, more than max_tokens {recipe.max_tokens}. Raise it, or "
                "leave the pair out. None is ever cut."
            )
        chosen, rejected = (len(answer.ids) - answer.begin for answer in answers)
        tokens, longest = tokens + sum(map(len, ids)), max(longest, most)
        chosen_tokens, rejected_tokens = chosen_tokens + chosen, rejected_tokens + rejected
        longer += chosen > rejected
        longest_tree = max(longest_tree, sum(map(len, ids)) if pair.rejected_image else len(tree(ids).ids))
        for image, sequence in zip(pair.images, ids, strict=True):
            about.setdefault(image, []).append(sequence)
    return DpoCounts(
        pairs=len(collator.pairs),
        images=len({pair.image for pair in collator.pairs}),
        tokens=tokens,
        shared=sum(len(tree(of_image).ids) for of_image in about.values()),
        longest=longest,
        longest_tree=longest_tree,
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
        chosen_longer=longer,
        contrasts=sum(pair.rejected_image is not None for pair in collator.pairs),
    )


def groups(pairs: Sequence[Pair]) -> list[list[int]]:
    """Return the indexes of the pairs of each image, which are learnt from together: they share the work on it."""
    by_image: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        by_image.setdefault(pair.image, []).append(index)
    return list(by_image.values())


def train(work: PreparedDpo, out: Path, resume: bool = False, progress: bool = True, wandb: bool = False) -> None:
    """Train, and write the folder `out`; see `run.run`."""
    run(work, make_trainer, out, resume, progress, wandb)


def make_trainer(
    work: PreparedDpo, out: Path, trace: Path, progress: bool = True, wandb: bool = False, step: int = 0
) -> DpoTrainer:
    """Return the trainer of `work`, which saves its checkpoints under `out`, and has taken `step` steps before.

    Raises:
        InputError: The batch cannot be dealt to the processes, or one process sees several GPUs.
    """
    recipe = work.recipe
    adapted = any(part.train == "lora" for part in recipe.parts().values())
    settings = DPOConfig(
        **trainer_arguments(work, out, wandb),
        loss_type=["sigmoid" if name == OFFSET else name for name in recipe.loss],
        loss_weights=list(recipe.loss_weights),
        beta=recipe.beta,
        label_smoothing=recipe.label_smoothing,
        ld_alpha=recipe.ld_alpha,
        disable_dropout=False,  # the recipe's parts say what is dropped
        precompute_ref_log_probs=recipe.reference == "cached" and not adapted,  # then trl makes no second network
    )
    order = plan(groups(work.pairs), recipe)
    shown = {"loss": "loss", "accuracy": "right", "margin": "margin"}
    reference = None
    if recipe.reference == "live" and not adapted:
        dtype = torch.bfloat16 if recipe.dtype == "bfloat16" else torch.float32
        reference = share_prefixes(work.checkpoint.model("cpu", dtype)).requires_grad_(False)
    return silence(
        DpoTrainer(
            work,
            trace,
            ValidationCallback(work.recipe, work.steps, out, step) if recipe.evaluate_on else None,
            model=share_prefixes(trained_model(work)),
            ref_model=reference,
            args=settings,
            data_collator=work.collator,
            train_dataset=Dataset.from_dict({"place": [index for index, _ in order]}),
            processing_class=work.collator.encoder.tokenizer,
            callbacks=callbacks(out, "stage 2", shown, progress, step),
        )
    )


def _offsets_in_words(work: PreparedDpo) -> list[str]:
    """Return a line about the margins; none where the loss does not take them."""
    if not work.collator.offsets:
        return []
    margins = [pair.margin or 0.0 for pair in work.pairs]
    return [f"margins from {min(margins):g} to {max(margins):g}; the offset of a pair in the loss is their logarithm"]


def report(work: PreparedDpo) -> str:
    """Return what a run would be, in words: tokens, steps, the weights of each part, and memory; for `--dry-run`."""
    counts, recipe = work.counts, work.recipe
    longer = counts.chosen_longer / counts.pairs
    return "\n".join(
        [
            f"{counts.pairs} pairs about {counts.images} images; the chosen answer is the longer one in {longer:.0%}",
            f"{counts.tokens} tokens, of which {counts.shared} are computed, because images and prefixes are shared",
            f"{counts.chosen_tokens} tokens of chosen answers and {counts.rejected_tokens} of rejected ones are learnt",
            *([f"{counts.contrasts} pairs have another image for the rejected answer"] if counts.contrasts else []),
            *weights_in_words(work.pairs),
            *_offsets_in_words(work),
            f"{work.steps} steps of {recipe.batch} pairs: {recipe.epochs:g} epoch{'s' * (recipe.epochs != 1)}",
            *memory_report(work, counts.longest_tree),
            *([f"{work.test_images} pairs show images of a test split"] if work.test_images else []),
        ]
    )
