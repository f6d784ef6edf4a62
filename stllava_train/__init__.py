"""Conversations in; stage 1, preference pairs, DPO and a checkpoint out, for `stllava_eval` to score.

The names below are the public API (docs/reference/python.md). Each is imported when it is first used, so that
importing the package loads no torch.
"""

TYPE_CHECKING = False  # as in stllava_eval: mypy takes a variable of this name for true
if TYPE_CHECKING:
    from typing import Any

    from stllava_train.data.conversations import read_conversations
    from stllava_train.data.export import write_med_im, write_vqa
    from stllava_train.pipeline import Pipeline
    from stllava_train.preferences.audit.write_audit import write_audit
    from stllava_train.preferences.candidates import CandidateSettings
    from stllava_train.preferences.check_files import check_files
    from stllava_train.preferences.judges.judge_candidates import (
        JudgeOptions,
        JudgeResult,
        JudgingJob,
        forecast_judging,
        judge_by_human,
        judge_candidates,
        read_judging_job,
    )
    from stllava_train.preferences.make_candidates import make_candidates
    from stllava_train.preferences.pair_formats import write_pairs
    from stllava_train.preferences.pair_selection import PairOptions, select_pairs
    from stllava_train.preferences.pair_sources import (
        BuiltPairs,
        SourcedPairs,
        build_pairs,
        pairs_of_contrast,
        pairs_of_judged,
        pairs_of_published,
    )
    from stllava_train.preferences.pairs import make_pairs, read_pairs
    from stllava_train.preferences.rows import read_candidates
    from stllava_train.preferences.verdicts import Rule, read_verdicts
    from stllava_train.training import dpo, sft
    from stllava_train.training.recipes import read_dpo_recipe, read_recipe

_MODULES = {  # public name -> the module that defines it
    "BuiltPairs": "preferences.pair_sources",
    "CandidateSettings": "preferences.candidates",
    "JudgeOptions": "preferences.judges.judge_candidates",
    "JudgeResult": "preferences.judges.judge_candidates",
    "JudgingJob": "preferences.judges.judge_candidates",
    "PairOptions": "preferences.pair_selection",
    "Pipeline": "pipeline",
    "Rule": "preferences.verdicts",
    "SourcedPairs": "preferences.pair_sources",
    "build_pairs": "preferences.pair_sources",
    "check_files": "preferences.check_files",
    "forecast_judging": "preferences.judges.judge_candidates",
    "judge_by_human": "preferences.judges.judge_candidates",
    "judge_candidates": "preferences.judges.judge_candidates",
    "make_candidates": "preferences.make_candidates",
    "make_pairs": "preferences.pairs",
    "pairs_of_contrast": "preferences.pair_sources",
    "pairs_of_judged": "preferences.pair_sources",
    "pairs_of_published": "preferences.pair_sources",
    "read_candidates": "preferences.rows",
    "read_conversations": "data.conversations",
    "read_dpo_recipe": "training.recipes",
    "read_judging_job": "preferences.judges.judge_candidates",
    "read_pairs": "preferences.pairs",
    "read_recipe": "training.recipes",
    "read_verdicts": "preferences.verdicts",
    "select_pairs": "preferences.pair_selection",
    "write_audit": "preferences.audit.write_audit",
    "write_med_im": "data.export",
    "write_pairs": "preferences.pair_formats",
    "write_vqa": "data.export",
}
_STAGES = ("dpo", "sft")  # modules of `training` with `prepare_run`, `report` and `train` each

__all__ = [
    "BuiltPairs",
    "CandidateSettings",
    "JudgeOptions",
    "JudgeResult",
    "JudgingJob",
    "PairOptions",
    "Pipeline",
    "Rule",
    "SourcedPairs",
    "build_pairs",
    "check_files",
    "dpo",
    "forecast_judging",
    "judge_by_human",
    "judge_candidates",
    "make_candidates",
    "make_pairs",
    "pairs_of_contrast",
    "pairs_of_judged",
    "pairs_of_published",
    "read_candidates",
    "read_conversations",
    "read_dpo_recipe",
    "read_judging_job",
    "read_pairs",
    "read_recipe",
    "read_verdicts",
    "select_pairs",
    "sft",
    "write_audit",
    "write_med_im",
    "write_pairs",
    "write_vqa",
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
