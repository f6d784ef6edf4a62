"""A run folder -> its model card and the plot of its losses."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stllava_eval.errors import InputError, printable
from stllava_eval.home import whole_file

CARD = "README.md"


def write_card(folder: Path, evaluations: Sequence[Path] = (), manifest: dict[str, Any] | None = None) -> None:
    """Write `README.md` of a training run: recipe, data, losses, and the scores of these evaluations.

    Args:
        folder: Of the run.
        evaluations: Run folders of the harness.
        manifest: Of a run whose `run.json` does not yet say that it is finished (default: what it holds).

    Raises:
        InputError: A folder is no run, the run is not finished, or an evaluation is of other weights than the run's.
    """
    from stllava_eval.leaderboard import NOTICE

    manifest = manifest or _manifest(folder)
    lines = _read(folder / "losses.jsonl")
    counts = manifest["counts"]
    data = "\n".join(
        f"- `{_plain(one['file'])}`: {one['conversations']} conversations, sha256 `{one['sha256'][:16]}`"
        for one in manifest["data"]
    )
    leak = manifest["test_images"]
    source = shlex.quote(f"pretrained={_plain(str(folder))}")
    versions = ", ".join(f"{name} {found}" for name, found in manifest["versions"].items())
    warning = f"\n**{leak} of them show images of test splits: scores on those sets mean nothing.**\n" if leak else ""
    text = f"""---
library_name: stllava-med
pipeline_tag: image-text-to-text
base_model: {json.dumps(manifest["start"]["name"])}
---
# `{_plain(folder.resolve().name)}`

**{NOTICE}** Stage 1 (`stllava-train sft`) of the system of STLLaVA-Med (arXiv 2406.19973).

```sh
lmms-eval --model stllava_med --tasks vqarad,slake,pathvqa --model_args {source}
```

## Data
{data}

{counts["conversations"]} conversations about {counts["images"]} images, {counts["rounds"]} rounds.
Tokens in the first epoch: {counts["tokens"]}, of which are learnt {counts["answer_tokens"]} of answers and
{counts["question_tokens"]} of questions.
{warning}
## Scores
{_scores(folder, evaluations)}

## Losses
{manifest["steps"]} steps; nats a token, mean of the first and of the last tenth of the steps:
answers {_ends(lines, "answer_loss")}, questions {_ends(lines, "question_loss")}.

![losses](curves.png)

## Recipe
Started from `{_plain(manifest["start"]["name"])}` (weights sha256 `{manifest["start"]["sha256"][:16]}`).

```yaml
{_yaml(manifest["recipe"])}```

Versions: {_plain(versions)}; commit {_plain(str(manifest["commit"]))}.
"""
    with whole_file(folder / CARD) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def draw_curves(trace: Path, image: Path) -> None:
    """The losses of every step, and their running mean over a fiftieth of the run, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = _read(trace)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, label, colour in (("answer_loss", "answers", "#1f5fa8"), ("question_loss", "questions", "#c2571a")):
        found = [(line["step"], line[name]) for line in lines if line[name] is not None]
        if not found:
            continue
        steps, values = zip(*found, strict=True)
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(values), color=colour, linewidth=1.8, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with whole_file(image) as unfinished:
        figure.savefig(unfinished, format="png", metadata={"Software": None})


def _smooth(values: Sequence[float]) -> list[float]:
    width = max(1, len(values) // 50)
    return [sum(values[max(0, end - width) : end]) / (end - max(0, end - width)) for end in range(1, len(values) + 1)]


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if manifest["stage"] != "sft":
            raise KeyError("stage sft")
        for key in ("recipe", "data", "start", "counts", "test_images", "steps", "versions", "commit"):
            manifest[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{folder} is no training run ({fault(error)}). Pass a folder of `stllava-train sft`."
        ) from error
    if not manifest.get("finished"):
        raise InputError(f"{folder}: the run in it is not finished. Finish it first: its call of `sft` with --resume.")
    return manifest


def fault(error: Exception) -> str:
    """In words, what reading a `run.json` ended with."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "it has no run.json"
    if isinstance(error, KeyError):
        return f"its run.json has no {error.args[0]}"
    return f"its run.json cannot be read: {getattr(error, 'strerror', None) or 'it is damaged'}"


def _read(trace: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in trace.read_text(encoding="utf-8").splitlines()]
        for line in lines:
            for name in ("step", "answer_loss", "question_loss"):
                if not isinstance(line[name], int | float) and (name == "step" or line[name] is not None):
                    raise TypeError(f"{name} {line[name]!r}")
        return lines
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{trace}: cannot be read ({error}). The run must be finished.") from error


def _ends(lines: Sequence[dict[str, Any]], name: str) -> str:
    found = [line[name] for line in lines if line[name] is not None]
    if not found:
        return "none learnt"
    width = max(1, len(found) // 10)
    return f"{sum(found[:width]) / width:.3f} to {sum(found[-width:]) / width:.3f}"


def _scores(folder: Path, evaluations: Sequence[Path]) -> str:
    if not evaluations:
        return f"None yet. Evaluate it, then `stllava-train card {_plain(str(folder))} --eval RUN` writes them here."
    from stllava_eval.leaderboard import board, board_text
    from stllava_eval.network.checkpoint import open_checkpoint

    own = open_checkpoint(str(folder)).sha256
    for run in evaluations:
        try:
            of = str(json.loads((run / "run.json").read_text(encoding="utf-8"))["checkpoint"]["sha256"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{run} is not a run folder ({fault(error)}). Pass one of an evaluation.") from error
        if of != own:
            raise InputError(f"{run}: it is of other weights ({of[:16]}, here {own[:16]}). Evaluate {folder} again.")
    return f"```\n{board_text(board(list(evaluations)))}\n```"


def _yaml(recipe: dict[str, Any]) -> str:
    import yaml

    return "".join(f"{_plain(line)}\n" for line in yaml.safe_dump(recipe, sort_keys=False).splitlines())


def _plain(text: str) -> str:
    """One line that Markdown shows as it is, in code."""
    return printable(text).replace("`", "'").replace("<", "(").replace(">", ")")
