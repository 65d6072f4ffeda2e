"""Networks of full size through plan, cut, save and reload in bfloat16, outputs compared; all of Flux on shapes alone.

    python benchmarks/prune_full_size.py [--model sd15 sdxl pixart sd3 flux-2+4 flux]

Random weights, so that nothing is said about pictures. Every model runs in a process of its own, whose peak memory is
what the system tells of it. Depth and width are cut at once: all kinds of units, evenly spaced, 70 % of the MACs at the
real resolution are kept. Outputs are compared on small latents (`diffaccel.pruning.write.probe`): the cut network with
the masked original, and the network read from the disk with the one in memory. Written to
`benchmarks/results/prune_full_size.md`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from full_size import ARCHITECTURES, random_network, shapes

from diffaccel.cost import parameters, peak_memory
from diffaccel.pictures import save_text
from diffaccel.pruning import DEPTH, WIDTH, cut, example_inputs, propose, write_checkpoint
from diffaccel.pruning.checkpoint import Checkpoint
from diffaccel.pruning.prune import count_macs
from diffaccel.pruning.write import probe_masked

RESULTS = Path(__file__).parent / "results"
TARGET, DTYPE = 0.7, torch.bfloat16
ON_SHAPES = ("flux",)  # too large for this machine


def measure(name: str, folder: Path) -> dict[str, Any]:
    """One network, in this process."""
    begin = time.perf_counter()
    found: dict[str, Any] = {}
    with peak_memory() as peak:
        model: Any = shapes(name) if name in ON_SHAPES else random_network(name, DTYPE)
        before = parameters(model)
        inputs = example_inputs(model, device="meta")
        choice = {"criterion": "evenly_spaced", "budget": "uniform", "kinds": WIDTH + DEPTH}
        if name in ON_SHAPES:
            choice["kinds"] = ("block",)  # 12 billion parameters: what a stock config can say
        proposal = propose(model, TARGET, inputs=inputs, **choice)
        found |= {"macs": [count_macs(model, inputs)], "parameters": [before]}
        masked = None if name in ON_SHAPES else probe_masked(model, proposal.plan)
        smaller = cut(model, proposal.plan)
        del model
        found["macs"].append(count_macs(smaller, inputs))
        found["parameters"].append(parameters(smaller))
        found["class"] = type(smaller).__name__
        if masked is not None:
            checkpoint = Checkpoint(folder / "original", "", DTYPE, None, name)  # never written: there are no weights
            check = write_checkpoint(
                checkpoint, smaller, proposal.plan, folder / "out", masked=masked, max_shard_size="1GB"
            )
            found |= {
                "reload": check.reload,
                "mask": check.mask,
                "files": len(list((folder / "out").glob("*.safetensors"))),
            }
    return found | {"memory": peak.resident, "seconds": time.perf_counter() - begin}


def row(name: str, found: dict[str, Any]) -> str:
    macs, count = found["macs"], found["parameters"]
    compared = (
        f"{found['mask']:.1e} | {found['reload']:.1e} | {found['files']}" if "mask" in found else "shapes only | | "
    )
    memory = found["memory"] or 0
    sizes = f"{count[0] / 1e6:,.0f} -> {count[1] / 1e6:,.0f} M | {macs[0] / 1e9:,.0f} -> {macs[1] / 1e9:,.0f} G"
    weights = 2 * count[0] / 1e9
    cells = f"{found['class']} | {sizes} | {compared} | {weights:.1f} | {memory / 1e9:.1f} | {found['seconds']:.0f}"
    return f"| {ARCHITECTURES[name][0]} | {cells} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in ARCHITECTURES if name != "dit"]
    parser.add_argument("--model", nargs="+", choices=ARCHITECTURES, default=names)
    parser.add_argument("--alone", action="store_true", help="one model in this process; prints JSON")
    parser.add_argument("--out", type=Path, default=RESULTS / "prune_full_size.md")
    args = parser.parse_args()
    if args.alone:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(args.model[0], Path(folder))))
        return
    head = "| network | becomes | parameters | MACs | off masked | off disk | files | weights GB | peak memory GB | s |"
    lines = [
        "# Pruning networks of full size",
        "",
        "`python benchmarks/prune_full_size.py`: random weights, bfloat16, CPU.",
        "",
    ]
    lines += [
        f"Depth and width at once, evenly spaced, uniform, {TARGET:.0%} of the MACs kept; "
        "relative differences of outputs.",
        "",
    ]
    lines += [head, "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for name in args.model:
        command = [sys.executable, __file__, "--alone", "--model", name]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            print(run.stderr[-3000:])
            raise SystemExit(f"{name} failed")
        lines.append(row(name, json.loads(run.stdout.splitlines()[-1])))
        print(lines[-1], flush=True)
    save_text("\n".join(lines) + "\n", args.out)


if __name__ == "__main__":
    main()
