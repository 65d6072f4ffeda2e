"""Layers that a network can do without at some steps: which there are, what each saves, and how to leave them out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from diffaccel.cost import denoisers, macs_by_module
from diffaccel.meta import meta_copy, to_meta
from diffaccel.pruning.families import family_of, unet
from diffaccel.pruning.families.transformer import LENGTHS
from diffaccel.pruning.families.unet import SkipTransformer
from diffaccel.samplers.policy.attach import Handle, attach
from diffaccel.samplers.policy.exits.transformer import Skipped
from diffaccel.samplers.policy.exits.unet import Pass, Shortcut
from diffaccel.samplers.policy.exits.view import view
from diffaccel.samplers.policy.plan import FULL, Grid, Plan


def skippable(network: nn.Module) -> list[str]:
    """Names of the layers that can be left out, each alone: what surrounds them need not know.

    In U-Nets ResNets, of which the shortcut stays, and transformers (`Transformer2DModel`) or attentions; in
    transformers whole blocks, but for DiT's first, whose embedder its head reads.

    Raises:
        TypeError: for a network of a class that is not known.
    """
    try:
        family = family_of(network)
    except TypeError as error:
        raise TypeError(str(error).replace("prune", "skip layers of")) from None
    if family is unet:
        return [name for name, module in network.named_modules() if _stub(name, module) is not None]
    names = [f"{blocks}.{i}" for blocks in LENGTHS for i in range(len(getattr(network, blocks, ())))]
    return [name for name in names if not (name == "transformer_blocks.0" and hasattr(network, "proj_out_1"))]


def stubs(network: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """What stands in the place of layers that are left out: their shortcuts, of zero or almost no cost.

    Raises:
        ValueError: for a layer that is not `skippable`.
    """
    known = set(skippable(network))
    if unknown := [name for name in names if name not in known]:
        some = ", ".join(sorted(known)[:3])
        raise ValueError(
            f"{unknown[0]!r} is no layer that this {type(network).__name__} can skip; those are {some}, ..."
        )
    modules = {name: network.get_submodule(name) for name in names}
    return {name: _stub(name, module) or Skipped(module) for name, module in modules.items()}


def _stub(name: str, module: nn.Module) -> nn.Module | None:
    """What is left of a layer of a U-Net; None for all others."""
    owner = name.rpartition(".")[0].rpartition(".")[2]
    if isinstance(module, ResnetBlock2D) and owner == "resnets":
        return Shortcut(module)
    if owner == "attentions" and isinstance(module, Transformer2DModel):
        return SkipTransformer()
    return Pass(module) if owner == "attentions" and isinstance(module, Attention) else None


@contextmanager
def skipping(network: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """`network` without these layers while the block runs; its weights and all else stay as they are.

    Raises:
        ValueError: for a layer that cannot be skipped.
    """
    replaced = stubs(network, names) if names else {}
    originals = {name: network.get_submodule(name) for name in replaced}
    try:
        for name, stub in replaced.items():
            network.set_submodule(name, stub)
        yield
    finally:
        for name, module in originals.items():
            network.set_submodule(name, module)


def shares(network: nn.Module, call: tuple[tuple[Any, ...], Mapping[str, Any]]) -> dict[str, float]:
    """What each skippable layer saves: its share of the multiply-accumulates of a call, less what stays in its place.

    Counted on the meta device from the shapes of `call`, (args, kwargs) of the network.
    """
    copied = meta_copy(network)
    counted = macs_by_module(copied, *to_meta(call[0]), **to_meta(dict(call[1])))
    names = skippable(network)
    return {name: (counted.get(name, 0) - counted.get(f"{name}.conv_shortcut", 0)) / counted[""] for name in names}


@dataclass(frozen=True)
class SkipSchedule:
    """Policy that leaves out the same layers at each step of every run.

    Attributes:
        variants: name of the network of each step.
    """

    variants: tuple[str, ...]

    def plan(self, grid: Grid, conditioning: Mapping[str, Any]) -> Plan:
        """One network a step.

        Raises:
            ValueError: for a run of another number of calls.
        """
        if len(grid) != len(self.variants):
            raise ValueError(
                f"layers were chosen for {len(self.variants)} network calls, and this run has {len(grid)}; use the "
                "sampler and the number of steps that they were searched with"
            )
        return Plan.same(self.variants)


def skip_layers(pipe: Any, skips: Sequence[Sequence[str]]) -> Handle:
    """Let a pipeline leave out layers, others at each network call, as `autodiffusion` found them.

    Args:
        pipe: a pipeline with one U-Net or transformer.
        skips: names of the layers that each network call of a run leaves out, from noise to data; `notes["skips"]`.

    Returns:
        A handle: `handle.report()`, `handle.compile()`, `handle.remove()`.

    Raises:
        TypeError: for a network of another class.
        ValueError: for a layer that cannot be skipped.
    """
    network = next(iter(denoisers(pipe).values()))
    sets = [tuple(sorted(names)) for names in skips]
    named = {names: f"skip {i}" for i, names in enumerate(dict.fromkeys(sets)) if names}
    for names in named:
        stubs(network, names)  # what cannot be skipped says so now
    schedule = SkipSchedule(tuple(named.get(names, FULL) for names in sets))
    return attach(pipe, schedule, {name: partial(_without, names=names) for names, name in named.items()})


def _without(network: nn.Module, names: Sequence[str]) -> nn.Module:
    return view(network, stubs(network, names))
