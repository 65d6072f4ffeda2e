"""What a network costs: parameters, multiply-accumulates, latency, and how often a pipeline calls it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

DENOISERS = ("unet", "transformer", "transformer_2", "prior")

# `FlopCounterMode` counts convolutions, matrix products and the CUDA attention kernels. The kernels that
# `scaled_dot_product_attention` takes elsewhere are missing there (torch 2.13), and without them a U-Net on the CPU
# seems to have no attention at all. Names that a torch release does not have are left out.
_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
)


def parameters(module: nn.Module) -> int:
    """Number of parameters; one that several layers share is counted once, buffers are not counted."""
    return sum(p.numel() for p in module.parameters())


def macs(module: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Multiply-accumulates of `module(*args, **kwargs)`: FLOPs / 2, for the batch that is given.

    Convolutions, matrix products and attention are counted (softmax(Q K^T) V in full, causal or not), whatever kernel
    runs; norms, activations and other element-wise work are not, nor are Triton kernels without a FLOP formula. On
    the `meta` device nothing is computed: a network of any size is counted in a second.
    """
    return macs_by_module(module, *args, **kwargs)[""]


def macs_by_module(module: nn.Module, *args: Any, **kwargs: Any) -> dict[str, int]:
    """`macs` of every submodule by its name, each with all that is inside it; "" is the whole.

    Work done in a forward hook or in functions between submodules counts for the module around it.
    """
    overloads = [getattr(torch.ops.aten, name) for name in _ATTENTION if hasattr(torch.ops.aten, name)]
    counter = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(overloads, _attention_flops))
    with counter, torch.no_grad():
        module(*args, **kwargs)
    total = counter.get_total_flops() // 2
    names = {name: sum(counts.values()) // 2 for name, counts in counter.get_flop_counts().items()}
    root = type(module).__name__ + "."  # the counter's names start with the class of the outermost module
    inside = {name.removeprefix(root): count for name, count in names.items() if name.startswith(root)}
    return {"": total} | inside


def _attention_flops(q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(q_shape, k_shape, v_shape)


@dataclass(frozen=True)
class Latency:
    """Seconds a call takes, over `runs` calls.

    Attributes:
        median: seconds.
        p20: 20th percentile, seconds.
        p80: 80th percentile, seconds.
        runs: number of timed calls.
    """

    median: float
    p20: float
    p80: float
    runs: int


def latency(
    fn: Callable[[], Any], *, warmup: int = 3, runs: int = 20, clock: Callable[[], float] = time.perf_counter
) -> Latency:
    """Time `fn()`, with the accelerator (if there is one) drained before and after every call.

    Args:
        fn: what is timed, with its arguments bound.
        warmup: calls that are not timed: compilation, kernel choice, caches.
        runs: timed calls, at least 1.
        clock: source of seconds; tests give their own.

    Raises:
        ValueError: if `runs` is below 1 or `warmup` below 0.
    """
    if runs < 1 or warmup < 0:
        raise ValueError(f"latency needs runs >= 1 and warmup >= 0, not {runs} and {warmup}")
    for _ in range(warmup):
        fn()
    seconds = []
    for _ in range(runs):
        _drain()
        begin = clock()
        fn()
        _drain()
        seconds.append(clock() - begin)
    shares = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, median, p80 = torch.tensor(seconds, dtype=torch.float64).quantile(shares).tolist()
    return Latency(median, p20, p80, runs)


def _drain() -> None:
    """Wait for the accelerator: its calls return before they are done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@dataclass
class NetworkCalls:
    """Calls of the denoiser.

    Attributes:
        calls: how often it was called. Solver papers' NFE, as long as guidance is one batched call.
        rows: samples it saw in all calls together; classifier-free guidance makes two of each.
        by_name: calls of each denoiser that the pipeline has.
    """

    calls: int = 0
    rows: int = 0
    by_name: dict[str, int] = field(default_factory=dict)


@contextmanager
def network_calls(pipe: Any) -> Iterator[NetworkCalls]:
    """Count what a pipeline asks of its denoiser while the block runs.

    `with network_calls(pipe) as count: pipe(prompt)`, then `count.calls` and `count.rows`. Counted are calls of
    `pipe.unet`, `pipe.transformer`, `pipe.transformer_2` and `pipe.prior` as modules, not of their parts.

    Raises:
        TypeError: if the pipeline has none of them.
    """
    found = ((name, getattr(pipe, name, None)) for name in DENOISERS)
    nets = {name: net for name, net in found if isinstance(net, nn.Module)}
    if not nets:
        raise TypeError(f"{type(pipe).__name__} has no network to count; known are {', '.join(DENOISERS)}")
    count = NetworkCalls(by_name=dict.fromkeys(nets, 0))

    def hook(name: str) -> Callable[..., None]:
        def counted(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            count.calls += 1
            count.by_name[name] += 1
            count.rows += _rows(args, kwargs)

        return counted

    handles = [net.register_forward_pre_hook(hook(name), with_kwargs=True) for name, net in nets.items()]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Batch size of a denoiser call: of its first argument, a tensor or a list with one per sample."""
    first = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
    if isinstance(first, (Tensor, list, tuple)):
        return len(first)
    raise TypeError("cannot tell the batch size of this network call: its first argument is neither tensor nor list")
