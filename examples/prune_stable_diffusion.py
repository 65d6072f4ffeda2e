"""Prune a Stable Diffusion pipeline: choose, look, cut, measure, save, open again.

python examples/prune_stable_diffusion.py [--model FOLDER_OR_HUB_ID] [--prompts captions.txt] [--target 0.85]

Writes a picture grid and a pipeline's folder. `diffaccel prune` does the same in one command, with a report.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

import diffaccel  # noqa: F401  from_pretrained asks it for the shapes of pruned networks
from diffaccel import cost, pruning
from diffaccel.eval import read_prompts
from diffaccel.pictures import labelled_grid, save_picture
from diffaccel.pruning.report import losses
from diffaccel.sample import load_pipeline


def main() -> None:
    """Prune, and show what it did to pictures that the choice was not made on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-sd", help="a zoo name, a folder or a hub id with a U-Net")
    parser.add_argument("--prompts", default="emoji", help="file with a caption a line, like those it will be used for")
    parser.add_argument("--target", type=float, default=0.85, help="share of the MACs to keep (default: 0.85)")
    parser.add_argument("--preview", type=float, nargs="*", default=[0.7, 0.5], help="targets that are only looked at")
    parser.add_argument("--calls", type=int, default=32, help="calls of the U-Net to calibrate on (default: 32)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--output", type=Path, default=Path("pruned"), help="new folder; the grid is OUTPUT.png")
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"{args.output} exists; choose a new folder")

    pipe: Any = load_pipeline(args.model)
    captions = [prompt.text for prompt in read_prompts(args.prompts)]
    if len(captions) < 8:
        parser.error(f"{args.prompts} has {len(captions)} captions; give 8 or more, 4 of them are for the pictures")
    looked_at = captions[:: len(captions) // 4][:4]
    others = [caption for caption in captions if caption not in looked_at]
    guidance: Any = {"guidance_scale": args.guidance_scale}

    def pictures(pipe: Any) -> list:
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        return [
            pipe(caption, num_inference_steps=args.steps, generator=generator, **guidance).images[0]
            for caption, generator in zip(looked_at, generators, strict=True)
        ]

    # What the U-Net is given while pictures are made. Every prompt costs a picture, 8 of them are enough.
    prompts = others[:: max(1, len(others) // 8)][:8]
    calibration = pruning.record(pipe, prompts, calls=args.calls, steps=args.steps, **guidance)

    # Look first: a mask computes what the cut will compute, at the full cost, and is gone at the end of its block.
    rows, labels = [pictures(pipe)], ["full"]
    plans = {}
    for target in (args.target, *args.preview):
        proposal = pruning.propose(pipe, target, criterion="taylor", calibration=calibration)
        plans[target] = proposal.plan
        with pruning.mask(pipe.unet, proposal.plan):
            rows.append(pictures(pipe))
        labels.append(f"{target:.0%} of the MACs\nmasked")

    plan = plans[args.target]
    print("removed (stage, kind, units):")
    for loss in losses(pruning.find_groups(pipe.unet).found, plan):
        print(f"  {loss.stage:16} {loss.kind:10} {loss.removed} of {loss.units}")

    # Cut. `smaller` shares no memory with the original, which is freed when nothing refers to it any more.
    smaller = pruning.cut(pipe.unet, plan)
    networks, inputs = {"before": pipe.unet, "after": smaller}, pruning.example_inputs(pipe.unet)
    with torch.inference_mode():
        for name, network in networks.items():
            time = cost.latency(lambda network=network: network(**inputs), warmup=1, runs=5)
            macs = cost.macs(network, **inputs)
            size = cost.parameters(network)
            print(f"{name:6} {macs / 1e9:8.3f} GMACs {size / 1e6:8.2f} M parameters {1e3 * time.median:8.1f} ms a call")
    pipe.unet = smaller
    rows.append(pictures(pipe))
    labels.append(f"{args.target:.0%} of the MACs\ncut")

    # Keep it. Beside the config goes the plan: with it LoRAs of the original can be made to fit.
    pipe.save_pretrained(args.output)
    plan.save(args.output / "unet")
    again: Any = DiffusionPipeline.from_pretrained(args.output, dtype=pipe.dtype).to(pipe.device)
    same = [a.tobytes() == b.tobytes() for a, b in zip(pictures(again), rows[-1], strict=True)]
    save_picture(labelled_grid(rows, labels, [_short(caption) for caption in looked_at]), Path(f"{args.output}.png"))
    print(f"{args.output}: a {type(smaller).__name__}; opened again, {sum(same)} of 4 pictures are the same to the bit")
    print(f"{args.output}.png: look at it")


def _short(caption: str) -> str:
    words = caption.split(",")[0].split()
    return " ".join(words[:2]) + "\n" + " ".join(words[2:4])


if __name__ == "__main__":
    main()
