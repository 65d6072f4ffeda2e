"""Do two networks belong together: can one go on with the latents that the other has begun?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from diffaccel.cost import denoisers
from diffaccel.samplers.config import NETWORK_KEYS
from diffaccel.samplers.scheduler import SolverScheduler

# Config keys that say what a network takes and gives; what lies between may differ.
_TAKEN = (
    *("in_channels", "out_channels", "cross_attention_dim", "encoder_hid_dim", "encoder_hid_dim_type"),
    *("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"),
    *("class_embed_type", "num_class_embeds", "num_embeds_ada_norm", "time_cond_proj_dim", "center_input_sample"),
    *("caption_channels", "use_additional_conditions", "joint_attention_dim", "pooled_projection_dim"),
    *("guidance_embeds", "num_train_timesteps"),
)
_TRAINED = (*NETWORK_KEYS, "use_flow_sigmas", "sigma_schedule")  # keys of schedulers
_SAME_TEXT = 0.02  # relative difference of text embeddings; float16 makes 1e-3


def check_network(pipe: Any, small: nn.Module) -> None:
    """Raise unless `small` takes and gives what the pipeline's network does.

    Raises:
        TypeError: for a network of another kind.
        ValueError: for one whose latents, text or labels have other shapes, or for the pipeline's own.
    """
    large: Any = next(iter(denoisers(pipe).values()))
    large = getattr(large, "_orig_mod", large)  # `attach` refuses a compiled one
    if not isinstance(small, nn.Module):
        raise TypeError(f"the small network is a network or a pipeline that has one, not a {type(small).__name__}")
    small_: Any = getattr(small, "_orig_mod", small)  # here they are welcome
    if small_ is large:
        raise ValueError("the small network is the pipeline's own; give another one")
    if (ours := _stock(type(large))) is not (theirs := _stock(type(small_))):
        raise TypeError(
            f"a {theirs.__name__} cannot stand in for a {ours.__name__}; give a smaller network of that class"
        )
    for key in _TAKEN:
        if key == "cross_attention_dim" and large.config.get("caption_channels"):
            continue  # PixArt and Sana bring the text to the width of the network first
        # As attributes: Diffusers sets those of an IP-Adapter, which `config.get` does not see
        one, other = (getattr(network.config, key, None) for network in (large, small_))
        if one != other:
            raise ValueError(
                f"the networks do not fit: {key} is {one} in the pipeline's and {other} in the small one; they must "
                "share latents and conditioning"
            )
    sides = [one.config.get("sample_size") for one in (large, small_)]
    if hasattr(large, "pos_embed") and sides[0] != sides[1]:
        raise ValueError(f"the networks do not fit: they are for latents with a side of {sides[0]} and of {sides[1]}")


def check_pipeline(pipe: Any, other: Any) -> nn.Module:
    """The network of pipeline `other`, unless it was trained for something else than that of `pipe`.

    Raises:
        TypeError: if it is no pipeline.
        ValueError: for another prediction type, noise schedule or text encoder.
    """
    if not hasattr(other, "components"):
        raise TypeError(f"the small network is a network or a pipeline that has one, not a {type(other).__name__}")
    _check_schedule(pipe.scheduler, other.scheduler)
    _check_latents(getattr(pipe, "vae", None), getattr(other, "vae", None))
    _check_text(pipe, other)
    return next(iter(denoisers(other).values()))


def _stock(kind: type) -> type:
    return getattr(kind, "stock", kind)  # of a pruned class


def _trained(config: Mapping[str, Any]) -> Any:
    """What a network was trained for, as a scheduler of ours, whatever samples it (LCM, TCD); None if unknown."""
    try:
        return SolverScheduler.from_config({key: config[key] for key in _TRAINED if key in config})
    except ValueError:
        return None


def _check_schedule(ours: Any, theirs: Any) -> None:
    known = [_trained(scheduler.config) for scheduler in (ours, theirs)]
    if None in known:
        return
    one, other = (scheduler.prediction_type for scheduler in known)
    if one != other:
        raise ValueError(f"the networks do not fit: one predicts {one}, the small one {other}")
    tables = [scheduler.schedule for scheduler in known]
    paths = [table.path for table in tables]
    if paths[0] != paths[1]:
        raise ValueError(
            f"the networks do not fit: their noise schedules are on the {paths[0]} and the {paths[1]} path"
        )
    lambdas = [np.asarray(table.lambdas) for table in tables]
    if paths[0] != "flow" and (lambdas[0].shape != lambdas[1].shape or not np.allclose(*lambdas, atol=1e-3)):
        raise ValueError(
            "the networks do not fit: they were trained on different noise schedules (betas); at equal timesteps they "
            "expect different amounts of noise"
        )


def _check_latents(ours: Any, theirs: Any) -> None:
    """The VAEs themselves may differ (a fine-tuned decoder); what they scale latents by may not."""
    if ours is None or theirs is None:
        return
    for key in ("scaling_factor", "shift_factor"):
        if (one := ours.config.get(key)) != (other := theirs.config.get(key)):
            raise ValueError(f"the networks do not fit: {key} of their latents is {one} and {other}")


@torch.no_grad()
def _check_text(pipe: Any, other: Any) -> None:
    """The pipeline encodes the text once, for all networks."""
    names = [name for name in ("text_encoder", "text_encoder_2", "text_encoder_3") if getattr(pipe, name, None)]
    for name in names:
        ours, theirs = getattr(pipe, name), getattr(other, name, None)
        if theirs is None or ours is theirs:
            continue  # a pipeline without one was saved to share the other's
        hint = (
            f"pass its network alone (other.{next(iter(denoisers(other)))}) if you know that it understands this text"
        )
        shapes = [{key: tuple(weight.shape) for key, weight in one.state_dict().items()} for one in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the pipelines have different text encoders ({name}); {hint}")
        if any(weight.is_meta for one in (ours, theirs) for weight in one.parameters()):
            raise ValueError(f"the text encoders ({name}) are offloaded and cannot be compared; {hint}")
        pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
        squares = [((a.float() - b.float().to(a.device)).square().sum(), a.float().square().sum()) for a, b in pairs]
        change = (sum(d for d, _ in squares) / sum(t for _, t in squares)) ** 0.5
        if change > _SAME_TEXT:
            raise ValueError(
                f"the weights of the text encoders ({name}) differ by {float(change):.1%}: the small network was "
                f"trained on other embeddings; {hint}"
            )
