"""What a run was asked for and where it was made: `job.json`, hashed, and the environment beside it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffaccel.cost import processor
from diffaccel.eval.errors import DataError, ProtocolMismatch
from diffaccel.eval.reference import DENOISING_PARTS, weights_hash
from diffaccel.eval.runs.prompts import Prompt, prompts_hash
from diffaccel.eval.runs.shards import SHARD, is_first_process, process_count
from diffaccel.pictures import save_text

JOB_KEYS = {"prompts", "num", "seed", "seed_rule", "latents"}  # what readers of a run rely on
SEED_RULE = "blake2b-64 of '{seed + i // prompts}:{prompt id}', 63 bits, torch CPU generator"
ENVIRONMENT = "environment.json"
PACKAGES = ("diffaccel", "torch", "diffusers", "transformers", "accelerate", "numpy", "Pillow", "safetensors")
ORACLES = ("torchmetrics", "clean-fid", "open-clip-torch", "torchvision")  # recorded where they are installed


def job_of(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    num: int,
    seed: int,
    batch: int,
    latents: bool,
    call: Mapping[str, Any],
) -> dict[str, Any]:
    """All that decides the pictures of a run, in JSON form.

    Raises:
        TypeError: if an argument of the pipeline has no JSON form.
    """
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    first = (*DENOISING_PARTS, "vae", "vqvae", "prior", "movq")  # the hash hangs on the order
    parts = (*first, *sorted(modules.keys() - set(first)))  # ControlNets, image encoders, decoders, ...
    dtype = str(getattr(pipe, "dtype", torch.float32)).removeprefix("torch.")
    scheduler = {k: v for k, v in dict(pipe.scheduler.config).items() if k != "_use_default_values"}
    job = {
        "pipeline": type(pipe).__name__,
        "weights": weights_hash(pipe, parts),
        "networks": digest({name: _config(part) for name, part in modules.items()}),
        "additions": digest({name: _additions(part) for name, part in modules.items()}),
        "scheduler": {"class": type(pipe.scheduler).__name__, **scheduler},
        "call": dict(call),
        "prompts": prompts_hash(prompts),
        "num": num,
        "seed": seed,
        "seed_rule": SEED_RULE,
        "batch": batch,
        "shard": SHARD,
        "latents": latents,
        "dtype": dtype,
    }
    try:
        return json.loads(json.dumps(job, sort_keys=True), parse_constant=str)  # "-Infinity": JSON has no such number
    except TypeError as error:
        raise TypeError(f"arguments of the pipeline must have a JSON form, for the run's record: {error}") from None


def _additions(part: torch.nn.Module) -> list[str]:
    """What changes outputs and stands in no weight or config: hooks, replaced forwards, processors, FreeU, LoRA scales.

    Their names, that is: a hook whose settings alone have changed looks the same.
    """
    found = []
    for name, module in part.named_modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        found += [f"{name} hook {getattr(hook, '__qualname__', type(hook).__qualname__)}" for hook in hooks]
        registry = getattr(module, "_diffusers_hook", None)
        found += [f"{name} hook {hook}" for hook in getattr(registry, "hooks", ())]
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):  # accelerate's only move tensors
            found.append(f"{name} forward")
        if hasattr(module, "processor"):
            found.append(f"{name} {type(module.processor).__qualname__}")
        scales = {key: vars(module)[key] for key in ("s1", "s2", "b1", "b2", "scaling") if key in vars(module)}
        found += [f"{name} {key} {value}" for key, value in scales.items()]
    return found


def _config(part: Any) -> str:
    """Class and config of a component: sample sizes and the like are in no weight."""
    config: Any = getattr(part, "config", {})
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    return type(part).__name__ + json.dumps(
        {k: v for k, v in values.items() if k[0] != "_"}, sort_keys=True, default=str
    )


def environment() -> dict[str, Any]:
    """Versions, machine, device and threads: what may move a number in its last digits."""
    versions = {}
    for name in (*PACKAGES, *ORACLES):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
        "processes": process_count(),
    }


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON, first 16 hex digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def start_run(run: Path, job: dict[str, Any]) -> None:
    """Write the job, or check that the folder was begun with the same one.

    Raises:
        ProtocolMismatch: if the folder holds another job, with what differs.
        DataError: if the folder is not empty and no run.
    """
    file = run / "job.json"
    while not file.exists() and not is_first_process():
        time.sleep(0.1)
    if file.exists():
        before = read_job(run)
        if before != job:
            changed = ", ".join(sorted(k for k in job.keys() | before.keys() if job.get(k) != before.get(k)))
            raise ProtocolMismatch(f"{run} was begun with another job ({changed} differ); give another folder")
        return
    if run.exists() and not run.is_dir():
        raise DataError(f"{run} is a file; give a folder")
    if run.is_dir() and any(file.name[0] != "." and file.name != ENVIRONMENT for file in run.iterdir()):
        raise DataError(f"{run} is not empty and holds no run; give a new folder")
    run.mkdir(parents=True, exist_ok=True)
    save_text(json.dumps(environment(), indent=1), run / ENVIRONMENT)
    save_text(json.dumps(job, indent=1, ensure_ascii=False), file)


def read_job(run: str | os.PathLike[str]) -> dict[str, Any]:
    """The job of a run.

    Raises:
        DataError: if the folder is no run, or its job cannot be read.
    """
    file = Path(run) / "job.json"
    try:
        job = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{run} is no run: it has no job.json; make one with `diffaccel eval generate`") from None
    except ValueError as error:  # no JSON, or no text
        raise DataError(f"{file} is damaged ({error}); delete the folder and generate again") from None
    if not isinstance(job, dict) or not job.keys() >= JOB_KEYS:
        raise DataError(f"{file} is damaged (it is no job of a run); delete the folder and generate again")
    return job
