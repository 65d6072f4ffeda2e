"""What a network costs: parameters, multiply-accumulates, latency, memory, and how often a pipeline calls it."""

from __future__ import annotations

import gc
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

DENOISERS = ("unet", "transformer", "transformer_2", "prior")
_PROCESS = Path("/proc/self")

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


def macs(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Multiply-accumulates of `function(*args, **kwargs)`: FLOPs / 2, for the batch that is given.

    `function` is a network, or anything that calls networks, such as a whole pipeline.

    Convolutions, matrix products and attention are counted (softmax(Q K^T) V in full, causal or not), whatever kernel
    runs; norms, activations and other element-wise work are not, nor are Triton kernels without a FLOP formula. On
    the `meta` device nothing is computed: a network of any size is counted in a second.
    """
    with flop_counter() as counter, torch.no_grad():
        function(*args, **kwargs)
    return counter.get_total_flops() // 2


def macs_by_module(module: nn.Module, *args: Any, **kwargs: Any) -> dict[str, int]:
    """`macs` of every submodule by its name, each with all that is inside it; "" is the whole.

    Work done in a forward hook or in functions between submodules counts for the module around it.
    """
    with flop_counter() as counter, torch.no_grad():
        module(*args, **kwargs)
    total = counter.get_total_flops() // 2
    names = {name: sum(counts.values()) // 2 for name, counts in counter.get_flop_counts().items()}
    root = type(module).__name__ + "."  # the counter's names start with the class of the outermost module
    inside = {name.removeprefix(root): count for name, count in names.items() if name.startswith(root)}
    return {"": total} | inside


def flop_counter() -> FlopCounterMode:
    """PyTorch's FLOP counter, a context manager, that knows the attention kernels of every device."""
    overloads = [getattr(torch.ops.aten, name) for name in _ATTENTION if hasattr(torch.ops.aten, name)]
    return FlopCounterMode(display=False, custom_mapping=dict.fromkeys(overloads, _attention_flops))


def _attention_flops(q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(q_shape, k_shape, v_shape)


@dataclass(frozen=True)
class Latency:
    """Seconds a call takes, over `runs` calls.

    Attributes:
        median: seconds.
        p20: 20th percentile, seconds.
        p80: 80th percentile, seconds.
        p95: 95th percentile, seconds; interpolated, so that below some 20 runs it is little more than the slowest.
        runs: number of timed calls.
    """

    median: float
    p20: float
    p80: float
    p95: float
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
        drain()
        begin = clock()
        fn()
        drain()
        seconds.append(clock() - begin)
    shares = torch.tensor([0.2, 0.5, 0.8, 0.95], dtype=torch.float64)
    p20, median, p80, p95 = torch.tensor(seconds, dtype=torch.float64).quantile(shares).tolist()
    return Latency(median, p20, p80, p95, runs)


def processor() -> str:
    """Model name of the processor where the system tells (Linux), else its architecture."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def drain() -> None:
    """Wait for the accelerator: its calls return before they are done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@dataclass
class PeakMemory:
    """Most memory that was in use at a time, in bytes; None where the machine does not tell.

    Attributes:
        allocated: of CUDA tensors, on all devices together: what the work needs.
        reserved: what PyTorch's allocator held for them on CUDA devices: what must be free for it.
        driver: what Metal had given to this process at the end; PyTorch keeps no peak there.
        resident: main memory of the whole process (Linux), the interpreter and the weights on the CPU included.
    """

    allocated: int | None = None
    reserved: int | None = None
    driver: int | None = None
    resident: int | None = None


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Peak memory of the block.

    `with peak_memory() as peak: pipe(prompt)`, then `peak.allocated` and the others. What is there at the beginning
    counts, the weights above all. Garbage and the CUDA allocator's unused blocks are given back first, so that the peak
    does not tell of earlier work; the first call in the block is slower for it, and is not one to be timed. The C
    allocator's unused blocks stay: `resident` may hold some from before.
    """
    peak = PeakMemory()
    gc.collect()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    if devices:
        torch.cuda.empty_cache()
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    resettable = _reset_resident_peak()
    yield peak
    if devices:
        peak.allocated = sum(torch.cuda.max_memory_allocated(device) for device in devices)
        peak.reserved = sum(torch.cuda.max_memory_reserved(device) for device in devices)
    if torch.backends.mps.is_available():
        peak.driver = torch.mps.driver_allocated_memory()
    if resettable:
        peak.resident = _resident_peak()


def _reset_resident_peak() -> bool:
    """Whether Linux set the peak resident set back to what is resident now (proc_pid_clear_refs(5), value 5)."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident_peak() -> int | None:
    found = re.search(r"^VmHWM:\s+(\d+) kB$", (_PROCESS / "status").read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else None


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
    nets = denoisers(pipe)
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


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The networks that a pipeline calls in every step, by their names in it.

    Raises:
        TypeError: if the pipeline has none of those that are known.
    """
    found = ((name, getattr(pipe, name, None)) for name in DENOISERS)
    nets = {name: net for name, net in found if isinstance(net, nn.Module)}
    if not nets:
        raise TypeError(f"{type(pipe).__name__} has no network to count; known are {', '.join(DENOISERS)}")
    return nets


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Batch size of a denoiser call: of its first argument, a tensor or a list with one per sample."""
    first = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
    if isinstance(first, (Tensor, list, tuple)):
        return len(first)
    raise TypeError("cannot tell the batch size of this network call: its first argument is neither tensor nor list")
