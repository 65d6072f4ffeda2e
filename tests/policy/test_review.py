"""What a first reader of the code tripped over."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from accelerate import cpu_offload

import diffaccel
from diffaccel.samplers.policy import attach
from diffaccel.samplers.policy.exits import DepthSchedule, shallow
from diffaccel.samplers.policy.plan import Grid, Plan
from diffaccel.samplers.policy.spent import Spent
from diffaccel.samplers.policy.stitch import Stitch, check_numbers
from tests import tiny


def test_a_schedule_of_fitted_exits_is_refused_without_its_maps():
    pipe = copy.deepcopy(tiny.sd()[0])
    with pytest.raises(ValueError, match=r"maps=fitted\.maps"):
        diffaccel.early_exit(pipe, DepthSchedule((2, 1), 2, mapped=True))
    assert "_diffusers_hook" not in vars(pipe.unet)


@pytest.mark.parametrize("times", [(1.1, 0.2, -1.55), (1.57, 0.5), (0.8, 0.4, -0.98)])
def test_timesteps_of_another_kind_are_refused(times):
    with pytest.raises(ValueError, match="counts in training timesteps"):
        Stitch(("small",), timesteps=(600.0,)).plan(Grid(times), {})
    with pytest.raises(ValueError, match="counts in training timesteps"):
        DepthSchedule((2, 1), 2).plan(Grid(times), {})
    assert Grid((999.0, 1.0, 0.0)).training_times() == (999.0, 1.0, 0.0)


def test_sigma_for_a_timestep_is_refused():
    with pytest.raises(ValueError, match="write timestep=600"):
        check_numbers(1, (), (0.6,))


def test_a_share_of_no_step_is_told(monkeypatch, caplog):
    told = logging.getLogger("diffaccel.samplers.policy.stitch")
    monkeypatch.setattr(told, "propagate", True)
    with caplog.at_level(logging.WARNING, logger=told.name):
        plan = Stitch(("small",), (0.05,)).plan(Grid(tuple(range(6, 0, -1))), {})
        Stitch(("small",), (0.4,)).plan(Grid(tuple(range(6, 0, -1))), {})
    assert plan.names() == ["full"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize(("pictures", "copies"), [(1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 1)])
def test_pictures_are_counted_whatever_the_guidance(pictures, copies):
    sample = torch.randn(pictures, 4, 8, 8).repeat(copies, 1, 1, 1)
    assert Spent.of_run(Plan.same(["full"]), 0, {"sample": sample}).pictures == pictures


def test_views_are_where_their_network_is(monkeypatch):
    """With `offload`, a step of a view needs the weights of the whole network."""
    pipe, call = tiny.sd()
    pipe = copy.deepcopy(pipe)
    placed: list[Any] = []
    move = type(pipe.unet).to

    def to(module: Any, *args: Any, **kwargs: Any) -> Any:
        placed.append((args or tuple(kwargs.values()))[0])
        return move(module, *args, **kwargs)

    class Half:
        def plan(self, grid: Grid, conditioning: Any) -> Plan:
            return Plan.same(["full"] * 2 + ["view"] * (len(grid) - 2))

    monkeypatch.setattr(type(pipe.unet), "to", to)
    with attach(pipe, Half(), {"view": lambda unet: shallow(unet, 1)}, offload=True):
        tiny.draw((pipe, call), pipe.scheduler, 4)
        assert placed[-1] == torch.device("cpu")  # the latents' device, a `torch.device`: not the "cpu" of waiting
        assert isinstance(placed[-1], torch.device)


def test_exits_are_not_fitted_on_offloaded_weights():
    pipe, call = tiny.sd()
    pipe = copy.deepcopy(pipe)
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="fit the exits before"):
        diffaccel.fit_exits(pipe, [call, call])


def test_a_function_is_no_policy():
    with pytest.raises(TypeError, match="an object with plan"):
        attach(tiny.sd()[0], lambda grid, conditioning: Plan.same([]), {})  # type: ignore[arg-type]
