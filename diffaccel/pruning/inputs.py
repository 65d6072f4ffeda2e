"""Random inputs that a denoiser accepts, shaped as its pipeline would: to count, to time, to compare outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor

CLIP_TOKENS = 77
T5_TOKENS = {"pixart-alpha": 120, "pixart-sigma": 300, "sd3": 256, "flux": 512}
FLUX_SIDE = 128  # latents of 1024 px; the config knows no size
TIME_IDS = 6  # of SDXL: original size, corner of the crop, target size


def example_inputs(
    model: torch.nn.Module,
    *,
    batch: int = 1,
    size: int | tuple[int, int] | None = None,
    text_length: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments for `model(**inputs)`: normal latents and embeddings, a random time and label, no masks.

    Numbers are drawn in float32 on the CPU, so that a seed gives the same on every device. On the meta device only the
    shapes remain.

    Args:
        model: a `UNet2DModel`, `UNet2DConditionModel`, `DiTTransformer2DModel`, `PixArtTransformer2DModel`,
            `SD3Transformer2DModel` or `FluxTransformer2DModel`.
        batch: samples in the call; classifier-free guidance makes two of each.
        size: side or (height, width) of the latents, before Flux packs 2x2 of them into a token. Default: the config's
            `sample_size`; for Flux 128, which is 1024 px.
        text_length: tokens of the prompt. Default: as in the pipelines: 77; PixArt-alpha 120, PixArt-sigma 300 (told
            apart at 1024 px, where only alpha has additional conditions; 120 for smaller networks); SD3 77 + 256;
            Flux 512.
        device: default: the model's.
        dtype: of what is not an index. Default: the model's.
        seed: of the numbers.

    Raises:
        TypeError: if the network is of another class.
        ValueError: if it needs a size, or is conditioned on images (Kandinsky), or `size` does not fit its patches.
    """
    known: dict[type, Callable[..., dict[str, Any]]] = {
        diffusers.UNet2DModel: _unet,
        diffusers.UNet2DConditionModel: _conditional_unet,
        diffusers.DiTTransformer2DModel: _dit,
        diffusers.PixArtTransformer2DModel: _pixart,
        diffusers.SD3Transformer2DModel: _sd3,
        diffusers.FluxTransformer2DModel: _flux,
    }
    make = next((make for kind, make in known.items() if isinstance(model, kind)), None)
    if make is None:
        names = ", ".join(kind.__name__ for kind in known)
        raise TypeError(f"no example inputs for {type(model).__name__}; known are {names}; give the inputs yourself")
    net: Any = model  # `config`, `device` and `dtype` come from Diffusers' mixins
    height, width = _side(net, size)
    draw = torch.Generator().manual_seed(seed)
    inputs = make(net, draw, batch, height, width, text_length)
    return _place(inputs, device if device is not None else net.device, dtype or net.dtype)


def _side(model: Any, size: int | tuple[int, int] | None) -> tuple[int, int]:
    flux = isinstance(model, diffusers.FluxTransformer2DModel)
    if size is None:
        size = FLUX_SIDE if flux else model.config.sample_size
    if size is None:
        raise ValueError("the config of this network has no sample_size; write size=64, the side of the latents")
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    patch = 2 if flux else getattr(model.config, "patch_size", 1)
    if height % patch or width % patch or min(height, width) < 1:
        raise ValueError(f"size {height}x{width} does not fit: give multiples of {patch}, the patch of this network")
    if isinstance(model, diffusers.DiTTransformer2DModel) and height != width:
        raise ValueError(f"size {height}x{width} does not fit: DiT in Diffusers makes squares only")
    return height, width


def _place(inputs: Any, device: torch.device | str, dtype: torch.dtype) -> Any:
    """The same with floating-point tensors as `dtype` and all of them on `device`."""
    if isinstance(inputs, dict):
        return {name: _place(value, device, dtype) for name, value in inputs.items()}
    return inputs.to(device, dtype if inputs.is_floating_point() else None)


def _normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw)


def _time(draw: torch.Generator, batch: int, steps: int = 1000) -> Tensor:
    """One time for all rows, as in a pipeline; not 0, of which Fourier features take the logarithm."""
    return torch.randint(1, steps, (1,), generator=draw).expand(batch).clone()


def _unet(model: Any, draw: torch.Generator, batch: int, height: int, width: int, _: int | None) -> dict[str, Any]:
    steps = model.config.num_train_timesteps or 1000  # the rows of the table where times are learned
    inputs = {"sample": _normal(draw, batch, model.config.in_channels, height, width)}
    inputs["timestep"] = _time(draw, batch, steps)
    return inputs | _labels(model, draw, batch)


def _conditional_unet(
    model: Any, draw: torch.Generator, batch: int, height: int, width: int, text: int | None
) -> dict[str, Any]:
    config = model.config
    if config.encoder_hid_dim_type not in (None, "text_proj"):
        raise ValueError(f"no example inputs for encoder_hid_dim_type {config.encoder_hid_dim_type!r}: it takes images")
    if config.addition_embed_type not in (None, "text", "text_time"):
        raise ValueError(f"no example inputs for addition_embed_type {config.addition_embed_type!r}: it takes images")
    wide = config.encoder_hid_dim or config.cross_attention_dim
    wide = wide if isinstance(wide, int) else wide[0]
    inputs: dict[str, Any] = {
        "sample": _normal(draw, batch, config.in_channels, height, width),
        "timestep": _time(draw, batch),
        "encoder_hidden_states": _normal(draw, batch, text or CLIP_TOKENS, wide),
    }
    if config.time_cond_proj_dim is not None:  # latent consistency models: the embedded guidance scale
        inputs["timestep_cond"] = _normal(draw, batch, config.time_cond_proj_dim)
    if config.addition_embed_type == "text_time":
        # The network sees one vector: pooled text, then Fourier features of the ids. The refiner has five ids and wider
        # text than what comes out here; the vector is as long.
        total, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
        ids = min(TIME_IDS, (total - 1) // each)
        inputs["added_cond_kwargs"] = {
            "text_embeds": _normal(draw, batch, total - ids * each),
            "time_ids": torch.tensor([8 * height, 8 * width, 0, 0, 8 * height, 8 * width][:ids]).repeat(batch, 1),
        }
    return inputs | _labels(model, draw, batch)


def _labels(model: Any, draw: torch.Generator, batch: int) -> dict[str, Tensor]:
    """Class labels of a U-Net: indices, times (of noise added to what it upscales) or vectors; nothing without."""
    if model.class_embedding is None:
        return {}
    kind = model.config.class_embed_type
    if kind is None:
        return {"class_labels": torch.randint(model.class_embedding.num_embeddings, (batch,), generator=draw)}
    if kind == "timestep":
        return {"class_labels": _time(draw, batch)}
    if kind == "identity":
        return {"class_labels": _normal(draw, batch, model.time_embedding.linear_2.out_features)}
    return {"class_labels": _normal(draw, batch, model.config.projection_class_embeddings_input_dim)}


def _dit(model: Any, draw: torch.Generator, batch: int, height: int, width: int, _: int | None) -> dict[str, Any]:
    return {
        "hidden_states": _normal(draw, batch, model.config.in_channels, height, width),
        "timestep": _time(draw, batch),
        "class_labels": torch.randint(model.config.num_embeds_ada_norm, (batch,), generator=draw),
    }


def _pixart(model: Any, draw: torch.Generator, batch: int, height: int, width: int, text: int | None) -> dict[str, Any]:
    config = model.config
    sigma = config.sample_size == 128 and not model.use_additional_conditions
    text = text or T5_TOKENS["pixart-sigma" if sigma else "pixart-alpha"]
    inputs: dict[str, Any] = {
        "hidden_states": _normal(draw, batch, config.in_channels, height, width),
        "encoder_hidden_states": _normal(draw, batch, text, config.caption_channels or config.cross_attention_dim),
        "timestep": _time(draw, batch),
    }
    if model.use_additional_conditions:
        sides = torch.tensor([8.0 * height, 8.0 * width])
        ratio = sides[:1] / sides[1:]
        inputs["added_cond_kwargs"] = {"resolution": sides.repeat(batch, 1), "aspect_ratio": ratio.repeat(batch, 1)}
    return inputs


def _sd3(model: Any, draw: torch.Generator, batch: int, height: int, width: int, text: int | None) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": _normal(draw, batch, config.in_channels, height, width),
        "encoder_hidden_states": _normal(
            draw, batch, text or CLIP_TOKENS + T5_TOKENS["sd3"], config.joint_attention_dim
        ),
        "pooled_projections": _normal(draw, batch, config.pooled_projection_dim),
        "timestep": _time(draw, batch).float(),
    }


def _flux(model: Any, draw: torch.Generator, batch: int, height: int, width: int, text: int | None) -> dict[str, Any]:
    config = model.config
    text = text or T5_TOKENS["flux"]
    # Positions are (0, row, column); those of text are all 0.
    places = torch.cartesian_prod(torch.arange(1), torch.arange(height // 2), torch.arange(width // 2))
    inputs = {
        "hidden_states": _normal(draw, batch, len(places), config.in_channels),
        "encoder_hidden_states": _normal(draw, batch, text, config.joint_attention_dim),
        "pooled_projections": _normal(draw, batch, config.pooled_projection_dim),
        "timestep": _time(draw, batch).float() / 1000,
        "img_ids": places.float(),
        "txt_ids": torch.zeros(text, 3),
    }
    return inputs | ({"guidance": torch.full((batch,), 3.5)} if config.guidance_embeds else {})
