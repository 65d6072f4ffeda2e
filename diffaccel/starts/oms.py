"""One More Step (arXiv:2311.15744): start where training ended, not at pure noise."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


@torch.no_grad()
def one_more_step(
    network: Any,
    scheduler: Any,
    prompt_embeds: Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
    guidance_scale: float = 1.0,
    negative_prompt_embeds: Tensor | None = None,
) -> Tensor:
    """Starting latents of a variance-preserving model, for `pipe(..., latents=...)`.

    Most VP schedules leave a little signal at their last training timestep T (Stable Diffusion: 0.068 x0), so that the
    network never saw the pure noise that sampling starts from. A small network psi, called once, maps noise z0 to
    x0_hat = -psi(z0, prompt) (v-prediction where no signal is left), and the trajectory starts at
    x_T = sqrt(ab_T) x0_hat + sqrt(1 - ab_T) z, where z is fresh noise and ab_T the squared signal at the first
    timestep of the scheduler. A psi trained by least squares is -E[x0 | prompt]: the mean of x_T given the prompt is
    then that of training, and its variance, 1 - ab_T, lacks ab_T var(x0 | prompt).

        pipe.scheduler.set_timesteps(20)
        text, empty = pipe.encode_prompt(prompts, "cpu", 1, True)
        latents = one_more_step(network, pipe.scheduler, text, generator)
        pipe(prompts, latents=latents, num_inference_steps=20)

    We depart from the reference code (mhh0318/OneMoreStep@b662f84) twice: its z is scaled by the variance 1 - ab_T in
    place of its root, and its z0 by `init_noise_sigma`. Here latents are divided by `init_noise_sigma`, which pipelines
    multiply them by, and are brought to the scale that the scheduler's samples have (x / alpha for Euler, LMS, Heun,
    KDPM2). z is drawn first: the same generator gives a run without this step the same noise.

    The weights published as h1t/oms_* do not open in `UNet2DConditionModel`: their class has no time input at all, and
    some of them have text encoders of their own. examples/train_zoo/oms.py trains a network. Added conditions (SDXL's
    pooled text and sizes) are not passed on: no source that we know of says how they are meant.

    Args:
        network: `UNet2DConditionModel` of the pipeline's latents, called at timestep 0 only, which makes its time input
            a constant. Its `sample_size` is the size of the latents.
        scheduler: scheduler of the run, ours or Diffusers', after `set_timesteps` with the arguments of the run. It is
            not changed.
        prompt_embeds: (B, tokens, width), one row a picture, of the text encoder that the network was trained with.
        generator: source of z and then z0, or a list with one per picture, as Diffusers has it.
        guidance_scale: classifier-free guidance of psi alone; 1 is none. The reference's demo uses 2.
        negative_prompt_embeds: (B, tokens, width), used with guidance only.

    Returns:
        (B, channels, height, width) in the dtype of `prompt_embeds`.

    Raises:
        ValueError: for schedulers that are not variance preserving or have no timesteps yet, and for embeddings of
            the wrong shape.
    """
    _check_embeds(network, prompt_embeds, guidance_scale, negative_prompt_embeds)
    signal, to_sample = _terminal(scheduler)
    size = network.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (len(prompt_embeds), network.config.in_channels, height, width)
    place = {"generator": generator, "device": prompt_embeds.device, "dtype": prompt_embeds.dtype}
    z, z0 = randn_tensor(shape, **place).float(), randn_tensor(shape, **place)
    x0 = -_guided(network, z0, prompt_embeds, guidance_scale, negative_prompt_embeds)
    x = signal**0.5 * x0 + (1 - signal) ** 0.5 * z
    return (x * to_sample).to(prompt_embeds.dtype)


def _guided(network: Any, z0: Tensor, text: Tensor, scale: float, negative: Tensor | None) -> Tensor:
    """Return psi(z0, prompt) in float32, with guidance."""
    if negative is None or scale == 1:
        return network(z0, 0, encoder_hidden_states=text).sample.float()
    both = network(torch.cat([z0, z0]), 0, encoder_hidden_states=torch.cat([negative, text])).sample.float()
    without, with_text = both.chunk(2)
    return without + scale * (with_text - without)


def _terminal(scheduler: Any) -> tuple[float, float]:
    """Squared signal ab_T at the first timestep, and the factor from x_T to what a pipeline takes as `latents`."""
    name = type(scheduler).__name__
    if not hasattr(scheduler, "alphas_cumprod") or scheduler.config.get("use_flow_sigmas"):
        raise ValueError(
            f"one_more_step repairs variance-preserving noise schedules, and {name} has none; start from the noise "
            "that the pipeline draws"
        )
    if scheduler.num_inference_steps is None:
        raise ValueError("the scheduler has no timesteps yet; call scheduler.set_timesteps(n) with the n of the run")
    scheduler = copy.deepcopy(scheduler)  # scale_model_input makes some schedulers start counting steps
    first = scheduler.timesteps[0]
    if hasattr(scheduler, "sigmas"):  # sigma / alpha of the run: also right between two training timesteps
        signal = 1 / (1 + float(scheduler.sigmas[0]) ** 2)
    else:
        signal = float(scheduler.alphas_cumprod[int(first)])
    # Whatever a scheduler's samples are, the network must see x_T: ask the scheduler what it makes of a one.
    seen = float(scheduler.scale_model_input(torch.ones(1), first))
    return signal, 1 / (seen * float(scheduler.init_noise_sigma))


def _check_embeds(network: Any, text: Tensor, scale: float, negative: Tensor | None) -> None:
    width = network.config.cross_attention_dim
    if text.ndim != 3 or text.shape[-1] != width:
        raise ValueError(f"prompt_embeds must be (pictures, tokens, {width}) for this network, not {tuple(text.shape)}")
    if scale != 1 and negative is None:
        raise ValueError(f"guidance_scale {scale:g} needs negative_prompt_embeds, such as those of an empty prompt")
    if scale != 1 and negative is not None and negative.shape != text.shape:
        raise ValueError(
            f"negative_prompt_embeds must have the shape of prompt_embeds, {tuple(text.shape)}, not "
            f"{tuple(negative.shape)}"
        )
