"""Turn image files into pixels as the network takes them, each decoded once as long as memory is spared.

The collators of both training stages ask for an image's pixels here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from stllava_eval.images import open_image

CACHE_BYTES = 2**30  # of prepared images, in each process that loads them (our choice): some 790 of 336 x 336 px


class Pixels:
    """Return, when called with an image's file, its (3, side, side) normalised pixels.

    Raises:
        InputError: It cannot be read or decoded.
    """

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor
        self._known: dict[Path, Tensor] = {}
        self._bytes = 0

    def __call__(self, image: Path) -> Tensor:
        """See the class."""
        if image in self._known:
            return self._known[image]
        pixels = self.image_processor(open_image(image), return_tensors="pt")["pixel_values"][0]  # (3, side, side)
        if self._bytes < CACHE_BYTES:
            self._bytes += pixels.nbytes
            self._known[image] = pixels
        return pixels
