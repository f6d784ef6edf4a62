"""Conversations -> a checkpoint that answers and asks: stage 1, on trl's SFTTrainer."""

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

from stllava_eval.datasets import DATASETS
from stllava_eval.errors import InputError
from stllava_train.augment import augmented
from stllava_train.columns import data_hash
from stllava_train.conversations import (
    ANSWER,
    NOTHING,
    QUESTION,
    Conversation,
    Encoded,
    Encoder,
    asked,
    counted,
    in_epoch,
    own_in_words,
    uniform,
)
from stllava_train.examination import Examination, questions, warn_of_learnt
from stllava_train.pixels import Pixels
from stllava_train.recipe import Recipe
from stllava_train.training import (
    IGNORE,
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

# --- conversations to batches -----------------------------------------------------------------------------------------


class Collator:
    """Entries of the plan -> a batch: `input_ids`, `attention_mask`, `labels`, `kinds`, `pixel_values`, `places`.

    The first four are (rows, tokens), padded on the right; `places` are those of the conversations. Where several
    conversations share an image, the mask is (rows, 1, tokens, tokens) and `position_ids` are there too.
    """

    def __init__(
        self, conversations: Sequence[Conversation], recipe: Recipe, processor: Any, encoder: Encoder, padding: int
    ) -> None:
        self.conversations, self.recipe, self.padding = conversations, recipe, padding
        self.image_processor, self.encoder = processor.image_processor, encoder
        self.pixels = Pixels(processor.image_processor)

    def encoded(self, place: int, epoch: int) -> Encoded:
        """The conversation at `place` with the questions that are learnt in `epoch`."""
        seed = self.recipe.seed
        conversation = in_epoch(self.conversations[place], seed, epoch)
        asks = asked(conversation, seed, epoch, self.recipe.sq_r)
        return self.encoder.together(conversation, asks, uniform(seed, epoch, conversation.id, "template"))

    def __call__(self, entries: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        """`entries`: `place` and `epoch` each."""
        rows = [self.encoded(entry["place"], entry["epoch"]) for entry in entries]
        width = max(len(row.ids) for row in rows)

        def padded(lists: Iterable[Sequence[int]], padding: int) -> Tensor:
            return torch.tensor([[*values, *[padding] * (width - len(values))] for values in lists])

        ids, kinds = padded((row.ids for row in rows), self.padding), padded((row.kinds for row in rows), NOTHING)
        threads = padded((row.threads for row in rows), -1)
        batch = {
            "input_ids": ids,
            "attention_mask": (threads >= 0).long(),
            "labels": ids.masked_fill(kinds == NOTHING, IGNORE),
            "kinds": kinds,
            "places": torch.tensor([entry["place"] for entry in entries]),
        }
        if (threads > 0).any():
            batch["attention_mask"] = _seen(threads)
            batch["position_ids"] = padded((row.positions for row in rows), 0)
        with_image = [entry for entry in entries if self.conversations[entry["place"]].image is not None]
        if with_image:
            batch["pixel_values"] = torch.stack([self._shown(entry["place"], entry["epoch"]) for entry in with_image])
        return batch

    def _shown(self, place: int, epoch: int) -> Tensor:
        """(3, side, side): the image of the conversation at `place` as `epoch` sees it."""
        conversation = self.conversations[place]
        assert conversation.image is not None
        pixels = self.pixels(conversation.image)
        if not self.recipe.augment:
            return pixels
        mean, std = (
            torch.tensor(of)[:, None, None] for of in (self.image_processor.image_mean, self.image_processor.image_std)
        )
        draw = int(2**32 * uniform(self.recipe.seed, epoch, conversation.id, "augment"))
        return (augmented((pixels * std + mean)[None], torch.Generator().manual_seed(draw))[0] - mean) / std


def _seen(threads: Tensor) -> Tensor:
    """(rows, 1, tokens, tokens), True where the token of the last axis but one sees that of the last; -1 is padding."""
    mine, theirs = threads[:, :, None], threads[:, None, :]
    seen = torch.ones(threads.shape[1], threads.shape[1], dtype=torch.bool).tril() & ((theirs == 0) | (theirs == mine))
    return seen[:, None]  # a padding token sees others of its kind: a row of nothing would be NaN


@dataclass(frozen=True)
class Counts:
    """What a data file comes to, in tokens; questions are those that the first epoch draws."""

    conversations: int
    images: int
    rounds: int
    tokens: int
    longest: int
    answer_tokens: int
    question_tokens: int


def count(collator: Collator, progress: bool, check: str) -> Counts:
    """Every conversation encoded as in the first epoch. `check`: the call that lists every one that is too long.

    Raises:
        InputError: One is longer than the recipe allows.
    """
    from tqdm import tqdm

    recipe = collator.recipe
    rows: list[Encoded] = []
    hidden = None if progress else True  # None: where stderr is no terminal
    bar = tqdm(collator.conversations, "counting tokens", unit="conversation", disable=hidden, file=sys.stderr)
    for place, conversation in enumerate(bar):
        most = len(collator.encoder(conversation, asked(conversation, 0, 0, math.ceil(recipe.sq_r)), 1.0).ids)
        if most > recipe.max_tokens:
            raise InputError(
                f"{conversation.place}: {conversation.id}: {most} tokens, more than max_tokens {recipe.max_tokens}. "
                f"Raise it, or leave the record out (`{check} --write FILE`)."
            )
        rows.append(collator.encoded(place, 0))
    return Counts(
        conversations=len(rows),
        images=len({one.image for one in collator.conversations if one.image is not None}),
        rounds=sum(len(one.rounds) for one in collator.conversations),
        tokens=sum(len(row.ids) for row in rows),
        longest=max(len(row.ids) for row in rows),
        answer_tokens=sum(row.kinds.count(ANSWER) for row in rows),
        question_tokens=sum(row.kinds.count(QUESTION) for row in rows),
    )


# --- training ---------------------------------------------------------------------------------------------------------


class SftTrainer(PartsTrainer, SFTTrainer):
    """trl's, with two losses."""

    recipe: Recipe

    def __init__(self, work: SftWork, trace: Path, examination: Examination | None, **others: Any) -> None:
        self.conversations = work.conversations
        super().__init__(work.recipe, trace, examination, **others)
        self._sums = torch.zeros(4, dtype=torch.float64, device=self.args.device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Negative log-likelihood of answers and questions, in nats: their weighted sum over all tokens of the step.

        Raises:
            InputError: It is no number; the message names the conversations of the batch.
        """
        kinds, places = inputs.pop("kinds")[:, 1:], inputs.pop("places")
        outputs = model(**inputs, fused_lm_head=True)
        losses = -outputs.log_probs  # (rows, tokens - 1), zero where nothing is learnt
        at_question = kinds == QUESTION
        answers = losses.masked_fill(at_question, 0).sum()
        questions = losses.masked_fill(~at_question, 0).sum()
        total = self.recipe.answer_weight * answers + self.recipe.question_weight * questions
        batch = [self.conversations[place] for place in places.tolist()]
        self.refuse(total, [f"{one.id} ({one.place})" for one in batch])
        with torch.no_grad():
            self._sums += torch.stack([answers, questions, (kinds == ANSWER).sum(), at_question.sum()]).to(self._sums)
        return total / num_items_in_batch * self.accelerator.num_processes

    def step_record(self, logs: Mapping[str, float]) -> dict[str, Any]:
        """Both losses in nats per token, and the tokens they are means over."""
        sums = self.accelerator.reduce(self._sums, "sum").tolist()
        self._sums.zero_()
        return step_record(sums, self.recipe)


def step_record(sums: Sequence[float], recipe: Recipe) -> dict[str, Any]:
    """A line of the trace. `sums`: nats of answers and of questions, then their tokens."""
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
class SftWork(Work):
    """What stage 1 learns from."""

    recipe: Recipe
    counts: Counts
    conversations: Sequence[Conversation]
    collator: Collator

    def sets(self) -> set[str]:
        """Those whose name is the first word of a conversation's id, as `stllava-train data` writes them.

        A sample set is another than the official one: `vqarad sample`.
        """
        parts = (conversation.id.partition("-") for conversation in self.conversations)
        return {
            f"{name} sample" if rest.startswith(f"{name}-sample-") else name
            for name, _, rest in parts
            if name in DATASETS
        }


def open_work(
    recipe: Recipe,
    files: Sequence[Path],
    images: Path | None = None,
    allow_test_images: bool = False,
    progress: bool = True,
) -> SftWork:
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
    from stllava_train.check import Images, looked_at
    from stllava_train.conversations import read_files

    rows_of(recipe, processes().num_processes)
    read, problems = read_files(files, images)
    if problems:
        more = f" ({len(problems) - 1} more: `{_check_call(files, images)}`)" if len(problems) > 1 else ""
        raise InputError(f"{problems[0]}{more}")
    conversations = [one for of in read for one in of]
    data = [
        {"file": file.name, **data_hash(file), "conversations": len(of)} for file, of in zip(files, read, strict=True)
    ]
    text = next((one for one in conversations if one.image is None), None)
    if text and recipe.language_model.train == "frozen":
        raise InputError(
            f"{text.place}: {text.id}: it has no image, and only parts that look at one are trained. Leave it out, or "
            "train the language model."
        )
    if steps_of(len(conversations), recipe) == 0:
        raise InputError(f"epochs {recipe.epochs:g}: too few for one step of batch {recipe.batch}. Raise it.")
    validation = questions(recipe)  # a split that is missing is named before any work
    checkpoint = open_start(recipe)
    processor = checkpoint.processor()
    encoder = Encoder(processor, recipe.template, checkpoint.config.image_seq_length)
    padding = checkpoint.config.text_config.pad_token_id or 0
    collator = Collator(conversations, recipe, processor, encoder, padding)
    check = _check_call(files, images)
    length = shlex.join(["--checkpoint", recipe.start, "--max-tokens", str(recipe.max_tokens)])
    counts = count(collator, progress, f"{check} {length}")
    seen = looked_at(conversations, progress) if first_process() else Images([], [], {}, "")
    warn_of_learnt(validation, set(seen.pixels.values()))
    if broken := seen.broken:
        more = f" ({len(broken) - 1} more: `{check}`)" if len(broken) > 1 else ""
        raise InputError(f"{broken[0]} Put it back, or leave the record out.{more}")
    if (found := seen.leaks) and not allow_test_images:
        raise InputError(
            f"{found[0]} {len(found)} of {len(conversations)} conversations show test images: scores on these sets "
            f"would mean nothing. Leave them out (`{check} --write FILE`), or pass --allow-test-images."
        )
    return SftWork(
        recipe=recipe,
        checkpoint=checkpoint,
        counts=counts,
        steps=steps_of(len(conversations), recipe),
        data=data,
        images_sha256=seen.sha256,
        test_images=len(found),
        conversations=conversations,
        collator=collator,
    )


def _check_call(files: Sequence[Path], images: Path | None) -> str:
    """What lists every problem of these files."""
    given = [*map(str, files), *(["--images", str(images)] if images else [])]
    return shlex.join(["stllava-train", "check", *given])


def train(work: SftWork, out: Path, resume: bool = False, progress: bool = True, wandb: bool = False) -> None:
    """Train, and write the folder `out`. See `training.run`. What is learnt from is counted on stderr first."""
    if progress and first_process():
        print(counted(work.conversations), *own_in_words(work.conversations), sep="\n", file=sys.stderr)
    run(work, make_trainer, out, resume, progress, wandb)


def make_trainer(
    work: SftWork, out: Path, trace: Path, progress: bool = True, wandb: bool = False, step: int = 0
) -> SftTrainer:
    """The trainer of `work`, which keeps what it resumes from under `out`, and has taken `step` steps before.

    Raises:
        InputError: The batch cannot be dealt to the processes, or one process sees several GPUs.
    """
    settings = SFTConfig(**arguments(work, out, wandb), dataset_kwargs={"skip_prepare_dataset": True})
    order = plan([[place] for place in range(len(work.conversations))], work.recipe)
    return quiet(
        SftTrainer(
            work,
            trace,
            Examination(work, out, step) if work.recipe.evaluate_on else None,
            model=trained_model(work),
            args=settings,
            data_collator=work.collator,
            train_dataset=Dataset.from_dict({"place": [one for one, _ in order], "epoch": [one for _, one in order]}),
            processing_class=work.collator.encoder.tokenizer,
            callbacks=listeners(
                out, "stage 1", {"answer_loss": "answers", "question_loss": "questions"}, progress, step
            ),
        )
    )


def report(work: SftWork) -> str:
    """What a run would be: tokens, steps, and the weights of each part; for `--dry-run`."""
    counts, recipe = work.counts, work.recipe
    learnt = counts.answer_tokens + counts.question_tokens
    lines = [
        f"{counted(work.conversations)}, {counts.rounds} rounds",
        *own_in_words(work.conversations),
        f"{counts.tokens} tokens in the first epoch, {counts.longest} in the longest conversation",
        f"{learnt} tokens are learnt ({learnt / counts.tokens:.1%}): {counts.answer_tokens} of answers and "
        f"{counts.question_tokens} of questions",
        f"{work.steps} steps of {recipe.batch} conversations: {recipe.epochs:g} epoch{'s' * (recipe.epochs != 1)}",
        *needs(work, counts.longest),
        *([f"{work.test_images} conversations show images of a test split"] if work.test_images else []),
    ]
    return "\n".join(lines)
