"""Pictures -> which of a gallery each is a copy of, however it was encoded, scaled, cropped a little, or padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Grey = NDArray[np.float32]
    Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels

# Of the 299 test images of VQA-RAD and SLAKE, encoded again, scaled, padded, or cropped by 2 % a side, none was further
# than 0.012 from itself (0.019 cropped by 5 %); of 657 other images of these sets, the nearest were slices next to a
# test image in the same CT volume, from 0.048 on (`benchmarks/likeness.py`, docs/data.md).
COPY = 0.03
LONGEST = 256  # px of the grey pictures that everything is computed on
FLAT = 24  # grey levels out of 255: a row or column that varies by no more is a margin
SIDE = 64  # px of the aligned pictures; the closest slices of one CT volume differ in what 32 px no longer show
THUMBNAIL = 16  # px of those by which candidates are chosen
CROPS = (0.0, 0.03, 0.06, 0.1)  # of either side, of the thumbnails of the gallery
NEAR, MOST = 0.25, 3  # candidates: 1 - correlation of thumbnails at most, and how many are aligned
UNLIKE = 0.7  # correlation of details after two steps of alignment: copies had 0.94 at least


class Gallery:
    """Pictures to which others are compared.

    A comparison has two steps, because one number for a whole picture cannot tell a copy cropped by 2 % from the next
    slice of a CT volume: thumbnails of each picture whole, without its flat margins, and cropped, choose candidates;
    then the picture is shifted and scaled until it lies on the candidate, and their details are compared.

    Mirrored, turned and inverted copies are not found. A picture of one shade is like nothing.
    """

    def __init__(self, pictures: Sequence[PIL.Image.Image]) -> None:
        greys = [_grey(picture) for picture in pictures]
        self._boxes = [_boxes(grey, CROPS) for grey in greys]
        self._thumbnails = np.stack([_thumbnails(*both) for both in zip(greys, self._boxes, strict=True)])
        # what is compared is cropped by CROPS[1] within its margins: their colour bleeds into the outermost pixels
        self._frames = [boxes[len(CROPS) + 1] for boxes in self._boxes]
        self._framed = [
            _cut(PIL.Image.fromarray(grey), frame, SIDE) for grey, frame in zip(greys, self._frames, strict=True)
        ]

    def nearest(self, picture: PIL.Image.Image) -> tuple[int, float]:
        """(number of the gallery's picture that it is most like, their distance).

        The distance is 1 - correlation of details, in [0, 2], and 2 where no picture was near enough to be aligned.
        At most `COPY`, one is a copy of the other.
        """
        grey = _grey(picture)
        boxes = _boxes(grey, (0.0,))
        count, own, size = self._thumbnails.shape
        apart = 1 - self._thumbnails.reshape(-1, size) @ _thumbnails(grey, boxes).T
        apart = apart.reshape(count, own * len(boxes))
        closest = apart.min(1)
        padded = _padded(grey)
        found = [(0, 2.0)]
        for number in np.argsort(closest, kind="stable")[:MOST]:
            if closest[number] > NEAR:
                break
            of_gallery, of_picture = divmod(int(apart[number].argmin()), len(boxes))
            start = _carried(self._frames[number], self._boxes[number][of_gallery], boxes[of_picture])
            found.append((int(number), _aligned_distance(self._framed[number], padded, grey.shape, start)))
        return min(found, key=lambda pair: pair[1])


def _grey(picture: PIL.Image.Image) -> Grey:
    grey = picture.convert("L")
    scale = LONGEST / max(grey.size)
    if scale < 1:
        grey = grey.resize(
            (max(1, round(grey.width * scale)), max(1, round(grey.height * scale))), PIL.Image.Resampling.BOX
        )
    return np.asarray(grey, dtype=np.float32)


def _boxes(grey: Grey, crops: Sequence[float]) -> list[Box]:
    """The whole picture cropped by each share of either side, then what is left without its margins likewise."""
    height, width = grey.shape
    return [
        (
            left + crop * (right - left),
            top + crop * (low - top),
            right - crop * (right - left),
            low - crop * (low - top),
        )
        for left, top, right, low in ((0, 0, width, height), _without_margins(grey))
        for crop in crops
    ]


def _without_margins(grey: Grey) -> Box:
    """The box within flat rows and columns, again and again: a scan with a black margin may stand on a grey square."""
    height, width = grey.shape
    top, low, left, right = 0, height, 0, width
    while True:
        part = grey[top:low, left:right]
        rows = np.flatnonzero(np.ptp(part, axis=1) > FLAT)
        columns = np.flatnonzero(np.ptp(part, axis=0) > FLAT)
        if len(rows) < height / 4 or len(columns) < width / 4:  # a faint picture, or a few marks on nothing
            return left, top, right, low
        before = (top, low, left, right)
        top, low = top + int(rows[0]), top + int(rows[-1]) + 1
        left, right = left + int(columns[0]), left + int(columns[-1]) + 1
        if before == (top, low, left, right):
            return left, top, right, low


def _cut(image: PIL.Image.Image, box: Box, side: int) -> Grey:
    return np.asarray(image.resize((side, side), PIL.Image.Resampling.BILINEAR, box=box))


def _thumbnails(grey: Grey, boxes: Sequence[Box]) -> Grey:
    """(boxes, pixels) of mean 0 and length 1, or 0 where there is nothing to see."""
    image = PIL.Image.fromarray(grey)
    flat = np.stack([_cut(image, box, THUMBNAIL).ravel() for box in boxes])
    flat = flat - flat.mean(1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.where(length > THUMBNAIL, flat / np.maximum(length, 1), 0)  # a standard deviation of one grey level


def _padded(grey: Grey) -> PIL.Image.Image:
    """With half its width and height on either side, so that a frame may reach beyond the picture."""
    height, width = grey.shape
    return PIL.Image.fromarray(np.pad(grey, ((height // 2,) * 2, (width // 2,) * 2), mode="edge"))


def _carried(box: Box, source: Box, target: Box) -> Box:
    """`box` under the shift and scale that carries `source` onto `target`."""
    across = (target[2] - target[0]) / (source[2] - source[0])
    down = (target[3] - target[1]) / (source[3] - source[1])
    return (
        target[0] + (box[0] - source[0]) * across,
        target[1] + (box[1] - source[1]) * down,
        target[0] + (box[2] - source[0]) * across,
        target[1] + (box[3] - source[1]) * down,
    )


def _aligned_distance(theirs: Grey, padded: PIL.Image.Image, shape: tuple[int, ...], start: Box) -> float:
    """1 - correlation of details once `theirs` lies as well as it can on the picture, from the frame `start` on.

    Source: Lucas and Kanade (IJCAI 1981), shift and scale of either axis, brightness and contrast, by Gauss-Newton.
    """
    height, width = shape
    across = np.linspace(-1 + 1 / SIDE, 1 - 1 / SIDE, SIDE, dtype=np.float32)  # centres of pixels
    down_slope, across_slope = np.gradient(theirs, 2 / SIDE)
    slopes = np.stack(
        [
            across_slope * across,
            across_slope,
            down_slope * across[:, None],
            down_slope,
            theirs,
            np.ones_like(theirs),
        ],
        axis=-1,
    )
    middle = np.array([(start[0] + start[2]) / 2, (start[1] + start[3]) / 2])
    half = first = np.array([(start[2] - start[0]) / 2, (start[3] - start[1]) / 2])
    best, gained = -1.0, 0.0
    both: tuple[Grey, Grey] | None = None
    for step in range(12):
        corners = (*(middle - half), *(middle + half))
        frame = (
            corners[0] + width // 2,
            corners[1] + height // 2,
            corners[2] + width // 2,
            corners[3] + height // 2,
        )
        if min(frame) < 0 or frame[2] > padded.width or frame[3] > padded.height:
            break
        columns = np.abs(middle[0] + half[0] * across - width / 2) <= width / 2
        rows = np.abs(middle[1] + half[1] * across - height / 2) <= height / 2
        if columns.mean() < 0.75 or rows.mean() < 0.75:
            break
        seen = np.ix_(rows, columns)
        ours = _cut(padded, frame, SIDE)[seen]
        now = _correlation(theirs[seen], ours)
        if now > best:
            gained, best, both = now - best, now, (theirs[seen], ours)
        if step == 2 and (both is None or _correlation(_details(both[0]), _details(both[1])) < UNLIKE):
            break
        if step > 2 and (now < best or gained < 1e-5):
            break
        matrix = slopes[seen].reshape(-1, 6)
        normal = matrix.T @ matrix
        stretch = np.linalg.solve(normal + 1e-6 * np.trace(normal) * np.eye(6), matrix.T @ ours.ravel())
        if abs(stretch[4]) < 0.1:
            break
        scale, shift = stretch[[0, 2]] / stretch[4], stretch[[1, 3]] / stretch[4]
        scale, shift = 1 + scale.clip(-0.1, 0.1), shift.clip(-0.15, 0.15)
        middle, half = middle - half * shift / scale, half / scale
        if (half < 0.6 * first).any() or (half > 1.6 * first).any():
            break
    return 2.0 if both is None else 1 - _correlation(*map(_details, both))


def _details(grey: Grey) -> Any:
    from scipy.ndimage import gaussian_filter

    return grey - gaussian_filter(grey, 3)


def _correlation(one: Grey, other: Grey) -> float:
    one, other = one - one.mean(), other - other.mean()
    length = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float((one * other).sum()) / length if length > 1 else 0.0
