"""A stitched pipeline with everything else that people do with a pipeline."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

import diffaccel
from diffaccel.samplers.policy import FULL, attached
from tests.policy import calls, denoiser, like, oracle, smaller, toy
from tests.tiny import SD_BETAS, Toy, draw, noise, relative

CPU = torch.device("cpu")
STEPS = 3
HALF = 0.4  # 1 of 3 steps


def stitched(name: str) -> tuple[Toy, Any, Tensor, Tensor]:
    """A toy, a small network, the picture that the two make, and that of the large one."""
    pipe, call = toy(name)
    small = smaller(pipe)
    expected = oracle((pipe, call), [small], [1], STEPS)
    return (pipe, call), small, expected, draw((pipe, call), pipe.scheduler, STEPS)


def picture(toy: Toy, **call: Any) -> Tensor:
    return draw(toy, toy[0].scheduler, STEPS, **call)


# Compilation


@pytest.mark.parametrize(("name", "backend"), [("sd", "eager"), ("flux", "eager"), ("flux", "aot_eager")])
def test_compiled(name, backend):
    torch._dynamo.reset()
    toy_, small, expected, plain = stitched(name)
    handle = diffaccel.stitch(toy_[0], small, HALF)
    handle.compile(backend=backend)
    for _ in range(2):
        assert relative(picture(toy_), expected) < 1e-5
    assert calls(handle) == {"small": 1, FULL: 2}
    handle.remove()
    assert torch.equal(picture(toy_), plain)


def test_small_network_that_was_compiled():
    torch._dynamo.reset()
    toy_, small, expected, _ = stitched("sd")
    with diffaccel.stitch(toy_[0], torch.compile(small, backend="eager"), HALF) as handle:
        assert relative(picture(toy_), expected) < 1e-5
        assert handle.report().macs > 0
    small.compile(backend="eager")
    with diffaccel.stitch(toy_[0], small, HALF):
        assert relative(picture(toy_), expected) < 1e-5


def test_compiled_blocks():
    torch._dynamo.reset()
    toy_, small, expected, _ = stitched("flux")
    toy_[0].transformer.compile_repeated_blocks(backend="eager")
    with diffaccel.stitch(toy_[0], small, HALF):
        assert relative(picture(toy_), expected) < 1e-5


@pytest.mark.parametrize("how", ["in place", "around"])
def test_network_that_was_compiled(how):
    pipe, _ = toy("sd")
    small = smaller(pipe)
    if how == "in place":
        pipe.unet.compile(backend="eager")
    else:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.raises(ValueError, match=r"pipe.unet is compiled, .* then write handle.compile\(\)"):
        diffaccel.stitch(pipe, small)


@pytest.mark.parametrize("how", ["in place", "around"])
def test_network_that_is_compiled_later(how):
    torch._dynamo.reset()
    toy_, small, _, _ = stitched("sd")
    pipe = toy_[0]
    with diffaccel.stitch(pipe, small):
        if how == "in place":
            pipe.unet.compile(backend="eager")
        else:
            pipe.unet = torch.compile(pipe.unet, backend="eager")
        with pytest.raises(Exception, match=r"write handle.compile\(\) instead|attach it again"):
            picture(toy_)


# Where the weights are


@pytest.mark.parametrize("how", ["model", "sequential"])
@pytest.mark.parametrize("first", ["offload", "policy"])
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_accelerate(name, how, first):
    """In both orders, through hooks that are taken off and put on again, as Diffusers does after each run."""
    toy_, small, expected, plain = stitched(name)
    pipe = copy.deepcopy(toy_[0])  # all parts have hooks
    toy_ = pipe, toy_[1]

    def offload() -> None:
        if how == "model":
            return pipe.enable_model_cpu_offload(device="cpu")
        for part in (denoiser(pipe), pipe.vae):  # what sequential offload does, with buffers
            cpu_offload(part, CPU, offload_buffers=True)

    if first == "offload":
        offload()
    handle = diffaccel.stitch(pipe, small, HALF)
    for _ in range(2):
        assert torch.equal(picture(toy_), expected)
        pipe.remove_all_hooks()
        assert torch.equal(picture(toy_), expected)
        offload()
        assert torch.equal(picture(toy_), expected)
    twin = copy.deepcopy(pipe)
    assert torch.equal(picture((twin, toy_[1])), expected)
    assert calls(attached(twin)) == {"small": 1, FULL: 2}  # type: ignore[arg-type]
    assert handle.report().macs > 0
    handle.remove()
    assert torch.equal(picture(toy_), plain)
    pipe.remove_all_hooks()
    assert torch.equal(picture(toy_), plain)
    assert attached(pipe) is None


def test_idle_networks_wait(monkeypatch):
    """Each is moved once a switch; the pipeline's comes back, also if the policy is removed in between."""
    toy_, small, expected, _ = stitched("sd")
    pipe = toy_[0]
    moves: list[tuple[str, bool]] = []

    def watched(name: str, network: Any) -> None:
        original = network.to

        def to(*args: Any, **kwargs: Any) -> Any:
            moves.append((name, (args or (kwargs["device"],))[0] == "cpu"))  # where it works there is a torch.device
            return original(*args, **kwargs)

        monkeypatch.setattr(network, "to", to)

    watched(FULL, pipe.unet)
    watched("small", small)
    handle = diffaccel.stitch(pipe, small, HALF, offload=True)
    wait = [("small", True), (FULL, True)]
    switch = [("small", False), ("small", True), (FULL, False)]
    for _ in range(2):
        assert torch.equal(picture(toy_), expected)
        assert moves == wait + switch
        moves.clear()

    def stop(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return kwargs

    picture(toy_, callback_on_step_end=stop)
    assert moves == [*wait, ("small", False)]
    handle.remove()
    assert moves[-1] == (FULL, False)


def test_group_offload():
    toy_, small, expected, _ = stitched("sd3")
    network = denoiser(toy_[0])
    with diffaccel.stitch(toy_[0], small, HALF):
        network.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
        assert torch.equal(picture(toy_), expected)
    with diffaccel.stitch(toy_[0], small, HALF):
        assert torch.equal(picture(toy_), expected)


def test_layerwise_casting():
    toy_, small, expected, _ = stitched("sd")
    toy_[0].unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with diffaccel.stitch(toy_[0], small, HALF) as handle:
        assert 0 < relative(picture(toy_), expected) < 0.3
        assert small.dtype == torch.float32
        assert handle.report().macs > 0


@pytest.mark.parametrize("offload", [False, True])
def test_small_network_follows_the_type(offload):
    toy_, small, expected, _ = stitched("sd")
    pipe, call = toy_
    with diffaccel.stitch(pipe, small, HALF, offload=offload):
        pipe.to(torch.bfloat16)
        half = {key: v.bfloat16() if isinstance(v, Tensor) else v for key, v in call.items()}
        result = picture((pipe, half))
        assert result.dtype == small.dtype == torch.bfloat16
        assert relative(result, expected) < 0.1
        pipe.to(torch.float32)
    pipe.vae.to(torch.float32)


def test_inference_mode():
    """Weights that are cast there can be trained later."""
    toy_, small, expected, _ = stitched("sd")
    with diffaccel.stitch(toy_[0], small.double(), HALF):
        with torch.inference_mode():
            assert relative(picture(toy_), expected) < 1e-5
        assert relative(picture(toy_), expected) < 1e-5
    small(torch.ones(1, 4, 8, 8), 1, torch.ones(1, 4, 8))[0].sum().backward()


# What is loaded into the large network


def test_lora_of_the_large_network():
    peft = pytest.importorskip("peft")
    toy_, small, expected, _ = stitched("sd")
    with diffaccel.stitch(toy_[0], small, HALF):
        toy_[0].unet.add_adapter(peft.LoraConfig(target_modules=["to_q"], init_lora_weights=False))
        changed = picture(toy_)
        assert relative(changed, expected) > 1e-4
        toy_[0].unet.disable_adapters()
        assert relative(picture(toy_), expected) < 1e-6
        toy_[0].unet.enable_adapters()
    by_hand = oracle(toy_, [small], [1], STEPS)
    assert torch.equal(changed, by_hand)


def test_attention_processors():
    toy_, small, expected, _ = stitched("sd")
    with diffaccel.stitch(toy_[0], small, HALF):
        toy_[0].unet.set_attn_processor(AttnProcessor())
        assert relative(picture(toy_), expected) < 1e-5
        toy_[0].unet.set_attention_slice(1)
        assert relative(picture(toy_), expected) < 1e-5


def test_controlnet():
    """The residuals are of the large network's widths: the small one has the same, and is small inside."""
    pipe, call = toy("sd")
    controlnet = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4,)).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for parameter in controlnet.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    small = like(pipe.unet)
    parts = {**pipe.components, "controlnet": controlnet, "scheduler": diffusers.UniPCMultistepScheduler(**SD_BETAS)}
    controlled = diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    controlled.set_progress_bar_config(disable=True)
    hint: dict[str, Any] = {**call, "image": noise(1, 3, 8, 8, seed=6).sigmoid(), "height": 8, "width": 8}
    expected = oracle((controlled, hint), [small], [1], STEPS)
    with diffaccel.stitch(controlled, small, HALF) as handle:
        assert torch.equal(draw((controlled, hint), controlled.scheduler, STEPS), expected)
        assert calls(handle) == {"small": 1, FULL: 2}
