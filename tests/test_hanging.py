"""No test hangs: what tests/conftest.py and pyproject.toml promise of every test, tried on tests that do."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

SIGNALS = {"SIGINT", "SIGHUP", "SIGQUIT"}  # what a shell or nohup has ignored for a run in the background


def run(*arguments: object, **options) -> subprocess.CompletedProcess:
    """These tests in a pytest of their own, with our settings and hooks. One that hangs after all ends in 200 s."""
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "-p", "no:cacheprovider", *arguments]
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        **options,
    )


def run_here(folder: Path, source: str, *workers: str) -> subprocess.CompletedProcess:
    (folder / "test_these.py").write_text(source)
    return run(*workers, "-p", "conftest", "-o", "timeout=2", "--rootdir", folder, folder / "test_these.py")


WAITS_FOR_A_CHILD = """
import subprocess, sys

def test_one_waits():
    program = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(LONG)'])"
    with subprocess.Popen([sys.executable, "-c", program + "; print(1, flush=True); time.sleep(LONG)"]) as child:
        child.wait()

def test_the_next_one_passes():
    pass
"""


@pytest.mark.parametrize(("workers", "seconds"), [(("-n", "0"), "900"), (("-n", "1"), "901")], ids=["alone", "worker"])
def test_a_test_that_waits_for_ever_fails_with_its_stack_and_the_next_one_runs(tmp_path, workers, seconds):
    """Its child, and the child's, are gone: they hold the output that we read here to its end."""
    done = run_here(tmp_path, WAITS_FOR_A_CHILD.replace("LONG", seconds), *workers)
    assert done.returncode == 1
    assert "1 failed, 1 passed" in done.stdout
    assert "Timeout (>2.0s)" in done.stdout
    assert "child.wait()" in done.stdout
    children = [process.info["cmdline"] or () for process in psutil.process_iter(["cmdline"])]
    assert not [words for words in children if any(f"time.sleep({seconds})" in word for word in words)]


WAITS_IN_A_FIXTURE = """
import time
import pytest

@pytest.fixture
def slow_to_go():
    yield
    time.sleep(900)  # where no limit of pytest-timeout holds any more: the test has failed

def test_it(slow_to_go):
    assert False
"""


def test_a_fixture_that_waits_for_ever_ends_the_run_with_its_stack(tmp_path):
    done = run_here(tmp_path, WAITS_IN_A_FIXTURE)
    assert done.returncode == 1
    assert "in slow_to_go" in done.stdout


def test_a_fixture_that_waits_for_ever_ends_its_worker_with_its_stack_and_the_next_test_runs(tmp_path):
    done = run_here(tmp_path, WAITS_IN_A_FIXTURE + "\ndef test_the_next_one_passes():\n    pass\n", "-n", "1")
    assert done.returncode == 1
    assert "in slow_to_go" in done.stderr
    assert "crashed while running 'test_these.py::test_it'" in done.stdout
    assert "1 passed" in done.stdout


def test_what_sends_ctrl_c_passes_where_a_shell_has_it_ignored():
    """As `nohup make test &` starts the tests."""

    def ignore() -> None:
        for name in SIGNALS:
            signal.signal(getattr(signal, name), signal.SIG_IGN)

    done = run("-o", "timeout=120", *senders(), preexec_fn=ignore)
    assert done.returncode == 0, done.stdout
    assert f"{len(senders())} passed" in done.stdout


def senders() -> list[str]:
    return [f"{file}::{one.name}" for file, one in every_test() if sends(one)]


def every_test() -> list[tuple[Path, ast.FunctionDef]]:
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    nodes = [(file, node) for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    return [(file, one) for file, one in nodes if isinstance(one, ast.FunctionDef) and one.name.startswith("test_")]


def sends(function: ast.FunctionDef) -> bool:
    return any(
        isinstance(node, ast.Call)
        and {f"signal.{name}" for name in SIGNALS} & {ast.unparse(argument) for argument in node.args}
        and ast.unparse(node.func) != "signal.signal"
        for node in ast.walk(function)
    )


def test_every_test_that_sends_ctrl_c_has_it_restored():
    found = {one.name: [argument.arg for argument in one.args.args] for _, one in every_test() if sends(one)}
    assert "test_ctrl_c_ends_it_and_says_how_many_are_judged" in found
    assert [name for name, fixtures in found.items() if "signals" not in fixtures] == [], (
        "ask for the fixture `signals`"
    )
