"""The real test images of VQA-RAD and SLAKE -> how far copies of them are from themselves, and other images from them.

python benchmarks/likeness.py ../shared/data -
"""

import argparse
import io
import json
import time
from collections.abc import Callable
from pathlib import Path

import figures
import numpy as np
from PIL import Image, ImageOps

from stllava_eval.images import decode
from stllava_train.data.near_copies import COPY, NearDuplicateIndex


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return decode(buffer.getvalue())


def scaled(picture: Image.Image, longest: int) -> Image.Image:
    return ImageOps.contain(picture, (longest, longest))


def squared(picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    return ImageOps.pad(picture, (max(picture.size),) * 2, color=colour)


def cropped(picture: Image.Image, share: float) -> Image.Image:
    across, down = round(share * picture.width), round(share * picture.height)
    return picture.crop((across, down, picture.width - across, picture.height - down))


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG q75": lambda picture: jpeg(picture, 75),
    "JPEG q50": lambda picture: jpeg(picture, 50),
    "336 px": lambda picture: scaled(picture, 336),
    "224 px": lambda picture: scaled(picture, 224),
    "224 x 224 px, squeezed": lambda picture: picture.resize((224, 224)),
    "224 px, JPEG q50": lambda picture: jpeg(scaled(picture, 224), 50),
    "padded to a square, black": lambda picture: squared(picture, (0, 0, 0)),
    "padded to a square, white": lambda picture: squared(picture, (255, 255, 255)),
    "padded to a square, CLIP's grey, 336 px, JPEG q75": lambda p: jpeg(scaled(squared(p, (122, 116, 104)), 336), 75),
    "a black border of 10 %": lambda p: ImageOps.expand(p, round(0.1 * max(p.size)), (0, 0, 0)),
    "cropped by 2 % a side": lambda picture: cropped(picture, 0.02),
    "cropped by 2 % a side, 224 px, JPEG q50": lambda picture: jpeg(scaled(cropped(picture, 0.02), 224), 50),
    "cropped by 5 % a side": lambda picture: cropped(picture, 0.05),
    "cropped by 10 % a side": lambda picture: cropped(picture, 0.1),
    "grey": lambda picture: picture.convert("L").convert("RGB"),
    "a fifth brighter": lambda picture: picture.point(lambda value: min(255, value * 1.2 + 10)),
    "gamma 0.7": lambda picture: picture.point(lambda value: 255 * (value / 255) ** 0.7),
    "mirrored": ImageOps.mirror,
}


def names(file: Path, key: str) -> set[str]:
    return {row[key] for row in json.loads(file.read_text(encoding="utf-8")) if row.get("q_lang", "en") == "en"}


def main() -> None:
    """Write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with vqarad/ and slake/")
    parser.add_argument("out", help="JSON file, or - for stdout")
    arguments = parser.parse_args()
    rad, slake = arguments.data / "vqarad", arguments.data / "slake"
    tests = [rad / "images" / name for name in sorted(names(rad / "testset.json", "image_name"))]
    tests += [slake / "imgs" / name for name in sorted(names(slake / "test.json", "img_name"))]
    others = [rad / "images" / name for name in sorted(names(rad / "trainset.json", "image_name"))]
    for part in ("train", "validate"):
        others += [slake / "imgs" / name for name in sorted(names(slake / f"{part}.json", "img_name"))]
    others = [path for path in others if path not in set(tests)]
    pictures = [decode(path.read_bytes()) for path in tests]
    gallery = NearDuplicateIndex(pictures)
    result: dict = {"tests": len(tests), "others": len(others), "limit": COPY, "copies": {}}
    for title, copy in COPIES.items():
        distances = []
        for number, picture in enumerate(pictures):
            nearest, distance = gallery.nearest(copy(picture))
            distances.append(distance if nearest == number else 2.0)
        result["copies"][title] = {
            "found": sum(distance <= COPY for distance in distances),
            "median": round(float(np.median(distances)), 4),
            "furthest": round(max(distances), 4),
        }
    seen = [decode(path.read_bytes()) for path in others]
    began = time.perf_counter()
    nearest = sorted((gallery.nearest(picture)[::-1], str(path)) for path, picture in zip(others, seen, strict=True))
    result["ms per image"] = round(1000 * (time.perf_counter() - began) / len(others), 1)
    result["others taken for copies"] = sum(distance <= COPY for (distance, _), _ in nearest)
    result["closest others"] = [
        (round(distance, 4), path, str(tests[number])) for (distance, number), path in nearest[:10]
    ]
    figures.write(result, arguments.out)


if __name__ == "__main__":
    main()
