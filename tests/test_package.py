import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import warnings
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import newest
import pytest
import torch
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.version import Version


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
    data = [file for folder in ("stllava_eval", "stllava_train") for file in (ROOT / folder).rglob("*.*")]
    shipped = {file.relative_to(ROOT).as_posix() for file in data if file.suffix not in (".pyc", ".so")}
    assert shipped <= names
    assert {"stllava_eval/reports/published.bib", "stllava_eval/scoring/training_answers.json"} <= shipped
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


# the floors, from the ground up: a room imports from those before it in this list
FLOORS = (
    "stllava_eval.version",
    "stllava_eval.errors",
    "stllava_eval.storage",
    "stllava_eval.hub",
    "stllava_eval.images",
    "stllava_eval.data",
    "stllava_eval.network",
    "stllava_eval.inference",
    "stllava_eval.scoring",
    "stllava_eval.runs",
    "stllava_eval.reports",
    "stllava_eval.lmms",
    "stllava_eval.cli",
    "stllava_train.resumable",
    "stllava_train.plain_yaml",
    "stllava_train.data",
    "stllava_train.preferences",
    "stllava_train.training",
    "stllava_train.tiny",
    "stllava_train.pipeline",
    "stllava_train.cli",
)
# the imports of a later room, each with its reason; a new one needs a new seam, not a new line here
EXCEPTIONS = {
    ("stllava_eval.network.checkpoint", "stllava_eval.inference.decoding"): "which tokens are never generated",
}
OWN_IMPORTS_INSIDE_FUNCTIONS = 105  # on 2026-12-01; it may fall, and every one that stays spares a heavy library


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def own_imports() -> list[tuple[str, str, bool]]:
    """A module, a module of ours that it imports, and whether it does so inside a function."""
    files = [file for package in ("stllava_eval", "stllava_train") for file in sorted((ROOT / package).rglob("*.py"))]
    modules = {module_of(file) for file in files}
    edges = []
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        inside = {id(node) for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            names = set()
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                members = {f"{node.module}.{alias.name}" for alias in node.names}
                names = {member if member in modules else node.module for member in members}
            edges += [(module_of(file), name, id(node) in inside) for name in sorted(names & modules)]
    return edges


def test_no_modules_import_each_other_in_a_circle():
    """Imports inside functions count: a circle that one of them hides is a circle."""
    graph: dict[str, set[str]] = {}
    for module, imported_module, _ in own_imports():
        if module != imported_module:
            graph.setdefault(module, set()).add(imported_module)
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_no_room_imports_from_a_floor_above_its_own():
    floor = {room: number for number, room in enumerate(FLOORS)}
    roots = {
        "stllava_eval",
        "stllava_train",
    }  # the public API: they name what is in all rooms, and import it when it is used
    edges = {(module, target) for module, target, _ in own_imports() if module not in roots}
    rooms = {edge: tuple(".".join(module.split(".")[:2]) for module in edge) for edge in edges}
    assert {room for pair in rooms.values() for room in pair} <= floor.keys(), "write the new room into FLOORS"
    against = {edge for edge, (room, target) in rooms.items() if floor[target] > floor[room]}
    assert against == EXCEPTIONS.keys()


def test_own_imports_inside_functions_do_not_grow():
    assert sum(inside for _, _, inside in own_imports()) <= OWN_IMPORTS_INSIDE_FUNCTIONS


def test_pyproject_names_every_folder_of_code():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {file.parent for name in ("stllava_eval", "stllava_train") for file in (ROOT / name).rglob("*.py")}
    named = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert sorted(setuptools["packages"]) == sorted({*named, *setuptools["package-dir"]})


def test_no_test_imports_another_test():
    files = list((ROOT / "tests").rglob("test_*.py"))
    assert len({file.name for file in files}) == len(files), "pytest knows tests by the names of their files"
    assert [file.name for file in files if any(name.startswith("test_") for name in imported(file))] == []


def test_training_imports_evaluation_and_never_the_other_way_round():
    assert any(name.startswith("stllava_eval") for name in imports("stllava_train"))
    assert not any(name.startswith("stllava_train") for name in imports("stllava_eval"))


def test_one_module_alone_talks_to_a_server():
    clients = {"openai", "requests", "httpx", "httpx2"}
    files = [*(ROOT / "stllava_eval").rglob("*.py"), *(ROOT / "stllava_train").rglob("*.py")]
    users = {file.name for file in files if clients & {name.split(".")[0] for name in imported(file)}}
    assert users == {"endpoint.py", "wire.py"}
    assert [file.name for file in files if "stllava_eval.inference.wire" in imported(file)] == ["endpoint.py"]


def test_the_template_of_the_tasks_lists_every_score():
    from stllava_eval.scoring.metrics import SCORES

    lines = (ROOT / "tasks" / "_template").read_text().splitlines()
    listed = [line.split("metric: ")[1].split(",")[0] for line in lines if "metric: " in line]
    assert listed == list(SCORES)


def requirements() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {one.name: one for one in map(Requirement, project["dependencies"])}


def test_the_readme_shows_which_releases_are_installed_and_which_were_tested():
    rows = re.findall(r"^\| ([\w-]+) \| ([<>=.,\d]+) \| ([\d., ]+) \|$", (ROOT / "README.md").read_text(), re.M)
    assert {name for name, _, _ in rows} >= {"lmms-eval", "transformers", "trl", "peft"}
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    for name, installed, tested in rows:
        specifier = requirements()[name].specifier
        versions = [Version(one) for one in tested.split(", ")]
        assert {str(one) for one in specifier} == set(installed.split(",")), name
        assert all(version in specifier for version in versions), name
        assert versions[0] == Version(pinned.get(name) or pinned[name.replace("-", "_")]), name


@pytest.mark.parametrize("name", ["lmms-eval", "transformers", "trl", "peft"])
def test_a_library_whose_inside_is_used_is_bounded_behind_the_last_release_that_was_tested(name):
    (upper,) = [one.version for one in requirements()[name].specifier if one.operator == "<"]
    (tested,) = re.findall(rf"^\| {name} \| \S+ \| ([\d., ]+) \|$", (ROOT / "README.md").read_text(), re.M)
    last = Version(tested.split(", ")[-1]).release
    kept = last[
        : upper.count(".") + 1
    ]  # 5.24.0 before 5.25: the next minor release; 0.7.3 before 0.7.4: the next of all
    assert Version(upper).release == (*kept[:-1], kept[-1] + 1)


def test_make_newest_takes_every_dependency_without_an_upper_bound():
    found = {one.name: one for one in map(Requirement, newest.requirements())}
    assert found.keys() > requirements().keys()
    assert str(found["transformers"]) == "transformers>=5.23"
    assert not [name for name, one in found.items() if "<" in str(one)]


LIBRARY = """
import warnings
from torch import nn

def at_level_1():
    warnings.warn("old", FutureWarning)

def at_level_2():
    warnings.warn("old", DeprecationWarning, stacklevel=2)

def no_deprecation():
    warnings.warn("slow", UserWarning, stacklevel=2)

class Network(nn.Module):
    def forward(self):
        at_level_2()

def calls_itself():
    at_level_2()
    at_level_1()

def calls_its_network():
    Network()()
"""


@pytest.mark.parametrize(
    ("called", "raises"),
    [
        pytest.param("at_level_1()", True, id="a function that blames itself"),
        pytest.param("at_level_2()", True, id="a function that blames its caller"),
        pytest.param("no_deprecation()", False, id="another warning"),
        pytest.param("calls_itself()", False, id="a library that calls itself"),
        pytest.param("calls_its_network()", False, id="a library that calls its own network"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_make_newest_fails_for_a_deprecation_of_our_own_calls_alone(monkeypatch, called, raises):
    monkeypatch.setattr(warnings, "warn", warnings.warn)  # put back afterwards
    newest.pytest_configure()
    library: dict = {}
    exec(compile(LIBRARY, "site-packages/library.py", "exec"), library)
    for folder, ours in (("stllava_eval/new.py", True), ("stllava_train/new.py", True), ("tests/new.py", False)):
        program = compile(called, str(ROOT / folder), "exec")
        if raises and ours:
            with pytest.raises((DeprecationWarning, FutureWarning), match=r"old \(called from .*new\.py\)"):
                exec(program, library)
        else:
            exec(program, library)


@pytest.mark.filterwarnings("ignore")
def test_make_newest_sees_through_the_call_of_a_network(monkeypatch):
    monkeypatch.setattr(warnings, "warn", warnings.warn)

    class Network(torch.nn.Module):
        @torch.no_grad()
        def forward(self):
            warnings.warn("old", FutureWarning, stacklevel=2)

    newest.pytest_configure()
    with pytest.raises(FutureWarning, match=r"old \(called from .*engine\.py\)"):
        exec(compile("network()", str(ROOT / "stllava_eval" / "engine.py"), "exec"), {"network": Network()})
