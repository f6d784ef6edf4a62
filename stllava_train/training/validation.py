"""A network in training -> its scores on validation questions, step by step; the best step's weights are kept."""

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

MAX_NEW_TOKENS = 256  # our choice: a longer answer is cut, which costs time and no point
SCORES = {"open": ("recall", "f1", "words"), "closed": ("closed_accuracy", "unparsed", "words")}
VERSIONS = " ".join(metrics.SCORES[name].signature for name in ("recall", "f1", "closed_accuracy", "unparsed"))


class ValidationCallback(TrainerCallback):
    """Asks questions of prepared validation splits before the first step, every so many steps, and after the last.

    A line each goes to `evaluations.jsonl`: for every split its means of recall and F1 of open questions, accuracy and
    unparsed rate of closed ones (strict parser), words an answer; `score` is the mean over splits of (F1 + closed
    accuracy) / 2, `unparsed` the mean over splits. Kept are the weights of the step with the highest `score`, of equal
    ones the earliest; the start, step 0, is shown beside them and not kept. Training stops where `unparsed` exceeds the
    start's by more than the recipe's `stop_unparsed`: a model that has unlearnt to say yes or no.

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
        figures = [line.get("score"), line.get("unparsed")]
        sets = [line.get(name) for name in self.rows]
        return all(isinstance(one, float | int) and math.isfinite(one) for one in figures) and all(
            isinstance(of, dict) and {"f1", "closed_accuracy", "words"} <= of.keys() for of in sets
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """The start's scores; in a resumed run, a look at the weights that were kept.

        Raises:
            InputError: They are not as they were written.
        """
        if not self.lines:
            self._examine(0, model)
        elif len(self.lines) > 1:
            self._best_weights({name for name, _ in _trained(model)})

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """See the class."""
        step = state.global_step
        if step % self.recipe.evaluate_every and step != state.max_steps:
            return
        self._examine(step, model)
        control.should_training_stop |= self.collapsed

    @property
    def collapsed(self) -> bool:
        """Whether yes and no had been unlearnt at the last evaluation."""
        allowed = self.lines[0]["unparsed"] + self.recipe.stop_unparsed if self.lines else math.inf
        return len(self.lines) > 1 and self.lines[-1]["unparsed"] > allowed

    def _examine(self, step: int, model: Any) -> None:
        from accelerate.utils import broadcast_object_list

        held: list[Any] = [None]
        if first_process():
            policy = _unwrapped(model)
            with _resting(policy), torch.autocast(policy.device.type, torch.bfloat16, enabled=self.in_16_bits):
                held[0] = {"step": step, "versions": VERSIONS, "questions": self.asked} | self._scores(policy)
            with self.trace.open("a", encoding="utf-8") as file:
                file.write(json.dumps(held[0]) + "\n")
        broadcast_object_list(held)
        self.lines.append(held[0])
        if step and step == self.best["step"] and first_process():  # a file each: a run may resume from before the last
            with whole_file(self._file(step)) as unfinished:
                save_file({name: one.detach().cpu().contiguous() for name, one in _trained(model)}, unfinished)
            self._drop_beaten()

    def _drop_beaten(self) -> None:
        """Delete the weights of earlier best steps that no run can resume from: a file may hold a whole network."""
        ends = [folder.name.rpartition("-")[2] for folder in self.folder.glob("checkpoint-*")]
        before = [_best(self.lines, int(end)) for end in ends if end.isdecimal()]
        needed = {self._file(line["step"]) for line in (self.best, *before) if line}
        for file in self.folder.glob("best-*.safetensors"):
            if file not in needed:
                file.unlink()

    def _file(self, step: int) -> Path:
        return self.folder / f"best-{step}.safetensors"

    def _best_weights(self, names: set[str]) -> dict[str, torch.Tensor]:
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
        """The line of the step that is kept."""
        best = _best(self.lines, self.lines[-1]["step"])
        assert best is not None
        return best

    def keep_best(self, model: Any) -> dict[str, Any]:
        """Load the best step's weights; what it was, for `run.json`."""
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
        answerer = Answerer(self.recipe.start, model=policy, vision_tower=self.recipe.start_vision_tower)
        found: dict[str, Any] = {name: _means(answerer, rows) for name, rows in self.rows.items()}
        halves = [(of["f1"] + of["closed_accuracy"]) / 2 for of in found.values()]
        found["score"] = sum(halves) / len(halves)
        found["unparsed"] = sum(of["unparsed"] for of in found.values() if isinstance(of, dict)) / len(halves)
        return found


def _best(lines: Sequence[dict[str, Any]], end: int) -> dict[str, Any] | None:
    """Of the evaluations up to step `end`, the start's left out, the one with the highest score, and the earliest."""
    of = (line for line in lines if 0 < line["step"] <= end)
    return max(of, key=lambda line: (line["score"], -line["step"]), default=None)


def _hash(rows: Mapping[str, Sequence[Row]]) -> str:
    """Of everything that decides the scores of the same answers, in 16 hex digits."""
    asked = [
        [name, row.id, row.question, row.reference, row.kind, hashlib.sha256(row.image).hexdigest()]
        for name, of in rows.items()
        for row in of
    ]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def questions(recipe: TrainingRecipe) -> dict[str, list[Row]]:
    """Of each validation split, at most so many: open and closed ones in the split's proportion, at least one of each.

    Always the same ones, in the split's order; none where the recipe evaluates on none.

    Raises:
        InputError: A split is not prepared, or lacks a kind.
    """
    check_prepared(recipe.evaluate_on, recipe.command)
    return {name: _drawn(name, recipe.evaluate_questions) for name in recipe.evaluate_on}


def warn_of_learnt(rows: Mapping[str, Sequence[Row]], learnt: Collection[str]) -> None:
    """Warn where images that are asked about are trained on too, a line for each split.

    Args:
        rows: As `questions` gives them.
        learnt: `pixel_hash` of each image that is trained on.
    """
    for name, of in rows.items():
        images = {row.image_id: row.image for row in of}
        both = [image for image, file in images.items() if pixel_hash(decode(file)) in learnt]
        if both:
            log.warning(
                "evaluate_on: %s validation: %d of the %d images that are asked about are trained on, such as %s, so "
                "its score shows in part what is remembered",
                *(name, len(both), len(images), both[0]),
            )


def _drawn(name: str, most: int) -> list[Row]:
    rows = read_rows(name, "validation")
    of = {kind: [number for number, row in enumerate(rows) if row.kind == kind] for kind in ("open", "closed")}
    if not all(of.values()):
        raise InputError(f"evaluate_on: {name}: its validation split lacks open or closed questions. Leave it out.")
    most = min(most, len(rows))
    count = min(max(1, round(most * len(of["open"]) / len(rows))), most - 1)
    draw = random.Random(0)
    kept = {*draw.sample(of["open"], count), *draw.sample(of["closed"], min(most - count, len(of["closed"])))}
    return [row for number, row in enumerate(rows) if number in kept]


def _means(answerer: Answerer, rows: Sequence[Row]) -> dict[str, float]:
    """Means of `SCORES` over the rows of their kind, and how many of each kind there are."""
    asked = [
        Question(row.question, lambda row=row: decode(row.image), MAX_NEW_TOKENS, image_key=row.image_id)  # type: ignore[misc]
        for row in rows
    ]
    answers = {place: answer.text for place, answer in only_answers(answerer.answer(asked, progress=False))}
    sums: dict[str, list[float]] = {}
    for place, row in enumerate(rows):
        values: Mapping[str, float] = metrics.score(answers[place], row.reference, row.kind, row.question)
        for name in SCORES[row.kind]:
            if name in values:
                sums.setdefault(name, []).append(values[name])
    counts = {kind: sum(row.kind == kind for row in rows) for kind in SCORES}
    return {name: sum(of) / len(of) for name, of in sums.items()} | counts


def _unwrapped(model: Any) -> Any:
    """The network itself, in which adapters are at work."""
    inner = getattr(model, "module", model)  # DDP's
    return inner.get_base_model() if hasattr(inner, "peft_config") else inner


def _trained(model: Any) -> Iterator[tuple[str, Any]]:
    """(name, parameter) of what is trained."""
    inner = getattr(model, "module", model)
    return ((name, one) for name, one in inner.named_parameters() if one.requires_grad)


@contextmanager
def _resting(policy: Any) -> Iterator[None]:
    """Without dropout for a while."""
    training = [module for module in policy.modules() if module.training]
    policy.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
