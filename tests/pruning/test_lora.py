"""A LoRA of the original on the pruned network: fused and then cut, or cut and then loaded, is the same network."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffaccel.pruning.find import find_groups
from diffaccel.pruning.groups import WIDTH
from diffaccel.pruning.inputs import example_inputs
from diffaccel.pruning.lora import remap_lora
from diffaccel.pruning.plan import PruningPlan
from diffaccel.pruning.surgery import cut
from tests.tiny import noise, relative

peft = pytest.importorskip("peft")
CLOSE = 1e-5
RANK = 2


def unet(**config: Any) -> Any:
    default = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "layers_per_block": 2}
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=(2, 4),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **default | config,
    )


TEXT_TIME = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 2,
    "projection_class_embeddings_input_dim": 20,
}
SMALL = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 4, "sample_size": 8}
BUILD = {
    "sd": unet,
    "sdxl": lambda: unet(transformer_layers_per_block=(1, 3), use_linear_projection=True, **TEXT_TIME),
    "dit": lambda: diffusers.DiTTransformer2DModel(
        in_channels=4, out_channels=8, norm_num_groups=4, num_embeds_ada_norm=10, **SMALL
    ),
    "pixart": lambda: diffusers.PixArtTransformer2DModel(
        in_channels=4, cross_attention_dim=8, caption_channels=8, use_additional_conditions=False, **SMALL
    ),
    "sd3": lambda: diffusers.SD3Transformer2DModel(
        in_channels=4, out_channels=4, caption_projection_dim=8, joint_attention_dim=8, pooled_projection_dim=8, **SMALL
    ),
    "flux": lambda: diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    ),
    "ddpm": lambda: diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=2,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    ),
}
DEPTHS = {
    "sd": ("down_blocks.1.layer.1", "up_blocks.0.attentions.0.transformer_blocks.0"),
    "sdxl": ("down_blocks.0.layer.1", "up_blocks.0.attentions.1.transformer_blocks.0", "mid_block.attentions.0"),
    "dit": ("transformer_blocks.1", "transformer_blocks.2"),
    "pixart": ("transformer_blocks.0", "transformer_blocks.2"),
    "sd3": ("transformer_blocks.0", "transformer_blocks.3"),  # the last: another becomes the last
    "flux": ("transformer_blocks.0", "single_transformer_blocks.1", "single_transformer_blocks.2"),
    "ddpm": ("down_blocks.1.layer.1", "mid_block"),
}


@cache
def model_of(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BUILD[name]().eval()
        for parameter in model.parameters():  # no zeros and ones: nothing should be right by chance
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def plan_of(name: str, what: str) -> PruningPlan:
    """Units of every group of width, all of some; the blocks of DEPTHS; both."""
    model, removed = model_of(name), {}
    if what != "width":
        removed |= dict.fromkeys(DEPTHS[name], (0,))
    if what != "depth":
        groups = find_groups(model).of(*WIDTH)
        for i, group in enumerate(groups):
            removed[group.name] = range(group.units if i % 5 == 2 else group.units // 2)
    return PruningPlan.of(model, removed)


def lora_of(model: nn.Module, prefix: str = "", scale: float = 0.3) -> dict[str, Tensor]:
    """On every Linear and convolution of the blocks and beside them."""
    state, seed = {}, 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        weight, seed = module.weight, seed + 2
        if min(weight.shape[:2]) < 1:
            continue
        state[f"{prefix}{name}.lora_A.weight"] = scale * noise(RANK, *weight.shape[1:], seed=seed)
        end = (1,) * (weight.ndim - 2)
        state[f"{prefix}{name}.lora_B.weight"] = scale * noise(weight.shape[0], RANK, *end, seed=seed + 1)
    return state


def fused(model: nn.Module, lora: dict[str, Tensor], scale: float = 1.0) -> Any:
    """A copy of `model` whose weights have B A added."""
    result = copy.deepcopy(model)
    for key, a in lora.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            b = lora[f"{name}.lora_B.weight"].flatten(1)
            weight = result.get_parameter(f"{name}.weight").data
            weight += scale * (b @ a.flatten(1)).view_as(weight)
    return result


def load(model: Any, lora: dict[str, Tensor]) -> Any:
    if hasattr(model, "load_lora_adapter"):
        model.load_lora_adapter(dict(lora), prefix=None)
        return model
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=sorted({key.split(".lora")[0] for key in lora}))
    peft.inject_adapter_in_model(config, model)
    outcome = peft.set_peft_model_state_dict(model, lora)
    assert not outcome.unexpected_keys
    return model


def output(model: Any) -> Tensor:
    text = {} if "UNet2DModel" in type(model).__name__ or "DiT" in type(model).__name__ else {"text_length": 4}
    with torch.no_grad():
        return model(**example_inputs(model, **text), return_dict=False)[0]


@pytest.mark.parametrize("what", ["width", "depth", "both"])
@pytest.mark.parametrize("name", BUILD)
def test_fused_then_cut_is_cut_then_loaded(name, what):
    model, plan = model_of(name), plan_of(name, what)
    lora = lora_of(model)
    expected = output(cut(fused(model, lora), plan))
    smaller = cut(model, plan)
    plain = output(smaller)
    result = output(load(smaller, remap_lora(lora, plan)))
    assert relative(result, expected) < CLOSE
    assert relative(plain, expected) > 1e-2  # the LoRA does something


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart", "sd3", "flux"])
def test_without_remapping_it_lands_on_wrong_blocks_without_an_error(name):
    """Why this file exists. (DiT's is loaded by PEFT, which says what it did not find.)"""
    model, plan = model_of(name), plan_of(name, "depth")
    before, after = model.state_dict(), cut(model, plan).state_dict()
    same = {key for key in after if key in before and before[key].shape == after[key].shape}  # others are noticed
    lora = {key: value for key, value in lora_of(model).items() if key.rpartition(".lora")[0] + ".weight" in same}
    expected = output(cut(fused(model, lora), plan))
    assert relative(output(load(cut(model, plan), remap_lora(lora, plan))), expected) < CLOSE
    assert relative(output(load(cut(model, plan), lora)), expected) > 1e-2


def test_of_a_network_pruned_twice():
    model, first = model_of("sd3"), plan_of("sd3", "both")
    lora = lora_of(model)
    once = cut(model, first)
    heads = next(group for group in find_groups(once).of("heads") if group.units > 0 and "blocks.1" in group.name)
    second = PruningPlan.of(once, {"transformer_blocks.0": [0], heads.name: [0]})
    expected = output(cut(cut(fused(model, lora), first), second))
    result = output(load(cut(once, second), remap_lora(remap_lora(lora, first), second)))
    assert relative(result, expected) < CLOSE


def test_first_block_of_dit_when_the_embedders_are_shared():
    """Only weights show that it may go, and the plan has none."""
    model = copy.deepcopy(model_of("dit"))
    embedder = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(embedder)
    plan = PruningPlan.of(model, {"transformer_blocks.0": [0]})
    lora = {key: value for key, value in lora_of(model).items() if ".emb." not in key}
    assert (
        relative(output(load(cut(model, plan), remap_lora(lora, plan))), output(cut(fused(model, lora), plan))) < CLOSE
    )


def test_plan_from_a_file(tmp_path):
    plan = plan_of("sdxl", "both")
    lora = lora_of(model_of("sdxl"))
    again = remap_lora(lora, PruningPlan.load(plan.save(tmp_path / "plan.json")))
    expected = remap_lora(lora, plan)
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[key], expected[key]) for key in again)


# Names and formats

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def of_attention(model: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in lora_of(model).items() if any(f".{part}.lora" in key for part in ATTENTION)}


def old_names(key: str) -> str:
    """`attn1.processor.to_q_lora.down.weight`, as Diffusers wrote until 2023."""
    module, _, rest = key.rpartition(".lora_")
    parent, _, layer = module.removesuffix(".0").rpartition(".")
    return f"unet.{parent}.processor.{layer}_lora." + {"A": "down", "B": "up"}[rest[0]] + ".weight"


def new_names(key: str) -> str:
    return "unet." + key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")


@pytest.mark.parametrize("renamed", [old_names, new_names, "unet.{}".format, "base_model.model.{}".format])
def test_names_stay_but_for_numbers(renamed):
    """And Diffusers reads them."""
    model, plan = model_of("sd"), plan_of("sd", "both")
    lora = of_attention(model)
    result = remap_lora({renamed(key): value for key, value in lora.items()}, plan)
    expected = remap_lora(lora, plan)
    assert {key: value.shape for key, value in result.items()} == {renamed(k): v.shape for k, v in expected.items()}
    loaded = cut(model, plan)
    loaded.load_lora_adapter(result, prefix="unet" if next(iter(result)).startswith("unet.") else "base_model.model")
    assert relative(output(loaded), output(load(cut(model, plan), expected))) < CLOSE


def test_text_encoders_are_not_touched():
    lora = lora_of(model_of("sd"), "unet.")
    text = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": noise(RANK, 8)}
    result = remap_lora(lora | text, plan_of("sd", "both"))
    assert all(torch.equal(result[key], value) for key, value in text.items())


def kohya(lora: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """`lora_unet_down_blocks_0_..._to_q.lora_down.weight`, and an alpha for each layer."""
    state = {}
    for key, value in lora.items():
        module, _, rest = key.rpartition(".lora_")
        flat = "lora_unet_" + module.replace(".", "_")
        state[f"{flat}.lora_" + {"A": "down", "B": "up"}[rest[0]] + ".weight"] = value
        state[f"{flat}.alpha"] = torch.tensor(alpha)
    return state


@pytest.mark.parametrize("given", ["file", "state dict", "what the pipeline returns"])
def test_kohya_file_of_stable_diffusion(given, tmp_path):
    model, plan = model_of("sd"), plan_of("sd", "both")
    lora = of_attention(model)
    state: Any = kohya(lora, 0.5)
    if given == "file":
        save_file(state, tmp_path / "style.safetensors")
        state = tmp_path / "style.safetensors"
    elif given == "what the pipeline returns":
        state = diffusers.StableDiffusionPipeline.lora_state_dict(state)
    loaded = cut(model, plan)
    loaded.load_lora_adapter(remap_lora(state, plan), prefix="unet")
    assert relative(output(loaded), output(cut(fused(model, lora, 0.5 / RANK), plan))) < CLOSE


def sgm(key: str) -> str:
    """Names of SDXL's authors: blocks are counted through, a transformer is the second module of one."""
    parts = key.split(".")
    stage, rest = parts[0], parts[1:]
    if stage == "mid_block":
        return ".".join(["middle_block", "1", *rest[2:]])
    block, layer = int(rest[0]), int(rest[2])
    index = 1 + 3 * block + layer if stage == "down_blocks" else 3 * block + layer
    name = {"down_blocks": "input_blocks", "up_blocks": "output_blocks"}[stage]
    return ".".join([name, str(index), "1", *rest[3:]])


def test_kohya_file_of_sdxl_counts_the_blocks_of_the_original():
    """The pipeline would count those of the pruned network."""
    model, plan = model_of("sdxl"), plan_of("sdxl", "both")
    lora = of_attention(model)
    state = kohya({sgm(key): value for key, value in lora.items()}, 1.0)
    loaded = cut(model, plan)
    loaded.load_lora_adapter(remap_lora(state, plan), prefix="unet")
    assert relative(output(loaded), output(cut(fused(model, lora, 1.0 / RANK), plan))) < CLOSE


def test_kohya_file_of_flux():
    """One matrix for q, k and v, with the down matrix shared: Diffusers splits it."""
    model, plan = model_of("flux"), plan_of("flux", "both")
    a, b = 0.3 * noise(RANK, 16, seed=1), 0.3 * noise(48, RANK, seed=2)
    state, lora = {}, {}
    for i in range(2):
        state[f"lora_unet_double_blocks_{i}_img_attn_qkv.lora_down.weight"] = a + i
        state[f"lora_unet_double_blocks_{i}_img_attn_qkv.lora_up.weight"] = b
        state[f"lora_unet_double_blocks_{i}_img_attn_qkv.alpha"] = torch.tensor(1.0)
        for part, rows in zip("qkv", b.chunk(3), strict=True):
            lora[f"transformer_blocks.{i}.attn.to_{part}.lora_A.weight"] = a + i
            lora[f"transformer_blocks.{i}.attn.to_{part}.lora_B.weight"] = rows
    loaded = cut(model, plan)
    loaded.load_lora_adapter(remap_lora(state, plan), prefix="transformer")
    assert relative(output(loaded), output(cut(fused(model, lora, 1.0 / RANK), plan))) < CLOSE


@pytest.mark.parametrize("rslora", [False, True])
def test_config_in_the_header_of_a_file_is_a_scale(rslora, tmp_path):
    """A folder of `save_lora_weights`: the state dict alone does not say it."""
    model, plan = model_of("sd3"), plan_of("sd3", "both")
    lora = of_attention(model)
    special = "transformer_blocks.2.attn.to_q"
    config = {"r": RANK, "lora_alpha": 1.0, "alpha_pattern": {special: 5.0}, "use_rslora": rslora}
    rank = RANK**0.5 if rslora else RANK
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    save_file({f"transformer.{key}": value for key, value in lora.items()}, tmp_path / "a.safetensors", header)
    loaded = cut(model, plan)
    loaded.load_lora_adapter(remap_lora(tmp_path, plan), prefix="transformer")
    louder = {key: value * (5.0 if key.startswith(special) and "lora_B" in key else 1.0) for key, value in lora.items()}
    assert relative(output(loaded), output(cut(fused(model, louder, 1.0 / rank), plan))) < CLOSE


def dora_of(model: nn.Module, parts: tuple[str, ...]) -> dict[str, Tensor]:
    lora = {key: value for key, value in lora_of(model).items() if any(f".attn1.{part}.lora" in key for part in parts)}
    for key in [key for key in lora if "lora_A" in key]:
        name = key.removesuffix(".lora_A.weight")
        rows = lora[f"{name}.lora_B.weight"].shape[0]
        lora[f"{name}.lora_magnitude_vector"] = noise(rows, seed=rows).abs()
    return lora


def test_dora_of_layers_that_lose_rows():
    model, plan = model_of("sd"), plan_of("sd", "both")
    lora = dora_of(model, ATTENTION[:3])
    whole = load(copy.deepcopy(model), lora)
    whole.fuse_lora()
    whole.unload_lora()
    result = output(load(cut(model, plan), remap_lora(lora, plan)))
    assert relative(result, output(cut(whole, plan))) < CLOSE
    assert relative(result, output(cut(model, plan))) > 1e-2


def test_dora_of_layers_that_lose_columns_is_refused():
    with pytest.raises(ValueError, match="fuse it into the original network before you prune"):
        remap_lora(dora_of(model_of("sd"), ATTENTION), plan_of("sd", "width"))
    depth = plan_of("sd", "depth")
    assert remap_lora(dora_of(model_of("sd"), ATTENTION), depth)


def test_bias_of_b_is_kept():
    plan = plan_of("sd", "depth")
    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_{}"
    lora = {
        key.format("A.weight"): noise(RANK, 16),
        key.format("B.weight"): noise(16, RANK),
        key.format("B.bias"): noise(16),
    }
    assert remap_lora(lora, plan)[key.format("B.bias")].shape == (16,)


# What is refused


@pytest.mark.parametrize(
    "key", ["unet.mid_block.nowhere.lora_A.weight", "transformer_blocks.0.attn.to_q.lora_A.weight", "x"]
)
def test_lora_of_another_network(key):
    with pytest.raises(ValueError, match="no key of this LoRA is for a layer of the UNet2DConditionModel"):
        remap_lora({key: noise(RANK, 8)}, plan_of("sd", "both"))


def test_empty_lora():
    with pytest.raises(ValueError, match="no key of this LoRA"):
        remap_lora({}, plan_of("sd", "both"))


@pytest.mark.parametrize("key", ["mid_block.attentions.0.to_qkv.lora_A.weight", "mid_block.resnets.0.conv1.lokr_w1"])
def test_some_keys_that_are_not_known(key):
    lora = lora_of(model_of("sd")) | {key: noise(RANK, 8)}
    with pytest.raises(ValueError, match=f"1 keys of this LoRA cannot be remapped: {key}"):
        remap_lora(lora, plan_of("sd", "both"))


def test_other_widths():
    key = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = {f"{key}.lora_A.weight": noise(RANK, 32), f"{key}.lora_B.weight": noise(32, RANK)}
    with pytest.raises(ValueError, match="for another network"):
        remap_lora(lora, plan_of("sd", "width"))


def test_nothing_left():
    key = "transformer_blocks.1.attn1.to_q"
    lora = {f"{key}.lora_A.weight": noise(RANK, 8), f"{key}.lora_B.weight": noise(8, RANK)}
    with pytest.raises(ValueError, match="nothing of this LoRA is left"):
        remap_lora(lora, plan_of("dit", "depth"))


def test_no_file(tmp_path: Path):
    plan = plan_of("sd", "both")
    with pytest.raises(ValueError, match=r"0 \.safetensors files"):
        remap_lora(tmp_path, plan)
    with pytest.raises(ValueError, match="cannot be read"):
        remap_lora(tmp_path / "none.safetensors", plan)
    (tmp_path / "x.safetensors").write_text("not one")
    with pytest.raises(ValueError, match="cannot be read"):
        remap_lora(str(tmp_path / "x.safetensors"), plan)
