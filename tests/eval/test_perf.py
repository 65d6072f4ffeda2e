"""Cost of a picture: a pipeline whose every part takes a known time, and real ones for what they compute."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import diffaccel
from diffaccel import zoo
from diffaccel.cost import flop_counter, macs, parameters, processor
from diffaccel.eval import perf
from diffaccel.eval.energy import Energy
from diffaccel.eval.perf import Cost, measure
from diffaccel.eval.runs.prompts import Prompt
from tests.tiny import dit, sd, svd, wan


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Denoiser(nn.Linear):
    """Takes two seconds."""

    clock: Clock

    def forward(self, sample: Tensor) -> Tensor:
        self.clock.now += 2
        return super().forward(sample)


class Pipe:
    """One second before and after the denoising loop each; remembers what it was called with."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.unet = Denoiser(4, 4)
        self.unet.clock = self.clock
        self.components = {"unet": self.unet, "text_encoder": nn.Linear(4, 4), "tokenizer": object()}
        self.device = torch.device("cpu")
        self.calls: list[dict[str, Any]] = []
        self.bars: list[dict[str, Any]] = []
        self._progress_bar_config = {"leave": False}

    def set_progress_bar_config(self, **config: Any) -> None:
        self._progress_bar_config = config

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        steps: int = 3,
        negative_prompt: str | list[str] | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
    ) -> tuple[Tensor]:
        noise = None if generator is None else float(torch.randn((), generator=generator))
        self.calls.append({k: v for k, v in locals().items() if k not in ("self", "generator")})
        self.bars.append(self._progress_bar_config)
        rows = torch.ones(len(prompt), 4)
        self.clock.now += 1
        for _ in range(steps):
            self.unet(torch.cat([rows, rows]))
        self.clock.now += 1
        return (rows,)


@pytest.fixture
def pipe() -> Pipe:
    return Pipe()


def test_times_are_of_the_call_and_of_its_denoiser(pipe: Pipe) -> None:
    cost = measure(pipe, ["a", "b", "c"], batch=2, warmup=4, runs=7, clock=pipe.clock, steps=3)
    assert cost.latency == diffaccel.cost.Latency(8.0, 8.0, 8.0, 8.0, 7)
    assert (cost.denoiser_seconds, cost.denoiser_share) == (6.0, 0.75)
    assert cost.throughput == 2 / 8
    assert (cost.pictures, cost.nfe, cost.rows) == (2, 3, 6)
    assert (cost.dtype, cost.device) == ("float32", f"{processor()}, {torch.get_num_threads()} threads")
    assert (cost.parameters, cost.denoiser_parameters) == (40, 20)
    assert len(pipe.calls) == 1 + 4 + 7 + 1 + (1 + 5), "counted, warm-up, timed, memory, split with one before"


def test_every_call_is_the_same(pipe: Pipe) -> None:
    measure(pipe, [Prompt("1", "a"), "b"], batch=3, runs=2, negative_prompt="bad")
    first, *others = pipe.calls
    assert all(other == first for other in others)
    assert (first["prompt"], first["negative_prompt"]) == (["a", "b", "a"], ["bad"] * 3)
    assert first["output_type"] == "pt", "no PNG"
    assert first["noise"] is not None


def test_arguments_of_the_call_come_first(pipe: Pipe) -> None:
    cost = measure(pipe, runs=1, warmup=0, prompt=["a", "b"], output_type="latent", generator=None)
    assert cost.pictures == 2
    assert (pipe.calls[0]["output_type"], pipe.calls[0]["noise"]) == ("latent", None)


def test_progress_bars_come_back(pipe: Pipe) -> None:
    measure(pipe, "a", runs=1, warmup=0)
    assert {bar.get("disable") for bar in pipe.bars} == {True}
    assert pipe._progress_bar_config == {"leave": False}
    with pytest.raises(TypeError):
        measure(pipe, "a", runs=1, warmup=0, steps="many")
    assert pipe._progress_bar_config == {"leave": False}
    assert not pipe.unet._forward_pre_hooks
    assert not pipe.unet._forward_hooks


def test_energy_is_that_of_the_timed_calls(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    @contextmanager
    def energy(device: torch.device) -> Iterator[Energy]:
        seen.append(len(pipe.calls))
        yield Energy(30.0, "a meter")
        seen.append(len(pipe.calls))

    monkeypatch.setattr(perf, "energy", energy)
    cost = measure(pipe, "a", batch=2, warmup=3, runs=5)
    assert (cost.energy, cost.energy_source) == (3.0, "a meter")
    assert seen == [1 + 3, 1 + 3 + 5]


def test_json_keeps_everything(pipe: Pipe) -> None:
    cost = measure(pipe, "a", runs=1, warmup=0)
    assert Cost.from_json(json.loads(json.dumps(cost.to_json()))) == cost


@pytest.mark.parametrize("wrong", [{"runs": 0}, {"warmup": -1}, {"batch": 0}, {"prompts": []}])
def test_nothing_to_measure_is_refused(pipe: Pipe, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="measure needs"):
        measure(pipe, **{"prompts": "a", **wrong})
    assert not pipe.calls


def test_a_batch_that_cannot_be_had_is_refused() -> None:
    pipe, arguments = svd()
    with pytest.raises(ValueError, match="leave batch at 1"):
        measure(pipe, batch=2, **arguments)


def test_macs_are_those_of_the_whole_call() -> None:
    pipe, _ = dit()
    cost = measure(pipe, ["3", "5"], batch=2, runs=1, warmup=0, num_inference_steps=4)
    rows = torch.zeros(4, 4, 8, 8)
    forward = macs(pipe.transformer, rows, timestep=torch.ones(4), class_labels=torch.ones(4, dtype=torch.long))
    decoding = macs(pipe.vae.decode, torch.zeros(2, 4, 8, 8))
    assert (cost.nfe, cost.rows, cost.pictures) == (4, 8, 2)
    assert cost.denoiser_macs == cost.nfe * forward / 2
    assert cost.macs == (cost.nfe * forward + decoding) / 2
    assert cost.parameters == parameters(pipe.transformer) + parameters(pipe.vae)
    with flop_counter() as counter:
        pipe(class_labels=[3, 5], num_inference_steps=4, output_type="np")
    assert cost.macs == counter.get_total_flops() / 2 / 2


def test_guidance_by_two_calls_counts_two() -> None:
    pipe, arguments = wan()
    pipe.scheduler = diffaccel.scheduler("euler", pipe)
    cost = measure(pipe, runs=1, warmup=0, num_inference_steps=3, **arguments)
    assert (cost.nfe, cost.rows, cost.pictures) == (6, 6, 1)


def test_pipelines_without_a_condition() -> None:
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(4,),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    cost = measure(pipe, ["anything"], batch=3, runs=1, warmup=0, num_inference_steps=2)
    assert (cost.nfe, cost.rows, cost.pictures) == (2, 2, 3)
    assert cost.macs == cost.denoiser_macs == 2 * macs(unet, torch.zeros(1, 3, 8, 8), 1)


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_denoisers_are_measured_too(in_place: bool) -> None:
    pipe, arguments = sd()
    plain = measure(pipe, runs=1, warmup=0, num_inference_steps=2, **arguments)
    unet = pipe.unet
    try:
        if in_place:
            unet.compile(backend="eager")
        else:
            pipe.unet = torch.compile(unet, backend="eager")
        cost = measure(pipe, runs=1, warmup=0, num_inference_steps=2, **arguments)
    finally:
        unet._compiled_call_impl, pipe.unet = None, unet
    assert (cost.nfe, cost.rows, cost.macs, cost.parameters) == (plain.nfe, plain.rows, plain.macs, plain.parameters)
    assert cost.denoiser_macs == plain.denoiser_macs
    assert cost.denoiser_seconds > 0


def test_a_text_to_image_pipeline_from_its_prompts() -> None:
    pipe = zoo.load("emoji-sd")
    pipe.scheduler = diffaccel.scheduler("dpmpp_2m", pipe)
    cost = measure(pipe, ["red apple", "ghost"], batch=2, runs=1, warmup=0, num_inference_steps=2, guidance_scale=4)
    forward = macs(pipe.unet, torch.zeros(2, 4, 16, 16), 1, torch.zeros(2, 24, 128))
    assert (cost.nfe, cost.rows, cost.pictures) == (2, 4, 2)
    assert cost.denoiser_macs == 2 * forward
    assert cost.macs > cost.denoiser_macs + macs(pipe.vae.decode, torch.zeros(1, 4, 16, 16)), "the text encoder counts"


def test_the_measure_s_own_words_are_no_pipeline_s() -> None:
    own = set(inspect.signature(measure).parameters) - {"pipe", "call"}
    for pipeline in (
        diffusers.StableDiffusionPipeline,
        diffusers.FluxPipeline,
        diffusers.DDPMPipeline,
        diffusers.DiTPipeline,
    ):
        assert own.isdisjoint(inspect.signature(pipeline.__call__).parameters)
