"""Grow a trained U-Net or VAE to more layers a block without changing what it computes.

A new residual block starts as the identity: its second convolution is zero, and where it also takes a skip
connection its 1x1 shortcut passes the hidden channels and ignores the skip's. A new transformer has a zero output
projection. What is left to decide is where the old layers go, so that each meets the tensors it was trained on.
"""

# diffusers and torch annotate models, configs and outputs too loosely for these checks.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel
from torch import nn

TOLERANCE = 1e-5
_LAYER = re.compile(r"(down_blocks|up_blocks)\.\d+\.(?:resnets|attentions)\.(\d+)\.")

Position = Callable[[str, int], int | None]
Model = TypeVar("Model", bound=ModelMixin)


def unet_position(old: int, new: int) -> Position:
    """Where layer `index` of a U-Net block with `new` layers comes from in a block with `old`; None: it is new.

    Down blocks append the new layers, so the last skips of a level all equal the skip of its last old layer.
    An up block has one layer more and takes the skips in reverse. Its first layer must stay first, because it alone
    takes the channels of the block below; the skip it gets equals the one it knows. The new layers follow and get
    copies of that skip too; after them the old ones go on with the skips that they know.
    """
    extra = new - old

    def position(block: str, index: int) -> int | None:
        if block == "down_blocks":
            return index if index < old else None
        if index == 0:
            return 0
        return index - extra if index > extra else None

    return position


def vae_position(old: int, new: int) -> Position:
    """As `unet_position`, for an `AutoencoderKL`: no skips, so new layers are appended, one more in the decoder."""

    def position(block: str, index: int) -> int | None:
        return index if index < old + (block == "up_blocks") else None

    return position


@torch.no_grad()
def _make_identity(layer: nn.Module) -> None:
    if hasattr(layer, "proj_out"):
        nn.init.zeros_(layer.proj_out.weight)
        nn.init.zeros_(layer.proj_out.bias)
        return
    nn.init.zeros_(layer.conv2.weight)
    nn.init.zeros_(layer.conv2.bias)
    if layer.conv_shortcut is not None:  # hidden channels come first in the concatenation with the skip
        nn.init.dirac_(layer.conv_shortcut.weight)
        nn.init.zeros_(layer.conv_shortcut.bias)


def _transplant(old: nn.Module, new: nn.Module, position: Position) -> None:
    """Copy the weights of `old` to their places in `new` and make the layers that are new identities."""
    source, weights, fresh = old.state_dict(), new.state_dict(), set()
    for name, value in weights.items():
        match, origin = _LAYER.search(name), name
        if match:
            index = position(match[1], int(match[2]))
            if index is None:
                fresh.add(name[: match.end() - 1])
                continue
            origin = name[: match.start(2)] + str(index) + name[match.end(2) :]
        value.copy_(source[origin])
    new.load_state_dict(weights)
    for name in fresh:
        _make_identity(new.get_submodule(name))


def _like(model: Model, layers: int) -> Model:
    config = {**dict(model.config), "layers_per_block": layers}
    return type(model).from_config(config).to(model.device)


def _assert_close(before: torch.Tensor, after: torch.Tensor) -> None:
    error = ((before - after).abs().max() / before.abs().max()).item()
    if error > TOLERANCE:
        raise AssertionError(f"growth changed the function: relative error {error:.2e} > {TOLERANCE}")


@torch.no_grad()
def grow_unet(old: UNet2DConditionModel, layers: int) -> UNet2DConditionModel:
    """Return a U-Net with `layers` layers a block that computes what `old` (float32) does.

    Raises:
        AssertionError: When a comparison on random inputs finds a relative difference above 1e-5.
    """
    if old.config.layers_per_block == layers:
        return old
    new = _like(old, layers)
    _transplant(old, new, unet_position(old.config.layers_per_block, layers))
    size, device = old.config.sample_size, old.device
    latents = torch.randn(2, old.config.in_channels, size, size, device=device)
    text = torch.randn(2, 5, old.config.cross_attention_dim, device=device)
    time = torch.tensor([20, 700], device=device)
    _assert_close(old.eval()(latents, time, text).sample, new.eval()(latents, time, text).sample)
    return new


@torch.no_grad()
def grow_vae(old: AutoencoderKL, layers: int) -> AutoencoderKL:
    """Return a VAE with `layers` layers a block that computes what `old` (float32) does.

    Raises:
        AssertionError: When a comparison on random inputs finds a relative difference above 1e-5.
    """
    if old.config.layers_per_block == layers:
        return old
    new = _like(old, layers)
    _transplant(old, new, vae_position(old.config.layers_per_block, layers))
    size = old.config.sample_size
    images = torch.randn(2, old.config.in_channels, size, size, device=old.device)
    _assert_close(old.eval().encode(images).latent_dist.mean, new.eval().encode(images).latent_dist.mean)
    _assert_close(old(images).sample, new(images).sample)
    return new
