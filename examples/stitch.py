"""T-Stitch: a small network draws the first steps, the large one the rest.

python examples/stitch.py [--model PIPELINE] [--small PIPELINE_OR_NETWORK] [--fraction 0.4] [--prompt "red heart"]

Attaches the small network, says what a picture costs, and takes it off again; then draws the same pictures with more
and more small steps into a folder: a grid, a table, a plot (the plot needs matplotlib).
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

import diffaccel
from diffaccel import pruning
from diffaccel.sample import load_pipeline

PROMPTS = ("evergreen tree, twemoji style", "red heart, twemoji style", "crying face, twemoji style")


def main() -> None:
    """Stitch, report, remove; then look at several fractions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-sd", help="pipeline of the large network: zoo name, folder, hub id")
    parser.add_argument("--small", default="emoji-sd-small", help="a pipeline, or a network alone: likewise")
    parser.add_argument("--fraction", type=float, default=0.4, help="share of the steps for SMALL (default: 0.4)")
    parser.add_argument("--fractions", type=float, nargs="*", default=[0.2, 0.4, 0.6, 0.8, 1.0], help="to look at")
    parser.add_argument("--prompt", nargs="+", default=list(PROMPTS), help="one or more")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--own-scheduler", action="store_true", help="of MODEL, instead of our few-step solver")
    parser.add_argument("--output", type=Path, default=Path("stitched"), help="folder")
    args = parser.parse_args()
    run: Any = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}

    pipe: Any = load_pipeline(args.model)
    pipe.set_progress_bar_config(disable=True)
    if not args.own_scheduler:
        pipe.scheduler = diffaccel.scheduler("er_ode_1_corrected", pipe, schedule="beta", final="sigma_min")
    small = load_small(args.small, pipe.dtype)

    def picture() -> np.ndarray:
        drawn = pipe(args.prompt[0], generator=torch.Generator().manual_seed(0), **run).images[0]
        return np.array(drawn, int)

    whole = picture()

    # This is the line. Without `fraction` it is 0.4.
    handle = diffaccel.stitch(pipe, small, fraction=args.fraction)
    stitched = picture()
    print(handle.report())
    handle.remove()
    print(f"stitched, the picture changes by {np.abs(stitched - whole).mean():.1f} of 255 on average,", end=" ")
    print(f"after handle.remove() by {np.abs(picture() - whole).max()}")

    frontier = diffaccel.stitch_frontier(pipe, small, args.prompt, fractions=(0.0, *args.fractions), **run)
    print(frontier.markdown())
    print(*frontier.save(args.output), sep="\n")


def load_small(name: str, dtype: torch.dtype) -> Any:
    """A pipeline where there is one: then its noise schedule and text encoder are compared with the large one's."""
    checkpoint = pruning.open_checkpoint(name)
    return checkpoint.load_pipeline(dtype=dtype) if checkpoint.component else checkpoint.load(dtype)


if __name__ == "__main__":
    main()
