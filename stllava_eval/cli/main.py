"""The command line `stllava-eval`. Commands import heavy libraries when they run, so that help answers at once."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence

from stllava_eval.cli.convert import add_convert
from stllava_eval.cli.options import add_command, show_errors
from stllava_eval.cli.prepare import add_prepare
from stllava_eval.cli.reports import add_compare, add_gate, add_inspect, add_leaderboard
from stllava_eval.cli.run import add_run
from stllava_eval.cli.score import add_score
from stllava_eval.errors import InputError, disk_error_line
from stllava_eval.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 1 the gate said no, 2 wrong call, or the gate cannot decide."""
    arguments = parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a letter that the terminal lacks is printed as its number
    try:
        return arguments.command(arguments) or 0
    except InputError as error:
        show_errors(str(error))
        return 2
    except OSError as error:
        if not (line := disk_error_line(error)):
            raise
        show_errors(line)
        return 2
    except KeyboardInterrupt:
        return 130  # as shells report Ctrl-C; the answers of a run are saved


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, whose help `docs/reference/cli.md` repeats."""
    top = add_command(
        argparse.ArgumentParser,
        prog="stllava-eval",
        description="Evaluate medical vision-language models. Research only; not for clinical use.",
        examples=["stllava-eval prepare --sample", "stllava-eval run --tasks vqarad", "stllava-eval leaderboard"],
    )
    top.add_argument("--version", action="version", version=f"stllava-med {__version__}")
    commands = top.add_subparsers(dest="name", required=True, metavar="COMMAND")

    add_prepare(commands)
    add_run(commands)
    add_score(commands)
    add_leaderboard(commands)
    add_compare(commands)
    add_inspect(commands)
    add_gate(commands)
    add_convert(commands)
    return top
