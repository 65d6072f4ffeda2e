from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from diffaccel.pruning.inputs import example_inputs


def unet(**config: Any) -> diffusers.UNet2DModel:
    return diffusers.UNet2DModel(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        **{"sample_size": 8} | config,
    ).eval()


def conditional_unet(**config: Any) -> diffusers.UNet2DConditionModel:
    small = {"sample_size": 8, "cross_attention_dim": 8}
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **small | config,
    ).eval()


SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 2, "projection_class_embeddings_input_dim": 20}
REFINER = SDXL | {"projection_class_embeddings_input_dim": 11}  # five time ids


def dit(**config: Any) -> diffusers.DiTTransformer2DModel:
    heads = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "norm_num_groups": 4}
    small = {"sample_size": 8, "num_embeds_ada_norm": 10}
    return diffusers.DiTTransformer2DModel(in_channels=4, out_channels=8, **heads, **small | config).eval()


def pixart(**config: Any) -> diffusers.PixArtTransformer2DModel:
    heads = {"num_attention_heads": 2, "attention_head_dim": 6, "num_layers": 1, "norm_num_groups": 4}
    small = {"sample_size": 8, "cross_attention_dim": 12, "caption_channels": 6}
    return diffusers.PixArtTransformer2DModel(in_channels=4, out_channels=8, **heads, **small | config).eval()


def sd3() -> diffusers.SD3Transformer2DModel:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        caption_projection_dim=8,
        joint_attention_dim=6,
        pooled_projection_dim=5,
    ).eval()


def flux(guidance_embeds: bool) -> diffusers.FluxTransformer2DModel:
    return diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        axes_dims_rope=(4, 4, 4),
        guidance_embeds=guidance_embeds,
    ).eval()


NETWORKS = {
    "ddpm": lambda: unet(),
    "ddpm classes": lambda: unet(num_class_embeds=3),
    "ddpm times as classes": lambda: unet(class_embed_type="timestep"),
    "ddpm vectors as classes": lambda: unet(class_embed_type="identity"),
    "ddpm learned times": lambda: unet(time_embedding_type="learned", num_train_timesteps=5),
    "score": lambda: unet(time_embedding_type="fourier"),
    "sd": lambda: conditional_unet(),
    "sd projected text": lambda: conditional_unet(encoder_hid_dim=6),
    "sd upscaler": lambda: conditional_unet(num_class_embeds=1000),
    "unclip": lambda: conditional_unet(class_embed_type="projection", projection_class_embeddings_input_dim=7),
    "lcm": lambda: conditional_unet(time_cond_proj_dim=7),
    "sdxl": lambda: conditional_unet(**SDXL),
    "refiner": lambda: conditional_unet(**REFINER),
    "dit": lambda: dit(),
    "pixart": lambda: pixart(use_additional_conditions=False),
    "pixart with conditions": lambda: pixart(use_additional_conditions=True),
    "sd3": lambda: sd3(),
    "flux dev": lambda: flux(guidance_embeds=True),
    "flux schnell": lambda: flux(guidance_embeds=False),
}


def flat(inputs: Any) -> list[torch.Tensor]:
    return [tensor for value in inputs.values() for tensor in (flat(value) if isinstance(value, dict) else [value])]


@pytest.mark.parametrize("name", NETWORKS)
def test_network_takes_its_inputs(name: str) -> None:
    model = NETWORKS[name]()
    size = 8 if name.startswith("flux") else None
    inputs = example_inputs(model, batch=2, size=size)
    with torch.no_grad():
        out = model(**inputs)[0]
    assert out.shape[0] == 2
    assert out.isfinite().all()

    shapes = {key: value.shape for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    with torch.no_grad():
        on_meta = model.to("meta")(**example_inputs(model, batch=2, size=size))[0]
    assert on_meta.device.type == "meta"
    assert on_meta.shape == out.shape
    again = example_inputs(model, batch=2, size=size)
    assert {key: value.shape for key, value in again.items() if isinstance(value, torch.Tensor)} == shapes


def test_seed_decides_the_numbers() -> None:
    model = conditional_unet(**SDXL)
    first, same, other = (flat(example_inputs(model, seed=seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])  # the time


def test_rows_of_a_call_share_the_time() -> None:
    assert example_inputs(dit(), batch=5)["timestep"].unique().numel() == 1


def test_labels_are_below_their_number() -> None:
    assert max(int(example_inputs(dit(), batch=64, seed=seed)["class_labels"].max()) for seed in range(4)) == 9


def test_dtype_is_the_models_and_indices_stay() -> None:
    inputs = example_inputs(dit().to(torch.bfloat16))
    assert inputs["hidden_states"].dtype == torch.bfloat16
    assert inputs["class_labels"].dtype == torch.int64
    assert example_inputs(dit(), dtype=torch.float16)["hidden_states"].dtype == torch.float16


def test_place_is_the_models_unless_given() -> None:
    inputs = example_inputs(conditional_unet(**SDXL), device="meta")
    assert {tensor.device.type for tensor in flat(inputs)} == {"meta"}


def test_sizes() -> None:
    assert example_inputs(conditional_unet(), size=(8, 12))["sample"].shape == (1, 4, 8, 12)
    assert example_inputs(conditional_unet())["sample"].shape == (1, 4, 8, 8)
    packed = example_inputs(flux(False), size=(4, 8))
    assert packed["hidden_states"].shape == (1, 8, 16)
    assert packed["img_ids"].tolist()[5] == [0, 1, 1]
    assert example_inputs(flux(False))["hidden_states"].shape == (1, 64 * 64, 16)


@pytest.mark.parametrize(
    ("make", "tokens"),
    [
        (conditional_unet, 77),
        (lambda: pixart(use_additional_conditions=False), 120),
        (lambda: pixart(use_additional_conditions=False, sample_size=128), 300),
        (lambda: pixart(use_additional_conditions=True, sample_size=128), 120),
        (sd3, 333),
        (lambda: flux(False), 512),
    ],
)
def test_text_is_as_long_as_in_the_pipelines(make: Any, tokens: int) -> None:
    model = make()
    assert example_inputs(model, size=8)["encoder_hidden_states"].shape[1] == tokens
    assert example_inputs(model, size=8, text_length=3)["encoder_hidden_states"].shape[1] == 3


def test_other_networks_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"Linear; known are UNet2DModel, .* give the inputs yourself"):
        example_inputs(nn.Linear(2, 2))


def test_images_as_conditions_are_refused() -> None:
    with pytest.raises(ValueError, match="takes images"):
        example_inputs(conditional_unet(encoder_hid_dim=8, encoder_hid_dim_type="image_proj"))
    with pytest.raises(ValueError, match="takes images"):
        example_inputs(conditional_unet(encoder_hid_dim=8, addition_embed_type="image"))


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="write size=64"):
        example_inputs(unet(sample_size=None))
    with pytest.raises(ValueError, match="multiples of 2"):
        example_inputs(sd3(), size=7)
    with pytest.raises(ValueError, match="multiples of 2"):
        example_inputs(flux(False), size=(8, 7))
    with pytest.raises(ValueError, match="squares only"):
        example_inputs(dit(), size=(8, 16))
