"""pyproject.toml -> what `make newest` installs; and its pytest plugin: a deprecation of our own calls is an error.

The newest libraries warn about each other, and we cannot fix that, so no other warning is an error there. A filter
by module does not find our calls: a library blames its caller, and torch's `Module.__call__` is that of a network.
"""

import re
import sys
import tomllib
import warnings
from importlib.metadata import version
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
OURS = tuple(f"{ROOT / folder}/" for folder in ("stllava_eval", "stllava_train"))
# modules between a caller and the function that it calls
BETWEEN = ("torch/nn/modules/module.py", "torch/utils/_contextlib.py", "/contextlib.py", "/functools.py")


def requirements() -> list[str]:
    """Dependencies, and what the tests need, without upper bounds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    every = project["dependencies"] + project["optional-dependencies"]["dev"]
    return [re.sub(r",?<[^,]*", "", one) for one in every if not one.startswith(project["name"])]


def caller(frame: FrameType | None) -> str:
    """The file that a warning is about: the innermost from `frame` on that is not in between."""
    while frame is not None and frame.f_code.co_filename.endswith(BETWEEN):
        frame = frame.f_back
    return frame.f_code.co_filename if frame else ""


def pytest_configure() -> None:
    """Raise a deprecation that is warned of, where we are the caller."""
    warn = warnings.warn

    def warn_or_raise(message, category=None, stacklevel=1, source=None, **others):
        kind = type(message) if isinstance(message, Warning) else category or UserWarning
        frame = sys._getframe(1)
        for _ in range(max(stacklevel, 2) - 1):  # who warns at level 1 names itself, and means its caller
            frame = frame.f_back if frame else None
        if issubclass(kind, DeprecationWarning | FutureWarning) and caller(frame).startswith(OURS):
            raise kind(f"{message} (called from {caller(frame)})")
        warn(message, category, stacklevel + 1, source, **others)

    warnings.warn = warn_or_raise


def pytest_terminal_summary(terminalreporter) -> None:
    """Say which versions it were."""
    names = [re.split("[<>=]", one)[0] for one in requirements()]
    terminalreporter.write_line("with " + ", ".join(f"{name} {version(name)}" for name in names))


if __name__ == "__main__":
    print(*requirements(), sep="\n")
