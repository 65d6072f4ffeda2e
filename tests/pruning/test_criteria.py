"""Criteria on networks whose worst unit is known, and on every family."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffaccel.cost import denoisers
from diffaccel.pruning import criteria
from diffaccel.pruning.calibration import Calibration, Call, random_calls, record, run
from diffaccel.pruning.criteria import score
from diffaccel.pruning.criteria.energy import moments
from diffaccel.pruning.find import find_groups
from diffaccel.pruning.gates import gate
from diffaccel.pruning.groups import WIDTH, Group, Site
from tests import tiny
from tests.pruning import toys

TOYS = {"sd": tiny.sd, "sdxl": tiny.sdxl, "dit": tiny.dit, "pixart": tiny.pixart, "sd3": tiny.sd3, "flux": tiny.flux}


class Block(nn.Module):
    """x plus a number in every channel."""

    def __init__(self, number: float):
        super().__init__()
        self.number = number

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.number


class Net(nn.Module):
    """Two blocks, then the six features as they are into three outputs."""

    config = SimpleNamespace(in_channels=6)

    def __init__(self, outputs: int = 3, bias: bool = True):
        super().__init__()
        self.blocks = nn.ModuleList([Block(0.0), Block(0.0)])
        self.first, self.last = nn.Linear(6, 6, bias=False), nn.Linear(6, outputs, bias=bias)
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(6))
            self.last.weight.copy_(tiny.noise(outputs, 6, seed=3))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        for block in self.blocks:
            x = block(x)
        return (self.last(self.first(x)),)


PAIRS = Group("last.neurons", "neurons", 3, ("",), (Site("first", "out", 2), Site("last", "in", 2)))
SINGLE = Group("last.neurons", "neurons", 6, ("",), (Site("first", "out"), Site("last", "in")))
BLOCKS = [Group(f"blocks.{i}", "block", 1, (f"blocks.{i}",)) for i in range(2)]


def calls(*inputs: Tensor) -> Calibration:
    return Calibration(tuple(Call((x,), {}) for x in inputs))


def removal(net: nn.Module, group: Group, calibration: Calibration, **options: Any) -> np.ndarray:
    """Mean squared change of the prediction without each unit: what criteria estimate."""
    found = []
    for unit in range(group.units):
        gates = torch.ones(group.units)
        gates[unit] = 0
        changes = []
        for call in calibration.calls:
            with torch.no_grad():
                whole = run(net, call)
                with gate(net, [group], {group.name: gates}, **options):
                    changes.append(float((run(net, call) - whole).double().square().mean()))
        found.append(np.mean(changes))
    return np.array(found)


def test_magnitude_is_the_sum_of_squares_over_all_sites() -> None:
    up, down = nn.Linear(2, 4), nn.Conv2d(2, 1, (1, 2))
    net = nn.ModuleDict({"up": up, "down": down, "norm": nn.GroupNorm(2, 2)})
    up.weight.data = torch.tensor([[1.0, 0], [2, 0], [0, 3], [0, 4]])
    down.weight.data = torch.tensor([[[[1.0, 1]], [[5, 5]]]])
    # as with GEGLU: unit 0 has rows 0 and 2, unit 1 rows 1 and 3
    sites = (Site("up", "out", 1, (0, 2)), Site("norm", "out"), Site("down", "in"))
    groups = [Group("g", "neurons", 2, ("",), sites), Group("whole", "block", 1, ("up", "down"))]
    scores = criteria.magnitude(net, groups)
    assert scores["g"].tolist() == [1 + 9 + 2, 4 + 16 + 50]
    assert scores["whole"].tolist() == [30 + 52]


def test_magnitude_survives_half_precision() -> None:
    layer = nn.Linear(1, 1).half()
    layer.weight.data.fill_(300)  # its square is beyond float16
    scores = criteria.magnitude(nn.ModuleDict({"a": layer}), [Group("g", "neurons", 1, ("",), (Site("a", "out"),))])
    assert scores["g"].tolist() == [90000]


def test_random_depends_on_the_name_and_the_seed_alone() -> None:
    groups = [Group("a", "neurons", 5, ("",)), Group("b", "neurons", 5, ("",))]
    scores, alone = (criteria.random(nn.Identity(), some) for some in (groups, groups[1:]))
    assert scores["b"].tolist() == alone["b"].tolist() != scores["a"].tolist()
    assert criteria.random(nn.Identity(), groups, seed=1)["b"].tolist() != alone["b"].tolist()


def kept_places(scores: np.ndarray, count: int) -> list[int]:
    return sorted(np.argsort(-scores)[:count].tolist())


def test_evenly_spaced_keeps_every_other_block_and_starts_with_the_first() -> None:
    blocks = [Group(f"blocks.{i}", "block", 1, (f"blocks.{i}",)) for i in range(28)]
    mixed = [*blocks[:9], Group("ff", "neurons", 8, ("",)), *blocks[9:], Group("r", "resnet", 1, ("r",))]
    scores = criteria.evenly_spaced(nn.Identity(), mixed)
    assert list(scores) == [group.name for group in mixed]
    each = np.concatenate([scores[group.name] for group in blocks])
    assert kept_places(each, 14) == list(range(0, 28, 2))
    assert kept_places(each, 7) == list(range(0, 28, 4))
    assert kept_places(scores["ff"], 2) == [0, 4]
    assert scores["r"].tolist() == [1.0], "a kind of its own"


@pytest.mark.parametrize("n", [1, 2, 5, 12, 28, 57])
def test_evenly_spaced_leaves_no_large_gap_at_any_count(n: int) -> None:
    scores = criteria.evenly_spaced(nn.Identity(), [Group("g", "neurons", n, ("",))])["g"]
    assert len(set(scores)) == n
    assert scores[0] == scores.max() == 1
    assert scores.min() > 0
    for count in range(1, n + 1):
        places = [*kept_places(scores, count), n]
        assert max(np.diff(places)) <= 2 * n / count + 1


def test_activation_is_the_energy_that_a_unit_adds() -> None:
    net = Net()
    scale = torch.tensor([1.0, 2, 3, 0.1, 5, 0])
    given = calls(tiny.noise(2, 7, 6, seed=1) * scale + 1, tiny.noise(2, 7, 6, seed=2) * scale)
    scores = criteria.activation(net, [SINGLE], given)[SINGLE.name]
    # summed over 7 positions and 3 outputs, where `removal` is a mean over them
    np.testing.assert_allclose(scores, 21 * removal(net, SINGLE, given), rtol=1e-5)
    pairs = criteria.activation(net, [PAIRS], given)[PAIRS.name]
    np.testing.assert_allclose(pairs, scores.reshape(3, 2).sum(1), rtol=1e-12)


def test_activation_sums_over_the_kernel_of_a_convolution() -> None:
    class Picture(nn.Module):
        config = SimpleNamespace(in_channels=2)

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 1, 3, padding=1, bias=False)
            self.conv.weight.data = torch.stack([torch.full((3, 3), 1.0), torch.full((3, 3), 0.5)])[None]

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (self.conv(x),)

    x = torch.stack([torch.full((4, 4), 1.0), torch.full((4, 4), 10.0)])[None]
    group = Group("c", "channels", 2, ("",), (Site("conv", "in"),))
    net, given = Picture(), calls(x)
    assert criteria.activation(net, [group], given)["c"].tolist() == [16 * 9, 16 * 225]
    assert criteria.flap(net, [group], given)["c"].tolist() == [16 * 9, 16 * 225], "no bias makes up for padding"
    assert criteria.means(net, [group], given) == {}


def test_activation_of_a_block_is_what_it_adds() -> None:
    net = Net()
    net.blocks[0], net.blocks[1] = Block(2.0), Block(-3.0)
    both = Group("layer", "layer", 1, ("blocks.0", "blocks.1"))
    scores = criteria.activation(net, [*BLOCKS, both, SINGLE], calls(tiny.noise(2, 5, 6)))
    assert list(scores) == ["blocks.0", "blocks.1", "layer", SINGLE.name]
    assert [scores[name].item() for name in ("blocks.0", "blocks.1", "layer")] == pytest.approx(
        [120, 270, 390], rel=1e-5
    )


def test_activation_of_a_joint_block_counts_both_streams() -> None:
    class Joint(nn.Module):
        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor | None, Tensor]:
            text = None if encoder_hidden_states.mean() == 0 else encoder_hidden_states + 1
            return text, hidden_states + 2

    class Outer(nn.Module):
        config = SimpleNamespace(in_channels=3)

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.block = nn.Parameter(torch.ones(1)), Joint()

        def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor]:
            return (self.block(encoder_hidden_states=text, hidden_states=x)[1],)

    group = Group("block", "block", 1, ("block",))
    for text, expected in ((torch.ones(1, 2, 3), 5 * 3 * 4 + 2 * 3 * 1), (torch.zeros(1, 2, 3), 5 * 3 * 4)):
        given = Calibration((Call((torch.ones(1, 5, 3), text), {}),))
        assert criteria.activation(Outer(), [group], given)["block"].item() == expected


def test_activation_of_a_layer_on_the_way_up_is_taken_from_the_features_without_the_skip() -> None:
    class Up(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :2] + 3

    class Outer(nn.Module):
        config = SimpleNamespace(in_channels=3)

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.up = nn.Parameter(torch.ones(1)), Up()

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (self.up(torch.cat([x, 5 * x[:, :1]], 1)),)

    group = Group("layer", "layer", 1, ("up",))
    assert criteria.activation(Outer(), [group], calls(torch.ones(2, 3, 4, 4)))["layer"].item() == 2 * 16 * 9


@pytest.mark.parametrize("name", criteria.CALIBRATED)
def test_dropout_does_not_disturb(name: str) -> None:
    net = Net()
    net.blocks[0] = nn.Dropout(0.5)
    given = calls(tiny.noise(2, 4, 6))
    scores = [criteria.score(name, net.train(mode), [SINGLE], given)[SINGLE.name] for mode in (True, False)]
    np.testing.assert_array_equal(scores[0], scores[1])


def test_a_module_without_residual_is_no_depth() -> None:
    with pytest.raises(ValueError, match="last has no residual"):
        criteria.activation(Net(), [Group("last", "block", 1, ("last",))], calls(tiny.noise(1, 2, 6)))


def test_flap_forgives_a_constant_and_its_mean_repairs_the_removal() -> None:
    net = Net()
    x = tiny.noise(1, 50, 6)
    x[..., 2] = 30.0  # loud, but always the same
    given = calls(x[:, :25], x[:, 25:])
    loud, fluctuating = (
        criterion(net, [SINGLE], given)[SINGLE.name] for criterion in (criteria.activation, criteria.flap)
    )
    assert loud.argmax() == 2
    assert fluctuating.argmin() == 2
    assert fluctuating[2] == 0
    fill = criteria.means(net, [SINGLE], given)
    assert list(fill) == ["last"]
    np.testing.assert_allclose(fluctuating, 25 * 3 * removal(net, SINGLE, given, fill=fill), rtol=1e-4, atol=1e-10)


def test_flap_without_a_bias_is_activation() -> None:
    net, given = Net(bias=False), calls(tiny.noise(1, 9, 6) + 2)
    both = [criterion(net, [SINGLE], given)[SINGLE.name] for criterion in (criteria.activation, criteria.flap)]
    np.testing.assert_array_equal(both[0], both[1])
    assert criteria.means(net, [SINGLE], given) == {}


def test_moments_of_many_calls_are_those_of_all_positions() -> None:
    parts = [tiny.noise(2, n, 6, seed=n) + 1000 for n in (3, 11, 1)]
    found = moments(Net(), [SINGLE], calls(*parts))["last"]
    everything = torch.cat([part.reshape(-1, 6) for part in parts]).double()
    assert (found.rows, found.count) == (6, 30)
    torch.testing.assert_close(found.mean, everything.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.variance, everything.var(0, correction=0), rtol=1e-3, atol=0)
    torch.testing.assert_close(found.square, everything.square().mean(0), rtol=1e-6, atol=0)


def test_taylor_is_the_change_of_the_output_where_that_is_linear() -> None:
    net = Net(outputs=1)
    given = calls(*(tiny.noise(1, 1, 6, seed=seed) for seed in range(5)))  # one number comes out: nothing is estimated
    scores = criteria.taylor(net, [SINGLE], given)[SINGLE.name]
    np.testing.assert_allclose(scores, removal(net, SINGLE, given), rtol=1e-5)


def test_taylor_projections_estimate_the_mean_square() -> None:
    net = Net()
    net.blocks[1] = Block(0.5)
    given = calls(*(tiny.noise(2, 16, 6, seed=seed) for seed in range(200)))
    scores = criteria.taylor(net, [SINGLE, *BLOCKS], given)
    np.testing.assert_allclose(scores[SINGLE.name], removal(net, SINGLE, given), rtol=0.25)
    np.testing.assert_allclose(scores["blocks.1"], removal(net, BLOCKS[1], given), rtol=0.25)
    assert scores["blocks.0"].tolist() == [0]
    again = criteria.taylor(net, [SINGLE], given, seed=1)[SINGLE.name]
    assert not np.array_equal(again, scores[SINGLE.name]), "the seed is that of the projections"


@pytest.mark.parametrize("kind", TOYS)
@pytest.mark.parametrize("name", criteria.CALIBRATED)
def test_a_dead_unit_scores_lowest_in_every_family(name: str, kind: str) -> None:
    pipe, arguments = TOYS[kind]()
    network = copy.deepcopy(next(iter(denoisers(pipe).values())))
    given = record(pipe, [arguments], calls=2, steps=2)
    groups = list(find_groups(network).found.values())
    for group in groups:  # its last unit sends nothing on
        for site in group.sites:
            if site.side == "in" and group.kind in WIDTH:
                weight = network.get_parameter(f"{site.module}.weight")
                weight.data[:, site.features([group.units - 1])] = 0
    scores = criteria.score(name, network, groups, given)
    assert list(scores) == [group.name for group in groups]
    for group in groups:
        values = scores[group.name]
        assert values.shape == (group.units,)
        assert values.dtype == np.float64
        if group.kind in WIDTH:
            assert values[-1] == 0
        else:
            assert values[0] > 0
    assert any(scores[group.name][:-1].min() > 0 for group in groups if group.kind in WIDTH)
    assert all(weight.requires_grad for weight in network.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())


def test_hooks_go_when_a_call_fails() -> None:
    net = Net()
    with pytest.raises(RuntimeError):
        criteria.activation(net, [SINGLE, *BLOCKS], calls(torch.ones(1, 5)))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())


def test_scores_that_are_no_numbers() -> None:
    with pytest.raises(ValueError, match="not finite"):
        criteria.activation(Net(), [SINGLE], calls(torch.full((1, 2, 6), torch.inf)))


def test_by_name() -> None:
    net = Net()
    given = calls(tiny.noise(1, 2, 6))
    for name in criteria.CRITERIA:
        direct = getattr(criteria, name)(net, [SINGLE], *([given] if name in criteria.CALIBRATED else []))
        scores = criteria.score(name, net, [SINGLE], given)
        np.testing.assert_array_equal(scores[SINGLE.name], direct[SINGLE.name])
    seeds = [criteria.score("random", net, [SINGLE], seed=seed)[SINGLE.name].tolist() for seed in (0, 1)]
    assert seeds[0] != seeds[1]
    with pytest.raises(ValueError, match="unknown criterion 'wanda'; use taylor, activation"):
        criteria.score("wanda", net, [SINGLE])
    with pytest.raises(ValueError, match="flap looks at calls"):
        criteria.score("flap", net, [SINGLE])


@pytest.mark.parametrize("criterion", ["taylor", "activation", "flap"])
def test_calls_count_by_their_weight(criterion):
    model = toys.toy("sd15")
    groups = list(find_groups(model).found.values())
    first, second = random_calls(model, 2, size=8).calls
    both = Calibration((replace(first, weight=3.0), replace(second, weight=0.0)))
    alone = score(criterion, model, groups, Calibration((first,)))
    for name, values in score(criterion, model, groups, both).items():
        np.testing.assert_allclose(values, alone[name], rtol=1e-5)
    equal = score(criterion, model, groups, Calibration((first, second)))
    assert any(not np.allclose(equal[name], values, rtol=1e-2) for name, values in alone.items())
