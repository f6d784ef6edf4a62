"""The CI examples are run as a runner would run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from small_runs import always, right, small_run

EXAMPLES = ROOT / "examples" / "ci"


def environment(**more: object) -> dict[str, str]:
    return (
        os.environ
        | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        | {k: str(v) for k, v in more.items()}
    )


@pytest.fixture
def runs(prepared, tmp_path):
    policy = tmp_path / "policy.yaml"  # eight questions show little: of so few, half may be lost, and chance is large
    policy.write_text("alpha: 0.4\nmargins: {vqarad: {recall: 60, f1: 60, closed_accuracy: 60}}\n")
    return {
        "policy": policy,
        "baseline": small_run(tmp_path / "baseline", right),
        "good": small_run(tmp_path / "good", right),
        "bad": small_run(tmp_path / "bad", always("no lung here")),
        "unlike": small_run(tmp_path / "unlike", always("yes"), images="black"),
    }


@pytest.mark.parametrize(("candidate", "code"), [("good", 0), ("bad", 1), ("unlike", 2)])
def test_the_shell_version_ends_with_the_gates_verdict(runs, tmp_path, candidate, code):
    out = tmp_path / "out"
    ran = subprocess.run(
        [EXAMPLES / "gate.sh"],
        env=environment(RUN=runs[candidate], BASELINE=runs["baseline"], POLICY=runs["policy"], OUT=out),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == code, ran.stdout + ran.stderr
    assert {"gate.json", "gate.md", "gate.xml", "page"} <= {file.name for file in out.iterdir()}


def test_the_shell_version_evaluates_a_checkpoint(runs, checkpoint, tmp_path):
    out = tmp_path / "out"
    ran = subprocess.run(
        [EXAMPLES / "gate.sh"],
        env=environment(CHECKPOINT=checkpoint, BASELINE=runs["baseline"], TASKS="vqarad", OUT=out),
        capture_output=True,
        text=True,
    )
    assert ran.returncode in (1, 2), ran.stderr  # a random network is no match for the reference
    assert (out / "run" / "answers.jsonl").is_file()


def test_the_shell_version_says_what_it_needs(tmp_path):
    ran = subprocess.run([EXAMPLES / "gate.sh"], env=environment(), capture_output=True, text=True)
    assert ran.returncode != 0
    assert "set BASELINE" in ran.stderr


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        pytest.param({}, 2, id="its tasks are not the baseline's"),
        pytest.param({"baseline": "nowhere"}, 2, id="no baseline"),
    ],
)
def test_the_workflow_runs_step_by_step(runs, checkpoint, tmp_path, changed, code):
    """Its `run` steps, with the inputs where GitHub puts them; what it `uses` is the runner's."""
    workflow = yaml.safe_load((EXAMPLES / "gate.yml").read_text())
    declared = workflow[True]["workflow_call"]["inputs"]  # YAML 1.1 reads `on` as true
    inputs = {name: of.get("default") for name, of in declared.items()}
    inputs |= {"checkpoint": checkpoint, "baseline": runs["baseline"], "tasks": "slake", "policy": runs["policy"]}
    inputs |= changed
    summary = tmp_path / "summary.md"
    codes = {}
    for step in workflow["jobs"]["gate"]["steps"]:
        assert "uses" in step or "${{" not in step["run"], "an input inside a script could become a command"
        if "run" not in step or step["name"] == "Install":  # pip is not what is tested
            continue
        put = {
            key: re.sub(r"\$\{\{ inputs\.(\w+) \}\}", lambda m: str(inputs[m[1]]), of)
            for key, of in step["env"].items()
        }
        ran = subprocess.run(
            ["bash", "-e", "-c", step["run"]],
            cwd=tmp_path,
            env=environment(GITHUB_STEP_SUMMARY=summary, **put),
            capture_output=True,
            text=True,
        )
        codes[step["name"]] = ran.returncode
    assert codes["Evaluate the candidate"] == 0
    assert codes["Hold it against the baseline"] == code
    assert summary.exists() is (tmp_path / "gate" / "gate.md").exists() is (not changed)
    assert codes["Draw the page"] == (2 if changed else 0)


def test_the_weekly_workflow_calls_what_the_makefile_has():
    workflow = yaml.safe_load((EXAMPLES / "newest.yml").read_text())
    assert workflow[True]["schedule"]
    (job,) = workflow["jobs"].values()
    assert job["strategy"]["matrix"]["target"] == ["newest", "install-check"]
    for target in job["strategy"]["matrix"]["target"]:
        (step,) = [step for step in job["steps"] if "run" in step]
        assert step["env"] == {"TARGET": "${{ matrix.target }}"}
        dry = ["bash", "-e", "-c", step["run"].replace("make ", "make --dry-run ")]
        ran = subprocess.run(dry, cwd=ROOT, env=environment(TARGET=target), capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        named = re.findall(r"tests/[\w/]+\.(?:py|sh)", ran.stdout)
        assert named
        assert [name for name in named if not (ROOT / name).is_file()] == []
