"""Make image-contrast pairs of conversations and boxes in their images: one answer, about an image and a noised copy.

MMedPO (arXiv:2412.06141) calls the noised side "lesion region neglect": an answer that is as likely without the region
that it speaks of was not read off the image. The loss is that of any pair, with the image as part of the prompt: of
DPO, -log sigmoid(beta * (log-ratio of the answer about the image - log-ratio of it about the noised copy)), where a
log-ratio is log policy - log reference. It is the conditional preference of mDPO too (arXiv:2406.11839;
luka-group/mDPO, `mdpo_trainer.py`, `image_conditional_logits`), whose anchor on the chosen answer we do not add.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.errors import InputError, one_line
from stllava_eval.images import open_image, pixel_hash
from stllava_eval.scoring.words import folded_words
from stllava_eval.storage import read_json, whole_file
from stllava_train.data.conversations import Conversation, read_conversations
from stllava_train.data.export import safe_names
from stllava_train.data.leaks import screen_images
from stllava_train.data.records import short
from stllava_train.preferences.pairs import Pair, pair_problem

if TYPE_CHECKING:
    from PIL.Image import Image

REGIONS = ("named", "lesions")
FOLDER = "contrast"  # of the noised copies, in the folder of the images
BOXES = "detection.json"  # SLAKE's, in the folder of each image
IMAGES = (".jpg", ".jpeg", ".png")
# A region becomes noise of this mean and standard deviation, in steps of 8 bits, and is clipped to what 8 bits hold:
# aiming-lab/MMedPO, curation/.../inference_attention-map_score.py, `generate_noised_image`. Its regions are where a
# heat map of MedKLIP is high; ours are boxes that people drew
NOISE_MEAN, NOISE_DEVIATION = 0.0, 10.0
# SLAKE's 13 classes of lesions, and the words by which its questions and answers name them, misspelt ones included; its
# other classes are organs
LESIONS = {
    "Atelectasis": {"atelectasis"},
    "Brain Edema": {"edema"},
    "Brain Enhancing Tumor": {"tumor"},
    "Brain Non-enhancing Tumor": {"tumor"},
    "Cardiomegaly": {"cardiomegaly", "cardiomegal"},
    "Effusion": {"effusion"},
    "Infiltrate": {"infiltrate", "infiltration"},
    "Liver Cancer": {"cancer"},
    "Lung Cancer": {"cancer"},
    "Mass": {"mass"},
    "Nodule": {"nodule", "noudle"},
    "Pneumonia": {"pneumonia"},
    "Pneumothorax": {"pneumothorax"},
}
ANY_LESION = {"abnormality", "abnormal", "disease", "lesion"}  # words that name all of them. Our choice
SIDES = {"left", "right"}
NO_BOX = "image without a box"
NO_LESION = "image without a lesion's box"
NOT_NAMED = "question and answer name nothing that has a box"
LATER_ROUND = "question that may build on an earlier one"
NO_IMAGE = "no image"
TEST_IMAGE = "image of a test split"


@dataclass(frozen=True)
class Box:
    """A rectangle in an image, in its pixels; `x` and `y` are its upper left corner."""

    label: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Boxed:
    """An image whose boxes are known; `pixels` is its `pixel_hash`."""

    image: Path
    pixels: str
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Contrasts:
    """Pairs, and what is left out: by why, the ids of conversations or of their questions."""

    pairs: list[Pair]
    skipped: dict[str, list[str]]


# --- boxes ------------------------------------------------------------------------------------------------------------


def read_boxes(folder: Path, progress: bool = True) -> list[Boxed]:
    """Read the images under a folder in SLAKE's layout, `NAME/source.jpg` with its boxes in `NAME/detection.json`.

    Raises:
        InputError: There is none, a file cannot be read, is of another form, or a box leaves its image.
    """
    from tqdm import tqdm

    files = sorted(folder.rglob(BOXES))
    if not files:
        raise InputError(f"--boxes {folder}: no {BOXES} is in it. Pass the folder `imgs` of SLAKE.")
    found: dict[str, Boxed] = {}
    for file in tqdm(files, "boxes", disable=None if progress else True):
        images = sorted(path for path in file.parent.iterdir() if path.suffix.lower() in IMAGES)
        if len(images) != 1:
            raise InputError(f"{file}: {len(images)} images are beside it. Put its one image there, as SLAKE has it.")
        picture = open_image(images[0])
        boxed = Boxed(images[0], pixel_hash(picture), _boxes(file, picture.size))
        before = found.setdefault(boxed.pixels, boxed)
        if before.boxes != boxed.boxes:
            raise InputError(f"{file}: its image is that of {before.image.parent}, with other boxes. Delete one.")
    return list(found.values())


def _boxes(file: Path, size: tuple[int, int]) -> tuple[Box, ...]:
    """Read the boxes of a file, each of them inside an image of this width and height."""
    try:
        entries = read_json(file)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({one_line(error)}). Download it again.") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f'{file}: it is {short(entries)}, not a list of {{"LABEL": [x, y, width, height]}}.')
    boxes = [_box(file, size, label, value) for entry in entries for label, value in entry.items()]
    return tuple(sorted(boxes, key=lambda box: (box.label, box.x, box.y, box.width, box.height)))


def _box(file: Path, size: tuple[int, int], label: str, value: Any) -> Box:
    numbers = value if isinstance(value, list) else []
    if len(numbers) != 4 or not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise InputError(f"{file}: {label}: {short(value)} is no box. It is [x, y, width, height], in pixels.")
    x, y, width, height = numbers
    if min(x, y) < 0 or min(width, height) <= 0 or x + width > size[0] or y + height > size[1]:
        raise InputError(
            f"{file}: {label}: the box {short(value)} leaves its image of {size[0]} x {size[1]} pixels. Put the "
            "original image there: of a scaled one the boxes are not known."
        )
    return Box(label, float(x), float(y), float(width), float(height))


def region(boxes: Sequence[Box], question: str, answer: str, regions: str = "named") -> list[Box]:
    """Return the boxes of an image that are noised, for a question about it and its answer.

    Args:
        boxes: Of the image.
        question, answer: What is to depend on them.
        regions: `named`: the lesions that question or answer name, all of them where they speak of abnormalities, and
            where there is none the organs that they name; "left" and "right" choose between two (our choice: an answer
            about the imaging plane does not depend on the lesion). `lesions`: all lesions, whatever is asked, as MMedPO
            has it.

    >>> region([Box("Left Lung", 0, 0, 2, 2), Box("Mass", 1, 1, 1, 1)], "Where is the mass?", "In the left lung")
    [Box(label='Mass', x=1, y=1, width=1, height=1)]
    """
    lesions = [box for box in boxes if box.label in LESIONS]
    if regions == "lesions":
        return lesions
    said = _words(f"{question} {answer}")
    if said & _words(" ".join(ANY_LESION)) and lesions:
        return lesions
    if named := [box for box in lesions if said & _words(" ".join(LESIONS[box.label]))]:
        return named
    sides = said & SIDES
    return [
        box
        for box in boxes
        if box.label not in LESIONS
        and (words := _words(box.label)) - SIDES <= said
        and (not sides or not words & SIDES or sides & words)
    ]


def _words(text: str) -> set[str]:
    """Return the folded words, and plurals as singulars: lungs and lung are one, abnormalities and abnormality too."""
    return {f"{word[:-3]}y" if word.endswith("ies") else word.removesuffix("s") for word in folded_words(text)}


# --- noise ------------------------------------------------------------------------------------------------------------


def noised(picture: Image, boxes: Sequence[Box], id: str) -> Image:
    """Return a copy of an RGB picture in which every pixel that a box touches is noise, drawn from the id alone."""
    import numpy as np
    import PIL.Image

    pixels = np.array(picture)
    inside = np.zeros(pixels.shape[:2], bool)  # (height, width)
    for box in boxes:
        rows = slice(math.floor(box.y), math.ceil(box.y + box.height))
        inside[rows, math.floor(box.x) : math.ceil(box.x + box.width)] = True
    seed = np.frombuffer(hashlib.sha256(id.encode()).digest(), "<u4")
    draw = np.random.RandomState(seed)  # numpy never changes what this one draws (NEP 19), unlike its newer generators
    noise = draw.normal(NOISE_MEAN, NOISE_DEVIATION, (int(inside.sum()), pixels.shape[2]))  # (pixels inside, 3)
    pixels[inside] = np.clip(noise, 0, 255).astype(np.uint8)
    return PIL.Image.fromarray(pixels)


def _written(picture: Image, pixels: str, id: str, images: Path) -> str:
    """Write a picture to `images`, and return its file's name; `pixels` is its `pixel_hash`."""
    name = f"{FOLDER}/{safe_names([id])[id]}-{pixels[:12]}.png"
    content = io.BytesIO()
    picture.save(content, "PNG", compress_level=1)  # noise hardly shrinks, and the higher levels take most of the time
    if not (images / name).is_file() or (images / name).read_bytes() != content.getvalue():
        (images / FOLDER).mkdir(exist_ok=True)
        with whole_file(images / name) as unfinished:
            unfinished.write_bytes(content.getvalue())
    return name


# --- pairs ------------------------------------------------------------------------------------------------------------


def contrast_pairs(
    file: Path,
    boxed: Sequence[Boxed],
    images: Path,
    regions: str = "named",
    allow_test_images: bool = False,
    progress: bool = True,
) -> Contrasts:
    """Make a pair of each question of each conversation whose image has a box for it, in their order.

    The answer of the conversation is chosen about the image, and rejected about its copy with noise in the boxes, which
    is written to `images/contrast`. Of a conversation whose rounds may build on each other only the first is taken.

    Args:
        file: Conversations with true answers, see `read_conversations`.
        boxed: The images whose boxes are known. A conversation's image is known by its pixels.
        images: The folder that the conversations' images are relative to.
        regions: See `region`.
        allow_test_images: Keep images of prepared test splits too.
        progress: Whether to show bars on stderr.

    Raises:
        InputError: A conversation is not sound, or its image has the name of one whose boxes are known and is another.
    """
    sound, problems = read_conversations(file, images)
    if problems:
        raise InputError(f"{problems[0]} `stllava-train check {file}` lists {len(problems)} problems.")
    seen = screen_images(sound, progress)
    if seen.broken:
        raise InputError(f"{seen.broken[0]} Put it back, or leave the record out.")
    tests = set() if allow_test_images else {problem.location for problem in seen.leaks}
    by_pixels = {image.pixels: image for image in boxed}
    pairs: list[Pair] = []
    skipped: dict[str, list[str]] = defaultdict(list)
    for conversation in sound:
        pixels = None if conversation.image is None else seen.pixels[conversation.image]
        known = by_pixels.get(pixels or "")
        if known is None and conversation.image is not None:
            _refuse_other_pixels(conversation, conversation.image, boxed)
        if pixels is None:
            skipped[NO_IMAGE].append(conversation.id)
        elif conversation.location in tests:
            skipped[TEST_IMAGE].append(conversation.id)
        elif known is None or not known.boxes:
            skipped[NO_BOX].append(conversation.id)
        elif regions == "lesions" and not any(box.label in LESIONS for box in known.boxes):
            skipped[NO_LESION].append(conversation.id)
        else:
            pairs += _pairs_of(conversation, known, pixels, images, regions, skipped)
    return Contrasts(pairs, dict(skipped))


def _pairs_of(
    conversation: Conversation, known: Boxed, pixels: str, images: Path, regions: str, skipped: dict[str, list[str]]
) -> list[Pair]:
    """Return the pairs of a conversation; what makes none goes to `skipped`."""
    assert conversation.image is not None
    pairs = []
    picture = open_image(conversation.image)
    for number, (question, answer) in enumerate(conversation.rounds):
        id = f"{conversation.id}#{number}"
        boxes = region(known.boxes, question, answer, regions)
        why = pair_problem(question, answer, answer, two_images=True)
        if number and not conversation.unordered:  # it may need the rounds before it, which a pair does not have
            why = LATER_ROUND
        if why := why or (None if boxes else NOT_NAMED):
            skipped[why].append(id)
            continue
        copy = noised(picture, boxes, id)
        sha256 = pixel_hash(copy)
        image = conversation.image.relative_to(images).as_posix()
        other = _written(copy, sha256, id, images)
        pairs.append(Pair(id, image, pixels, question, answer, answer, None, (), None, other, sha256))
    return pairs


def _refuse_other_pixels(conversation: Conversation, image: Path, boxed: Sequence[Boxed]) -> None:
    """Raise InputError where an image has the name of one whose boxes are known: they would be of another image.

    `stllava-train data slake` calls SLAKE's `xmlab1/source.jpg` `xmlab1_source.jpg`.
    """
    for other in boxed:
        name = f"{other.image.parent.name}/{other.image.name}"
        if image.stem == safe_names([name])[name] or "/".join(image.parts[-2:]) == name:
            raise InputError(
                f"{conversation.location}: {conversation.id}: its image {image} has other pixels than {other.image}, "
                "whose boxes are known. Boxes of another image would be noised: write the conversations of that copy "
                "of the data set."
            )


def source_of(file_sha256: str, boxed: Sequence[Boxed], regions: str) -> dict[str, Any]:
    """Return what decides the pairs, for their manifest."""
    boxes = sorted(
        [image.pixels, *([box.label, box.x, box.y, box.width, box.height] for box in image.boxes)] for image in boxed
    )
    return {
        "conversations_sha256": file_sha256,
        "boxes_sha256": hashlib.sha256(json.dumps(boxes).encode()).hexdigest(),
        "regions": regions,
        "noise": {"mean": NOISE_MEAN, "deviation": NOISE_DEVIATION},
    }
