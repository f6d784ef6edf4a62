"""Image files -> pixels as the network takes them, each decoded once as long as memory is spared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from stllava_eval.errors import InputError
from stllava_eval.images import decode, read_image

CACHE_BYTES = 2**30  # of prepared images, in each process that loads them


class Pixels:
    """Called with an image's file, its (3, side, side) normalised pixels.

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
        try:
            picture = decode(read_image(image))
        except OSError as error:
            raise InputError(f"{image}: cannot be read ({error.strerror}). Put it back.") from error
        except InputError as error:
            raise InputError(f"{image}: {error}") from error
        pixels = self.image_processor(picture, return_tensors="pt")["pixel_values"][0]
        if self._bytes < CACHE_BYTES:
            self._bytes += pixels.nbytes
            self._known[image] = pixels
        return pixels
