"""From a pipeline to a problem: one step of the stock pipeline is listened to, and its network then called alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch

from diffaccel.cost import denoisers
from diffaccel.eval.reference import reference_key
from diffaccel.samplers.scheduler import SolverScheduler
from diffaccel.samplers.search.guided import Guided
from diffaccel.samplers.search.heard import hear
from diffaccel.samplers.search.problem import Problem


def problem_of(
    pipe: Any,
    prompts: Sequence[Any],
    seeds: Sequence[int],
    guidance_scale: float,
    *,
    batch: int = 32,
    **call: Any,
) -> Problem:
    """The denoiser of a pipeline, with guidance, for every prompt with every seed.

    The pipeline makes two steps for each pair, and all that its network was given in the first besides the sample and
    the time is kept; from then on the network is called directly. That guidance is put together as the pipeline does
    it is checked on that step. Nothing of the pipeline is changed.

    Args:
        pipe: a text-to-image or class-conditional pipeline of Diffusers with one network; samples of one shape.
        prompts: texts, or class numbers (DiT).
        seeds: of every prompt; the noise is a function of prompt and seed alone (`diffaccel.eval.reference`).
        guidance_scale: passed to the pipeline.
        batch: pairs that the network sees at once.
        call: further arguments of the pipeline, such as `height`; they must have a JSON form.

    Raises:
        ValueError: for a pipeline that does more with the network's outputs than classifier-free guidance.
        TypeError: for a pipeline without a network, or a scheduler that ours cannot replace.
    """
    if not prompts or not seeds:
        raise ValueError("a search needs at least one prompt and one seed")
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    if len(set(pairs)) < len(pairs):
        raise ValueError("a search takes each prompt and each seed once; leave out what is there twice")
    networks = denoisers(pipe)
    if len(networks) > 1:
        raise ValueError(f"{type(pipe).__name__} has {len(networks)} networks; searches are for pipelines with one")
    network = next(iter(networks.values()))
    probe = SolverScheduler.from_config(pipe.scheduler.config)
    if probe._filters():
        raise ValueError(
            "thresholding and clip_sample change x0 by more than a sum; searches cannot follow, switch it off"
        )
    given = {"guidance_scale": guidance_scale, **call}
    heard = [hear(pipe, network, probe, pairs[i : i + batch], given) for i in range(0, len(pairs), batch)]
    model = Guided(network, probe, heard, guidance_scale)
    noise = torch.cat([one.sample[: one.pairs] for one in heard]).float().cpu()
    key = json.dumps([reference_key(pipe), guidance_scale, call], sort_keys=True, default=str)
    return Problem(
        probe.schedule, model, noise, key=hashlib.sha256(key.encode()).hexdigest()[:16], batch=batch, network=network
    )
