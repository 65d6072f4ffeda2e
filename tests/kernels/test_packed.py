"""Convolutions with packed weights: the same results, only where they are served, and always of the present weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffaccel.cost import macs
from diffaccel.kernels.packed import _AVAILABLE, PackedWeights

pytestmark = pytest.mark.skipif(not _AVAILABLE, reason="torch without oneDNN")


def conv(**options: int) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(256, 256, 3, **options).eval()


def small() -> torch.Tensor:
    return torch.randn(2, 256, 7, 6)


@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"stride": 2, "padding": 1}, {"dilation": 2}])
@torch.no_grad()
def test_same_result(options: dict[str, int]) -> None:
    module, x = conv(**options), small()
    packed = PackedWeights()
    assert packed.serve(module, x)
    for _ in range(2):  # packed now, and before
        torch.testing.assert_close(packed.convolve(module, x), module(x), rtol=1e-4, atol=2e-6)


@torch.no_grad()
def test_weights_changed_in_place_are_packed_again() -> None:
    module, x, packed = conv(), small(), PackedWeights()
    packed.convolve(module, x)
    module.weight.data += 0.1 * torch.randn_like(module.weight)  # as fused LoRAs: no new version number
    torch.testing.assert_close(packed.convolve(module, x), module(x), rtol=1e-4, atol=1e-4)
    module.weight = nn.Parameter(torch.randn_like(module.weight))
    torch.testing.assert_close(packed.convolve(module, x), module(x), rtol=1e-4, atol=1e-3)


def test_serves_only_what_gains_and_is_known() -> None:
    class Other(nn.Conv2d):
        pass

    packed, x = PackedWeights(), small()
    assert not packed.serve(conv(), x)  # gradients
    with torch.no_grad():
        assert packed.serve(conv(), x)
        assert not packed.serve(nn.Conv2d(8, 8, 3), torch.randn(1, 8, 7, 7))
        assert not packed.serve(conv(), torch.randn(1, 256, 64, 64))
        assert not packed.serve(conv().to(torch.bfloat16), x.bfloat16())
        assert not packed.serve(conv(), x.to("meta"))
        assert not packed.serve(Other(256, 256, 3), x)
        assert not packed.serve(nn.AvgPool2d(2), x)


@torch.no_grad()
def test_macs_are_counted() -> None:
    module, x, packed = conv(), small(), PackedWeights()
    assert macs(lambda: packed.convolve(module, x)) == macs(module, x) == 2 * 256 * 256 * 9 * 5 * 4
