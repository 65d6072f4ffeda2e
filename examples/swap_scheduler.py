"""Swap the scheduler of a pipeline: one line, and the picture of 50 steps in 8.

python examples/swap_scheduler.py [--model FOLDER_OR_HUB_ID] [--prompt "red heart, twemoji style"] [--steps 8]
"""

import argparse
from pathlib import Path
from typing import Any

import torch

import diffaccel
from diffaccel.pictures import labelled_grid, save_picture
from diffaccel.sample import load_pipeline


def main() -> None:
    """Draw the same noise three ways: many steps of the pipeline's own scheduler, few of it, few of ours."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji-sd", help="a zoo name, a folder or a hub id")
    parser.add_argument("--prompt", default="evergreen tree, twemoji style")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--output", type=Path, default=Path("swap_scheduler.png"))
    args = parser.parse_args()

    pipe: Any = load_pipeline(args.model)
    own = pipe.scheduler

    def pictures(steps: int) -> list:
        return [
            pipe(
                args.prompt,
                num_inference_steps=steps,
                guidance_scale=args.guidance_scale,
                generator=torch.Generator().manual_seed(seed),
            ).images[0]
            for seed in range(4)
        ]

    rows = [pictures(50), pictures(args.steps)]

    # This is the line.
    pipe.scheduler = diffaccel.DPMSolverScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    rows.append(pictures(args.steps))

    labels = [f"{type(own).__name__}\n50 steps", f"{type(own).__name__}\n{args.steps} steps"]
    labels.append(f"{type(pipe.scheduler).__name__}\n{args.steps} steps")
    save_picture(labelled_grid(rows, labels, [f"seed {i}" for i in range(4)]), args.output)
    print(args.output)


if __name__ == "__main__":
    main()
