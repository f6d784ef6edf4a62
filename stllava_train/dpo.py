"""Preference pairs -> a checkpoint that prefers the chosen answers: stage 2, on trl's DPOTrainer."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl import DPOConfig, DPOTrainer

from stllava_eval.errors import InputError
from stllava_eval.home import home
from stllava_train.columns import data_hash
from stllava_train.conversations import ANSWER, Conversation, Encoder, image_file
from stllava_train.examination import Examination, questions, warn_of_learnt
from stllava_train.layouts import pairs_to_learn
from stllava_train.ledger import Ledger
from stllava_train.pairs import Pair, relative_weights, weights_in_words
from stllava_train.pixels import Pixels
from stllava_train.recipe import OFFSET, DpoRecipe
from stllava_train.training import (
    PartsTrainer,
    Work,
    arguments,
    first_process,
    listeners,
    needs,
    open_start,
    plan,
    processes,
    quiet,
    rows_of,
    run,
    steps_of,
    trained_model,
)

ATTENTION = "stllava_tree"
# all but cuDNN's, which makes a plan for every new shape, and every batch has one: on an H200 half of a step's time
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
MIXED = ("aot", "aot_unpaired", "bco_pair")  # losses that sort or centre a batch's rewards: no pair has its own
CHUNK = 64  # our choice: pairs whose reference is computed between two writes to the disk


# --- pairs to batches -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answered:
    """A prompt and one answer to it, as token ids; `begin` is the place of the answer's first token."""

    ids: tuple[int, ...]
    begin: int


@dataclass(frozen=True)
class Tree:
    """Token sequences of which every beginning that several share stands once.

    Attributes:
        ids: Of the tokens.
        positions: Of each token in its sequence.
        paths: For each sequence the places of its tokens.
        first: Tokens of the sequence that stands in front, in one piece.
    """

    ids: list[int]
    positions: list[int]
    paths: list[Tensor]
    first: int

    def seen(self) -> Tensor:
        """(tokens, tokens), True where a token (first axis) sees another: itself, and what stands before it."""
        seen = torch.zeros(len(self.ids), len(self.ids), dtype=torch.bool)
        for path in self.paths:
            seen[path[:, None], path] = torch.ones(len(path), len(path), dtype=torch.bool).tril()
        return seen


def tree(sequences: Sequence[Sequence[int]]) -> Tree:
    """`sequences` as a tree."""
    ids: list[int] = []
    positions: list[int] = []
    paths: list[Tensor] = [torch.empty(0)] * len(sequences)
    before: Sequence[int] = ()
    path: list[int] = []
    order = sorted(range(len(sequences)), key=lambda number: tuple(sequences[number]))
    for number in order:
        sequence = sequences[number]
        shared = 0
        while shared < min(len(before), len(sequence)) and before[shared] == sequence[shared]:
            shared += 1
        path = [*path[:shared], *range(len(ids), len(ids) + len(sequence) - shared)]
        ids += sequence[shared:]
        positions += range(shared, len(sequence))
        paths[number] = torch.tensor(path)
        before = sequence
    return Tree(ids, positions, paths, len(sequences[order[0]]))


class Collator:
    """Entries of the plan -> a batch of B pairs, in which every image and every shared beginning stands once.

    What trl reads: `input_ids`, `attention_mask`, `completion_mask`, each (2B, width), the chosen answers before the
    rejected ones. A row is an answer, behind the last token of its prompt: nothing else of it is scored.
    What `share_beginnings` lets the network read: for R images `tree_ids` and `tree_positions` (R, tokens), of which
    the first `tokens - rest` see all before them, as in any text, and the others what `tree_mask` (R, 1, rest, tokens)
    says; `pixel_values` (R, 3, side, side), and `places` (2B, width), where each scored row's tokens lie among the
    R * tokens. And `pairs`, (B,) places of the pairs; with a cached reference
    `ref_chosen_logps` and `ref_rejected_logps`, (B,) nats; of pairs with weights `weights`, (B,), see
    `relative_weights`; and where the recipe's loss asks for them, `offsets`, (B,), see `offsets_of`.
    """

    def __init__(self, pairs: Sequence[Pair], folder: Path, processor: Any, encoder: Encoder, padding: int) -> None:
        self.pairs, self.folder, self.encoder, self.padding = pairs, folder, encoder, padding
        self.pixels = Pixels(processor.image_processor)
        self.reference: Mapping[int, tuple[float, float]] = {}
        self.weights = relative_weights(pairs)
        self.offsets: Sequence[float] = ()
        self._encoded: dict[int, tuple[Answered, Answered]] = {}

    def encoded(self, place: int) -> tuple[Answered, Answered]:
        """The chosen and the rejected answer of a pair, each behind its prompt and tokenised in one go with it."""
        if place not in self._encoded:
            pair = self.pairs[place]
            chosen, rejected = (self._answered(pair, answer) for answer in (pair.chosen, pair.rejected))
            self._encoded[place] = chosen, rejected
        return self._encoded[place]

    def _answered(self, pair: Pair, answer: str) -> Answered:
        one = Conversation(pair.id, self.folder / pair.image, ((pair.question, answer),), pair.id)
        encoded = self.encoder(one, (False,))
        return Answered(tuple(encoded.ids), encoded.kinds.index(ANSWER))

    def __call__(self, entries: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        """`entries`: `place` of a pair each."""
        places = [entry["place"] for entry in entries]
        both = [self.encoded(place) for place in places]
        answers = [one for one, _ in both] + [other for _, other in both]
        some = [self.pairs[place].images for place in places]
        images = [one for one, _ in some] + [other for _, other in some]  # of most pairs the two are one
        batch = pack(answers, images, self.padding)
        batch["pixel_values"] = torch.stack([self.pixels(self.folder / image) for image in dict.fromkeys(images)])
        batch["pairs"] = torch.tensor(places)
        if self.reference:
            known = torch.tensor([self.reference[place] for place in places])
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = known[:, 0], known[:, 1]
        if self.weights:
            batch["weights"] = torch.tensor([self.weights[place] for place in places])
        if self.offsets:
            batch["offsets"] = torch.tensor([self.offsets[place] for place in places])
        return batch


def pack(answers: Sequence[Answered], images: Sequence[Any], padding: int) -> dict[str, Tensor]:
    """The batch of `Collator` without its pixels, whose rows are the images in the order of their first answer.

    Args:
        answers: The chosen ones before the rejected ones, pair by pair in the same order.
        images: What each answer is about; answers about equal ones share a row.
        padding: A token id.
    """
    rows = {image: [number for number, one in enumerate(images) if one == image] for image in dict.fromkeys(images)}
    trees = [tree([answers[number].ids for number in of_row]) for of_row in rows.values()]
    length = max(len(one.ids) for one in trees)
    mask = torch.eye(length, dtype=torch.bool).repeat(len(trees), 1, 1)  # padding sees itself: a row of nothing is NaN
    places: list[Tensor] = [torch.empty(0)] * len(answers)
    for row, (one, of_row) in enumerate(zip(trees, rows.values(), strict=True)):
        mask[row, : len(one.ids), : len(one.ids)] = one.seen()
        for number, path in zip(of_row, one.paths, strict=True):
            places[number] = path[answers[number].begin - 1 :] + row * length
    scored = [torch.tensor(one.ids[one.begin - 1 :]) for one in answers]

    def padded(rows: Sequence[Tensor], value: int = 0) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)

    real = padded([torch.ones_like(row) for row in scored])
    answered = real.clone()
    answered[:, 0] = 0  # the prompt's last token
    return {
        "input_ids": padded(scored, padding),
        "attention_mask": real,
        "completion_mask": answered,
        "tree_ids": padded([torch.tensor(one.ids) for one in trees], padding),
        "tree_positions": padded([torch.tensor(one.positions) for one in trees]),
        "tree_mask": mask[:, None, min(one.first for one in trees) :],
        "places": padded(places),
    }


def share_beginnings(model: Any) -> Any:
    """The network, adapted or not, which now takes `Collator`'s batches too: trees go in, answers' rows come out.

    It is the backbone and not the loss that is changed, so that all of trl's losses, weights and figures hold, and
    whatever wraps the network's parts (PEFT, DDP, FSDP2) still sees its own forward.
    """
    backbone = (model.get_base_model() if hasattr(model, "peft_config") else model).model
    whole = backbone.forward
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, tree_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    # for good, and not around each call: gradient checkpointing comes back to the layers in the backward pass
    backbone.language_model.config._attn_implementation = ATTENTION

    def forward(*given: Any, tree_ids: Tensor | None = None, **others: Any) -> Any:
        if tree_ids is None:
            return whole(*given, **others)
        places = others.pop("places")
        del others["input_ids"], others["attention_mask"]
        others["position_ids"] = others.pop("tree_positions")
        outputs = whole(input_ids=tree_ids, needed=places.flatten(), **others)
        outputs.last_hidden_state = outputs.last_hidden_state.unflatten(0, places.shape)
        return outputs

    last = backbone.language_model.layers[-1]
    whole_layer = last.forward

    def scored(hidden_states: Tensor, needed: Tensor | None = None, **others: Any) -> Tensor:
        """The last layer, whose MLP (two thirds of its work) is of use for the tokens that are scored alone."""
        if needed is None:
            return whole_layer(hidden_states, **others)
        attended, _ = last.self_attn(hidden_states=last.input_layernorm(hidden_states), **others)
        hidden = (hidden_states + attended).flatten(0, 1).index_select(0, needed)
        return hidden + last.mlp(last.post_attention_layernorm(hidden))

    last.forward, backbone.forward = scored, forward
    return model


def tree_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    tree_mask: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention over a batch's trees, as transformers calls it: (R, heads, tokens, width) to (R, tokens, heads, width).

    The tokens in front are one text, for which torch has its fastest kernels (on a GPU, flash attention, which takes no
    mask) and which skips what is not seen: half. Only the few behind them need the mask. Without a tree it is that of
    transformers.
    """
    if tree_mask is None:
        return sdpa_attention_forward(module, query, key, value, mask, **others)
    front = query.shape[2] - tree_mask.shape[2]
    shared = key.shape[1] != query.shape[1]
    attend = partial(scaled_dot_product_attention, scale=others["scaling"], enable_gqa=shared)
    with sdpa_kernel(KERNELS):
        text = attend(query[:, :, :front], key[:, :, :front], value[:, :, :front], is_causal=True)
        branches = attend(query[:, :, front:], key, value, attn_mask=tree_mask)
    return torch.cat([text, branches], 2).transpose(1, 2), None


# --- the loss ---------------------------------------------------------------------------------------------------------


class DpoTrainer(PartsTrainer, DPOTrainer):
    """trl's, on batches of `Collator`, with the reference's log-probabilities kept on disk, and a trace.

    The reference is the whole network that training starts from, its vision tower and projector included. (The
    authors' took image features of the policy's projector, which moves: `llava_dpo_trainer.py`, line 353.)
    """

    recipe: DpoRecipe

    def __init__(self, work: DpoWork, trace: Path, examination: Examination | None, **others: Any) -> None:
        self.pairs, self.collator = work.pairs, work.collator
        super().__init__(work.recipe, trace, examination, **others)
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

    def _reference(self, work: DpoWork) -> dict[int, tuple[float, float]]:
        """The reference's log-probabilities of the chosen and the rejected answer, in nats, by place of the pair.

        Every pair is computed by itself, so that its figures do not depend on others, and written to
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
            Ledger(file, lambda row: row["id"], decided_by, wait=True)
            if state.is_main_process
            else nullcontext() as ledger
        ):
            known = {key: _log_probabilities(row, file) for key, row in ledger.rows.items()} if ledger else {}
            known = _from_main(known)
            self._add_missing(known, keys, ledger)
        return {place: known[key] for place, key in enumerate(keys)}

    def _add_missing(self, known: dict[str, tuple[float, float]], keys: Sequence[str], ledger: Ledger | None) -> None:
        """Compute what is not known, every process its share, and write it down."""
        from tqdm import tqdm

        state = processes()
        due = list({key: place for place, key in enumerate(keys) if key not in known}.values())
        hidden = None if state.is_main_process else True
        size = CHUNK * state.num_processes
        with tqdm(total=len(due), desc="reference", unit="pair", disable=hidden, file=sys.stderr) as bar:
            for chunk in (due[begin : begin + size] for begin in range(0, len(due), size)):
                found: list[dict[str, Any]] = []
                for place in chunk[state.process_index :: state.num_processes]:
                    batch = self._prepare_inputs(self.collator([{"place": place}]))
                    batch.pop("pairs")
                    batch.pop("weights", None)
                    batch.pop("offsets", None)
                    with _trl_behind_transformers():
                        chosen, rejected = self.compute_ref_log_probs(self.ref_model or self.model, batch)
                    found.append({"id": keys[place], "chosen": chosen.item(), "rejected": rejected.item()})
                rows = [row for of_one in _from_all(found) for row in of_one]
                if ledger is not None:
                    ledger.add(rows)
                known |= {row["id"]: (row["chosen"], row["rejected"]) for row in rows}
                bar.update(len(chunk))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """trl's, in its units; of pairs with weights the mean of weight times loss; or that of ODPO.

        Raises:
            InputError: It is no number; the message names the pairs of the batch.
        """
        places = inputs.pop("pairs").tolist()
        weights, offsets = inputs.pop("weights", None), inputs.pop("offsets", None)
        with _trl_behind_transformers():
            if weights is None and offsets is None:
                loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            else:
                loss = self._pairwise_loss(model, inputs, weights, offsets)
        self.refuse(loss, [f"pair {self.pairs[place].id}" for place in places])
        with torch.no_grad():
            chosen, rejected = inputs["completion_mask"].sum(1).chunk(2)
            tokens = [chosen.sum(), rejected.sum(), torch.tensor(len(places), device=chosen.device)]
            self._sums += torch.stack([loss.detach() * len(places), *tokens]).to(self._sums)
        return loss

    def _pairwise_loss(
        self, model: Any, inputs: dict[str, Any], weights: Tensor | None, offsets: Tensor | None
    ) -> Tensor:
        """The mean over the batch of weight times loss, where the loss is trl's of a pair by itself, or ODPO's.

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
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        outputs = model(**read, use_cache=False, labels=labels, fused_lm_head=True)
        whole = {key: value for key, value in vars(outputs).items() if isinstance(value, Tensor) and value.dim() == 2}
        pairs = len(inputs["ref_chosen_logps"])
        before, self.precompute_ref_logps = self.precompute_ref_logps, True
        losses = []
        for number in range(pairs):
            rows = [number, pairs + number]
            of_pair = {key: inputs[key][rows] for key in scored} | {key: inputs[key][[number]] for key in known}
            answered = SimpleNamespace(**{key: value[rows] for key, value in whole.items()})
            losses.append(super().compute_loss(lambda answered=answered, **_: answered, of_pair))
        self.precompute_ref_logps = before
        each = torch.stack(losses)
        if offsets is not None:
            logps = outputs.log_probs[:, 1 - inputs["input_ids"].shape[1] :].sum(1)
            chosen, rejected = logps.chunk(2)
            apart = chosen - inputs["ref_chosen_logps"] - (rejected - inputs["ref_rejected_logps"])
            each = -self.loss_weights[0] * torch.nn.functional.logsigmoid(self.beta * apart - offsets.to(apart))
        return (each if weights is None else each * weights.to(each)).mean()

    def step_record(self, logs: Mapping[str, float]) -> dict[str, Any]:
        """What trl measures of a step, in our words; means over its pairs, log-probabilities in nats per answer.

        `kl` is the mean over both answers of the reference's log-probability less the policy's: an estimate of
        KL(reference || policy) an answer, as the reference wrote them (at the temperature of the candidates).
        """
        loss, chosen, rejected, pairs = self.accelerator.reduce(self._sums, "sum").tolist()
        self._sums.zero_()
        of = {key: sum(values) / len(values) for key, values in self._metrics["train"].items()}
        self._metrics["train"].clear()
        rewards = of["rewards/chosen"], of["rewards/rejected"]
        return {
            "loss": loss / pairs,
            "chosen_logps": of["logps/chosen"],
            "rejected_logps": of["logps/rejected"],
            "chosen_reward": rewards[0],
            "rejected_reward": rewards[1],
            "margin": of["rewards/margins"],
            "accuracy": of["rewards/accuracies"],
            "kl": -sum(rewards) / (2 * self.beta),
            "chosen_tokens": chosen / pairs,
            "rejected_tokens": rejected / pairs,
        }


@contextmanager
def _trl_behind_transformers() -> Iterator[None]:
    """trl 1.16 switches gradient checkpointing by names that transformers 5.23 has renamed, and it says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
        yield


def _log_probabilities(row: Mapping[str, Any], file: Path) -> tuple[float, float]:
    values = row.get("chosen"), row.get("rejected")
    if not all(isinstance(one, float) and math.isfinite(one) for one in values):
        raise InputError(
            f"{file}: pair {str(row.get('id'))[:16]} has {values} for log-probabilities. Delete the file: they are "
            "computed again."
        )
    return values  # type: ignore[return-value]


def offsets_of(file: Path, pairs: Sequence[Pair]) -> list[float]:
    """The offset of each pair in ODPO's loss: the natural logarithm of its margin, which is in points of 10.

    The paper's is alpha * log(score of the chosen - score of the rejected), and alpha is 1 in its code.

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


def reference_key(pair: Pair, ld_alpha: float | None) -> str:
    """Of what decides the reference's log-probabilities of a pair; with `ld_alpha` each depends on both answers."""
    of = [pair.image_sha256, pair.question, pair.chosen, pair.rejected, ld_alpha]
    if pair.rejected_image:
        of.append(pair.rejected_image_sha256)
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()


def _from_main(value: Any) -> Any:
    from accelerate.utils import broadcast_object_list

    held = [value]
    broadcast_object_list(held)
    return held[0]


def _from_all(value: Any) -> list[Any]:
    from accelerate.utils import gather_object

    return gather_object([value])


# --- a run ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """What a file of pairs comes to, in tokens; `shared` are those that the trees of all its images hold."""

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
class DpoWork(Work):
    """What stage 2 learns from."""

    recipe: DpoRecipe
    counts: Counts
    pairs: Sequence[Pair]
    collator: Collator


def open_work(
    recipe: DpoRecipe,
    file: Path,
    images: Path,
    allow_test_images: bool = False,
    progress: bool = True,
) -> DpoWork:
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
    from stllava_train.check import Images, looked_at

    rows_of(recipe, processes().num_processes)
    pairs = pairs_to_learn(file, images, progress)
    data = [{"file": file.name, **data_hash(file), "pairs": len(pairs)}]
    if steps_of(len(pairs), recipe) == 0:
        raise InputError(f"epochs {recipe.epochs:g}: too few for one step of batch {recipe.batch}. Raise it.")
    validation = questions(recipe)  # a split that is missing is named before any work
    lines = [f"{file}:{line}" for line, _ in enumerate(pairs, 1)]
    shown = []
    for line, pair in zip(lines, pairs, strict=True):
        for name, sha256 in pair.pictures.items():
            if (image := image_file(images, name)) is None:
                name = name if len(name) < 256 else f"{name[:60]}..."
                raise InputError(
                    f"{line}: {pair.id}: its image {name} is not in {images}. Pass their folder with --images."
                )
            shown.append((Conversation(pair.id, image, (), line), name, sha256))
    if pairs[0].weight is not None and (mixed := [name for name in recipe.loss if name in MIXED]):
        raise InputError(
            f"{file}: its pairs have weights, and the loss {mixed[0]} is made of several pairs at once. Choose another "
            "loss, such as loss=[sigmoid], or take the weights out."
        )
    offsets = offsets_of(file, pairs) if OFFSET in recipe.loss else []
    checkpoint = open_start(recipe)
    processor = checkpoint.processor()
    encoder = Encoder(processor, recipe.template, checkpoint.config.image_seq_length)
    collator = Collator(pairs, images, processor, encoder, checkpoint.config.text_config.pad_token_id or 0)
    collator.offsets = offsets
    counts = count(collator, recipe, lines)
    seen = looked_at([one for one, *_ in shown], progress) if first_process() else Images([], [], {}, "")
    warn_of_learnt(validation, set(seen.pixels.values()))
    if broken := seen.broken:
        raise InputError(f"{broken[0]} Put it back, or leave the pair out.")
    for one, name, sha256 in shown:
        if one.image is not None and seen.pixels.get(one.image, sha256) != sha256:
            raise InputError(
                f"{one.place}: {one.id}: its image {name} has other pixels than the one that was asked about. "
                "Put that one back, or ask and judge again."
            )
    found = {leak.place for leak in seen.leaks}
    if found and not allow_test_images:
        raise InputError(
            f"{seen.leaks[0]} {len(found)} of {len(pairs)} pairs show test images: scores on these sets would mean "
            "nothing. Leave them out, or pass --allow-test-images."
        )
    return DpoWork(
        recipe=recipe,
        checkpoint=checkpoint,
        counts=counts,
        steps=steps_of(len(pairs), recipe),
        data=data,
        images_sha256=seen.sha256,
        test_images=len(found),
        pairs=pairs,
        collator=collator,
    )


def count(collator: Collator, recipe: DpoRecipe, places: Sequence[str]) -> Counts:
    """Every pair, tokenised. `places`: of the pairs, `FILE:LINE`.

    Raises:
        InputError: One is longer than the recipe allows.
    """
    tokens = longest = longest_tree = chosen_tokens = rejected_tokens = longer = 0
    about: dict[str, list[tuple[int, ...]]] = {}  # sequences by image
    for place, pair in enumerate(collator.pairs):
        both = collator.encoded(place)
        most = max(len(one.ids) for one in both)
        if most > recipe.max_tokens:
            raise InputError(
                f"{places[place]}: {pair.id}: {most} tokens, more than max_tokens {recipe.max_tokens}. Raise it, or "
                "leave the pair out. None is ever cut."
            )
        chosen, rejected = (len(one.ids) - one.begin for one in both)
        tokens, longest = tokens + sum(len(one.ids) for one in both), max(longest, most)
        chosen_tokens, rejected_tokens = chosen_tokens + chosen, rejected_tokens + rejected
        longer += chosen > rejected
        ids = [one.ids for one in both]
        longest_tree = max(longest_tree, sum(map(len, ids)) if pair.rejected_image else len(tree(ids).ids))
        for image, of_one in zip(pair.images, ids, strict=True):
            about.setdefault(image, []).append(of_one)
    return Counts(
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
    """Places of the pairs of each image, which are learnt from together: they share its work."""
    of: dict[str, list[int]] = {}
    for place, pair in enumerate(pairs):
        of.setdefault(pair.image, []).append(place)
    return list(of.values())


def train(work: DpoWork, out: Path, resume: bool = False, progress: bool = True, wandb: bool = False) -> None:
    """Train, and write the folder `out`. See `training.run`."""
    run(work, make_trainer, out, resume, progress, wandb)


def make_trainer(
    work: DpoWork, out: Path, trace: Path, progress: bool = True, wandb: bool = False, step: int = 0
) -> DpoTrainer:
    """The trainer of `work`, which keeps what it resumes from under `out`, and has taken `step` steps before.

    Raises:
        InputError: The batch cannot be dealt to the processes, or one process sees several GPUs.
    """
    recipe = work.recipe
    adapted = any(part.train == "lora" for part in recipe.parts().values())
    settings = DPOConfig(
        **arguments(work, out, wandb),
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
        reference = share_beginnings(work.checkpoint.model("cpu", dtype)).requires_grad_(False)
    return quiet(
        DpoTrainer(
            work,
            trace,
            Examination(work, out, step) if recipe.evaluate_on else None,
            model=share_beginnings(trained_model(work)),
            ref_model=reference,
            args=settings,
            data_collator=work.collator,
            train_dataset=Dataset.from_dict({"place": [place for place, _ in order]}),
            processing_class=work.collator.encoder.tokenizer,
            callbacks=listeners(out, "stage 2", shown, progress, step),
        )
    )


def _offsets_in_words(work: DpoWork) -> list[str]:
    """A line about the margins; none where the loss does not take them."""
    if not work.collator.offsets:
        return []
    margins = [pair.margin or 0.0 for pair in work.pairs]
    return [f"margins from {min(margins):g} to {max(margins):g}; the offset of a pair in the loss is their logarithm"]


def report(work: DpoWork) -> str:
    """What a run would be: tokens, steps, and the weights of each part; for `--dry-run`."""
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
            *needs(work, counts.longest_tree),
            *([f"{work.test_images} pairs show images of a test split"] if work.test_images else []),
        ]
    )
