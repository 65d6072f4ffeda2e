"""Affine maps from the features at an exit to those that the skipped layers would have made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class LinearExit(nn.Module):
    """y = W x + b for every token (..., C) or every pixel (N, C, H, W).

    Attributes:
        weight: (out, in).
        bias: (out,).
    """

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens or pixels in, as many out. The map follows the type and the device of its input."""
        weight, bias = self.weight.to(x), self.bias.to(x)
        if x.ndim == 4:
            return functional.conv2d(x, weight[:, :, None, None], bias)
        return functional.linear(x, weight, bias)


class LeastSquares:
    """Sums for the affine map with the least squared error, over as many batches as there are.

    Kept are X^T X and X^T Y in float64 on the CPU, weighted: memory does not grow with the number of samples.
    """

    def __init__(self) -> None:
        self.xx: Any = 0.0
        self.xy: Any = 0.0

    def add(self, x: Tensor, y: Tensor, weight: float = 1.0) -> None:
        """Features (..., C) or (N, C, H, W) and what they should become, alike in all but the channels."""
        rows = [_rows(value) for value in (x, y)]
        extended = functional.pad(rows[0], (0, 1), value=1.0)
        self.xx = self.xx + weight * (extended.T @ extended).cpu()
        self.xy = self.xy + weight * (extended.T @ rows[1]).cpu()

    def solve(self, residual: bool, ridge: float = 1e-2) -> LinearExit:
        """The map, with a penalty of `ridge` times the mean square of the features on its weights.

        Args:
            residual: whether input and output are the same features before and after some layers: the penalty then
                pulls towards the identity, which is what skipping the layers does; else towards 0.
            ridge: relative size of the penalty; the bias has none.
        """
        size = len(self.xx) - 1
        start = torch.zeros(size + 1, self.xy.shape[1], dtype=torch.float64)
        if residual:
            start[:size] = torch.eye(size, dtype=torch.float64)
        penalty = torch.full((size + 1,), ridge * float(self.xx.diagonal()[:size].mean()), dtype=torch.float64)
        penalty[size] = 1e-9 * float(self.xx[size, size])
        change = torch.linalg.solve(self.xx + penalty.diag(), self.xy - self.xx @ start)
        solution = (start + change).float()
        return LinearExit(solution[:size].T.contiguous(), solution[size].contiguous())


def _rows(value: Tensor) -> Tensor:
    value = value.detach().to("cpu" if value.device.type == "mps" else None, torch.float64)  # MPS has no float64
    return (value.movedim(1, -1) if value.ndim == 4 else value).reshape(-1, value.shape[1 if value.ndim == 4 else -1])
