"""List everything that is wrong with files of conversations: form, images, length, duplicates, test images.

`stllava-train check` and stage 1 read them through here, before anything is learnt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stllava_eval.errors import InputError
from stllava_eval.storage import whole_file
from stllava_train.data.conversations import (
    Conversation,
    Problem,
    counted,
    read_files,
    read_records,
)
from stllava_train.data.encoding import Encoder
from stllava_train.data.leaks import HasImage, ImageLook, image_problems, images_of_others, look_at_images, test_images

KINDS = ("form", "image", "length", "duplicate", "contradiction", "test image")
MAX_TOKENS = 2623  # the authors': 2048 ids with the image as one, and 575 more for an image of 576 vectors


@dataclass(frozen=True)
class Found(Problem):
    """A problem and its kind, of `KINDS`."""

    kind: str


def problems(
    files: Sequence[Path],
    images: Path | None = None,
    encoder: Encoder | None = None,
    max_tokens: int = MAX_TOKENS,
    progress: bool = True,
    report: Callable[[str], object] = lambda line: None,
) -> list[Found]:
    """List every problem of files of conversations, sorted by file and line.

    A record can have several. Of records that say the same, the first is taken for sound.

    Args:
        files: JSON or JSONL.
        images: The folder that images are relative to (default: that of each file).
        encoder: Counts tokens; without one, lengths are not looked at.
        max_tokens: That a conversation may have, its image's vectors included.
        progress: Whether to draw a bar on stderr, where that is a terminal.
        report: Gets one line, how many sound records there are and about how many images.

    Raises:
        InputError: A file is missing, a pipe or no JSON, or a prepared test split is not whole.
    """
    read, form = read_files(files, images)
    sound = [conversation for conversations in read for conversation in conversations]
    report(f"read: {counted(sound)}")
    with_images: list[HasImage] = [*sound]
    for file, conversations in zip(files, read, strict=True):
        with_images += images_of_others(file, images, {conversation.location for conversation in conversations})
    looks = look_at_images(with_images, progress, test_images(progress))
    by_kind = {
        "form": form,
        "image": image_problems(with_images, looks, lambda look: look.broken),
        "length": [] if encoder is None else too_long(sound, encoder, max_tokens, progress),
        "duplicate": _duplicates(sound, looks),
        "test image": image_problems(with_images, looks, lambda look: look.leak),
    }
    order: dict[str, int] = {}
    for file in files:
        for location, _ in read_records(file):
            order[location] = len(order)
    every = []
    for kind in KINDS:
        every += [Found(problem.location, problem.id, problem.what, kind) for problem in by_kind.get(kind, ())]
    return sorted(every, key=lambda problem: order[problem.location])  # stable: the problems of one record as in KINDS


def write_sound(files: Sequence[Path], found: Iterable[Problem], out: Path) -> int:
    """Write the records without a problem to `out`, a line each in one array; return how many there are.

    They are equal as JSON; but those whose columns have other names, see `columns`, get the names that we read.

    Raises:
        InputError: See `read_conversations` and `whole_file`.
    """
    wrong = {problem.location for problem in found}
    lines = []
    for file in files:
        for location, record in read_records(file):
            if location not in wrong:
                # ASCII, since half a character in a field that we do not read has no UTF-8
                lines.append(json.dumps(record))
    with whole_file(out) as unfinished:
        unfinished.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    return len(lines)


# --- records ----------------------------------------------------------------------------------------------------------


def _duplicates(conversations: Iterable[Conversation], looks: dict[Path, ImageLook]) -> list[Problem]:
    """Return a problem for each conversation with the content and pixels of one before it, in whatever file that is."""
    first: dict[Any, Conversation] = {}
    problems = []
    for conversation in conversations:
        pixels = None if conversation.image is None else looks[conversation.image].pixels
        if conversation.image is not None and pixels is None:
            continue  # it cannot be decoded, which is a problem of another kind
        before = first.setdefault((pixels, *conversation.content), conversation)
        if before is not conversation:
            what = f"its image and rounds are those of {before.id} at {before.location}. Keep one of the two."
            problems.append(Problem(conversation.location, conversation.id, what))
    return problems


def too_long(conversations: Sequence[Conversation], encoder: Encoder, max_tokens: int, progress: bool) -> list[Problem]:
    """Return a problem for each conversation of more than `max_tokens` tokens, or that cannot be encoded.

    Tokens are counted with every question learnt that can be, which is the longest that training renders.
    """
    from tqdm import tqdm

    problems = []
    for conversation in tqdm(conversations, "lengths", disable=None if progress else True):
        location, id, image = conversation.location, conversation.id, conversation.image
        asks = [number > 0 and image is not None for number in range(len(conversation.rounds))]
        try:
            count = len(encoder(conversation, asks).ids)
        except InputError as error:
            problems.append(Problem(location, id, str(error).removeprefix(f"{location}: {id}: ")))
            continue
        if count > max_tokens:
            of_image = f", {encoder.image_tokens} of them its image's" if image else ""
            what = (
                f"it has {count} tokens{of_image}, and at most {max_tokens} are read. Drop rounds, or make two of it."
            )
            problems.append(Problem(location, id, what))
    return problems
