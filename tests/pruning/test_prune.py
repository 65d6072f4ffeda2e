"""`propose` and `prune`: what is chosen by default, what is refused, and that the numbers told are right."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import diffaccel
from diffaccel.cost import macs, parameters
from diffaccel.pruning import example_inputs, find_groups, propose, prune, random_calls, record
from diffaccel.pruning.groups import DEPTH, WIDTH
from tests import tiny
from tests.pruning.toys import TOYS, toy

BUDGETS = ("uniform", "global", "knapsack")
CRITERIA = ("magnitude", "random", "evenly_spaced")


def small(name: str) -> dict[str, Any]:
    return example_inputs(toy(name), size=8, text_length=None if "unconditional" in name or "dit" in name else 4)


@pytest.mark.parametrize("name", sorted(TOYS))
def test_numbers_are_those_of_the_networks(name: str) -> None:
    model, inputs = toy(name), small(name)
    pruned = prune(model, 0.8, inputs=inputs)
    assert pruned.macs == (macs(model, **inputs), macs(pruned.model, **inputs))
    assert pruned.parameters == (parameters(model), parameters(pruned.model))
    assert pruned.macs[1] <= 0.8 * pruned.macs[0]
    assert pruned.plan.facts["planned"] == pytest.approx(pruned.macs[1] / pruned.macs[0], rel=1e-9)
    assert pruned.model(**inputs)[0].isfinite().all()
    assert all(value.equal(other) for value, other in zip(model.parameters(), toy(name).parameters(), strict=True))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_budget_reaches_the_target(criterion: str, budget: str) -> None:
    model, inputs = toy("dit"), small("dit")
    pruned = prune(model, 0.7, criterion=criterion, budget=budget, inputs=inputs)
    assert 0.6 < pruned.macs[1] / pruned.macs[0] <= 0.7
    facts = {key: pruned.plan.facts[key] for key in ("criterion", "budget", "cost", "target", "kinds")}
    assert facts == {
        "criterion": criterion,
        "budget": budget,
        "cost": "macs",
        "target": 0.7,
        "kinds": ["heads", "neurons", "channels"],
    }


@pytest.mark.parametrize("kinds", [WIDTH, DEPTH, WIDTH + DEPTH, ("neurons",), ["block"]])
def test_kinds(kinds: Any) -> None:
    model = toy("flux")
    pruned = prune(model, 0.7, kinds=kinds, inputs=small("flux"))
    found = find_groups(model).found
    assert {found[name].kind for name in pruned.plan.removed} <= set(kinds)
    assert pruned.macs[1] <= 0.7 * pruned.macs[0]


def test_parameters_may_be_the_cost() -> None:
    pruned = prune(toy("sd15"), 0.8, cost="parameters", inputs=small("sd15"))
    assert 0.75 < pruned.parameters[1] / pruned.parameters[0] <= 0.8
    assert pruned.plan.facts["planned"] == pytest.approx(pruned.parameters[1] / pruned.parameters[0], rel=1e-9)


def test_latency_may_be_the_cost() -> None:
    pruned = prune(toy("dit"), 0.9, cost="latency", inputs=small("dit"), kinds=("block", "neurons"))
    assert pruned.plan.facts["planned"] <= 0.9
    assert pruned.plan.removed


def test_a_pipeline_stands_for_its_denoiser() -> None:
    pipe, call = tiny.sd()
    before = pipe.unet
    pruned = diffaccel.pruning.prune(pipe, 0.8)
    assert pipe.unet is before
    assert pruned.plan.removed == prune(pipe.unet, 0.8).plan.removed
    pipe.unet = pruned.model
    try:
        latents = pipe(num_inference_steps=2, **call)[0]
    finally:
        pipe.unet = before
    assert latents.isfinite().all()


@pytest.mark.parametrize("criterion", ["taylor", "activation", "flap"])
def test_calibrated_criteria(criterion: str) -> None:
    pipe, call = tiny.pixart()
    prompts = [{key: value for key, value in call.items() if key != "output_type"}]
    calibration = record(pipe, prompts, calls=2, steps=2)
    proposal = propose(pipe, 0.8, criterion=criterion, calibration=calibration)
    assert proposal.plan.facts["calls"] == 2
    assert proposal.plan.facts["calls_from"] == "trajectories"
    assert bool(proposal.fill) == (criterion == "flap")
    with pytest.raises(ValueError, match=f"{criterion} looks at calls of the network; give a calibration"):
        propose(pipe, 0.8, criterion=criterion)


def test_facts_and_seeds() -> None:
    inputs = small("dit")
    plans = [propose(toy("dit"), 0.7, criterion="random", seed=seed, inputs=inputs).plan for seed in (0, 0, 1)]
    assert plans[0].removed == plans[1].removed != plans[2].removed
    told = propose(toy("dit"), 0.7, inputs=inputs, facts={"by": "me", "target": "mine"}).plan.facts
    assert (told["by"], told["target"], told["diffaccel"]) == ("me", "mine", diffaccel.__version__)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"criterion": "foo"},
            "unknown criterion 'foo'; use taylor, activation, flap, magnitude, random, evenly_spaced",
        ),
        ({"budget": "foo"}, "unknown budget 'foo'; use uniform, global, knapsack"),
        ({"cost": "foo"}, "unknown cost 'foo'; use macs, parameters, latency"),
        ({"kinds": "heads"}, "kinds is a list of heads, neurons, .* not 'heads'"),
        ({"kinds": ()}, "kinds is a list of"),
        ({"kinds": ["foo"]}, "unknown kind 'foo'; use heads"),
        ({"kinds": ["channels"]}, "a DiTTransformer2DModel has no channels to remove; it has block, heads, neurons"),
        ({"target": 0}, r"in \(0, 1\], not 0"),
        ({"target": 1.1}, r"in \(0, 1\], not 1.1"),
        ({"target": float("nan")}, r"in \(0, 1\], not nan"),
        ({"target": 1}, "a target of 1 removes nothing; choose a lower one"),
        (
            {"target": 0.01},
            r"down to 0\.\d+ of the network's at best, not to 0.01; raise the target or allow more kinds",
        ),
    ],
)
def test_bad_input(options: dict[str, Any], words: str) -> None:
    target = options.pop("target", 0.7) if "target" in options else 0.7
    with pytest.raises(ValueError, match=words):
        propose(toy("dit"), target, inputs=small("dit"), **options)


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_lowest_target_that_is_told_can_be_reached(budget: str) -> None:
    with pytest.raises(ValueError, match="at best") as caught:
        propose(toy("dit"), 0.001, budget=budget, inputs=small("dit"))
    lowest = float(str(caught.value).split("down to ")[1].split()[0])
    pruned = prune(toy("dit"), lowest, budget=budget, inputs=small("dit"))
    assert pruned.macs[1] <= lowest * pruned.macs[0]


def test_a_target_out_of_reach_is_told_before_scores_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("diffaccel.pruning.prune")  # the package has a function of this name
    monkeypatch.setattr(module, "score", lambda *_, **__: pytest.fail("too late"))
    calibration = random_calls(toy("dit"), 1)
    with pytest.raises(ValueError, match=r"at best, not to 0.01"):
        propose(toy("dit"), 0.01, criterion="taylor", calibration=calibration, inputs=small("dit"))


@pytest.mark.parametrize("network", [torch.nn.Linear(2, 2), tiny.svd()[0].unet, "a text", None])
def test_other_networks(network: Any) -> None:
    with pytest.raises(TypeError, match=r"cannot prune a|has no network"):
        prune(network, 0.7)


def test_an_option_that_is_not_known() -> None:
    with pytest.raises(TypeError, match="foo"):
        prune(toy("dit"), 0.7, foo=1)


@pytest.mark.parametrize("name", ["pixart", "flux", "sd3"])
def test_one_block_of_a_transformer_stays(name):
    """A target that only the removal of all blocks would reach is refused before anything is scored."""
    model = toy(name)
    with pytest.raises(ValueError, match="raise the target"):
        prune(model, 0.02, kinds=["block"], inputs=example_inputs(model, size=8))
    smaller = prune(model, 0.6, kinds=["block"], inputs=example_inputs(model, size=8)).model
    assert len(smaller.transformer_blocks) >= 1


def test_pipelines_with_two_denoisers_and_float16_gradients_are_refused():
    pipe = SimpleNamespace(unet=toy("sd15"), prior=toy("sd15"))
    with pytest.raises(ValueError, match=r"several denoisers \(unet, prior\); pass one"):
        prune(pipe, 0.8)
    model = toy("sd15")
    with pytest.raises(ValueError, match="gradients vanish in float16"):
        prune(model.half(), 0.8, criterion="taylor", calibration=random_calls(model, 1, size=8))
