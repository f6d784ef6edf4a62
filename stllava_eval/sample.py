"""Real medical images that installed packages ship -> small question sets whose every answer is known by construction.

The answers come from DICOM tags, package documentation, affines, masks, measurements, and from what was done to the
image here (a cross drawn, a bar laid over one side, a flip). Nobody looked at an image to answer. docs/data.md lists
the images, their licences and what each answer rests on.

Three things keep the splits honest. Volumes are cut into slabs with a gap between (`_slab`), single images into regions
with a gap between (`REGIONS`), and some images appear in the test split alone: `categories["origin"]` tells which.
Slices of different planes of one volume cross in a line; nothing else is shared. Each question has wordings that
training never sees.
"""

from __future__ import annotations

import functools
import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.datasets import Row
from stllava_eval.errors import InputError
from stllava_eval.images import opened

if TYPE_CHECKING:
    import numpy as np

SETS = ("vqarad", "slake", "pathvqa")
SPLITS = ("train", "validation", "test")
LONGEST = 128  # px of an image's longer side; the tiny model sees 112. Our choice
QUALITY = 85  # of the WebP files (reference: embedded_data.md, 3.3 MB in all)

# Region of a single image that a split may use: top, bottom, left, right as fractions. The gaps are never shown.
REGIONS = {
    "train": (0.0, 1.0, 0.0, 0.50),
    "validation": (0.0, 0.40, 0.54, 1.0),
    "test": (0.44, 1.0, 0.54, 1.0),
}
WHOLE = (0.0, 1.0, 0.0, 1.0)
# Slabs of a volume, in mm from its middle, repeating every SLAB_PERIOD: training, gap, validation, gap, test, gap.
SLAB_PERIOD = 30
SLABS = {"train": (0, 15), "validation": (18, 20), "test": (23, 27)}

SEED = 20240628  # the day of the paper's preprint; any number would do
ORIGINS = {"train": "training region", "validation": "validation region", "test": "held-out region"}
NEW_WORDING = 0.35  # share of validation and test questions in a wording that training never shows. Our choice
CROSS_GAP = 6  # px on each side of the spot that a cross marks
NUCLEI_RANGES = {"up to 5": 5, "6 to 14": 14, "over 14": 10**6}  # name -> largest count
IMAGES = {  # how many images; our choice, near the study's 1,250 training images (embedded_data.md)
    "train": 420,
    "validation": 70,
    "test": 120,
}
UNSEEN = 60  # test images of volumes never seen, per set
# Open questions, and as many yes/no ones, asked about one concept in one set: at most this share of the split's images.
# Training is told all that it can be; a test asks as often about what few images show as about the rest. Our choice
ASKED_SHARE = {"train": 1.0, "validation": 0.4, "test": 0.4}


@dataclass(frozen=True)
class Concept:
    """One thing that can be asked, in several wordings.

    The last wording of each list is only ever in the test split, the one before it only in the validation split and the
    others anywhere: a score on new wordings is a score on wordings never trained.
    """

    name: str
    values: dict[str, str]  # the answer of an open question -> how a yes/no question names it
    open: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()  # {} stands for the value's name
    choice: bool = False  # the open wordings name both options, which VQA-RAD and SLAKE count as closed
    # pairs of values that can be true at once, so that neither is asked of an image that shows the other
    overlap: frozenset[tuple[str, str]] = frozenset()


def _plain(*values: str) -> dict[str, str]:
    return {value: value for value in values}


MODALITY = Concept(
    "modality",
    {
        "MRI": "an MRI",
        "CT": "a CT scan",
        "X-ray": "an X-ray",
        "ultrasound": "an ultrasound image",
        "bone scan": "a bone scan",
    },
    (
        "What modality is shown?",
        "Which imaging modality was used?",
        "How was this image acquired?",
        "What kind of scan is this?",
        "What type of imaging is this?",
        "Which modality was used to take this image?",
    ),
    (
        "Is this {}?",
        "Is the image {}?",
        "Does this show {}?",
        "Is {} shown?",
        "Is this picture {}?",
        "Is this image {}?",
    ),
)
ORGAN = Concept(
    "organ",
    {
        "head": "the head",
        "chest": "the chest",
        "abdomen": "the abdomen",
        "shoulder": "the shoulder",
        "leg": "the leg",
        "heart": "the heart",
        "whole body": "the whole body",
    },
    (
        "What part of the body is shown?",
        "Which body part is this?",
        "What body region is imaged?",
        "Which part of the body does the image show?",
        "What body part does this image show?",
        "Which body region is shown?",
    ),
    (
        "Is {} shown?",
        "Is this an image of {}?",
        "Does the image show {}?",
        "Was {} imaged?",
        "Do we see {}?",
        "Does this show {}?",
    ),
    overlap=frozenset({("chest", "heart"), ("chest", "shoulder"), ("whole body", "*")}),
)
PLANE = Concept(
    "plane",
    {"axial": "axial", "coronal": "coronal", "sagittal": "sagittal"},
    (
        "In which plane is this slice?",
        "What is the plane of the image?",
        "What plane is this?",
        "Which plane does the slice lie in?",
        "Which plane is shown?",
        "What is the plane of this slice?",
    ),
    (
        "Is this slice {}?",
        "Is this the {} plane?",
        "Is the plane {}?",
        "Was the image cut in the {} plane?",
        "Is this image {}?",
        "Is the slice in the {} plane?",
    ),
)
SEQUENCE = Concept(
    "contrast",
    {"T1": "a T1 image", "grey matter": "a grey matter map", "white matter": "a white matter map"},
    (
        "Which map of the brain is this?",
        "What kind of brain image is this?",
        "Which map or contrast is shown?",
        "What sort of brain image is this?",
        "What kind of brain map is this?",
        "Which map or contrast of the brain is this?",
    ),
    ("Is this {}?", "Is the image {}?", "Does this show {}?", "Is {} shown?", "Do we see {}?", "Is this image {}?"),
)
FACING = Concept(
    "facing",
    _plain("left", "right"),
    (
        "Does the face point left or right?",
        "Is the front of the head on the left or right?",
        "To which side is the head facing, left or right?",
        "Which way does the head look, left or right?",
        "Does the head face left or right?",
        "Is the face on the left or right side?",
    ),
    (
        "Does the face point {}?",
        "Is the front of the head on the {}?",
        "Is the head facing {}?",
        "Does the head look {}?",
        "Does the head face {}?",
        "Is the face on the {} side?",
    ),
    choice=True,
)
LEVEL = Concept(
    "level",
    _plain("upper", "lower"),
    (
        "Is the slice in the upper or lower half of the brain?",
        "Which half of the brain is this slice from, upper or lower?",
        "Was the slice cut in the upper or lower half?",
        "Does the slice lie in the upper or lower half?",
        "Is this the upper or lower half of the brain?",
        "Is this slice from the upper or lower half?",
    ),
    (
        "Is the slice in the {} half of the brain?",
        "Is this slice from the {} half?",
        "Was the slice cut in the {} half?",
        "Does the slice lie in the {} half?",
        "Is this the {} half of the brain?",
        "Does this slice come from the {} half?",
    ),
    choice=True,
)
UPSIDE_DOWN = Concept(
    "upside down",
    {"yes": ""},
    closed=(
        "Is the image upside down?",
        "Is this slice upside down?",
        "Was the image turned upside down?",
        "Is the top of the image at the bottom?",
        "Is the picture upside down?",
        "Has the image been turned upside down?",
    ),
)
CROSS = Concept(
    "cross",
    {"yes": ""},
    closed=(
        "Is there a red cross?",
        "Is a red cross drawn in the image?",
        "Does the image have a red cross?",
        "Is a spot marked with a cross?",
        "Do we see a red cross?",
        "Is there a cross in the image?",
    ),
)
COVERED = Concept(
    "covered side",
    _plain("left", "right", "top", "bottom"),
    (
        "Which side is covered by the blue bar?",
        "Where is the blue bar?",
        "Which side of the image is hidden?",
        "What side does the blue bar hide?",
        "Which side does the bar cover?",
        "Which side is hidden by the blue bar?",
    ),
    (
        "Is the {} side covered by a blue bar?",
        "Is the blue bar at the {}?",
        "Is the {} of the image hidden?",
        "Does the blue bar hide the {}?",
        "Does the bar cover the {}?",
        "Is the {} side hidden by the blue bar?",
    ),
)
TECHNIQUE = Concept(
    "technique",
    {
        "immunohistochemistry": "immunohistochemistry",
        "H&E histology": "H&E histology",
        "fluorescence microscopy": "fluorescence microscopy",
        "fundus photography": "fundus photography",
    },
    (
        "What technique was used?",
        "Which technique made this image?",
        "How was this picture made?",
        "What kind of picture is this?",
        "Which technique was used?",
        "What technique made this picture?",
    ),
    ("Is this {}?", "Was {} used?", "Does this show {}?", "Is the technique {}?", "Is this image {}?", "Is {} shown?"),
)
STAIN = Concept(
    "stain",
    {"DAB and hematoxylin": "DAB and hematoxylin", "hematoxylin and eosin": "hematoxylin and eosin"},
    (
        "What is the stain?",
        "Which stains were used?",
        "How was the tissue stained?",
        "What was the tissue stained with?",
        "Which stain is shown?",
        "What stains were used?",
    ),
    (
        "Is the tissue stained with {}?",
        "Were {} used?",
        "Is the stain {}?",
        "Was the tissue stained with {}?",
        "Is {} the stain?",
        "Are the stains {}?",
    ),
)
SITE = Concept(
    "site",
    {"colon": "the colon", "retina": "the retina"},
    (
        "What tissue is shown?",
        "Which organ is this from?",
        "Where is this from?",
        "What organ is shown?",
        "Which tissue is shown?",
        "What tissue is this?",
    ),
    (
        "Is {} shown?",
        "Is this from {}?",
        "Does the image show {}?",
        "Is this {}?",
        "Do we see {}?",
        "Does this show {}?",
    ),
)
COUNT = Concept(
    "nuclei",
    {"up to 5": "up to 5", "6 to 14": "6 to 14", "over 14": "over 14"},
    (
        "How many nuclei are shown?",
        "How many cell nuclei are there?",
        "What is the number of nuclei?",
        "How many nuclei are in the image?",
        "How many nuclei are there?",
        "What number of nuclei is shown?",
    ),
    (
        "Are {} nuclei shown?",
        "Are there {} nuclei?",
        "Is the number of nuclei {}?",
        "Are {} nuclei in the image?",
        "Do we see {} nuclei?",
        "Does the image show {} nuclei?",
    ),
)
BROWN = Concept(
    "brown side",
    _plain("left", "right"),
    (
        "On which side is more brown stain?",
        "Which half has more brown stain?",
        "Where is the brown stain stronger?",
        "Which side is more brown?",
        "On which side is the brown stain stronger?",
        "Which half is more brown?",
    ),
    (
        "Is there more brown stain on the {}?",
        "Does the {} half have more brown stain?",
        "Is the brown stain stronger on the {}?",
        "Is the {} side more brown?",
        "Is the brown stronger on the {} side?",
        "Is the {} half more brown?",
    ),
)
FIELD_EDGE = Concept(
    "field edge",
    {"yes": ""},
    closed=(
        "Is the edge of the camera's field shown?",
        "Is the edge of the round field in the image?",
        "Does the image show the edge of the field?",
        "Do we see the edge of the field?",
        "Is the edge of the fundus field shown?",
        "Does the picture show the edge of the round field?",
    ),
)
RADIOLOGY = (MODALITY, ORGAN, PLANE, SEQUENCE, FACING, LEVEL, UPSIDE_DOWN, CROSS, COVERED)
PATHOLOGY = (TECHNIQUE, STAIN, SITE, COUNT, BROWN, FIELD_EDGE, CROSS, COVERED)


Maps = dict[str, "np.ndarray"]  # name -> truths about single pixels, of the image's height and width
HIDEABLE = ("nuclei", "brown side", "field edge")  # facts about the whole image, void once a bar hides part of it


@dataclass(frozen=True)
class Picture:
    """An image and what is known of it."""

    source: str
    pixels: np.ndarray  # (height, width) or (height, width, 3), uint8
    facts: dict[str, str]  # concept -> its value


@dataclass(frozen=True)
class Source:
    """A single image (or the frames of one) that pictures are cut from."""

    name: str
    read: Callable[[], tuple[np.ndarray, Maps]]  # pixels as in `Picture`
    facts: dict[str, str]
    size: tuple[float, float]  # shortest and longest side of a cut-out, as shares of the image's shorter side
    turned: bool = False  # the picture has no up or down: turn it at will
    whole: bool = False  # all of it belongs to training, which leaves no held-out region
    filled: float = 0.4  # least share of a cut-out that must not be black
    measure: Callable[[np.ndarray, Maps], dict[str, str]] | None = None  # facts that depend on the cut-out


def sample_rows(name: str, split: str) -> list[Row]:
    """The rows of one split of a sample set, the same bytes every time.

    Args:
        name: vqarad, slake or pathvqa: whose shape the rows take.
        split: train, validation or test. `categories["origin"]` of a test row is "held-out region" (another part of a
            volume or image that training uses) or "unseen volume" (a patient or slide that training never shows).

    Raises:
        InputError: Name or split is unknown, or a package that ships images is missing.
    """
    return _rows_and_facts(name, split)[0]


def sample_facts(name: str, split: str) -> dict[str, dict[str, str]]:
    """What is known of every image of a sample set: image id -> concept -> its value. An image's rows ask part of it.

    Makes the images again (seconds for a test split).

    Raises:
        InputError: As `sample_rows`.
    """
    return _rows_and_facts(name, split)[1]


def true_answers(name: str, facts: dict[str, str]) -> dict[str, str]:
    """Every question, in every wording of the set, that these facts answer -> its answer.

    Questions about what the image does not have ("Where is the blue bar?" without a bar) and those whose answer is in
    doubt ("Is the chest shown?" of a heart) are left out, as the rows leave them out.
    """
    answers: dict[str, str] = {}
    for concept in _concepts(name):
        if (value := facts.get(concept.name)) is None:
            continue
        for question, asked in _texts(concept):
            if asked is None and value in concept.values:
                answers[question] = value
            elif asked is not None and (value == asked or _excludes(concept, value, asked)):
                answers[question] = "yes" if value == asked else "no"
    return answers


def all_questions(name: str) -> set[str]:
    """Every question that the set can ask of some image, in every wording: those of all splits, and more."""
    return {question for concept in _concepts(name) for question, _ in _texts(concept)}


def _concepts(name: str) -> tuple[Concept, ...]:
    return PATHOLOGY if name == "pathvqa" else RADIOLOGY


def _texts(concept: Concept) -> Iterator[tuple[str, str | None]]:
    """Every question about a concept, and the value that it asks about; None for an open one."""
    for wording in concept.open:
        yield wording, None
    for value, named in concept.values.items():
        for wording in concept.closed:
            yield wording.format(named), value


def _rows_and_facts(name: str, split: str) -> tuple[list[Row], dict[str, dict[str, str]]]:
    """The rows of a split, and the facts of each of its images by image id, also of an image that no row asks about."""
    import numpy as np

    if name not in SETS:
        raise InputError(f"sample set {name!r} is unknown. A sample set is one of {', '.join(SETS)}.")
    if split not in SPLITS:
        raise InputError(f"split {split!r} is unknown. A split is one of {', '.join(SPLITS)}.")
    rng = np.random.default_rng([SEED, SETS.index(name), SPLITS.index(split)])
    groups = [(ORIGINS[split], _seen_pictures(name, split, rng))]
    if split == "test":
        groups.append(("unseen volume", _unseen_pictures(name, rng)))
    concepts = _concepts(name)
    rows: list[Row] = []
    facts: dict[str, dict[str, str]] = {}
    for origin, cuts in groups:
        pictures = [_edited(picture, rng) for picture in cuts]
        files = [_encoded(picture.pixels) for picture in pictures]
        ids = [
            f"{name}-sample-{split}-{origin.split()[0]}-{place:03d}-{picture.source}"
            for place, picture in enumerate(pictures)
        ]
        facts |= {image_id: picture.facts for image_id, picture in zip(ids, pictures, strict=True)}
        for place, concept, value, asked in _questions(pictures, concepts, ASKED_SHARE[split], rng):
            wording, is_new = _wording(concept.open if asked is None else concept.closed, split, rng)
            rows.append(
                Row(
                    id=f"{name}-sample-{split}-{len(rows):04d}",
                    image=files[place],
                    image_id=ids[place],
                    question=wording if asked is None else wording.format(concept.values[asked]),
                    reference=value if asked is None else ("yes" if value == asked else "no"),
                    kind="open" if asked is None and not concept.choice else "closed",
                    categories=_categories(name, split, concept.name, pictures[place].facts, is_new)
                    | {"origin": origin},
                )
            )
    return rows, facts


def _categories(name: str, split: str, concept: str, facts: dict[str, str], is_new: bool) -> dict[str, str]:
    """A row's categories, named as the set names its own."""
    organ, modality = facts.get("organ", "not recorded"), facts.get("modality", "not recorded")
    if name == "vqarad":
        phrase = ("test_" if split == "test" else "") + ("para" if is_new else "freeform")
        return {"organ": organ, "question_type": concept, "phrase_type": phrase}
    if name == "slake":
        return {"modality": modality, "location": organ, "content_type": concept, "base_type": "vqa", "language": "en"}
    return {"question_type": concept}


# --- what is asked ----------------------------------------------------------------------------------------------------


def _questions(
    pictures: list[Picture], concepts: tuple[Concept, ...], share: float, rng: np.random.Generator
) -> list[tuple[int, Concept, str, str | None]]:
    """What to ask: (place of the picture, concept, its value there, value asked about or None for an open question).

    For every value asked about, "yes" and "no" are right equally often, so that the question alone tells nothing; the
    values of an open question come up equally often as far as there are pictures. Pictures asked little come first.
    """
    asked_so_far: Counter[int] = Counter()
    questions: list[tuple[int, Concept, str, str | None]] = []

    def take(places: list[int], count: int) -> list[int]:
        places = [places[i] for i in rng.permutation(len(places))]
        taken = sorted(places, key=asked_so_far.__getitem__)[:count]
        asked_so_far.update(taken)
        return taken

    for concept in concepts:
        values = {place: p.facts[concept.name] for place, p in enumerate(pictures) if concept.name in p.facts}
        for asked in concept.values:
            yes = [place for place, value in values.items() if value == asked]
            no = [place for place, value in values.items() if _excludes(concept, value, asked)]
            count = min(len(yes), len(no), round(share * len(pictures) / len(concept.values) / 2))
            for place in take(yes, count) + take(no, count):
                questions.append((place, concept, values[place], asked))
            if concept.open:
                for place in take(yes, round(share * len(pictures) / len(concept.values))):
                    questions.append((place, concept, values[place], None))
    return sorted(questions, key=lambda question: question[0])


def _excludes(concept: Concept, value: str, asked: str) -> bool:
    """Whether an image of `value` certainly does not show `asked`: it is another one, and not part of it."""
    return value != asked and not {(value, asked), (asked, value), (value, "*")} & concept.overlap


def _wording(wordings: tuple[str, ...], split: str, rng: np.random.Generator) -> tuple[str, bool]:
    """One of a question's wordings, and whether it is one that training never shows."""
    own = {"train": None, "validation": wordings[-2], "test": wordings[-1]}[split]
    if own and rng.random() < NEW_WORDING:
        return own, True
    return wordings[rng.integers(len(wordings) - 2)], False


# --- from volumes and single images to pictures -----------------------------------------------------------------------


def _seen_pictures(name: str, split: str, rng: np.random.Generator) -> list[Picture]:
    """The split's pictures of the sources that training uses too, each from the split's own region."""
    count = IMAGES[split]
    sources: tuple[Source, ...] = PATHOLOGY_SOURCES if name == "pathvqa" else RADIOLOGY_SOURCES
    slices: list[Any] = [] if name == "pathvqa" else _share(_template_slices(split), name)
    # a little over half are brain slices, which carry most of the concepts. Our choice
    slices = slices[: count * 11 // 20]
    pictures = [_template_picture(kind, plane, voxel, rng) for kind, plane, voxel in slices]
    sources = tuple(source for source in sources if split == "train" or not source.whole)
    chosen = [sources[i % len(sources)] for i in range(count - len(slices))]
    return pictures + [_cut(source, WHOLE if source.whole else REGIONS[split], rng) for source in chosen]


def _unseen_pictures(name: str, rng: np.random.Generator) -> list[Picture]:
    """Pictures of the volumes and images that training never shows."""
    sources: tuple[Source, ...] = UNSEEN_PATHOLOGY if name == "pathvqa" else UNSEEN_RADIOLOGY
    slices: list[Any] = [] if name == "pathvqa" else _share(_unseen_slices(), name)
    volumes = [_volume_picture(volume, plane, at, rng) for volume, plane, at in slices][: UNSEEN * 11 // 20]
    return volumes + [_cut(sources[i % len(sources)], WHOLE, rng) for i in range(UNSEEN - len(volumes))]


def _share(slices: list[Any], name: str) -> list[Any]:
    """Every other slice of a shuffled list: the radiology sets never show the same slice."""
    import numpy as np

    order = np.random.default_rng(SEED).permutation(len(slices))
    return [slices[i] for i in order[SETS.index(name) :: 2]]


def _slab(millimetres: float) -> str | None:
    """The split that owns a slice this far from its volume's middle; None in the gaps."""
    place = millimetres % SLAB_PERIOD
    return next((split for split, (start, end) in SLABS.items() if start <= place < end), None)


AXES = {"sagittal": 0, "coronal": 1, "axial": 2}


@functools.cache
def _template(kind: str) -> np.ndarray:
    """A volume of the MNI ICBM152 template, (x to the right, y to the front, z up) in mm; all in 0..255."""
    import numpy as np

    file = _file("nilearn", f"datasets/data/mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz")
    volume = _canonical(file)[0]
    return np.round(volume * (255 / volume.max())).astype(np.uint8)


def _canonical(file: Path) -> tuple[np.ndarray, tuple[float, float, float]]:
    """A NIfTI volume turned to (right, front, up) by its affine, the first of several, and the voxel size in mm."""
    import nibabel
    import numpy as np

    image = nibabel.as_closest_canonical(nibabel.load(file))  # type: ignore[arg-type]
    volume = np.asarray(image.dataobj, dtype=np.float32)  # type: ignore[attr-defined]
    zooms = image.header.get_zooms()  # type: ignore[attr-defined]
    return (volume[..., 0] if volume.ndim == 4 else volume), tuple(float(z) for z in zooms[:3])  # type: ignore[return-value]


@functools.cache
def _middle() -> tuple[int, int, int]:
    """The middle of the template's brain along each axis, in voxels of 1 mm."""
    import numpy as np

    inside = np.nonzero(_template("t1") > 0)
    return tuple(int(axis.min() + axis.max()) // 2 for axis in inside)  # type: ignore[return-value]


def _template_slices(split: str) -> list[tuple[str, str, int]]:
    """(kind of volume, plane, voxel) of every slice in the split's slabs that cuts at least 30 cm2 of brain."""
    brain = _template("t1") > 0
    slices = []
    for plane, axis in AXES.items():
        area = brain.sum(axis=tuple(other for other in range(3) if other != axis))
        for voxel in range(len(area)):
            # the template is symmetric: left and right slices are mirror images, so only one side is cut
            if area[voxel] < 3000 or (plane == "sagittal" and voxel < _middle()[0]):
                continue
            if _slab(voxel - _middle()[axis]) == split:
                slices += [(kind, plane, voxel) for kind in ("t1", "gm", "wm", "mixed")]
    return slices


CONTRASTS = {"t1": "T1", "gm": "grey matter", "wm": "white matter"}


def _template_picture(kind: str, plane: str, voxel: int, rng: np.random.Generator) -> Picture:
    """A slice of the template, cut at a random margin or field of view, with what its position tells.

    A "mixed" slice shows the tissues at random brightness each: contrasts other than the template's, from the same MRI.
    """
    shown = {name: _upright(_template(name), plane, voxel) for name in CONTRASTS}
    facts = {"modality": "MRI", "organ": "head", "plane": plane, "upside down": "no"}
    if kind in CONTRASTS:
        facts["contrast"] = CONTRASTS[kind]
    above = voxel - _middle()[2]
    if plane == "axial" and abs(above) >= 8:  # mm; nearer the middle a view can hardly tell
        facts["level"] = "upper" if above > 0 else "lower"
    box = _around(shown["t1"] > 0, rng)
    if kind != "t1" and rng.random() < 0.3:
        box = _narrowed(box, shown["t1"].shape, rng)
    shown = {name: view[box] for name, view in shown.items()}
    if plane == "sagittal":
        facts["facing"] = "right"
        if rng.random() < 0.5:
            facts["facing"] = "left"
            shown = {name: view[:, ::-1] for name, view in shown.items()}
    if kind == "mixed":
        return Picture("mni152-mixed", _toned(_mixed(shown, rng), rng), facts)
    return Picture(f"mni152-{kind}", _toned(shown[kind], rng), facts)


def _mixed(shown: Maps, rng: np.random.Generator) -> np.ndarray:
    """Grey matter, white matter and the rest of the brain, each at its own brightness of 15 to 100 %."""
    import numpy as np

    grey, white = shown["gm"] / 255, shown["wm"] / 255
    rest = (shown["t1"] > 0) * np.clip(1 - grey - white, 0, 1)
    levels = rng.uniform(0.15, 1.0, 3)
    mixed = levels[0] * grey + levels[1] * white + levels[2] * rest
    return np.round(255 * np.clip(mixed / max(mixed.max(), 1e-6), 0, 1)).astype(np.uint8)


def _narrowed(box: tuple[slice, slice], shape: tuple[int, ...], rng: np.random.Generator) -> tuple[slice, slice]:
    """A band of 35 to 70 % of the box's height around its middle: a scan with a narrow field of view."""
    rows = range(shape[0])[box[0]]
    high = round(len(rows) * rng.uniform(0.35, 0.7))
    start = rows[0] + round((len(rows) - high) * rng.uniform(0.3, 0.7))
    return slice(start, start + high), box[1]


def _upright(volume: np.ndarray, plane: str, voxel: int) -> np.ndarray:
    """A slice as radiologists see it: head up or face up, the patient's right on the left; sagittal ones face right."""
    import numpy as np

    view = np.rot90(np.moveaxis(volume, AXES[plane], 0)[voxel])
    return view if plane == "sagittal" else view[:, ::-1]


def _around(shape: np.ndarray, rng: np.random.Generator) -> tuple[slice, slice]:
    """The box around `shape` with margins of 2 to 15 % of its size, each side its own."""
    import numpy as np

    box = []
    for axis in (0, 1):
        inside = np.nonzero(shape.any(axis=1 - axis))[0]
        low, high = int(inside[0]), int(inside[-1]) + 1
        margins = rng.uniform(0.02, 0.15, 2) * (high - low)
        box.append(slice(max(0, low - int(margins[0])), high + int(margins[1])))
    return box[0], box[1]


UNSEEN_VOLUMES = {  # name -> package, file
    "nibabel-epi": ("nibabel", "tests/data/example4d.nii.gz"),
    "nibabel-anatomical": ("nibabel", "tests/data/anatomical.nii"),
}


def _unseen_slices() -> list[tuple[str, str, float]]:
    """(volume, plane, share of the way through it) of the slices of volumes that training never shows."""
    import numpy as np

    counts = {"axial": 20, "coronal": 8, "sagittal": 8}
    epi = [("nibabel-epi", plane, at) for plane, n in counts.items() for at in np.linspace(0.3, 0.7, n)]
    small = [("nibabel-anatomical", plane, at) for plane in AXES for at in np.linspace(0.25, 0.75, 8)]
    return epi + small


def _volume_picture(name: str, plane: str, at: float, rng: np.random.Generator) -> Picture:
    """A slice of an unseen brain volume, with what its affine tells."""
    from PIL import Image

    volume, zooms = _canonical(_file(*UNSEEN_VOLUMES[name]))
    axis = AXES[plane]
    view = _grey(_upright(volume, plane, round(at * (volume.shape[axis] - 1))))
    high, wide = {"sagittal": (2, 1), "coronal": (2, 0), "axial": (1, 0)}[plane]
    size = (
        round(view.shape[1] * zooms[wide]),
        round(view.shape[0] * zooms[high]),
    )  # voxels to mm, so that shapes are true
    import numpy as np

    view = np.asarray(Image.fromarray(view).resize(size, Image.Resampling.BICUBIC))
    facts = {"modality": "MRI", "organ": "head", "plane": plane, "upside down": "no"}
    view = view[_around(view > 40, rng)]
    if plane == "sagittal":
        facts["facing"] = "right"
        if rng.random() < 0.5:
            facts["facing"], view = "left", view[:, ::-1]
    return Picture(name, _toned(view, rng), facts)


def _cut(source: Source, region: tuple[float, float, float, float], rng: np.random.Generator) -> Picture:
    """A random cut-out of `region` that is not mostly black, mirrored or not: no question is about the side."""
    import numpy as np

    pixels, maps = source.read()
    height, width = pixels.shape[:2]
    top, bottom, left, right = (
        round(share * side) for share, side in zip(region, (height, height, width, width), strict=True)
    )
    for _ in range(100):
        side = rng.uniform(*source.size) * min(height, width)
        high = min(bottom - top, round(side * rng.uniform(0.85, 1.15)))
        wide = min(right - left, round(side * rng.uniform(0.85, 1.15)))
        y, x = int(rng.integers(top, bottom - high + 1)), int(rng.integers(left, right - wide + 1))
        box = (slice(y, y + high), slice(x, x + wide))
        if (pixels[box].reshape(high * wide, -1).max(axis=1) > 24).mean() >= source.filled:
            break
    else:
        raise RuntimeError(f"{source.name}: no cut-out of region {region} is filled")
    turns, mirrored = int(rng.integers(4)) if source.turned else 0, rng.random() < 0.5

    def turn(view: np.ndarray) -> np.ndarray:
        view = np.rot90(view, turns)
        return view[:, ::-1] if mirrored else view

    cut, cut_maps = turn(pixels[box]), {name: turn(view[box]) for name, view in maps.items()}
    measured = source.measure(cut, cut_maps) if source.measure else {}
    return Picture(source.name, _toned(cut, rng), source.facts | measured)


def _toned(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The pixels at LONGEST px, with a random gamma of 0.8 to 1.25: brightness says nothing about the answer."""
    import numpy as np
    from PIL import Image

    scale = LONGEST / max(pixels.shape[:2])
    size = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
    small = Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BICUBIC)
    gamma = float(np.exp(rng.uniform(-0.223, 0.223)))
    table = np.round(255 * (np.arange(256) / 255) ** gamma).astype(np.uint8)
    return table[np.asarray(small)]


# --- what is done to a picture ----------------------------------------------------------------------------------------


def _edited(picture: Picture, rng: np.random.Generator) -> Picture:
    """The picture, perhaps turned upside down, then with a cross, a bar over one side, or neither."""
    import numpy as np

    pixels, facts = picture.pixels, dict(picture.facts)
    if "upside down" in facts and rng.random() < 0.4:
        pixels, facts["upside down"] = pixels[::-1], "yes"
    drawn = rng.random()
    facts["cross"] = "yes" if drawn < 0.3 else "no"
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    if drawn < 0.3:
        y, x = (int(rng.integers(CROSS_GAP, side - CROSS_GAP)) for side in pixels.shape[:2])
        pixels = _crossed(pixels, y, x)
    elif drawn < 0.65:
        side = ("left", "right", "top", "bottom")[rng.integers(4)]
        pixels = _barred(pixels, side)
        facts = {name: value for name, value in facts.items() if name not in HIDEABLE} | {"covered side": side}
    return replace(picture, pixels=pixels, facts=facts)


def _crossed(pixels: np.ndarray, y: int, x: int) -> np.ndarray:
    """The pixels with the red lines of a viewer's cross hair, open around the spot they mark."""
    crossed = pixels.copy()
    height, width = pixels.shape[:2]
    for start, end in ((0, x - CROSS_GAP), (x + CROSS_GAP + 1, width)):
        crossed[y - 1 : y + 1, max(0, start) : max(0, end)] = (255, 0, 0)
    for start, end in ((0, y - CROSS_GAP), (y + CROSS_GAP + 1, height)):
        crossed[max(0, start) : max(0, end), x - 1 : x + 1] = (255, 0, 0)
    return crossed


def _barred(pixels: np.ndarray, side: str) -> np.ndarray:
    """The pixels with a blue bar over the outer 30 % of one side."""
    covered = pixels.copy()
    high, wide = round(0.3 * pixels.shape[0]), round(0.3 * pixels.shape[1])
    boxes = {
        "left": (slice(None), slice(None, wide)),
        "right": (slice(None), slice(-wide, None)),
        "top": (slice(None, high), slice(None)),
        "bottom": (slice(-high, None), slice(None)),
    }
    covered[boxes[side]] = (0, 90, 255)
    return covered


def _encoded(pixels: np.ndarray) -> bytes:
    """The pixels as a WebP file."""
    import numpy as np
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "WEBP", quality=QUALITY)
    return file.getvalue()


# --- the images in the packages ---------------------------------------------------------------------------------------


def _file(package: str, path: str) -> Path:
    """A file inside an installed package, found without importing it. Never downloads."""
    spec = find_spec(package)
    distribution = {"data_store": "pydicom-data", "skimage": "scikit-image"}.get(package, package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"package {distribution} is not installed; the sample sets use its images. "
            "Run `pip install 'stllava-med[sample]'`."
        )
    file = Path(next(iter(spec.submodule_search_locations))) / path
    if not file.is_file():
        raise InputError(f"{file}: not in the installed {distribution}. Install the version that constraints.txt pins.")
    return file


@functools.cache
def _dicom(
    package: str,
    path: str,
    window: tuple[int, int] | None = None,
    crop: tuple[float, float, float, float] = (0.0, 1.0, 0.0, 1.0),
) -> tuple[np.ndarray, Maps]:
    """A DICOM image (the first frame) as it is meant to be seen, and no maps.

    Args:
        package: The installed package that ships it.
        path: Its file there.
        window: Centre and width in rescaled units (Hounsfield in CT); None shows all but the outer 0.5 % of the values.
        crop: Top, bottom, left and right as shares: leaves out burnt-in text.
    """
    import numpy as np
    import pydicom
    from pydicom.pixels import apply_color_lut, apply_rescale, pixel_array

    dataset = pydicom.dcmread(_file(package, path))
    values = pixel_array(dataset, index=0)  # the first frame
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        values = apply_color_lut(values, dataset)
        values = (values // 257 if values.dtype == np.uint16 else values).astype(np.uint8)
    elif values.ndim == 2:
        values = _grey(apply_rescale(values, dataset), window)
        if dataset.PhotometricInterpretation == "MONOCHROME1":  # low values are meant to be bright
            values = 255 - values
    down = dataset.get("ImageOrientationPatient", [1, 0, 0, 0, 1, 0])[3:]
    if float(down[1]) < -0.5:  # rows run to the front: an axial image that would lie face down
        values = values[::-1]
    top, bottom, left, right = (
        round(share * side) for share, side in zip(crop, np.repeat(values.shape[:2], 2), strict=True)
    )
    return values[top:bottom, left:right], {}


def _grey(values: np.ndarray, window: tuple[int, int] | None = None) -> np.ndarray:
    """Values as uint8: a window of (centre, width), or everything but the outer 0.5 % at both ends."""
    import numpy as np

    low, high = (
        np.percentile(values, [0.5, 99.5]) if window is None else (window[0] - window[1] / 2, window[0] + window[1] / 2)
    )
    return np.round(255 * np.clip((values - low) / (high - low), 0, 1)).astype(np.uint8)


@functools.cache
def _photograph(package: str, path: str, stretched: bool = False) -> tuple[np.ndarray, Maps]:
    """An image file as grey or RGB, and no maps."""
    import numpy as np

    with opened(_file(package, path).read_bytes()) as image:
        pixels = np.asarray(image)
    return (_grey(pixels) if stretched else pixels[..., :3] if pixels.ndim == 3 else pixels), {}


@functools.cache
def _fundus(green: bool = False) -> tuple[np.ndarray, Maps]:
    """The fundus photograph, or its green channel alone (how vessels are best seen), with a map of the round field.

    The map is 255 inside the field that the camera saw.
    """
    pixels, _ = _photograph("skimage", "data/retina.jpg")
    field = (pixels.max(axis=2) > 30).astype("uint8") * 255
    return (pixels[..., 1] if green else pixels), {"field": field}


@functools.cache
def _nuclei() -> tuple[np.ndarray, Maps]:
    """Fluorescent nuclei with their annotated mask (0 background, else the number of the nucleus)."""
    pixels, _ = _photograph("stardist", "data/images/img2d.tif", True)
    return pixels, {"nuclei": _photograph("stardist", "data/images/mask2d.tif")[0]}


def _field_edge(_: np.ndarray, maps: Maps) -> dict[str, str]:
    outside = float((maps["field"] == 0).mean())
    if outside == 0:
        return {"field edge": "no"}
    return {"field edge": "yes"} if outside > 0.03 else {}


def _count(_: np.ndarray, maps: Maps) -> dict[str, str]:
    """The number of nuclei as a range, where it does not hang on the nuclei that the border cuts.

    Counting those that are a quarter visible and counting only those that are three quarters visible must agree.
    """
    import numpy as np

    mask = maps["nuclei"]
    whole = np.bincount(_nuclei()[1]["nuclei"].ravel())
    visible = np.bincount(mask.ravel(), minlength=len(whole))[1:] / np.maximum(whole[1:], 1)
    ranges = {
        next(name for name, limit in NUCLEI_RANGES.items() if (visible >= share).sum() <= limit)
        for share in (0.25, 0.75)
    }
    return {"nuclei": ranges.pop()} if len(ranges) == 1 else {}


def _brown_side(pixels: np.ndarray, _: Maps) -> dict[str, str]:
    """The half with more DAB, by Ruifrok and Johnston's colour separation, where the other has at most 70 % of it."""
    from skimage.color import rgb2hed

    brown = rgb2hed(pixels)[..., 2].clip(0)
    middle = brown.shape[1] // 2
    left, right = float(brown[:, :middle].mean()), float(brown[:, -middle:].mean())
    if min(left, right) > 0.7 * max(left, right):
        return {}
    return {"brown side": "left" if left > right else "right"}


def _radiology(
    name: str, modality: str, file: str, size: tuple[float, float], package: str = "data_store", **more: Any
) -> Source:
    """A DICOM image. `more`: organ and plane by its tags, window and crop of `_dicom`, whole and filled of `Source`."""
    facts = {"modality": modality} | {fact: more[fact] for fact in ("organ", "plane") if fact in more}
    folder = {"data_store": "data", "pydicom": "data/test_files"}[package]
    reading = {option: more[option] for option in ("window", "crop") if option in more}
    return Source(
        name,
        functools.partial(_dicom, package, f"{folder}/{file}", **reading),
        facts,
        size,
        whole=more.get("whole", False),
        filled=more.get("filled", 0.4),
    )


RADIOLOGY_SOURCES = (
    # CQ500 is a set of head CTs and the tag PatientID says CQ500
    _radiology(
        "cq500-head",
        "CT",
        "693_UNCR.dcm",
        (0.6, 1.0),
        whole=True,
        organ="head",
        plane="axial",
        window=(40, 100),
        crop=(0.12, 0.9, 0.18, 0.82),
    ),
    _radiology("chest", "X-ray", "RG1_UNCR.dcm", (0.35, 0.65), organ="chest", crop=(0.05, 0.95, 0.03, 0.97)),
    _radiology(
        "echo",
        "ultrasound",
        "color3d_jpeg_baseline.dcm",
        (0.6, 1.0),
        whole=True,
        organ="heart",
        crop=(0.1, 0.85, 0.22, 0.75),
        filled=0.15,
    ),
    _radiology(
        "abdomen",
        "MRI",
        "MR-SIEMENS-DICOM-WithOverlays.dcm",
        (0.35, 0.65),
        organ="abdomen",
        plane="axial",
        crop=(0.15, 0.82, 0.05, 0.95),
    ),
    _radiology(
        "bones",
        "bone scan",
        "JPEG2000_UNC.dcm",
        (0.8, 1.3),
        organ="whole body",
        crop=(0.02, 0.98, 0.1, 0.9),
        filled=0.2,
    ),
    _radiology("tibia", "X-ray", "RG3_UNCR.dcm", (0.35, 0.65), organ="leg", crop=(0.0, 1.0, 0.3, 0.68)),
    _radiology("ct-small", "CT", "CT_small.dcm", (0.35, 0.65), "pydicom", plane="axial"),
    _radiology("node", "ultrasound", "US1_UNCR.dcm", (0.35, 0.65), crop=(0.25, 0.69, 0.03, 0.97)),
    _radiology("shoulder", "MRI", "MR2_UNCR.dcm", (0.35, 0.65), organ="shoulder", crop=(0.1, 0.85, 0.05, 0.95)),
    _radiology("aloka", "ultrasound", "gdcm-US-ALOKA-16.dcm", (0.6, 1.0), whole=True, crop=(0.06, 0.86, 0.1, 1.0)),
)
UNSEEN_RADIOLOGY = (
    _radiology("ct-head", "CT", "J2K_pixelrep_mismatch.dcm", (0.75, 1.0), "pydicom", organ="head", window=(40, 100)),
    _radiology(
        "echo-adult",
        "ultrasound",
        "JPGLosslessP14SV1_1s_1f_8b.dcm",
        (0.7, 1.0),
        organ="heart",
        crop=(0.2, 0.83, 0.14, 0.93),
        filled=0.2,
    ),
    _radiology(
        "ct-pancreas",
        "CT",
        "explicit_VR-UN.dcm",
        (0.75, 1.0),
        organ="abdomen",
        plane="axial",
        window=(40, 400),
        filled=0.2,
    ),
    _radiology("echo-doppler", "ultrasound", "color-pl.dcm", (0.8, 1.0), organ="heart"),
)
PATHOLOGY_SOURCES = (
    Source(
        "ihc",
        functools.partial(_photograph, "skimage", "data/ihc.png"),
        {"technique": "immunohistochemistry", "stain": "DAB and hematoxylin", "site": "colon"},
        (0.25, 0.42),
        turned=True,
        measure=_brown_side,
    ),
    Source(
        "retina",
        _fundus,
        {"technique": "fundus photography", "site": "retina"},
        (0.15, 0.35),
        turned=True,
        measure=_field_edge,
    ),
    Source(
        "retina-green",
        functools.partial(_fundus, green=True),
        {"technique": "fundus photography", "site": "retina"},
        (0.15, 0.35),
        turned=True,
        measure=_field_edge,
    ),
    Source(
        "nuclei",
        _nuclei,
        {"technique": "fluorescence microscopy"},
        (0.10, 0.42),
        turned=True,
        filled=0.0,
        measure=_count,
    ),
    Source(
        "histo",
        functools.partial(_photograph, "stardist", "data/images/histo.jpg"),
        {"technique": "H&E histology", "stain": "hematoxylin and eosin"},
        (0.25, 0.4),
        turned=True,
    ),
)
UNSEEN_PATHOLOGY = (
    Source(
        "nuclear",
        functools.partial(_photograph, "mahotas", "demos/data/nuclear.png", True),
        {"technique": "fluorescence microscopy"},
        (0.15, 0.3),
        turned=True,
        filled=0.0,
    ),
    Source(
        "microaneurysms",
        functools.partial(_photograph, "skimage", "data/microaneurysms.png"),
        {"technique": "fundus photography", "site": "retina"},
        (0.6, 1.0),
        turned=True,
    ),
    Source(
        "phase-cell",
        functools.partial(_photograph, "skimage", "data/cell.png"),
        {"technique": "quantitative phase imaging"},
        (0.5, 1.0),
        turned=True,
    ),
)
