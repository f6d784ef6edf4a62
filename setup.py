"""Puts `stllava_med.pth` beside the packages, in a wheel and in an editable install alike; the rest is pyproject.toml.

The file lets lmms-eval list our tasks before it has loaded any plug-in; see `stllava_eval/lmms/plugin.py`.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPth(build_py):
    """`build_py` that also places the `.pth` file where site-packages will find it."""

    def run(self) -> None:
        """Build, then copy the file."""
        super().run()
        if self.editable_mode:
            # an editable wheel takes only what is in its .data folders; `purelib` is site-packages
            folder = Path(self.get_finalized_command("install_data").install_dir).parent / "purelib"
        else:
            folder = Path(self.build_lib)
        folder.mkdir(parents=True, exist_ok=True)
        self.copy_file("stllava_med.pth", str(folder / "stllava_med.pth"))


setup(cmdclass={"build_py": BuildWithPth})
