"""List the concepts that sample questions ask about, with the wordings of questions and answers."""

from __future__ import annotations

from dataclasses import dataclass


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
HIDEABLE = ("nuclei", "brown side", "field edge")  # facts about the whole image, void once a bar hides part of it
