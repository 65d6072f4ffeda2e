"""Least squares against NumPy's, and what the ridge does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from diffaccel.samplers.policy.exits.linear import LeastSquares, LinearExit
from tests.tiny import noise, relative

TINY = 1e-12  # ridge that does nothing


def tokens(seed: int, width: int, count: int = 30) -> Tensor:
    """Features whose channels differ in size and are not centered."""
    return noise(2, count, width, seed=seed) * torch.linspace(0.5, 3, width) + 1


def lstsq(x: Tensor, y: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias by NumPy, rows weighted."""
    rows = [value.reshape(-1, value.shape[-1]).double().numpy() for value in (x, y)]
    root = np.sqrt(np.ones(len(rows[0])) if weights is None else weights.double().numpy())[:, None]
    solution = np.linalg.lstsq(np.hstack([rows[0], np.ones((len(rows[0]), 1))]) * root, rows[1] * root, rcond=None)[0]
    return torch.from_numpy(solution[:-1].T), torch.from_numpy(solution[-1])


def close(found: LinearExit, weight: Tensor, bias: Tensor, tolerance: float = 1e-5) -> bool:
    return relative(found.weight, weight) < tolerance and relative(found.bias, bias) < tolerance


@pytest.mark.parametrize("residual", [False, True])
def test_map_is_that_of_numpy(residual):
    x, y = tokens(1, 5), tokens(2, 5)
    sums = LeastSquares()
    sums.add(x, y)
    assert close(sums.solve(residual, TINY), *lstsq(x, y))


def test_other_widths_and_several_batches():
    x, y = tokens(1, 5), tokens(2, 3)
    sums = LeastSquares()
    for part in range(3):
        sums.add(x[:, part::3], y[:, part::3])
    assert close(sums.solve(False, TINY), *lstsq(x, y))


def test_pixels_are_tokens():
    x, y = tokens(1, 5, 12), tokens(2, 3, 12)
    pixels, sums = LeastSquares(), LeastSquares()
    pixels.add(*(value.movedim(-1, 1).reshape(2, -1, 3, 4) for value in (x, y)))
    sums.add(x, y)
    found, expected = pixels.solve(False), sums.solve(False)
    assert close(found, expected.weight, expected.bias)
    drawn = found(x.movedim(-1, 1).reshape(2, 5, 3, 4))
    assert torch.allclose(drawn.flatten(2).movedim(1, -1), expected(x), atol=1e-4)
    assert torch.allclose(expected(x), x @ expected.weight.T + expected.bias, atol=1e-5)


def test_weights_are_those_of_the_squares():
    x, y = tokens(1, 5), tokens(2, 5)
    sums = LeastSquares()
    sums.add(x[:1], y[:1], weight=7.0)
    sums.add(x[1:], y[1:], weight=0.5)
    found = sums.solve(False, TINY)
    assert close(found, *lstsq(x, y, torch.tensor([7.0, 0.5]).repeat_interleave(30)))
    assert not close(found, *lstsq(x, y), 1e-2)


def test_ridge_is_the_penalty_that_it_says():
    """Minimum of |x W + b - y|^2 + ridge m |W - W0|^2, m the mean square of a channel: its gradient is 0."""
    x, y = tokens(1, 5), tokens(2, 5)
    rows, targets = x.reshape(-1, 5).double(), y.reshape(-1, 5).double()
    for residual in (False, True):
        sums = LeastSquares()
        sums.add(x, y)
        found = sums.solve(residual, 0.1)
        error = rows @ found.weight.double().T + found.bias.double() - targets
        pull = found.weight.double() - (torch.eye(5) if residual else 0)
        gradient = error.T @ rows + 0.1 * rows.square().sum(0).mean() * pull
        assert gradient.norm() / (error.T @ rows).norm() < 1e-5
        assert float(error.mean(0).abs().max()) < 1e-5  # of the bias, which is free


@pytest.mark.parametrize(("residual", "weight"), [(True, torch.eye(5)), (False, torch.zeros(5, 5))])
def test_ridge_pulls_to_what_skipping_does(residual, weight):
    x, y = tokens(1, 5), tokens(2, 5)
    sums = LeastSquares()
    sums.add(x, y)
    found = sums.solve(residual, 1e9)
    assert torch.allclose(found.weight, weight, atol=1e-6)
    assert torch.allclose(found.bias, (y - x if residual else y).mean((0, 1)), atol=1e-4)


def test_fewer_samples_than_channels():
    x, y = noise(1, 3, 8, seed=1), noise(1, 3, 8, seed=2)
    sums = LeastSquares()
    sums.add(x, y)
    assert relative(sums.solve(True)(x), y) < 0.05


def test_half_precision_features_are_summed_in_double():
    x = 1 + noise(1, 2000, 4, seed=1).half()
    sums = LeastSquares()
    sums.add(x, 2 * x)
    assert torch.allclose(sums.solve(False, TINY).weight, 2 * torch.eye(4), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_map_follows_the_type_of_its_input_and_has_no_gradient(dtype):
    exit_map = LinearExit(noise(3, 5), noise(3))
    assert exit_map(tokens(1, 5).to(dtype)).dtype == dtype
    assert exit_map.weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in exit_map.parameters())
