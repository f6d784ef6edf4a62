"""A model of lmms-eval -> a run of our tasks, as lmms-eval makes it, and what the run's folder holds."""

import json
from pathlib import Path

TASKS = ["vqarad", "slake", "pathvqa"]


def evaluate(lm, tasks=TASKS, include_path=None, **options):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path, include_defaults=False, model_name="stllava_med")
    return simple_evaluate(lm, tasks=list(tasks), task_manager=manager, **options)


def run_folders(home: Path) -> list[Path]:
    return sorted((home / "runs").iterdir(), key=lambda folder: folder.stat().st_mtime_ns)


def answers_of(folder: Path) -> dict[tuple[str, str], str]:
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    return {(row["task"], row["id"]): row["answer"] for row in rows}
