"""A benchmark's figures -> a JSON file, or stdout."""

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
