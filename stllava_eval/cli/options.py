"""Hold what several commands of `stllava-eval` share: options, and how results and errors are printed."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Sequence

from stllava_eval.data.catalog import DATASETS
from stllava_eval.errors import InputError, printable

TASKS = (
    *(name + prompt for name in DATASETS for prompt in ("", "_short", "_options")),
    *("vqarad_options_llavamed", "medvqa"),
)
PROMPTS = ("bare", "short", "options", "options_llavamed")
IMAGES = ("own", "other", "black")


def show_errors(text: str) -> None:
    """Print a line to stderr, if anybody can read it."""
    try:
        print(printable(f"stllava-eval: {text}"), file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def show(text: str) -> None:
    """Print a command's result. If the reader has left, as `head` does, the command continues and its exit code holds.

    Raises:
        InputError: It cannot be written.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise InputError(
            f"stdout: cannot be written ({error.strerror}). Free some space, or write elsewhere."
        ) from error


def show_json(value: object) -> None:
    """Print a value as JSON; raises what `show` raises."""
    show(json.dumps(value, indent=1, ensure_ascii=False))


def add_command(make: type | object, examples: Sequence[str], **options: str) -> argparse.ArgumentParser:
    """Add a command whose description is wrapped and whose help ends with examples; returns its parser."""
    epilog = "examples:\n" + "\n".join(f"  {example}" for example in examples)
    command_name = [options.pop("name")] if "name" in options else []
    options["description"] = textwrap.fill(options["description"], 90)
    return make(*command_name, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, **options)  # type: ignore


def add_page_options(command: argparse.ArgumentParser) -> None:
    """Add the options of commands that write a page with images."""
    command.add_argument(
        "--images",
        choices=("page", "folder", "none"),
        help="thumbnails inside index.html, in a folder beside it, or none (default: page)",
    )
    command.add_argument(
        "--pathvqa-images",
        action="store_true",
        help="show PathVQA's images too; they belong to publishers, so keep such a page to yourself",
    )


def refuse_without_out(arguments: argparse.Namespace) -> None:
    """Raise InputError where an option about the page is given and no page is written."""
    if arguments.out is None and (arguments.images is not None or arguments.pathvqa_images):
        raise InputError("--images and --pathvqa-images are about the page. Pass --out DIR too, or leave them out.")
