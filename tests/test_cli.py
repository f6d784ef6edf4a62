import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_small_sets

from stllava_eval.cli import main as eval_cli
from stllava_train.cli import main as train_cli

PARSERS = {"stllava-eval": eval_cli.parser, "stllava-train": train_cli.parser}


def helps() -> dict[str, str]:
    """`stllava-eval`, `stllava-eval run`, ... -> what --help prints, 100 columns wide."""
    os.environ["COLUMNS"] = "100"
    found = {}
    for program, parser in PARSERS.items():
        top = parser()
        found[program] = top.format_help()
        for action in top._subparsers._group_actions:
            found |= {f"{program} {name}": sub.format_help() for name, sub in action.choices.items()}
    return found


def test_docs_and_help_say_the_same(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    documented = dict(
        re.findall(r"^## `(.+?)`\n\n```\n(.*?)```$", (ROOT / "docs" / "reference" / "cli.md").read_text(), re.M | re.S)
    )
    assert documented == helps(), "run `python tests/test_cli.py` to write docs/reference/cli.md again"


def test_every_example_in_the_help_is_a_call_that_parses():
    examples = [
        line.strip()
        for text in helps().values()
        for line in text.split("examples:")[-1].replace("\\\n", " ").splitlines()
        if line.strip()
    ]
    assert len(examples) > 8
    for example in examples:
        program, *arguments = shlex.split(example)
        PARSERS[program]().parse_args(arguments)


@pytest.mark.parametrize("module", ["stllava_eval.cli.main", "stllava_train.cli.main"])
def test_help_loads_nothing_heavy(module):
    program = (
        f"import sys, {module} as c; c.parser().format_help()\n"
        "print(*{'torch', 'transformers', 'datasets', 'pyarrow', 'numpy', 'PIL', 'lmms_eval'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_score_gives_the_numbers_of_the_run_from_its_answers(prepared, checkpoint, tmp_path, capfd):
    out = tmp_path / "run"
    call = [sys.executable, "-m", "stllava_eval.cli", "run", "--tasks", "vqarad,slake", "--checkpoint", str(checkpoint)]
    subprocess.run([*call, "--out", str(out), "--batch-size", "4"], check=True)
    of_run = json.loads((out / "scores.json").read_text())["scores"]
    for task in ("vqarad", "slake"):
        capfd.readouterr()
        assert eval_cli.main(["score", "--task", task, "--answers", str(out / "answers.jsonl"), "--json"]) == 0
        rescored = json.loads(capfd.readouterr().out)
        assert rescored["scores"] == [row for row in of_run if row["task"] == task]
        assert rescored["unanswered"] == {task: []}


def lmms_eval(*arguments: str, environment: dict[str, str] | None = None, launcher: tuple[str, ...] = ()):
    program = [*launcher] or [str(Path(sys.executable).with_name("lmms-eval"))]
    return subprocess.run(
        [*program, *arguments], capture_output=True, text=True, timeout=300, env={**os.environ, **(environment or {})}
    )


BARE = ("--model", "stllava_med", "--tasks", "vqarad,slake,pathvqa")


@pytest.fixture(scope="module")
def bare(tmp_path_factory, checkpoint):
    """The bare command on the small sets: what it printed, and the folder of its run."""
    folder = tmp_path_factory.mktemp("bare")
    environment = {"STLLAVA_CHECKPOINT": str(checkpoint), "OMP_NUM_THREADS": "1", "STLLAVA_HOME": str(folder / "home")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STLLAVA_HOME", environment["STLLAVA_HOME"])
        write_small_sets()
    done = lmms_eval(*BARE, environment={**environment, "STLLAVA_RUN": str(folder / "run")})
    assert done.returncode == 0, done.stderr[-2000:]
    return done, folder / "run"


def test_the_bare_command_works_offline_on_what_is_prepared(bare):
    done, out = bare
    assert re.search(r"\|vqarad\s*\|.*closed_accuracy", done.stdout)
    assert set(json.loads((out / "run.json").read_text())["tasks"]) == {"vqarad", "slake", "pathvqa"}
    assert done.stderr.count("SAMPLE DATA") == 3


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param((sys.executable, "-m", "lmms_eval"), id="python -m"),
        pytest.param((sys.executable, "-m", "accelerate.commands.launch", "--cpu", "-m", "lmms_eval"), id="accelerate"),
        pytest.param(
            (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "lmms_eval"), id="torchrun"
        ),
    ],
)
def test_every_launcher_gives_the_answers_of_one_process(bare, prepared, checkpoint, tmp_path, launcher):
    one, other = bare[1], tmp_path / "other"
    environment = {"STLLAVA_CHECKPOINT": str(checkpoint), "OMP_NUM_THREADS": "1", "STLLAVA_RUN": str(other)}
    done = lmms_eval(*BARE, environment=environment, launcher=launcher)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (one / "answers.jsonl").read_bytes() == (other / "answers.jsonl").read_bytes()
    processes = json.loads((other / "run.json").read_text())["processes"]
    assert processes == (2 if "--nproc_per_node" in launcher else 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["run", "--tasks", "vqarat"], "--tasks vqarat: unknown", id="task"),
        pytest.param(["run", "--checkpoint", "{tmp}"], "it has no config.json", id="a folder that is no checkpoint"),
        pytest.param(["run", "--batch-size", "0"], "from 1 on", id="batch size"),
        pytest.param(["run", "--tasks", "slake,slake"], "a task comes twice", id="a task twice"),
        pytest.param(
            ["run", "--out", "{tmp}/empty"], "{tmp}/empty holds a run already, or is a file", id="out is a file"
        ),
        pytest.param(["score", "--task", "slake", "--answers", "{tmp}/\x1b[31m"], "\\x1b[31m", id="escapes in a path"),
        pytest.param(["prepare"], "no data set named", id="prepare what"),
        pytest.param(
            ["prepare", "vqarad", "--from", "{tmp}/pipe"], "a.json is no regular file", id="a pipe is no file"
        ),
        pytest.param(["prepare", "vqarad", "--from", "{tmp}/cut.tar.gz"], "neither a folder nor", id="a cut archive"),
        pytest.param(["score", "--task", "slake", "--answers", "{tmp}/deep"], "deep: not JSON", id="nested too deep"),
        pytest.param(["prepare", "vqarad", "--from", "{tmp}"], "{tmp}", id="nothing to prepare from"),
        pytest.param(
            ["score", "--task", "vqarad", "--answers", "{tmp}/empty"], "no answers to vqarad", id="empty file"
        ),
        pytest.param(["score", "--task", "vqarad", "--answers", "{tmp}/none"], "cannot be read", id="no file"),
        pytest.param(["leaderboard", "{tmp}"], "is not a run folder", id="no run"),
        pytest.param(["leaderboard", "--tasks", "chess"], "--tasks chess: unknown", id="no such task"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(prepared, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setenv("STLLAVA_RUN", "")  # `run --out` sets it
    (tmp_path / "empty").write_text("")
    (tmp_path / "deep").write_text("[" * 100_000)
    (tmp_path / "cut.tar.gz").write_bytes(b"\x1f\x8b\x08abc")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "a.json")
    assert eval_cli.main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message.format(tmp=tmp_path) in error
    assert "\n" not in error


def test_without_data_the_bare_command_says_what_to_run_and_fails(home, checkpoint):
    done = lmms_eval(*BARE, environment={"STLLAVA_CHECKPOINT": str(checkpoint), "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("stllava-eval:")]
    assert "run `stllava-eval prepare" in line


def write_docs() -> None:
    parts = ["# The command line\n\nWhat `--help` prints; `tests/test_cli.py` holds the two together.\n"]
    parts += [f"## `{name}`\n\n```\n{text}```\n" for name, text in helps().items()]
    (ROOT / "docs" / "reference" / "cli.md").write_text("\n".join(parts))


if __name__ == "__main__":
    write_docs()
