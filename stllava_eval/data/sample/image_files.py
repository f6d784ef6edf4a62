"""Read images out of installed packages: volumes, radiographs, photographs and stained sections."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.errors import InputError
from stllava_eval.images import open_header

if TYPE_CHECKING:
    import numpy as np


WHOLE = (0.0, 1.0, 0.0, 1.0)
NUCLEI_RANGES = {"up to 5": 5, "6 to 14": 14, "over 14": 10**6}  # name -> largest count


Maps = dict[str, "np.ndarray"]  # name -> truths about single pixels, of the image's height and width


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


# --- the images in the packages ---------------------------------------------------------------------------------------


def package_file(package: str, path: str) -> Path:
    """Return the path of a file in an installed package, without importing the package. Nothing is downloaded."""
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
    """Read a DICOM image (the first frame) as it is meant to be seen, and no maps.

    Args:
        package: The installed package that ships it.
        path: Its file there.
        window: Centre and width in rescaled units (Hounsfield in CT); None shows all but the outer 0.5 % of the values.
        crop: Top, bottom, left and right as shares: leaves out burnt-in text.
    """
    import numpy as np
    import pydicom
    from pydicom.pixels import apply_color_lut, apply_rescale, pixel_array

    dataset = pydicom.dcmread(package_file(package, path))
    values = pixel_array(dataset, index=0)  # the first frame
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        values = apply_color_lut(values, dataset)
        values = (values // 257 if values.dtype == np.uint16 else values).astype(np.uint8)
    elif values.ndim == 2:
        values = as_grey(apply_rescale(values, dataset), window)
        if dataset.PhotometricInterpretation == "MONOCHROME1":  # low values are meant to be bright
            values = 255 - values
    down = dataset.get("ImageOrientationPatient", [1, 0, 0, 0, 1, 0])[3:]
    if float(down[1]) < -0.5:  # rows run to the front: an axial image that would lie face down
        values = values[::-1]
    top, bottom, left, right = (
        round(share * side) for share, side in zip(crop, np.repeat(values.shape[:2], 2), strict=True)
    )
    return values[top:bottom, left:right], {}


def as_grey(values: np.ndarray, window: tuple[int, int] | None = None) -> np.ndarray:
    """Values as uint8: a window of (centre, width), or everything but the outer 0.5 % at both ends."""
    import numpy as np

    low, high = (
        np.percentile(values, [0.5, 99.5]) if window is None else (window[0] - window[1] / 2, window[0] + window[1] / 2)
    )
    return np.round(255 * np.clip((values - low) / (high - low), 0, 1)).astype(np.uint8)


@functools.cache
def _photograph(package: str, path: str, stretched: bool = False) -> tuple[np.ndarray, Maps]:
    """Read an image file as grey or RGB, and no maps."""
    import numpy as np

    with open_header(package_file(package, path).read_bytes()) as image:
        pixels = np.asarray(image)
    return (as_grey(pixels) if stretched else pixels[..., :3] if pixels.ndim == 3 else pixels), {}


@functools.cache
def _fundus(green: bool = False) -> tuple[np.ndarray, Maps]:
    """Read the fundus photograph, or its green channel alone (which shows vessels best), with a map of its field.

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
    """Return the number of nuclei as a range, if it does not depend on nuclei that the border cuts.

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
    """Return the half with more DAB, by Ruifrok and Johnston's separation; the other has at most 70 % of it."""
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
