"""Conversations in; stage 1, preference pairs, DPO and a checkpoint out, for `stllava_eval` to score.

The names below are the public API (docs/reference/python.md). Each is imported when it is first used, so that
importing the package loads no torch.
"""

TYPE_CHECKING = False  # as in stllava_eval: mypy takes a variable of this name for true
if TYPE_CHECKING:
    from typing import Any

    from stllava_train.data.conversations import read_conversations
    from stllava_train.pipeline import Pipeline
    from stllava_train.preferences.pair_formats import write_pairs
    from stllava_train.preferences.pair_selection import select_pairs
    from stllava_train.preferences.pairs import make_pairs, read_pairs
    from stllava_train.preferences.rows import read_candidates
    from stllava_train.preferences.verdicts import Rule, read_verdicts
    from stllava_train.training import dpo, sft
    from stllava_train.training.recipes import read_dpo_recipe, read_recipe

_MODULES = {  # public name -> the module that defines it
    "Pipeline": "pipeline",
    "Rule": "preferences.verdicts",
    "make_pairs": "preferences.pairs",
    "read_candidates": "preferences.rows",
    "read_conversations": "data.conversations",
    "read_dpo_recipe": "training.recipes",
    "read_pairs": "preferences.pairs",
    "read_recipe": "training.recipes",
    "read_verdicts": "preferences.verdicts",
    "select_pairs": "preferences.pair_selection",
    "write_pairs": "preferences.pair_formats",
}
_STAGES = ("dpo", "sft")  # modules of `training` with `prepare_run`, `report` and `train` each

__all__ = [
    "Pipeline",
    "Rule",
    "dpo",
    "make_pairs",
    "read_candidates",
    "read_conversations",
    "read_dpo_recipe",
    "read_pairs",
    "read_recipe",
    "read_verdicts",
    "select_pairs",
    "sft",
    "write_pairs",
]


def __getattr__(name: str) -> "Any":
    """Import a public name from its module at its first use; see PEP 562."""
    if name not in _MODULES and name not in _STAGES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if name in _STAGES:
        value = import_module(f"{__name__}.training.{name}")
    else:
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
