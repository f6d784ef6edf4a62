"""A YAML file + `key=value` -> a recipe: every number of a training run."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from stllava_eval.errors import InputError

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Part:
    """How one part of the network is trained: not at all, through a LoRA, or all of its weights.

    Attributes:
        learning_rate: Peak, 0 or more; unused where frozen.
        rank, alpha, dropout: Of the LoRA; dropout in [0, 1). Its update is alpha / rank * B @ A.
    """

    train: Literal["frozen", "lora", "full"]
    learning_rate: float = 0.0
    rank: int = 0
    alpha: int = 0
    dropout: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """Stage 1, as numbers. A file under `recipes/` gives every one of them and names its source.

    Attributes:
        start: Checkpoint to start from, folder or hub id, in any layout that `open_checkpoint` reads.
        start_vision_tower: Folder or hub id of the vision tower to start from; null takes that of `start`.
        template: See `conversations.Encoder`.
        sq_r: Probability, in [0, 1], that a question behind the first of an image's conversation is learnt too.
        answer_weight, question_weight: Factors on the losses L_qa and L_vq of a token. Their sum is divided by the
            number of all tokens learnt, so that 1 and 1 give one mean over them, as the authors' code does.
        epochs: Times that every conversation is seen; the last step is filled up from the next epoch.
        batch: Conversations in a step, over all processes.
        micro_batch: Conversations that one device computes at once; it changes the memory needed, not the result.
        max_tokens: Most tokens of a conversation, those of the image counted. Longer ones are refused.
        augment: Show every image a little moved and shaded anew each time, see `augment.augmented`.
        warmup: Share of the steps, in [0, 1), over which learning rates rise; then they fall as a cosine to 0.
        weight_decay: Of AdamW, on every weight trained, biases and norms too.
        betas: Of AdamW.
        max_grad_norm: Gradients are scaled down to this length.
        dtype: Of what is frozen and of the computation; what is trained is held in float32.
        four_bit: Hold the frozen language model in 4 bits (NF4, QLoRA).
        gradient_checkpointing: Compute activations anew in the backward pass: less memory, a third more time.
        save_every: Steps between two checkpoints to resume from.
    """

    start: str
    start_vision_tower: str | None
    template: Literal["v1", "v1_sq", "either"]
    sq_r: float
    answer_weight: float
    question_weight: float
    epochs: float
    batch: int
    micro_batch: int
    max_tokens: int
    augment: bool
    warmup: float
    weight_decay: float
    betas: tuple[float, float]
    max_grad_norm: float
    dtype: Literal["float32", "bfloat16"]
    four_bit: bool
    gradient_checkpointing: bool
    save_every: int
    seed: int
    language_model: Part
    vision_tower: Part
    projector: Part

    def parts(self) -> dict[str, Part]:
        """By name, the one whose learning rate is shown first in front."""
        return {name: getattr(self, name) for name in ("language_model", "projector", "vision_tower")}

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as a YAML file holds them; a part without what its way of training does not use."""
        plain = asdict(self) | {"betas": list(self.betas)}
        for name, part in self.parts().items():
            plain[name] = {key: getattr(part, key) for key in USED[part.train]}
        return plain


USED = {
    "frozen": ("train",),
    "full": ("train", "learning_rate"),
    "lora": ("train", "learning_rate", "rank", "alpha", "dropout"),
}


def read_recipe(name: str, changes: Sequence[str] = (), stage: str | None = None) -> Recipe:
    """The recipe of a YAML file, changed.

    A file may hold `stages`, each of which overrides the keys beside it; then `stage` chooses one.

    Args:
        name: A file, or the name of one of ours (`tiny`).
        changes: `key=value` each, the value as YAML; `language_model.learning_rate=1e-4` reaches into a part.
        stage: Name of a stage.

    Raises:
        InputError: The file is missing or no YAML, or a key is unknown, missing, or of the wrong type or range.
    """
    file = _file(name)
    place = str(file)
    raw = _yaml(_text(file), place)
    if not isinstance(raw, dict):
        raise InputError(f"{place}: it holds no keys. See stllava_train/recipes for examples.")
    if "stages" in raw:
        stages = raw.pop("stages")
        if not isinstance(stages, dict) or not stages or not all(isinstance(one, dict) for one in stages.values()):
            raise InputError(f"{place}: stages: give each stage's name and the keys that it changes.")
        if stage not in stages:
            given = "no stage is named" if stage is None else f"stage {stage!r}: it has none of that name"
            raise InputError(f"{place}: {given}. Choose one with --stage: {', '.join(stages)}.")
        raw = _merged(raw, stages[stage])
        place += f", stage {stage}"
    elif stage is not None:
        raise InputError(f"stage {stage!r}: {place} has no stages. Leave it out.")
    for change in changes:
        key, value = _change(change)
        raw = _merged(raw, _nested(key.split("."), value), change)
    if changes:
        place += f" with {' '.join(changes)}"
    if isinstance(projector := raw.get("projector"), dict) and projector.get("train") == "lora":
        raise InputError(f"{place}: projector.train: lora. A projector is never a LoRA: choose full or frozen.")
    recipe = _build(Recipe, raw, place)
    _check(recipe, place)
    return recipe


def changed(settings: Any, changes: Sequence[str]) -> Any:
    """A frozen dataclass with some of its values changed.

    Args:
        settings: The dataclass, of plain values.
        changes: `key=value` each, the value as YAML.

    Raises:
        InputError: A key is unknown, or a value of another type.
    """
    raw = dict(_change(change) for change in changes)
    values = _known(type(settings), raw, " ".join(changes))
    return replace(settings, **values)


def _change(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"{text!r}: not key=value, such as epochs=3.")
    return key.strip(), _yaml(value, text)


def recipe_names() -> list[str]:
    """Of the files under `recipes/`."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def _file(name: str) -> Path:
    for file in (Path(name), RECIPES / f"{name}.yaml"):
        try:
            if file.is_file():
                return file
        except (OSError, ValueError):  # a name too long, or with a null character, before Python 3.14
            pass
    close = difflib.get_close_matches(name, recipe_names(), 1)
    hint = f"Did you mean {close[0]}?" if close else "Pass a file or one of ours."
    raise InputError(f"recipe {name}: no such file, and ours are {', '.join(recipe_names())}. {hint}")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror or str(error)
        raise InputError(f"{file}: cannot be read ({why}). Pass a YAML file, such as one of ours.") from error


def _yaml(text: str, place: str) -> Any:
    """Texts, numbers, true, false, null, lists, and dicts by text: the part of YAML 1.2 that recipes need.

    PyYAML's own YAML 1.1 takes 2e-4 for a text, `no` for false, 010 for 8 and 1:30 for 90, and of a key that stands
    twice the last one wins. Aliases, which can make a page of text fill the memory, and tags are refused.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # ours, below, and none of PyYAML's

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
                raise yaml.MarkedYAMLError(problem="an alias or a tag", problem_mark=event.start_mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[str, Any]:
            made: dict[str, Any] = {}
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.value in made:
                    what = f"{key.value} stands there twice" if isinstance(key, yaml.ScalarNode) else "a key is no text"
                    raise yaml.MarkedYAMLError(problem=what, problem_mark=key.start_mark)
                made[key.value] = self.construct_object(value, deep=True)
            return made

    for tag, pattern, first in (
        ("null", r"(?:null|~|)$", ["n", "~", ""]),
        ("bool", r"(?:true|false)$", ["t", "f"]),
        ("int", r"[-+]?(?:0|[1-9]\d{0,99})$", list("-+0123456789")),
        ("float", r"[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$", list("-+.0123456789")),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), first)
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or "nested too deeply"
        raise InputError(f"{place}{line}: no YAML that recipes are written in ({what}). Mend it.") from error


def _nested(path: Sequence[str], value: Any) -> dict[str, Any]:
    head, *rest = path
    return {head: _nested(rest, value) if rest else value}


def _merged(raw: Mapping[str, Any], change: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """`raw` with `change` in it; parts are merged key by key."""
    both = dict(raw)
    for key, value in change.items():
        before = both.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            both[key] = _merged(before, value, place)
        elif isinstance(before, dict) and place:
            raise InputError(f"{place!r}: {key} is a part. Change one of its keys, such as {key}.learning_rate=1e-4.")
        else:
            both[key] = value
    return both


def _build(kind: Any, raw: Mapping[str, Any], place: str) -> Any:
    """A dataclass of `raw`, whose keys and types are checked."""
    hints = get_type_hints(kind)
    values = _known(kind, raw, place)
    if kind is Part:
        if "train" not in values:
            raise InputError(f"{place}: train is missing. Choose {', '.join(USED)}.")
        needed, reader = USED[values["train"]], f"A part trained {values['train']} needs {{}}."
    else:
        needed, reader = tuple(hints), "A recipe gives every number."
    if missing := [key for key in needed if key not in values]:
        raise InputError(f"{place}: {missing[0]} is missing. {reader.format(', '.join(needed))}")
    return kind(**{key: values[key] for key in needed})  # a frozen part forgets the rank of its LoRA


def _known(kind: Any, raw: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The values of `raw`, all of them keys of the dataclass and of its types."""
    hints = get_type_hints(kind)
    for key in raw:
        if key not in hints:
            initials = [hint for hint in hints if "".join(word[0] for word in hint.split("_")) == key]  # lr, wd
            close = initials or difflib.get_close_matches(key, hints, 1, 0)
            raise InputError(f"{place}: {key}: unknown. Did you mean {close[0]}?")
    return {key: _typed(hints[key], value, f"{place}: {key}") for key, value in raw.items()}


def _typed(kind: Any, value: Any, place: str) -> Any:
    if type(None) in get_args(kind):
        return None if value is None else _typed(get_args(kind)[0], value, place)
    if kind is Part:
        if not isinstance(value, dict):
            raise InputError(f"{place}: {value!r} is no part. Give train, learning_rate and so on.")
        return _build(Part, value, place)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise InputError(f"{place}: {value!r}. Choose one of {', '.join(map(str, get_args(kind)))}.")
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, list) or len(value) != 2:
            raise InputError(f"{place}: {value!r} are not two numbers, such as [0.9, 0.999].")
        return tuple(_typed(float, one, place) for one in value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str) and value:
        return value
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}
    raise InputError(f"{place}: {value!r} is not {names[kind]}.")


def _check(recipe: Recipe, place: str) -> None:
    """Ranges, and what does not go together."""
    for key, value, low, high, words in _ranges(recipe):
        if not low <= value <= high:
            raise InputError(f"{place}: {key}: {value:g}. It is {words}.")
    if all(part.train == "frozen" for part in recipe.parts().values()):
        raise InputError(f"{place}: every part is frozen. Train one of {', '.join(recipe.parts())}.")
    if recipe.answer_weight == 0 and recipe.question_weight * recipe.sq_r == 0:
        raise InputError(f"{place}: answer_weight: 0, and no question is learnt either. Set it to 1.")
    if recipe.four_bit and recipe.language_model.train == "full":
        raise InputError(f"{place}: four_bit: a language model in 4 bits trains through a LoRA. Set its train to lora.")
    if recipe.four_bit and "lora" not in {part.train for part in recipe.parts().values()}:
        raise InputError(f"{place}: four_bit: transformers trains in 4 bits beside a LoRA only. Set it to false.")
    if {recipe.language_model.train, recipe.vision_tower.train} == {"lora", "full"}:
        raise InputError(f"{place}: one tower is trained lora and the other full. Choose one way, or freeze one.")


def _ranges(recipe: Recipe) -> Iterator[tuple[str, float, float, float, str]]:
    """(key, value, least, most, what it may be)."""
    most = float(2**31)
    share, below_1 = (0.0, math.nextafter(1, 0)), "0 or more and below 1"
    size, count = (0.0, most), (1.0, most)
    yield "sq_r", recipe.sq_r, 0, 1, "from 0 to 1"
    yield "answer_weight", recipe.answer_weight, *size, "0 or more"
    yield "question_weight", recipe.question_weight, *size, "0 or more"
    yield "epochs", recipe.epochs, 1e-6, most, "more than 0"
    for key in ("batch", "micro_batch", "max_tokens", "save_every"):
        yield key, getattr(recipe, key), *count, "at least 1"
    yield "warmup", recipe.warmup, *share, below_1
    yield "weight_decay", recipe.weight_decay, *size, "0 or more"
    yield "max_grad_norm", recipe.max_grad_norm, 1e-9, most, "more than 0"
    for beta in recipe.betas:
        yield "betas", beta, *share, below_1
    yield "seed", recipe.seed, 0, 2**32 - 1, "from 0 to 4294967295"
    for name, part in recipe.parts().items():
        if part.train != "frozen":
            yield f"{name}.learning_rate", part.learning_rate, *size, "0 or more"
        if part.train == "lora":
            yield f"{name}.rank", part.rank, 1, 2**14, "from 1 to 16384"  # no matrix of ours is wider
            yield f"{name}.alpha", part.alpha, *count, "at least 1"
            yield f"{name}.dropout", part.dropout, *share, below_1
