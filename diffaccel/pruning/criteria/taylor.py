"""Taylor: how much the network's output changes without a unit, to first order, over all recorded timesteps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers.utils import logging
from torch import Tensor, nn

from diffaccel.pruning.calibration import Calibration, run, still
from diffaccel.pruning.criteria.scores import Scores, check
from diffaccel.pruning.gates import gate
from diffaccel.pruning.groups import Group

# For each call. A score's standard error is sqrt(2 / (projections * calls)) of it if all calls count alike (12 % with
# 32 calls). More of them hardly changed the ranking on `emoji-sd`; calls do as well, and show the network more.
PROJECTIONS = 4


def taylor(model: nn.Module, groups: Sequence[Group], calibration: Calibration, *, seed: int = 0) -> Scores:
    """Mean squared change of the network's prediction when a unit's gate goes from 1 to 0, to first order.

    That change is the derivative of the prediction by the gate, a tensor for each unit. Its mean square is estimated
    for all units at once from the gradients of a few random projections of the prediction on signs (Hutchinson). Calls
    count by their influence on the last latent (`Call.weight`).

    Diff-Pruning (arXiv:2305.10924) sums |gradient * weight| of the denoising loss over timesteps instead. We depart:
    that loss needs training pictures, which who prunes a checkpoint does not have, and where a network is trained to
    the end its gradient is the noise of the batch, while the prediction still depends on every unit. This is the
    output loss of LAPTOP-Diff (arXiv:2404.11098), or a Gauss-Newton Fisher score, linearised. Linear is right for
    small units; a whole block may change the prediction by far more or less.

    Memory is that of a training step without weight gradients; `model.enable_gradient_checkpointing()` helps.

    Raises:
        ValueError: if there is no group, a score is not finite, or the network is in float16.
    """
    if any(weight.dtype == torch.float16 for weight in model.parameters()):
        raise ValueError("gradients vanish in float16; use taylor on the network in float32 or bfloat16")
    draw = torch.Generator().manual_seed(seed)
    gates = {group.name: torch.ones(group.units, requires_grad=True) for group in groups}
    sums = {group.name: np.zeros(group.units) for group in groups}
    with still(model), gate(model, groups, gates), torch.enable_grad():
        for call in logging.tqdm(calibration.calls, desc="taylor"):
            output = run(model, call)
            for i in range(PROJECTIONS):
                gradients = _projected(output, list(gates.values()), draw, keep=i < PROJECTIONS - 1)
                for name, gradient in zip(gates, gradients, strict=True):
                    sums[name] += call.weight * gradient.double().square().numpy()
    weight = sum(call.weight for call in calibration.calls)
    return check({name: total / (PROJECTIONS * weight) for name, total in sums.items()})


def _projected(output: Tensor, gates: list[Tensor], draw: torch.Generator, *, keep: bool) -> tuple[Tensor, ...]:
    """Gradients by the gates of a random projection of `output`: their mean square is the mean squared derivative."""
    signs = torch.randint(0, 2, output.shape, generator=draw) * 2 - 1
    direction = (signs / output.numel() ** 0.5).to(output.device, output.dtype)
    return torch.autograd.grad(output, gates, direction, retain_graph=keep, materialize_grads=True)
