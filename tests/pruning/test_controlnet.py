"""ControlNets of the original with a U-Net that has lost layers."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from diffaccel.pruning import PruningPlan, cut, example_inputs, fit_controlnet, mask
from tests.pruning import toys

LAYERS = [
    {"down_blocks.0.layer.1": [0]},
    {"down_blocks.0.layer.2": [0], "down_blocks.1.layer.1": [0]},
    {"down_blocks.0.layer.1": [0], "down_blocks.0.layer.2": [0], "down_blocks.1.layer.2": [0], "mid_block": [0]},
]


def controlled(unet: Any, controlnet: Any, inputs: dict[str, Any], return_dict: bool = False) -> torch.Tensor:
    hint = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(7))
    found = controlnet(**inputs, controlnet_cond=hint, return_dict=return_dict)
    down, mid = found if isinstance(found, tuple) else (found.down_block_res_samples, found.mid_block_res_sample)
    with torch.no_grad():
        return unet(**inputs, down_block_additional_residuals=down, mid_block_additional_residual=mid)[0]


def network_and_controlnet() -> tuple[Any, Any]:
    unet = toys.toy("deep_sd15")
    controlnet = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 4, 4)).eval()
    for parameter in controlnet.parameters():  # its last layers start at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return unet, controlnet.requires_grad_(False)


@pytest.mark.parametrize("return_dict", [False, True])
@pytest.mark.parametrize("removed", LAYERS)
def test_fitted_controlnet_does_what_it_did_with_the_mask(removed, return_dict):
    unet, controlnet = network_and_controlnet()
    inputs = example_inputs(unet, size=8)
    plan = PruningPlan.of(unet, removed | {"up_blocks.1.resnets.0.channels": [0]})
    with mask(unet, plan):
        masked = controlled(unet, controlnet, inputs)
    smaller = cut(unet, plan)
    with fit_controlnet(controlnet, plan):
        fitted = controlled(smaller, controlnet, inputs, return_dict)
    assert float((fitted - masked).norm() / masked.norm()) < 1e-5
    with pytest.raises(RuntimeError):  # as it is: other sizes, in stages above the last
        controlled(smaller, controlnet, inputs)


def test_without_a_removed_layer_there_is_nothing_to_fit():
    unet, controlnet = network_and_controlnet()
    plan = PruningPlan.of(unet, {"up_blocks.1.resnets.0.channels": [0]})
    with pytest.raises(ValueError, match="fit as they are"):
        fit_controlnet(controlnet, plan)
    inputs = example_inputs(unet, size=8)
    with mask(unet, plan):
        masked = controlled(unet, controlnet, inputs)
    assert float((controlled(cut(unet, plan), controlnet, inputs) - masked).norm() / masked.norm()) < 1e-5
