"""The converged reference: the samples that every solver approaches, with an error estimate for each of them.

What "the solution" is. The network was trained on whole timesteps, and between them nothing fixes it. The reference
solves the ODE that the *network as it is* defines on the continuous clock (`timesteps="float"`); the alternative, one
step for every trained timestep, is `ReferenceSettings(solver="dpmpp_2m", schedule="trailing", timesteps="integer",
steps=500)`. Benchmarks report how far the two lie apart.

Where it ends. At sigma = 0: the last call is made at the smallest trained sigma, and its x0 is the sample. A run that
ends *at* that sigma instead (`final_sigmas_type="sigma_min"`) leaves its noise in the sample, an MSE of about
sigma_min^2 against the reference (8.5e-4 for Stable Diffusion's betas). That noise is in the pictures too, so that it
counts against such runs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

import diffaccel
from diffaccel.eval.fidelity import latent_mse
from diffaccel.eval.files import save_tensors

DENOISING_PARTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class ReferenceSettings:
    """How the reference is computed. The default is what converged best on `emoji-sd` (see benchmarks/README.md).

    Spacings that close in on sigma = 0 only as N grows (`trailing`, `leading`, `linspace`, `beta`) converge at first
    order in N at best, whatever the solver: `logsnr`, `karras` and `exponential` end at the same sigma for every N.

    Attributes:
        solver: name of a deterministic solver.
        schedule: name of a schedule.
        start: see `diffaccel.scheduler`.
        timesteps: clock, see above.
        final: end of the run, see above.
        steps: N; the reference itself is the run of 2N steps.
    """

    solver: str = "dpmpp_2m"
    schedule: str = "logsnr"
    start: Literal["euler", "singlestep"] = "euler"
    timesteps: Literal["float", "integer"] = "float"
    final: Literal["zero", "sigma_min"] = "zero"
    steps: int = 100


@dataclass(frozen=True)
class Reference:
    """Reference samples, one for each prompt and seed.

    Attributes:
        latents: (prompts * seeds, ...) float32, the seeds of a prompt in a row; the solution with 2N steps.
        errors: (prompts * seeds,) float64, MSE between the solutions with N and 2N steps. The latents' own error is
            smaller than that, by a factor that grows with the solver's order.
        pairs: prompt and seed of each sample.
    """

    latents: Tensor
    errors: Tensor
    pairs: tuple[tuple[str, int], ...]

    def converged(self, smallest_error: float, share: float = 0.01) -> Tensor:
        """(N,) bool: whether the N and 2N step solutions of a pair agree to `share` of the smallest MSE reported."""
        return self.errors <= share * smallest_error


def converged_reference(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    guidance_scale: float,
    settings: ReferenceSettings | None = None,
    cache: str | os.PathLike[str] | None = None,
    batch_prompts: int = 4,
    progress: bool = True,
    **call: Any,
) -> Reference:
    """Run the pipeline to convergence for every prompt and seed.

    The pipeline is left as it was. With `cache`, finished pairs are kept in that folder under a hash of weights and
    settings: an interrupted run goes on from there, and runs on other prompts or seeds share what they have in common.

    Args:
        pipe: a text-to-image pipeline of Diffusers.
        prompts: prompts, each at most once.
        seeds: seeds of every prompt; the noise is a function of prompt and seed alone (`pair_generator`).
        guidance_scale: passed to the pipeline.
        settings: how the reference is computed.
        cache: folder for the results.
        batch_prompts: prompts per call of the pipeline, each with all its seeds.
        progress: show a progress bar over pairs.
        call: further arguments of the pipeline, such as height; they must have a JSON form.

    Raises:
        ValueError: if a prompt or seed is given twice, or none.
    """
    if not prompts or not seeds or len(set(prompts)) < len(prompts) or len(set(seeds)) < len(seeds):
        raise ValueError("give at least one prompt and one seed, and each of them once")
    settings = settings or ReferenceSettings()
    pairs = tuple((prompt, seed) for prompt in prompts for seed in seeds)
    name = json.dumps([asdict(settings), guidance_scale, call, reference_key(pipe)], sort_keys=True)
    folder = Path(cache) / _digest(name) if cache is not None else None
    files = {pair: folder / f"{_digest(json.dumps(pair))}.safetensors" for pair in pairs} if folder else {}
    found = {pair: load_file(file) for pair, file in files.items() if file.exists()}
    missing, size = [pair for pair in pairs if pair not in found], batch_prompts * len(seeds)
    with tqdm(total=len(pairs), initial=len(found), desc="converged reference", disable=not progress) as bar:
        for batch in (missing[i : i + size] for i in range(0, len(missing), size)):
            once, twice = (_solve(pipe, batch, settings, times, guidance_scale, call) for times in (1, 2))
            for pair, latents, error in zip(batch, twice, latent_mse(once, twice), strict=True):
                found[pair] = {"latents": latents.clone(), "error": error.clone()}
                if files:
                    save_tensors(found[pair], files[pair])
            bar.update(len(batch))
    latents, errors = (torch.stack([found[pair][key] for pair in pairs]) for key in ("latents", "error"))
    return Reference(latents, errors, pairs)


def _solve(
    pipe: Any,
    pairs: Sequence[tuple[str, int]],
    settings: ReferenceSettings,
    times: int,
    guidance_scale: float,
    call: dict[str, Any],
) -> Tensor:
    """Latents of some pairs with `times` * N steps, float32 on the CPU."""
    options = {k: v for k, v in asdict(settings).items() if k not in ("solver", "steps")}
    before = pipe.scheduler
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**bar | {"disable": True})
    try:
        pipe.scheduler = diffaccel.scheduler(settings.solver, before.config, **options)
        images = pipe(
            [prompt for prompt, _ in pairs],
            num_inference_steps=times * settings.steps,
            guidance_scale=guidance_scale,
            generator=[pair_generator(*pair) for pair in pairs],
            output_type="latent",
            **call,
        ).images
    finally:
        pipe.scheduler = before
        pipe.set_progress_bar_config(**bar)
    return images.float().cpu().contiguous()


def pair_generator(prompt: str, seed: int) -> torch.Generator:
    """CPU generator of a prompt and seed: the same noise in whatever batch, order, process or device it is used."""
    digest = hashlib.blake2b(f"{seed}:{prompt}".encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)


def reference_key(pipe: Any) -> str:
    """Hash of all that decides a pipeline's latents: weights and their dtype, and the noise schedule's config."""
    digest = hashlib.sha256(f"{type(pipe).__name__} {weights_hash(pipe)}".encode())
    keys = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
        "shift",
    )
    config = {k: v for k, v in sorted(dict(pipe.scheduler.config).items()) if k in keys}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def weights_hash(pipe: Any, parts: Sequence[str] = DENOISING_PARTS) -> str:
    """SHA-256 of the weights (names, dtypes, bytes) of the parts that make the latents, first 16 hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        module = getattr(pipe, part, None)
        if not isinstance(module, nn.Module):
            continue
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            # bytes, since NumPy has no bfloat16; contiguous, since channels_last is the same weights
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
