"""Search a sampler for a model: a few minutes on a few dozen prompts, and 5 network calls are fitted to it.

python examples/search.py [--model MODEL] [--method auto] [--steps 5] [--prompts captions.txt] [--output searched]

Writes the recipe, a picture of it (needs matplotlib), and a grid of held-out prompts: the converged reference, the
package's default and the recipe, from the same noise.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import Any

import torch

import diffaccel
from diffaccel.eval import read_prompts
from diffaccel.pictures import labelled_grid, save_picture
from diffaccel.sample import load_pipeline
from diffaccel.samplers.search import METHODS


def main() -> None:
    """Search, say what was measured, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-sd", help="a zoo name, a folder or a hub id")
    parser.add_argument("--method", choices=METHODS, default="auto")
    parser.add_argument("--steps", type=int, default=5, help="network calls (default: 5)")
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--prompts", default="emoji", help="file with a prompt a line (default: captions of emoji-sd)")
    parser.add_argument("--num", type=int, default=48, help="prompts to take, spread over all (default: 48)")
    parser.add_argument("--pairs", type=int, default=36, help="prompt and noise pairs to fit, at least (default: 36)")
    parser.add_argument("--reference-steps", type=int, default=100, help="calls of the reference (default: 100)")
    parser.add_argument("--output", type=Path, default=Path("searched"), help="folder")
    args = parser.parse_args()

    pipe: Any = load_pipeline(args.model)
    pipe.set_progress_bar_config(disable=True)
    texts = [prompt.text for prompt in read_prompts(args.prompts)]
    texts = texts[:: max(1, len(texts) // args.num)][: args.num]
    args.output.mkdir(parents=True, exist_ok=True)

    # This is the line. Every fourth prompt is held out, and judges.
    recipe = diffaccel.search(
        pipe,
        args.method,
        prompts=texts,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        pairs=args.pairs,
        reference_steps=args.reference_steps,
        cache=args.output / "cache",
    )

    entry = recipe.entries[0]
    for name in ("default", "start"):
        low, middle, high = entry.measured[name]["ratio"]
        sampler = entry.measured[name]["sampler"]
        print(f"{middle:.2f} ({low:.2f} to {high:.2f}) times the error of {sampler}, {entry.steps} calls ({name})")
    recipe.save(args.output / "recipe.json")
    written = [args.output / "recipe.json", args.output / "pictures.png"]
    if find_spec("matplotlib"):
        written.append(recipe.draw(args.output / "recipe.png", pipe))

    held_out = texts[3::4][:6]

    def drawn(steps: int) -> list:
        """Pictures of the held-out prompts, always from the same noise."""
        noise = [torch.Generator().manual_seed(seed) for seed in range(len(held_out))]
        return pipe(held_out, num_inference_steps=steps, guidance_scale=args.guidance_scale, generator=noise).images

    pipe.scheduler = diffaccel.scheduler("unipc", pipe, schedule="logsnr")
    rows = [drawn(args.reference_steps)]
    pipe.scheduler = diffaccel.scheduler("er_ode_1_corrected", pipe, schedule="beta", final="sigma_min")
    rows.append(drawn(entry.steps))
    handle = recipe.apply(pipe)  # pipe.scheduler = recipe.scheduler(pipe), and leaves out layers where the recipe does
    rows.append(drawn(entry.steps))
    if handle:
        handle.remove()
    labels = [f"{args.reference_steps} calls", f"{entry.steps} calls\ndefault", f"{entry.steps} calls\n{args.method}"]
    save_picture(labelled_grid(rows, labels, [fill(text.split(",")[0], 16) for text in held_out]), written[1])
    print(*written, sep="\n")


if __name__ == "__main__":
    main()
