"""What is attached can be taken off, copied and saved, and leaves nothing behind."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook

import diffaccel
from diffaccel.samplers.policy import FULL, Grid, Plan, attach, attached
from tests.policy import KINDS, Fixed, calls, denoiser, like, oracle, smaller, toy
from tests.tiny import draw, relative


class Doubled(ModelHook):
    def post_forward(self, module: Any, output: Any) -> Any:
        return tuple(2 * part for part in output)


def with_nothing(network: Any) -> None:
    pass


def with_a_forward(network: Any) -> None:
    original = network.forward
    network.forward = lambda *args, **kwargs: tuple(-part for part in original(*args, **kwargs))


def with_a_hook(network: Any) -> None:
    HookRegistry.check_if_exists_or_initialize(network).register_hook(Doubled(), "doubled")


@pytest.mark.parametrize("before", [with_nothing, with_a_forward, with_a_hook])
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_removed_without_a_trace(name, before):
    toy_ = toy(name)
    network = denoiser(toy_[0])
    before(network)
    expected = draw(toy_, toy_[0].scheduler, 3)
    attributes, forward = dict(vars(network)), vars(network).get("forward")
    handle = diffaccel.stitch(toy_[0], smaller(toy_[0]), 0.7)
    assert not torch.equal(draw(toy_, toy_[0].scheduler, 3), expected)
    handle.remove()
    assert vars(network) == attributes
    assert vars(network).get("forward") is forward
    assert torch.equal(draw(toy_, toy_[0].scheduler, 3), expected)
    handle.remove()  # a second time does nothing
    assert vars(network) == attributes


@pytest.mark.parametrize("name", KINDS)
def test_removed_at_the_end_of_a_block(name):
    pipe, call = toy(name)
    expected = draw((pipe, call), pipe.scheduler, 3)
    keys = set(vars(denoiser(pipe))) - {"_diffusers_hook"}  # Diffusers' own cache contexts make one
    with diffaccel.stitch(pipe, smaller(pipe)):
        draw((pipe, call), pipe.scheduler, 3)
    assert set(vars(denoiser(pipe))) == keys
    assert torch.equal(draw((pipe, call), pipe.scheduler, 3), expected)


def test_other_hook_that_came_later_stays():
    pipe, call = toy("sd")
    handle = diffaccel.stitch(pipe, smaller(pipe))
    with_a_hook(pipe.unet)
    draw((pipe, call), pipe.scheduler, 3)
    handle.remove()
    result = draw((pipe, call), pipe.scheduler, 3)
    plain, _ = toy("sd")
    with_a_hook(plain.unet)
    assert torch.equal(result, draw((plain, call), plain.scheduler, 3))
    pipe.unet._diffusers_hook.remove_hook("doubled")


@pytest.mark.parametrize("when", [1, 3])
def test_exception_in_the_middle_of_a_run(when):
    pipe, call = toy("sd")
    plain = draw((pipe, call), pipe.scheduler, 5)

    def fail(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == when:
            raise KeyboardInterrupt
        return kwargs

    small = smaller(pipe)
    expected = oracle((pipe, call), [small], [2], 5)
    handle = diffaccel.stitch(pipe, small)
    with pytest.raises(KeyboardInterrupt), handle:
        draw((pipe, call), pipe.scheduler, 5, callback_on_step_end=fail)
    assert torch.equal(draw((pipe, call), pipe.scheduler, 5), plain)
    with diffaccel.stitch(pipe, small):
        with pytest.raises(KeyboardInterrupt):
            draw((pipe, call), pipe.scheduler, 5, callback_on_step_end=fail)
        assert torch.equal(draw((pipe, call), pipe.scheduler, 5), expected)


def test_one_policy_at_a_time():
    pipe, _ = toy("sd")
    small = smaller(pipe)
    old = diffaccel.stitch(pipe, small)
    shares = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    for again in (pipe, shares):
        with pytest.raises(ValueError, match=r"pipe.unet has a policy already, .* off first: handle.remove\(\)"):
            diffaccel.stitch(again, small)
    found = attached(pipe)
    assert attached(shares) is None
    assert found is not None
    found.remove()
    with diffaccel.stitch(pipe, small):
        old.remove()  # is not of this one
        assert attached(pipe) is not None
    assert attached(pipe) is None


@pytest.mark.parametrize("used", [False, True])
def test_copy_of_a_pipeline(used):
    """It has a small network, a scheduler and a policy of its own."""
    pipe, call = toy("sd")
    small = smaller(pipe)
    handle = diffaccel.stitch(pipe, small)
    expected = draw((pipe, call), pipe.scheduler, 5)
    twin = copy.deepcopy(pipe)
    if used:
        assert torch.equal(draw((twin, call), twin.scheduler, 5), expected)
    for weight in (*pipe.unet.parameters(), *small.parameters()):
        weight.data.mul_(1.1)
    changed = draw((pipe, call), pipe.scheduler, 4)
    assert torch.equal(draw((twin, call), twin.scheduler, 5), expected)
    of_twin = attached(twin)
    assert of_twin is not None
    assert calls(of_twin) == {"small": 2, FULL: 3}
    assert calls(handle) == {"small": 1, FULL: 3}
    of_twin.remove()
    assert not torch.equal(draw((twin, call), twin.scheduler, 5), expected)
    assert "_diffusers_hook" not in vars(twin.unet)
    assert torch.equal(draw((pipe, call), pipe.scheduler, 4), changed)


def test_copy_that_was_not_used_yet():
    """Its policy is found, compiled and removed all the same; a copy of a copy too."""
    pipe, call = toy("flux")
    with diffaccel.stitch(pipe, smaller(pipe)):
        expected = draw((pipe, call), pipe.scheduler, 5)
        twin = copy.deepcopy(copy.deepcopy(pipe))
        handle = attached(twin)
        assert handle is not None
        handle.compile(backend="eager")
        assert relative(draw((twin, call), twin.scheduler, 5), expected) < 1e-5
        assert attached(twin) is not None
        unused = copy.deepcopy(twin)
    attached(unused).remove()  # type: ignore[union-attr]
    assert torch.equal(draw((unused, call), unused.scheduler, 5), draw((pipe, call), pipe.scheduler, 5))


@pytest.mark.parametrize("used", [False, True])
def test_copy_of_the_network_alone_is_plain(used):
    pipe, call = toy("sd")
    small, plain = smaller(pipe), draw((pipe, call), pipe.scheduler, 5)
    other = copy.copy(pipe)
    with diffaccel.stitch(pipe, small):
        other.unet = copy.deepcopy(pipe.unet)
        assert attached(other) is None
        if used:
            assert torch.equal(draw((other, call), other.scheduler, 5), plain)
        with diffaccel.stitch(other, small) as handle:
            draw((other, call), other.scheduler, 5)
            assert calls(handle) == {"small": 2, FULL: 3}
        assert set(vars(other.unet)) == set(vars(toy("sd")[0].unet))


def test_saved_as_the_large_network(tmp_path):
    pipe, call = toy("sd")
    plain = draw((pipe, call), pipe.scheduler, 3)
    with diffaccel.stitch(pipe, smaller(pipe)):
        draw((pipe, call), pipe.scheduler, 3)
        pipe.save_pretrained(tmp_path)
        with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
            pickle.dumps(pipe.unet)  # as with any hook of Diffusers
    pipe.unet = type(pipe.unet).from_pretrained(tmp_path / "unet")
    assert attached(pipe) is None
    assert torch.equal(draw((pipe, call), pipe.scheduler, 3), plain)


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (((FULL,),) * 4, "the plan has 4 steps, the run has 3; plan one row a step"),
        ((("smal",),) * 3, "the plan names 'smal'; the networks are full, small"),
    ],
)
def test_plans_that_do_not_fit(table, sentence):
    pipe, call = toy("sd")
    with attach(pipe, Fixed(table), {"small": smaller(pipe)}) as handle:
        for _ in range(2):
            with pytest.raises(ValueError, match=sentence):
                draw((pipe, call), pipe.scheduler, 3)
        assert handle.plan is None
        if len(table) == 4:  # nor after a run that they did fit
            draw((pipe, call), pipe.scheduler, 4)
            with pytest.raises(ValueError, match=sentence):
                draw((pipe, call), pipe.scheduler, 3)
            assert handle.plan is None


def test_policy_sees_grid_and_conditioning():
    seen: list[Any] = []

    class Watching:
        def plan(self, grid: Grid, conditioning: Mapping[str, Any]) -> Plan:
            seen.append((grid, conditioning))
            return Plan.same([FULL] * len(grid))

    pipe, call = toy("sd")
    with attach(pipe, Watching(), {}) as handle:
        draw((pipe, call), pipe.scheduler, 3)
    (grid, conditioning), *more = seen
    assert not more
    assert grid == handle.grid == Grid(tuple(map(float, pipe.scheduler.timesteps)))
    text = torch.cat([call["negative_prompt_embeds"], call["prompt_embeds"]])
    assert torch.equal(conditioning["encoder_hidden_states"], text)
    assert conditioning["sample"].shape == (2, 4, 8, 8)


def test_refused_places():
    pipe, call = toy("sd")
    policy = Fixed(((FULL,),))
    with pytest.raises(ValueError, match="'full' is the pipeline's own network; give the variant another name"):
        attach(pipe, policy, {FULL: smaller(pipe)})
    with pytest.raises(TypeError, match="has no network"):
        attach(diffusers.DDIMScheduler(), policy, {})
    untold = copy.copy(pipe)
    untold.unet = torch.nn.Linear(1, 1)
    with pytest.raises(TypeError, match=r"follows the timesteps of pipe.scheduler, which Linear .* is not told"):
        attach(untold, policy, {})
    assert "_diffusers_hook" not in vars(pipe.unet)
    handle = diffaccel.stitch(pipe, smaller(pipe))
    pipe.unet, old = like(pipe.unet), pipe.unet
    draw((pipe, call), pipe.scheduler, 2)  # the policy is on the old one
    pipe.scheduler.set_timesteps(2)
    with pytest.raises(RuntimeError, match="the pipeline has another network by now; remove the policy, and attach it"):
        old(torch.zeros(1, 4, 8, 8), pipe.scheduler.timesteps[0], torch.zeros(1, 4, 8))
    handle.remove()
    assert "_diffusers_hook" not in vars(old)
