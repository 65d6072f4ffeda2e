"""Arguments of `diffaccel prune`; nothing that is heavy is imported before the command runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DTYPES = ("float32", "float16", "bfloat16")
CRITERIA = ("magnitude", "random", "evenly_spaced", "taylor", "activation", "flap")
BUDGETS = ("uniform", "global", "knapsack")
COSTS = ("macs", "parameters", "latency")
EPILOG = """examples:
  diffaccel prune emoji-sd --target 0.85 --prompts captions.txt --output smaller
  diffaccel prune stable-diffusion-v1-5/stable-diffusion-v1-5 --target 0.7 --prompts captions.txt --dry-run
  diffaccel prune emoji-sd --target 0.7 --kinds layer,mid_block --prompts captions.txt --output stock
  diffaccel prune my-dit --target 0.7 --kinds depth --criterion evenly_spaced --output shorter
  diffaccel prune model.safetensors --config stable-diffusion-v1-5 --target 0.7 --output smaller
"""


def add_prune(commands: Any) -> None:
    """Add `prune` to the parser of `diffaccel`."""
    what = "cut a checkpoint into a smaller, faster one that from_pretrained opens"
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser("prune", help=what, description=what, epilog=EPILOG, formatter_class=raw)
    parser.add_argument(
        "checkpoint", help="a pipeline's or a model's folder, a hub id, emoji-sd, or a .safetensors file"
    )
    parser.add_argument("--target", type=float, required=True, help="share of the cost to keep, in (0, 1]: 0.7")
    parser.add_argument("--output", type=Path, help="folder to write; it appears whole or not at all")
    parser.add_argument("--dry-run", action="store_true", help="print what would be removed and saved; write nothing")

    choice = parser.add_argument_group("what to remove")
    kinds = "heads, neurons, channels (width); block, layer, transformer, resnet, mid_block (depth)"
    choice.add_argument("--kinds", default="width", help=f"width, depth, both, or a list of {kinds} (default: width)")
    named = "which units matter; the last three look at prompts (default: taylor with --prompts, else magnitude)"
    choice.add_argument("--criterion", choices=CRITERIA, help=named)
    shared = "how the removal is shared out (default: knapsack)"
    choice.add_argument("--budget", choices=BUDGETS, default="knapsack", help=shared)
    choice.add_argument("--cost", choices=COSTS, default="macs", help="latency is measured here (default: macs)")
    choice.add_argument("--seed", type=int, default=0, help="of random choices and of the calibration (default: 0)")

    looks = parser.add_argument_group("calibration")
    looks.add_argument("--prompts", type=Path, help="file with a prompt a line (DiT: a class number a line)")
    looks.add_argument("--calls", type=int, default=32, help="calls of the network to look at (default: 32)")
    looks.add_argument("--steps", type=int, default=20, help="steps of a trajectory (default: 20)")
    looks.add_argument("--guidance-scale", type=float, help="default: the pipeline's")

    place = parser.add_argument_group("checkpoint and device")
    place.add_argument("--component", help="denoiser to prune, if there are several (default: unet or transformer)")
    place.add_argument("--config", help="for a single file: folder of a pipeline or model of the same architecture")
    place.add_argument("--variant", help="of the weights' names, such as fp16")
    place.add_argument("--size", type=int, help="side of the latents that costs are for (default: the config's)")
    place.add_argument("--runs", type=int, default=3, help="timed calls before and after; 0: no times (default: 3)")
    place.add_argument("--device", help="cpu, cuda, mps (default: what there is)")
    place.add_argument(
        "--dtype", choices=DTYPES, help="to compute in (default: float32; off the CPU bfloat16 if stored so)"
    )
    place.add_argument("--max-shard-size", default="10GB", help="of a weights file (default: 10GB)")
    parser.set_defaults(run=_prune)


def _prune(args: argparse.Namespace) -> None:
    from diffaccel.pruning.command import run_prune

    print(run_prune(args))
