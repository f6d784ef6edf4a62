"""`stllava-train all`: every stage of a recipe, one after the other."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stllava_eval.errors import InputError
from stllava_train.cli.options import check_data, filled, let_threads_wait


def add_all(commands: Any, call: Callable[[list[str]], int]) -> None:
    """Add `stllava-train all` to the commands; it runs its stages by `call`, the command line itself."""
    command = commands.add_parser(
        "all",
        help="run both stages, the steps between them, and evaluations",
        description=filled(
            "Run stage 1, candidates, judges, pairs, stage 2 and evaluations, one after the other, by a recipe. "
            "A stage "
            "is skipped if it is done and its inputs have not changed; after a stop, the same call continues. It ends "
            "with the scores and with tests of what stage 2 has changed."
        ),
        epilog="examples:\n"
        "  stllava-train all --recipe tiny --data data/vqarad.json --data data/slake.json --images data/images \\\n"
        "    --out runs/a sft.start=checkpoints/tiny-start\n"
        "  stllava-train all --recipe tiny --data data/vqarad.json --images data/images --out runs/b \\\n"
        "    rounds=2 dpo.beta=0.3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "--recipe", required=True, metavar="R", help="a YAML file, or the name of a recipe in docs/train/recipes.md"
    )
    command.add_argument(
        "--data",
        required=True,
        action="append",
        type=Path,
        metavar="FILE",
        help="conversations for stage 1, in the folder that their images are relative to; may be given several times",
    )
    command.add_argument("--images", required=True, type=Path, metavar="DIR", help="folder of the images to ask about")
    command.add_argument("--out", required=True, type=Path, metavar="RUN", help="folder to write")
    command.add_argument("--default", action="store_true", help="make the last checkpoint the default of the harness")
    command.add_argument(
        "changes",
        nargs="*",
        metavar="key=value",
        help="changes of the recipe, such as rounds=2; sft.KEY, candidates.KEY and dpo.KEY change that stage",
    )
    command.set_defaults(command=_all, call=call)


def _all(arguments: argparse.Namespace) -> int:
    let_threads_wait()
    from stllava_train.pipeline import Pipeline, summary

    if not arguments.images.is_dir():
        raise InputError(f"--images {arguments.images}: no such folder. Pass the one of the images to ask about.")
    check_data(arguments.data, None)
    pipeline = Pipeline(
        arguments.recipe, arguments.changes, arguments.data, arguments.images, arguments.out, call=arguments.call
    )
    if code := pipeline.run():
        return code
    rounds = pipeline.recipe.rounds
    if arguments.default:
        from stllava_eval.inference.open import record_default_checkpoint

        record_default_checkpoint(arguments.out / f"round-{rounds}" / "dpo")
    print(f"\n{summary(arguments.out, rounds)}")
    return 0
