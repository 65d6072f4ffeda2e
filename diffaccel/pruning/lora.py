"""A LoRA of the original network, made to fit the pruned one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusers.loaders import FluxLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffaccel.pruning.families import family_of
from diffaccel.pruning.find import find_groups
from diffaccel.pruning.numbering import Numbering, numbering_of
from diffaccel.pruning.plan import PruningPlan
from diffaccel.pruning.surgery import removed_features, vanished, without

logger = logging.get_logger(__name__)

LoRA = Mapping[str, Tensor] | tuple[Mapping[str, Tensor], Mapping[str, Any] | None] | str | Path
HEADER = "lora_adapter_metadata"  # where Diffusers keeps the LoraConfig in a .safetensors file
KEY = re.compile(
    r"(?P<prefix>(?:base_model\.model\.)?(?:(?:unet|transformer|text_encoder\w*)\.)?)"
    r"(?P<layer>.+?)(?:\.lora\.|_lora\.|\.lora_linear_layer\.|\.lora_)"
    r"(?P<part>A|B|down|up|magnitude_vector)(?:\.(?P<kind>weight|bias))?"
)


class Key(NamedTuple):
    """What a key of a LoRA says: `unet.` + `mid_block...to_q` + `.lora_` + `A` + `.weight`."""

    prefix: str
    layer: str
    part: str
    kind: str

    @property
    def of_text(self) -> bool:
        """Whether it belongs to a text encoder."""
        return self.prefix.startswith("text_encoder")


def remap_lora(lora: LoRA, plan: PruningPlan | Sequence[PruningPlan]) -> dict[str, Tensor]:
    """A LoRA of the network that `plan` is for, as one of the network that `cut` makes of it.

    Loaded as it is, a LoRA of the original lands on the wrong blocks where blocks are gone, without an error. Here
    blocks get their new numbers, and each product B A loses the rows and columns that its layer loses: loading the
    result after cutting equals cutting after fusing. Layers that are gone or constant lose their part of the LoRA.

    A network that was pruned twice needs both plans, in their order: `load_plans(folder)`.

    Args:
        lora: state dict in the names of Diffusers or PEFT (`lora_A`, `lora.down`, `to_q_lora.down`; `unet.` or
            `transformer.` in front, or nothing), what `pipe.lora_state_dict(...)` returns, a `.safetensors` file, or
            its folder. Other names that Diffusers converts (kohya's, for U-Nets and Flux) are converted here, with the
            config of the original; the pipeline of a pruned SDXL would count its blocks instead. Alphas, also those
            of the `LoraConfig` in the header of a file, are multiplied into B.
        plan: what the network was pruned by, or all that it was pruned by.

    Returns:
        State dict for `pipe.load_lora_weights`, `model.load_lora_adapter` or PEFT, with scale 1 (alpha = rank); keys
        as they were but for numbers of blocks. Text encoders keep theirs.

    Raises:
        ValueError: if no key, or not every key, is for a layer of the network (LoKr, LoHa, fused projections); if
            nothing is left; for a DoRA on a layer that loses inputs, since the norms of its weights change; for a file
            that cannot be read.
    """
    plans = [plan] if isinstance(plan, PruningPlan) else list(plan)
    if not plans:
        raise ValueError("a LoRA is remapped by the plans of a network; give one or more")
    for step in plans:
        lora = _remapped(lora, step)
    return dict(lora)  # type: ignore[arg-type]


def _remapped(lora: LoRA, plan: PruningPlan) -> dict[str, Tensor]:
    original = plan.original()
    state = _standard(lora, original)
    keys = _keys(state, original)
    removal = _removal(original, plan)
    result, lost = {}, []
    for name, key in keys.items():
        new = removal.new(key.layer, name.removeprefix(key.prefix))
        if key.of_text:
            result[name] = state[name]
        elif new is not None:
            result[key.prefix + new] = _sliced(state[name], name, key, original, removal)
        elif key.kind == "bias":
            lost.append(name)
    if not result:
        raise ValueError("nothing of this LoRA is left: the plan removes every layer that it is for")
    if lost:
        logger.warning(f"{len(lost)} biases of this LoRA are for layers that are constant now or gone: {lost[0]}, ...")
    return result


class Removal(NamedTuple):
    """What a plan does to the layers of a network."""

    features: dict[tuple[str, str], set[int]]  # (side, layer) -> features that go
    rows: Mapping[str, list[int]]  # layer -> its rows in their new order, for a layer that changes its kind
    vanished: Callable[[str], bool]
    numbering: Numbering

    def new(self, layer: str, name: str) -> str | None:
        """New name of a key of `layer`; None if the layer is gone or has no input or output any more."""
        if self.vanished(f"{layer}.weight") or self.rows.get(layer) == []:
            return None
        return self.numbering.new(name)


def _removal(original: Any, plan: PruningPlan) -> Removal:
    groups = find_groups(original)
    gone = plan.gone(groups)
    features = removed_features(plan, groups)
    empty = {layer for (side, layer), units in features.items() if len(units) == _width(original, layer, side)}
    rows = dict(family_of(original).reordered_rows(original, gone)) | {layer: [] for layer in empty}
    return Removal(features, rows, vanished(original, plan, groups, gone), numbering_of(gone))


def _width(original: nn.Module, layer: str, side: str) -> int:
    return original.get_parameter(f"{layer}.weight").shape[0 if side == "out" else 1]


def _sliced(value: Tensor, name: str, key: Key, original: nn.Module, removal: Removal) -> Tensor:
    """Rows of B, and of what goes with it; columns of A."""
    side, dim = ("in", 1) if key.part in ("A", "down") else ("out", 0)
    features, rows = removal.features.get((side, key.layer)), removal.rows.get(key.layer)
    if key.part == "magnitude_vector" and ("in", key.layer) in removal.features:
        raise ValueError(
            f"{name}: a DoRA on a layer that loses inputs, which changes the norms of its weights; "
            "fuse it into the original network before you prune"
        )
    if features and value.shape[dim] != _width(original, key.layer, side):
        shape, weight = tuple(value.shape), tuple(original.get_parameter(f"{key.layer}.weight").shape)
        raise ValueError(f"this LoRA is for another network: {name} is {shape}, for a weight of {weight}")
    if rows is not None and side == "out":
        value = value[rows]
    if features:
        value = without(value, dim, features)
    return value.contiguous()


def _keys(state: Mapping[str, Tensor], original: nn.Module) -> dict[str, Key]:
    """What every key says.

    Raises:
        ValueError: if none, or not all, are for layers of the network or for text encoders.
    """
    layers = {name for name, module in original.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    keys = {name: _parsed(name) for name in state}
    own = [name for name, key in keys.items() if key and key.layer in layers and not key.of_text]
    kind = type(original).__name__
    if not own:
        some = ", ".join(list(state)[:2]) or "nothing"
        raise ValueError(f"no key of this LoRA is for a layer of the {kind} of the plan; it has {some}, ...")
    known = {name: key for name, key in keys.items() if key and (key.of_text or key.layer in layers)}
    if unknown := [name for name in keys if name not in known]:
        raise ValueError(
            f"{len(unknown)} keys of this LoRA cannot be remapped: {unknown[0]} is no low-rank matrix of a layer of "
            f"the {kind} of the plan (not LoKr, LoHa, fused projections, trained norms); fuse it before you prune"
        )
    return known


def _parsed(name: str) -> Key | None:
    match = KEY.fullmatch(name.replace(".processor.", "."))
    if match is None:
        return None
    layer = match["layer"]
    layer += ".0" if layer.endswith(".to_out") and not match["prefix"].startswith("text_encoder") else ""
    return Key(match["prefix"], layer, match["part"], match["kind"] or "")


def _standard(lora: LoRA, original: Any) -> dict[str, Tensor]:
    """State dict with names of Diffusers or PEFT, whose scale is 1."""
    state, config = _read(Path(lora)) if isinstance(lora, str | Path) else (lora, {})
    state, alphas = (state[0], state[1] or {}) if isinstance(state, tuple) else (state, {})
    state, converted = _converted(dict(state), original)
    alphas = {**alphas, **converted, **{name: value for name, value in state.items() if name.endswith(".alpha")}}
    state = {name: value for name, value in state.items() if not name.endswith(".alpha")}
    return _scaled(state, {name.removesuffix(".alpha"): float(value) for name, value in alphas.items()}, config)


def _converted(state: dict[str, Tensor], original: Any) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """(Keys in the names of Diffusers, alphas); a state dict that has them already, or is of nobody, as it is."""
    keys = [_parsed(name) for name in state]
    modules = {name for name, _ in original.named_modules()}
    if any(key and key.layer in modules for key in keys):
        return state, {}
    if hasattr(original, "encoder_hid_proj"):  # SD's and SDXL's names; a config is needed for those of SDXL's authors
        converted: Any = StableDiffusionXLLoraLoaderMixin.lora_state_dict(state, unet_config=original.config)
        return converted[0], converted[1] or {}
    if hasattr(original, "single_transformer_blocks"):
        converted = FluxLoraLoaderMixin.lora_state_dict(state, return_alphas=True)
        return converted[0], converted[1] or {}
    return state, {}


def _scaled(state: dict[str, Tensor], alphas: Mapping[str, float], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """B times alpha / rank. PEFT's default, and Diffusers' without alphas, is alpha = rank."""
    keys = {name: key for name in state if (key := _parsed(name))}
    ranks = {(key.prefix, key.layer): state[name].shape[0] for name, key in keys.items() if key.part in ("A", "down")}
    scales = {where: _scale_of(*where, rank, config) for where, rank in ranks.items()}
    for name, alpha in alphas.items():
        key = _parsed(name) or _parsed(f"{name}.lora_A")
        where = (key.prefix, key.layer) if key else None
        if where not in ranks:
            raise ValueError(f"{name}.alpha in this LoRA belongs to no layer of it")
        scales[where] = alpha / ranks[where]
    scaled = {name for name, key in keys.items() if key.part in ("B", "up")}
    return {n: v * scales.get(keys[n][:2], 1.0) if n in scaled else v for n, v in state.items()}


def _scale_of(prefix: str, layer: str, rank: int, config: Mapping[str, Any]) -> float:
    """Scale by the `LoraConfig` of a file, whose keys have the prefix too; 1 without one."""
    own = {name.removeprefix(prefix): value for name, value in config.items() if name.startswith(prefix)}
    if own.get("lora_alpha") is None:
        return 1.0
    patterns = own.get("alpha_pattern") or {}
    alpha = next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", layer)), own["lora_alpha"])
    return alpha / (rank**0.5 if own.get("use_rslora") else rank)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(State dict, `LoraConfig` of the header) of a .safetensors file, or of the only one in a folder."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(files) != 1:
        raise ValueError(f"{path} has {len(files)} .safetensors files; name the one of the LoRA")
    try:
        with safe_open(files[0], "pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(header) if header else {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{files[0]} cannot be read as a .safetensors file ({error})") from None
