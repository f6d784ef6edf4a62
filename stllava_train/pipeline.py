"""Run the whole self-training by a recipe: both stages, the steps between them, and evaluations, each made once.

conversations -> stage 1 -> candidates -> judge -> pairs -> DPO -> evaluation, once for each round.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stllava_eval.cli.options import TASKS
from stllava_eval.data.splits import read_manifest
from stllava_eval.errors import InputError, printable
from stllava_eval.runs.folder import data_hashes
from stllava_eval.storage import alone, file_sha256, read_json, refuse_file, write_json
from stllava_eval.version import __version__
from stllava_train.data.columns import columns_of
from stllava_train.data.conversations import read_conversations
from stllava_train.preferences.candidates import PRESETS, check_settings, images_in
from stllava_train.preferences.judges.oracle import LOCAL_JUDGES
from stllava_train.preferences.pair_selection import PairOptions, check_options, rule_of
from stllava_train.preferences.verdicts import HUMAN_PREFIX
from stllava_train.resumable import read_rows
from stllava_train.training.recipe_yaml import changed
from stllava_train.training.recipes import TrainingRecipe, read_dpo_recipe, read_pipeline, read_recipe

STAGES = "stages.json"  # what each stage was made of, in the run's folder
REPLACED = "replaced"  # folder in it, of what was made of something else


@dataclass(frozen=True)
class Stage:
    """One command, what decides its result, and where the result is.

    Attributes:
        name: `sft`, `round-1/candidates` and so on; also the path in the run's folder that its files begin with.
        command: Arguments of `stllava-train`, or of `stllava-eval` where the first is `run`.
        inputs: As JSON holds it: settings, and hashes of all that is read.
        made: The file that the next stages read; its hash is their input.
        resume: The option with which the command resumes after a kill; None where it resumes without one.
        bounds: As JSON holds it, the limits on how much is made: a budget, and the length of a reply. They do not
            decide what is made. A stage in which something was left out or cut is continued once they have changed.
    """

    name: str
    command: list[str]
    inputs: dict[str, Any]
    made: Path
    resume: str | None = None
    bounds: dict[str, Any] = field(default_factory=dict)


class Pipeline:
    """The stages of a run, in a folder: `sft/`, `round-N/` with candidates, verdicts, pairs and `dpo/`, `eval/`.

    A stage is done again if what it is made of has changed, and what it had made is moved to `replaced/`, never
    deleted; one that a kill has interrupted is resumed. Its inputs are hashes of contents, so that a file which is
    written again with the same bytes changes nothing.

    Args:
        recipe: A YAML file, or the name of one of ours; see `recipes/all`.
        changes: `key=value`, of the recipe; `sft.`, `candidates.` and `dpo.` reach into those stages' own settings.
        data: Conversations for stage 1.
        images: Folder of the images that are asked about.
        out: The run's folder.
        call: `stllava-train`, as a function of its arguments.

    Raises:
        InputError: The recipe is wrong, or a file cannot be read.
    """

    def __init__(
        self,
        recipe: str,
        changes: Sequence[str],
        data: Sequence[Path],
        images: Path,
        out: Path,
        call: Callable[[list[str]], int],
    ) -> None:
        self.recipe = read_pipeline(recipe, changes)
        self.data, self.images, self.out, self.call = data, images, out, call
        self._check()
        refuse_file(out, "--out")
        if out.is_dir() and any(out.iterdir()) and not (out / STAGES).exists():
            raise InputError(f"--out {out}: there is something that is no such run. Choose another folder.")
        self.done: dict[str, Any] = _read(out / STAGES) or {}
        sound = all(isinstance(stage, dict) and isinstance(stage.get("inputs"), dict) for stage in self.done.values())
        if (out / STAGES).exists() and not (self.done and sound):
            raise InputError(f"{out / STAGES}: damaged: what is done is not known. Put it back, or take another --out.")
        self._hashes: dict[Path, str] = {}

    def _check(self) -> None:
        """Raise InputError for all that can be wrong with a later stage, before the first one begins."""
        recipe = self.recipe
        for stage, override in (("sft", recipe.sft), ("candidates", recipe.candidates), ("dpo", recipe.dpo)):
            keys = {change.partition("=")[0].strip() for change in override.changes}
            if wrong := sorted(keys & ({"seed"} if stage == "sft" else {"seed", "start"})):
                where = (
                    "seed= is that of every stage" if wrong == ["seed"] else "a round starts from the newest checkpoint"
                )
                raise InputError(f"{stage}.{wrong[0]}: {where}. Leave it out.")
        sft = read_recipe(recipe.sft.recipe, recipe.sft.changes)
        dpo = read_dpo_recipe(recipe.dpo.recipe, recipe.dpo.changes)
        if recipe.candidates.recipe not in PRESETS:
            raise InputError(f"candidates.recipe: {recipe.candidates.recipe}: unknown. Choose of {', '.join(PRESETS)}.")
        check_settings(changed(PRESETS[recipe.candidates.recipe], recipe.candidates.changes))
        if unknown := [task for task in recipe.tasks if task not in TASKS]:
            raise InputError(f"tasks: {unknown[0]}: unknown. Tasks are {', '.join(TASKS)}.")
        if recipe.judge_max_tokens is not None and not 1 <= recipe.judge_max_tokens < 10**6:
            raise InputError(f"judge_max_tokens: {recipe.judge_max_tokens}. It is from 1 to 999,999, or null.")
        if recipe.budget is not None and recipe.budget < 0:
            raise InputError(f"budget: {recipe.budget:g}. It is 0 or more, or null.")
        rule_of(recipe.pairs.rule, recipe.pairs.min_margin)
        check_options(PairOptions(per_image=recipe.pairs.per_image, held_out=recipe.pairs.held_out))
        for name in recipe.judges:
            if name not in LOCAL_JUDGES:
                _check_judge(name)
        for file in self.data:
            if not file.is_file():
                raise InputError(f"--data {file}: no such file. Pass what `stllava-train data` wrote.")
        out, images = self.out.resolve(), self.images.resolve()
        if out.is_relative_to(images) or images.is_relative_to(out):
            raise InputError(
                f"--out {self.out}: --out and --images {self.images} are one inside the other. Choose another folder."
            )
        images_in(self.images)
        if sft.evaluate_on or dpo.evaluate_on:
            from stllava_train.training.validation import questions  # with torch

            questions(sft)
            questions(dpo)

    def run(self) -> int:
        """Make what is not made yet, and return the exit code.

        Raises:
            InputError: Another process is at the run, or a file cannot be read.
        """
        with alone(self.out):
            for stage in self.stages():
                if code := self._make(stage):
                    return code
        return 0

    def stages(self) -> Iterator[Stage]:
        """Yield the stages in order; what decides a stage's result is known once the one before it is made."""
        images = self._hash_of(self.images / name for name in images_in(self.images))
        policy = self.out / "sft"
        yield self._sft(policy)
        yield self._evaluation("eval/sft", policy)
        for number in range(1, self.recipe.rounds + 1):
            folder = self.out / f"round-{number}"
            yield self._candidates(number, policy, folder / "candidates.jsonl", images)
            yield self._judge(number, folder)
            yield self._pairs(number, folder)
            yield self._dpo(number, policy, folder)
            policy = folder / "dpo"  # the next round starts from the newest checkpoint
            yield self._evaluation(f"eval/round-{number}", policy)

    def _sft(self, out: Path) -> Stage:
        """Return stage 1: conversations -> a checkpoint."""
        recipe = self.recipe
        files = [text for file in self.data for text in ("--data", str(file))]
        columns = [_columns(file) for file in self.data]
        changes = [*recipe.sft.changes, f"seed={recipe.seed}"]
        return Stage(
            "sft",
            ["sft", "--recipe", recipe.sft.recipe, *files, "--out", str(out), *changes],
            {
                **self._settings(read_recipe(recipe.sft.recipe, changes)),
                "data": [self.hash(file) for file in self.data],
                **({"columns": columns} if any(columns) else {}),
                "images": self._images_of(self.data),
            },
            out / "run.json",
            resume="--resume",
        )

    def _candidates(self, number: int, policy: Path, out: Path, images: str) -> Stage:
        """Return the questions and answers of a round; `images` is the hash of all images."""
        recipe = self.recipe
        sampled = ["--sample", str(recipe.images)] if recipe.images else []
        asked = ["--preset", recipe.candidates.recipe, *sampled]
        changes = [*recipe.candidates.changes, f"seed={recipe.seed + number - 1}"]  # other questions each round
        return Stage(
            f"round-{number}/candidates",
            [
                *("candidates", "--checkpoint", str(policy), "--images", str(self.images)),
                *("--out", str(out), *asked, *changes),
            ],
            {"checkpoint": self._checkpoint(str(policy)), "images": images, "settings": [*asked, *changes]},
            out,
        )

    def _judge(self, number: int, folder: Path) -> Stage:
        """Return the verdicts of a round, with what bounds them: the budget, and the room of a reply."""
        recipe, candidates, judged = self.recipe, folder / "candidates.jsonl", folder / "judged.jsonl"
        judges = [text for name in recipe.judges for text in ("--judge", name)]
        how = ["--preset", recipe.judge_preset]
        bounds: dict[str, Any] = {"budget": recipe.budget}
        if recipe.budget is not None:
            how += ["--budget", str(recipe.budget)]
        # without a value the key is absent, so that runs of earlier releases can be resumed
        if recipe.judge_max_tokens is not None:
            how += ["--max-tokens", str(recipe.judge_max_tokens)]
            bounds["max_tokens"] = recipe.judge_max_tokens
        if recipe.judge_reasoning:
            how += ["--reasoning"]
            bounds["reasoning"] = True
        return Stage(
            f"round-{number}/judged",
            ["judge", str(candidates), *judges, *how, "--out", str(judged)],
            {"candidates": self.hash(candidates), "judges": list(recipe.judges), "preset": recipe.judge_preset},
            judged,
            bounds=bounds,
        )

    def _pairs(self, number: int, folder: Path) -> Stage:
        """Return the preference pairs of a round."""
        candidates, judged, pairs = (folder / name for name in ("candidates.jsonl", "judged.jsonl", "pairs.jsonl"))
        options = [*self.recipe.pairs.as_options(), "--seed", str(self.recipe.seed)]
        return Stage(
            f"round-{number}/pairs",
            ["pairs", str(candidates), str(judged), "--out", str(pairs), *options],
            {"candidates": self.hash(candidates), "judged": self.hash(judged), "options": options},
            pairs,
        )

    def _dpo(self, number: int, policy: Path, folder: Path) -> Stage:
        """Return stage 2 of a round: pairs -> the next checkpoint."""
        recipe, pairs, out = self.recipe.dpo, folder / "pairs.jsonl", folder / "dpo"
        changes = [*recipe.changes, f"start={policy}", f"seed={self.recipe.seed}"]
        return Stage(
            f"round-{number}/dpo",
            [
                *("dpo", "--recipe", recipe.recipe, "--pairs", str(pairs), "--images", str(self.images)),
                *("--out", str(out), *changes),
            ],
            {**self._settings(read_dpo_recipe(recipe.recipe, changes)), "pairs": self.hash(pairs)},
            out / "run.json",
            resume="--resume",
        )

    def _evaluation(self, name: str, checkpoint: Path) -> Stage:
        """Return the evaluation of a checkpoint on the recipe's tasks."""
        tasks = ",".join(self.recipe.tasks)
        folder = self.out / name
        return Stage(
            name,
            ["run", "--tasks", tasks, "--checkpoint", str(checkpoint), "--out", str(folder)],
            {"checkpoint": self._checkpoint(str(checkpoint)), "tasks": tasks, "data": data_hashes()},
            folder / "run.json",
        )

    def _make(self, stage: Stage) -> int:
        """Run the stage if it is not made of the same inputs already, and return the exit code."""
        path = self.out / stage.name
        before = self.done.get(stage.name)
        inputs = json.loads(json.dumps(stage.inputs | {"version": __version__}))  # as it is read back
        known = before["made"] if before and before["inputs"] == inputs and "made" in before else None
        more = before is not None and bool(before.get("left")) and before.get("bounds") != stage.bounds
        if known and not more and stage.made.exists() and self.hash(stage.made) == known:
            print(printable(f"{stage.name}: done before, of the same inputs"))
            return 0
        cut = before is not None and before["inputs"] == inputs and (more or not known)
        evaluation = stage.command[0] == "run"
        begun = _read(path / "run.json") if cut else None
        if evaluation:  # its run.json is the last file it writes
            finished = begun is not None and (begun.get("checkpoint") or {}).get("sha256") == inputs["checkpoint"]
        else:
            finished = begun is not None and bool(begun.get("finished")) and not more
        goes_on = finished or begun is not None if stage.resume else finished or not (evaluation and begun)
        moved = {} if cut and goes_on else self._set_aside(stage.name, path)
        self.done[stage.name] = {"inputs": inputs}
        self._remember()
        left = 0
        if not finished:  # a kill can come between a stage's last file and our note of it
            command = [*stage.command[:1], *([stage.resume] if begun and stage.resume else []), *stage.command[1:]]
            shown = shlex.join(["stllava-eval" if evaluation else "stllava-train", *command])
            print(f"\n$ {printable(shown)}", flush=True)
            code = _evaluate(command) if evaluation else self.call(command)
            if code == 1 and stage.command[0] == "judge":
                code, left = self._judged(command, stage)
            if code:
                if code == 2 and moved and not self._files(path):  # refused before it wrote anything
                    self._take_back(stage.name, moved, before)
                elif code == 1:
                    print("not everything is done; the same call of `stllava-train all` continues", file=sys.stderr)
                return code
        if not stage.made.exists():
            raise InputError(f"{stage.name}: {stage.made} was not written. Run the command above by itself.")
        self._hashes = {path: hash for path, hash in self._hashes.items() if not path.is_relative_to(self.out)}
        left += _cut(stage.made) if stage.command[0] == "judge" else 0
        self.done[stage.name] |= {"made": self.hash(stage.made), "left": left, "bounds": stage.bounds}
        self._remember()
        return 0

    def _judged(self, command: Sequence[str], stage: Stage) -> tuple[int, int]:
        """Return (exit code, how many questions are left out) of a call of judges that did not judge everything.

        Where no further call would judge more, the run continues with what is judged: the budget is spent, or a second
        call has failed at the same questions as the first.
        """
        failed, not_asked = _left(stage.made)
        before = failed + 1
        while failed and failed < before:
            print("what failed is asked once more", file=sys.stderr)
            if (code := self.call(list(command))) != 1:
                return code, 0
            before, (failed, not_asked) = failed, _left(stage.made)
        if not failed + not_asked:
            return 1, 0
        reasons = []
        if failed:
            reasons.append(f"{failed} failed twice")
        if not_asked:
            reasons.append(f"{not_asked} not asked, by the budget")
        if not any(row.get("outcome") == "scored" for row in read_rows(stage.made)):
            raise InputError(
                f"{stage.name}: nothing is judged ({', '.join(reasons)}). Raise budget=, or see the judge."
            )
        print(printable(f"{stage.name}: left out of the pairs: {', '.join(reasons)}"))
        return 0, failed + not_asked

    @staticmethod
    def _files(path: Path) -> list[Path]:
        """Return the files and folders that a stage has written: the path itself, and files whose name it begins."""
        files = [path] if path.exists() else []
        files += [file for file in path.parent.glob(f"{path.name}.*") if file.is_file()]
        if path.name == "pairs":
            files += path.parent.glob("pairs-*")
        return list(dict.fromkeys(files))

    def _set_aside(self, name: str, path: Path) -> dict[Path, Path]:
        """Move what a stage had made before to `replaced/`, and return where each file was and is."""
        if not (files := self._files(path)):
            return {}
        number = 1
        while (folder := self.out / REPLACED / f"{name.replace('/', '-')}-{number}").exists():
            number += 1
        folder.mkdir(parents=True)
        moved = {file: folder / file.name for file in files}
        for file, to in moved.items():
            shutil.move(str(file), str(to))
        print(printable(f"{name}: made of something else than now; what it had made is in {folder}"))
        return moved

    def _take_back(self, name: str, moved: Mapping[Path, Path], before: Any) -> None:
        """Undo `_set_aside`: move the files back, and note again what they were made of."""
        for file, to in moved.items():
            shutil.move(str(to), str(file))
        next(iter(moved.values())).parent.rmdir()
        with suppress(OSError):  # it is not empty where something was replaced before
            (self.out / REPLACED).rmdir()
        if before is None:
            del self.done[name]
        else:
            self.done[name] = before
        self._remember()
        print(printable(f"{name}: what it had made before is back in its place"))

    def _remember(self) -> None:
        write_json(self.out / STAGES, self.done)

    def _checkpoint(self, name: str) -> str:
        from stllava_eval.network.checkpoint import open_checkpoint  # with torch

        return open_checkpoint(name).sha256

    def _settings(self, recipe: TrainingRecipe) -> dict[str, Any]:
        """Return what decides the result of training: the start is known by its weights, not by its name."""
        values = {key: value for key, value in recipe.as_dict().items() if key != "start"}
        asked = {name: read_manifest(name, "validation").sha256_file for name in recipe.evaluate_on}
        return {"recipe": values, "start": self._checkpoint(recipe.start), "validation": asked}

    def _images_of(self, data: Sequence[Path]) -> str:
        """Return a hash of the images that the conversations show."""
        shown: dict[Path, None] = {}  # in order, each once
        for file in data:
            for conversation in read_conversations(file)[0]:
                if conversation.image:
                    shown[conversation.image] = None
        return self._hash_of(shown)

    def _hash_of(self, files: Iterable[Path]) -> str:
        return hashlib.sha256(json.dumps([[file.name, self.hash(file)] for file in files]).encode()).hexdigest()

    def hash(self, path: Path) -> str:
        """Return the sha256 of a file's bytes.

        Raises:
            InputError: It cannot be read.
        """
        if path not in self._hashes:
            try:
                self._hashes[path] = file_sha256(path)
            except OSError as error:
                raise InputError(f"{path}: cannot be read ({error.strerror}). Put it back.") from error
        return self._hashes[path]


def _check_judge(name: str) -> None:
    """Raise InputError where a judge could not be asked: its name, its server's address, or a key that it needs."""
    from stllava_eval.inference.endpoint import OPENAI, Endpoint

    model, _, address = name.partition("@")
    if model.startswith(HUMAN_PREFIX):
        raise InputError(f"judges: {name}: a person judges by `stllava-train judge --human`, not in a whole run.")
    Endpoint(base_url=address or OPENAI, model=model)


def _left(judged: Path) -> tuple[int, int]:
    """Return how many questions of all judges (failed, were not asked), by the manifest of the verdicts."""
    left = (_read(judged.with_suffix(".json")) or {}).get("left") or {}
    failed = sum(counts.get("failed", 0) for counts in left.values())
    return failed, sum(counts.get("not_asked", 0) for counts in left.values())


def _columns(file: Path) -> str | None:
    """Return a hash of what the file's columns are called, where a `dataset_info.json` names the file."""
    return columns.sha256 if (columns := columns_of(file)) else None


def _cut(judged: Path) -> int:
    """Return how many replies were cut before their scores: a call with more room asks for them again."""
    return sum(bool(row.get("cut_at")) for row in read_rows(judged))


def _read(manifest: Path) -> dict[str, Any] | None:
    try:
        return dict(read_json(manifest))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _evaluate(command: Sequence[str]) -> int:
    """Run an evaluation in a process of its own, since lmms-eval ends its process; return the exit code."""

    def end_with_us() -> None:  # else it would continue, unseen, beside the next call
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    command = [sys.executable, "-m", "stllava_eval.cli", *command]
    return subprocess.run(
        command, env=os.environ, preexec_fn=end_with_us if sys.platform == "linux" else None
    ).returncode


def summary(out: Path, rounds: int) -> str:
    """Return the scores of every checkpoint beside image-blind answers, and what the last round changed.

    Raises:
        InputError: An evaluation is missing.
    """
    from stllava_eval.reports.board_formats import board_text
    from stllava_eval.reports.board_rows import board
    from stllava_eval.reports.compare import compare, compare_text

    runs = [out / "eval" / name for name in ("sft", *(f"round-{number}" for number in range(1, rounds + 1)))]
    tests = compare_text(compare([runs[0], runs[-1]]))
    return f"{board_text(board(runs))}\n\nWhat stage 2 changed:\n\n{tests}"
