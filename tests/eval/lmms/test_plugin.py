import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from stllava_eval.lmms import plugin


def test_lmms_eval_finds_the_model_by_its_entry_point():
    (entry,) = [entry for entry in entry_points(group="lmms_eval.models") if entry.name == "stllava_med"]
    manifest = entry.load()()
    assert manifest.model_id == "stllava_med"
    assert manifest.chat_class_path == "stllava_eval.lmms.model.StllavaMed"


def test_registering_never_raises(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval.models.registry_v2", None)  # its import now raises
    assert plugin.register() == []


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(
            "from lmms_eval.tasks import TaskManager; print(*TaskManager(include_defaults=False).all_tasks)",
            id="a task manager built before the evaluator is imported",
        ),
        pytest.param(
            "import lmms_eval.evaluator; from lmms_eval.tasks import TaskManager\n"
            "print(*TaskManager(include_defaults=False).all_tasks)",
            id="a task manager built after it",
        ),
    ],
)
def test_every_task_manager_knows_our_tasks(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names = set(done.stdout.split())
    assert {"vqarad", "slake", "pathvqa", "vqarad_short", "slake_options", "medvqa"} <= names


def test_our_slake_wins_and_the_built_in_one_stays_reachable():
    from lmms_eval.tasks import TaskManager

    manager = TaskManager()
    assert (
        "stllava" in manager.task_index["slake"]["yaml_path"]
        or "/tasks/slake/slake.yaml" in (manager.task_index["slake"]["yaml_path"])
    )
    assert manager.task_index["slake"]["type"] == "task"
    assert manager.task_index["slake_builtin"]["type"] == "group"
    assert {"slake_en", "slake_zh"} <= set(manager.all_tasks)


def test_the_plugin_imports_nothing_heavy():
    program = "import sys, stllava_eval.lmms.plugin as p; p.watch(); print(*{'torch', 'lmms_eval'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


LOCKS = """
import sys
import filelock
from datasets.utils._filelock import FileLock
filelock.SoftFileLock  # older ones import it late, and it needs what now goes away
sys.modules["filelock._api"] = None  # as from filelock 4.3 on: its import raises
vars(filelock).pop("_api", None)
import lmms_eval.tasks
from lmms_eval.evaluator import _enable_reentrant_filelocks
_enable_reentrant_filelocks()
assert FileLock(sys.argv[1]) is filelock.FileLock(sys.argv[1])
"""


def test_lmms_eval_starts_with_a_filelock_that_has_no_api(tmp_path):
    subprocess.run([sys.executable, "-c", LOCKS, tmp_path / "lock"], check=True)
