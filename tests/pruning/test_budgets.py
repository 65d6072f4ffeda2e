import re
from itertools import combinations, product

import numpy as np
import pytest

from diffaccel.pruning.budgets import allocate, knapsack
from diffaccel.pruning.costs.table import Costs, planned
from diffaccel.pruning.groups import DEPTH, Group

METHODS = ("uniform", "global", "knapsack")


def width(name, units, step=1, kind="heads"):
    return Group(f"{name}.{kind}", kind, units, (name,), step=step)


def depth(name, kind="block", modules=None):
    return Group(name, kind, 1, modules or (name,))


def network(groups, saved, scores, rest=0.0):
    """Costs and scores from what each unit of a group costs: one number, or all (units + 1,) costs by units kept."""
    kept = {g.name: np.asarray(s if np.ndim(s) else np.linspace(0, s, g.units + 1), float) for g, s in saved}
    held = {g.name for g in groups if any(other.contains(g) for other in groups)}
    total = rest + sum(kept[g.name][-1] for g in groups if g.name not in held)
    values = {g.name: np.asarray(s if np.ndim(s) else np.full(g.units, s), float) for g, s in scores}
    return Costs("macs", float(total), kept), values


def nested(rng, noisy):
    """A layer that holds a transformer of two blocks and a ResNet, and a block outside of it."""
    groups = [
        width("down.t.b0.attn", 3),
        width("down.t.b0.ff", 5, step=2, kind="neurons"),
        depth("out.b"),
        depth("down.t.b0"),
        width("down.t.b1.ff", 3, step=2, kind="neurons"),
        depth("down.t.b1"),
        depth("down.t", "transformer"),
        width("down.r", 2, kind="channels"),
        depth("down.r", "resnet"),
        depth("layer", "layer", ("down.t", "down.r")),
    ]
    kept: dict[str, np.ndarray] = {}
    for group in groups:
        inside = [g for g in groups if group.contains(g)]
        parts = [kept[g.name][-1] for g in inside if not any(other.contains(g) for other in inside)]
        own = sum(parts) + rng.uniform(1, 5)
        curve = np.linspace(0, own, group.units + 1)
        if noisy:  # a latency: neither linear nor always falling, and blocks that save less than what is inside
            curve += rng.uniform(-1, 1, group.units + 1) * own / 3
            curve[-1] = own
        kept[group.name] = curve
    scores = {g.name: rng.gamma(1, 1, g.units) * (3 if g.kind in DEPTH else 1) for g in groups}
    return groups, Costs("macs", kept["layer"][-1] + kept["out.b"][-1] + 2, kept), scores


def counts(group):
    return [*range(0, group.units, group.step), group.units]


def every_plan(groups, costs, scores):
    """Costs and sums of scores of every set of units of allowed sizes, those inside removed groups left out."""
    sets = [[units for n in counts(g) for units in combinations(range(g.units), n)] for g in groups]
    table = []
    for units in product(*sets):
        plan = {g.name: u for g, u in zip(groups, units, strict=True) if u}
        table.append((planned(costs, groups, plan), total(scores, plan)))
    return np.array(table).T


def total(scores, plan):
    return sum(scores[name][list(units)].sum() for name, units in plan.items())


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_knapsack_is_the_best_of_every_plan(seed, noisy):
    rng = np.random.default_rng(seed)
    groups, costs, scores = nested(rng, noisy)
    groups = groups[:4] + groups[6:]  # 17 thousand plans
    cost, score = every_plan(groups, costs, scores)
    reachable = cost.min() / costs.total
    for target in np.append(np.linspace(0.99, reachable + 1e-6, 20), rng.choice(cost, 20) / costs.total):
        if not 0 < target < 1:
            continue
        plan = allocate(groups, scores, costs, target, "knapsack")
        allowed = cost <= target * costs.total + 1e-9
        assert planned(costs, groups, plan) <= target * costs.total + 1e-9
        assert total(scores, plan) == pytest.approx(score[allowed].min())


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_plans_meet_the_target_in_whole_steps_lowest_scores_first(method, noisy):
    for seed in range(10):
        groups, costs, scores = nested(np.random.default_rng(seed), noisy)
        for target in (1.0, 0.95, 0.8, 0.6, 0.5):
            plan = allocate(groups, scores, costs, target, method)
            assert planned(costs, groups, plan) <= target * costs.total * (1 + 1e-9)
            assert [name for name in plan] == [g.name for g in groups if g.name in plan]
            for group in groups:
                units = plan.get(group.name, ())
                assert len(units) in counts(group)
                assert list(units) == sorted(np.argsort(scores[group.name])[: len(units)])
                assert not units or not any(outer.contains(group) for outer in groups if outer.name in plan)


def test_a_target_of_one_removes_nothing():
    groups, costs, scores = nested(np.random.default_rng(0), False)
    assert [allocate(groups, scores, costs, 1.0, method) for method in METHODS] == [{}, {}, {}]


@pytest.mark.parametrize("method", METHODS)
def test_a_target_that_is_met_exactly_is_not_overshot(method):
    group = width("attn", 10)
    costs, scores = network([group], [(group, 10.0)], [(group, np.arange(10))])
    for n in range(1, 10):
        assert allocate([group], scores, costs, 1 - n / 10, method) == {"attn.heads": tuple(range(n))}
        assert allocate([group], scores, costs, (10 - n) / 10, method) == {"attn.heads": tuple(range(n))}


@pytest.mark.parametrize("limit", [4, 32])
def test_knapsack_with_thinned_fronts_still_meets_every_target(monkeypatch, limit):
    groups, costs, scores = nested(np.random.default_rng(1), False)
    lowest = 2 / costs.total  # everything gone but what belongs to no group
    targets = [lowest, lowest + 1e-9, 0.3, 0.5, 0.7, 0.9]
    best = [total(scores, allocate(groups, scores, costs, t, "knapsack")) for t in targets]
    monkeypatch.setattr(knapsack, "LIMIT", limit)
    plans = [allocate(groups, scores, costs, t, "knapsack") for t in targets]
    assert all(planned(costs, groups, p) <= t * costs.total + 1e-9 for p, t in zip(plans, targets, strict=True))
    found = [total(scores, plan) for plan in plans]
    assert all(b - 1e-9 <= f <= b * (1.5 if limit == 4 else 1.1) + 1e-9 for b, f in zip(best, found, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_thinned_fronts_reach_all_that_can_be_saved(monkeypatch, seed):
    rng = np.random.default_rng(seed)
    groups = [width(f"a{i}", 4) for i in range(6)]
    costs, scores = network(groups, [(g, rng.uniform(1, 2)) for g in groups], [(g, rng.random(4)) for g in groups], 1)
    monkeypatch.setattr(knapsack, "LIMIT", 8)
    plan = allocate(groups, scores, costs, 1 / costs.total, "knapsack")
    assert [len(units) for units in plan.values()] == [4] * 6


def test_a_thinned_front_keeps_the_cheapest_plan_that_suffices(monkeypatch):
    monkeypatch.setattr(knapsack, "LIMIT", 4)
    saved, score = np.array([1, 2, 9.9, 10, 20, 50]), np.array([1, 2, 4, 5, 6, 100.0])
    assert list(knapsack._best(saved, score, 10.0, 0.0)) == [0, 2, 3]
    assert list(knapsack._best(saved, score, 10.0, 2.0)) == [1, 2, 3]  # 2 for 2 rather than 1 for 1


def test_knapsack_takes_a_block_whole_where_its_parts_lose_more():
    block, attn, ff = depth("b"), width("b.attn", 2), width("b.ff", 2, kind="neurons")
    groups = [attn, ff, block]
    costs, scores = network(groups, [(attn, 4), (ff, 4), (block, 10)], [(attn, 1), (ff, 2), (block, 3.5)])
    assert allocate(groups, scores, costs, 0.8, "knapsack") == {"b.attn.heads": (0,)}
    assert allocate(groups, scores, costs, 0.6, "knapsack") == {"b.attn.heads": (0, 1)}
    assert allocate(groups, scores, costs, 0.4, "knapsack") == {"b": (0,)}  # 3.5; heads and a neuron: 4


def test_units_that_cost_no_score_go_only_as_far_as_needed():
    groups = [width("a", 4), width("b", 4)]
    costs, scores = network(groups, [(g, 4.0) for g in groups], [(g, 0.0) for g in groups])
    for method in ("global", "knapsack"):
        plan = allocate(groups, scores, costs, 5 / 8, method)
        assert sum(map(len, plan.values())) == 3
    large, small = width("large", 1), width("small", 4)
    costs, scores = network([large, small], [(large, 3.0), (small, 4.0)], [(large, 0.0), (small, 0.0)])
    plan = allocate([large, small], scores, costs, 2 / 7, "knapsack")
    assert plan == {"large.heads": (0,), "small.heads": (0, 1)}


@pytest.mark.parametrize("method", METHODS)
def test_of_equal_scores_the_first_units_go(method):
    group = width("f", 640, step=64, kind="neurons")
    values = np.random.default_rng(0).integers(1, 3, 640)
    costs, scores = network([group], [(group, 10.0)], [(group, values)])
    plan = allocate([group], scores, costs, 0.8, method)
    assert plan == {"f.neurons": tuple(np.flatnonzero(values == 1)[:128])}


@pytest.mark.parametrize("method", METHODS)
def test_units_that_save_nothing_stay(method):
    flat, steep, dead = width("flat", 4), width("steep", 4), depth("dead")
    saved = [(flat, [1, 2, 3, 3, 3]), (steep, 4.0), (dead, [3, 3])]
    costs, scores = network([flat, steep, dead], saved, [(flat, 0.0), (steep, 1), (dead, 0.0)], rest=10)
    for target in (0.95, 0.9, 0.8, 0.75):
        plan = allocate([flat, steep, dead], scores, costs, target, method)
        assert "dead" not in plan
        assert len(plan.get("flat.heads", ())) in (0, 3, 4)


def test_uniform_takes_the_same_share_everywhere():
    heads, neurons, channels = width("a", 8), width("f", 640, step=64, kind="neurons"), width("r", 4, kind="channels")
    blocks, resnets = [depth(f"b{i}") for i in range(4)], [depth(f"r{i}", "resnet") for i in range(2)]
    groups = [heads, neurons, channels, *blocks, *resnets]
    scores = [(heads, np.arange(8)[::-1]), (neurons, np.arange(640)), (channels, [3, 1, 2, 0])]
    scores += [(b, s) for b, s in zip(blocks + resnets, [4, 1, 3, 2, 100, 200], strict=True)]
    costs, scores = network(groups, [(g, 1.0) for g in groups], scores)
    half = {
        "a.heads": (4, 5, 6, 7),
        "f.neurons": tuple(range(320)),
        "r.channels": (1, 3),
        "b1": (0,),
        "b3": (0,),
        "r0": (0,),
    }
    assert allocate(groups, scores, costs, 0.5, "uniform") == half
    third = allocate(groups, scores, costs, (9 - 0.25 - 0.2 - 0.25 - 1) / 9, "uniform")
    assert {name: len(units) for name, units in third.items()} == {
        "a.heads": 2,
        "f.neurons": 128,
        "r.channels": 1,
        "b1": 1,
    }


def test_uniform_shares_blocks_among_those_that_save():
    heads, dead, *blocks = width("a", 12), depth("dead"), depth("b0"), depth("b1")
    groups = [heads, dead, *blocks]
    saved = [(heads, 12.0), (dead, [1, 1]), (blocks[0], 4.0), (blocks[1], 4.0)]
    costs, scores = network(groups, saved, [(heads, 1), (dead, 0), (blocks[0], 1), (blocks[1], 2)])
    assert allocate(groups, scores, costs, 1 - 10 / 21, "uniform") == {"a.heads": (0, 1, 2, 3, 4, 5), "b0": (0,)}


def test_uniform_lets_places_keep_a_step_that_the_target_does_not_need():
    groups = [width(f"a{i}", 4) for i in range(4)]
    costs, scores = network(groups, [(g, 4.0 * (i + 1)) for i, g in enumerate(groups)], [(g, 0) for g in groups])
    plan = allocate(groups, scores, costs, 1 - 13 / 40, "uniform")  # a quarter of each saves 10, half of each 20
    assert {name: len(units) for name, units in plan.items()} == {f"a{i}.heads": n for i, n in enumerate((2, 2, 1, 1))}


def test_uniform_compares_scores_of_one_place_only():
    groups = [width("a", 4), width("b", 4)]
    costs, scores = network(groups, [(g, 4.0) for g in groups], [(groups[0], [-3, 1, -4, 2]), (groups[1], 1e9)])
    assert allocate(groups, scores, costs, 0.5, "uniform") == {"a.heads": (0, 2), "b.heads": (0, 1)}


def test_global_ranks_by_score_per_cost():
    heads, neurons, block = width("a", 2), width("f", 4, step=2, kind="neurons"), depth("b")
    groups = [heads, neurons, block]
    saved = [(heads, 20.0), (neurons, 4.0), (block, 30.0)]
    costs, scores = network(groups, saved, [(heads, [5, 20]), (neurons, [1, 0.5, 3, 3]), (block, 45)], rest=46)
    order = [  # per cost: head 0.5, two neurons 0.75, block 1.5, head 2, two neurons 3
        ("a.heads", 10),
        ("f.neurons", 2),
        ("b", 30),
        ("a.heads", 10),
    ]
    expected, saved_so_far = {}, 0
    for name, cost in order:
        saved_so_far += cost
        expected[name] = expected.get(name, 0) + (2 if name == "f.neurons" else 1)
        plan = allocate(groups, scores, costs, 1 - saved_so_far / 100, "global")
        assert {name: len(units) for name, units in plan.items()} == expected


def test_global_sees_behind_a_step_that_saves_little():
    stepped, block = width("s", 3), depth("b")
    groups = [stepped, block]
    costs, scores = network(groups, [(stepped, [0, 9.8, 9.9, 10]), (block, 20.0)], [(stepped, 1), (block, 100)])
    assert allocate(groups, scores, costs, 2 / 3, "global") == {"s.heads": (0, 1, 2)}


def test_global_puts_back_what_the_last_and_largest_made_unnecessary():
    small, large = width("s", 3), depth("b")
    costs, scores = network([small, large], [(small, 3.0), (large, 10.0)], [(small, [1, 2, 3]), (large, 40)])
    assert allocate([small, large], scores, costs, 1 - 2 / 13, "global") == {"s.heads": (0, 1)}
    assert allocate([small, large], scores, costs, 1 - 4 / 13, "global") == {"b": (0,)}
    assert allocate([small, large], scores, costs, 1 - 11 / 13, "global") == {"s.heads": (0,), "b": (0,)}

    cheap, dear = width("cheap", 1), width("dear", 1)
    groups = [cheap, dear, large]
    costs, scores = network(groups, [(cheap, 1.0), (dear, 1.0), (large, 10.0)], [(cheap, 1), (dear, 3), (large, 40)])
    assert allocate(groups, scores, costs, 1 / 12, "global") == {"cheap.heads": (0,), "b": (0,)}


@pytest.mark.parametrize("method", ["global", "knapsack"])
def test_a_block_that_saves_less_than_its_parts_hides_no_target(method):
    heads, block, outside = width("b.a", 2), depth("b"), width("o", 4)
    groups = [heads, block, outside]
    saved = [(heads, 4.0), (block, 3.0), (outside, 0.4)]
    costs, scores = network(groups, saved, [(heads, 1), (block, 9), (outside, [1, 2, 3, 4])], rest=2)
    assert allocate(groups, scores, costs, 1 - 4 / 5.4, method) == {"b.a.heads": (0, 1)}


def test_global_drops_what_is_inside_a_block_that_goes():
    heads, block, outside = width("b.a", 2), depth("b"), width("o", 2)
    groups = [heads, block, outside]
    costs, scores = network(
        groups, [(heads, 2.0), (block, 4.0), (outside, 4.0)], [(heads, 1), (block, 6), (outside, 9)]
    )
    assert allocate(groups, scores, costs, 1 - 2 / 8, "global") == {"b.a.heads": (0, 1)}
    assert allocate(groups, scores, costs, 1 - 3 / 8, "global") == {"b": (0,)}


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_lowest_share_in_the_message_can_be_reached(method, noisy):
    groups, costs, scores = nested(np.random.default_rng(3), noisy)
    costs = Costs("macs", costs.total + 50, costs.kept)
    with pytest.raises(ValueError, match="raise the target or allow more kinds") as error:
        allocate(groups, scores, costs, 0.05, method)
    lowest = float(re.findall(r"down to (\d\.\d+)", str(error.value))[0])
    assert allocate(groups, scores, costs, lowest, method)
    with pytest.raises(ValueError, match=f"down to {lowest:.4f}"):
        allocate(groups, scores, costs, lowest - 2e-4, method)


@pytest.mark.parametrize("target", [0, -0.5, 1.01, 70, float("nan")])
def test_a_target_is_a_share(target):
    groups, costs, scores = nested(np.random.default_rng(0), False)
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        allocate(groups, scores, costs, target)


def test_unsuitable_input_is_refused():
    group = width("a", 4)
    costs, scores = network([group], [(group, 4.0)], [(group, 1.0)])
    with pytest.raises(ValueError, match="unknown method 'best'; use 'uniform', 'global', 'knapsack'"):
        allocate([group], scores, costs, 0.5, "best")  # type: ignore
    with pytest.raises(ValueError, match="no groups"):
        allocate([], scores, costs, 0.5)
    with pytest.raises(ValueError, match=r"'a\.heads' is given twice"):
        allocate([group, group], scores, costs, 0.5)
    with pytest.raises(ValueError, match=r"scores of a\.heads are missing"):
        allocate([group], {}, costs, 0.5)
    with pytest.raises(ValueError, match=r"costs of a\.heads are missing"):
        allocate([group], scores, Costs("macs", 4.0, {}), 0.5)
    with pytest.raises(ValueError, match=r"scores of a\.heads must be 4 finite numbers, not shape \(3,\)"):
        allocate([group], {"a.heads": np.ones(3)}, costs, 0.5)
    with pytest.raises(ValueError, match="4 finite numbers, not NaN or inf"):
        allocate([group], {"a.heads": np.array([1, 2, np.nan, 3])}, costs, 0.5)
    with pytest.raises(ValueError, match="must be positive"):
        allocate([group], scores, Costs("macs", 0.0, costs.kept), 0.5)


@pytest.mark.parametrize("method", ["global", "knapsack"])
def test_scores_that_are_no_losses_are_refused_where_they_would_be_added(method):
    group = width("a", 4)
    costs, scores = network([group], [(group, 4.0)], [(group, [1, -0.1, 2, 3])])
    with pytest.raises(ValueError, match="clip them at 0"):
        allocate([group], scores, costs, 0.5, method)


def test_groups_that_cross_are_refused():
    one, two = depth("one", "layer", ("x", "y")), depth("two", "layer", ("y.inner", "z"))
    costs, scores = network([one, two], [(one, 1.0), (two, 1.0)], [(one, 1.0), (two, 1.0)])
    with pytest.raises(ValueError, match="share y, but neither holds the other"):
        allocate([one, two], scores, costs, 0.9)
    part, whole = depth("r.body", "resnet", ("r.conv",)), width("r", 4, kind="channels")
    costs, scores = network([part, whole], [(part, 1.0), (whole, 1.0)], [(part, 1.0), (whole, 1.0)])
    with pytest.raises(ValueError, match="neither holds the other"):
        allocate([part, whole], scores, costs, 0.9)


def test_of_two_depths_with_the_same_modules_one_goes():
    one, two, heads = depth("b0"), depth("also b0", "layer", ("b0",)), width("b0.a", 2)
    groups = [heads, one, two]
    costs = Costs(
        "macs", 5.0, {"b0.a.heads": np.array([0, 2.0, 4]), "b0": np.array([0, 5.0]), "also b0": np.array([0, 5.0])}
    )
    scores = {"b0.a.heads": np.ones(2), "b0": np.ones(1), "also b0": np.full(1, 0.5)}
    assert allocate(groups, scores, costs, 0.1, "knapsack") == {"also b0": (0,)}
    assert len(allocate(groups, scores, costs, 0.1, "global")) == 1
