"""Train stage 1 on trl's SFTTrainer: conversations -> a checkpoint that answers questions and asks them.

The loss is L_qa of answers plus L_vq of questions (arXiv:2406.19973), each a sum of -log p over its tokens.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from stllava_eval.data.catalog import DATASETS
from stllava_eval.errors import InputError
from stllava_train.data.augment import augmented
from stllava_train.data.columns import data_hash
from stllava_train.data.conversations import Conversation, counted, own_in_words, read_files
from stllava_train.data.encoding import ANSWER, NOTHING, QUESTION, Encoded, Encoder, asked, in_epoch, uniform
from stllava_train.data.pixels import Pixels
from stllava_train.training.parts import plan, steps_of
from stllava_train.training.preflight import PreparedRun, refuse_test_images, screen_run, start_of, validation_of
from stllava_train.training.processes import first_process, processes, rows_of
from stllava_train.training.recipes import SftRecipe
from stllava_train.training.run import IGNORE, memory_report, run, trained_model
from stllava_train.training.trainer import PartsTrainer, callbacks, silence, trainer_arguments
from stllava_train.training.validation import ValidationCallback

# --- conversations to batches -----------------------------------------------------------------------------------------


class SftCollator:
    """Make a batch of entries of the plan: `input_ids`, `attention_mask`, `labels`, `kinds`, `pixel_values`, `places`.

    The first four are (rows, tokens), padded on the right; `places` are the indexes of the conversations. Where several
    conversations share an image, the mask is (rows, 1, tokens, tokens) and `position_ids` are there too.
    """

    def __init__(
        self, conversations: Sequence[Conversation], recipe: SftRecipe, processor: Any, encoder: Encoder, padding: int
    ) -> None:
        self.conversations, self.recipe, self.padding = conversations, recipe, padding
        self.image_processor, self.encoder = processor.image_processor, encoder
        self.pixels = Pixels(processor.image_processor)

    def encoded(self, index: int, epoch: int) -> Encoded:
        """Return the conversation at `index`, encoded with the questions that are learnt in `epoch`."""
        seed = self.recipe.seed
        conversation = in_epoch(self.conversations[index], seed, epoch)
        asks = asked(conversation, seed, epoch, self.recipe.sq_r)
        return self.encoder.together(conversation, asks, uniform(seed, epoch, conversation.id, "template"))

    def __call__(self, entries: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        """Return the batch of these entries, each with the `place` of a conversation and an `epoch`."""
        rows = [self.encoded(entry["place"], entry["epoch"]) for entry in entries]
        width = max(len(row.ids) for row in rows)

        def padded(lists: Iterable[Sequence[int]], padding: int) -> Tensor:
            return torch.tensor([[*values, *[padding] * (width - len(values))] for values in lists])

        ids, kinds = padded((row.ids for row in rows), self.padding), padded((row.kinds for row in rows), NOTHING)
        threads = padded((row.threads for row in rows), -1)
        batch = {
            "input_ids": ids,
            "attention_mask": (threads >= 0).long(),  # (rows, tokens); padding has thread -1
            "labels": ids.masked_fill(kinds == NOTHING, IGNORE),  # trl shifts them by one: a token predicts the next
            "kinds": kinds,
            "places": torch.tensor([entry["place"] for entry in entries]),
        }
        if (threads > 0).any():
            batch["attention_mask"] = thread_mask(threads)
            batch["position_ids"] = padded((row.positions for row in rows), 0)
        with_image = [entry for entry in entries if self.conversations[entry["place"]].image is not None]
        if with_image:
            images = [self._shown(entry["place"], entry["epoch"]) for entry in with_image]
            batch["pixel_values"] = torch.stack(images)  # (rows with an image, 3, side, side)
        return batch

    def _shown(self, index: int, epoch: int) -> Tensor:
        """Return the image of the conversation at `index` as `epoch` sees it, (3, side, side)."""
        conversation = self.conversations[index]
        assert conversation.image is not None
        pixels = self.pixels(conversation.image)
        if not self.recipe.augment:
            return pixels
        mean = torch.tensor(self.image_processor.image_mean)[:, None, None]  # (3, 1, 1), against (3, side, side)
        std = torch.tensor(self.image_processor.image_std)[:, None, None]
        # the seed depends on (seed, epoch, id) alone: a resumed run, and any number of processes, see the same image
        seed = int(2**32 * uniform(self.recipe.seed, epoch, conversation.id, "augment"))
        unit = (pixels * std + mean)[None]  # (1, 3, side, side) in [0, 1], which `augmented` takes
        return (augmented(unit, torch.Generator().manual_seed(seed))[0] - mean) / std


def thread_mask(threads: Tensor) -> Tensor:
    """Return the attention mask of conversations that share an image.

    Args:
        threads: (rows, tokens): 0 for the image and what all conversations share, 1, 2, ... for the tokens of each
            conversation, -1 for padding.

    Returns:
        (rows, 1, tokens, tokens), True where the token of the last axis but one attends to that of the last axis.
    """
    queries, keys = threads[:, :, None], threads[:, None, :]  # (rows, tokens, 1) and (rows, 1, tokens)
    causal = torch.ones(threads.shape[1], threads.shape[1], dtype=torch.bool).tril()  # (tokens, tokens)
    mask = causal & ((keys == 0) | (keys == queries))  # (rows, tokens, tokens): the shared part, and one's own thread
    return mask[:, None]  # a padding token attends to other padding: over a row of nothing, softmax would be NaN


@dataclass(frozen=True)
class SftCounts:
    """The size of a data file, in tokens; questions are those that the first epoch samples."""

    conversations: int
    images: int
    rounds: int
    tokens: int
    longest: int
    answer_tokens: int
    question_tokens: int


def count(collator: SftCollator, progress: bool, check: str) -> SftCounts:
    """Return the size of the data, with every conversation encoded as in the first epoch.

    Args:
        collator: Of the run.
        progress: Whether to show a bar on stderr.
        check: The call that lists every conversation that is too long.

    Raises:
        InputError: A conversation is longer than the recipe allows.
    """
    from tqdm import tqdm

    recipe = collator.recipe
    rows: list[Encoded] = []
    hidden = None if progress else True  # None: where stderr is no terminal
    bar = tqdm(collator.conversations, "counting tokens", unit="conversation", disable=hidden, file=sys.stderr)
    for index, conversation in enumerate(bar):
        most = len(collator.encoder(conversation, asked(conversation, 0, 0, math.ceil(recipe.sq_r)), 1.0).ids)
        if most > recipe.max_tokens:
            raise InputError(
                f"{conversation.location}: {conversation.id}: {most} tokens, more than max_tokens {recipe.max_tokens}. "
                f"Raise it, or leave the record out (`{check} --write FILE`)."
            )
        rows.append(collator.encoded(index, 0))
    return SftCounts(
        conversations=len(rows),
        images=len({conversation.image for conversation in collator.conversations} - {None}),
        rounds=sum(len(conversation.rounds) for conversation in collator.conversations),
        tokens=sum(len(row.ids) for row in rows),
        longest=max(len(row.ids) for row in rows),
        answer_tokens=sum(row.kinds.count(ANSWER) for row in rows),
        question_tokens=sum(row.kinds.count(QUESTION) for row in rows),
    )


# --- training ---------------------------------------------------------------------------------------------------------


class SftTrainer(PartsTrainer, SFTTrainer):
    """trl's SFTTrainer with two losses: L_qa of answers and L_vq of questions (arXiv:2406.19973)."""

    recipe: SftRecipe

    def __init__(self, work: PreparedSft, trace: Path, validation: ValidationCallback | None, **others: Any) -> None:
        self.conversations = work.conversations
        super().__init__(work.recipe, trace, validation, **others)
        self._sums = torch.zeros(4, dtype=torch.float64, device=self.args.device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the weighted sum of both losses, in nats, divided by the number of tokens learnt in the step.

        Raises:
            InputError: It is no number; the message names the conversations of the batch.
        """
        # (rows, tokens - 1): the kind of the token that is predicted; (rows,): indexes of the conversations
        kinds, indexes = inputs.pop("kinds")[:, 1:], inputs.pop("places")
        outputs = model(**inputs, fused_lm_head=True)
        losses = -outputs.log_probs  # (rows, tokens - 1), zero where nothing is learnt
        at_question = kinds == QUESTION
        answers = losses.masked_fill(at_question, 0).sum()
        questions = losses.masked_fill(~at_question, 0).sum()
        total = self.recipe.answer_weight * answers + self.recipe.question_weight * questions
        batch = [self.conversations[index] for index in indexes.tolist()]
        self.refuse(total, [f"{conversation.id} ({conversation.location})" for conversation in batch])
        with torch.no_grad():
            self._sums += torch.stack([answers, questions, (kinds == ANSWER).sum(), at_question.sum()]).to(self._sums)
        # the mean over all tokens of the step, on all processes and micro-batches; DDP averages the gradients of the
        # processes, so the factor restores their sum
        return total / num_items_in_batch * self.accelerator.num_processes

    def step_record(self, logs: Mapping[str, float]) -> dict[str, Any]:
        """Return both losses in nats per token, and the numbers of tokens that they are means over."""
        sums = self.accelerator.reduce(self._sums, "sum").tolist()
        self._sums.zero_()
        return step_record(sums, self.recipe)


def step_record(sums: Sequence[float], recipe: SftRecipe) -> dict[str, Any]:
    """Return a line of the trace; `sums` has the nats of answers and of questions, then their numbers of tokens."""
    answers, questions, answer_tokens, question_tokens = sums
    tokens = answer_tokens + question_tokens
    return {
        "loss": (recipe.answer_weight * answers + recipe.question_weight * questions) / tokens,
        "answer_loss": answers / answer_tokens if answer_tokens else None,
        "question_loss": questions / question_tokens if question_tokens else None,
        "answer_tokens": int(answer_tokens),
        "question_tokens": int(question_tokens),
    }


# --- a run ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreparedSft(PreparedRun):
    """What stage 1 learns from."""

    recipe: SftRecipe
    counts: SftCounts
    conversations: Sequence[Conversation]
    collator: SftCollator

    def sets(self) -> set[str]:
        """Return the data sets whose name is the first word of a conversation's id, as `stllava-train data` writes it.

        A sample set is another than the official one: `vqarad sample`.
        """
        parts = (conversation.id.partition("-") for conversation in self.conversations)
        return {
            f"{name} sample" if rest.startswith(f"{name}-sample-") else name
            for name, _, rest in parts
            if name in DATASETS
        }


def prepare_run(
    recipe: SftRecipe,
    files: Sequence[Path],
    images: Path | None = None,
    allow_test_images: bool = False,
    progress: bool = True,
) -> PreparedSft:
    """Read and check everything that a run needs; no weights yet.

    Args:
        recipe: How to train.
        files: Conversations, see `read_conversations`.
        images: The folder that images are relative to (default: that of each file).
        allow_test_images: Train on images of prepared test splits too. They are counted in the run's manifest.
        progress: Whether to show bars on stderr.

    Raises:
        InputError: A record has a problem, or shows a test image; or recipe, data, checkpoint and the number of
            processes do not fit together.
    """
    rows_of(recipe, processes().num_processes)
    read, problems = read_files(files, images)
    if problems:
        more = f" ({len(problems) - 1} more: `{_check_call(files, images)}`)" if len(problems) > 1 else ""
        raise InputError(f"{problems[0]}{more}")
    conversations: list[Conversation] = []
    data: list[dict[str, Any]] = []
    for file, of_file in zip(files, read, strict=True):
        conversations += of_file
        data.append({"file": file.name, **data_hash(file), "conversations": len(of_file)})
    text_only = next((conversation for conversation in conversations if conversation.image is None), None)
    if text_only and recipe.language_model.train == "frozen":
        raise InputError(
            f"{text_only.location}: {text_only.id}: it has no image, and only parts that look at one are trained. "
            "Leave it out, or train the language model."
        )
    validation = validation_of(recipe, len(conversations))
    start = start_of(recipe)
    collator = SftCollator(conversations, recipe, start.processor, start.encoder, start.padding)
    check = _check_call(files, images)
    length = shlex.join(["--checkpoint", recipe.start, "--max-tokens", str(recipe.max_tokens)])
    counts = count(collator, progress, f"{check} {length}")
    screened = screen_run(conversations, validation, "record", progress, check)
    test_images = refuse_test_images(screened, f"{len(conversations)} conversations", allow_test_images, check)
    return PreparedSft(
        recipe=recipe,
        checkpoint=start.checkpoint,
        counts=counts,
        steps=steps_of(len(conversations), recipe),
        data=data,
        images_sha256=screened.sha256,
        test_images=test_images,
        conversations=conversations,
        collator=collator,
    )


def _check_call(files: Sequence[Path], images: Path | None) -> str:
    """Return the call that lists every problem of these files."""
    arguments = [*map(str, files), *(["--images", str(images)] if images else [])]
    return shlex.join(["stllava-train", "check", *arguments])


def train(work: PreparedSft, out: Path, resume: bool = False, progress: bool = True, wandb: bool = False) -> None:
    """Train, and write the folder `out`; see `run.run`. The conversations are counted on stderr first."""
    if progress and first_process():
        print(counted(work.conversations), *own_in_words(work.conversations), sep="\n", file=sys.stderr)
    run(work, make_trainer, out, resume, progress, wandb)


def make_trainer(
    work: PreparedSft, out: Path, trace: Path, progress: bool = True, wandb: bool = False, step: int = 0
) -> SftTrainer:
    """Return the trainer of `work`, which saves its checkpoints under `out`, and has taken `step` steps before.

    Raises:
        InputError: The batch cannot be dealt to the processes, or one process sees several GPUs.
    """
    settings = SFTConfig(**trainer_arguments(work, out, wandb), dataset_kwargs={"skip_prepare_dataset": True})
    order = plan([[index] for index in range(len(work.conversations))], work.recipe)
    entries = {"place": [index for index, _ in order], "epoch": [epoch for _, epoch in order]}
    shown = {"answer_loss": "answers", "question_loss": "questions"}
    return silence(
        SftTrainer(
            work,
            trace,
            ValidationCallback(work.recipe, work.steps, out, step) if work.recipe.evaluate_on else None,
            model=trained_model(work),
            args=settings,
            data_collator=work.collator,
            train_dataset=Dataset.from_dict(entries),
            processing_class=work.collator.encoder.tokenizer,
            callbacks=callbacks(out, "stage 1", shown, progress, step),
        )
    )


def report(work: PreparedSft) -> str:
    """Return what a run would be, in words: tokens, steps, the weights of each part, and memory; for `--dry-run`."""
    counts, recipe = work.counts, work.recipe
    learnt = counts.answer_tokens + counts.question_tokens
    lines = [
        f"{counted(work.conversations)}, {counts.rounds} rounds",
        *own_in_words(work.conversations),
        f"{counts.tokens} tokens in the first epoch, {counts.longest} in the longest conversation",
        f"{learnt} tokens are learnt ({learnt / counts.tokens:.1%}): {counts.answer_tokens} of answers and "
        f"{counts.question_tokens} of questions",
        f"{work.steps} steps of {recipe.batch} conversations: {recipe.epochs:g} epoch{'s' * (recipe.epochs != 1)}",
        *memory_report(work, counts.longest),
        *([f"{work.test_images} conversations show images of a test split"] if work.test_images else []),
    ]
    return "\n".join(lines)
