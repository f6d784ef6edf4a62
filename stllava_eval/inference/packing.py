"""Hold the weights of linear layers as the CPU's kernels read them, so that no product lays them out again.

torch hands a linear layer in float32 to a library that copies the weight into blocks in every call. oneDNN takes a
weight that was laid out once: a product with 4 rows then takes a third of the time, one with 80 four fifths, one with
600 five sixths (benchmarks/packing.py). Results differ by rounding only.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

COLUMNS = 16  # that the layout of groups is made for, as ROWS is that of a linear layer's
ROWS = 64  # that the layout is made for; the others are no slower in it (benchmarks/packing.py)


class PackedLinear(nn.Module):
    """A linear layer whose weight is only there as oneDNN's blocks; it answers and cannot be trained or saved."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._packed = _packed(linear.weight.detach())  # no buffer: oneDNN's tensors cannot be moved or saved
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._dtype = linear.weight.dtype

    @property
    def weight(self) -> Tensor:
        """Return a tensor that has the weight's shape (out_features, in_features) and dtype, and no values."""
        return torch.empty(self.out_features, self.in_features, dtype=self._dtype, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """Return x W' + b: (..., in_features) -> (..., out_features)."""
        return _product(x, self._packed, self._bias)


def pack_linears(model: nn.Module) -> int:
    """Replace the linear layers of a network on a CPU, in float32, whose weights nothing else uses; return how many.

    A layer keeps its weight where another module holds it too, as an embedding that is tied to the head does. Nothing
    is replaced where this torch has no such product, or where its result on the first layer is another one.
    """
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    packed = 0
    # the layers themselves are in no list: each weight is freed as soon as it is packed
    for module in [module for module in model.modules() if next(module.children(), None) is not None]:
        for name in [name for name, child in module.named_children() if type(child) is nn.Linear]:
            layer = module.get_submodule(name)
            assert isinstance(layer, nn.Linear)  # and no subclass, which may compute something else
            if holders[id(layer.weight)] > 1 or not _can_pack(layer):
                continue
            if not packed and not _is_equal(layer):
                return 0
            setattr(module, name, PackedLinear(layer))
            packed += 1
    return packed


def _can_pack(linear: nn.Linear) -> bool:
    return linear.weight.device.type == "cpu" and linear.weight.dtype == torch.float32


def _is_equal(linear: nn.Linear) -> bool:
    """Return whether a layer's packed product is its own but for rounding."""
    if not torch.backends.mkldnn.is_available():
        return False
    x = torch.linspace(-1, 1, 3 * linear.in_features).view(3, -1)
    with torch.inference_mode():
        try:
            ours, own = PackedLinear(linear)(x), linear(x)
        except (AttributeError, RuntimeError):  # an operator of torch's own compiler: it may go with a release
            return False
    return bool((ours - own).abs().max() <= 1e-4 * own.abs().max())


def _packed(weight: Tensor) -> Any:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)


def _product(x: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


# --- several products at once: a grouped convolution of 1 x 1 ---------------------------------------------------------

_ONE, _NONE = [1, 1], [0, 0]  # stride and dilation; padding


def pack_groups(matrices: Tensor) -> Any:
    """Lay out (groups, outputs, inputs) matrices for `grouped_product`."""
    groups, outputs, inputs = matrices.shape
    kernels = matrices.reshape(groups * outputs, inputs, 1, 1).contiguous()
    return torch.ops.mkldnn._reorder_convolution_weight(
        kernels, _NONE, _ONE, _ONE, groups, [1, groups * inputs, 1, COLUMNS]
    )


def grouped_product(packed: Any, x: Tensor, outputs: int) -> Tensor:
    """Return each group's matrix times x: (groups, inputs, columns) -> (groups, outputs, columns)."""
    groups, inputs, columns = x.shape
    pixels = x.reshape(1, groups * inputs, 1, columns)
    product: Tensor = torch.ops.mkldnn._convolution_pointwise(
        pixels, packed, None, _NONE, _ONE, _ONE, groups, "none", [], ""
    )
    return product.view(groups, outputs, columns)


@cache
def can_pack() -> bool:
    """Return whether this torch has the packed product of groups, with the result of a plain one."""
    if not torch.backends.mkldnn.is_available():
        return False
    matrices, x = torch.linspace(-1, 1, 3 * 37 * 16).view(3, 37, 16), torch.linspace(-1, 2, 3 * 16 * 5).view(3, 16, 5)
    with torch.inference_mode():
        try:
            ours, own = grouped_product(pack_groups(matrices), x, 37), matrices @ x
        except (AttributeError, RuntimeError):
            return False
    return bool((ours - own).abs().max() <= 1e-4 * own.abs().max())
