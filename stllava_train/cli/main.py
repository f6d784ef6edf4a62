"""The command line `stllava-train`. Commands import heavy libraries when they run, so that help answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any, TextIO, cast

from stllava_eval.errors import InputError, disk_error_line, printable
from stllava_eval.version import __version__
from stllava_train.cli.candidates import add_candidates
from stllava_train.cli.data import add_check, add_data
from stllava_train.cli.judge import add_judge
from stllava_train.cli.pairs import add_audit, add_pairs
from stllava_train.cli.pipeline import add_all
from stllava_train.cli.train import add_card, add_dpo, add_merge, add_sft, add_tiny


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 1 the data has problems, 2 wrong call, 130 stopped by Ctrl-C."""
    arguments = parser().parse_args(argv)
    try:
        with redirect_stdout(cast(TextIO, _Stdout(sys.stdout))):
            return arguments.command(arguments) or 0
    except InputError as error:
        print(printable(f"stllava-train: {error}"), file=sys.stderr)
        return 2
    except OSError as error:
        if not (line := disk_error_line(error)):
            raise
        print(printable(f"stllava-train: {line}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "stllava-train: stopped. The same call continues; those of `sft` and `dpo` with --resume.", file=sys.stderr
        )
        return 130


class _Stdout:
    """Standard output that its reader may leave, as `head` does: the command continues, and its output is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, whose help `docs/reference/cli.md` repeats."""
    top = argparse.ArgumentParser(
        prog="stllava-train",
        description="Train medical vision-language models. Research only; not for clinical use.",
        epilog="examples:\n  stllava-train data vqarad slake --out data\n  stllava-train check data/vqarad.json\n"
        "  stllava-train sft --recipe tiny --data data/vqarad.json --out runs/a start=checkpoints/a",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"stllava-med {__version__}")
    commands = top.add_subparsers(dest="name", required=True, metavar="COMMAND")
    add_data(commands)
    add_check(commands)
    add_sft(commands)
    add_candidates(commands)
    add_judge(commands)
    add_pairs(commands)
    add_audit(commands)
    add_dpo(commands)
    add_all(commands, main)
    add_merge(commands)
    add_card(commands)
    add_tiny(commands)
    return top
