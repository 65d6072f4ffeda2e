"""Diffusers' configs read at the boundary: everything behind it sees value objects only.

The keys and their meaning are Diffusers' own; one key is ours, `solver_options` (see `SolverScheduler`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffaccel.samplers.schedule import NoiseSchedule, betas, zero_terminal_snr
from diffaccel.samplers.spacing import check_spacing, karras

# Classes whose JSON ours can open. Their networks are told a time and see x on a path we know.
OPENED = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
    "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
)
# Keys that only schedulers of other trajectories have; a live config does not carry its class name.
FOREIGN_KEYS = {
    "original_inference_steps": "a consistency-distilled model (LCM, TCD)",
    "snr_shift_scale": "CogVideoX's own noise schedule",
    "scale_factors": "a multi-scale flow (FlowMatchLCM)",
    "num_vec_classes": "a discrete (VQ) diffusion",
    "masking_schedule": "a masked (non-Gaussian) diffusion",
    "clip_denoised": "a consistency model",
    "stage_range": "a flow in stages (Helios)",
    "num_policy_substeps": "a policy flow (Piflow)",
}
# What the network was trained on. Diffusers' from_config drops keys that the source left at its default, but classes
# differ in their defaults (Heun's betas are not DDPM's): these are carried over as they are.
NETWORK_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
    "timestep_type",
    "sigma_min",
    "sigma_max",
    "sigma_data",
    "shift",
)
# Values that name another family's algorithm, and the default that takes their place.
OTHER_FAMILY = {
    "algorithm_type": (("deis", "data_prediction", "noise_prediction"), "dpmsolver++"),
    "solver_type": (("logrho",), "midpoint"),
}


def adopt(config: Mapping[str, Any], own_names: tuple[str, ...]) -> dict[str, Any]:
    """Keyword overrides that make a foreign scheduler config ours; refuse with a sentence what we cannot run."""
    if not isinstance(config, Mapping):
        raise TypeError(f"expected a scheduler's config (pipe.scheduler.config), not {type(config).__name__}")
    name = config.get("_class_name")
    if name is not None and name not in OPENED + own_names:
        raise ValueError(f"cannot take over a {name} config; ours open those of {', '.join(OPENED)}")
    edm = {"sigma_data", "sigma_schedule"} <= config.keys()
    if "num_train_timesteps" not in config or not (edm or "beta_start" in config or "shift" in config):
        raise ValueError("this is not a scheduler's config that ours know; pass pipe.scheduler.config")
    for key, what in FOREIGN_KEYS.items():
        if key in config:
            raise ValueError(f"cannot take over this scheduler config: its {key} belongs to {what}")
    for key in ("invert_sigmas", "stochastic_sampling"):
        if config.get(key):
            raise ValueError(f"cannot take over this scheduler config: {key}=True is not supported")
    if config.get("rho", 7.0) != 7.0:
        raise ValueError(
            f"cannot take over this scheduler config: rho={config['rho']:g}, and ours use Karras' rho of 7"
        )
    overrides: dict[str, Any] = {key: config[key] for key in NETWORK_KEYS if key in config}
    for key, (values, default) in OTHER_FAMILY.items():
        if config.get(key) in values:
            overrides[key] = default
    if is_flow_match(config):
        overrides["prediction_type"] = "flow_prediction"
    if edm and "use_karras_sigmas" not in config:  # in EDM's own words
        key = "use_exponential_sigmas" if config["sigma_schedule"] == "exponential" else "use_karras_sigmas"
        overrides[key] = True
    return overrides


def is_flow_match(config: Mapping[str, Any]) -> bool:
    """Whether a config is a FlowMatch one, which names neither path nor prediction type: it has a shift, no betas."""
    return "shift" in config and "beta_start" not in config


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a config, of ours or of Diffusers, is that of a rectified-flow model."""
    named = config.get("prediction_type") == "flow_prediction" or bool(config.get("use_flow_sigmas"))
    return named or is_flow_match(config)


def noise_schedule(c: Mapping[str, Any]) -> NoiseSchedule:
    """Noise schedule that a config of ours describes."""
    count = c["num_train_timesteps"]
    if is_flow(c):
        return NoiseSchedule.rectified_flow(count)
    if c["sigma_data"] is not None:
        return NoiseSchedule.from_sigmas(karras(c["sigma_max"], c["sigma_min"], count)[::-1], "ve")
    if c["timestep_type"] == "continuous":  # SVD: a VP network in EDM's clock
        if c["sigma_min"] is None or c["sigma_max"] is None:
            raise ValueError("timestep_type='continuous' needs sigma_min and sigma_max in the config")
        return NoiseSchedule.from_sigmas(karras(c["sigma_max"], c["sigma_min"], count)[::-1], "vp")
    schedule = NoiseSchedule.from_alphas_cumprod(alphas_cumprod(c))
    kept = schedule.lambdas >= c["lambda_min_clipped"]
    return NoiseSchedule("vp", schedule.lambdas[kept], schedule.times[kept])


def alphas_cumprod(c: Mapping[str, Any]) -> np.ndarray:
    """(T,) float64 products of 1 - beta of a VP config."""
    trained = c["trained_betas"]
    if trained is None:
        values = betas(c["beta_schedule"], c["beta_start"], c["beta_end"], c["num_train_timesteps"])
    else:
        values = np.asarray(trained, dtype=np.float64)
    if values.ndim != 1 or not ((values > 0) & (values < 1)).all():
        raise ValueError("betas must be a list of numbers between 0 and 1; check beta_start, beta_end or trained_betas")
    alpha_bar = np.cumprod(1.0 - values)
    return zero_terminal_snr(alpha_bar) if c["rescale_betas_zero_snr"] else alpha_bar


def spacing(c: Mapping[str, Any]) -> str:
    """Name of the time spacing that a config of ours asks for."""
    named = (c["solver_options"] or {}).get("schedule")
    if named is not None:
        return named
    for key, name in SPACING_KEYS.items():
        if c[key]:
            return name
    if c["use_flow_sigmas"]:
        return "flow_linspace"
    return "flow" if is_flow(c) else c["timestep_spacing"]


SPACING_KEYS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "logsnr",
}


def spacing_config(name: str, flow: bool) -> dict[str, Any]:
    """Config keys that ask for spacing `name`, in Diffusers' own words wherever it has them."""
    check_spacing(name, flow)
    keys: dict[str, Any] = {key: value == name for key, value in SPACING_KEYS.items()}
    if name in ("linspace", "leading", "trailing"):
        keys["timestep_spacing"] = name
    if name in SPACING_KEYS.values() or ("timestep_spacing" in keys and not flow):
        return keys
    return keys | {"solver_options": {"schedule": name}}  # flow paths do not read timestep_spacing
