"""Score a network in training on validation questions, step by step, and keep the best step's weights."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from stllava_eval.data.catalog import Row
from stllava_eval.data.splits import read_rows
from stllava_eval.errors import InputError, one_line
from stllava_eval.images import decode, pixel_hash
from stllava_eval.inference.answerer import Answerer, only_answers
from stllava_eval.inference.types import Question
from stllava_eval.scoring import metrics
from stllava_eval.storage import whole_file
from stllava_train.training.processes import first_process
from stllava_train.training.recipes import TrainingRecipe, check_prepared
from stllava_train.training.resume import read_trace

log = logging.getLogger("stllava_train")

MAX_NEW_TOKENS = 256  # our choice: references are short, so that more tokens would cost time for nothing
SCORES = {"open": ("recall", "f1", "words"), "closed": ("closed_accuracy", "unparsed", "words")}
VERSIONS = " ".join(metrics.SCORES[name].signature for name in ("recall", "f1", "closed_accuracy", "unparsed"))


class ValidationCallback(TrainerCallback):
    """Ask questions of prepared validation splits before the first step, every so many steps, and after the last.

    Each evaluation writes a line to `evaluations.jsonl`: for every split the means of recall and F1 of open questions,
    of accuracy and unparsed rate of closed ones (strict parser), and of words per answer; `score` is the mean over
    splits of (F1 + closed accuracy) / 2, and `unparsed` the mean over splits. The weights of the step with the highest
    `score` are kept, of equal ones the earliest; the start, step 0, is shown beside them and not kept. Training stops
    where `unparsed` exceeds the start's by more than the recipe's `stop_unparsed`: such a model no longer says yes or
    no.

    Args:
        recipe: The recipe of the run, of either stage.
        steps: Steps of the whole run.
        out: The folder of the run.
        step: Steps taken before, in a run that is resumed.

    Raises:
        InputError: A split is not prepared, or of a resumed run an evaluation is missing or damaged, or asked
            other questions.
    """

    def __init__(self, recipe: TrainingRecipe, steps: int, out: Path, step: int) -> None:
        self.recipe, self.steps = recipe, steps
        self.trace, self.folder = out / "evaluations.jsonl", out / "checkpoints"
        self.rows = questions(recipe)
        self.in_16_bits = recipe.dtype == "bfloat16"  # as in a step: what is trained is held in float32
        self.lines = [line for line in read_trace(self.trace) if line["step"] <= step] if step else []
        every = recipe.evaluate_every
        wanted = {0, *range(every, step + 1, every)} if step else set()
        wanted |= {step} & {steps}  # the last step has one, whatever its number
        if not wanted <= {line["step"] for line in self.lines} or not all(map(self._is_whole, self.lines)):
            raise InputError(
                f"{self.trace}: an evaluation up to step {step} is missing or damaged. Put the file back, or train "
                "again with another --out."
            )
        if others := {str(line.get("versions")) for line in self.lines} - {VERSIONS}:
            raise InputError(
                f"{self.trace}: scored by other versions ({', '.join(sorted(others))}) than today's ({VERSIONS}), so "
                "steps do not compare. Use the release that began this run, or train again with another --out."
            )
        self.asked = _hash(self.rows)
        if any(line.get("questions", self.asked) != self.asked for line in self.lines):
            raise InputError(
                f"{self.trace}: it was evaluated on other questions than the validation splits have now, so steps do "
                "not compare. Prepare the splits as they were, or train again with another --out."
            )
        if first_process():
            with whole_file(self.trace) as unfinished:
                unfinished.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")

    def _is_whole(self, line: dict[str, Any]) -> bool:
        """Return whether a line of the trace has every figure that is read."""
        for name in ("score", "unparsed"):
            value = line.get(name)
            if not isinstance(value, float | int) or not math.isfinite(value):
                return False
        for name in self.rows:
            means = line.get(name)
            if not isinstance(means, dict) or not {"f1", "closed_accuracy", "words"} <= means.keys():
                return False
        return True

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Score the start; in a resumed run, check the weights that were kept.

        Raises:
            InputError: They are not as they were written.
        """
        if not self.lines:
            self._evaluate(0, model)
        elif len(self.lines) > 1:
            self._best_weights({name for name, _ in _trained(model)})

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Score the network where an evaluation is due, and stop the training where it has collapsed."""
        step = state.global_step
        if step % self.recipe.evaluate_every and step != state.max_steps:
            return
        self._evaluate(step, model)
        control.should_training_stop |= self.collapsed

    @property
    def collapsed(self) -> bool:
        """Return whether at the last evaluation too many closed answers had no verdict."""
        allowed = self.lines[0]["unparsed"] + self.recipe.stop_unparsed if self.lines else math.inf
        return len(self.lines) > 1 and self.lines[-1]["unparsed"] > allowed

    def _evaluate(self, step: int, model: Any) -> None:
        """Score the network on the first process, share the line with the others, and keep the best weights."""
        from accelerate.utils import broadcast_object_list

        held: list[Any] = [None]
        if first_process():
            policy = _unwrapped(model)
            with _evaluating(policy), torch.autocast(policy.device.type, torch.bfloat16, enabled=self.in_16_bits):
                held[0] = {"step": step, "versions": VERSIONS, "questions": self.asked} | self._scores(policy)
            with self.trace.open("a", encoding="utf-8") as file:
                file.write(json.dumps(held[0]) + "\n")
        broadcast_object_list(held)
        self.lines.append(held[0])
        if step and step == self.best["step"] and first_process():
            # each best step has a file of its own, because a run may resume from a step before the newest best one
            weights = {name: parameter.detach().cpu().contiguous() for name, parameter in _trained(model)}
            with whole_file(self._file(step)) as unfinished:
                save_file(weights, unfinished)
            self._drop_beaten()

    def _drop_beaten(self) -> None:
        """Delete the weights of earlier best steps that no run can resume from: a file may hold a whole network."""
        ends = [folder.name.rpartition("-")[2] for folder in self.folder.glob("checkpoint-*")]
        best_then = [_best(self.lines, int(end)) for end in ends if end.isdecimal()]
        needed = {self._file(line["step"]) for line in (self.best, *best_then) if line}
        for file in self.folder.glob("best-*.safetensors"):
            if file not in needed:
                file.unlink()

    def _file(self, step: int) -> Path:
        """Return the file of the weights of a best step."""
        return self.folder / f"best-{step}.safetensors"

    def _best_weights(self, names: set[str]) -> dict[str, torch.Tensor]:
        """Read the weights of the best step, which must have these names; raises InputError where they do not."""
        file = self._file(self.best["step"])
        try:
            weights = load_file(file)
        except (OSError, SafetensorError) as error:
            why = one_line(error) if file.exists() else "the file is gone"
            raise InputError(
                f"{file}: the weights of the best step cannot be read ({why}). Put the file back, or train "
                "again with another --out."
            ) from error
        if weights.keys() != names:
            raise InputError(f"{file}: weights of another run. Put the file back, or train again with another --out.")
        return weights

    @property
    def best(self) -> dict[str, Any]:
        """Return the line of the step whose weights are kept."""
        best = _best(self.lines, self.lines[-1]["step"])
        assert best is not None
        return best

    def keep_best(self, model: Any) -> dict[str, Any]:
        """Load the best step's weights into the model; return which step it was and its scores, for `run.json`."""
        best = self._best_weights({name for name, _ in _trained(model)})
        with torch.no_grad():
            for name, parameter in _trained(model):
                parameter.copy_(best[name])
        last, start = self.lines[-1], self.lines[0]
        return {
            "kept": {
                "step": self.best["step"],
                "score": self.best["score"],
                "start": start["score"],
                "last": last["score"],
                "stopped": self.collapsed and last["step"] < self.steps,
            }
        }

    def _scores(self, policy: Any) -> dict[str, Any]:
        """Return the means of each split, and over splits `score` and `unparsed`, all in [0, 1] but words."""
        answerer = Answerer(self.recipe.start, model=policy, vision_tower=self.recipe.start_vision_tower)
        means = {name: _means(answerer, rows) for name, rows in self.rows.items()}
        scores = [(split["f1"] + split["closed_accuracy"]) / 2 for split in means.values()]
        unparsed = [split["unparsed"] for split in means.values()]
        return {**means, "score": sum(scores) / len(scores), "unparsed": sum(unparsed) / len(unparsed)}


def _best(lines: Sequence[dict[str, Any]], end: int) -> dict[str, Any] | None:
    """Return the evaluation with the highest score up to step `end`, without the start; of equal ones the earliest."""
    until_then = [line for line in lines if 0 < line["step"] <= end]
    return max(until_then, key=lambda line: (line["score"], -line["step"]), default=None)


def _hash(rows: Mapping[str, Sequence[Row]]) -> str:
    """Return a hash, in 16 hex digits, of everything that decides the scores of the same answers."""
    asked = []
    for name, split_rows in rows.items():
        for row in split_rows:
            image_sha256 = hashlib.sha256(row.image).hexdigest()
            asked.append([name, row.id, row.question, row.reference, row.kind, image_sha256])
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def questions(recipe: TrainingRecipe) -> dict[str, list[Row]]:
    """Return the questions of each validation split, open and closed in the split's proportion, at least one of each.

    They are always the same ones, in the split's order, and at most as many as the recipe says; there are none where
    the recipe evaluates on no split.

    Raises:
        InputError: A split is not prepared, or lacks a kind.
    """
    check_prepared(recipe.evaluate_on, recipe.command)
    return {name: _sampled(name, recipe.evaluate_questions) for name in recipe.evaluate_on}


def warn_of_learnt(rows: Mapping[str, Sequence[Row]], learnt: Collection[str]) -> None:
    """Warn where images of validation questions are trained on too, in a line for each split.

    Args:
        rows: As `questions` gives them.
        learnt: `pixel_hash` of each image that is trained on.
    """
    for name, split_rows in rows.items():
        images = {row.image_id: row.image for row in split_rows}
        trained_on = [image_id for image_id, image in images.items() if pixel_hash(decode(image)) in learnt]
        if trained_on:
            log.warning(
                "evaluate_on: %s validation: %d of the %d images that are asked about are trained on, such as %s, so "
                "its score shows in part what is remembered",
                *(name, len(trained_on), len(images), trained_on[0]),
            )


def _sampled(name: str, most: int) -> list[Row]:
    """Return at most `most` questions of a validation split, in its order, stratified by kind."""
    rows = read_rows(name, "validation")
    open_rows = [index for index, row in enumerate(rows) if row.kind == "open"]
    closed_rows = [index for index, row in enumerate(rows) if row.kind == "closed"]
    if not open_rows or not closed_rows:
        raise InputError(f"evaluate_on: {name}: its validation split lacks open or closed questions. Leave it out.")
    most = min(most, len(rows))
    open_count = min(max(1, round(most * len(open_rows) / len(rows))), most - 1)
    closed_count = min(most - open_count, len(closed_rows))
    generator = random.Random(0)  # fixed, so that every run is asked the same questions
    kept = {*generator.sample(open_rows, open_count), *generator.sample(closed_rows, closed_count)}
    return [row for index, row in enumerate(rows) if index in kept]


def _means(answerer: Answerer, rows: Sequence[Row]) -> dict[str, float]:
    """Return the means of `SCORES` over the rows of their kind, and how many rows of each kind there are."""
    asked = [
        Question(row.question, lambda row=row: decode(row.image), MAX_NEW_TOKENS, image_key=row.image_id)  # type: ignore[misc]
        for row in rows
    ]
    answers = {index: answer.text for index, answer in only_answers(answerer.answer(asked, progress=False))}
    scores: dict[str, list[float]] = {}
    for index, row in enumerate(rows):
        values: Mapping[str, float] = metrics.score(answers[index], row.reference, row.kind, row.question)
        for name in SCORES[row.kind]:
            if name in values:
                scores.setdefault(name, []).append(values[name])
    counts = {kind: sum(row.kind == kind for row in rows) for kind in SCORES}
    return {name: sum(values) / len(values) for name, values in scores.items()} | counts


def _unwrapped(model: Any) -> Any:
    """Return the network inside the wrappers of DDP and PEFT; adapters work in its layers."""
    inner = getattr(model, "module", model)  # DDP keeps the network in `module`
    return inner.get_base_model() if hasattr(inner, "peft_config") else inner


def _trained(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, parameter) of each parameter that is trained."""
    inner = getattr(model, "module", model)
    return ((name, parameter) for name, parameter in inner.named_parameters() if parameter.requires_grad)


@contextmanager
def _evaluating(policy: Any) -> Iterator[None]:
    """Switch dropout off inside the block, and back on afterwards in the modules that had it."""
    training = [module for module in policy.modules() if module.training]
    policy.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
