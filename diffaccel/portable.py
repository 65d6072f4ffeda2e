"""Saving pipelines so that anyone can open them, and opening them again."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import diffusers
from diffusers.utils import logging

from diffaccel.samplers.named import DDIMSolverScheduler, UniPCScheduler
from diffaccel.samplers.scheduler import SolverScheduler

logger = logging.get_logger(__name__)


def save_pretrained(pipe: Any, directory: str | Path, **kwargs: Any) -> str:
    """Save a pipeline so that it opens without diffaccel, and return the name of the stock scheduler it opens with.

    `model_index.json` names a stock class that runs the same network; `scheduler_config.json` keeps our keys, so that
    `OurScheduler.from_config(pipe.scheduler.config)` restores everything. Opened by the stock class the pipeline runs
    as well, but its pictures differ: a warning says so.

    Args:
        pipe: a Diffusers pipeline; it is not changed.
        directory: folder to write. It is written under a temporary name first, and an existing pipeline folder is
            replaced; files in it that are not part of the pipeline stay. A folder without a pipeline is refused.
        kwargs: passed to `DiffusionPipeline.save_pretrained` (`variant`, `max_shard_size`, ...).
    """
    if not hasattr(pipe, "scheduler") or not hasattr(pipe, "save_pretrained"):
        raise TypeError(f"expected a Diffusers pipeline with a scheduler, not {type(pipe).__name__}")
    target = Path(directory).resolve()
    if target.exists() and not (target / "model_index.json").exists() and (target.is_file() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not a pipeline folder; choose an empty or a new folder")
    ours = pipe.scheduler
    stock = _stock_scheduler(ours) if isinstance(ours, SolverScheduler) else ours
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    if kwargs.get("push_to_hub"):
        kwargs.setdefault("repo_id", target.name)
    try:
        pipe.scheduler = stock
        pipe.save_pretrained(scratch / "new", **kwargs)
        if target.exists():
            target.rename(scratch / "old")
        (scratch / "new").rename(target)
        _keep_other_files(scratch / "old", target)
    finally:
        pipe.scheduler = ours
        if (scratch / "old").exists() and not target.exists():  # interrupted between the two renames
            (scratch / "old").rename(target)
        shutil.rmtree(scratch)
    name = type(stock).__name__
    if stock is not ours:
        logger.warning(
            f"{target} opens without diffaccel, with the stock {name}: its pictures then differ from those of "
            f"{type(ours).__name__}. diffaccel.{type(ours).__name__}.from_config(pipe.scheduler.config) restores it."
        )
    return name


def _keep_other_files(old: Path, new: Path) -> None:
    """Move what lay beside an old pipeline (a LoRA, pictures) into the new folder; parts of the pipeline go."""
    if not (old / "model_index.json").exists():
        return  # there was no pipeline before
    parts = json.loads((old / "model_index.json").read_text()).keys()
    for entry in old.iterdir():
        if entry.name not in parts and not (new / entry.name).exists():
            entry.rename(new / entry.name)


def _stock_scheduler(ours: SolverScheduler) -> Any:
    """Scheduler of the stock class that runs the same network, with our config's keys."""
    config = {k: v for k, v in ours.config.items() if k != "_use_default_values"}
    unipc = isinstance(ours, UniPCScheduler)
    if config["prediction_type"] == "flow_prediction" and not config["use_flow_sigmas"]:
        stock = diffusers.FlowMatchEulerDiscreteScheduler
    elif config["sigma_data"] is not None:
        stock = diffusers.EDMDPMSolverMultistepScheduler
    elif isinstance(ours, DDIMSolverScheduler) and not config["use_flow_sigmas"]:
        stock = diffusers.DDIMScheduler
    else:
        stock = diffusers.UniPCMultistepScheduler if unipc else diffusers.DPMSolverMultistepScheduler
    # Keys on which the stock classes fail (docs/parity.md) are kept where only ours look.
    options = dict(config["solver_options"] or {})
    if config["use_beta_sigmas"]:
        config["use_beta_sigmas"] = False
        options.setdefault("schedule", "beta")
    if config["algorithm_type"] in ("dpmsolver", "sde-dpmsolver") and config["final_sigmas_type"] != "sigma_min":
        config["algorithm_type"] += "++"
        options.setdefault("prediction", "epsilon")
    if unipc and config["solver_type"] == "bh1":
        config["solver_type"] = "bh2"
        options.setdefault("second", "bh1")
    return stock.from_config(config | {"solver_options": options or None})


def register_loadable() -> None:
    """Tell Diffusers that components of ours load from the top-level module, also from the Hub.

    Private API: without it local folders still reload once diffaccel is imported, Hub repositories are refused.
    """
    try:
        from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
    except ImportError:
        return
    LOADABLE_CLASSES.setdefault("diffaccel", {})
