"""Early exit without training: where can a network leave early, and is it worth it?

python examples/early_exit.py [--model PIPELINE] [--prompts captions.txt] [--target 0.9 0.75 0.6] [--output early-exit]

Fits an affine map for every exit and noise level, prints what leaving there costs, chooses depths for each target, and
draws them beside the control: the whole network with as many MACs, saved by fewer steps. Into OUTPUT go
`exits.safetensors`, which `FittedExits.load` opens, and `pictures.png`. To train a network for its exits, see
`examples/train_early_exit.py`.
"""

import argparse
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

import diffaccel
from diffaccel.eval import read_prompts
from diffaccel.pictures import labelled_grid, save_picture
from diffaccel.sample import load_pipeline
from diffaccel.samplers.policy.exits import FittedExits


def main() -> None:
    """Fit, choose, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-sd", help="a zoo name, a folder or a hub id")
    parser.add_argument("--prompts", default="emoji", help="file with a caption a line, like those that will be drawn")
    parser.add_argument("--fit", type=int, default=16, help="captions to fit and to measure on (default: 16)")
    parser.add_argument("--parts", type=int, default=10, help="equal parts of the training time (default: 10)")
    parser.add_argument("--target", type=float, nargs="+", default=[0.9, 0.75, 0.6], help="shares of the MACs to keep")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--output", type=Path, default=Path("early-exit"), help="folder")
    args = parser.parse_args()
    captions = [prompt.text for prompt in read_prompts(args.prompts)]
    if args.fit < 2 or len(captions) < args.fit + 4:
        parser.error(f"--fit is 2 or more, and {args.prompts} has {len(captions)} captions: 4 of them are drawn")
    shown = captions[:: len(captions) // 4][:4]
    others = [caption for caption in captions if caption not in shown]
    args.output.mkdir(parents=True, exist_ok=True)

    pipe: Any = load_pipeline(args.model)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffaccel.scheduler("er_ode_1_corrected", pipe, schedule="beta", final="sigma_min")

    # Every other caption is drawn to fit the maps, the others to measure what leaving early costs.
    few = others[:: len(others) // args.fit][: args.fit]
    run: Any = {"steps": args.steps, "guidance_scale": args.guidance_scale}
    fitted = diffaccel.fit_exits(pipe, few, parts=args.parts, **run)
    fitted.save(args.output / "exits.safetensors")
    print(errors(fitted))

    def pictures(steps: int) -> list:
        draw: Any = [torch.Generator().manual_seed(seed) for seed in range(4)]
        return pipe(shown, num_inference_steps=steps, guidance_scale=args.guidance_scale, generator=draw).images

    rows = {"whole network": pictures(args.steps)}
    for target in args.target:
        schedule = fitted.schedule(target)
        with diffaccel.early_exit(pipe, schedule, maps=fitted.maps) as handle:
            drawn = pictures(args.steps)
        report = handle.report()
        share = report.macs / report.full
        rows[f"exits, {share:.0%} of the MACs\n{' '.join(map(str, schedule.depths))}"] = drawn
        print(f"target {target:.0%}: depths {schedule.depths} of {schedule.layers}; {share:.1%} of the MACs were spent")
        fewer = max(1, round(share * args.steps))
        rows[f"{fewer} steps, whole"] = pictures(fewer)  # what it has to beat
    columns = [shorten(caption.split(",")[0], 16, placeholder="...") for caption in shown]
    save_picture(labelled_grid(list(rows.values()), list(rows), columns), args.output / "pictures.png")
    print(f"{args.output / 'pictures.png'}: look at it")


def errors(fitted: FittedExits) -> str:
    """What each depth does to the end of the trajectory, by noise level, as a table."""
    depths = range(1, fitted.layers)
    lines = ["timesteps      " + "".join(f"{f'depth {depth}':>12}" for depth in depths)]
    size = 1000 / len(fitted.errors)
    for part, row in enumerate(fitted.errors):
        cells = "".join(f"{row[depth]:12.2e}" if depth in row else f"{'-':>12}" for depth in depths)
        lines.append(f"{part * size:4.0f} to {(part + 1) * size:4.0f}   {cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
