"""What lmms-eval loads of us: the model's name and our task folder. Imports nothing heavy and never raises.

lmms-eval 0.7.3 finds models through an entry point, but has none for tasks: its `TaskManager` reads its own folder
only, and `--include_path` loses to a built-in task of the same name. So we wrap `TaskManager.initialize_tasks` when
`lmms_eval.tasks` has just been imported. `stllava_med.pth` (see setup.py) starts the watch in every interpreter of the
environment, because `lmms-eval tasks list` and a `TaskManager` built by hand import the tasks without loading any
entry point.
"""

import importlib.abc
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

log = logging.getLogger("stllava_eval")

MODEL = "stllava_med"
SHADOWED = "slake"  # lmms-eval has a group of this name too: our task replaces it, and it gets the name `BUILTIN`
BUILTIN = "slake_builtin"


def register() -> Any:
    """Return a `ModelManifest` to lmms-eval, or an empty list if lmms-eval has changed; it is an entry point.

    One raising entry point would make lmms-eval drop every plug-in after it, so a failure here is a logged line.
    """
    try:
        from lmms_eval.models.registry_v2 import ModelManifest

        watch()
        return ModelManifest(
            model_id=MODEL,
            chat_class_path="stllava_eval.lmms.model.StllavaMed",
            simple_class_path="stllava_eval.lmms.model.StllavaMedSimple",
        )
    except Exception as error:
        log.warning("stllava_med could not register with lmms-eval (%s). The tested version is lmms-eval 0.7.3.", error)
        return []


def watch() -> None:
    """Add our tasks to lmms-eval's as soon as `lmms_eval.tasks` is imported; further calls change nothing."""
    try:
        tasks = sys.modules.get("lmms_eval.tasks")
        if tasks is not None and hasattr(tasks, "TaskManager"):
            add_tasks(tasks)
        elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
            sys.meta_path.insert(0, _AfterImport("lmms_eval.tasks", add_tasks))
    except Exception as error:
        log.warning("the stllava_med tasks could not be added to lmms-eval (%s).", error)


def add_tasks(tasks: ModuleType) -> None:
    """Wrap `TaskManager.initialize_tasks` of lmms-eval's module `tasks`, so that every manager holds our tasks too.

    Ours win over a built-in of the same name; the built-in `slake` becomes `slake_builtin`.
    """
    _give_filelock_its_api()
    original = tasks.TaskManager.initialize_tasks
    if getattr(original, "adds_stllava_med", False):
        return

    def initialize_tasks(self: Any, *args: Any, **kwargs: Any) -> dict[str, dict]:
        builtin = dict(original(self, *args, **kwargs))
        try:
            folder = importlib.util.find_spec("stllava_eval.tasks").submodule_search_locations[0]  # type: ignore
            found_tasks = self._get_task_and_group(folder)
            if SHADOWED in builtin and SHADOWED in found_tasks:
                builtin[BUILTIN] = builtin[SHADOWED]
                self.logger.info(f"slake is stllava-med's task; lmms-eval's own group is {BUILTIN}")
            return {**builtin, **found_tasks}
        except Exception as error:
            log.warning("the stllava_med tasks could not be read (%s).", error)
            return builtin

    initialize_tasks.adds_stllava_med = True  # type: ignore[attr-defined]
    tasks.TaskManager.initialize_tasks = initialize_tasks


def _give_filelock_its_api() -> None:
    """Let lmms-eval 0.7.3 start: it imports `filelock._api`, which filelock has had until 4.2.

    It wants the class of lock classes, to make two locks of one file the same object, and finds it here.
    """
    try:
        import filelock._api
    except ModuleNotFoundError:
        import filelock

        api: Any = ModuleType("filelock._api")
        api.BaseFileLock, api.FileLockMeta = filelock.BaseFileLock, type(filelock.BaseFileLock)
        sys.modules[api.__name__] = api


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls `then(module)` once, right after the module `name` has been imported by whoever imports it."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute, then = spec.loader.exec_module, self.then

        def exec_module(module: ModuleType) -> None:
            execute(module)
            then(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
