"""What a picture costs: network calls, latency, memory, multiply-accumulates, parameters, energy."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from inspect import signature
from statistics import median
from typing import Any

import torch
from torch import nn

from diffaccel.cost import (
    Latency,
    PeakMemory,
    denoisers,
    drain,
    flop_counter,
    latency,
    network_calls,
    parameters,
    peak_memory,
    processor,
)
from diffaccel.eval.energy import energy
from diffaccel.eval.runs.calls import conditioned, quiet
from diffaccel.eval.runs.prompts import Prompt

_SPLIT_RUNS = 5  # calls whose time is split into denoiser and rest


@dataclass(frozen=True)
class Cost:
    """What one call of a pipeline costs, and a picture of it.

    Attributes:
        device: what it ran on, with its threads on the CPU.
        dtype: of the denoiser's weights.
        pictures: pictures (or videos) of a call.
        nfe: calls of the denoiser in a call of the pipeline: the NFE of solver papers, which count a guided pair once.
        rows: samples that the denoiser saw for each picture; guidance makes two of a step.
        latency: seconds of a whole call, from the prompt to pictures on the device: no PNG is written.
        denoiser_seconds: seconds of a call inside the denoiser, median of calls of their own.
        denoiser_share: share of the call's time that this is, in those calls.
        throughput: pictures a second, at the median latency.
        memory: peak of one call, in bytes.
        macs: multiply-accumulates of a picture, attention counted, of the whole pipeline (see `diffaccel.cost.macs`).
        denoiser_macs: those of the denoiser.
        parameters: of the whole pipeline.
        denoiser_parameters: of the denoiser, or denoisers.
        energy: joules of a picture, over all timed calls; None where the device does not tell.
        energy_source: what counted the energy, or why nothing did.
    """

    device: str
    dtype: str
    pictures: int
    nfe: int
    rows: float
    latency: Latency
    denoiser_seconds: float
    denoiser_share: float
    throughput: float
    memory: PeakMemory
    macs: float
    denoiser_macs: float
    parameters: int
    denoiser_parameters: int
    energy: float | None
    energy_source: str

    def to_json(self) -> dict[str, Any]:
        """As objects of JSON; `Cost.from_json` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cost:
        """The cost that `to_json` has written."""
        return cls(**{**data, "latency": Latency(**data["latency"]), "memory": PeakMemory(**data["memory"])})


def measure(
    pipe: Any,
    prompts: str | Prompt | Sequence[str | Prompt] | None = None,
    *,
    batch: int = 1,
    warmup: int = 3,
    runs: int = 30,
    clock: Callable[[], float] = time.perf_counter,
    **call: Any,
) -> Cost:
    """Measure `pipe(prompt, **call)`, always with the same prompts and noise.

    What disturbs the clock is measured in calls of its own: first one that counts, then `warmup` calls, `runs` that
    are timed, one for the memory, and some with the device drained around every denoiser call. Progress bars are off.

    Args:
        pipe: a Diffusers pipeline, on its device.
        prompts: the first `batch` of these are drawn, from the beginning again if there are fewer; numbers for a
            pipeline of classes, anything for one without a condition. None if the call's own arguments say what to
            draw, such as embeddings or a picture.
        batch: pictures of a call, where prompts or `batch_size` decide that.
        warmup: calls before the timed ones: compilation, choice of kernels.
        runs: timed calls.
        clock: source of seconds; tests give their own.
        call: further arguments of the call. `output_type` is "pt", and the generator has seed 0, unless they are here.

    Raises:
        ValueError: if `runs` or `batch` is below 1, `warmup` below 0, or `batch` cannot be had.
        TypeError: if the pipeline has no denoiser that is known.
    """
    if runs < 1 or warmup < 0 or batch < 1:
        raise ValueError(f"measure needs runs >= 1, warmup >= 0 and batch >= 1, not {runs}, {warmup} and {batch}")
    run = _bound(pipe, prompts, batch, call)
    device = getattr(pipe, "_execution_device", pipe.device)  # with offloading, pipe.device is where weights wait
    with quiet(pipe):
        with warnings.catch_warnings(), network_calls(pipe) as calls, flop_counter() as flops:
            # The counter's hooks run for both a compiled module and the one inside; FLOPs are added up once.
            warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)` when there are global hooks")
            with _inside(pipe, flops.get_total_flops) as inside:
                pictures = run()
        for _ in range(warmup):
            run()
        with energy(device) as used:
            timed = latency(run, warmup=0, runs=runs, clock=clock)
        with peak_memory() as memory:
            run()
            drain()
        seconds, share = _split(pipe, run, clock, min(runs, _SPLIT_RUNS))
    nets = nn.ModuleList(denoisers(pipe).values())
    parts = nn.ModuleList(part for part in pipe.components.values() if isinstance(part, nn.Module))
    return Cost(
        device=_described(device),
        dtype=str(next(nets.parameters()).dtype).removeprefix("torch."),
        pictures=pictures,
        nfe=calls.calls,
        rows=calls.rows / pictures,
        latency=timed,
        denoiser_seconds=seconds,
        denoiser_share=share,
        throughput=pictures / timed.median,
        memory=memory,
        macs=flops.get_total_flops() / 2 / pictures,
        denoiser_macs=sum(inside) / 2 / pictures,
        parameters=parameters(parts),
        denoiser_parameters=parameters(nets),
        energy=None if used.joules is None else used.joules / (runs * pictures),
        energy_source=used.source,
    )


def _bound(
    pipe: Any, prompts: str | Prompt | Sequence[str | Prompt] | None, batch: int, call: Mapping[str, Any]
) -> Callable[[], int]:
    """A function that makes the call and says how many pictures it gave."""
    accepted = signature(pipe.__call__).parameters
    arguments = dict(call)
    if prompts is not None:
        several = [prompts] if isinstance(prompts, str | Prompt) else prompts
        texts = [p.text if isinstance(p, Prompt) else p for p in several]
        if not texts:
            raise ValueError("measure needs at least one prompt, or None for a pipeline without prompts")
        arguments = conditioned(pipe, [texts[i % len(texts)] for i in range(batch)], call)
    elif "batch_size" in accepted:
        arguments.setdefault("batch_size", batch)
    elif batch > 1:
        raise ValueError(
            f"{type(pipe).__name__} is not asked for a number of pictures: leave batch at 1, and give the call the "
            "embeddings, class labels or pictures of as many as are to be drawn"
        )
    if "output_type" in accepted:
        arguments.setdefault("output_type", "pt")

    def run() -> int:
        noise = {"generator": torch.Generator().manual_seed(0)} if "generator" in accepted else {}
        return len(pipe(**{**noise, **arguments})[0])

    return run


@contextmanager
def _inside(pipe: Any, meter: Callable[[], float]) -> Iterator[list[float]]:
    """Collects by how much `meter` moves in every denoiser call of the block."""
    moved: list[float] = []
    began: list[float] = []

    def enter(*_: Any) -> None:
        began.append(meter())

    def leave(*_: Any) -> None:
        moved.append(meter() - began.pop())

    eager: Any = torch.compiler.disable  # a denoiser that was compiled in place would take the hooks into its graph
    nets = denoisers(pipe).values()
    handles = [net.register_forward_pre_hook(eager(enter)) for net in nets]
    handles += [net.register_forward_hook(eager(leave)) for net in nets]
    try:
        yield moved
    finally:
        for handle in handles:
            handle.remove()


def _split(pipe: Any, run: Callable[[], int], clock: Callable[[], float], runs: int) -> tuple[float, float]:
    """Seconds of a call inside the denoiser, and their share of that call: medians over `runs` calls."""

    def now() -> float:
        drain()
        return clock()

    seconds, shares = [], []
    with _inside(pipe, now) as spent:
        run()  # a compiled denoiser may be compiled anew, since it has hooks now
        for _ in range(runs):
            spent.clear()
            began = now()
            run()
            whole = now() - began
            seconds.append(sum(spent))
            shares.append(sum(spent) / whole)
    return median(seconds), median(shares)


def _described(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    return f"{processor()}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
