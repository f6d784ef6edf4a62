"""What is opened as an image and what is refused, before and while it is decoded."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.TiffImagePlugin
import pytest

from stllava_eval import images
from stllava_eval.errors import InputError
from stllava_eval.images import (
    FORMATS,
    PIXELS,
    SeveralFramesError,
    decode,
    open_header,
    read_image,
    rgb,
    truncated_refused,
)

NOISE = np.random.default_rng(0).integers(0, 256, (30, 40, 4), np.uint8)
COLOURS = PIL.Image.fromarray(NOISE[..., :3])


def encoded(picture: PIL.Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def png(width: int, height: int, rows: bytes = b"", depth: int = 1, colour: int = 0) -> bytes:
    """A PNG of one bit a pixel with these rows, or a header that promises them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(values: np.ndarray, white_is_zero: bool = False, sample_format: int = 1) -> bytes:
    """Grey of one strip, in little-endian order; `sample_format`: 1 without sign, 2 with, 3 float."""
    tags = [(256, values.shape[1]), (257, values.shape[0]), (258, 8 * values.itemsize), (259, 1)]
    tags += [(262, 0 if white_is_zero else 1), (273, 8), (277, 1), (278, values.shape[0]), (279, values.nbytes)]
    tags += [(339, sample_format)]
    entries = b"".join(
        struct.pack("<HHII", tag, 4 if tag in (256, 257, 273, 278, 279) else 3, 1, of) for tag, of in tags
    )
    header = b"II*\0" + struct.pack("<I", 8 + values.nbytes)
    return header + values.tobytes() + struct.pack("<H", len(tags)) + entries + bytes(4)


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_six_formats_are_opened(format):
    with open_header(encoded(COLOURS, format)) as header:
        assert (header.format, header.size) == (format, (40, 30))
    assert decode(encoded(COLOURS, format)).size == (40, 30)


def test_a_jpeg_with_a_second_picture_behind_it_as_telephones_write_it_is_opened():
    both = encoded(COLOURS, "MPO", save_all=True, append_images=[COLOURS.rotate(180)], quality=100)
    with PIL.Image.open(io.BytesIO(both)) as theirs:
        assert (theirs.format, theirs.n_frames) == ("MPO", 2)
    assert decode(both).tobytes() == decode(encoded(COLOURS, "JPEG", quality=100)).tobytes()


FRAMES = [COLOURS, COLOURS.rotate(180), COLOURS.rotate(90)]


@pytest.mark.parametrize("format", ["TIFF", "GIF", "PNG", "WEBP"])
def test_a_file_of_several_frames_is_refused_and_one_of_one_is_read(format):
    film = encoded(FRAMES[0], format, save_all=True, append_images=FRAMES[1:])
    told = f"a {format} image of several frames, and one is read. Save the frame that is meant as a file of its own."
    with pytest.raises(SeveralFramesError) as refused:
        decode(film)
    assert str(refused.value) == told
    with pytest.raises(SeveralFramesError), open_header(film):
        pass
    assert decode(encoded(FRAMES[0], format, save_all=True)).size == (40, 30)


def test_an_image_of_several_frames_that_another_task_hands_over_is_refused_unless_it_chose_the_frame():
    film = PIL.Image.open(io.BytesIO(encoded(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:])))
    with film:
        with pytest.raises(SeveralFramesError):
            rgb(film)
        film.seek(1)
        assert rgb(film).tobytes() == FRAMES[1].tobytes()


@pytest.mark.parametrize(("kind", "read"), [(1, True), (4, True), (2, False), (0, False)])
def test_smaller_copies_and_masks_behind_a_tiff_are_no_frames(kind, read):
    """NewSubfileType, of TIFF 6.0, page 36: 1 a reduced copy, 2 a page of several, 4 a mask."""
    file = io.BytesIO()
    with PIL.TiffImagePlugin.AppendingTiffWriter(file) as pages:
        COLOURS.save(pages, "TIFF")
        pages.newFrame()
        COLOURS.reduce(2).save(pages, "TIFF", tiffinfo={254: kind})
        pages.newFrame()
    if read:
        assert decode(file.getvalue()).tobytes() == COLOURS.tobytes()
    else:
        with pytest.raises(SeveralFramesError):
            decode(file.getvalue())


def test_a_data_set_with_an_image_of_several_frames_is_not_prepared(home, tmp_path):
    from stllava_eval.data.splits import hash_images

    film = encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:])
    with pytest.raises(
        InputError, match=r"slake: 1 missing or unreadable images\. qid 7 \(1 rows\): a GIF image of sev"
    ):
        hash_images("slake", [("qid 7", film)])


def dicom() -> bytes:
    return bytes(128) + b"DICM" + bytes(100)


@pytest.mark.parametrize(
    ("file", "told"),
    [
        pytest.param(lambda: encoded(COLOURS, "EPS"), " but PostScript. Convert it to one of these.", id="EPS"),
        pytest.param(lambda: b"\xc5\xd0\xd3\xc6" + bytes(99), " but PostScript. Convert", id="EPS with a preview"),
        pytest.param(lambda: encoded(COLOURS, "PDF"), " but PDF. Convert it", id="PDF"),
        pytest.param(lambda: encoded(COLOURS, "ICO"), " but an icon. Convert it", id="ICO"),
        pytest.param(lambda: b"8BPS\0\1" + bytes(99), " but Photoshop. Convert it", id="PSD"),
        pytest.param(lambda: encoded(COLOURS, "JPEG2000"), " but JPEG 2000. Convert it", id="JPEG 2000"),
        pytest.param(dicom, " but DICOM. Convert it", id="DICOM"),
        pytest.param(lambda: b"\0\0\0\x1cftypavif" + bytes(99), " but HEIF or AVIF. Convert it", id="AVIF"),
        pytest.param(lambda: b'<?xml version="1.0"?>\n<svg xmlns="x"/>', " but SVG. Convert it", id="SVG"),
        pytest.param(lambda: b"<!DOCTYPE html><html>404", " but a web page. Download it again.", id="a web page"),
        pytest.param(lambda: b"version https://git-lfs.github.com/spec/v1\n", " but a pointer of Git LFS.", id="LFS"),
        pytest.param(lambda: b"PK\3\4" + bytes(99), " but a zip archive. Download", id="zip"),
        pytest.param(lambda: encoded(COLOURS, "TGA"), "image. Download it again.", id="TGA"),
        pytest.param(lambda: encoded(COLOURS, "PPM"), "image. Download it again.", id="PPM"),
        pytest.param(lambda: b"\x08\0\x05\0CS\x0a\0ISO_IR 100", " but DICOM. Convert", id="DICOM without preamble"),
        pytest.param(lambda: bytes(344) + b"n+1\0", " but NIfTI. Convert", id="NIfTI"),
        pytest.param(lambda: b"\x1f\x8b\x08\0", " but a gzip archive (perhaps NIfTI).", id="NIfTI, packed"),
        pytest.param(lambda: b"NRRD0004\n", " but NRRD. Convert", id="NRRD"),
        pytest.param(lambda: b"ObjectType = Image\n", " but MetaImage. Convert", id="MetaImage"),
        pytest.param(
            lambda: tiff(np.eye(4, dtype="<f8"), sample_format=3), " but a TIFF that is cut", id="float64 TIFF"
        ),
        pytest.param(lambda: b"", "0 bytes are no JPEG", id="nothing"),
    ],
)
def test_other_formats_are_named_in_one_line(file, told):
    with pytest.raises(InputError) as refused:
        decode(file())
    assert told in str(refused.value)
    assert "no JPEG, PNG, BMP, GIF, TIFF or WebP image" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_postscript_under_an_images_name_starts_no_program(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None, raising=False)
    (tmp_path / "scan.jpg").write_bytes(encoded(COLOURS, "EPS"))
    with pytest.raises(InputError, match="but PostScript"):
        decode(read_image(tmp_path / "scan.jpg"))
    assert not (tmp_path / "started").exists()


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(13_300, 13_300), (9_500, 9_500), (2**31 - 1, 2**31 - 1)])
def test_a_header_of_too_many_pixels_is_refused_before_any_is_decoded(width, height, recwarn):
    with pytest.raises(InputError) as refused:
        decode(png(width, height))
    assert str(refused.value) == (
        f"an image of {width} x {height} pixels, and at most 50,000,000 are read. Scale it down."
    )
    assert not recwarn.list  # Pillow warns from 89 million on and refuses from 179 million on


def test_a_large_image_is_refused_in_little_memory(tmp_path):
    (tmp_path / "large.png").write_bytes(png(13_300, 13_300, bytes(13_300 * (1 + 1_663))))  # whole: Pillow opens it
    code = (
        "import resource, sys, PIL.PngImagePlugin\n"
        "from stllava_eval.errors import InputError\n"
        "from stllava_eval.images import decode\n"
        "file = open(sys.argv[1], 'rb').read()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: decode(file)\n"
        "except InputError as error: print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "large.png")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    line, grown = ran.stdout.splitlines()
    assert line.startswith("an image of 13300 x 13300 pixels")
    assert int(grown) < 100  # MB; as RGB it would take 0.9 GB
    assert ran.stderr == ""


def test_the_most_that_is_read_is_read(monkeypatch):
    monkeypatch.setattr(images, "PIXELS", 40 * 30)
    assert decode(encoded(COLOURS, "PNG")).size == (40, 30)
    with pytest.raises(InputError, match=r"an image of 41 x 30 pixels, and at most 1,200 are read"):
        decode(encoded(COLOURS.resize((41, 30)), "PNG"))


def test_pillows_own_limit_is_as_it_was_before():
    before = PIL.Image.MAX_IMAGE_PIXELS
    for image in (encoded(COLOURS, "PNG"), b"none", png(10**5, 10**5)):
        with contextlib.suppress(InputError):
            decode(image)
        assert before == PIL.Image.MAX_IMAGE_PIXELS


def test_an_image_that_somebody_else_opened_has_the_same_limit(monkeypatch):
    monkeypatch.setattr(images, "PIXELS", 100)
    with pytest.raises(InputError, match=r"40 x 30 pixels"):
        rgb(COLOURS)


def test_real_sets_stay_far_below_the_limits(shared):
    files = [*(shared / "data/vqarad/images").iterdir(), *(shared / "data/slake/imgs").glob("*/source.jpg")]
    assert len(files) > 900
    sizes = []
    for file in files:
        with open_header(read_image(file)) as header:
            sizes.append(header.width * header.height)
    assert max(sizes) < PIXELS / 10


@pytest.mark.parametrize("kind", ["device", "link to one", "pipe", "large", "sparse"])
def test_what_is_no_image_file_is_not_read(tmp_path, monkeypatch, kind):
    file = tmp_path / "scan.jpg"
    if kind == "device":
        file = type(file)("/dev/zero")
    elif kind == "link to one":
        file.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        with file.open("wb") as out:
            out.truncate(2**40 if kind == "sparse" else 2**28 + 1)
    with pytest.raises(InputError, match=r"no regular file|bytes, and at most 268,435,456 are read"):
        read_image(file)


# --- modes: those that `decode` meets are tested in test_datasets.py; foreign tasks hand in any ----------------------


MODES = [
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
    "I;16B",
    "I;16L",
]


def in_mode(mode: str) -> PIL.Image.Image:
    if mode.startswith("I;16"):
        values = np.arange(1200, dtype=">u2" if mode == "I;16B" else "<u2").reshape(30, 40)
        return PIL.Image.frombytes(mode, (40, 30), values.tobytes())
    if mode == "LAB":
        return PIL.Image.frombytes(mode, (40, 30), NOISE[..., :3].tobytes())
    if mode in ("La", "LA"):
        return PIL.Image.fromarray(NOISE[..., :2]).convert(mode)
    if mode in ("RGBA", "RGBa"):
        return PIL.Image.fromarray(NOISE).convert(mode)
    return COLOURS.convert("P").convert("PA") if mode == "PA" else COLOURS.convert(mode)


@pytest.mark.parametrize("mode", MODES)
def test_an_image_of_any_mode_becomes_rgb(mode):
    given = in_mode(mode)
    assert given.mode == mode
    made = rgb(given)
    assert (made.mode, made.size) == ("RGB", (40, 30))
    assert len(made.getcolors(1200)) > 1  # neither white nor black all over


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_grey_of_sixteen_bits_is_stretched_not_cut_off(mode):
    values = np.arange(1200).reshape(30, 40)
    given = in_mode(mode) if mode != "I" else PIL.Image.fromarray(values.astype(np.int32))
    assert np.asarray(rgb(given))[..., 0].tolist() == np.rint(255 * values / 1199).tolist()


RAMP = np.arange(240).reshape(12, 20)


@pytest.mark.parametrize(
    ("file", "negative"),
    [
        pytest.param(tiff((16 * RAMP).astype("<u2"), True), True, id="zero is white, as of many radiographs"),
        pytest.param(tiff(RAMP.astype("<f4"), True, 3), True, id="float whose zero is white"),
        pytest.param(tiff((16 * RAMP - 1024).astype("<i2"), False, 2), False, id="Hounsfield units"),
        pytest.param(tiff((17_000_000 * RAMP).astype("<u4")), False, id="32 bits without sign"),
        pytest.param(tiff((RAMP - 120).astype("i1"), False, 2), False, id="bytes with sign"),
    ],
)
def test_grey_of_a_tiff_is_read_as_its_tags_say(file, negative):
    shares = np.rint(255 * (RAMP / 239))
    assert np.asarray(decode(file))[..., 0].tolist() == (255 - shares if negative else shares).tolist()


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colour_of_sixteen_bits_that_uses_twelve_of_them_is_refused_as_nearly_black(channels):
    def deep(bits: int) -> bytes:
        values = np.full((12, 20, channels), 65535, ">u2")
        values[..., : channels - 1 + channels % 2] = (RAMP * 2 ** (bits - 8))[..., None]
        rows = b"".join(b"\0" + row.tobytes() for row in values)
        return png(20, 12, rows, depth=16, colour={2: 4, 3: 2, 4: 6}[channels])

    assert np.asarray(decode(deep(16)))[..., 0].tolist() == RAMP.tolist()
    with pytest.raises(InputError, match="16-bit colour whose brightest value is 14 of 255 in 8 bits, which is nearly"):
        decode(deep(12))


def test_a_stretched_image_is_the_same_in_bands(monkeypatch):
    values = np.random.default_rng(1).normal(size=(2500, 900)).astype(np.float32)  # more than one band
    values[7, 7], values[2000, 3] = np.nan, np.inf
    finite = np.where(np.isfinite(values), values, np.nan).astype(np.float64)
    low, high = np.nanmin(finite), np.nanmax(finite)
    expected = np.rint(255 * (np.where(np.isfinite(values), finite, low) - low) / (high - low))
    assert np.array_equal(np.asarray(rgb(PIL.Image.fromarray(values)))[..., 0], expected)


def test_an_image_that_cannot_be_converted_is_one_line():
    odd = COLOURS.copy()
    odd.info["transparency"] = b"odd"
    with pytest.raises(InputError, match="an image of mode RGB cannot be converted"):
        rgb(odd)


# --- truncated images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_truncated_image_is_refused_where_lmms_eval_lets_pillow_fill_it_with_grey(monkeypatch, format):
    monkeypatch.setattr(PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole = encoded(PIL.Image.fromarray(np.tile(NOISE[..., :3], (9, 9, 1))), format)
    cut = whole[: len(whole) * 3 // 4]
    with pytest.raises(InputError, match="cannot be decoded"):
        decode(cut)
    with pytest.raises(InputError, match="cannot be converted"):
        rgb(PIL.Image.open(io.BytesIO(cut)))
    assert PIL.ImageFile.LOAD_TRUNCATED_IMAGES


def test_the_switch_for_truncated_images_is_put_back_by_the_last_of_several_threads(monkeypatch):
    monkeypatch.setattr(PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    inside, leave = threading.Barrier(3, timeout=30), threading.Event()

    def wait() -> None:
        with truncated_refused():
            inside.wait()
            leave.wait(30)

    threads = [threading.Thread(target=wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    inside.wait()
    with truncated_refused():
        pass
    assert not PIL.ImageFile.LOAD_TRUNCATED_IMAGES  # two are inside still
    leave.set()
    for thread in threads:
        thread.join(30)
    assert PIL.ImageFile.LOAD_TRUNCATED_IMAGES
