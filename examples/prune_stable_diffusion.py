"""Prune a Stable Diffusion pipeline: choose, look, cut, measure, save, open again.

python examples/prune_stable_diffusion.py [--model FOLDER_OR_HUB_ID] [--prompts captions.txt] [--target 0.85]

Writes a pipeline's folder and, beside it, a grid of pictures. `diffaccel prune` does the same with a report in place of
the grid.
"""

import argparse
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

import diffaccel  # noqa: F401  from_pretrained asks it for the shapes of pruned networks
from diffaccel import cost, pruning
from diffaccel.eval import read_prompts
from diffaccel.pictures import labelled_grid, save_picture
from diffaccel.sample import best_device


def main() -> None:
    """Prune, and show what it did to pictures that the choice was not made on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-sd", help="a zoo name, a folder or a hub id, with a U-Net")
    parser.add_argument("--prompts", default="emoji", help="file with a caption a line, like those that will be drawn")
    parser.add_argument("--target", type=float, default=0.85, help="share of the MACs to keep (default: 0.85)")
    parser.add_argument("--preview", type=float, nargs="*", default=[0.5, 0.7], help="targets that are only looked at")
    parser.add_argument("--calls", type=int, default=32, help="calls of the U-Net to calibrate on (default: 32)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--output", type=Path, default=Path("pruned"), help="new folder; the grid is OUTPUT.png")
    args = parser.parse_args()
    captions = [prompt.text for prompt in read_prompts(args.prompts)]
    if len(captions) < 8:
        parser.error(f"{args.prompts} has {len(captions)} captions; give 8 or more, 4 of them are for the pictures")
    if args.output.exists():
        parser.error(f"{args.output} exists; choose a new folder")
    shown = captions[:: len(captions) // 4][:4]
    others = [caption for caption in captions if caption not in shown]
    run: Any = {"guidance_scale": args.guidance_scale}

    # In float32, in which gradients neither overflow nor vanish. It is saved in the type that it came in.
    checkpoint = pruning.open_checkpoint(args.model)
    pipe = checkpoint.load_pipeline(dtype=torch.float32).to(best_device())

    def pictures(pipe: Any) -> list:
        pipe.set_progress_bar_config(disable=True)
        draw: Any = [torch.Generator().manual_seed(seed) for seed in range(4)]
        return [
            pipe(c, num_inference_steps=args.steps, generator=g, **run).images[0]
            for c, g in zip(shown, draw, strict=True)
        ]

    # What the U-Net is given while pictures are made. Every prompt costs a picture; 8 of them are enough.
    calibration = pruning.record(pipe, others[:: len(others) // 8 or 1][:8], calls=args.calls, steps=args.steps, **run)
    groups = pruning.find_groups(pipe.unet)
    scores = pruning.score("taylor", pipe.unet, groups.of(*pruning.WIDTH), calibration)  # they serve all targets

    # Look first: a mask computes what the cut will compute, at the full cost, and is gone at the end of its block.
    rows = {"full": pictures(pipe)}
    for target in (*args.preview, args.target):
        plan = pruning.propose(pipe, target, criterion="taylor", calibration=calibration, scores=scores).plan
        with pruning.mask(pipe.unet, plan):
            rows[f"{target:.0%} of the MACs, masked"] = pictures(pipe)

    print(f"removed for {args.target:.0%}, by stage:")
    for loss in pruning.losses(groups.found, plan):
        print(f"  {loss.stage:16} {loss.removed:5} of {loss.units:5} {loss.kind}")

    # Cut: a new network, that shares no memory with the old one.
    measure("before", pipe.unet)
    pipe.unet = pruning.cut(pipe.unet, plan)
    measure("after", pipe.unet)
    rows[f"{args.target:.0%} of the MACs, cut"] = drawn = pictures(pipe)

    # Keep it, with the plan beside the U-Net's config: by it LoRAs of the original can be made to fit (`remap_lora`).
    pruning.write_checkpoint(checkpoint, pipe.unet, plan, args.output)
    again = DiffusionPipeline.from_pretrained(args.output, dtype=torch.float32).to(pipe.device)
    off = max(np.abs(np.array(a, int) - np.array(b, int)).max() for a, b in zip(pictures(again), drawn, strict=True))
    labels = [label.replace(", ", "\n") for label in rows]
    columns = [shorten(caption.split(",")[0], 16, placeholder="...") for caption in shown]
    save_picture(labelled_grid(list(rows.values()), labels, columns), Path(f"{args.output}.png"))
    print(f"{args.output}: opened again as {type(again.unet).__name__}, its pictures differ by {off} of 255 at most")
    print(f"{args.output}.png: look at it")


@torch.inference_mode()
def measure(name: str, network: Any) -> None:
    """Print what one call with one sample costs."""
    inputs = pruning.example_inputs(network)
    macs, size = cost.macs(network, **inputs), cost.parameters(network)
    time = cost.latency(lambda: network(**inputs), warmup=1, runs=5).median
    print(f"{name:6} {macs / 1e9:8.3f} GMACs {size / 1e6:8.2f} M parameters {1e3 * time:8.1f} ms")


if __name__ == "__main__":
    main()
