from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from diffaccel.pruning import picture
from diffaccel.pruning.costs import Costs, macs_costs, parameter_costs, planned
from diffaccel.pruning.find import find_groups
from diffaccel.pruning.inputs import example_inputs
from diffaccel.pruning.picture import draw
from diffaccel.pruning.plan import PruningPlan
from tests.pruning.test_costs import NETWORKS, sd3_medium, sd15, sdxl_base

WIDTHS = ("heads", "neurons", "channels")


def half(model: Any, *depth: str) -> PruningPlan:
    """Half of every group of width, and whole groups by name."""
    groups = find_groups(model).of(*WIDTHS)
    return PruningPlan.of(model, {group.name: range(group.units // 2) for group in groups} | dict.fromkeys(depth, (0,)))


def costs_of(model: Any) -> Costs:
    return parameter_costs(model, list(find_groups(model).found.values()))


def stages(model: Any, plan: PruningPlan, costs: Costs | None = None) -> dict[str, list[Any]]:
    return picture._stages(find_groups(model).found, plan, costs or costs_of(model))


def pixels(image: Image.Image, colour: str) -> int:
    return int((np.asarray(image) == ImageColor.getrgb(colour)).all(-1).sum())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_group_of_width_has_its_bar(name: str) -> None:
    model = NETWORKS[name]()
    groups, costs = find_groups(model).of(*WIDTHS), costs_of(model)
    plan = half(model)
    rows = [row for stage in stages(model, plan).values() for row in stage]
    bars = {f"{row.name}.{bar.place}": bar for row in rows for bar in row.bars}
    assert bars.keys() == {group.name for group in groups}
    for group in groups:
        bar, kept = bars[group.name], group.units - group.units // 2
        assert (bar.units, bar.kept) == (group.units, kept)
        assert bar.cost == costs.kept[group.name][-1]
        assert bar.left == costs.kept[group.name][kept] < bar.cost
        assert bar.place in picture.PLACES
    assert not any(row.gone for row in rows)
    assert pixels(draw(model, plan, costs), picture.LOST) == 0


def test_rows_stand_in_the_order_of_the_network() -> None:
    model = NETWORKS["sdxl"]()
    found = stages(model, half(model))
    assert set(found) == {"down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"}
    labels = [picture._label(row.name) for row in found["down_blocks.1"]]
    blocks = [[f"attention {i} block {j}" for j in range(2)] for i in range(2)]
    assert labels == ["resnet 0", *blocks[0], "resnet 1", *blocks[1]]
    middle = [picture._label(row.name) for row in found["mid_block"]]
    assert middle == ["resnet 0", "attention 0 block 0", "attention 0 block 1", "resnet 1"]
    costs = costs_of(model)
    up = picture._panel("up_blocks.1", found["up_blocks.1"], costs, 1.0)
    assert [picture._label(row.name) for row in up.rows] == ["resnet 2", "resnet 1", "resnet 0"]


@pytest.mark.parametrize(
    ("name", "depth", "gone"),
    [
        ("sdxl", "mid_block", {"mid_block.resnets.0", "mid_block.resnets.1", "mid_block.attentions.0."}),
        ("sdxl", "down_blocks.0.layer.1", {"down_blocks.0.resnets.1", "up_blocks.1.resnets.1"}),
        ("sdxl", "down_blocks.1.attentions.0", {"down_blocks.1.attentions.0."}),
        ("sd3", "transformer_blocks.0", {"transformer_blocks.0"}),
        ("flux", "single_transformer_blocks.0", {"single_transformer_blocks.0"}),
    ],
)
def test_what_is_removed_whole_is_struck_out(name: str, depth: str, gone: set[str]) -> None:
    model = NETWORKS[name]()
    plan = PruningPlan.of(model, {depth: (0,)})
    rows = [row for stage in stages(model, plan).values() for row in stage]
    for row in rows:
        expected = row.name in gone or any(entry.endswith(".") and row.name.startswith(entry) for entry in gone)
        assert row.gone == ("removed" if expected else "")
        assert all((bar.left == 0) == expected for bar in row.bars)
    assert any(row.gone for row in rows)
    assert pixels(draw(model, plan, costs_of(model)), picture.LOST) > 0


def test_a_resnet_without_its_body_keeps_its_shortcut_unless_all_of_it_goes() -> None:
    model = NETWORKS["sdxl"]()
    body = "mid_block.resnets.0.body"

    def told(*depth: str) -> str:
        plan = PruningPlan.of(model, dict.fromkeys(depth, (0,)))
        return {row.name: row.gone for row in stages(model, plan)["mid_block"]}["mid_block.resnets.0"]

    assert told(body) == "all but the shortcut removed"
    assert told(body, "mid_block") == "removed"


@pytest.mark.parametrize("removed", [0, 24, 72, 96])
def test_a_bar_is_filled_as_far_as_units_are_kept(removed: int) -> None:
    """The bars of neurons are the longest ones here; looked at is the line through the middle of the first."""
    model = NETWORKS["dit"]()
    groups, costs = find_groups(model), costs_of(model)
    plan = PruningPlan.of(model, {"transformer_blocks.0.ff.neurons": range(removed), "transformer_blocks.1": (0,)})
    image = np.asarray(draw(model, plan, costs))
    found = stages(model, plan)
    head = picture._head(plan.model, costs, 0.0, found["transformer_blocks"]).height
    assert groups.found["transformer_blocks.0.ff.neurons"].units == 96
    line = image[picture.MARGIN + head + picture.LINE + 6 + picture.BAR // 2]
    orange = (line == ImageColor.getrgb(picture.ORANGE)).all(-1).sum()
    ends = 0 if removed in (0, 96) else 1  # the outline's right end; without units it is pale
    assert orange == pytest.approx(picture.LONGEST * (1 - removed / 96) + ends, abs=1.5)


@pytest.mark.parametrize("make", [*NETWORKS.values(), sd15, sdxl_base, sd3_medium])
def test_nothing_is_cut_off_and_panels_do_not_overlap(make: Callable[[], Any]) -> None:
    with torch.device("meta"):
        model = make()
    groups, costs = find_groups(model), costs_of(model)
    depth = [group.name for group in groups.of("resnet", "block", "transformer")]
    plan = half(model, *depth[::3])
    image = np.asarray(draw(model, plan, costs))
    assert image.shape[0] < 1600
    assert image.shape[1] < 1400
    for edge in (image[:20], image[-20:], image[:, :20], image[:, -10:]):
        assert (edge == 255).all()
    panels = {name: picture._panel(name, rows, costs, 1e-5) for name, rows in stages(model, plan, costs).items()}
    spots = picture._spots(panels, len(getattr(model, "down_blocks", ())))
    assert spots.keys() == panels.keys()
    boxes = [(x, y, x + panels[name].size[0], y + panels[name].size[1]) for name, (x, y) in spots.items()]
    for i, a in enumerate(boxes):
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])


def test_the_measure_is_told_and_noise_in_latencies_does_no_harm() -> None:
    model = NETWORKS["flux"]()
    groups = list(find_groups(model).found.values())
    macs = macs_costs(model, groups, example_inputs(model, size=8, text_length=5))
    kept = {name: np.linspace(2e-3, 1e-3, len(values)) for name, values in macs.kept.items()}
    latency = Costs("latency", 0.5, kept)
    rows = [row for stage in stages(model, half(model), latency).values() for row in stage]
    assert all(0 == bar.left == bar.cost for row in rows for bar in row.bars)
    draw(model, half(model), latency)
    draw(model, half(model), Costs("latency", 0.5, {name: values[::-1] for name, values in kept.items()}))
    assert picture.amount(latency, 0.0125) == "12.5 ms"
    assert picture.amount(Costs("macs", 402e9, {}), 300e9) == "300.0 GMACs"
    assert picture.amount(Costs("macs", 408e6, {}), 3e6) == "3.0 million MACs"
    assert picture.amount(Costs("parameters", 11.9e9, {}), 11.9e9) == "11,900.0 million parameters"


def test_the_bar_at_the_top_is_the_whole_network() -> None:
    model = NETWORKS["sd3"]()
    plan, costs = half(model), costs_of(model)
    share = planned(costs, list(find_groups(model).found.values()), plan.removed) / costs.total
    line = np.asarray(draw(model, plan, costs))[picture.MARGIN + 50 + 5, picture.MARGIN :]
    dark = (line == ImageColor.getrgb(picture.INK)).all(-1)
    assert int(np.argmin(dark)) == pytest.approx(400 * share, abs=1.5)


def test_bad_input_gets_a_sentence() -> None:
    model, other = NETWORKS["dit"](), NETWORKS["pixart"]()
    costs = costs_of(model)
    with pytest.raises(ValueError, match="this plan is for a DiTTransformer2DModel"):
        draw(other, half(model), costs_of(other))
    costs.kept.pop("transformer_blocks.1.ff.neurons")
    with pytest.raises(ValueError, match=r"no cost for transformer_blocks.1.ff.neurons"):
        draw(model, half(model), costs)
