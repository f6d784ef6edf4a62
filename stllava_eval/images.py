"""Open image files, and convert images of every mode to upright 8-bit RGB, as a reader of scans would see them.

Every image of a data set, a request or a pair is opened here, before a processor or a page makes anything of it.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.errors import InputError, one_line
from stllava_eval.storage import read_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

# The formats that the data sets and PubMed Central have, and no others: Pillow would pass PostScript to Ghostscript,
# another program. "JPEG" includes MPO, a JPEG with a second picture behind the first, which many telephones write.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP")
# Largest image in pixels. Our choice: as many as a camera of 50 megapixels takes, some 0.2 GB as RGB. Mammograms have
# up to 30 million pixels; the largest images that we saw in SLAKE, VQA-RAD and PubMed Central have far fewer.
PIXELS = 50_000_000
# Most pages of a TIFF, which may have smaller copies and masks of its picture behind it. Our choice: a pyramid halves
# the side at each step, so even the largest image has far fewer.
PAGES = 64
# Brightest value, of 255, of 16-bit colour that is refused as too dark: it uses at most 14 of its bits (our choice).
DARK = 64
# Largest image file (our choice): `PIXELS` pixels of four channels, not compressed, fill three quarters of it.
IMAGE_BYTES = 2**28

# The first bytes of files that have the name of an image but none of the `FORMATS`, and what such a file is.
_OTHER_FORMATS = (
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"%PDF", "PDF"),
    (b"8BPS", "Photoshop"),
    (b"\0\0\1\0", "an icon"),
    (b"\0\0\0\x0cjP", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"NRRD", "NRRD"),
    (b"ObjectType", "MetaImage"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x08\0\x05\0CS", "DICOM"),  # without its preamble
    (b"\x89HDF", "HDF5"),
    (b"II*\0", "a TIFF that is cut short or of a kind that is not read"),
    (b"MM\0*", "a TIFF that is cut short or of a kind that is not read"),
)
_NO_IMAGES = (
    (b"PK\3\4", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive (perhaps NIfTI)"),
    (b"version https://git-lfs", "a pointer of Git LFS"),
)


class SeveralFramesError(InputError):
    """A file holds several pictures, such as a stack of slices or a film."""


@contextmanager
def open_header(image: bytes) -> Iterator[Image]:
    """Open an encoded file with Pillow, without decoding a pixel: format, mode, size, metadata.

    Raises:
        InputError: The file is of none of the `FORMATS`, has more than `PIXELS` pixels, or holds several frames, of
            which the first is seldom the one that is meant (`SeveralFramesError`); or Pillow raises something in the
            block, as it does where pixels are broken or missing.
    """
    import PIL.Image

    try:
        with truncated_refused(), _size_unjudged():
            header = PIL.Image.open(io.BytesIO(image), formats=FORMATS)
        with header, truncated_refused():
            if header.width * header.height > PIXELS:
                raise InputError(
                    f"an image of {header.width} x {header.height} pixels, and at most {PIXELS:,} are read. Scale it "
                    "down."
                )
            _refuse_frames(header)
            yield header
    except InputError:
        raise
    except PIL.UnidentifiedImageError as error:
        raise InputError(
            f"{len(image)} bytes are no JPEG, PNG, BMP, GIF, TIFF or WebP image{_what_to_do(image)}"
        ) from error
    except Exception as error:  # Pillow's readers raise nearly everything on a broken file, SyntaxError included
        raise InputError(
            f"an image of {len(image)} bytes cannot be decoded ({one_line(error)}). Download it again."
        ) from error


def decode(image: bytes) -> Image:
    """Decode the picture in an encoded file: 8-bit RGB, upright by its EXIF orientation.

    Raises:
        InputError: See `open_image`.
    """
    with open_header(image) as header:
        return _rgb(header)


def _refuse_frames(image: Image) -> None:
    """Raise SeveralFramesError where the file has another picture than this one, which is its first.

    A JPEG of a telephone (MPO) has a smaller or a second view behind the picture, and a TIFF may have smaller copies
    and masks (its tag NewSubfileType has bit 0 or 2 set): neither is another picture.
    """
    if (
        image.format == "MPO" or not getattr(image, "is_animated", False) or image.tell()
    ):  # tell: the caller chose a frame
        return
    if image.format == "TIFF":
        try:
            for page in range(1, PAGES):
                image.seek(page)
                # tag 254, NewSubfileType: bit 0 is a smaller copy, bit 2 a mask (TIFF 6.0)
                if not image.tag_v2.get(254, 0) & 0b101:  # type: ignore[attr-defined]
                    break
        except EOFError:
            return
        finally:
            image.seek(0)
    raise SeveralFramesError(
        f"a {image.format} image of several frames, and one is read. Save the frame that is meant as a file of its own."
    )


def read_image(file: Path) -> bytes:
    """Read the encoded image in a file, for `decode`.

    Raises:
        InputError: It is no regular file, or larger than `IMAGE_BYTES`.
        OSError: It cannot be read.
    """
    return read_bytes(file, IMAGE_BYTES)


def open_image(file: Path, remedy: str = "Put it back.") -> Image:
    """Read and decode the image in a file; see `decode`. Errors name the file.

    Args:
        file: The image's file.
        remedy: The last sentence of the message where the file cannot be read: what its reader is to do.

    Raises:
        InputError: It cannot be read or decoded.
    """
    try:
        return decode(read_image(file))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or one_line(error)}). {remedy}") from error
    except InputError as error:
        if str(error).startswith(str(file)):  # `read_image` names it
            raise
        raise InputError(f"{file}: {error}") from error


def _what_to_do(file: bytes) -> str:
    """Return the end of a sentence that says what the file is, by its first bytes, and what to do about it."""
    text = file[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    kind = next((kind for begin, kind in _OTHER_FORMATS if file.startswith(begin)), None)
    if file[128:132] == b"DICM":  # behind a preamble of 128 bytes: DICOM PS3.10, section 7.1
        kind = "DICOM"
    elif file[344:348] in (b"n+1\0", b"ni1\0"):  # the field `magic` of nifti1.h
        kind = "NIfTI"
    elif file[4:8] == b"ftyp":  # the first box of ISO/IEC 14496-12
        kind = "HEIF or AVIF"
    elif text.startswith(b"<") and b"<svg" in text:
        kind = "SVG"
    if kind:
        return f" but {kind}. Convert it to one of these."
    kind = next((kind for begin, kind in _NO_IMAGES if file.startswith(begin)), None)
    if text.startswith(b"<") and b"<html" in text:
        kind = "a web page"
    return f" but {kind}. Download it again." if kind else ". Download it again."


_lock = threading.Lock()  # guards Pillow's two switches, which all threads of the process share
_strict: list[bool] = []  # what LOAD_TRUNCATED_IMAGES was, once for each caller inside `truncated_refused`


@contextmanager
def truncated_refused() -> Iterator[None]:
    """Make Pillow refuse truncated images: packages such as lmms-eval let it fill them with grey, process-wide.

    Several threads may be inside; the last one to leave puts the switch back.
    """
    import PIL.ImageFile

    with _lock:
        _strict.append(_strict[0] if _strict else PIL.ImageFile.LOAD_TRUNCATED_IMAGES)
        PIL.ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        with _lock:
            before = _strict.pop()
            if not _strict:
                PIL.ImageFile.LOAD_TRUNCATED_IMAGES = before


@contextmanager
def _size_unjudged() -> Iterator[None]:
    """Switch off Pillow's own limit on size: it warns of what we refuse, and our limit is the lower one."""
    import PIL.Image

    with _lock:
        before, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            PIL.Image.MAX_IMAGE_PIXELS = before


def pixel_hash(picture: Image) -> str:
    """Return the hex SHA-256 of width, height and pixels: equal for equal pictures from `decode`, in any encoding."""
    return hashlib.sha256(f"{picture.width}x{picture.height} ".encode() + picture.tobytes()).hexdigest()


def rgb(image: Image) -> Image:
    """Convert an image of any mode to 8-bit RGB, upright by its EXIF orientation.

    CMYK is converted as Pillow does, Adobe's inverted JPEGs included; transparency is put on black; 16-bit, 32-bit and
    float grey is stretched from its own minimum to its maximum, since scans use few of the values that the type allows.
    16-bit colour is not: Pillow gives 8 of its bits.

    Raises:
        InputError: It has more than `PIXELS` pixels or several frames, it is 16-bit colour that would be nearly black,
            or Pillow cannot load or convert it.
    """
    if image.width * image.height > PIXELS:  # the caller may have opened it without `open_image`
        raise InputError(
            f"an image of {image.width} x {image.height} pixels, and at most {PIXELS:,} are read. Scale it down."
        )
    try:
        return _rgb(image)
    except InputError:
        raise
    except Exception as error:  # Pillow's readers raise nearly everything on a broken file
        raise InputError(f"an image of mode {image.mode} cannot be converted ({one_line(error)}). Fix it.") from error


def _rgb(image: Image) -> Image:
    import PIL.Image
    import PIL.ImageOps

    stored: dict[int, Any] = dict(image.tag_v2) if image.format == "TIFF" else {}  # type: ignore[attr-defined]
    coding = [
        part.args if isinstance(part.args, str) else part.args[0] for part in getattr(image, "tile", ()) if part.args
    ]
    with truncated_refused():
        _refuse_frames(image)
        upright = PIL.ImageOps.exif_transpose(image)
    if upright.mode == "F" or upright.mode.startswith("I") or (upright.mode == "L" and _is_signed(stored)):
        return _stretched(upright, stored).convert("RGB")
    if upright.mode == "La":
        upright = upright.convert("LA")
    if any(";16" in str(raw) for raw in coding):
        _refuse_nearly_black(upright.convert("RGB"))
    if upright.has_transparency_data:
        seen = upright.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", seen.size, "black"), seen).convert("RGB")
    return upright.convert("RGB")


def _refuse_nearly_black(picture: Image) -> None:
    """Raise InputError where 16-bit colour uses few of its bits; Pillow gives its upper 8 alone, in `picture`."""
    brightest = max(high for _, high in picture.getextrema())  # type: ignore[misc]
    if brightest < DARK:
        raise InputError(
            f"an image of 16-bit colour whose brightest value is {brightest} of 255 in 8 bits, which is nearly black. "
            "Scale its values up, or save it with 8 bits."
        )


def _is_signed(stored: dict[int, Any]) -> bool:
    """Return whether a TIFF with these tags holds signed numbers, by its SampleFormat (TIFF 6.0)."""
    kinds = stored.get(339)  # one value for each channel; 2 is two's complement
    return (kinds[0] if isinstance(kinds, tuple) else kinds) == 2


def _stretched(grey: Image, stored: dict[int, Any]) -> Image:
    """Stretch grey so that its minimum is black and its maximum white; a TIFF whose tags call zero white is inverted.

    It is done in bands of rows, since numpy needs many times a pixel's size for each pixel on the way.
    """
    import numpy as np
    import PIL.Image

    values = np.asarray(grey)  # (height, width)
    if grey.mode == "L":  # Pillow reads signed bytes, and unsigned numbers of 32 bits, as if they were the other kind
        values = values.view(np.int8)
    elif stored and grey.mode == "I" and values.min(initial=0) < 0 and not _is_signed(stored):
        values = values.view(np.uint32)
    step = max(1, 2**20 // max(1, grey.width))  # rows of a band of about 2^20 pixels, 8 MB as float64. Our choice
    bands = [values[first : first + step] for first in range(0, len(values), step)]
    finite = [band[np.isfinite(band)] for band in bands]
    ends = [(float(band.min()), float(band.max())) for band in finite if band.size]
    low, high = min((end[0] for end in ends), default=0.0), max((end[1] for end in ends), default=0.0)
    scaled = np.empty(values.shape, np.uint8)
    for number, band in enumerate(bands):
        shares = (np.where(np.isfinite(band), band.astype(np.float64), low) - low) / ((high - low) or 1.0)
        scaled[number * step : number * step + len(band)] = np.rint(255 * shares)
    if stored.get(262) == 0:  # PhotometricInterpretation WhiteIsZero, which Pillow applies to 8 bits alone
        np.subtract(255, scaled, out=scaled)
    return PIL.Image.fromarray(scaled)
