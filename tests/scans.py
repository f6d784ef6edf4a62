"""A seed -> a picture like a scan, and what becomes of pictures that people copy."""

import io
import math

import numpy as np
from PIL import Image, ImageOps

from stllava_eval.images import decode


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
