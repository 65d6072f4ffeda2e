import csv
import io
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

from diffaccel import cost
from diffaccel.meta import meta_copy
from diffaccel.pruning.costs import (
    Costs,
    latency_costs,
    layer_csv,
    layer_markdown,
    layer_table,
    macs_costs,
    parameter_costs,
    planned,
)
from diffaccel.pruning.find import find_groups
from diffaccel.pruning.groups import Group, Site
from diffaccel.pruning.inputs import example_inputs
from diffaccel.pruning.plan import PruningPlan
from diffaccel.pruning.surgery import cut
from tests.pruning.test_inputs import SDXL, conditional_unet, flux, sd3, unet

TRANSFORMER = {"num_attention_heads": 4, "attention_head_dim": 6, "num_layers": 3, "norm_num_groups": 4}


def dit() -> diffusers.DiTTransformer2DModel:
    return diffusers.DiTTransformer2DModel(in_channels=4, out_channels=8, sample_size=8, **TRANSFORMER).eval()


def pixart() -> diffusers.PixArtTransformer2DModel:
    small = {"sample_size": 8, "cross_attention_dim": 24, "caption_channels": 6}
    return diffusers.PixArtTransformer2DModel(in_channels=4, out_channels=8, **TRANSFORMER, **small).eval()


def sdxl() -> diffusers.UNet2DConditionModel:
    """Two layers a stage, so that one can go; transformers of two blocks."""
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=2,
        transformer_layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **SDXL,  # type: ignore[arg-type]
    ).eval()


NETWORKS: dict[str, Callable[[], Any]] = {
    "ddpm": unet,
    "sd": conditional_unet,
    "sdxl": sdxl,
    "dit": dit,
    "pixart": pixart,
    "sd3": sd3,
    "flux": lambda: flux(True),
}


def toy(name: str) -> tuple[Any, list[Group], dict[str, Any]]:
    model = NETWORKS[name]()
    return model, list(find_groups(model).found.values()), example_inputs(model, size=8, text_length=5)


class Block(nn.Module):
    """4 features, 6 neurons and their mirror images (a gate), 4 features."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 12)
        self.down = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.up(x).chunk(2, -1)
        return x + self.down(value * gate)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.last = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def stack_groups() -> list[Group]:
    sites = [(Site(f"blocks.{i}.up", "out", 2, (0, 6)), Site(f"blocks.{i}.down", "in", 2)) for i in range(2)]
    width = [Group(f"blocks.{i}.neurons", "neurons", 3, (f"blocks.{i}",), sites[i]) for i in range(2)]
    return [*width, *(Group(f"blocks.{i}", "block", 1, (f"blocks.{i}",)) for i in range(2))]


def test_costs_of_a_network_counted_by_hand() -> None:
    model, groups = Stack(), stack_groups()
    macs = macs_costs(model, groups, {"x": torch.zeros(5, 4)})
    # 5 rows; a pair of neurons: 4 rows of 4 and 2 columns of 4
    assert macs.total == 5 * (2 * (4 * 12 + 6 * 4) + 4 * 3)
    assert macs.kept["blocks.0.neurons"].tolist() == [0, 5 * 24, 5 * 48, 5 * 72]
    assert macs.kept["blocks.1"].tolist() == [0, 5 * 72]
    weights = parameter_costs(model, groups)
    assert weights.total == 2 * (4 * 12 + 12 + 6 * 4 + 4) + 4 * 3 + 3
    assert weights.kept["blocks.0.neurons"].tolist() == [0, 28, 56, 84]  # 4 biases more, the last bias stays
    assert weights.kept["blocks.1"].tolist() == [0, 88]
    assert (macs.measure, weights.measure) == ("macs", "parameters")


def test_units_inside_a_removed_block_save_nothing_more() -> None:
    model, groups = Stack(), stack_groups()
    costs = parameter_costs(model, groups)
    inner, outer = {"blocks.0.neurons": (0, 2)}, {"blocks.0": (0,)}
    assert planned(costs, groups, {}) == costs.total
    assert planned(costs, groups, inner) == costs.total - 56
    assert planned(costs, groups, inner | outer) == planned(costs, groups, outer) == costs.total - 88
    assert planned(costs, groups, outer | {"blocks.1.neurons": (1,)}) == costs.total - 88 - 28
    assert planned(costs, groups, inner | {"blocks.0": ()}) == costs.total - 56


def test_what_was_not_there_cannot_be_planned() -> None:
    groups = stack_groups()
    costs = parameter_costs(Stack(), groups)
    with pytest.raises(ValueError, match="no group 'other'"):
        planned(costs, groups, {"other": (0,)})
    with pytest.raises(ValueError, match="units 0 to 2"):
        planned(costs, groups, {"blocks.0.neurons": (3,)})
    with pytest.raises(ValueError, match="removed once"):
        planned(costs, groups, {"blocks.0.neurons": (1, 1)})
    with pytest.raises(ValueError, match="which Linear has not"):
        parameter_costs(nn.Linear(2, 2), groups)


def test_a_shared_parameter_is_saved_with_its_last_owner() -> None:
    model, groups = Stack(), stack_groups()
    model.blocks[1].up = model.blocks[0].up
    costs = parameter_costs(model, groups)
    assert costs.total == cost.parameters(model)
    assert costs.kept["blocks.0"].tolist() == [0, 28]


def choices(groups: Sequence[Group]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Removals that show every kind: half of every width, all of it, single blocks, and a mixture with nesting."""
    width = [group for group in groups if group.sites and group.kind != "resnet"]
    half = {group.name: tuple(range(group.units // 2)) for group in width if group.units > 1}
    chosen = {"half": half, "all": {group.name: tuple(range(group.units)) for group in width}}
    seen = set()
    for group in groups:
        if group.kind not in seen and group not in width:
            seen.add(group.kind)
            chosen[group.kind] = {group.name: (0,)}
            chosen[f"{group.kind} and half"] = half | {group.name: (0,)}
    return chosen


@pytest.mark.parametrize("name", NETWORKS)
def test_planned_is_what_the_cut_network_costs(name: str) -> None:
    model, groups, inputs = toy(name)
    macs, weights = macs_costs(model, groups, inputs), parameter_costs(model, groups)
    assert macs.total == cost.macs(model, **inputs)
    for what, removed in choices(groups).items():
        smaller = cut(model, PruningPlan.of(model, removed))
        assert planned(macs, groups, removed) == cost.macs(smaller, **inputs), what
        assert planned(weights, groups, removed) == cost.parameters(smaller), what


def test_without_its_last_block_sd3_costs_a_little_less_than_planned() -> None:
    """The block before it loses its text output, which no group has."""
    model, groups, inputs = toy("sd3")
    removed = {"transformer_blocks.1": (0,)}
    smaller = cut(model, PruningPlan.of(model, removed))
    macs, weights = macs_costs(model, groups, inputs), parameter_costs(model, groups)
    assert macs.total > planned(macs, groups, removed) > cost.macs(smaller, **inputs)
    assert weights.total > planned(weights, groups, removed) > cost.parameters(smaller)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pruned_network_has_costs_too(name: str) -> None:
    model, groups, _ = toy(name)
    pruned = cut(model, PruningPlan.of(model, choices(groups)["half"]))
    inputs = example_inputs(pruned, size=8, text_length=5)
    groups = list(find_groups(pruned).found.values())
    macs, weights = macs_costs(pruned, groups, inputs), parameter_costs(pruned, groups)
    removed = choices(groups)["all"]
    smaller = cut(pruned, PruningPlan.of(pruned, removed))
    assert planned(macs, groups, removed) == cost.macs(smaller, **inputs)
    assert planned(weights, groups, removed) == cost.parameters(smaller)


@pytest.mark.parametrize("name", NETWORKS)
def test_latency_has_the_costs_of_the_parts_that_it_times(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that counts MACs, latency must be what the exact count says."""

    def count(fn: Callable[[], Any], **_: int) -> cost.Latency:
        number = float(cost.macs(fn))
        return cost.Latency(number, number, number, number, 1)

    monkeypatch.setattr(cost, "latency", count)
    model, groups, inputs = toy(name)
    exact, timed = macs_costs(model, groups, inputs), latency_costs(model, groups, inputs, widths=3)
    assert timed.total == exact.total
    for group in groups:
        saved = timed.kept[group.name][-1] - timed.kept[group.name]
        expected = exact.kept[group.name][-1] - exact.kept[group.name]
        np.testing.assert_allclose(saved, expected, rtol=1e-12, err_msg=group.name)


def test_alike_parts_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def one(fn: Callable[[], Any], **_: int) -> cost.Latency:
        asked.append(fn)
        return cost.Latency(1.0, 1.0, 1.0, 1.0, 1)

    monkeypatch.setattr(cost, "latency", one)
    model = Stack()
    blocks = [group for group in stack_groups() if group.kind == "block"]
    costs = latency_costs(model, blocks, {"x": torch.zeros(5, 4)})
    assert len(asked) == 1 + 2  # the network; one block, looked at and timed
    assert [kept.tolist() for kept in costs.kept.values()] == [[0, 1], [0, 1]]
    model.blocks[1].up = nn.Linear(4, 12, bias=False)
    latency_costs(model, blocks, {"x": torch.zeros(5, 4)})
    assert len(asked) == 3 + 1 + 4


def test_times_of_a_real_clock_are_positive_and_leave_the_network_alone() -> None:
    model = Stack()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    groups = [group for group in stack_groups() if group.kind == "block"]
    costs = latency_costs(model, groups, {"x": torch.zeros(5, 4)}, runs=2, warmup=0)
    assert costs.measure == "latency"
    assert costs.total > 0
    assert all(kept[1] > 0 for kept in costs.kept.values())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_times_need_numbers_and_two_widths() -> None:
    with pytest.raises(ValueError, match="meta device"):
        latency_costs(Stack().to("meta"), stack_groups(), {"x": torch.zeros(5, 4, device="meta")})
    with pytest.raises(ValueError, match="widths >= 2"):
        latency_costs(Stack(), stack_groups(), {"x": torch.zeros(5, 4)}, widths=1)


def test_a_meta_copy_has_the_shapes_and_nothing_else() -> None:
    model = flux(True)
    model.transformer_blocks[0].register_forward_hook(lambda *_: pytest.fail("a hook of the original ran"))
    copied = meta_copy(model)
    assert {key: value.shape for key, value in copied.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    assert all(tensor.is_meta for tensor in (*copied.parameters(), *copied.buffers()))
    assert not any(tensor.is_meta for tensor in model.parameters())
    assert copied(**example_inputs(copied, size=4))[0].is_meta


@pytest.mark.parametrize("name", NETWORKS)
def test_layer_table_adds_up(name: str) -> None:
    model, _, inputs = toy(name)
    rows = layer_table(model, inputs)
    assert sum(row.macs for row in rows) == cost.macs(model, **inputs)
    assert sum(row.parameters for row in rows) == cost.parameters(model)
    assert sum(row.share for row in rows) == pytest.approx(1)
    assert all(row.parameters or row.macs for row in rows)
    own = {row.name: row.macs for row in rows if row.kind.endswith("Attention")}
    assert own
    assert all(own.values())  # softmax(Q K^T) V


def test_what_calls_a_module_from_outside_does_not_pay_for_it() -> None:
    rows = {row.name: row for row in layer_table(dit(), example_inputs(dit()))}
    embedder = "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_1"
    assert rows[embedder.format(0)].macs == 2 * rows[embedder.format(1)].macs
    assert "" not in rows


def test_layer_table_as_text() -> None:
    rows = layer_table(Stack(), {"x": torch.zeros(5, 4)})
    table = list(csv.DictReader(io.StringIO(layer_csv(rows))))
    assert table[0] == {
        "name": "blocks.0.up",
        "class": "Linear",
        "parameters": "60",
        "MACs": "240",
        "share": "0.3076923076923077",
    }
    lines = layer_markdown(rows).splitlines()
    assert lines[2] == "| blocks.0.up | Linear | 0.000 | 0.000 | 30.8% |"
    assert lines[-1].split("|")[-2].strip() == "100.0%"
    assert len(lines) == len(rows) + 3


def sd15() -> Any:
    return diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


def sdxl_base() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=128,
        cross_attention_dim=2048,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def pixart_1024() -> Any:
    return diffusers.PixArtTransformer2DModel(caption_channels=4096, sample_size=128, use_additional_conditions=True)


def sd3_medium() -> Any:
    return diffusers.SD3Transformer2DModel(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
    )


@pytest.mark.parametrize(
    ("make", "gmacs", "millions"),
    [
        (sd15, 402, 860),
        (sdxl_base, 3381, 2567),
        (lambda: diffusers.DiTTransformer2DModel(out_channels=8), 119, 750),
        (pixart_1024, 3255, 611),
        (sd3_medium, 4452, 2028),
        (lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True), 37192, 11901),
    ],
    ids=["sd15", "sdxl", "dit", "pixart", "sd3", "flux"],
)
def test_real_networks_have_their_known_costs(make: Callable[[], Any], gmacs: float, millions: float) -> None:
    """On shapes alone; numbers of shared/design/pruning.md, section 11, where they were counted independently."""
    with torch.device("meta"):
        model = make().eval()
    groups = list(find_groups(model).found.values())
    costs = macs_costs(model, groups, example_inputs(model))
    assert costs.total / 1e9 == pytest.approx(gmacs, rel=0.01)
    assert parameter_costs(model, groups).total / 1e6 == pytest.approx(millions, rel=0.01)
    everything = {group.name: tuple(range(group.units)) for group in groups}
    assert 0 < planned(costs, groups, everything) < 0.11 * costs.total  # what is outside of the blocks


def test_costs_are_plain_values() -> None:
    costs = Costs("macs", 2.0, {"a": np.array([0.0, 1.0])})
    group = Group("a", "neurons", 1, ("a",), (Site("a", "out"),))
    assert planned(costs, [group], {"a": [0]}) == 1.0
