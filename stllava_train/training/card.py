"""Write the model card of a run folder, and draw the plot of its losses."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stllava_eval.errors import InputError, printable
from stllava_eval.storage import loads, read_json, read_text, whole_file

CARD = "README.md"
TRACED = {  # for each stage the figures of a step that the card is made of
    "sft": ("answer_loss", "question_loss"),
    "dpo": ("loss", "margin", "accuracy", "chosen_logps", "rejected_logps", "kl"),
}


def write_card(folder: Path, evaluations: Sequence[Path] = (), manifest: dict[str, Any] | None = None) -> None:
    """Write `README.md` of a training run: recipe, data, losses, and the scores of these evaluations.

    Args:
        folder: Of the run.
        evaluations: Run folders of the harness.
        manifest: Of a run whose `run.json` does not yet say that it is finished (default: what it holds).

    Raises:
        InputError: A folder is no run, the run is not finished, or an evaluation is of other weights than the run's.
    """
    from stllava_eval.reports.cells import NOTICE

    manifest = manifest or _manifest(folder)
    source = shlex.quote(f"pretrained={_plain(str(folder))}")
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    lines = _read(folder / "losses.jsonl", TRACED[manifest["stage"]])
    stage, data, losses = (_dpo_sections if manifest["stage"] == "dpo" else _sft_sections)(manifest, lines)
    leak = manifest["test_images"]
    warning = f"\n**{leak} of them show images of test splits: scores on those sets mean nothing.**\n" if leak else ""
    text = f"""---
library_name: stllava-med
pipeline_tag: image-text-to-text
base_model: {json.dumps(manifest["start"]["name"])}
---
# `{_plain(folder.resolve().name)}`

**{NOTICE}** {stage} of the system of STLLaVA-Med (arXiv 2406.19973).

```sh
lmms-eval --model stllava_med --tasks vqarad,slake,pathvqa --model_args {source}
```
{_other_tools(folder)}
## Data
{data}
{warning}
## Scores
{_scores(folder, evaluations)}

## Losses
{losses}

![losses](curves.png)

## Recipe
Started from `{_plain(manifest["start"]["name"])}` (weights sha256 `{manifest["start"]["sha256"][:16]}`).

```yaml
{_yaml(manifest["recipe"])}```

Versions: {_plain(versions)}; commit {_plain(str(manifest["commit"]))}.
"""
    with whole_file(folder / CARD) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def left_out_by_peft(folder: Path) -> str:
    """Return in words what plain PEFT and transformers leave out when they load the run in `folder`.

    They load one adapter on one whole model: of an adapter whose base is an adapter too, they take the whole model
    below both, and say nothing.

    Returns:
        The text; empty where nothing is left out.
    """
    if not (folder / "adapter_config.json").is_file():
        return ""
    try:
        below = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        tower = read_json(folder / "run.json")["start"]["vision_tower"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
    if isinstance(below, str) and (Path(below) / "adapter_config.json").is_file():
        return f"the adapter in {below}"
    return f"the vision tower in {tower}" if tower else ""


def _other_tools(folder: Path) -> str:
    """Return how tools that know one adapter on one whole model load the run; empty for a run that is a whole model."""
    if not (folder / "adapter_config.json").is_file():
        return ""
    command = f"stllava-train merge {shlex.quote(_plain(str(folder)))} --out DIR"
    lost = left_out_by_peft(folder)
    silently = f" **Without that they leave out {_plain(lost)}, and say nothing.**" if lost else ""
    return f"""
It is an adapter, which `stllava-eval` and `stllava-train` load with everything that it builds on. For plain PEFT,
transformers and servers, first write it as one whole checkpoint: `{command}`.{silently}
"""


def _sft_sections(manifest: dict[str, Any], lines: Sequence[dict[str, Any]]) -> tuple[str, str, str]:
    """Return (name of the stage, text about the data, text about the losses) of stage 1."""
    counts = manifest["counts"]
    files = []
    for file in manifest["data"]:
        name, sha256 = _plain(file["file"]), file["sha256"][:16]
        files.append(f"- `{name}`: {file['conversations']} conversations, sha256 `{sha256}`")
    data = "\n".join(files)
    return (
        "Stage 1 (`stllava-train sft`)",
        f"{data}\n\n{counts['conversations']} conversations about {counts['images']} images, {counts['rounds']} "
        f"rounds.\nTokens in the first epoch: {counts['tokens']}, of which are learnt {counts['answer_tokens']} of "
        f"answers and\n{counts['question_tokens']} of questions.",
        "\n".join(
            [
                f"{len(lines)} steps; nats per token, mean of the first and of the last tenth of the steps:",
                f"answers {_ends(lines, 'answer_loss')}, questions {_ends(lines, 'question_loss')}.",
                *_kept(manifest),
            ]
        ),
    )


def _dpo_sections(manifest: dict[str, Any], lines: Sequence[dict[str, Any]]) -> tuple[str, str, str]:
    """Return (name of the stage, text about the data, text about the losses) of stage 2."""
    counts = manifest["counts"]
    contrasts = counts.get("contrasts", 0)  # a run of an earlier version has none
    (data,) = manifest["data"]
    shown = {
        "loss": "loss",
        "share of pairs ranked correctly": "accuracy",
        "log-probability of chosen answers (nats per answer)": "chosen_logps",
        "of rejected answers": "rejected_logps",
        "estimated KL(reference || policy) (nats per answer)": "kl",
    }
    losses = [f"{len(lines)} steps; mean of the first and of the last tenth of the steps:\n"]
    losses += [f"- {words}: {_ends(lines, name)}" for words, name in shown.items()]
    losses += _kept(manifest)
    return (
        "Stage 2 (`stllava-train dpo`)",
        f"- `{_plain(data['file'])}`: {data['pairs']} pairs, sha256 `{data['sha256'][:16]}`\n\n"
        f"{counts['pairs']} pairs about {counts['images']} images; the chosen answer is the longer one, in tokens, in\n"
        f"{counts['chosen_longer'] / counts['pairs']:.0%}. Learnt are {counts['chosen_tokens']} tokens of chosen and "
        f"{counts['rejected_tokens']} of rejected answers."
        + (f" {contrasts} of them have another image for the rejected answer." if contrasts else ""),
        "\n".join(losses),
    )


def _kept(manifest: dict[str, Any]) -> list[str]:
    """Return lines about the step whose weights were kept; none for a run without validation."""
    kept = manifest.get("kept")
    if not kept:
        return []
    lines = [
        f"\nThe weights of step {kept['step']} were kept. Scores on validation questions (mean of open F1 and closed "
        f"accuracy, x100): {100 * kept['start']:.1f} at the start, {100 * kept['score']:.1f} at step {kept['step']}, "
        f"{100 * kept['last']:.1f} at the end."
    ]
    if kept["score"] <= kept["start"]:
        lines.append("**No step was better than the start.**")
    if kept["stopped"]:
        lines.append("**Training stopped early, because closed answers lost their yes or no.**")
    return lines


def kept_step(folder: Path) -> list[str]:
    """Return lines about the step whose weights the run in `folder` kept; none for a run without validation."""
    return [line.strip("\n*") for line in _kept(_manifest(folder))]


PANELS = (  # the panels of stage 2: (what is on the axis, {key of the trace: label})
    ("nats per answer", {"chosen_logps": "log-probability, chosen", "rejected_logps": "rejected"}),
    ("reward (beta times log-ratio)", {"chosen_reward": "chosen", "rejected_reward": "rejected"}),
    ("share of pairs", {"accuracy": "ranked correctly"}),
    ("nats per answer", {"kl": "KL(reference || policy), estimated"}),
)
COLOURS = ("#1f5fa8", "#c2571a", "#3c7d3c", "#7a4a99")


def draw_curves(trace: Path, image: Path) -> None:
    """Draw every step of `losses.jsonl` with its running mean, and the scores of `evaluations.jsonl`, as a PNG file.

    The mean is over a fiftieth of the run in stage 1, and over a tenth in stage 2, whose steps are few.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = _read(trace)
    paired = "margin" in lines[0]
    evaluated = _read(trace.with_name("evaluations.jsonl")) if trace.with_name("evaluations.jsonl").exists() else []
    figure = Figure(figsize=(11, 9) if paired or evaluated else (8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    if paired:
        grid = figure.subplots(3 if evaluated else 2, 2).flatten()
        for axes, (unit, labels) in zip(grid, PANELS, strict=False):
            _draw(axes, lines, labels, unit, 10)
        if evaluated:
            _draw_evaluations(grid[4], grid[5], evaluated)
    else:
        panels = figure.subplot_mosaic([["losses", "losses"], ["scores", "words"]] if evaluated else [["losses"]])
        axes = panels["losses"]
        if evaluated:
            _draw_evaluations(panels["scores"], panels["words"], evaluated)
        _draw(axes, lines, {"answer_loss": "answers", "question_loss": "questions"}, "loss (nats per token)", 50)
        axes.set_ylim(bottom=0)
    with whole_file(image) as unfinished:
        figure.savefig(unfinished, format="png", metadata={"Software": None})


def _draw(axes: Any, lines: Sequence[dict[str, Any]], labels: dict[str, str], unit: str, parts: int) -> None:
    """Draw figures of the trace, each with its running mean over one of `parts` parts of the run."""
    for (name, label), colour in zip(labels.items(), COLOURS, strict=False):
        points = [(line["step"], line[name]) for line in lines if line[name] is not None]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(values, parts), color=colour, linewidth=1.8, label=label)
    _finish(axes, unit)


def _draw_evaluations(scores: Any, lengths: Any, lines: Sequence[dict[str, Any]]) -> None:
    """Draw the scores and the lengths of answers to validation questions, each a mean over the splits."""
    splits = [name for name, means in lines[0].items() if isinstance(means, dict)]

    def mean(line: dict[str, Any], name: str) -> float:
        return sum(line[split][name] for split in splits) / len(splits)

    steps = [line["step"] for line in lines]
    shown = {"f1": "F1, open", "recall": "recall, open", "closed_accuracy": "accuracy, closed", "unparsed": "unparsed"}
    for (name, label), colour in zip(shown.items(), COLOURS, strict=True):
        dashes = "--" if name == "recall" else "-"  # it lies on F1 where answers are short
        values = [mean(line, name) for line in lines]
        scores.plot(steps, values, color=colour, linestyle=dashes, marker="o", markersize=3, label=label)
    scores.set_ylim(0, 1)
    _finish(scores, f"validation: {', '.join(splits)}")
    words = [mean(line, "words") for line in lines]
    lengths.plot(steps, words, color=COLOURS[0], marker="o", markersize=3, label="words")
    lengths.set_ylim(0, 1.3 * max(words) or 1)  # a network that says nothing has 0 words at every step
    _finish(lengths, "words per answer, validation")


def _finish(axes: Any, unit: str) -> None:
    """Put labels, grid and legend on a panel."""
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _smooth(values: Sequence[float], parts: int) -> list[float]:
    """Return the running mean of values over the newest of them, one of `parts` parts of their number at most."""
    width = max(1, len(values) // parts)
    means = []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - width) : end]
        means.append(sum(window) / len(window))
    return means


def _manifest(folder: Path) -> dict[str, Any]:
    """Read the `run.json` of a finished training run; raises InputError where there is none."""
    try:
        manifest = read_json(folder / "run.json")
        if manifest["stage"] not in TRACED:
            raise KeyError("stage sft or dpo")
        for key in ("recipe", "data", "start", "counts", "test_images", "steps", "versions", "commit"):
            manifest[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{folder} is no training run ({fault(error)}). Pass a folder of `stllava-train sft` or `dpo`."
        ) from error
    if not manifest.get("finished"):
        raise InputError(f"{folder}: the run in it is not finished. Finish it first: its own call with --resume.")
    return manifest


def fault(error: Exception) -> str:
    """Return in words the error that reading a `run.json` ended with."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "it has no run.json"
    if isinstance(error, KeyError):
        return f"its run.json has no {error.args[0]}"
    return f"its run.json cannot be read: {getattr(error, 'strerror', None) or 'it is damaged'}"


def _read(trace: Path, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Read the lines of a trace, each with a step and these figures, which may be null."""
    try:
        lines = [loads(line) for line in read_text(trace).splitlines()]
        for line in lines:
            for name in ("step", *names):
                if not isinstance(line[name], int | float) and (name == "step" or line[name] is not None):
                    raise TypeError(f"{name} {line[name]!r}")
        return lines
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{trace}: cannot be read ({error}). The run must be finished.") from error


def _ends(lines: Sequence[dict[str, Any]], name: str) -> str:
    """Return the means of a figure over the first and over the last tenth of the steps that have one, as text."""
    values = [line[name] for line in lines if line[name] is not None]
    if not values:
        return "none learnt"
    width = max(1, len(values) // 10)
    return f"{sum(values[:width]) / width:.3f} to {sum(values[-width:]) / width:.3f}"


def _scores(folder: Path, evaluations: Sequence[Path]) -> str:
    """Return the board of these evaluations; raises InputError where one is of other weights than the run's."""
    if not evaluations:
        return f"None yet. Evaluate it, then `stllava-train card {_plain(str(folder))} --eval RUN` writes them here."
    from stllava_eval.network.checkpoint import open_checkpoint  # with torch; both below are needed with scores alone
    from stllava_eval.reports.board_formats import board_text
    from stllava_eval.reports.board_rows import board

    own = open_checkpoint(str(folder)).sha256
    for run in evaluations:
        try:
            evaluated = str(read_json(run / "run.json")["checkpoint"]["sha256"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{run} is not a run folder ({fault(error)}). Pass one of an evaluation.") from error
        if evaluated != own:
            raise InputError(
                f"{run}: it is of other weights ({evaluated[:16]}, here {own[:16]}). Evaluate {folder} again."
            )
    return f"```\n{board_text(board(list(evaluations)))}\n```"


def _yaml(recipe: dict[str, Any]) -> str:
    """Return a recipe as YAML, each line safe in Markdown."""
    import yaml

    return "".join(f"{_plain(line)}\n" for line in yaml.safe_dump(recipe, sort_keys=False).splitlines())


def _plain(text: str) -> str:
    """Return a text as one line that Markdown shows as it is, in code."""
    return printable(text).replace("`", "'").replace("<", "(").replace(">", ")")
