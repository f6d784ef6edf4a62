import ast
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the sdist, built from what git tracks, as a release would be."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree], capture_output=True, check=True
    )
    return out


def task_files() -> set[str]:
    files = {file.relative_to(ROOT / "tasks").as_posix() for file in (ROOT / "tasks").rglob("*") if file.is_file()}
    return {name for name in files if "__pycache__" not in name}


def test_the_wheel_holds_every_task_file_and_the_pth(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"stllava_eval/tasks/{name}" for name in task_files()} <= names
    assert {"stllava_med.pth", "stllava_eval/network/modeling.py", "stllava_train/tiny.py"} <= names
    assert {file.relative_to(ROOT).as_posix() for file in (ROOT / "stllava_train" / "recipes").glob("*.yaml")} <= names
    assert len(task_files()) > 10


def test_the_sdist_holds_every_task_file(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as opened:
        names = {name.split("/", 1)[-1] for name in opened.getnames()}
    assert {f"tasks/{name}" for name in task_files()} <= names
    assert {"stllava_med.pth", "setup.py", "LICENSE"} <= names


def test_tasks_hold_data_only():
    python = [file.name for file in (ROOT / "tasks").rglob("*.py")]
    assert python == ["__init__.py"]


def imports(package: str) -> set[str]:
    """Every module that a package's files import, at the top or inside functions."""
    return {name for file in (ROOT / package).rglob("*.py") for name in imported(file)}


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import would escape this test"
            found.add(node.module or "")
    return found


def test_training_imports_evaluation_and_never_the_other_way_round():
    assert any(name.startswith("stllava_eval") for name in imports("stllava_train"))
    assert not any(name.startswith("stllava_train") for name in imports("stllava_eval"))


def test_one_module_alone_talks_to_a_server():
    clients = {"openai", "requests", "httpx", "httpx2"}
    files = [*(ROOT / "stllava_eval").rglob("*.py"), *(ROOT / "stllava_train").rglob("*.py")]
    users = {file.name for file in files if clients & {name.split(".")[0] for name in imported(file)}}
    assert users == {"server.py", "wire.py"}
    assert [file.name for file in files if "stllava_eval.wire" in imported(file)] == ["server.py"]


def test_the_template_of_the_tasks_lists_every_score():
    from stllava_eval.metrics import SCORES

    lines = (ROOT / "tasks" / "_template").read_text().splitlines()
    listed = [line.split("metric: ")[1].split(",")[0] for line in lines if "metric: " in line]
    assert listed == list(SCORES)
