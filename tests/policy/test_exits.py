"""A network that leaves early computes what the whole network does whose inner features another hand overwrites."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from diffaccel.cost import macs, macs_by_module
from diffaccel.pruning.inputs import example_inputs
from diffaccel.samplers.policy.exits import LinearExit, layers, shallow
from tests.pruning.toys import TOYS, toy
from tests.tiny import noise, relative

CLOSE = 1e-5
UNETS = ("unconditional", "resampling", "sd15", "deep_sd15", "sdxl", "three_levels")
TRANSFORMERS = tuple(name for name in TOYS if name not in UNETS)
SIMPLE: dict[str, Any] = {
    "block_out_channels": (4, 8),
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "mid_block_type": None,
}
WITH_TEXT = ("sd15", "sdxl", "deep_sd15", "three_levels")


def three_levels() -> Any:
    """Two depths, and attention in the middle one."""
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        **{"sample_size": 16, "norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 8},
    )
    return model.eval()


@cache
def network(name: str) -> Any:
    return three_levels() if name == "three_levels" else toy(name)


def inputs(model: Any, **more: Any) -> dict[str, Any]:
    flux, text = isinstance(model, diffusers.FluxTransformer2DModel), "encoder_hidden_states" in example_inputs(model)
    return example_inputs(model, **({"size": 8} if flux else {}), **({"text_length": 4} if text else {}), **more)


def output(model: Any, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**given, return_dict=False)[0]


def blocks(model: Any) -> list[Any]:
    return [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())]


def a_map(channels: int, out: int | None = None) -> LinearExit:
    return LinearExit(noise(out or channels, channels, seed=1) / channels**0.5, noise(out or channels, seed=2))


def tokens(args: Any, kwargs: Any) -> Tensor:
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


@contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# Transformers


def passed_through(model: Any, depth: int, change: Callable[[Tensor], Tensor]) -> Any:
    """The blocks from `depth` on give back what they got, the first of them changed."""

    def overwrite(index: int) -> Any:
        def hook(_: Any, args: Any, kwargs: Any, result: Any) -> Any:
            x = tokens(args, kwargs)
            x = change(x) if index == depth else x
            return (kwargs.get("encoder_hidden_states"), x) if isinstance(result, tuple) else x

        return hook

    found = list(enumerate(blocks(model)))[depth:]
    return hooked(*(block.register_forward_hook(overwrite(i), with_kwargs=True) for i, block in found))


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_leaves_at_every_depth(name, mapped):
    model = network(name)
    given = inputs(model, batch=2)
    exit_map = a_map(model.inner_dim) if mapped else None
    for depth in range(1, layers(model)):
        with passed_through(model, depth, exit_map or (lambda x: x)):
            expected = output(model, given)
        assert relative(output(shallow(model, depth, exit_map), given), expected) < CLOSE
        assert relative(expected, output(model, given)) > 1e-3
    assert layers(model) == len(blocks(model))
    assert shallow(model, layers(model)) is model


@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if "dit" not in name])
def test_transformer_of_pictures_that_are_no_squares(name):
    model = network(name)
    given = inputs(model) if name == "flux" else inputs(model, size=(6, 8))
    if name == "flux":
        places = torch.cartesian_prod(*map(torch.arange, (1, 4, 3))).float()
        given |= {"hidden_states": noise(1, 12, 16), "img_ids": places}
    with passed_through(model, 1, lambda x: x):
        expected = output(model, given)
    assert relative(output(shallow(model, 1), given), expected) < CLOSE


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_residuals_of_a_controlnet_go_to_the_blocks_that_they_are_for(name):
    """Those of skipped blocks are added too: they are shared out by the number of blocks."""
    model = network(name)
    given = inputs(model)
    width = output(model, given).shape[1] if name == "flux" else 64
    residuals = [noise(1, width, model.inner_dim, seed=i) for i in range(3 if name == "flux" else 2)]
    given |= {"controlnet_block_samples" if name == "flux" else "block_controlnet_hidden_states": residuals}
    if name == "flux":
        given |= {"controlnet_single_block_samples": residuals[:2]}
    for depth in range(1, layers(model)):
        exit_map = a_map(model.inner_dim)
        with passed_through(model, depth, exit_map):
            expected = output(model, given)
        assert relative(output(shallow(model, depth, exit_map), given), expected) < CLOSE


# U-Nets


def without_bodies(model: Any, depth: int) -> Any:
    """A copy in which what is inside adds nothing: its last layers are 0."""
    copied = copy.deepcopy(model)
    count = layers(model)
    stages = [*copied.down_blocks[depth:], *copied.up_blocks[: count - depth], copied.mid_block]
    last = [module for stage in stages if stage is not None for module in _last_layers(stage)]
    for parameter in (parameter for layer in last for parameter in layer.parameters()):
        parameter.data.zero_()
    return copied


def _last_layers(stage: Any) -> Iterator[nn.Module]:
    for resnet in stage.resnets:
        yield resnet.conv2
    for attention in getattr(stage, "attentions", ()):
        if attention is not None:
            yield attention.proj_out if hasattr(attention, "proj_out") else attention.to_out[0]


@pytest.mark.parametrize("name", UNETS)
def test_shortcuts_of_a_unet(name):
    model = network(name)
    given = inputs(model, batch=2)
    for depth in range(1, layers(model)):
        expected = output(without_bodies(model, depth), given)
        assert relative(output(shallow(model, depth), given), expected) < CLOSE
        assert relative(expected, output(model, given)) > 1e-3


def overwritten(model: Any, depth: int, exit_map: Any, more: Tensor | float = 0.0) -> Any:
    """What goes into the upsampler out of level `depth` is the map of what went into that level, and `more`."""
    heard = {}

    def hear(_: Any, args: Any, kwargs: Any) -> None:
        heard["x"] = tokens(args, kwargs).clone()

    def overwrite(_: Any, args: Any) -> Any:
        return exit_map(heard["x"] + more), *args[1:]

    upsampler = model.up_blocks[layers(model) - 1 - depth].upsamplers[0]
    down = model.down_blocks[depth].register_forward_pre_hook(hear, with_kwargs=True)
    return hooked(down, upsampler.register_forward_pre_hook(overwrite))


def unet_map(model: Any, depth: int) -> LinearExit:
    channels = model.config.block_out_channels
    return a_map(channels[depth - 1], channels[depth])


SIZES = [(name, size) for name in UNETS for size in ([None, (8, 16), (11, 14)] if name in WITH_TEXT else [None])]


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_map_in_a_unet(name, size):
    """Odd sizes too, where the way up is told the sizes of the way down."""
    model = network(name)
    given = inputs(model, batch=2, size=size)
    for depth in range(1, layers(model)):
        exit_map = unet_map(model, depth)
        with overwritten(model, depth, exit_map):
            expected = output(model, given)
        assert relative(output(shallow(model, depth, exit_map), given), expected) < CLOSE
        assert relative(expected, output(model, given)) > 1e-3


def skips(model: Any) -> list[tuple[int, int]]:
    """Channels and sides of what a ControlNet adds to, and of the middle."""
    channels, per_level = model.config.block_out_channels, model.config.layers_per_block
    found = [(channels[0], 16)]
    for i, width in enumerate(channels):
        last = i == len(channels) - 1
        found += [(width, 16 >> i)] * per_level + ([] if last else [(width, 16 >> i + 1)])
    return [*found, (channels[-1], 16 >> len(channels) - 1)]


@pytest.mark.parametrize("name", WITH_TEXT)
def test_controlnet_of_a_unet(name):
    model = network(name)
    *down, middle = [noise(1, width, side, side, seed=i) for i, (width, side) in enumerate(skips(model))]
    given = inputs(model) | {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    for depth in range(1, layers(model)):
        expected = output(without_bodies(model, depth), given)
        assert relative(output(shallow(model, depth), given), expected) < CLOSE
        exit_map = unet_map(model, depth)
        with overwritten(model, depth, exit_map, down[depth * (model.config.layers_per_block + 1)]):
            expected = output(model, given)
        assert relative(output(shallow(model, depth, exit_map), given), expected) < CLOSE


@pytest.mark.parametrize("name", WITH_TEXT)
def test_t2i_adapter(name):
    """Features for every level; those of levels that are not there go nowhere."""
    model = network(name)
    channels = model.config.block_out_channels
    crossed = [hasattr(block, "attentions") for block in model.down_blocks]
    sides = [16 >> i + (not c and i < len(channels) - 1) for i, c in enumerate(crossed)]
    features = [
        noise(1, width, side, side, seed=i) for i, (width, side) in enumerate(zip(channels, sides, strict=True))
    ]

    def given() -> dict[str, Any]:  # Diffusers empties the list
        return inputs(model) | {"down_intrablock_additional_residuals": [feature.clone() for feature in features]}

    for depth in range(1, layers(model)):
        assert relative(output(shallow(model, depth), given()), output(without_bodies(model, depth), given())) < CLOSE
        exit_map = unet_map(model, depth)
        with overwritten(model, depth, exit_map):
            expected = output(model, given())
        assert relative(output(shallow(model, depth, exit_map), given()), expected) < CLOSE


# What it costs, and what is refused


@pytest.mark.parametrize(("name", "count"), [("dit", 16), ("sd3", 64), ("flux", 16)])
def test_cost_of_a_transformer(name, count):
    """The whole network's without the blocks that are skipped, and with the map of `count` tokens."""
    model = network(name)
    given = inputs(model)
    counted = macs_by_module(model, **given)
    names = [f"{part}.{i}" for part in ("transformer_blocks", "single_transformer_blocks") for i in range(9)]
    of_blocks = [counted[key] for key in names if key in counted]
    for depth in range(1, layers(model)):
        left = counted[""] - sum(of_blocks[depth:])
        assert macs(shallow(model, depth), **given) == left
        exit_map = a_map(model.inner_dim)
        assert macs(shallow(model, depth, exit_map), **given) == left + count * exit_map.weight.numel()


@pytest.mark.parametrize("depth", [1, 2])
def test_cost_of_a_unet(depth):
    """That of the levels which are left, of the upsampler into them, and of the map of all pixels at the exit."""
    model = network("three_levels")
    given = inputs(model)
    counted = macs_by_module(model, **given)
    kept = [key for key in ("time_embedding", "conv_in", "conv_out") if key in counted]
    kept += [f"down_blocks.{i}" for i in range(depth)] + [f"up_blocks.{i}" for i in range(3 - depth, 3)]
    kept += [f"up_blocks.{2 - depth}.upsamplers.0"]
    exit_map = unet_map(model, depth)
    own = macs(shallow(model, depth, exit_map), **given)
    assert own == sum(counted[key] for key in kept) + (16 >> depth) ** 2 * exit_map.weight.numel()


@pytest.mark.parametrize("depth", [0, 4, -1])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match="has depths 1 to 3 here"):
        shallow(network("dit"), depth)


def test_other_networks_and_levels_are_refused():
    with pytest.raises(TypeError, match="cannot leave early a Linear; known are"):
        layers(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="cannot leave early what torch"):
        layers(torch.compile(network("dit"), backend="eager"))
    other = diffusers.UNet2DConditionModel(**SIMPLE, down_block_types=("DownBlock2D", "KDownBlock2D"))
    with pytest.raises(TypeError, match="exit before a KDownBlock2D is not known"):
        shallow(other, 1)
