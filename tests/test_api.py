"""The public names of both packages: lazy, complete, and as docs/reference/python.md shows them."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import png

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


@pytest.mark.parametrize("package", PACKAGES)
def test_the_example_runs(package, prepared, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "tiny-start").symlink_to(checkpoint)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(png((3, 5, 7)))
    turns = [{"from": "human", "value": "<image>\nWhat is shown?"}, {"from": "gpt", "value": "a lung"}]
    (tmp_path / "data" / "vqarad.json").write_text(json.dumps([{"id": "1", "image": "a.png", "conversations": turns}]))
    for example in re.findall(r"^```python\n(.*?)^```", section(package), re.M | re.S):
        exec(compile(example, str(PAGE), "exec"), {})
    shown = capsys.readouterr().out
    if package == "stllava_eval":
        assert shown.count("'words'") == 8  # a line for each row of the prepared split
    else:
        assert "1 conversations, 0 problems" in shown
        assert json.loads((tmp_path / "runs" / "stage1" / "run.json").read_text())["finished"]
