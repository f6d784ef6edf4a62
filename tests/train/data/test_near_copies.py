"""Likeness: copies are found, other pictures are not."""

import json

import pytest
from PIL import Image
from scans import COPIES, scan

from stllava_eval.images import decode
from stllava_train.data.near_copies import COPY, NearDuplicateIndex


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_a_copy_is_found(copy):
    gallery = NearDuplicateIndex([scan(seed) for seed in range(5)])
    for seed in range(5):
        number, distance = gallery.nearest(copy(scan(seed)))
        assert number == seed
        assert distance <= COPY


def test_other_pictures_are_no_copies():
    gallery = NearDuplicateIndex([scan(seed) for seed in range(5)])
    assert min(gallery.nearest(scan(seed))[1] for seed in range(5, 30)) > 10 * COPY


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3), (40, 30)])
def test_a_picture_of_one_shade_is_like_nothing(size):
    flat = Image.new("RGB", size, "grey")
    assert NearDuplicateIndex([scan(0)]).nearest(flat)[1] == 2
    assert NearDuplicateIndex([flat]).nearest(scan(0))[1] == 2
    assert NearDuplicateIndex([flat]).nearest(flat)[1] == 2


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
    gallery = NearDuplicateIndex(test)
    assert [gallery.nearest(COPIES[copy](picture))[0] for picture in test] == list(range(5))
    assert max(gallery.nearest(COPIES[copy](picture))[1] for picture in test) < COPY
    assert min(gallery.nearest(picture)[1] for picture in train) > COPY


def test_the_real_radiographs_of_vqarad_are_found(shared):
    folder = shared / "data" / "vqarad"
    rows = json.loads((folder / "testset.json").read_text())
    names = sorted({row["image_name"] for row in rows})[:20]
    pictures = [decode((folder / "images" / name).read_bytes()) for name in names]
    gallery = NearDuplicateIndex(pictures)
    for number, picture in enumerate(pictures):
        assert gallery.nearest(COPIES["padded to a grey square"](picture)) == (number, pytest.approx(0, abs=COPY))
