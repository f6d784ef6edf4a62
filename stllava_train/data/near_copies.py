"""Find the picture that another one is a copy of, however it was encoded, scaled, cropped a little, or padded.

`leaks` asks this of every training image and the images of the test splits.
"""

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
# test image in the same CT volume, from 0.048 on (`benchmarks/likeness.py`, docs/train/data.md).
COPY = 0.03

# All that follow are our choice. They were measured together, as one set, by `benchmarks/likeness.py` on these 299 and
# 657 images; docs/train/data.md, "What counts as a copy", has the table. Run that benchmark again after a change of any
# of them.

# The pictures that are compared
LONGEST = 256  # px of the longer side of the grey pictures that everything is computed on
FLAT = 24  # grey levels out of 255: a row or column that varies by no more is a margin
LEAST_INSIDE = 4  # margins are taken off only as long as 1 / 4 of the rows and of the columns is left
# The choice of candidates
THUMBNAIL = 16  # px a side of the thumbnails by which candidates are chosen
CROPS = (0.0, 0.03, 0.06, 0.1)  # of either side, of the thumbnails in the index: copies are looked for up to 10 %
NEAR, MOST = 0.25, 3  # 1 - correlation of a candidate's thumbnail, at most (a crop by 2 % has up to 0.17); how many
# The alignment of a candidate
SIDE = 64  # px a side; the closest slices of one CT volume differ in what 32 px no longer show
# (SIDE,): centres of pixels along either axis, in halves of the frame's side, from its middle: -1 to 1
CENTRES = np.linspace(-1 + 1 / SIDE, 1 - 1 / SIDE, SIDE, dtype=np.float32)
STEPS = 12  # of Gauss-Newton, at most; it ends as soon as a step gains less than `LEAST_GAIN` of correlation
LEAST_GAIN = 1e-5
UNLIKE_STEP, UNLIKE = 2, 0.7  # after this step, correlation of details below which it is given up: copies had >= 0.94
VISIBLE = 0.75  # share of the columns, and of the rows, that must fall on the picture
SCALE_STEP, SHIFT_STEP = 0.1, 0.15  # most that one step scales and, in halves of the frame's side, shifts
SMALLEST, LARGEST = 0.6, 1.6  # times the frame's first width and height: beyond, it has run away from the picture
LEAST_CONTRAST = 0.1  # of the picture, in multiples of the template's: below, there is nothing to align
RIDGE = 1e-6  # times its trace, added to the diagonal of the normal matrix, so that it can be solved
DETAIL = 3  # px of `SIDE`: standard deviation of the blur that is taken off; what is left are details


class NearDuplicateIndex:
    """An index of pictures, to which others are compared.

    A comparison has two steps, because one number for a whole picture cannot tell a copy cropped by 2 % from the next
    slice of a CT volume: thumbnails of each picture whole, without its flat margins, and cropped, choose candidates;
    then the picture is shifted and scaled until it lies on the candidate, and their details are compared.

    Mirrored, turned and inverted copies are not found. A picture of one shade is like nothing.
    """

    def __init__(self, pictures: Sequence[PIL.Image.Image]) -> None:
        self._boxes: list[list[Box]] = []  # of each picture, whole and without its margins, by `CROPS`
        self._frames: list[Box] = []  # of each picture, the box whose details are compared
        self._framed: list[Grey] = []  # what is in it, (SIDE, SIDE)
        thumbnails = []
        for picture in pictures:
            grey = _grey(picture)
            boxes = _boxes(grey, CROPS)
            # cropped by CROPS[1] within its margins, as their colour bleeds into the outermost pixels
            frame = boxes[len(CROPS) + 1]
            self._boxes.append(boxes)
            self._frames.append(frame)
            self._framed.append(_cut(PIL.Image.fromarray(grey), frame, SIDE))
            thumbnails.append(_thumbnails(grey, boxes))
        self._thumbnails = np.stack(thumbnails)  # (pictures, boxes, THUMBNAIL * THUMBNAIL)

    def nearest(self, picture: PIL.Image.Image) -> tuple[int, float]:
        """Return (index of the picture that it is most like, their distance).

        The distance is 1 - correlation of details, in [0, 2], and 2 where no picture was near enough to be aligned.
        At most `COPY`, one is a copy of the other.
        """
        grey = _grey(picture)
        boxes = _boxes(grey, (0.0,))
        count, own, size = self._thumbnails.shape
        # 1 - correlation: thumbnails have mean 0 and length 1. (count * own, size) @ (size, boxes)
        apart = 1 - self._thumbnails.reshape(-1, size) @ _thumbnails(grey, boxes).T
        apart = apart.reshape(count, own * len(boxes))  # of each picture in the index, every box with every box
        closest = apart.min(1)  # (count,)
        padded = _padded(grey)
        distances = [(0, 2.0)]
        for index in np.argsort(closest, kind="stable")[:MOST]:
            if closest[index] > NEAR:
                break
            # the alignment starts from the two boxes whose thumbnails are the most alike
            own_box, box = divmod(int(apart[index].argmin()), len(boxes))
            start = _carried(self._frames[index], self._boxes[index][own_box], boxes[box])
            distances.append((int(index), _aligned_distance(self._framed[index], padded, grey.shape, start)))
        return min(distances, key=lambda pair: pair[1])


def _grey(picture: PIL.Image.Image) -> Grey:
    """Return the picture in grey levels from 0 to 255, (height, width), its longer side `LONGEST` px at most."""
    grey = picture.convert("L")
    scale = LONGEST / max(grey.size)
    if scale < 1:
        grey = grey.resize(
            (max(1, round(grey.width * scale)), max(1, round(grey.height * scale))), PIL.Image.Resampling.BOX
        )
    return np.asarray(grey, dtype=np.float32)


def _boxes(grey: Grey, crops: Sequence[float]) -> list[Box]:
    """Return the whole picture cropped by each share of either side, then likewise what is within its margins."""
    height, width = grey.shape
    boxes = []
    for left, top, right, low in ((0, 0, width, height), _without_margins(grey)):
        for crop in crops:
            across, down = crop * (right - left), crop * (low - top)
            boxes.append((left + across, top + down, right - across, low - down))
    return boxes


def _without_margins(grey: Grey) -> Box:
    """Return the box within flat rows and columns, taken off repeatedly: a black margin may be on a grey square."""
    height, width = grey.shape
    top, low, left, right = 0, height, 0, width
    while True:
        part = grey[top:low, left:right]
        rows = np.flatnonzero(np.ptp(part, axis=1) > FLAT)
        columns = np.flatnonzero(np.ptp(part, axis=0) > FLAT)
        if len(rows) < height / LEAST_INSIDE or len(columns) < width / LEAST_INSIDE:
            # a faint picture, or a few marks on nothing
            return left, top, right, low
        before = (top, low, left, right)
        top, low = top + int(rows[0]), top + int(rows[-1]) + 1
        left, right = left + int(columns[0]), left + int(columns[-1]) + 1
        if before == (top, low, left, right):
            return left, top, right, low


def _cut(image: PIL.Image.Image, box: Box, side: int) -> Grey:
    """Return what is in the box, scaled to (side, side)."""
    return np.asarray(image.resize((side, side), PIL.Image.Resampling.BILINEAR, box=box))


def _thumbnails(grey: Grey, boxes: Sequence[Box]) -> Grey:
    """Return (boxes, THUMBNAIL * THUMBNAIL) levels of mean 0 and length 1, or 0 where there is nothing to see."""
    image = PIL.Image.fromarray(grey)
    flat = np.stack([_cut(image, box, THUMBNAIL).ravel() for box in boxes])  # (boxes, THUMBNAIL * THUMBNAIL)
    flat = flat - flat.mean(1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    # the length of n pixels is sqrt(n) times their standard deviation: THUMBNAIL is one grey level
    return np.where(length > THUMBNAIL, flat / np.maximum(length, 1), 0)


def _padded(grey: Grey) -> PIL.Image.Image:
    """Return the picture with half its width and height added on either side, so that a frame may reach beyond it."""
    height, width = grey.shape
    return PIL.Image.fromarray(np.pad(grey, ((height // 2,) * 2, (width // 2,) * 2), mode="edge"))


def _carried(box: Box, source: Box, target: Box) -> Box:
    """Return `box` under the shift and scale that carry `source` onto `target`."""
    across = (target[2] - target[0]) / (source[2] - source[0])
    down = (target[3] - target[1]) / (source[3] - source[1])
    return (
        target[0] + (box[0] - source[0]) * across,
        target[1] + (box[1] - source[1]) * down,
        target[0] + (box[2] - source[0]) * across,
        target[1] + (box[3] - source[1]) * down,
    )


def _aligned_distance(template: Grey, padded: PIL.Image.Image, shape: tuple[int, ...], start: Box) -> float:
    """Return 1 - correlation of details, once a template is aligned to a picture as well as it can be.

    Source: Lucas and Kanade (IJCAI 1981): shift and scale of either axis, brightness and contrast, by Gauss-Newton.

    Args:
        template: (SIDE, SIDE), of the index.
        padded: The picture, see `_padded`.
        shape: (height, width) of the picture without its padding.
        start: The frame in the picture from which the alignment starts.
    """
    height, width = shape
    slopes = _slopes(template)
    middle = np.array([(start[0] + start[2]) / 2, (start[1] + start[3]) / 2])
    half = first = np.array([(start[2] - start[0]) / 2, (start[3] - start[1]) / 2])
    best, gained = -1.0, 0.0
    aligned: tuple[Grey, Grey] | None = None  # template and picture where they were the most alike
    for step in range(STEPS):
        corners = (*(middle - half), *(middle + half))
        frame = (
            corners[0] + width // 2,
            corners[1] + height // 2,
            corners[2] + width // 2,
            corners[3] + height // 2,
        )
        if min(frame) < 0 or frame[2] > padded.width or frame[3] > padded.height:
            break
        # only what falls on the picture is compared, not what is padding
        columns = np.abs(middle[0] + half[0] * CENTRES - width / 2) <= width / 2  # (SIDE,)
        rows = np.abs(middle[1] + half[1] * CENTRES - height / 2) <= height / 2  # (SIDE,)
        if columns.mean() < VISIBLE or rows.mean() < VISIBLE:
            break
        visible = np.ix_(rows, columns)
        picture = _cut(padded, frame, SIDE)[visible]
        correlation = _correlation(template[visible], picture)
        if correlation > best:
            gained, best, aligned = correlation - best, correlation, (template[visible], picture)
        if step == UNLIKE_STEP and (aligned is None or _correlation(*map(_details, aligned)) < UNLIKE):
            break
        if step > UNLIKE_STEP and (correlation < best or gained < LEAST_GAIN):
            break
        if (moved := _gauss_newton_step(slopes[visible], picture)) is None:
            break
        scale, shift = moved
        middle, half = middle - half * shift / scale, half / scale
        if (half < SMALLEST * first).any() or (half > LARGEST * first).any():
            break
    return 2.0 if aligned is None else 1 - _correlation(*map(_details, aligned))


def _slopes(template: Grey) -> Grey:
    """Return (SIDE, SIDE, 6), the derivatives of an aligned template by the six parameters of its alignment."""
    down_slope, across_slope = np.gradient(template, 2 / SIDE)
    return np.stack(
        [
            across_slope * CENTRES,  # 0: scale across
            across_slope,  # 1: shift across
            down_slope * CENTRES[:, None],  # 2: scale down
            down_slope,  # 3: shift down
            template,  # 4: contrast
            np.ones_like(template),  # 5: brightness
        ],
        axis=-1,
    )


def _gauss_newton_step(slopes: Grey, picture: Grey) -> tuple[Any, Any] | None:
    """Return (scale, shift), (2,) each for across and down, that bring the template closest to the picture.

    Args:
        slopes: (rows, columns, 6), see `_slopes`, of what is visible.
        picture: (rows, columns), of the picture in the frame.

    Returns:
        Both are bounded by `SCALE_STEP` and `SHIFT_STEP`; None where the picture has no contrast to align by.
    """
    matrix = slopes.reshape(-1, 6)  # (visible pixels, 6)
    # least squares by the normal equations, (6, 6) @ (6,)
    normal = matrix.T @ matrix
    solved = np.linalg.solve(normal + RIDGE * np.trace(normal) * np.eye(6), matrix.T @ picture.ravel())
    contrast = solved[4]
    if abs(contrast) < LEAST_CONTRAST:
        return None
    scale, shift = solved[[0, 2]] / contrast, solved[[1, 3]] / contrast  # (2,), across and down
    return 1 + scale.clip(-SCALE_STEP, SCALE_STEP), shift.clip(-SHIFT_STEP, SHIFT_STEP)


def _details(grey: Grey) -> Any:
    """Return the picture less a blurred copy of it."""
    from scipy.ndimage import gaussian_filter

    return grey - gaussian_filter(grey, DETAIL)


def _correlation(first: Grey, second: Grey) -> float:
    """Return Pearson's correlation of two pictures, in [-1, 1]; 0 where one of them is of one shade."""
    first, second = first - first.mean(), second - second.mean()
    length = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float((first * second).sum()) / length if length > 1 else 0.0
