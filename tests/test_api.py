"""The public names of both packages: lazy, complete, and as docs/reference/python.md shows them."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import png
from fault_server import MODEL, FaultServer
from small_judging import longer

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "python.md"
HEAVY = (
    "torch",
    "transformers",
    "lmms_eval",
    "trl",
    "peft",
    "datasets",
    "matplotlib",
    "openai",
    "PIL",
    "numpy",
    "yaml",
)
PACKAGES = ("stllava_eval", "stllava_train")


def section(package: str) -> str:
    """The part of the page about a package."""
    return PAGE.read_text(encoding="utf-8").partition(f"\n## {package}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_the_root_loads_nothing_heavy(package):
    program = f"import sys, {package}; dir({package}); print(*(n for n in {HEAVY} if n in sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_resolves(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert {*module.__all__} <= {*dir(module)}
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nonsense'"):
        _ = module.nonsense


@pytest.mark.parametrize("package", PACKAGES)
def test_the_page_lists_every_public_name(package):
    listed = re.findall(r"^\| `(\w+)` \|", section(package), re.M)
    assert sorted(listed) == sorted({*importlib.import_module(package).__all__} - {"__version__"})


def run_examples(package: str, **replaced: str) -> None:
    """Run every example of a package on the page, one after the other, in the working directory."""
    for example in re.findall(r"^```python\n(.*?)^```", section(package), re.M | re.S):
        for written, used in replaced.items():
            example = example.replace(written, used)
        exec(compile(example, str(PAGE), "exec"), {})


@pytest.fixture
def start(prepared, checkpoint, tmp_path, monkeypatch) -> Path:
    """A working directory with prepared sets and a checkpoint, as the page assumes it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "tiny-start").symlink_to(checkpoint)
    return tmp_path


def test_the_examples_of_the_harness_run(start, capsys):
    ids = [row.id for row in importlib.import_module("stllava_eval").read_rows("vqarad", "test")]
    lines = [json.dumps({"id": name, "answer": "yes"}) for name in ids[1:]]
    (start / "answers.jsonl").write_text("\n".join(lines), encoding="utf-8")
    run_examples("stllava_eval")
    shown = capsys.readouterr().out
    assert shown.count("'words'") == 8  # a line for each row of the prepared split
    assert f"vqarad: 1 questions have no answer and are in no mean: {ids[0]}" in shown
    assert (
        json.loads((start / "runs" / "other-model" / "run.json").read_text())["checkpoint"]["name"] == "another model"
    )
    assert "train {'rows': " in shown
    assert (start / "checkpoints" / "converted" / "audit.json").is_file()


def test_the_examples_of_training_run(start, capsys):
    (start / "data").mkdir()
    (start / "data" / "a.png").write_bytes(png((3, 5, 7)))
    turns = [{"from": "human", "value": "<image>\nWhat is shown?"}, {"from": "gpt", "value": "a lung"}]
    (start / "data" / "vqarad.json").write_text(json.dumps([{"id": "1", "image": "a.png", "conversations": turns}]))
    with FaultServer(reply=longer) as judge:
        run_examples("stllava_train", **{"my-judge@http://127.0.0.1:8000/v1": f"{MODEL}@{judge.url}"})
    shown = capsys.readouterr().out
    assert "1 conversations, 0 problems" in shown
    assert json.loads((start / "runs" / "stage1" / "run.json").read_text())["finished"]
    assert re.search(r"[1-9] candidates about 1 images\ngpt-4o: [1-9] questions about 1 images\n", shown)
    assert re.search(r"about 0.\d\d USD, at most .*\n.*\n[1-9] verdicts, 0.0 USD, complete: True\n", shown)
    assert re.search(
        r"[12] pairs in \['pairs.jsonl', 'pairs.trl.jsonl'\]\nruns/a/audit/audit.html\n[12] pairs, 0 left out\n", shown
    )
    assert "conversations about 4 images" in shown
