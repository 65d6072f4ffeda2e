"""The hook on the pipeline's network that calls another one in its place, step by step."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.hooks import CpuOffload
from diffusers.hooks import ModelHook
from torch import nn

from diffaccel.hooking import register, unregister
from diffaccel.samplers.policy.clock import Clock
from diffaccel.samplers.policy.plan import FULL, Grid, Plan, Policy
from diffaccel.samplers.policy.rows import split
from diffaccel.samplers.policy.spent import Spent, latents

NAME = "diffaccel_policy"
_COPY = "_diffaccel_copied_network"

# A network with weights of its own, or what makes one out of the pipeline's, sharing its weights.
Variant = nn.Module | Callable[[nn.Module], nn.Module]


class PolicyHook(ModelHook):
    """Plans at the first call of a run, and sends every call to the network that the plan names."""

    def __init__(self, pipe: Any, policy: Policy, variants: Mapping[str, Variant], offload: bool):
        super().__init__()
        self.pipe, self.policy, self.variants, self.offload = pipe, policy, dict(variants), offload
        self.clock = Clock()
        self.plan: Plan | None = None
        self.grid = Grid(())
        self.spent = Spent()
        self.networks: dict[str, Any] = {}  # of this run; views of the pipeline's network are made for each
        self.compiled: dict[str, Callable[..., Any]] = {}
        self._host: Any = None
        self._work: Any = None  # device of this run's latents
        self._waits = False  # the pipeline's network, on the CPU
        self._step, self._last = -1, ""

    # Diffusers' side

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Remember the network this hook is on."""
        self._host = weakref.ref(module)
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Find out if the call comes from a deep copy: Diffusers binds `forward` in a closure, which copies share."""
        return args, kwargs if module is self._host() else kwargs | {_COPY: module}

    @torch.compiler.disable
    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the network that the plan names."""
        if (copied := kwargs.pop(_COPY, None)) is not None:
            return rebound(copied)(*args, **kwargs)
        if module._compiled_call_impl is not None:
            raise RuntimeError("this network was compiled around its policy; write handle.compile() instead")
        given = _by_name(module, args, kwargs)
        step = self._read_step(module, given)
        names = self.plan.table[step]  # type: ignore[union-attr]
        if len(set(names)) == 1:
            return self._call(names[0], args, kwargs)
        return split(names, self._call, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> PolicyHook:
        """For the copy of a whole pipeline; the copy of a network alone is a plain network (see `rebound`)."""
        pipe = memo.get(id(self.pipe))
        variants = copy.deepcopy(self.variants, memo) if pipe is not None else {}
        new = PolicyHook(pipe, self.policy, variants, self.offload)
        memo[id(self)] = new
        return new

    # Runs

    def _read_step(self, module: nn.Module, given: Mapping[str, Any]) -> int:
        scheduler, timestep = self.pipe.scheduler, given["timestep"]
        fresh = self.clock.new_run(scheduler)
        step = self.clock.step(scheduler, timestep)
        if fresh or step <= self._step or self.plan is None:
            # Not at every step: the timestep is on the device, and reading it makes the processor wait.
            self.clock.check(step, timestep, getattr(module.config, "timestep_scale", 1.0))
        if fresh or step < self._step or self.plan is None:
            self._begin(module, step, given)
        self._step = step
        return step

    def _begin(self, module: Any, step: int, given: Mapping[str, Any]) -> None:
        self.plan = None
        if not any(value is module for value in self.pipe.components.values()):
            raise RuntimeError("the pipeline has another network by now; remove the policy, and attach it again")
        self.grid = Grid(tuple(self.clock.times), step)
        plan = self.policy.plan(self.grid, given)
        if len(plan.table) != len(self.grid):
            raise ValueError(f"the plan has {len(plan.table)} steps, the run has {len(self.grid)}; plan one row a step")
        if unknown := set(plan.names()) - {FULL, *self.variants}:
            known = ", ".join([FULL, *self.variants])
            raise ValueError(f"the plan names {sorted(unknown)[0]!r}; the networks are {known}")
        self.plan, self._last = plan, ""
        if not self.compiled:
            self.networks = {name: self.made(module, name) for name in plan.names() if name != FULL}
        self._work = latents(given).device
        for name in plan.names():
            self._place(module, name, waiting=self._offloads(module))
        self.spent = Spent.of_run(plan, step, given)

    def made(self, module: nn.Module, name: str) -> nn.Module:
        """The variant of that name; a function makes it out of `module`."""
        variant = self.variants[name]
        return variant if isinstance(variant, nn.Module) else variant(module)

    def _call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self._host()
        if name != self._last and self._offloads(module):
            if self._last and self._last != name:
                self._place(module, self._last, waiting=True)
            self._place(module, name, waiting=False)
        self._last = name
        self.spent.count(self._step, name, args, kwargs)
        own = self.fn_ref.original_forward if name == FULL else self.networks[name]
        return self.compiled.get(name, own)(*args, **kwargs)  # type: ignore[misc]

    # Where weights are

    def _offloads(self, module: Any) -> bool:
        hook = getattr(module, "_hf_hook", None)
        return self.offload or isinstance(hook, CpuOffload) or getattr(hook, "offload", False)

    @torch.inference_mode(False)  # weights that are moved within would never again be trained
    def _place(self, module: Any, name: str, waiting: bool) -> None:
        """Bring a network with weights of its own to the latents, and into the pipeline's type; or let it wait."""
        if name == FULL or shares_weights(self.networks[name], module):
            if self.offload and not hasattr(module, "_hf_hook"):
                module.to("cpu" if waiting else self._work)
                self._waits = waiting
        else:
            network = self.networks[name]
            network.to(device="cpu" if waiting else self._work)
            if not waiting and getattr(network, "dtype", module.dtype) != module.dtype:
                network.to(dtype=module.dtype)

    def come_home(self, module: Any) -> None:
        """Bring the pipeline's network back from where it waits."""
        if self._waits:
            self._place(module, FULL, waiting=False)


def shares_weights(network: nn.Module, module: nn.Module) -> bool:
    """Whether `network` is a view of `module`."""
    known = {id(weight) for weight in module.parameters()}
    return any(id(weight) in known for weight in network.parameters())


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def rebound(module: Any) -> Callable[..., Any]:
    """`forward` of a deep copy, bound to the copy: with its own policy, or none if only the network was copied."""
    hook = module._diffusers_hook.get_hook(NAME)
    unregister(module, NAME)
    if hook.pipe is not None:
        register(module, hook, NAME)
    return module.forward
