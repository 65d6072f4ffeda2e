"""Fitted exits: what is fitted on what, what is measured, and what is written."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import diffaccel
from diffaccel.pruning.calibration import record, run
from diffaccel.samplers.policy.exits import FittedExits, LinearExit, early_exit, fit_exits, layers, shallow
from diffaccel.samplers.policy.exits.linear import LeastSquares
from diffaccel.samplers.policy.exits.tap import listening
from diffaccel.samplers.policy.exits.transformer import taps
from tests import tiny
from tests.policy import KINDS, denoiser, like
from tests.tiny import Toy, draw, noise, relative

CONFIG: dict[str, dict[str, Any]] = {
    "dit": {"num_layers": 4},
    "pixart": {"num_layers": 3},
    "sd3": {"num_layers": 3},
    "flux": {"num_layers": 2, "num_single_layers": 2},
}


def toy(kind: str) -> Toy:
    pipe, call = getattr(tiny, kind)()
    pipe = copy.deepcopy(pipe)
    network = like(denoiser(pipe), **CONFIG.get(kind, {}))
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.15 if parameter.ndim > 1 else 0.3, generator=generator)
    pipe.register_modules(**{"unet" if "unet" in pipe.components else "transformer": network})
    return pipe, call


def prompts(call: dict[str, Any], count: int = 4) -> list[dict[str, Any]]:
    """Unlike each other in their text embeddings, or labels."""
    if "class_labels" in call:
        return [{**call, "class_labels": [i]} for i in range(count)]
    names = [name for name in call if name.endswith("embeds")]
    return [{**call, **{name: call[name] + noise(*call[name].shape, seed=i) for name in names}} for i in range(count)]


class Affine(torch.nn.Module):
    """In place of a block of a DiT: every token by one affine map."""

    def __init__(self, block: Any, seed: int):
        super().__init__()
        self.norm1 = block.norm1
        self.map = torch.nn.Linear(8, 8)
        self.map.load_state_dict({"weight": torch.eye(8) + 0.3 * noise(8, 8, seed=seed), "bias": noise(8, seed=seed)})

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.map(hidden_states)


def affine_dit() -> Toy:
    """Blocks 2 and 3 are affine; 0 and 1 are not."""
    pipe, call = toy("dit")
    blocks = pipe.transformer.transformer_blocks
    for i in (2, 3):
        blocks[i] = Affine(blocks[i], i)
    return pipe, call


def test_affine_layers_are_found():
    pipe, call = affine_dit()
    maps = [block.map for block in pipe.transformer.transformer_blocks[2:]]
    weight, bias = maps[1].weight @ maps[0].weight, maps[1].weight @ maps[0].bias + maps[1].bias
    calls, sums = record(pipe, prompts(call, 2), calls=8, steps=4).calls, LeastSquares()
    with torch.no_grad(), listening(pipe.transformer, dict(enumerate(taps(pipe.transformer, 2)))) as heard:
        for one in calls:
            run(pipe.transformer, one)
            sums.add(heard[0], heard[1], one.weight)
    found = sums.solve(True, 1e-10)
    assert relative(found.weight, weight.detach()) < 1e-4
    assert relative(found.bias, bias.detach()) < 1e-4


def test_nothing_is_lost_where_layers_are_affine(monkeypatch):
    """But for the ridge, which a toy feels: its features differ little."""
    pipe, call = affine_dit()
    fitted, solve = fit_exits(pipe, prompts(call), parts=2, steps=4), LeastSquares.solve
    monkeypatch.setattr(LeastSquares, "solve", lambda sums, residual: solve(sums, residual, 1e-8))
    for errors in fit_exits(pipe, prompts(call), parts=2, steps=4).errors:
        assert errors[4] == 0
        assert max(errors[2], errors[3]) < 1e-12 < 1e-7 < errors[1]
    monkeypatch.setattr(LeastSquares, "solve", lambda *_: LinearExit(torch.eye(8), torch.zeros(8)))
    for errors, skipping in zip(fitted.errors, fit_exits(pipe, prompts(call), parts=2, steps=4).errors, strict=True):
        assert max(errors[2], errors[3]) < 2e-3 * min(skipping[2], skipping[3])


def test_cost_that_is_foretold_is_the_cost():
    pipe, call = affine_dit()
    fitted = fit_exits(pipe, prompts(call), parts=2, steps=4)
    schedule = fitted.schedule(0.7)
    alone = draw((pipe, call), pipe.scheduler, 4)
    with early_exit(pipe, schedule, maps=fitted.maps) as handle:
        assert relative(draw((pipe, call), pipe.scheduler, 4), alone) < 0.02
        report = handle.report()
    share = sum(costs[depth] for costs, depth in zip(fitted.costs, schedule.depths, strict=True))
    assert report.macs / report.full == pytest.approx(share, rel=1e-6)
    assert report.macs <= 0.7 * report.full


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_those_of_other_prompts(kind):
    """Measured again by hand: weighted squares over the calls of every second prompt."""
    pipe, call = toy(kind)
    texts, parts, steps = prompts(call), 2, 4
    fitted = fit_exits(pipe, texts, parts=parts, steps=steps, seed=3)
    network = denoiser(pipe)
    scale = 1000 if kind == "flux" else 1

    def measured(few: list[Any], seed: int) -> dict[tuple[int, int], float]:
        calls = record(pipe, few, calls=99, steps=steps, seed=seed).calls
        sums: dict[tuple[int, int], float] = {}
        for one in calls:
            timestep = one.kwargs["timestep"] if "timestep" in one.kwargs else one.args[1]
            part = min(1, int(scale * float(timestep.flatten()[0]) / 500))
            for depth in range(1, layers(network)):
                with torch.no_grad():
                    difference = run(shallow(network, depth, fitted.maps[depth, part]), one) - run(network, one)
                sums[depth, part] = sums.get((depth, part), 0) + one.weight * float(difference.square().mean()) / len(
                    calls
                )
        return sums

    others = measured(texts[1::2], 3 + len(texts))
    for (depth, part), error in others.items():
        assert fitted.errors[part][depth] == pytest.approx(error, rel=1e-4)
    same = measured(texts[::2], 3)
    assert sum(same.values()) != pytest.approx(sum(others.values()), rel=1e-3)
    assert sum(costs[layers(network)] for costs in fitted.costs) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_maps_are_better_than_none(kind):
    """On the prompts that they were fitted on, the fit is no worse than the identity (SD3), or nothing (U-Net)."""
    pipe, call = toy(kind)
    fitted = fit_exits(pipe, prompts(call), parts=1, steps=4)
    calls = record(pipe, prompts(call)[::2], calls=99, steps=4).calls
    network = denoiser(pipe)
    error = {"fitted": 0.0, "plain": 0.0}
    width = fitted.maps[1, 0].weight.shape
    plain = LinearExit(torch.eye(*width) if kind == "sd3" else torch.zeros(width), torch.zeros(width[0]))
    for one in calls:
        for name, chosen in (("fitted", fitted.maps[1, 0]), ("plain", plain)):
            with torch.no_grad():
                error[name] += float((run(shallow(network, 1, chosen), one) - run(network, one)).square().mean())
    assert error["fitted"] < 0.9 * error["plain"]


def test_pipeline_is_as_it_was():
    pipe, call = toy("dit")
    pipe.transformer.train()
    pipe.transformer.proj_out_1.requires_grad_(False)
    asked = {name: weight.requires_grad for name, weight in pipe.transformer.named_parameters()}
    fit_exits(pipe, prompts(call), parts=2, steps=2, depths=[2])
    assert {name: weight.requires_grad for name, weight in pipe.transformer.named_parameters()} == asked
    assert all(module.training for module in pipe.transformer.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.transformer.modules())


def test_depths_that_may_be_chosen():
    pipe, call = toy("dit")
    fitted = fit_exits(pipe, prompts(call, 2), parts=2, steps=4, depths=[3, 1, 3])
    assert sorted({depth for depth, _ in fitted.maps}) == [1, 3]
    assert [sorted(errors) for errors in fitted.errors] == [[1, 3, 4]] * 2
    few = fit_exits(pipe, prompts(call, 2), parts=10, steps=2)
    assert sum(len(errors) > 1 for errors in few.errors) == 2  # parts without a step keep the whole network
    assert early_exit(pipe, few.schedule(0.9), maps=few.maps)


def test_written_and_read(tmp_path):
    pipe, call = toy("sd3")
    fitted = fit_exits(pipe, prompts(call, 2), parts=2, steps=4)
    fitted.save(tmp_path / "new" / "exits.safetensors")
    again = FittedExits.load(tmp_path / "new" / "exits.safetensors")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["exits.safetensors"]
    assert (again.errors, again.costs, again.layers) == (fitted.errors, fitted.costs, fitted.layers)
    assert again.train_timesteps == fitted.train_timesteps
    assert again.schedule(0.8) == fitted.schedule(0.8)
    assert again.maps.keys() == fitted.maps.keys()
    for key, exit_map in fitted.maps.items():
        assert torch.equal(again.maps[key].weight, exit_map.weight)
        assert torch.equal(again.maps[key].bias, exit_map.bias)
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no exits"):
        FittedExits.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [3]}, "give a list of two or more"),
        ({"prompts": "a cat"}, "give a list of two or more"),
        ({"parts": 0}, "give a list of two or more|one part or more"),
        ({"depths": [4]}, "exits lie at depths 1 to 3"),
        ({"depths": []}, "exits lie at depths 1 to 3"),
        ({"depths": [0]}, "exits lie at depths 1 to 3"),
        ({"steps": 0}, "steps"),
    ],
)
def test_refusals(arguments, message):
    pipe, call = toy("dit")
    with pytest.raises(ValueError, match=message):
        fit_exits(pipe, **{"prompts": prompts(call, 2), "steps": 2, **arguments})


def test_a_pipeline_with_a_policy_is_refused():
    pipe, call = toy("dit")
    with early_exit(pipe, [4, 1]), pytest.raises(ValueError, match="take it off before exits are fitted"):
        diffaccel.fit_exits(pipe, prompts(call, 2), steps=2)


@pytest.mark.parametrize("target", [0, -1, 1.01, 75])
def test_targets_are_shares(target):
    fitted = FittedExits({}, ({2: 0.0, 1: 0.5},), ({2: 1.0, 1: 0.4},), 2)
    with pytest.raises(ValueError, match="above 0 and up to 1"):
        fitted.schedule(target)
    with pytest.raises(ValueError, match=r"down to 0.4 at best, not to 0.3"):
        fitted.schedule(0.3)
    assert fitted.schedule(0.4).depths == (1,)
    assert fitted.schedule(1).depths == (2,)
