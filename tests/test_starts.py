"""Where trajectories begin: closed forms for One More Step, the pruned source and the searched noise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from scipy.special import betainc
from torch import Tensor

import diffaccel
from diffaccel import zoo
from diffaccel.starts import data_sparse_axes, one_more_step, pruned_gaussian, select_initial_noise
from tests.tiny import sd

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ALPHA_BAR = diffusers.DDPMScheduler(**BETAS).alphas_cumprod
SHAPE = (4, 8, 8)


class Oracle:
    """The exact psi of data that are one picture per prompt: the mean of the prompt's embedding, everywhere."""

    config = SimpleNamespace(sample_size=8, in_channels=4, cross_attention_dim=8)

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, z0: Tensor, timestep: int, encoder_hidden_states: Tensor) -> Any:
        self.calls.append((timestep, len(z0)))
        return SimpleNamespace(sample=-encoder_hidden_states.mean((1, 2))[:, None, None, None].expand(z0.shape))


def text(*means: float) -> Tensor:
    return torch.tensor(means)[:, None, None].expand(-1, 3, 8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def timed(scheduler: Any, steps: int = 10) -> Any:
    scheduler.set_timesteps(steps)
    return scheduler


# ---- One More Step --------------------------------------------------------------------------------------------------
def test_start_has_the_mean_and_variance_of_the_last_training_timestep() -> None:
    scheduler = timed(diffusers.DDIMScheduler(**BETAS, timestep_spacing="trailing"))
    x = one_more_step(Oracle(), scheduler, text(*[3.0] * 500), seeded())
    mean, variance = float(ALPHA_BAR[-1]) ** 0.5 * 3, 1 - float(ALPHA_BAR[-1])
    assert float(x.mean()) == pytest.approx(mean, abs=4 * x.numel() ** -0.5)
    assert float(x.var()) == pytest.approx(variance, rel=4 * (2 / x.numel()) ** 0.5)
    # and exactly, with the noise that a run without the step draws from the same generator
    torch.testing.assert_close(x, mean + variance**0.5 * torch.randn(500, *SHAPE, generator=seeded()))


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "PNDMScheduler",
        "LCMScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
        "LMSDiscreteScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "diffaccel",
    ],
)
def test_network_sees_the_same_start_with_every_scheduler(name: str, spacing: Any) -> None:
    config = diffusers.DDIMScheduler(**BETAS, timestep_spacing=spacing).config
    own = diffaccel.SolverScheduler if name == "diffaccel" else getattr(diffusers, name)
    pipe, call = sd()
    pipe.scheduler = timed(own.from_config(config), 5)
    start = one_more_step(Oracle(), pipe.scheduler, text(3.0), seeded())
    seen: list[Tensor] = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        pipe(**{**call, "guidance_scale": 1.0}, num_inference_steps=5, latents=start, generator=seeded())
    finally:
        hook.remove()
    # Ours starts between two training timesteps on the leading grid: alpha-bar is interpolated in the log-SNR.
    log_snr = np.interp(float(pipe.scheduler.timesteps[0]), np.arange(1000), ALPHA_BAR.logit())
    kept = torch.tensor(log_snr).sigmoid().float()
    expected = kept**0.5 * 3 + (1 - kept) ** 0.5 * torch.randn(1, *SHAPE, generator=seeded())
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-4)


def test_scheduler_is_left_as_it_was() -> None:
    scheduler = timed(diffusers.EulerDiscreteScheduler(**BETAS))
    one_more_step(Oracle(), scheduler, text(1.0), seeded())
    assert scheduler.step_index is None
    assert not scheduler.is_scale_input_called


def test_guidance_is_that_of_the_small_network_alone() -> None:
    scheduler, network = timed(diffusers.DDIMScheduler(**BETAS)), Oracle()
    plain = one_more_step(network, scheduler, text(5.0), seeded())
    guided = one_more_step(network, scheduler, text(3.0), seeded(), 2.0, text(1.0))
    torch.testing.assert_close(guided, plain)  # 1 + 2 (3 - 1) = 5
    one_more_step(network, scheduler, text(3.0), seeded(), 1.0, text(1.0))
    assert network.calls == [(0, 1), (0, 2), (0, 1)]


def test_one_generator_a_picture_and_the_dtype_of_the_embeddings() -> None:
    scheduler = timed(diffusers.DDIMScheduler(**BETAS))
    both = one_more_step(Oracle(), scheduler, text(1.0, 2.0), [seeded(1), seeded(2)])
    torch.testing.assert_close(both[1:], one_more_step(Oracle(), scheduler, text(2.0), [seeded(2)]))
    assert one_more_step(Oracle(), scheduler, text(1.0).half(), seeded()).dtype == torch.float16


def test_nothing_is_added_where_no_signal_is_left() -> None:
    scheduler = timed(diffusers.DDIMScheduler(**BETAS, rescale_betas_zero_snr=True, timestep_spacing="trailing"))
    torch.testing.assert_close(
        one_more_step(Oracle(), scheduler, text(9.0), seeded()), torch.randn(1, *SHAPE, generator=seeded())
    )


def test_one_more_step_says_what_it_cannot_do() -> None:
    vp = timed(diffusers.DDIMScheduler(**BETAS))
    for scheduler in (
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.EDMEulerScheduler(),
        diffaccel.FlowEulerScheduler(),
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ):
        with pytest.raises(ValueError, match=r"variance-preserving.*has none"):
            one_more_step(Oracle(), timed(scheduler), text(1.0))
    with pytest.raises(ValueError, match=r"call scheduler\.set_timesteps"):
        one_more_step(Oracle(), diffusers.DDIMScheduler(**BETAS), text(1.0))
    with pytest.raises(ValueError, match=r"\(pictures, tokens, 8\).*not \(1, 3, 9\)"):
        one_more_step(Oracle(), vp, torch.zeros(1, 3, 9))
    with pytest.raises(ValueError, match="needs negative_prompt_embeds"):
        one_more_step(Oracle(), vp, text(1.0), guidance_scale=2.0)
    with pytest.raises(ValueError, match="shape of prompt_embeds"):
        one_more_step(Oracle(), vp, text(1.0, 2.0), None, 2.0, text(1.0))


def test_zoo_network_knows_a_colour_and_its_start_opens_in_the_pipeline() -> None:
    network, pipe = zoo.load("emoji-oms"), zoo.load("emoji-sd")
    assert type(network) is diffusers.UNet2DConditionModel
    embeds, _ = pipe.encode_prompt(["red heart, twemoji style", "blue heart, twemoji style"], "cpu", 1, False)
    with torch.no_grad():
        latents = -network(torch.randn(2, 4, 16, 16, generator=seeded()), 0, embeds).sample
        red, blue = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample[:, :, 20:40, 20:44].mean((2, 3))
    assert red[0] > red[2] + 0.3
    assert blue[2] > blue[0] + 0.3
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = timed(diffaccel.DPMSolverScheduler.from_config(pipe.scheduler.config), 3)
    start = one_more_step(network, pipe.scheduler, embeds[:1], seeded())
    assert pipe("red heart, twemoji style", latents=start, num_inference_steps=3).images[0].size == (64, 64)


def test_recipe_of_the_network_runs_and_its_result_opens(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "examples" / "train_zoo" / "oms.py"
    command = [sys.executable, str(script), "--data", "synthetic", "--output_dir", str(tmp_path), "--seconds", "60"]
    subprocess.run([*command, "--steps", "2"], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    network = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "emoji-oms")
    shipped = json.loads((zoo.path("emoji-oms") / "config.json").read_text())
    ours = {key: value for key, value in network.config.items() if not key.startswith("_")}
    assert ours == {key: value for key, value in shipped.items() if not key.startswith("_")}


# ---- the pruned source ----------------------------------------------------------------------------------------------
def some_data() -> Tensor:
    """Four values: the first always 0, the second never above 0, the others with all signs; axes are exact."""
    base = torch.rand(200, 4, generator=seeded()) * torch.tensor([0.0, -1.0, 2.0, 4.0])
    signs = torch.tensor([[1.0, 1.0, i, j] for i in (-1, 1) for j in (-1, 1)])
    return (base[:, None] * signs).flatten(0, 1)


def test_axes_are_those_that_no_data_lean_towards() -> None:
    axes = data_sparse_axes(some_data().reshape(-1, 2, 2))
    found = sorted((axes / 1e-3).round().mul(1e-3).add(0.0).tolist())
    assert found == [[-1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]]
    assert len(data_sparse_axes(torch.randn(300, 4, generator=seeded()))) == 0


def test_axes_need_enough_data_with_a_direction() -> None:
    with pytest.raises(ValueError, match=r"4 data points of 4 values.*give more than 4"):
        data_sparse_axes(torch.randn(4, 2, 2))
    with pytest.raises(ValueError, match="needs a direction"):
        data_sparse_axes(torch.zeros(9, 2))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        data_sparse_axes(torch.randn(9, 2), threshold=1.0)


@pytest.mark.parametrize(("size", "tau"), [(3, 0.2), (48, 0.1), (48, 0.3)])
def test_one_axis_rejects_as_often_as_the_beta_law_says(size: int, tau: float) -> None:
    count = 20_000
    axes = torch.eye(size)[:1]
    noise = pruned_gaussian((count, size), axes, tau, seeded())
    first = torch.randn(count, size, generator=seeded())
    accepted = float((noise == first).all(1).float().mean())
    expected = 1 - (1 - betainc(0.5, (size - 1) / 2, tau**2)) / 2  # the squared cosine is Beta(1/2, (D - 1)/2)
    assert accepted == pytest.approx(expected, abs=4 * (expected * (1 - expected) / count) ** 0.5)
    assert float((noise[:, 0] / noise.norm(dim=1)).max()) <= tau
    # length and direction of Gaussian noise are independent: pruning leaves the length alone
    assert float(noise.square().sum(1).mean()) == pytest.approx(size, rel=4 * (2 / size / count) ** 0.5)


def test_each_sample_depends_on_its_own_generator() -> None:
    axes = torch.eye(12)[:6]
    one = pruned_gaussian((2, 3, 2, 2), axes, 0.3, seeded(5))
    torch.testing.assert_close(one, pruned_gaussian((2, 3, 2, 2), axes, 0.3, seeded(5)), rtol=0, atol=0)
    many = pruned_gaussian((20, 3, 2, 2), axes, 0.3, [seeded(i) for i in range(20)])
    alone = torch.cat([pruned_gaussian((1, 3, 2, 2), axes, 0.3, [seeded(i)]) for i in range(20)])
    torch.testing.assert_close(many, alone, rtol=0, atol=0)
    plain = torch.cat([torch.randn(1, 3, 2, 2, generator=seeded(i)) for i in range(20)])
    assert 0 < int((many != plain).flatten(1).any(1).sum()) < 20
    torch.testing.assert_close(
        pruned_gaussian((4, 12), torch.zeros(0, 12), 0.3, seeded()), torch.randn(4, 12, generator=seeded())
    )


def test_pruned_noise_says_what_is_wrong() -> None:
    with pytest.raises(RuntimeError, match=r"2 of 2 samples were rejected 1000 times \(0\.00% of 2000 draws were"):
        pruned_gaussian((2, 3), torch.cat([torch.eye(3), -torch.eye(3)]), 0.1, seeded())
    with pytest.raises(ValueError, match=r"axes must be \(A, 12\)"):
        pruned_gaussian((2, 3, 4), torch.eye(3), 0.1)
    with pytest.raises(ValueError, match="tau is a cosine"):
        pruned_gaussian((2, 3), torch.eye(3), 0.0)
    with pytest.raises(ValueError, match="1 generators for 2 samples"):
        pruned_gaussian((2, 3), torch.eye(3), 0.1, [seeded()])


# ---- the searched noise ---------------------------------------------------------------------------------------------
def test_search_finds_the_noise_that_suits_all_references() -> None:
    best = torch.randn(1, 2, generator=seeded(7))
    conditions = [0.5, -1.0, 3.0]
    references = [(c, best + c) for c in conditions]

    def sample(noise: Tensor, condition: float) -> Tensor:
        return noise.add_(condition)  # in place, as a careless sampler may work

    def error(result: Tensor, target: Tensor) -> Tensor:
        return (result - target).square().mean()

    noise, seed, scores = select_initial_noise(sample, references, [3, 7, 11], error, shape=(1, 2))
    assert seed == 7
    torch.testing.assert_close(noise, best, rtol=0, atol=0)
    assert list(scores) == [3, 7, 11]
    other = torch.randn(1, 2, generator=seeded(3))
    assert scores[3] == pytest.approx(float((other - best).square().mean()), rel=1e-5)
    # the mean decides, not one reference: seed 11 is perfect on one pair and bad on the other two
    outlier = [(0.0, torch.randn(1, 2, generator=seeded(11)))]
    assert select_initial_noise(sample, references[:2] + outlier, [11, 7], error, shape=(1, 2)).seed == 7


def test_search_says_what_is_missing() -> None:
    def search(references: list[Any], seeds: list[int], value: float = 0.0) -> Any:
        return select_initial_noise(lambda z, _: z, references, seeds, lambda *_: value, shape=(1,))

    for references, seeds in (([], [1]), ([(0, 0)], [])):
        with pytest.raises(ValueError, match=r"one candidate seed and one \(condition, target\) pair"):
            search(references, seeds)
    with pytest.raises(ValueError, match="must all be different"):
        search([(0, 0)], [1, 1])
    with pytest.raises(ValueError, match="seed 4 on reference 0 is nan"):
        search([(0, 0)], [4], float("nan"))
