"""Fast Diffusers pipelines, with measurements that show the pictures stay good."""

from typing import Any

# Diffusers looks these two names up in this module when it reloads a component of ours (`pipeline_loading_utils`).
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin

from diffaccel import zoo as zoo
from diffaccel.portable import register_loadable, save_pretrained
from diffaccel.samplers.catalog import scheduler
from diffaccel.samplers.named import (
    NAMED,
    AcceleratedDDIMScheduler,
    AcceleratedDDPMScheduler,
    DDIMSolverScheduler,
    DEISScheduler,
    DPMSinglestepScheduler,
    DPMSolverScheduler,
    EDMStochasticScheduler,
    ERSDEScheduler,
    EulerAncestralScheduler,
    FlowEulerScheduler,
    GradientEstimationScheduler,
    HeunScheduler,
    IPNDMSolverScheduler,
    LMSScheduler,
    RESScheduler,
    SAScheduler,
    SEEDSScheduler,
    UniPCScheduler,
)
from diffaccel.samplers.scheduler import SolverScheduler
from diffaccel.samplers.searched import DCSolverScheduler, RecipeScheduler

__version__ = "0.1.0"
__all__ = [
    "AcceleratedDDIMScheduler",
    "AcceleratedDDPMScheduler",
    "DCSolverScheduler",
    "DDIMSolverScheduler",
    "DEISScheduler",
    "DPMSinglestepScheduler",
    "DPMSolverScheduler",
    "EDMStochasticScheduler",
    "ERSDEScheduler",
    "EulerAncestralScheduler",
    "FlowEulerScheduler",
    "GradientEstimationScheduler",
    "HeunScheduler",
    "IPNDMSolverScheduler",
    "LMSScheduler",
    "RESScheduler",
    "RecipeScheduler",
    "SAScheduler",
    "SEEDSScheduler",
    "SolverScheduler",
    "UniPCScheduler",
    "save_pretrained",
    "scheduler",
    "zoo",
]


def __getattr__(name: str) -> Any:
    """What works on networks is imported when one asks for it: the networks take seconds to import."""
    import importlib

    if name in ("prune", "pruning"):
        pruning = importlib.import_module("diffaccel.pruning")
        return pruning if name == "pruning" else pruning.prune
    if name in _POLICIES:
        return getattr(importlib.import_module(f"diffaccel.samplers.policy{_POLICIES[name]}"), name)
    if name in ("SparseEditConfig", "SparseEditPipeline", "apply_sparse_edit"):
        return getattr(importlib.import_module("diffaccel.kernels"), name)
    if name in ("Recipe", "search"):
        return getattr(importlib.import_module("diffaccel.samplers.search"), name)
    if name.startswith("Pruned"):
        from diffaccel.pruning import models

        if name in models.NAMES:
            return models.pruned_class(models.NAMES[name])
    raise AttributeError(f"module 'diffaccel' has no attribute {name!r}")


_POLICIES = {"stitch": ".stitch", "stitch_frontier": ".frontier", "early_exit": ".exits", "fit_exits": ".exits"}

# Saved pipelines name a class by its module: the short name lets files move (`["diffaccel", "DPMSolverScheduler"]`).
for _cls in (*NAMED, DCSolverScheduler, RecipeScheduler):
    _cls.__module__ = "diffaccel"
register_loadable()
