"""Is a pruned network as much faster as it is smaller? Wall clock against MACs, full-size shapes, random weights.

    python benchmarks/prune_speed.py --model sd15 dit --rounds 5

Whole and cut network take turns in one process; every call of a cut network is divided by the call of the whole one
before it. Written to `benchmarks/results/prune_speed.md`. What is cut is random
(`criterion="random"`): with random weights there is nothing to choose by, and speed depends on shapes alone.
"""

from __future__ import annotations

import argparse
import time
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from full_size import ARCHITECTURES, random_network

from diffaccel.cost import parameters, processor
from diffaccel.pictures import save_text
from diffaccel.pruning import DEPTH, WIDTH, example_inputs, prune

RESULTS = Path(__file__).parent / "results"
MODELS = {"sd15": "64x64 latents", "dit": "32x32 latents"}
WAYS = {"width": WIDTH, "depth": DEPTH, "both": WIDTH + DEPTH}
TARGETS = (0.7, 0.5)


@torch.inference_mode()
def seconds(model: Any, inputs: dict[str, Any]) -> float:
    begin = time.perf_counter()
    model(**inputs)
    return time.perf_counter() - begin


def measure(name: str, rounds: int) -> list[str]:
    """Lines of the table of one network; one cut at a time is in memory."""
    whole = random_network(name)
    inputs = example_inputs(whole)
    rows, base = [], []
    for (way, kinds), target in product(WAYS.items(), TARGETS):
        try:
            cut = prune(whole, target, criterion="random", kinds=kinds)
        except ValueError as error:
            print(f"{name}, {way}, {target}: {error}")
            continue
        for network in (cut.model, whole):  # kernels are chosen and memory is taken in the first call
            seconds(network, inputs)
        ratios = []
        for _ in range(rounds):
            base.append(seconds(whole, inputs))
            ratios.append(seconds(cut.model, inputs) / base[-1])
        share, macs, size = median(ratios), cut.macs[1] / cut.macs[0], cut.parameters[1] / cut.parameters[0]
        spread = f"{min(ratios):.3f}, {max(ratios):.3f}"
        rows.append(f"| {way} | {target} | {size:.3f} | {macs:.3f} | {share:.3f} | {spread} | {share / macs:.2f} |")
        print(name, rows[-1], flush=True)
    head = ["| cut | target | parameters | MACs | time | min, max | time / MACs |", "|---|--:|--:|--:|--:|--:|--:|"]
    about = f"{parameters(whole) / 1e6:.0f} M parameters, {median(base):.2f} s a call."
    return [f"## {ARCHITECTURES[name][0]}, {MODELS[name]}, batch 1", "", about, "", *head, *rows, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "prune_speed.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = ["# Pruned networks: time against MACs", ""]
    lines += [
        f"`python benchmarks/prune_speed.py`: shares of the whole network, median of {args.rounds} rounds in one run, "
    ]
    lines += [
        f"{args.threads} threads of {processor()}, float32, torch {torch.__version__}. "
        "Random weights, random scores, knapsack.",
        "",
    ]
    for name in args.model:
        lines += measure(name, args.rounds)
    save_text("\n".join(lines), args.out)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
