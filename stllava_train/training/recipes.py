"""Define the recipes of both stages and of the whole, and read them from YAML files and `key=value` changes.

A recipe holds every number of a training run; `preflight` checks it against data and checkpoint, and `run` follows it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from stllava_eval.data.catalog import DATASETS
from stllava_eval.data.splits import is_prepared, read_manifest
from stllava_eval.errors import InputError
from stllava_train.plain_yaml import read_yaml
from stllava_train.training.recipe_yaml import (
    USED,
    PairSettings,
    Part,
    StageOverride,
    build,
    merged,
    nested,
    parse_change,
    recipe_text,
)

RECIPES = Path(__file__).parents[1] / "recipes"
R = TypeVar("R", bound="TrainingRecipe")


@dataclass(frozen=True)
class TrainingRecipe:
    """The settings that the recipes of both stages have in common.

    Attributes:
        start: Checkpoint to start from, folder or hub id, in any layout that `open_checkpoint` reads.
        start_vision_tower: Folder or hub id of the vision tower to start from; null takes that of `start`.
        epochs: Times that every record is seen; the last step is filled up from the next epoch.
        batch: Records in a step, over all processes.
        micro_batch: Records that one device computes at once; it changes the memory needed, not the result.
        max_tokens: Most tokens of a record, those of the image counted. Longer ones are refused.
        warmup: Share of the steps, in [0, 1), over which learning rates rise; then they fall as a cosine to 0.
        weight_decay: Of AdamW, on every weight trained, biases and norms too.
        betas: Of AdamW.
        max_grad_norm: Gradients are scaled down to this length.
        dtype: Of what is frozen and of the computation; what is trained is held in float32.
        four_bit: Hold the frozen language model in 4 bits (NF4, QLoRA).
        gradient_checkpointing: Compute activations again in the backward pass: less memory, a third more time.
        save_every: Steps between two checkpoints to resume from.
        evaluate_on: Prepared validation splits whose questions are asked on the way; none asks nothing.
        evaluate_every: Steps between two such evaluations; the last step has one too.
        evaluate_questions: Of each of these splits, drawn by seed, at most.
        stop_unparsed: Stop where the share of closed answers without a verdict, in [0, 1], has grown by more than this.
    """

    command: ClassVar[str]  # the command of `stllava-train` that it is for, and the folder of our own recipes

    start: str
    start_vision_tower: str | None
    epochs: float
    batch: int
    micro_batch: int
    max_tokens: int
    warmup: float
    weight_decay: float
    betas: tuple[float, float]
    max_grad_norm: float
    dtype: Literal["float32", "bfloat16"]
    four_bit: bool
    gradient_checkpointing: bool
    save_every: int
    evaluate_on: tuple[str, ...]
    evaluate_every: int
    evaluate_questions: int
    stop_unparsed: float
    seed: int
    language_model: Part
    vision_tower: Part
    projector: Part

    def parts(self) -> dict[str, Part]:
        """Return the parts by name, in the order in which their learning rates are shown."""
        return {name: getattr(self, name) for name in ("language_model", "projector", "vision_tower")}

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as a YAML file holds them; a part leaves out what its way of training does not use."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        for name, part in self.parts().items():
            plain[name] = {key: getattr(part, key) for key in USED[part.train]}
        return plain

    def ranges(self) -> Iterator[tuple[str, float, float, float, str]]:
        """Yield (key, value, least, most, the range in words) of each number that is checked."""
        yield "epochs", self.epochs, 1e-6, MOST, "more than 0"
        for key in ("batch", "micro_batch", "max_tokens", "save_every"):
            yield key, getattr(self, key), *COUNT
        yield "warmup", self.warmup, *BELOW_1
        yield "weight_decay", self.weight_decay, *SIZE
        yield "max_grad_norm", self.max_grad_norm, 1e-9, MOST, "more than 0"
        for beta in self.betas:
            yield "betas", beta, *BELOW_1
        for key in ("evaluate_every", "evaluate_questions"):
            yield key, getattr(self, key), *COUNT
        yield "stop_unparsed", self.stop_unparsed, 0, 1, "from 0 to 1"
        yield "seed", self.seed, 0, 2**32 - 1, "from 0 to 4294967295"
        for name, part in self.parts().items():
            if part.train != "frozen":
                yield f"{name}.learning_rate", part.learning_rate, *SIZE
            if part.train == "lora":
                # a LLaMA-13B MLP is 13,824 wide: a larger rank than this is wider than any matrix
                yield f"{name}.rank", part.rank, 1, 2**14, "from 1 to 16384"
                yield f"{name}.alpha", part.alpha, *COUNT
                yield f"{name}.dropout", part.dropout, *BELOW_1

    def contradiction(self) -> str | None:
        """Return what does not go together, as the end of a message; None where everything does."""
        if all(part.train == "frozen" for part in self.parts().values()):
            return f"every part is frozen. Train one of {', '.join(self.parts())}."
        if self.four_bit and self.language_model.train == "full":
            return "four_bit: a language model in 4 bits trains through a LoRA. Set its train to lora."
        if self.four_bit and "lora" not in {part.train for part in self.parts().values()}:
            return "four_bit: transformers trains in 4 bits beside a LoRA only. Set it to false."
        if {self.language_model.train, self.vision_tower.train} == {"lora", "full"}:
            return "one tower is trained lora and the other full. Choose one way, or freeze one."
        if unknown := [name for name in self.evaluate_on if name not in DATASETS]:
            return f"evaluate_on: {unknown[0]}: unknown. Choose of {', '.join(DATASETS)}."
        if len(set(self.evaluate_on)) < len(self.evaluate_on):
            return "evaluate_on: a split comes twice. Name each once."
        if self.evaluate_questions < 2:
            return "evaluate_questions: 1. Ask at least an open and a closed one: 2."
        return None


@dataclass(frozen=True)
class SftRecipe(TrainingRecipe):
    """The recipe of stage 1. A file under `recipes/sft` gives every number and names its source.

    Attributes:
        template: See `conversations.Encoder`.
        sq_r: Probability, in [0, 1], that a question behind the first of an image's conversation is learnt too.
        answer_weight, question_weight: Factors on the losses L_qa and L_vq of a token. Their sum is divided by the
            number of all tokens learnt, so that 1 and 1 give one mean over them, as the authors' code does.
        augment: Show every image a little moved and shaded, differently each time, see `augment.augmented`.
    """

    command: ClassVar[str] = "sft"

    template: Literal["v1", "v1_sq", "either"]
    sq_r: float
    answer_weight: float
    question_weight: float
    augment: bool

    def ranges(self) -> Iterator[tuple[str, float, float, float, str]]:
        """See `TrainingRecipe`."""
        yield "sq_r", self.sq_r, 0, 1, "from 0 to 1"
        yield "answer_weight", self.answer_weight, *SIZE
        yield "question_weight", self.question_weight, *SIZE
        yield from super().ranges()

    def contradiction(self) -> str | None:
        """See `TrainingRecipe`."""
        if self.answer_weight == 0 and self.question_weight * self.sq_r == 0:
            return "answer_weight: 0, and no question is learnt either. Set it to 1."
        return super().contradiction()


OFFSET = "odpo"  # DPO with an offset from the judges' margin, which trl does not have; see `dpo.DpoTrainer`
LOSSES = (  # the losses of trl 1.16's DPOTrainer by their names there, and `OFFSET`
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    OFFSET,
)


@dataclass(frozen=True)
class DpoRecipe(TrainingRecipe):
    """The recipe of stage 2. A file under `recipes/dpo` gives every number and names its source.

    A record is a pair. All pairs of a step count alike, unless their file gives each a weight.

    Attributes:
        template: Of the processor's chat templates; the question is put as in an evaluation.
        loss: Of trl's, by their names there; several are added. `sft` (a mean over tokens), `aot` and `bco_pair` are
            made of the pairs that are computed at once, so that with them `micro_batch` changes the result too. Or
            `odpo` by itself, in which the margin of the judges counts (ODPO, arXiv:2402.10571): the chosen answer is to
            be preferred by more than the logarithm of it.
        loss_weights: A factor for each of them.
        beta: How far the policy may go from the reference: a large one holds it back. 0.1 in the paper.
        label_smoothing: Share of pairs, in [0, 0.5), taken to be the wrong way round; of `sigmoid` it is unused,
            `robust` and `exo_pair` need it.
        ld_alpha: Weight, in [0, 1], of an answer's words beyond the length of the shorter one (LD-DPO,
            arXiv:2409.06411); null and 1 weigh all words alike.
        reference: `cached` computes the reference's log-probabilities once, before the first step, and keeps them for
            any run with the same start, pairs and images; `live` computes them in every step.
    """

    command: ClassVar[str] = "dpo"

    template: Literal["v1", "v1_sq"]
    loss: tuple[str, ...]
    loss_weights: tuple[float, ...]
    beta: float
    label_smoothing: float
    ld_alpha: float | None
    reference: Literal["cached", "live"]

    def ranges(self) -> Iterator[tuple[str, float, float, float, str]]:
        """See `TrainingRecipe`."""
        for weight in self.loss_weights:
            yield "loss_weights", weight, *SIZE
        yield "beta", self.beta, 1e-9, MOST, "more than 0"
        yield "label_smoothing", self.label_smoothing, 0, math.nextafter(0.5, 0), "0 or more and below 0.5"
        if self.ld_alpha is not None:
            yield "ld_alpha", self.ld_alpha, 0, 1, "from 0 to 1"
        yield from super().ranges()

    def contradiction(self) -> str | None:
        """See `TrainingRecipe`."""
        if unknown := [name for name in self.loss if name not in LOSSES]:
            return f"loss: {unknown[0]}: unknown. Choose of {', '.join(LOSSES)}."
        if not self.loss or len(set(self.loss)) < len(self.loss) or len(self.loss) != len(self.loss_weights):
            return "loss: name at least one, each once, and give each its weight in loss_weights."
        if not any(self.loss_weights):
            return "loss_weights: all are 0, so nothing is learnt. Set one to 1."
        if OFFSET in self.loss and (len(self.loss) > 1 or self.ld_alpha is not None):
            return (
                f"loss: {OFFSET} goes with no other loss and with no ld_alpha. Set loss=[{OFFSET}] and ld_alpha=null."
            )
        if "exo_pair" in self.loss and not self.label_smoothing:
            return "label_smoothing: 0, and exo_pair needs more. Its paper (arXiv:2402.00856) has 0.001."
        return super().contradiction()


@dataclass(frozen=True)
class PipelineRecipe:
    """The recipe of the whole self-training: both stages, and what is between them. `recipes/all` has our own.

    Attributes:
        sft: Recipe of stage 1.
        images: How many of the images are asked about, drawn by seed; null asks about all.
        candidates: Preset of `stllava-train candidates`.
        judges: As `stllava-train judge --judge`.
        judge_preset: As its `--preset`.
        judge_max_tokens: As its `--max-tokens`; null leaves that of the preset.
        judge_reasoning: As its `--reasoning`.
        budget: As its `--budget`, of each round; null has none.
        pairs: Options of `stllava-train pairs`, such as `{balance_verdict: true}`.
        dpo: Recipe of stage 2.
        rounds: Times that candidates, verdicts, pairs and stage 2 are made, each from the newest checkpoint.
        tasks: Of the evaluations.
        seed: Of every stage.
    """

    command: ClassVar[str] = "all"

    sft: StageOverride
    images: int | None
    candidates: StageOverride
    judges: tuple[str, ...]
    judge_preset: Literal["ours", "authors"]
    budget: float | None
    pairs: PairSettings
    dpo: StageOverride
    rounds: int
    tasks: tuple[str, ...]
    seed: int
    judge_max_tokens: int | None = None  # these two may be left out, as files of earlier releases do
    judge_reasoning: bool = False


def check_prepared(evaluate_on: Sequence[str], command: str) -> None:
    """Raise InputError where a data set's validation split is not prepared; the message says what can be used instead.

    Args:
        evaluate_on: Names of `DATASETS`.
        command: Of the stage, `sft` or `dpo`: the key's name in a recipe of all begins with it.

    Raises:
        InputError: One is not prepared.
    """
    prepared = [name for name in evaluate_on if is_prepared(name, "validation")]
    for name in evaluate_on:
        if name in prepared:
            continue
        ways = []
        if DATASETS[name].splits["validation"]:
            ways.append(f"`stllava-eval prepare {name} --split validation --from DIR`")
        manifests = [read_manifest(name, split) for split in ("train", "test") if is_prepared(name, split)]
        if all(manifest.sample for manifest in manifests):  # a sample set is refused beside the real one
            ways.append(f"`stllava-eval prepare {name} --sample`")
        run = f"Run {' or '.join(ways)}, or pass" if ways else f"{DATASETS[name].title} has none. Pass"
        change = f"evaluate_on=[{','.join(prepared)}]"
        raise InputError(
            f"evaluate_on: {name} validation is not prepared. {run} {change} (to `all`: {command}.{change})."
        )


MOST = float(2**31)  # our choice: far above any sensible number, and below what overflows
COUNT = (1.0, MOST, "at least 1")
SIZE = (0.0, MOST, "0 or more")
BELOW_1 = (0.0, math.nextafter(1, 0), "0 or more and below 1")


def read_recipe(name: str, changes: Sequence[str] = (), stage: str | None = None) -> SftRecipe:
    """Read a recipe of stage 1 from a YAML file, and apply changes to it.

    A file may hold `stages`, each of which overrides the keys beside it; then `stage` chooses one.

    Args:
        name: A file, or the name of one of ours (`tiny`).
        changes: `key=value` each, the value as YAML; `language_model.learning_rate=1e-4` reaches into a part.
        stage: Name of a stage.

    Raises:
        InputError: The file is missing or no YAML, or a key is unknown, missing, or of the wrong type or range.
    """
    return _read(SftRecipe, name, changes, stage)


def read_dpo_recipe(name: str, changes: Sequence[str] = ()) -> DpoRecipe:
    """Read a recipe of stage 2, as `read_recipe` does for stage 1."""
    return _read(DpoRecipe, name, changes, None)


def read_pipeline(name: str, changes: Sequence[str] = ()) -> PipelineRecipe:
    """Read a recipe of the whole, as `read_recipe` does for stage 1.

    A change whose key begins with `sft.`, `candidates.` or `dpo.` is added to the changes of that stage's own recipe.
    """
    file = _file(name, PipelineRecipe)
    raw = read_yaml(recipe_text(file), str(file))
    if not isinstance(raw, dict):
        raise InputError(f"{file}: it holds no keys. See stllava_train/recipes for examples.")
    location = f"{file} with {' '.join(changes)}" if changes else str(file)
    for change in changes:
        key, value = parse_change(change)
        stage, dot, stage_key = key.partition(".")
        if dot and stage in ("sft", "candidates", "dpo") and stage_key not in ("recipe", "changes"):
            override = raw.get(stage)
            stage_changes = []
            if isinstance(override, dict):  # else `merged` or `build` refuses what is there
                stage_changes = [*(override.get("changes") or []), f"{stage_key}={change.partition('=')[2]}"]
            raw = merged(raw, {stage: {"changes": stage_changes}}, change)
        else:
            raw = merged(raw, nested(key.split("."), value), change)
    recipe: PipelineRecipe = build(PipelineRecipe, raw, location)
    for key in ("rounds", "images"):
        if (count := getattr(recipe, key)) is not None and count < 1:
            raise InputError(f"{location}: {key}: {count}. It is at least 1.")
    if not recipe.judges or not recipe.tasks:
        raise InputError(f"{location}: judges and tasks: name at least one of each.")
    return recipe


def _read(kind: type[R], name: str, changes: Sequence[str], stage: str | None) -> R:
    """Read a recipe of stage 1 or 2: the file, the stage inside it, the changes, in this order of precedence."""
    file = _file(name, kind)
    location = str(file)
    raw = read_yaml(recipe_text(file), location)
    if not isinstance(raw, dict):
        raise InputError(f"{location}: it holds no keys. See stllava_train/recipes for examples.")
    if "stages" in raw:
        stages = raw.pop("stages")
        if not isinstance(stages, dict) or not stages or not all(isinstance(keys, dict) for keys in stages.values()):
            raise InputError(f"{location}: stages: give each stage's name and the keys that it changes.")
        if stage not in stages:
            what = "no stage is named" if stage is None else f"stage {stage!r}: it has none of that name"
            raise InputError(f"{location}: {what}. Choose one with --stage: {', '.join(stages)}.")
        raw = merged(raw, stages[stage])
        location += f", stage {stage}"
    elif stage is not None:
        raise InputError(f"stage {stage!r}: {location} has no stages. Leave it out.")
    for change in changes:
        key, value = parse_change(change)
        raw = merged(raw, nested(key.split("."), value), change)
    if changes:
        location += f" with {' '.join(changes)}"
    if isinstance(projector := raw.get("projector"), dict) and projector.get("train") == "lora":
        raise InputError(f"{location}: projector.train: lora. A projector is never a LoRA: choose full or frozen.")
    recipe = build(kind, raw, location)
    _check(recipe, location)
    return recipe


def recipe_names(kind: Any = SftRecipe) -> list[str]:
    """Return the names of our own recipes of this kind, sorted."""
    return sorted(file.stem for file in (RECIPES / kind.command).glob("*.yaml"))


def _file(name: str, kind: Any) -> Path:
    """Return the file of a recipe: the one of this name, else our own of this kind."""
    for file in (Path(name), RECIPES / kind.command / f"{name}.yaml"):
        try:
            if file.is_file():
                return file
        except (OSError, ValueError):  # a name too long, or with a null character, before Python 3.14
            pass
    close = difflib.get_close_matches(name, recipe_names(kind), 1)
    hint = f"Did you mean {close[0]}?" if close else "Pass a file or one of ours."
    raise InputError(f"recipe {name}: no such file, and ours are {', '.join(recipe_names(kind))}. {hint}")


def _check(recipe: TrainingRecipe, location: str) -> None:
    """Raise InputError where a number is out of its range, or settings do not go together."""
    for key, value, low, high, words in recipe.ranges():
        if not low <= value <= high:
            raise InputError(f"{location}: {key}: {value:g}. It is {words}.")
    if why := recipe.contradiction():
        raise InputError(f"{location}: {why}")
