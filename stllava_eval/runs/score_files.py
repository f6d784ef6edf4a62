"""Score files of answers that any program wrote, without a model: answer files -> final answers -> score tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stllava_eval.errors import InputError
from stllava_eval.runs.answer_fields import Reading
from stllava_eval.runs.answer_files import BY_THE_FILE, AnswerFile, read_answers, write_answers
from stllava_eval.runs.scores import Scored, first_ids, score_table


@dataclass(frozen=True)
class ScoredFiles:
    """Files of answers, one for each task, and their score tables."""

    files: dict[str, Path]
    """The file of each task."""
    answers: dict[str, AnswerFile]
    """The final answers in the file of each task."""
    tables: dict[str, Scored]
    """The score table of each task: in `rows` each mean with its 95 % interval, in `unanswered` the ids without one."""

    def notes(self, with_doubts: bool = True) -> list[str]:
        """Return a line for everything that a reader of the scores must know: rows and questions that are left out.

        Args:
            with_doubts: Whether to say why the means may say little about the model, which writing a run folder logs.
        """
        notes = []
        for task, table in self.tables.items():
            if skipped := self.answers[task].skipped:
                notes.append(f"{task}: {skipped} rows whose questions the split does not have are left out")
            if unanswered := table.unanswered:
                count = len(unanswered)
                notes.append(f"{task}: {count} questions have no answer and are in no mean: {first_ids(unanswered)}")
            if table.doubts and with_doubts:
                notes.append(f"{task}: {table.doubts}")
        return notes

    def as_json(self) -> dict[str, Any]:
        """Return every score with its interval, and the ids without an answer: what `score --json` prints."""
        rows = [asdict(row) for table in self.tables.values() for row in table.rows]
        unanswered = {task: table.unanswered for task, table in self.tables.items()}
        return {"format": 1, "scores": rows, "unanswered": unanswered}

    def write_run(self, folder: Path, system: str | None = None) -> Path:
        """Write the answers as a run folder, for leaderboards, comparisons and the gate; return the folder.

        Args:
            folder: A new one.
            system: The system that gave the answers, as boards name it (default: the name of the first file).

        Raises:
            InputError: The folder holds a run already, or the files are of different images.
        """
        return write_answers(folder, system, self.answers, self.files)


def score_files(files: Mapping[str, Path], reading: Reading = BY_THE_FILE) -> ScoredFiles:
    """Score files of answers against prepared splits; return the tables, and what they were made of.

    A file is JSON lines, a JSON array, CSV, TSV, Parquet or xlsx, in any layout of docs/evaluate/answer-files.md.

    Args:
        files: The file of answers of each task, such as `{"vqarad": Path("answers.jsonl")}`.
        reading: What the files do not say by themselves: which field has the answers, which split and prompt were
            asked, which images were shown, and whether to extract final answers.

    Raises:
        InputError: A split is not prepared, a file cannot be read, or its rows are not about the split's questions.
    """
    if reading.prompt and all("_" in task for task in files):
        raise InputError(
            f"--prompt {reading.prompt}: {', '.join(files)} is asked with the prompt in its name. Leave it out, or "
            "name another task."
        )
    answers = {task: read_answers(file, task, reading) for task, file in files.items()}
    tables = {
        task: score_table(task, given.replies, given.prompt, given.settings, reading.split)
        for task, given in answers.items()
    }
    return ScoredFiles(dict(files), answers, tables)
