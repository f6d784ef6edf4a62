"""Images and questions in, requests, answers, scores and a leaderboard out.

The names below are the public API (docs/reference/python.md). Each is imported when it is first used, because
`stllava_med.pth` imports this package at every start of Python, and because help texts must not wait for torch.
"""

from stllava_eval.version import __version__

TYPE_CHECKING = False  # mypy takes a variable of this name for true; to import `typing` would cost every Python start
if TYPE_CHECKING:
    from typing import Any

    from stllava_eval.data.prepare import prepare
    from stllava_eval.data.sample.prepare_sample import prepare_sample
    from stllava_eval.data.splits import read_rows
    from stllava_eval.errors import InputError
    from stllava_eval.inference.open import open_answerer
    from stllava_eval.inference.types import Answer, Question, Sampling
    from stllava_eval.network.checkpoint import open_checkpoint
    from stllava_eval.network.convert_checkpoint import convert_checkpoint
    from stllava_eval.reports.board_formats import board_text
    from stllava_eval.reports.board_rows import board
    from stllava_eval.reports.compare import compare
    from stllava_eval.reports.gate import gate
    from stllava_eval.reports.gate_policy import read_policy
    from stllava_eval.runs.answer_fields import Reading
    from stllava_eval.runs.folder import open_run, read_run
    from stllava_eval.runs.score_files import ScoredFiles, score_files
    from stllava_eval.scoring.metrics import SCORES, score

_MODULES = {  # public name -> the module that defines it
    "Answer": "inference.types",
    "InputError": "errors",
    "Question": "inference.types",
    "Reading": "runs.answer_fields",
    "SCORES": "scoring.metrics",
    "Sampling": "inference.types",
    "ScoredFiles": "runs.score_files",
    "board": "reports.board_rows",
    "board_text": "reports.board_formats",
    "compare": "reports.compare",
    "convert_checkpoint": "network.convert_checkpoint",
    "gate": "reports.gate",
    "open_answerer": "inference.open",
    "open_checkpoint": "network.checkpoint",
    "open_run": "runs.folder",
    "prepare": "data.prepare",
    "prepare_sample": "data.sample.prepare_sample",
    "read_policy": "reports.gate_policy",
    "read_rows": "data.splits",
    "read_run": "runs.folder",
    "score": "scoring.metrics",
    "score_files": "runs.score_files",
}

__all__ = [
    "SCORES",
    "Answer",
    "InputError",
    "Question",
    "Reading",
    "Sampling",
    "ScoredFiles",
    "__version__",
    "board",
    "board_text",
    "compare",
    "convert_checkpoint",
    "gate",
    "open_answerer",
    "open_checkpoint",
    "open_run",
    "prepare",
    "prepare_sample",
    "read_policy",
    "read_rows",
    "read_run",
    "score",
    "score_files",
]


def __getattr__(name: str) -> "Any":
    """Import a public name from its module at its first use; see PEP 562."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
