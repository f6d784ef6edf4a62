"""Likeness: copies are found, other pictures are not."""

import io
import json
import math

import numpy as np
import pytest
from PIL import Image, ImageOps

from stllava_eval.images import decode
from stllava_train.likeness import COPY, Gallery


def scan(seed: int, size: tuple[int, int] = (200, 160), margin: int = 20) -> Image.Image:
    """Smooth blobs on black, like a slice: sums of a few waves of random direction."""
    draw = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 1, size[0] - 2 * margin), np.linspace(0, 1, size[1] - 2 * margin))
    waves = sum(
        draw.normal() * np.sin(2 * math.pi * (draw.uniform(-6, 6) * x + draw.uniform(-6, 6) * y + draw.uniform()))
        for _ in range(20)
    )
    grey = np.uint8(128 + 110 * waves / np.abs(waves).max())
    return ImageOps.expand(Image.fromarray(grey).convert("RGB"), margin, "black")


def encoded(picture: Image.Image, **settings) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, **settings)
    return decode(buffer.getvalue())


def cropped(picture: Image.Image, share: float) -> Image.Image:
    width, height = picture.size
    across, down = round(share * width), round(share * height)
    return picture.crop((across, down, width - across, height - down))


COPIES = {
    "the same": lambda picture: picture,
    "JPEG, quality 75": lambda picture: encoded(picture, format="JPEG", quality=75),
    "JPEG, quality 50": lambda picture: encoded(picture, format="JPEG", quality=50),
    "224 px": lambda picture: ImageOps.contain(picture, (224, 224)),
    "336 px, squeezed": lambda picture: picture.resize((336, 336)),
    "224 px and JPEG": lambda picture: encoded(ImageOps.contain(picture, (224, 224)), format="JPEG", quality=50),
    "padded to a grey square": lambda picture: ImageOps.pad(picture, (max(picture.size),) * 2, color=(122, 116, 104)),
    "padded to a white square": lambda picture: ImageOps.pad(picture, (max(picture.size),) * 2, color="white"),
    "cropped by 2 %": lambda picture: cropped(picture, 0.02),
    "cropped by 5 %": lambda picture: cropped(picture, 0.05),
    "grey": lambda picture: picture.convert("L").convert("RGB"),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_a_copy_is_found(copy):
    gallery = Gallery([scan(seed) for seed in range(5)])
    for seed in range(5):
        number, distance = gallery.nearest(copy(scan(seed)))
        assert number == seed
        assert distance <= COPY


def test_other_pictures_are_no_copies():
    gallery = Gallery([scan(seed) for seed in range(5)])
    assert min(gallery.nearest(scan(seed))[1] for seed in range(5, 30)) > 10 * COPY


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3), (40, 30)])
def test_a_picture_of_one_shade_is_like_nothing(size):
    flat = Image.new("RGB", size, "grey")
    assert Gallery([scan(0)]).nearest(flat)[1] == 2
    assert Gallery([flat]).nearest(scan(0))[1] == 2
    assert Gallery([flat]).nearest(flat)[1] == 2


@pytest.mark.parametrize("copy", ["336 px, squeezed", "224 px and JPEG", "padded to a white square", "cropped by 2 %"])
def test_real_scans_are_told_from_their_neighbours_in_the_volume(shared, copy):
    """Of the closest pairs of SLAKE's train and test: slices of one CT volume."""
    pairs = [(603, 604), (606, 605), (544, 543), (639, 634), (581, 580)]  # train, test
    train, test = (
        [
            decode((shared / "data" / "slake" / "imgs" / f"xmlab{pair[side]}" / "source.jpg").read_bytes())
            for pair in pairs
        ]
        for side in (0, 1)
    )
    gallery = Gallery(test)
    assert [gallery.nearest(COPIES[copy](picture))[0] for picture in test] == list(range(5))
    assert max(gallery.nearest(COPIES[copy](picture))[1] for picture in test) < COPY
    assert min(gallery.nearest(picture)[1] for picture in train) > COPY


def test_the_real_radiographs_of_vqarad_are_found(shared):
    folder = shared / "data" / "vqarad"
    rows = json.loads((folder / "testset.json").read_text())
    names = sorted({row["image_name"] for row in rows})[:20]
    pictures = [decode((folder / "images" / name).read_bytes()) for name in names]
    gallery = Gallery(pictures)
    for number, picture in enumerate(pictures):
        assert gallery.nearest(COPIES["padded to a grey square"](picture)) == (number, pytest.approx(0, abs=COPY))
