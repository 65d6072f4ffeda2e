"""Plans are tables that are looked up."""

from __future__ import annotations

import pytest

from diffaccel.samplers.policy import FULL, Grid, Plan
from diffaccel.samplers.policy.stitch import Stitch


def test_one_name_stands_for_all_samples():
    plan = Plan.same(["small", "small", FULL])
    assert [plan(step, sample) for step in range(3) for sample in (0, 5)] == ["small"] * 4 + [FULL] * 2
    assert list(plan) == [("small",), ("small",), (FULL,)]


def test_a_name_for_each_sample():
    plan = Plan((("a", FULL, "a"), (FULL, FULL, "b")))
    assert [plan(0, sample) for sample in range(3)] == ["a", FULL, "a"]
    assert [plan(1, sample) for sample in range(3)] == [FULL, FULL, "b"]
    assert plan.names() == ["a", FULL, "b"]


def test_a_grid_has_the_steps_that_are_left_out_too():
    assert len(Grid((900.0, 500.0, 100.0), first=1)) == 3


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 1 / 3, 0.4, 0.5, 0.99, 1.0])
def test_stitch_is_the_floor_of_the_share(steps, fraction):
    names = Stitch(("small",), (fraction,)).plan(Grid(tuple(range(steps, 0, -1))), {})
    count = sum(row == ("small",) for row in names)
    assert count <= fraction * steps + 1e-6 < count + 1
    assert list(names) == [("small",)] * count + [(FULL,)] * (steps - count)


def test_sums_of_shares_do_not_lose_a_step():
    for n in (10, 20, 30, 50, 100):
        grid = Grid(tuple(range(n, 0, -1)))
        for tenths in ((1, 2, 7), (7, 1, 2), (3, 3, 3), (0, 8, 1)):
            plan = Stitch(("a", "b", "c"), tuple(share / 10 for share in tenths)).plan(grid, {})
            counts = [sum(row == (name,) for row in plan) for name in ("a", "b", "c")]
            assert counts == [share * n // 10 for share in tenths]


def test_stitch_by_timesteps_looks_at_each():
    stitch = Stitch(("a", "b"), timesteps=(700.0, 300.0))
    assert list(stitch.plan(Grid((999.0, 700.0, 699.0, 300.0, 299.0)), {})) == [("a",), ("a",), ("b",), ("b",), (FULL,)]
