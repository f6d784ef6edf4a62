"""Turn the values of a YAML file into typed dataclasses, and explain what is wrong with them.

A file's text -> `plain_yaml` -> these dataclasses -> `recipes`, which checks ranges.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from stllava_eval.errors import InputError
from stllava_eval.storage import read_text
from stllava_train.plain_yaml import read_yaml


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
class StageOverride:
    """A stage's recipe or preset, and `key=value` that is changed of it."""

    recipe: str
    changes: tuple[str, ...]


@dataclass(frozen=True)
class PairSettings:
    """What `stllava-train all` asks of `stllava-train pairs`; each attribute is the option of that name.

    Attributes:
        rule: How verdicts become preferences.
        min_margin: Smallest difference of the two scores, in points; null takes the rule's own.
        per_image: Pairs of an image, at most; null keeps all.
        balance_length: As many pairs with the longer answer chosen as rejected.
        balance_verdict: As many pairs with yes chosen as with no chosen.
        held_out: Share of the images whose pairs go to a file of their own, in [0, 1).
        format: Other trainers for which the pairs are written as well.
    """

    rule: Literal["ours", "authors"] = "ours"
    min_margin: float | None = None
    per_image: int | None = None
    balance_length: bool = False
    balance_verdict: bool = False
    held_out: float = 0.0
    format: tuple[Literal["trl", "authors", "llama-factory", "ms-swift"], ...] = ()

    def as_options(self) -> list[str]:
        """Return the words of the command line that say the same; none for an attribute that has its default."""
        words = []
        for field in fields(self):
            name, value = f"--{field.name.replace('_', '-')}", getattr(self, field.name)
            if value == field.default:
                continue
            if value is True:
                words.append(name)
            else:
                for item in value if isinstance(value, tuple) else (value,):
                    words += [name, str(item)]
        return words


USED = {  # the keys that each way of training a part reads; the others are ignored, and not written
    "frozen": ("train",),
    "full": ("train", "learning_rate"),
    "lora": ("train", "learning_rate", "rank", "alpha", "dropout"),
}


def changed(settings: Any, changes: Sequence[str]) -> Any:
    """Return a frozen dataclass with some of its values changed.

    Args:
        settings: The dataclass, of plain values.
        changes: `key=value` each, the value as YAML.

    Raises:
        InputError: A key is unknown, or a value of another type.
    """
    raw = dict(parse_change(change) for change in changes)
    values = _known(type(settings), raw, " ".join(changes))
    return replace(settings, **values)


def parse_change(text: str) -> tuple[str, Any]:
    """Return the key and the value of `key=value`; raises InputError where the text is something else."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"{text!r}: not key=value, such as epochs=3.")
    return key.strip(), read_yaml(value, text)


def recipe_text(file: Path) -> str:
    """Return the text of a recipe's file; raises InputError where it cannot be read."""
    try:
        return read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror or str(error)
        raise InputError(f"{file}: cannot be read ({why}). Pass a YAML file, such as one of ours.") from error


def nested(path: Sequence[str], value: Any) -> dict[str, Any]:
    """Return a value inside one mapping for each key of the path."""
    head, *rest = path
    return {head: nested(rest, value) if rest else value}


def merged(raw: Mapping[str, Any], change: Mapping[str, Any], location: str = "") -> dict[str, Any]:
    """Return a copy of `raw` with `change` in it; mappings inside are merged key by key.

    Args:
        raw: The values before.
        change: What replaces them, or is added.
        location: The change as it was written, for messages; empty where a value may replace a whole mapping.

    Raises:
        InputError: The change replaces a mapping by another value.
    """
    result = dict(raw)
    for key, value in change.items():
        before = result.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            result[key] = merged(before, value, location)
        elif isinstance(before, dict) and location:
            remedy = f"Change one of its keys, such as {key}.{next(iter(before))}=" if before else "Give a mapping"
            raise InputError(f"{location!r}: {key} is a mapping. {remedy}...")
        else:
            result[key] = value
    return result


def _hints(kind: Any) -> dict[str, Any]:
    """Return the type of each field of a dataclass."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def build(kind: Any, raw: Mapping[str, Any], location: str) -> Any:
    """Return a dataclass of the values in `raw`, whose keys and types are checked.

    Raises:
        InputError: A key is unknown or missing, or a value has another type.
    """
    hints = _hints(kind)
    values = _known(kind, raw, location)
    if kind is Part:
        if "train" not in values:
            raise InputError(f"{location}: train is missing. Choose {', '.join(USED)}.")
        needed, reader = USED[values["train"]], f"A part trained {values['train']} needs {{}}."
    else:
        needed, reader = tuple(hints), "A recipe gives every number."
        values = {field.name: field.default for field in fields(kind) if field.default is not MISSING} | values
    if missing := [key for key in needed if key not in values]:
        raise InputError(f"{location}: {missing[0]} is missing. {reader.format(', '.join(needed))}")
    return kind(**{key: values[key] for key in needed})  # a frozen part forgets the rank of its LoRA


def _known(kind: Any, raw: Mapping[str, Any], location: str) -> dict[str, Any]:
    """Return the values in `raw` as the dataclass types them; raises InputError for an unknown key or a wrong type."""
    hints = _hints(kind)
    for key in raw:
        if key not in hints:
            # `lr` and `wd` are initials of learning_rate and weight_decay, which no measure of similarity finds
            initials = [hint for hint in hints if "".join(word[0] for word in hint.split("_")) == key]
            close = initials or difflib.get_close_matches(key, hints, 1, 0)
            raise InputError(f"{location}: {key}: unknown. Did you mean {close[0]}?")
    return {key: _typed(hints[key], value, f"{location}: {key}") for key, value in raw.items()}


NESTED = {  # the dataclasses that are values of a recipe's keys, and what each looks like, for messages
    Part: "train, learning_rate and so on",
    StageOverride: "recipe and changes",
    PairSettings: "options of `stllava-train pairs` by name, such as {balance_verdict: true}",
}


def _typed(kind: Any, value: Any, location: str) -> Any:
    """Return a value as the type `kind` has it: a list becomes a tuple, a whole number a float; raises InputError."""
    if type(None) in get_args(kind):
        return None if value is None else _typed(get_args(kind)[0], value, location)
    if kind in NESTED:
        if not isinstance(value, dict):
            raise InputError(f"{location}: {value!r} is no mapping. Give {NESTED[kind]}.")
        return build(kind, value, location)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise InputError(f"{location}: {value!r}. Choose one of {', '.join(map(str, get_args(kind)))}.")
        return value
    if get_origin(kind) is tuple:
        item_kind, *rest = get_args(kind)
        if rest != [...] and (not isinstance(value, list) or len(value) != 2):  # tuple[float, float], not [str, ...]
            raise InputError(f"{location}: {value!r} are not two numbers, such as [0.9, 0.999].")
        if not isinstance(value, list):
            raise InputError(f"{location}: {value!r} is no list, such as [a, b].")
        return tuple(_typed(item_kind, item, location) for item in value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str) and value:
        return value
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}
    raise InputError(f"{location}: {value!r} is not {names[kind]}.")
