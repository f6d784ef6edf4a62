"""Read the policy of a gate: margins, error rates, and which scores decide."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stllava_eval.errors import InputError
from stllava_eval.storage import read_text

POLICY_BYTES = 100_000  # largest policy file in bytes (our choice: the default has 1,436)
LEAST = 1e-4  # smallest alpha, margin or limit (our choice: smaller ones only measure rounding errors)
GUARDS = ("unparsed", "closed_format", "words")


@dataclass(frozen=True)
class Policy:
    """What a candidate may lose; gate.yaml explains each value and the source of its default."""

    alpha: float
    margins: Mapping[str, Mapping[str, float]]
    """The margins in points, by data set and score."""
    guards: Mapping[str, float | None]
    unanswered: int


# --- the policy -------------------------------------------------------------------------------------------------------


def read_policy(file: Path | None = None) -> Policy:
    """Return the default policy with the changes that `file` makes.

    Raises:
        InputError: It cannot be read, or a name or number in it is none of a policy's.
    """
    from importlib.resources import files

    import yaml

    default = yaml.safe_load(files("stllava_eval.reports").joinpath("gate.yaml").read_text(encoding="utf-8"))
    given: Any = None
    if file is not None:
        try:
            if file.is_file() and file.stat().st_size > POLICY_BYTES:
                raise InputError(f"{file}: {file.stat().st_size} bytes. A policy is a few lines of YAML.")
            given = _loaded(read_text(file, POLICY_BYTES))
        except InputError:
            raise
        except (OSError, ValueError, LookupError, AttributeError, TypeError, yaml.YAMLError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{file}: cannot be read ({reason}). Pass a YAML file.") from error
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise InputError(f"{file}: not a mapping. A policy has {', '.join(default)}.")
    location = str(file)
    _known(location, given, default)
    margins = {name: dict(margins_of_set) for name, margins_of_set in default["margins"].items()}
    for name, margins_of_set in _mapping(location, "margins", given.get("margins", {})).items():
        if name not in margins:
            raise InputError(f"{location}: margins.{name}: unknown. Margins are of {', '.join(margins)}.")
        _known(f"{location}: margins.{name}", _mapping(location, f"margins.{name}", margins_of_set), margins[name])
        for score, points in margins_of_set.items():
            margins[name][score] = _in(f"{location}: margins.{name}.{score}", points, 0, 100, "points")
    guards = dict(default["guards"])
    changed = _mapping(location, "guards", given.get("guards", {}))
    _known(f"{location}: guards", changed, guards)
    for name, limit in changed.items():
        low, high = {"words": (1, 1000), "speed": (0, 1)}.get(name, (0, 100))
        guards[name] = None if limit is None else _in(f"{location}: guards.{name}", limit, low, high, "or null")
    alpha = _in(f"{location}: alpha", given.get("alpha", default["alpha"]), 0, 0.5, "a chance")
    unanswered = given.get("unanswered", default["unanswered"])
    if type(unanswered) is not int or not 0 <= unanswered <= 10**9:
        raise InputError(f"{location}: unanswered is {_told(unanswered)}. It is a whole number of questions from 0 on.")
    return Policy(alpha, margins, guards, unanswered)


def _loaded(text: str) -> Any:
    """Return the YAML in `text`. Raise ValueError if a name appears twice: YAML would silently take the last one."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{twice[0]} comes twice")
            return super().construct_mapping(node, deep)

    return yaml.load(text, Loader)


def _told(value: Any) -> str:
    """Return a short text for a value; of a container only its type, as YAML aliases can make it very large."""
    if isinstance(value, dict | list | set | tuple) or (isinstance(value, int) and abs(value) > 10**60):
        return f"a {type(value).__name__}"
    return repr(value)[:60]


def _mapping(location: str, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{location}: {name} is {_told(value)}. It maps names to numbers.")
    return value


def _known(location: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    if unknown := [name for name in given if name not in known]:
        raise InputError(f"{location}: {_told(unknown[0])}: unknown. Known are {', '.join(known)}.")


def _in(location: str, value: Any, low: float, high: float, unit: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not max(low, LEAST) < value < high:
        raise InputError(f"{location} is {_told(value)}. It is a number between {low:g} and {high:g}, {unit}.")
    return float(value)
