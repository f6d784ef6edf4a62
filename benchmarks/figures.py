"""A benchmark's figures -> a JSON file, or stdout; and what the system says of this process."""

import json
from pathlib import Path
from typing import Any


def write(figures: dict[str, Any], file: str) -> None:
    """`figures` as indented JSON to `file`; "-" prints them."""
    text = json.dumps(figures, indent=1)
    if file == "-":
        print(text)
    else:
        Path(file).write_text(text + "\n", encoding="utf-8")


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith(name)))
