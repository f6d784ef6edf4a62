"""Check a run before its first step, and hold what is known of it.

Both stages go through this: conversations (stage 1) or pairs (stage 2) -> a prepared run -> `run.run` -> a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stllava_eval.errors import InputError
from stllava_eval.network.checkpoint import Checkpoint, open_checkpoint
from stllava_train.data.encoding import Encoder
from stllava_train.data.leaks import HasImage, ScreenedImages, screen_images
from stllava_train.training.parts import steps_of
from stllava_train.training.processes import first_process
from stllava_train.training.recipes import DpoRecipe, SftRecipe, TrainingRecipe
from stllava_train.training.validation import questions, warn_of_learnt

if TYPE_CHECKING:
    from stllava_eval.data.catalog import Row


# --- a run ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreparedRun:
    """A run before its first step, as far as both stages have it in common."""

    recipe: TrainingRecipe
    checkpoint: Checkpoint  # to start from
    counts: Any  # what the data comes to: a dataclass of whole numbers
    steps: int
    data: list[dict[str, Any]]  # file, sha256 and records of each
    images_sha256: str  # of the decoded images; empty on all processes but the first, which looks at them
    test_images: int  # records whose image is in a prepared test split

    def sets(self) -> set[str]:
        """Return the data sets that the records come from, as far as they are known; those of `start` are not among
        them."""
        return set()


# --- what both stages check -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """The checkpoint that training starts from, and what its collator needs of it."""

    checkpoint: Checkpoint
    processor: Any
    encoder: Encoder
    padding: int  # a token id


def open_start(recipe: TrainingRecipe) -> Checkpoint:
    """Open the checkpoint that training starts from.

    Raises:
        InputError: There is none, it cannot be read, or it cannot be loaded in 4 bits and the recipe asks for that.
    """
    try:
        checkpoint = open_checkpoint(recipe.start, vision_tower=recipe.start_vision_tower)
    except InputError as error:
        if f"{recipe.start}: no such folder" not in str(error):
            raise
        how = " `stllava-train tiny` makes the one that stage 1 of the recipe tiny starts from."
        raise InputError(
            f"start: {error} Name it with start=DIR.{how if recipe.start == 'tiny-start' else ''}"
        ) from error
    if recipe.four_bit:
        checkpoint.check_four_bit()
    return checkpoint


def start_of(recipe: SftRecipe | DpoRecipe) -> Start:
    """Return the start of a run, opened; no weight is read yet.

    Raises:
        InputError: See `open_start`.
    """
    checkpoint = open_start(recipe)
    processor = checkpoint.processor()
    encoder = Encoder(processor, recipe.template, checkpoint.config.image_seq_length)
    return Start(checkpoint, processor, encoder, checkpoint.config.text_config.pad_token_id or 0)


def validation_of(recipe: TrainingRecipe, records: int) -> dict[str, list[Row]]:
    """Return the validation questions of a run on so many records: a missing split is named before any work.

    Raises:
        InputError: The run would have no step, or a validation split is not prepared.
    """
    if steps_of(records, recipe) == 0:
        raise InputError(f"epochs {recipe.epochs:g}: too few for one step of batch {recipe.batch}. Raise it.")
    return questions(recipe)


def screen_run(
    shown: Sequence[HasImage],
    validation: Mapping[str, Sequence[Row]],
    noun: str,
    progress: bool,
    check: str = "",
) -> ScreenedImages:
    """Return what the first process sees in the images of a run; the other processes look at none.

    Args:
        shown: The records that name images: conversations, or an `ImageRef` for each image of a pair.
        validation: As `validation_of` returns them. A warning names those whose image is trained on.
        noun: What a record is called: `record` or `pair`.
        progress: Whether to show bars on stderr.
        check: The call that lists every problem, if there is one.

    Raises:
        InputError: An image cannot be decoded.
    """
    screened = screen_images(shown, progress) if first_process() else ScreenedImages([], [], {}, "")
    warn_of_learnt(validation, set(screened.pixels.values()))
    if broken := screened.broken:
        more = f" ({len(broken) - 1} more: `{check}`)" if check and len(broken) > 1 else ""
        raise InputError(f"{broken[0]} Put it back, or leave the {noun} out.{more}")
    return screened


def refuse_test_images(screened: ScreenedImages, records: str, allowed: bool, check: str = "") -> int:
    """Return how many records show a test image.

    Args:
        screened: As `screen_run` returns it; a pair about two test images counts once.
        records: How many records there are, with their noun.
        allowed: Whether test images may be trained on.
        check: The call that writes the other records to FILE, if there is one.

    Raises:
        InputError: There are some, and they are not allowed.
    """
    number = len({leak.location for leak in screened.leaks})
    if number and not allowed:
        raise InputError(
            f"{screened.leaks[0]} {number} of {records} show test images: scores on these sets would mean nothing. "
            f"Leave them out{f' (`{check} --write FILE`)' if check else ''}, or pass --allow-test-images."
        )
    return number
