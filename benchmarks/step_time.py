"""Host time of set_timesteps() and step(): ours beside the Diffusers scheduler that each replaces, in one run.

`python benchmarks/step_time.py` writes results/step_time.md, in about half a minute on one core of a quiet machine.

Eager, on the CPU and on one thread, without a network. Repetitions of the two sides alternate, so that both see the
same machine.
"""

from __future__ import annotations

import argparse
import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import diffaccel
from diffaccel.cost import processor
from diffaccel.pictures import save_text

HERE = Path(__file__).parent
SIZES = {"1x4x8x8": (1, 4, 8, 8), "2x4x64x64": (2, 4, 64, 64)}
VP = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"num_train_timesteps": 1000, "shift": 3.0}
STEPS = 20
STEADY = slice(6, -4)  # the first and last steps of a run are of lower order
# Name, ours, theirs, and the config keys of both.
PAIRS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("DDIM", "DDIMSolverScheduler", "DDIMScheduler", VP | {"clip_sample": False}),
    ("DPM++ 2M", "DPMSolverScheduler", "DPMSolverMultistepScheduler", VP),
    ("DPM++ 3M", "DPMSolverScheduler", "DPMSolverMultistepScheduler", VP | {"solver_order": 3}),
    ("DPM++ 2M SDE", "DPMSolverScheduler", "DPMSolverMultistepScheduler", VP | {"algorithm_type": "sde-dpmsolver++"}),
    ("DPM++ 2S", "DPMSinglestepScheduler", "DPMSolverSinglestepScheduler", VP),
    ("UniPC 2", "UniPCScheduler", "UniPCMultistepScheduler", VP),
    ("UniPC 3", "UniPCScheduler", "UniPCMultistepScheduler", VP | {"solver_order": 3}),
    ("DEIS", "DEISScheduler", "DEISMultistepScheduler", VP),
    ("Heun", "HeunScheduler", "HeunDiscreteScheduler", VP),
    ("Euler ancestral", "EulerAncestralScheduler", "EulerAncestralDiscreteScheduler", VP),
    ("LMS", "LMSScheduler", "LMSDiscreteScheduler", VP),
    ("DPM2", "dpm_2s", "KDPM2DiscreteScheduler", VP),
    ("SA-Solver", "SAScheduler", "SASolverScheduler", VP),
    ("Euler, flow", "FlowEulerScheduler", "FlowMatchEulerDiscreteScheduler", FLOW),
)
TWO_CALLS = ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler")  # whose n steps are 2n - 1 calls


@dataclass
class Side:
    """One scheduler, and its times in microseconds, one for each run: of set_timesteps(), and that of a step()."""

    scheduler: Any
    steps: int
    set_timesteps: list[float]
    step: list[float]

    def repeat(self, sample: Tensor, outputs: Sequence[Tensor]) -> None:
        """One run, timed."""
        began = time.perf_counter()
        self.scheduler.set_timesteps(self.steps)
        self.set_timesteps.append(1e6 * (time.perf_counter() - began))
        times = []
        for x, t, output, step in calls(self.scheduler, sample, outputs):
            began = time.perf_counter()
            step(output, t, x)
            times.append(1e6 * (time.perf_counter() - began))
        steady = np.array(times[STEADY])
        # Neighbours together, since the two calls of a Heun step differ.
        self.step.append(float(np.median((steady[:-1] + steady[1:]) / 2)))


class Ops(TorchDispatchMode):
    """Counts the aten operators that are called."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def main(argv: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--only", nargs="+", default=[name for name, *_ in PAIRS], help="names of the first column")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    ops, setting, tables = {}, {}, {}
    for size, shape in SIZES.items():
        tables[size] = {}
        for name, own, theirs, config in PAIRS:
            if name in args.only:
                sides = measured(*make(own, theirs, config), shape, args.repetitions)
                tables[size][name] = [side.step for side in sides]
                setting.setdefault(name, [side.set_timesteps for side in sides])
                ops.setdefault(name, [count(side, shape) for side in sides])
    text = report(tables, setting, ops, args.repetitions)
    save_text(text, args.output / "step_time.md")
    print(text)
    return text


def make(ours: str, theirs: str, config: dict[str, Any]) -> tuple[Side, Side]:
    """Our and their scheduler for one config, with settings for about `STEPS` network calls."""
    stock = getattr(diffusers, theirs)(**config)
    own = getattr(diffaccel, ours, None)
    same = own.from_config(stock.config) if own else diffaccel.scheduler(ours, stock.config)
    return Side(same, STEPS, [], []), Side(stock, STEPS // 2 if theirs in TWO_CALLS else STEPS, [], [])


def measured(ours: Side, theirs: Side, shape: Sequence[int], repetitions: int) -> tuple[Side, Side]:
    """Both sides in turn, after three runs that are not counted."""
    generator = torch.Generator().manual_seed(0)
    sample, *outputs = (torch.randn(*shape, generator=generator) for _ in range(STEPS + 1))
    for i in range(-3, repetitions):
        for side in (ours, theirs) if i % 2 else (theirs, ours):
            side.repeat(sample, outputs)
        if i < 0:
            for side in (ours, theirs):
                side.set_timesteps.clear()
                side.step.clear()
    return ours, theirs


def calls(scheduler: Any, sample: Tensor, outputs: Sequence[Tensor]) -> Iterator[Any]:
    """(sample, timestep, model output, what makes the step) of every call of a run, as a pipeline makes them."""
    generator = torch.Generator().manual_seed(0)
    noisy = {"generator": generator} if "generator" in signature(scheduler.step).parameters else {}
    result = [sample * float(getattr(scheduler, "init_noise_sigma", 1.0))]

    def step(output: Tensor, t: Tensor, x: Tensor) -> None:
        result[0] = scheduler.step(output, t, x, return_dict=False, **noisy)[0]

    for t, output in zip(scheduler.timesteps, outputs, strict=False):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(result[0], t)
        yield result[0], t, output, step


def count(side: Side, shape: Sequence[int]) -> float:
    """Mean number of operators of a steady step."""
    generator, counts = torch.Generator().manual_seed(0), []
    sample, *outputs = (torch.randn(*shape, generator=generator) for _ in range(STEPS + 1))
    side.scheduler.set_timesteps(side.steps)
    for x, t, output, step in calls(side.scheduler, sample, outputs):
        with Ops() as ops:
            step(output, t, x)
        counts.append(ops.count)
    return float(np.mean(counts[STEADY]))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Median of the ratios of neighbouring repetitions, with the range of the middle 80 %."""
    low, middle, high = np.percentile(np.divide(ours, theirs), [10, 50, 90])
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def report(
    tables: dict[str, dict[str, list[list[float]]]],
    setting: dict[str, list[list[float]]],
    ops: dict[str, list[float]],
    repetitions: int,
) -> str:
    """The tables as Markdown."""

    def cells(pair: list[list[float]], digits: int, unit: float = 1.0) -> list[str]:
        ours, theirs = (f"{np.median(side) / unit:.{digits}f}" for side in pair)
        return [theirs, ours, ratio(*pair)]

    sizes = [f"{size}: {word}" for size in tables for word in ("theirs", "ours", "ours / theirs")]
    steps = [[name, *(cell for table in tables.values() for cell in cells(table[name], 0))] for name in ops]
    for line in steps:
        line += [f"{n:.1f}".removesuffix(".0") for n in reversed(ops[line[0]])]
    starts = [[name, *cells(setting[name], 2, unit=1000)] for name in ops]
    packages = ", ".join(f"{p} {version(p)}" for p in ("diffaccel", "torch", "diffusers"))
    return f"""# Host time of a step

- One thread of {processor()}, eager, float32, without a network. {packages},
  Python {platform.python_version()}.
- Runs of {STEPS} network calls, {repetitions} of each side in turn. The time of a step is the median over a run's
  steady steps (not the first 6 or last 4; two neighbours together, since those of Heun differ), and the table has its
  median over runs. Ratio: median over runs of ours / theirs, run by run, with the range of the middle 80 %.
- Both sides have one config, and a step is one network call on both. What is run under one name may differ
  (docs/parity.md).
- `scale_model_input()`, which divides the sample in Diffusers' Heun, Euler ancestral, LMS and DPM2 and returns it as it
  is in ours, is not in the time of a step.
- Ours looks for NaN in every model output on the CPU, predicts x0 in every step, and plans a run in `set_timesteps()`:
  what that costs is in these numbers.

## step(), microseconds

{_table(["", *sizes, "operators: theirs", "ours"], steps)}

Operators: those of aten that one steady step calls, noise and the look for NaN included.

## set_timesteps({STEPS}), milliseconds

{_table(["", "theirs", "ours", "ours / theirs"], starts)}

Once a picture. For comparison: one network call of `emoji-sd`, a far smaller pipeline than any in use, takes some 20 ms
on such a core.
"""


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


if __name__ == "__main__":
    main()
