"""Encoded files and Pillow images of every mode -> upright RGB, 8 bit, as a reader of scans would see them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stllava_eval.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image


def decode(image: bytes) -> Image:
    """The picture in an encoded file: RGB, 8 bit, upright by its EXIF orientation. Everyone opens images with this.

    Raises:
        InputError: The file is no image, is larger than Pillow's limit against decompression bombs, or is truncated.
            In a process of lmms-eval, whose api/task.py asks for that, Pillow fills truncated images with grey instead;
            what is prepared has been checked without it.
    """
    import PIL.Image

    try:
        with PIL.Image.open(io.BytesIO(image)) as opened:
            opened.load()
            return rgb(opened)
    except PIL.UnidentifiedImageError as error:
        raise InputError(f"{len(image)} bytes are no image that Pillow knows. Download it again.") from error
    except Exception as error:  # Pillow's readers raise nearly everything on a broken file, SyntaxError included
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"an image of {len(image)} bytes cannot be decoded ({reason}). Download it again.") from error


@contextmanager
def truncated_refused() -> Iterator[None]:
    """Pillow as it is by default: packages such as lmms-eval let it fill truncated images, for the whole process."""
    import PIL.ImageFile

    before = PIL.ImageFile.LOAD_TRUNCATED_IMAGES
    PIL.ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        PIL.ImageFile.LOAD_TRUNCATED_IMAGES = before


def pixel_hash(picture: Image) -> str:
    """Hex sha256 of width, height and pixels: equal for equal pictures that `decode` gave, in any encoding."""
    return hashlib.sha256(f"{picture.width}x{picture.height} ".encode() + picture.tobytes()).hexdigest()


def rgb(image: Image) -> Image:
    """`image` of any mode as RGB, 8 bit, upright by its EXIF orientation.

    CMYK is converted as Pillow does, Adobe's inverted JPEGs included; transparency lies on black; 16-bit, 32-bit and
    float grey is stretched from its own minimum to its maximum, since scans use few of the values that the type allows.
    """
    import PIL.Image
    import PIL.ImageOps

    upright = PIL.ImageOps.exif_transpose(image)
    if upright.mode == "F" or upright.mode.startswith("I"):
        return _stretched(upright).convert("RGB")
    if upright.has_transparency_data:
        seen = upright.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", seen.size, "black"), seen).convert("RGB")
    return upright.convert("RGB")


def _stretched(grey: Image) -> Image:
    import numpy as np
    import PIL.Image

    values = np.asarray(grey, dtype=np.float64)
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
    scaled = (np.where(finite, values, low) - low) / ((high - low) or 1.0)
    return PIL.Image.fromarray(np.rint(255 * scaled).astype(np.uint8))
