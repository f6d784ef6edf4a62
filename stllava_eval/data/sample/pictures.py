"""Make the sample images: slices of volumes, crops, tones and edits, each with what is known about it."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.data.catalog import DATASETS
from stllava_eval.data.sample.concepts import HIDEABLE
from stllava_eval.data.sample.image_files import (
    PATHOLOGY_SOURCES,
    RADIOLOGY_SOURCES,
    UNSEEN_PATHOLOGY,
    UNSEEN_RADIOLOGY,
    WHOLE,
    Maps,
    Source,
    as_grey,
    package_file,
)

if TYPE_CHECKING:
    import numpy as np


SETS = tuple(DATASETS)  # a set's number seeds its questions and shares out the slices
SPLITS = ("train", "validation", "test")
LONGEST = 128  # longer side of an image in pixels (our choice: the tiny model sees 112)
QUALITY = 85  # quality of the WebP files (embedded_data.md: 3.3 MB in all)

# Region of a single image that a split may use: top, bottom, left, right as fractions. The gaps are never shown.
REGIONS = {
    "train": (0.0, 1.0, 0.0, 0.50),
    "validation": (0.0, 0.40, 0.54, 1.0),
    "test": (0.44, 1.0, 0.54, 1.0),
}
# Slabs of a volume, in mm from its middle, repeating every SLAB_PERIOD: training, gap, validation, gap, test, gap.
SLAB_PERIOD = 30
SLABS = {"train": (0, 15), "validation": (18, 20), "test": (23, 27)}

SEED = 20240628  # our choice: the day of the paper's preprint
CROSS_GAP = 6  # pixels left free on each side of the spot that a cross marks (our choice: it must stay visible)
IMAGES = {  # how many images; our choice, near the study's 1,250 training images (embedded_data.md)
    "train": 420,
    "validation": 70,
    "test": 120,
}
UNSEEN = 60  # test images per set from volumes that training never sees (our choice)


@dataclass(frozen=True)
class Picture:
    """An image and what is known of it."""

    source: str
    pixels: np.ndarray  # (height, width) or (height, width, 3), uint8
    facts: dict[str, str]  # concept -> its value


# --- from volumes and single images to pictures -----------------------------------------------------------------------


def seen_pictures(name: str, split: str, rng: np.random.Generator) -> list[Picture]:
    """Return the split's pictures of the sources that training uses too, each from the split's own region."""
    count = IMAGES[split]
    sources: tuple[Source, ...] = PATHOLOGY_SOURCES if name == "pathvqa" else RADIOLOGY_SOURCES
    slices: list[Any] = [] if name == "pathvqa" else _share(_template_slices(split), name)
    # a little over half are brain slices, which carry most of the concepts. Our choice
    slices = slices[: count * 11 // 20]
    pictures = [_template_picture(kind, plane, voxel, rng) for kind, plane, voxel in slices]
    sources = tuple(source for source in sources if split == "train" or not source.whole)
    chosen = [sources[i % len(sources)] for i in range(count - len(slices))]
    return pictures + [_cut(source, WHOLE if source.whole else REGIONS[split], rng) for source in chosen]


def unseen_pictures(name: str, rng: np.random.Generator) -> list[Picture]:
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


def slab(millimetres: float) -> str | None:
    """Return the split that owns a slice this far from its volume's middle; None in the gaps."""
    offset = millimetres % SLAB_PERIOD
    return next((split for split, (start, end) in SLABS.items() if start <= offset < end), None)


AXES = {"sagittal": 0, "coronal": 1, "axial": 2}


@functools.cache
def _template(kind: str) -> np.ndarray:
    """Read a volume of the MNI ICBM152 template, (x to the right, y to the front, z up) in mm; all in 0..255."""
    import numpy as np

    file = package_file("nilearn", f"datasets/data/mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz")
    volume = _canonical(file)[0]
    return np.round(volume * (255 / volume.max())).astype(np.uint8)


def _canonical(file: Path) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Read a NIfTI volume turned to (right, front, up) by its affine (the first of several), and its voxel size."""
    import nibabel
    import numpy as np

    image = nibabel.as_closest_canonical(nibabel.load(file))  # type: ignore[arg-type]
    volume = np.asarray(image.dataobj, dtype=np.float32)  # type: ignore[attr-defined]
    zooms = image.header.get_zooms()  # type: ignore[attr-defined]
    return (volume[..., 0] if volume.ndim == 4 else volume), tuple(float(z) for z in zooms[:3])  # type: ignore[return-value]


@functools.cache
def _middle() -> tuple[int, int, int]:
    """Return the middle of the template's brain along each axis, in voxels of 1 mm."""
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
            if slab(voxel - _middle()[axis]) == split:
                slices += [(kind, plane, voxel) for kind in ("t1", "gm", "wm", "mixed")]
    return slices


CONTRASTS = {"t1": "T1", "gm": "grey matter", "wm": "white matter"}


def _template_picture(kind: str, plane: str, voxel: int, rng: np.random.Generator) -> Picture:
    """Return a slice of the template, cut at a random margin or field of view, with what its position says.

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
    """Return a band of 35 to 70 % of the box's height around its middle: a scan with a narrow field of view."""
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
    """Return the box around `shape` with margins of 2 to 15 % of its size, each side its own."""
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
    """Return a slice of an unseen brain volume, with what its affine says."""
    from PIL import Image

    volume, zooms = _canonical(package_file(*UNSEEN_VOLUMES[name]))
    axis = AXES[plane]
    view = as_grey(_upright(volume, plane, round(at * (volume.shape[axis] - 1))))
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
    """Return a random cut-out of `region` that is not mostly black, mirrored or not: no question is about the side."""
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
    """Scale the pixels to LONGEST px, with a random gamma of 0.8 to 1.25: brightness says nothing about the answer."""
    import numpy as np
    from PIL import Image

    scale = LONGEST / max(pixels.shape[:2])
    size = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
    small = Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BICUBIC)
    gamma = float(np.exp(rng.uniform(-0.223, 0.223)))
    table = np.round(255 * (np.arange(256) / 255) ** gamma).astype(np.uint8)
    return table[np.asarray(small)]


# --- what is done to a picture ----------------------------------------------------------------------------------------


def edited(picture: Picture, rng: np.random.Generator) -> Picture:
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
    """Draw into the pixels the red lines of a viewer's cross hair, open around the spot they mark."""
    crossed = pixels.copy()
    height, width = pixels.shape[:2]
    for start, end in ((0, x - CROSS_GAP), (x + CROSS_GAP + 1, width)):
        crossed[y - 1 : y + 1, max(0, start) : max(0, end)] = (255, 0, 0)
    for start, end in ((0, y - CROSS_GAP), (y + CROSS_GAP + 1, height)):
        crossed[max(0, start) : max(0, end), x - 1 : x + 1] = (255, 0, 0)
    return crossed


def _barred(pixels: np.ndarray, side: str) -> np.ndarray:
    """Draw into the pixels a blue bar over the outer 30 % of one side."""
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


def encoded(pixels: np.ndarray) -> bytes:
    """Encode the pixels as a WebP file."""
    import numpy as np
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "WEBP", quality=QUALITY)
    return file.getvalue()
