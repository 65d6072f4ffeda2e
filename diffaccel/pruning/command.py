"""`diffaccel prune`: open, calibrate, choose, cut, compare, write, report."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor, nn

from diffaccel.cost import latency, parameters, peak_memory, processor
from diffaccel.meta import meta_copy
from diffaccel.pruning.calibration import Calibration, Prompt, random_calls, record
from diffaccel.pruning.checkpoint import Checkpoint, open_checkpoint
from diffaccel.pruning.costs import layer_table, macs_costs
from diffaccel.pruning.criteria import CALIBRATED
from diffaccel.pruning.families import stock_class
from diffaccel.pruning.find import find_groups
from diffaccel.pruning.groups import DEPTH, WIDTH
from diffaccel.pruning.inputs import example_inputs
from diffaccel.pruning.picture import draw
from diffaccel.pruning.plan import PruningPlan
from diffaccel.pruning.prune import Proposal, count_macs, propose
from diffaccel.pruning.report import Report, losses, markdown, write_report
from diffaccel.pruning.surgery import cut
from diffaccel.pruning.write import Check, check_output, probe_masked, write_checkpoint
from diffaccel.sample import best_device

logger = logging.get_logger(__name__)
KINDS = {"width": WIDTH, "depth": DEPTH, "both": WIDTH + DEPTH}


def run_prune(args: argparse.Namespace) -> str:
    """Do what the command line says; what is to be printed at the end.

    Raises:
        ValueError: for bad input, in one sentence.
        OSError: if the output cannot be written; then nothing is there.
    """
    if args.runs < 0:
        raise ValueError(f"--runs must be 0 (no times) or more, not {args.runs}")
    output: Path | None = args.output
    if output is not None:
        check_output(output)
    elif not args.dry_run:
        raise ValueError("say where to write: --output DIR, or --dry-run to write nothing")
    with tempfile.TemporaryDirectory() as scratch, peak_memory() as peak:
        places = {"config": args.config, "component": args.component, "variant": args.variant}
        checkpoint = open_checkpoint(args.checkpoint, Path(scratch), **places)
        if output is not None:
            check_output(output, checkpoint.folder)
        job = _Job(args, checkpoint)
        if args.dry_run or output is None:
            return markdown(job.report())
        check = job.write(output)
    memory = [f"{size / 1e9:.1f} GB of {at}" for at, size in _memory(peak).items()]
    opens = "stock Diffusers opens it" if check.stock else "it opens once diffaccel is imported"
    took = f"; the pruning took at most {', '.join(memory)}" if memory else ""
    return f"{args.output}: {job.summary()}; {opens}; see pruning_report.md and pruning.png there{took}"


def _memory(peak: Any) -> dict[str, int]:
    places = {"GPU memory": peak.allocated, "Metal memory": peak.driver, "main memory": peak.resident}
    return {name: size for name, size in places.items() if size}


class _Job:
    """A pruning under way: the network is held until it is cut, what the report needs is taken before."""

    def __init__(self, args: argparse.Namespace, checkpoint: Checkpoint):
        self.args, self.checkpoint = args, checkpoint
        device = _device(args.device)
        # Not float16: gradients overflow in it, and vanish.
        wide = device == "cpu" or checkpoint.dtype == torch.float16
        dtype = getattr(torch, args.dtype) if args.dtype else (torch.float32 if wide else checkpoint.dtype)
        model: Any = checkpoint.load(dtype).to(device)
        self.model: nn.Module | None = model
        self.inputs = example_inputs(model, size=args.size)
        self.proposal = _proposed(args, checkpoint, model, self.inputs, dtype)
        self.groups = find_groups(model).found
        self.picture = draw(model, self.plan, macs_costs(model, list(self.groups.values()), self.inputs))
        self.layers = layer_table(model, self.inputs)
        bare = meta_copy(model)
        smaller = cut(bare, self.plan)
        self.macs = count_macs(bare, self.inputs), count_macs(smaller, self.inputs)
        self.parameters = parameters(bare), parameters(smaller)
        self.stock = not hasattr(type(smaller), "stock")
        self.latency: tuple[float, float] | None = None
        self.rounded = torch.promote_types(dtype, checkpoint.dtype) != dtype
        where = processor() if device == "cpu" else f"{device}"
        self.where = f"{where}, {torch.get_num_threads()} threads, {str(dtype).removeprefix('torch.')}, batch 1"

    @property
    def plan(self) -> PruningPlan:
        return self.proposal.plan

    def _time(self, smaller: nn.Module) -> tuple[float, float]:
        """Median seconds of a call before and after; the networks take turns, so that a busy machine slows both."""
        seconds: dict[nn.Module, list[float]] = {network: [] for network in (self.model, smaller) if network}
        with torch.inference_mode():
            for turn in range(self.args.runs + 1):
                for network, times in seconds.items():
                    once = latency(lambda network=network: network(**self.inputs), warmup=0, runs=1).median
                    times += [once] if turn else []  # the first call chooses kernels and takes memory
        before, after = (median(times) for times in seconds.values())
        return before, after

    def _cut(self) -> tuple[Tensor, nn.Module]:
        """What the smaller network has to return, and that network."""
        assert self.model is not None
        masked = probe_masked(self.model, self.plan, self.proposal.fill)
        smaller = cut(self.model, self.plan, self.proposal.fill)
        if self.args.runs and self.latency is None:
            self.latency = self._time(smaller)
        self.model = None
        return masked, smaller

    def write(self, output: Path) -> Check:
        """Cut and write; the original is given back before the result is read again."""
        masked, smaller = self._cut()
        if self.rounded:  # computed in a narrower type than is stored: what is written comes from the stored weights
            del smaller
            self.model = self.checkpoint.load()
            masked, smaller = self._cut()

        def report(folder: Path, check: Check) -> None:
            write_report(folder, self.report(output, check), self.picture, self.layers)

        shards = {"max_shard_size": self.args.max_shard_size}
        return write_checkpoint(self.checkpoint, smaller, self.plan, output, masked=masked, extra=report, **shards)

    def report(self, output: Path | None = None, check: Check | None = None) -> Report:
        """What is known so far."""
        width = self.checkpoint.dtype.itemsize
        found: dict[str, Any] = {"stock": self.stock}
        found |= {} if check is None else {"reload": check.reload, "mask": check.mask}
        return Report(
            source=self.checkpoint.source,
            model=self.plan.model,
            facts=self.plan.facts,
            losses=losses(self.groups, self.plan),
            macs=self.macs,
            parameters=self.parameters,
            size=(self.parameters[0] * width, self.parameters[1] * width),
            folder="" if output is None else str(output),
            component=self.checkpoint.component,
            variant=self.checkpoint.variant or "",
            dtype=str(self.checkpoint.dtype).removeprefix("torch."),
            latency=self.latency,
            where=self.where,
            **found,
        )

    def summary(self) -> str:
        """One line."""
        parts = [
            f"{self.macs[1] / self.macs[0]:.1%} of the MACs",
            f"{self.parameters[1] / self.parameters[0]:.1%} of the parameters",
        ]
        if self.latency:
            parts.append(f"{self.latency[1] / self.latency[0]:.1%} of the time a call ({self.where})")
        return ", ".join(parts)


def _proposed(
    args: argparse.Namespace, checkpoint: Checkpoint, model: nn.Module, inputs: dict[str, Any], dtype: torch.dtype
) -> Proposal:
    criterion = args.criterion or ("taylor" if args.prompts else "magnitude")
    if args.prompts and criterion not in CALIBRATED:
        raise ValueError(f"{criterion} looks at no prompts; leave --prompts out, or choose {', '.join(CALIBRATED)}")
    calibration = _calibration(args, checkpoint, model, dtype) if criterion in CALIBRATED else None
    facts: dict[str, Any] = {"checkpoint": checkpoint.source, "seed": args.seed}
    if calibration and checkpoint.component:
        guidance = "the pipeline's" if args.guidance_scale is None else args.guidance_scale
        facts |= {"prompts": args.prompts.name if args.prompts else "none", "steps": args.steps, "guidance": guidance}
    return propose(
        model,
        args.target,
        criterion=criterion,
        budget=args.budget,
        cost=args.cost,
        kinds=KINDS.get(args.kinds) or [kind.strip() for kind in args.kinds.split(",")],
        calibration=calibration,
        inputs=inputs,
        seed=args.seed,
        facts=facts,
    )


def _calibration(args: argparse.Namespace, checkpoint: Checkpoint, model: nn.Module, dtype: torch.dtype) -> Calibration:
    if args.prompts is None and checkpoint.component and not _unconditional(model):
        raise ValueError(f"{args.criterion} looks at pictures in the making; give --prompts FILE, with a prompt a line")
    if not checkpoint.component:
        if args.prompts:
            raise ValueError(
                f"{checkpoint.source} is a single network and reads no prompts; name the pipeline's folder"
            )
        logger.warning("a single network: it is calibrated on random inputs, which it has never seen")
        return random_calls(model, args.calls, seed=args.seed, size=args.size)
    if args.prompts and _unconditional(model):
        raise ValueError(f"{checkpoint.source} draws without prompts; leave --prompts out")
    prompts = read_prompts(args.prompts, _classes(model)) if args.prompts else [{}] * args.calls
    pipe = checkpoint.load_pipeline(model, dtype).to(next(model.parameters()).device)
    guidance = {} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}
    return record(pipe, prompts, calls=args.calls, steps=args.steps, seed=args.seed, **guidance)


def _classes(model: Any) -> int:
    """Number of classes that a DiT draws; PixArt has it in its config as well and reads texts."""
    return model.config.num_embeds_ada_norm if stock_class(model).__name__ == "DiTTransformer2DModel" else 0


def _unconditional(model: nn.Module) -> bool:
    return stock_class(model).__name__ == "UNet2DModel"


def _device(name: str | None) -> str:
    """The device that was asked for, or what there is.

    Raises:
        ValueError: if it is not here.
    """
    device = name or best_device()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"there is no device {device} here; use --device {best_device()}") from None
    return device


def read_prompts(file: Path, classes: int = 0) -> list[Prompt]:
    """Lines of a text file that are not empty; numbers below `classes`, if there are classes.

    Raises:
        ValueError: if there is no such file, it has no prompts, or a class is no such number.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read prompts from {file}: {error}") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"{file} has no prompts; write one a line")
    if not classes:
        return list(prompts)
    if wrong := [line for line in prompts if not (line.isdecimal() and int(line) < classes)]:
        raise ValueError(f"{file} needs a class a line, a number from 0 to {classes - 1}, not {wrong[0]!r}")
    return [int(line) for line in prompts]
