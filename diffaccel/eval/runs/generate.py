"""Pictures of a pipeline for a list of prompts: every picture a function of its prompt and seed alone, resumable.

A run is a folder: `job.json` says what was asked for, `images/00012/` holds the pictures of shard 12 with `shard.json`,
which names prompts, indices and the hash of every file. A shard appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffaccel.eval.errors import DataError
from diffaccel.eval.files import remove_stale, save_tensors
from diffaccel.eval.images import from_floats
from diffaccel.eval.reference import pair_generator
from diffaccel.eval.runs.calls import accepted, check_call, conditioned, quiet, seeded_noise_only
from diffaccel.eval.runs.manifest import job_of, start_run
from diffaccel.eval.runs.prompts import Prompt
from diffaccel.eval.runs.shards import run_shards, shard_ranges

# These draw their noise from a Brownian tree with a seed of its own: picture i would depend on its batch.
BATCH_BOUND = ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler")


def generate(
    pipe: Any,
    prompts: Sequence[Prompt],
    out: str | os.PathLike[str],
    *,
    num: int | None = None,
    seed: int = 0,
    batch: int = 16,
    latents: bool = False,
    progress: bool = True,
    **call: Any,
) -> Path:
    """Make `num` pictures and return the run's folder.

    Picture i has prompt i modulo the number of prompts, and seed `seed` + i // prompts; its noise is a function of the
    prompt's id and that seed (`pair_generator`), whatever the batch, the order, the device or the number of processes.
    Kernels see batches of `batch`, cut from shards of 64, so that the bytes are the same at any number of processes.

    Args:
        pipe: a pipeline of Diffusers: with `prompt`, with `class_labels` (the prompts are numbers) or with neither.
        prompts: see `read_prompts`.
        out: folder of the run; one that was begun with the same job goes on.
        num: pictures; default: one for every prompt.
        seed: of the first picture of every prompt.
        batch: pictures a call; halved where the memory does not suffice.
        latents: keep the final latents too, float32 (for `latent_mse`).
        progress: show a progress bar over pictures.
        call: further arguments of the pipeline, with a JSON form.

    Raises:
        DataError: if a picture has values that are not finite.
        ValueError: if the folder holds another job, the scheduler cannot be seeded for each picture, the pipeline
            does not know an argument, or latents are wanted of one that does not show them.
    """
    num = len(prompts) if num is None else num
    if num < 1 or not prompts or batch < 1:
        raise ValueError(f"generate needs prompts, num >= 1 and batch >= 1, not {len(prompts)}, {num} and {batch}")
    if type(pipe.scheduler).__name__ in BATCH_BOUND:
        raise ValueError(
            f"{type(pipe.scheduler).__name__} draws noise for the batch as a whole, so that a picture would depend on "
            "its neighbours; use another SDE scheduler, such as diffaccel's sde_dpmpp_2m"
        )
    check_call(pipe, call)
    if latents and not can_keep_latents(pipe):
        raise ValueError(f"{type(pipe).__name__} does not show its latents after a step; generate without latents")
    out = Path(out)
    start_run(out, job_of(pipe, prompts, num=num, seed=seed, batch=batch, latents=latents, call=call))
    remove_stale(out / "images")
    ranges = shard_ranges(num)

    def work(k: int) -> None:
        pairs = [(prompts[i % len(prompts)], seed + i // len(prompts)) for i in ranges[k]]
        with quiet(pipe), seeded_noise_only(pipe):
            images, kept = _in_batches(pipe, pairs, batch, latents, call)
        _write_shard(out, k, ranges[k], pairs, images, kept)

    run_shards(ranges, lambda k: shard_folder(out, k).is_dir(), work, label=f"pictures, {out.name}", progress=progress)
    return out


def shard_folder(run: Path, k: int) -> Path:
    """Folder of shard k."""
    return run / "images" / f"{k:05d}"


def _in_batches(
    pipe: Any, pairs: Sequence[tuple[Prompt, int]], batch: int, latents: bool, call: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """uint8 pictures and latents of a shard; a batch that does not fit is halved, for the rest of the shard too."""
    images: list[Tensor] = []
    kept: list[Tensor] = []
    while len(images) < len(pairs):
        part = pairs[len(images) : len(images) + batch]
        try:
            pictures, final = _call(pipe, part, latents, call)
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
            batch, pictures, final = len(part) // 2, [], []
        if not pictures:
            torch.cuda.empty_cache()  # not above: there the error holds on to the tensors of the call
        images += pictures
        kept += final
    return images, kept


def _call(
    pipe: Any, pairs: Sequence[tuple[Prompt, int]], latents: bool, call: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    final: list[Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        final[:] = list(tensors["latents"].float().cpu())
        return tensors

    arguments = conditioned(pipe, [prompt.text for prompt, _ in pairs], call)
    if latents:
        arguments["callback_on_step_end"] = keep
    generators = [pair_generator(prompt.id, seed) for prompt, seed in pairs]
    output = pipe(**arguments, generator=generators, output_type="np")
    if not hasattr(output, "images"):
        raise DataError(f"{type(pipe).__name__} makes no pictures ({', '.join(output)}), and cannot be evaluated here")
    pictures = torch.as_tensor(output.images).movedim(-1, 1)
    try:
        return list(from_floats(pictures)), [latent.clone() for latent in final]
    except DataError as error:
        raise DataError(f"{type(pipe).__name__} with {type(pipe.scheduler).__name__}: {error}") from None


def can_keep_latents(pipe: Any) -> bool:
    """Whether the pipeline shows its latents after each step."""
    return "callback_on_step_end" in accepted(pipe)


def _write_shard(
    run: Path,
    k: int,
    indices: range,
    pairs: Sequence[tuple[Prompt, int]],
    images: Sequence[Tensor],
    latents: Sequence[Tensor],
) -> None:
    folder = shard_folder(run, k)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for i, image in zip(indices, images, strict=True):
        Image.fromarray(image.movedim(0, -1).numpy()).save(part / f"{i:06d}.png")
    if latents:
        save_tensors({"latents": torch.stack(list(latents))}, part / "latents.safetensors")
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(part.iterdir())}
    one_colour = [i for i, image in zip(indices, images, strict=True) if (image == image[:, :1, :1]).all()]
    record = {
        "indices": list(indices),
        "ids": [prompt.id for prompt, _ in pairs],
        "prompts": [prompt.text for prompt, _ in pairs],
        "seeds": [seed for _, seed in pairs],
        "one_colour": one_colour,
        "files": files,
    }
    (part / "shard.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    try:
        os.replace(part, folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(part)  # another process was first: its shard holds the same bytes
