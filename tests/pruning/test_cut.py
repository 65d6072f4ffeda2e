"""For every unit of every class: the network with a mask computes what the cut network computes."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from diffaccel.pruning.families import stock_class
from diffaccel.pruning.find import find_groups
from diffaccel.pruning.groups import DEPTH
from diffaccel.pruning.inputs import example_inputs
from diffaccel.pruning.plan import PruningPlan
from diffaccel.pruning.surgery import cut, mask
from tests.pruning import toys

CASES = list(toys.TOYS)
TOLERANCE = 1e-5  # float32 sums in another order; observed 3e-7


@torch.no_grad()
def output(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs, return_dict=False)[0]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def cut_and_compare(model: nn.Module, inputs: dict[str, Any], removed: dict[str, Any]) -> Any:
    """The cut network, after it was compared with the masked one, and that one with the whole one."""
    plan = PruningPlan.of(model, removed)
    whole = output(model, inputs)
    with mask(model, plan):
        masked = output(model, inputs)
    smaller = cut(model, plan)
    assert relative(output(smaller, inputs), masked) < TOLERANCE, removed
    assert relative(masked, whole) > 5 * TOLERANCE, f"the mask of {list(removed)[:3]} changes nothing"
    assert torch.equal(output(model, inputs), whole), "the original changed"
    count = sum(p.numel() for p in smaller.parameters())
    assert count < sum(p.numel() for p in model.parameters())
    return smaller


@pytest.mark.parametrize("name", CASES)
def test_one_unit_of_every_group(name):
    model = toys.toy(name)
    inputs = example_inputs(model, size=8)
    for group in find_groups(model).found.values():
        # Neurons: several, since one in a hundred behind small weights moves less than the tolerance.
        units = range(0, group.units, 2) if group.kind == "neurons" else [group.units // 2]
        cut_and_compare(model, inputs, {group.name: units})


@pytest.mark.parametrize("name", CASES)
def test_all_units_of_every_group_leave_a_constant(name):
    model = toys.toy(name)
    inputs = example_inputs(model, size=8)
    for group in find_groups(model).of("heads", "neurons", "channels"):
        cut_and_compare(model, inputs, {group.name: range(group.units)})


def half(model: nn.Module) -> dict[str, list[int]]:
    draw = torch.Generator().manual_seed(1)
    groups = find_groups(model).of("heads", "neurons", "channels")
    return {group.name: torch.randperm(group.units, generator=draw)[: group.units // 2].tolist() for group in groups}


@pytest.mark.parametrize("name", CASES)
def test_half_of_every_group_at_once(name):
    model = toys.toy(name)
    smaller = cut_and_compare(model, example_inputs(model, size=8), half(model))
    assert type(smaller).__name__ == f"Pruned{type(model).__name__}"
    assert isinstance(smaller, type(model))
    assert stock_class(smaller) is type(model)


def every_second(model: nn.Module, kind: str, start: int) -> dict[str, list[int]]:
    return {group.name: [0] for i, group in enumerate(find_groups(model).of(kind)) if i % 2 == start}


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("kind", DEPTH)
@pytest.mark.parametrize("name", CASES)
def test_depth_alone_with_width_and_once_more(name, kind, start):
    model = toys.toy(name)
    depth = every_second(model, kind, start)
    if not depth:
        pytest.skip(f"no {kind} to remove here")
    inputs = example_inputs(model, size=8)
    cut_and_compare(model, inputs, depth)
    smaller = cut_and_compare(model, inputs, half(model) | depth)
    again = {group.name: [0] for group in list(find_groups(smaller).found.values())[1::3]}
    if len(find_groups(smaller).of("block")) > 1 or not hasattr(smaller, "transformer_blocks"):
        cut_and_compare(smaller, inputs, again)


REAL = {
    "sd15": lambda: diffusers.UNet2DConditionModel(
        sample_size=64,
        cross_attention_dim=768,
        block_out_channels=(320, 640),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "dit": lambda: diffusers.DiTTransformer2DModel(out_channels=8, num_layers=2),
    "pixart": lambda: diffusers.PixArtTransformer2DModel(caption_channels=4096, sample_size=128, num_layers=2),
    "sd3": lambda: diffusers.SD3Transformer2DModel(
        num_layers=2, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
    ),
    "flux": lambda: diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, joint_attention_dim=1024),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_widths(name):
    """The widths of the checkpoints that people prune, with fewer blocks; all kinds of width, half of everything."""
    torch.manual_seed(0)
    model = REAL[name]().eval()
    inputs = example_inputs(model, size=16, text_length=8)
    removed = {group.name: range(0, group.units, 2) for group in find_groups(model).of("heads", "neurons", "channels")}
    cut_and_compare(model, inputs, removed)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_depth_of_all_kinds_and_width_mixed(name, seed):
    model = toys.toy(name)
    draw = torch.Generator().manual_seed(seed)
    blocks = find_groups(model).of(*DEPTH)
    keep = blocks[0].name  # of a transformer one block must stay
    depth = {group.name: [0] for group in blocks if torch.rand((), generator=draw) < 0.4 and group.name != keep}
    cut_and_compare(model, example_inputs(model, size=8), half(model) | depth)


STOCK = {
    "sd15": [{"down_blocks.1.layer.1": [0]}, {"mid_block": [0]}, {"mid_block.attentions.0.transformer_blocks.0": [0]}],
    "deep_sd15": [{"down_blocks.0.layer.1": [0], "down_blocks.0.layer.2": [0], "down_blocks.1.layer.2": [0]}],
    "sdxl": [
        {"down_blocks.1.attentions.1.transformer_blocks.1": [0], "up_blocks.0.attentions.0.transformer_blocks.2": [0]}
    ],
    "unconditional": [{"down_blocks.0.layer.1": [0], "down_blocks.1.layer.1": [0]}, {"mid_block": [0]}],
    "dit": [{"transformer_blocks.1": [0]}],
    "shared_dit": [{"transformer_blocks.0": [0]}],
    "pixart": [{"transformer_blocks.0": [0]}],
    "sd35": [
        {"transformer_blocks.0": [0]},
        {"transformer_blocks.3": [0]},
        {"transformer_blocks.2": [0], "transformer_blocks.3": [0]},
    ],
    "flux": [{"transformer_blocks.0": [0]}, {f"single_transformer_blocks.{i}": [0] for i in range(3)}],
}


@pytest.mark.parametrize(("name", "removed"), [(name, case) for name, cases in STOCK.items() for case in cases])
def test_depth_that_a_stock_config_can_say_is_of_the_stock_class(name, removed, tmp_path):
    model = toys.toy(name)
    inputs = example_inputs(model, size=8)
    smaller = cut_and_compare(model, inputs, removed)
    assert type(smaller) is type(model)
    smaller.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)  # weights lie elsewhere in memory: kernels may round otherwise
    assert relative(output(reloaded, inputs), output(smaller, inputs)) < 1e-6


def test_sdxl_whose_middle_would_silently_lose_blocks_is_not_written_as_stock():
    """The middle takes its depth from the first entry of the last stage (pruning.md 9.5)."""
    model = toys.toy("sdxl")
    removed = {"down_blocks.1.attentions.0.transformer_blocks.1": [0]}
    smaller = cut_and_compare(model, example_inputs(model, size=8), removed)
    assert type(smaller).__name__ == "PrunedUNet2DConditionModel"


def test_different_layers_of_an_unconditional_unet_need_the_subclass():
    model = toys.toy("unconditional")
    smaller = cut_and_compare(model, example_inputs(model, size=8), {"down_blocks.1.layer.1": [0]})
    assert type(smaller).__name__ == "PrunedUNet2DModel"


def test_a_removed_module_is_its_constant_not_the_identity():
    model = toys.toy("pixart")
    smaller = cut(model, PruningPlan.of(model, {"transformer_blocks.1.ff.neurons": range(64)}))
    x = torch.randn(2, 5, 16)
    bias = model.transformer_blocks[1].ff.net[2].bias
    assert torch.equal(smaller.transformer_blocks[1].ff(x), bias.expand(2, 5, 16))


def test_a_forgotten_head_count_would_be_silent():
    """Counter-test: the comparison sees the error that other tools make (pruning.md 8.2)."""
    model = toys.toy("sd15")
    inputs = example_inputs(model, size=8)
    plan = PruningPlan.of(model, {group.name: [0] for group in find_groups(model).of("heads") if group.units > 2})
    smaller: Any = cut(model, plan)
    with mask(model, plan):
        masked = output(model, inputs)
    for module in smaller.modules():
        if isinstance(module, diffusers.models.attention_processor.Attention) and module.heads == 3:
            module.heads = 1
    assert relative(output(smaller, inputs), masked) > 100 * TOLERANCE


def test_nothing_is_shared_with_the_original():
    model = toys.toy("sd3")
    plan = PruningPlan.of(model, {"transformer_blocks.1.attn.heads": [0]})
    smaller = cut(model, plan)
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.zero_()
    assert all(parameter.abs().sum() > 0 for parameter in model.parameters())


def test_type_device_and_mode_are_kept():
    model = toys.toy("dit").to(torch.bfloat16).train()
    smaller: Any = cut(model, PruningPlan.of(model, {"transformer_blocks.1.ff.neurons": [0, 1]}))
    assert smaller.dtype == torch.bfloat16
    assert smaller.training
    meta = toys.toy("flux").to("meta")
    smaller = cut(meta, PruningPlan.of(meta, {"single_transformer_blocks.0.neurons": range(32)}))
    assert smaller.device.type == "meta"


@pytest.mark.parametrize("name", ["sd15", "pixart", "sd35", "flux"])
def test_means_that_stand_for_removed_inputs_go_into_the_bias(name):
    model = toys.toy(name)
    inputs = example_inputs(model, size=8)
    removed = {group.name: [0, 1] for group in find_groups(model).of("heads", "neurons")}
    plan = PruningPlan.of(model, removed)
    fill = {}
    for key, module in model.named_modules():
        if isinstance(module, nn.Linear):
            fill[key] = torch.randn(module.in_features, generator=torch.Generator().manual_seed(3))
    with mask(model, plan, fill):
        masked = output(model, inputs)
    assert relative(output(cut(model, plan, fill), inputs), masked) < TOLERANCE
    assert relative(output(cut(model, plan), inputs), masked) > 100 * TOLERANCE
