"""Depths over time: the table, the choice of depths, and a schedule in pipelines."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import diffusers
import pytest
import torch

import diffaccel
from diffaccel.cost import macs
from diffaccel.samplers.policy import FULL, Grid, attached
from diffaccel.samplers.policy.exits import DepthSchedule, LinearExit, early_exit, layers, shallow
from diffaccel.samplers.policy.exits.schedule import best
from diffaccel.samplers.solvers import SOLVERS
from tests import tiny
from tests.policy import KINDS, denoiser, forward, like
from tests.tiny import SD_BETAS, Toy, draw, noise, relative

STEPS = 4


def toy(kind: str) -> Toy:
    """A pipeline whose network has depth 3 at least."""
    deeper = {"dit": {"num_layers": 3}, "pixart": {"num_layers": 3}, "sd3": {"num_layers": 3}, "sd": {}, "sdxl": {}}
    pipe, call = getattr(tiny, kind)()
    pipe = copy.deepcopy(pipe)
    part = "unet" if denoiser(pipe) is getattr(pipe, "unet", None) else "transformer"
    pipe.register_modules(**{part: like(denoiser(pipe), **deeper.get(kind, {"num_layers": 2, "num_single_layers": 2}))})
    return pipe, call


def depths_of(pipe: Any) -> list[int]:
    whole = layers(denoiser(pipe))
    return [whole, 1, whole, whole - 1]


# The table


def test_parts_are_equal_shares_of_time():
    published = DepthSchedule((28, 28, 24, 24, 20, 20, 16, 16, 12, 12), 28)
    assert [published.depth(time) for time in (0, 199.9, 200, 399, 799, 800, 999, 1000)] == [
        28,
        28,
        24,
        24,
        16,
        12,
        12,
        12,
    ]
    assert DepthSchedule((2, 1), 2, train_timesteps=100).depth(50) == 1
    fine = DepthSchedule((1,) * 100, 1)
    assert [fine.part(10 * i) for i in range(100)] == list(range(100))  # 290 / 1000 * 100 is a little less than 29


@pytest.mark.parametrize("depths", [(), (0,), (4,), (1, -1), (1.5,)])
def test_other_depths_are_refused(depths):
    with pytest.raises(ValueError, match="whole numbers from 1 to 3"):
        DepthSchedule(depths, 3)


def test_names_of_networks():
    """Without maps a depth is one network; with them each part has its own."""
    schedule = DepthSchedule((3, 1, 1), 3)
    grid = Grid((900.0, 500.0, 100.0))
    assert schedule.plan(grid, {}).names() == ["depth 1", FULL]
    assert DepthSchedule((3, 1, 1), 3, mapped=True).plan(grid, {}).names() == [
        "depth 1, part 2",
        "depth 1, part 1",
        FULL,
    ]
    assert schedule.exits() == [(1, 1), (1, 2)]


# The choice


@pytest.mark.parametrize("seed", range(20))
def test_best_is_that_of_all(seed):
    draw_ = random.Random(seed)
    options = [sorted(draw_.sample(range(1, 9), 3)) for _ in range(5)]
    errors = [{depth: draw_.choice([draw_.random(), 0.5]) for depth in some} for some in options]
    costs = [{depth: draw_.choice([draw_.random(), depth / 8]) for depth in some} for some in options]
    for limit in (1.0, 2.0, 3.0, 10.0):
        sums = [
            (
                sum(e[d] for e, d in zip(errors, chosen, strict=True)),
                sum(c[d] for c, d in zip(costs, chosen, strict=True)),
            )
            for chosen in itertools.product(*options)
        ]
        fitting = [error for error, cost in sums if cost <= limit]
        if not fitting:
            cheapest = min(cost for _, cost in sums)
            with pytest.raises(ValueError, match=f"down to {cheapest:.4g} at best, not to {limit:.4g}"):
                best(errors, costs, limit)
            continue
        chosen, error = best(errors, costs, limit)
        assert error == pytest.approx(min(fitting))
        assert sum(e[d] for e, d in zip(errors, chosen, strict=True)) == pytest.approx(error)
        assert sum(c[d] for c, d in zip(costs, chosen, strict=True)) <= limit * (1 + 1e-9)


# In pipelines


def oracle(toy: Toy, depths: list[int], maps: Any = None, scheduler: Any = None) -> Any:
    """The picture if every call of the network is of the depth of its timestep."""
    network = denoiser(toy[0])

    def chosen(original: Any, *args: Any, **kwargs: Any) -> Any:
        time = kwargs["timestep"] if "timestep" in kwargs else args[1]
        time = float(time.flatten()[0]) * (1000 if isinstance(network, diffusers.FluxTransformer2DModel) else 1)
        part = min(3, int(time / 250))
        leaving = shallow(network, depths[part], maps and maps.get((depths[part], part)))
        return (original if leaving is network else leaving)(*args, **kwargs)

    with forward(network, chosen):
        return draw(toy, scheduler or toy[0].scheduler, STEPS)


@pytest.mark.parametrize("kind", KINDS)
def test_picture_is_that_of_the_oracle_and_goes_back(kind):
    pipe, call = toy(kind)
    depths = depths_of(pipe)
    alone, expected = draw((pipe, call), pipe.scheduler, STEPS), oracle((pipe, call), depths)
    state = {name: value.clone() for name, value in denoiser(pipe).state_dict().items()}
    handle = early_exit(pipe, depths)
    assert torch.equal(draw((pipe, call), pipe.scheduler, STEPS), expected)
    assert not torch.equal(expected, alone)
    report, parts = handle.report(), [min(3, int(time / 250)) for time in handle.grid.timesteps]
    handle.remove()
    assert torch.equal(draw((pipe, call), pipe.scheduler, STEPS), alone)
    assert all(torch.equal(value, state[name]) for name, value in denoiser(pipe).state_dict().items())
    assert "forward" not in denoiser(pipe).__dict__
    assert sum(report.calls.values()) == STEPS

    calls: list[Any] = []
    hook = denoiser(pipe).register_forward_pre_hook(lambda _, *given: calls.append(given), with_kwargs=True)
    draw((pipe, call), pipe.scheduler, STEPS)
    hook.remove()
    args, kwargs = calls[0]
    each = {depth: macs(shallow(denoiser(pipe), depth), *args, **kwargs) for depth in depths}
    assert report.macs == report.planned == sum(each[depths[part]] for part in parts)
    assert report.full == STEPS * each[depths[0]]


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_maps_by_part_of_time(kind):
    pipe, call = toy(kind)
    channels = (16, 8) if kind == "sd" else (denoiser(pipe).inner_dim,) * 2
    maps = {(1, part): LinearExit(noise(*channels, seed=part), noise(channels[0])) for part in (1, 3)}
    depths = [layers(denoiser(pipe)), 1, layers(denoiser(pipe)), 1]
    expected = oracle((pipe, call), depths, maps)
    with early_exit(pipe, depths, maps=maps) as handle:
        assert torch.equal(draw((pipe, call), pipe.scheduler, STEPS), expected)
        parts = [min(3, int(time / 250)) for time in handle.grid.timesteps]
        assert set(handle.report().calls) == {f"depth 1, part {p}" if p in (1, 3) else FULL for p in parts}
        del maps[1, 3]
    with pytest.raises(ValueError, match="no map for depth 1 in part 3"):
        early_exit(pipe, depths, maps=maps)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_solvers(solver):
    """The oracle knows the timesteps that the network is told, also between the steps of the solver."""
    pipe, call = toy("sd")
    scheduler = diffaccel.scheduler(solver, pipe)
    expected = oracle((pipe, call), [2, 1, 2, 1], scheduler=scheduler)
    with early_exit(pipe, [2, 1, 2, 1]):
        assert torch.equal(draw((pipe, call), diffaccel.scheduler(solver, pipe), STEPS), expected)


def test_copies_have_the_policy_and_weights_of_their_own():
    pipe, call = toy("dit")
    expected = oracle((pipe, call), [3, 2, 1, 1])
    early_exit(pipe, [3, 2, 1, 1])
    copied = copy.deepcopy(pipe)
    for parameter in denoiser(pipe).parameters():
        parameter.data.zero_()
    assert torch.equal(draw((copied, call), copied.scheduler, STEPS), expected)
    handle = attached(copied)
    assert handle is not None
    handle.remove()
    assert not torch.equal(draw((copied, call), copied.scheduler, STEPS), expected)


def test_compile():
    torch._dynamo.reset()
    pipe, call = toy("sd3")
    depths = depths_of(pipe)
    expected = oracle((pipe, call), depths)
    with early_exit(pipe, depths) as handle:
        handle.compile(backend="eager")
        assert relative(draw((pipe, call), pipe.scheduler, STEPS), expected) < 1e-5


def test_refusals():
    pipe, call = toy("dit")
    with pytest.raises(ValueError, match="always computes all 3 layers"):
        early_exit(pipe, [3, 3])
    with pytest.raises(ValueError, match="whole numbers from 1 to 3"):
        early_exit(pipe, [3, 4])
    with pytest.raises(ValueError, match="for a network of depth 8, this DiTTransformer2DModel has 3"):
        early_exit(pipe, DepthSchedule((8, 4), 8))
    with pytest.raises(TypeError, match="cannot leave early a Sana"):
        early_exit(tiny.sana()[0], [1])
    assert attached(pipe) is None
    pipe.scheduler = diffusers.DDIMScheduler(**SD_BETAS, num_train_timesteps=100, clip_sample=False)
    with early_exit(pipe, [3, 1]) as handle:  # parts of this scheduler's time
        draw((pipe, call), pipe.scheduler, 4)
        assert handle.report().calls == {"depth 1": 2, FULL: 2}


def test_schedulers_that_count_otherwise_are_refused():
    pipe, call = tiny.playground()
    pipe = copy.deepcopy(pipe)
    with early_exit(pipe, [2, 1]), pytest.raises(ValueError, match="counts in training timesteps"):
        draw((pipe, call), pipe.scheduler, 4)
