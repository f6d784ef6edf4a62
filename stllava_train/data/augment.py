"""Move and shade images a little, where a recipe of stage 1 asks for it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def augmented(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return (images, 3, height, width) in [0, 1], moved and scaled by up to 4 %, with other brightness, contrast,
    colours and noise.

    Nothing is mirrored or turned: that would make answers about sides and planes wrong. All amounts are our choice.
    """

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(len(images), *shape, generator=generator) - 1  # in [-1, 1)

    theta = torch.zeros(len(images), 2, 3)  # an affine map for each image: scale on the diagonal, shift in column 2
    theta[:, 0, 0] = theta[:, 1, 1] = 1 + 0.04 * uniform()
    theta[:, :, 2] = 0.08 * uniform(2)  # 2 is the width
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)  # (images, height, width, 2)
    moved = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    gain = (1 + 0.2 * uniform(1, 1, 1)) * (1 + 0.05 * uniform(3, 1, 1))
    offset = 0.05 * uniform(1, 1, 1)
    noise = 0.012 * (1 + uniform(1, 1, 1)) * torch.randn(moved.shape, generator=generator)
    return (moved * gain + offset + noise).clamp(0, 1)
