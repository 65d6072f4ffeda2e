"""Attach a policy to a pipeline, and take it off again."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from diffaccel.cost import denoisers, macs
from diffaccel.hooking import hook_on, register, unregister
from diffaccel.meta import meta_copy, to_meta
from diffaccel.samplers.policy.hook import NAME, PolicyHook, Variant, rebound
from diffaccel.samplers.policy.plan import FULL, Grid, Plan, Policy
from diffaccel.samplers.policy.spent import Report


class Handle:
    """A policy on a pipeline. As a context manager it is removed at the end of the block."""

    def __init__(self, module: Any, hook: PolicyHook):
        self._module, self._hook = module, hook

    @property
    def plan(self) -> Plan | None:
        """Plan of the last run; None before the first."""
        return self._hook.plan

    @property
    def grid(self) -> Grid:
        """Steps of the last run."""
        return self._hook.grid

    def report(self) -> Report:
        """Multiply-accumulates of the last run, as spent and as planned, per picture.

        Counted on the `meta` device from the shapes of the calls that were made: seconds for the largest networks,
        and nothing while pictures are drawn.

        Raises:
            RuntimeError: before the first run.
        """
        counted: dict[str, Any] = {}

        def count(name: str, call: tuple[tuple[Any, ...], dict[str, Any]]) -> int:
            if name not in counted:
                network = self._module if name == FULL else self._hook.made(self._module, name)
                counted[name] = meta_copy(getattr(network, "_orig_mod", network))
            return macs(counted[name], *to_meta(call[0]), **to_meta(call[1]))

        return self._hook.spent.report(count)

    def compile(self, **options: Any) -> None:
        """`torch.compile` each network, with these options. `remove` undoes it; the networks stay as they are.

        Do it last: what is loaded into the network afterwards (LoRA, IP-Adapter) would not be seen.
        """
        hook = self._hook
        hook.networks = {name: hook.made(self._module, name) for name in hook.variants}
        functions = {FULL: hook.fn_ref.original_forward} | {
            name: network.forward for name, network in hook.networks.items()
        }
        hook.compiled = {name: torch.compile(function, **options) for name, function in functions.items()}

    def remove(self) -> None:
        """Take the policy off; the pipeline is what it was, to the bit. A second time does nothing."""
        registry = getattr(self._module, "_diffusers_hook", None)
        if registry is not None and registry.get_hook(NAME) is self._hook:
            self._hook.come_home(self._module)
            unregister(self._module, NAME)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def attach(pipe: Any, policy: Policy, variants: Mapping[str, Variant], *, offload: bool = False) -> Handle:
    """Let `policy` choose, step by step, which network a pipeline calls.

    Works with any scheduler, also after it is swapped, and with guidance in one call or two. The step is the
    scheduler's: image-to-image starts where it does, and a second-order scheduler has a step for every call. A deep
    copy of the pipeline has the policy too; one of the network alone does not.

    Args:
        pipe: a pipeline with one denoiser (`pipe.unet` or `pipe.transformer`).
        policy: plans each run, at its first call of the network.
        variants: what the policy may name besides "full", the pipeline's own network: networks that take the same
            arguments, or functions that make one out of the pipeline's (a view that shares its weights). They follow
            the pipeline's device and type.
        offload: let the networks that are not used wait on the CPU. With Accelerate's offloading of the pipeline those
            of `variants` always do.

    Raises:
        TypeError: if the pipeline has no network, or one of another kind.
        ValueError: if it has several, has a policy already, or its network was compiled.
    """
    found = denoisers(pipe)
    if len(found) > 1:
        raise ValueError(f"{type(pipe).__name__} has several denoisers ({', '.join(found)}); a policy is for one")
    name, module = next(iter(found.items()))
    if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
        raise ValueError(
            f"pipe.{name} is compiled, and compiled networks call no hooks; attach the policy to the plain network, "
            "then write handle.compile()"
        )
    if "timestep" not in inspect.signature(type(module).forward).parameters or not hasattr(pipe, "scheduler"):
        raise TypeError(
            f"a policy follows the timesteps of pipe.scheduler, which {type(module).__name__} of {type(pipe).__name__} "
            "is not told; give a pipeline of Diffusers with its plain network"
        )
    if (old := _hook(module)) is not None:
        if old.pipe is not None:
            raise ValueError(
                f"pipe.{name} has a policy already, from this pipeline or one that shares it; take it off first: "
                "handle.remove()"
            )
        unregister(module, NAME)  # the network alone was copied, and what is left of its policy does nothing
    if not callable(getattr(policy, "plan", None)):
        raise TypeError(f"a policy is an object with plan(grid, conditioning) -> Plan, not a {type(policy).__name__}")
    if FULL in variants:
        raise ValueError(f"{FULL!r} is the pipeline's own network; give the variant another name")
    hook = PolicyHook(pipe, policy, variants, offload)
    register(module, hook, NAME)
    return Handle(module, hook)


def attached(pipe: Any) -> Handle | None:
    """The policy on a pipeline, such as a deep copy of one with a policy; None if there is none."""
    for module in denoisers(pipe).values():
        hook = _hook(module)
        if hook is not None and hook.pipe is pipe:
            if hook.fn_ref is None:
                rebound(module)  # of a deep copy, which has not been called yet
            return Handle(module, hook)
    return None


def _hook(module: nn.Module) -> PolicyHook | None:
    return hook_on(module, NAME)
