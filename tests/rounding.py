"""Two results of the same sums, added in another order -> how far they are apart, in units that rounding is counted in.

Another processor, another batch or a packed row adds in another order. A float32 is rounded by 6e-8 of its value each
time, and a sum is off by roundings of its largest parts, however small it is itself. So tensors are compared in units
of their largest value, never absolutely. docs/design.md says what is equal where.
"""

import torch
from torch import Tensor

# our choice: some hundred roundings; seven times the worst of tests/golden.py, with AVX-512, AVX2 and neither alike
FLOAT32 = 1e-5


def apart(*pairs: tuple[Tensor, Tensor]) -> float:
    """Largest difference of any first tensor from its second, as a share of the largest value of any second.

    Some gradients, such as that of the keys' bias, are nothing but rounding: give those of all weights together.
    """
    differences = [(one.detach().double().reshape(-1) - two.double().reshape(-1)).abs().max() for one, two in pairs]
    return (torch.stack(differences).max() / max(two.double().abs().max() for _, two in pairs)).item()


def assert_same(ours: Tensor, theirs: Tensor, most: float = FLOAT32) -> None:
    """Equal but for rounding."""
    assert ours.shape == theirs.shape
    assert apart((ours, theirs)) <= most
