"""Convolutions on the CPU with weights that are packed once.

oneDNN computes with weights in blocks, and PyTorch brings them into blocks in every call. For a map of a few pixels
that takes several times as long as the convolution: 36 ms against 6 ms with 1280 channels and 5 x 5 results, on one
core. A region is such a map at all coarse levels. The packed weights take as much memory as the plain ones, once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

LEAST = 2**19  # weights; with fewer, packing takes little
MOST = 1024  # positions of the result; with more, packing is the smaller part


class PackedWeights:
    """Packed weights of one convolution."""

    def __init__(self) -> None:
        self._of: tuple[Any, ...] = ()
        self._weight: Tensor | None = None

    def serve(self, module: Any, x: Tensor) -> bool:
        """Whether this convolution gains, and works as `torch.nn.Conv2d` does."""
        if type(module) is not nn.Conv2d or not _AVAILABLE or not torch.backends.mkldnn.enabled:
            return False
        weight = module.weight
        return (
            weight.numel() >= LEAST
            and x.shape[0] * x.shape[-2] * x.shape[-1] <= MOST
            and x.device.type == weight.device.type == "cpu"
            and x.dtype == weight.dtype == torch.float32
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        )

    def convolve(self, module: nn.Conv2d, x: Tensor) -> Tensor:
        """The convolution, with the padding that the module has now."""
        geometry = list(_pair(module.padding)), list(_pair(module.stride)), list(_pair(module.dilation)), module.groups
        weight = module.weight.detach()
        values = weight.flatten()
        # Weights may be changed in place (fused LoRAs) without a new version number; a few of them tell.
        of = (weight.data_ptr(), float(values[:: len(values) // 61].sum()))
        if self._weight is None or of != self._of:
            self._weight, self._of = _OPERATORS._reorder_convolution_weight(weight, *geometry), of
        return _OPERATORS._convolution_pointwise(x, self._weight, module.bias, *geometry, "none", [], "")


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


_OPERATORS: Any = torch.ops.mkldnn
_AVAILABLE = torch.backends.mkldnn.is_available() and all(
    hasattr(_OPERATORS, name) for name in ("_convolution_pointwise", "_reorder_convolution_weight")
)

if _AVAILABLE:

    @register_flop_formula(_OPERATORS._convolution_pointwise)
    def _flops(x_shape: Any, w_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return conv_flop_count(x_shape, w_shape, out_shape)
