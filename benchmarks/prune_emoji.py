"""What pruning costs in pictures, on real weights: `emoji-sd` at 15, 30 and 50 % fewer MACs, by criterion.

    python benchmarks/prune_emoji.py [--num 128] [--out prune-emoji]

Every row makes the same pictures from the same noise: 20 DDIM steps of the pipeline's own scheduler, guidance 4.
Nothing is trained afterwards. The rows "n steps" are the control: the whole network with as many MACs, saved by fewer
steps. Captions of the calibration are not among those of the pictures. An interrupted run goes on where it stopped.
Times are of one call of the U-Net (two samples: guidance), all networks in turn, round after round; every time is
divided by that of the whole network in its round.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from PIL import Image

from diffaccel import eval as ev
from diffaccel import pruning, zoo
from diffaccel.cost import processor
from diffaccel.pictures import labelled_grid, save_picture, save_text

RESULTS = Path(__file__).parent / "results"
STEPS, GUIDANCE = 20, 4.0
TARGETS = (0.85, 0.7, 0.5)
WAYS = (  # criterion, budget, kinds
    ("random", "uniform", "width"),
    ("evenly_spaced", "uniform", "width"),
    ("magnitude", "uniform", "width"),
    ("magnitude", "knapsack", "width"),
    ("activation", "knapsack", "width"),
    ("flap", "knapsack", "width"),
    ("taylor", "uniform", "width"),
    ("taylor", "knapsack", "width"),
    ("evenly_spaced", "uniform", "depth"),
    ("taylor", "knapsack", "depth"),
    ("activation", "knapsack", "depth"),
    ("taylor", "knapsack", "both"),
    ("activation", "knapsack", "both"),
)
KINDS = {"width": pruning.WIDTH, "depth": pruning.DEPTH, "both": pruning.WIDTH + pruning.DEPTH}
SHOWN = ("taylor knapsack width", "taylor knapsack both", "activation knapsack both", "magnitude knapsack width")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=128, help="pictures of each row")
    parser.add_argument("--rounds", type=int, default=40, help="timed calls of each network")
    parser.add_argument("--ways", type=int, default=len(WAYS), help="only so many")
    parser.add_argument("--out", type=Path, default=Path("prune-emoji"))
    args = parser.parse_args()
    captions = ev.read_prompts("emoji")
    tested = [captions[2 * (i * (len(captions) // 2) // args.num)] for i in range(args.num)]  # even places
    calibrated = [captions[2 * (i * (len(captions) // 2) // 16) + 1].text for i in range(16)]  # odd ones
    pipe = zoo.load("emoji-sd")
    calls = pruning.record(pipe, calibrated, calls=32, steps=STEPS, guidance_scale=GUIDANCE, seed=10_000)
    call = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    subjects = {"whole": ev.Subject(partial(zoo.load, "emoji-sd"), call)}
    networks = {"whole": pipe.unet}
    sizes = {"whole": (1.0, 1.0)}
    for target in TARGETS:
        steps = round(target * STEPS)
        subjects[f"{steps} steps"] = ev.Subject(partial(zoo.load, "emoji-sd"), call | {"num_inference_steps": steps})
        for criterion, budget, kinds in WAYS[: args.ways]:
            name = f"{target} {criterion} {budget} {kinds}"
            choice = {"criterion": criterion, "budget": budget, "kinds": KINDS[kinds], "calibration": calls}
            try:
                pruned = pruning.prune(pipe, target, **choice)
            except ValueError as error:
                print(f"{name}: {error}")
                continue
            subjects[name] = ev.Subject(partial(with_unet, pruned.model), call)
            networks[name] = pruned.model
            sizes[name] = pruned.macs[1] / pruned.macs[0], pruned.parameters[1] / pruned.parameters[0]
    table = ev.compare(
        subjects,
        tested,
        args.out,
        extractors=[ev.emoji_clip()],
        reference="twemoji",
        measures=["fd", "clip", "clip_distance", "psnr", "latent_mse"],
        timing=None,
        title=f"emoji-sd pruned and not trained, {STEPS} DDIM steps, guidance {GUIDANCE:g}, {args.num} pictures",
    )
    if table is None:
        return
    times = time_shares(networks, args.rounds)
    lines = [
        "",
        f"Networks as shares of the whole one; time of a call: median of {args.rounds} rounds (20th, 80th percentile),",
    ]
    lines += [
        f"{torch.get_num_threads()} thread(s) of {processor()}:",
        "",
        "| row | MACs | parameters | time |",
        "|---|--:|--:|--:|",
    ]
    lines += [f"| {name} | {sizes[name][0]:.3f} | {sizes[name][1]:.3f} | {times[name]} |" for name in networks]
    text = ev.markdown(table) + "\n".join(lines) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    save_text(text, RESULTS / "prune_emoji.md")
    report = (args.out / "report.json").read_text(encoding="utf-8")
    save_text(report.replace(f"{args.out.resolve()}/", f"{args.out.name}/"), RESULTS / "prune_emoji.json")
    grid(args.out, list(subjects), RESULTS / "prune_emoji.png")


@torch.inference_mode()
def time_shares(networks: dict[str, Any], rounds: int) -> dict[str, str]:
    """Time of a call as a share of that of the whole network."""
    inputs = pruning.example_inputs(networks["whole"], batch=2, text_length=24)
    shares: dict[str, list[float]] = {name: [] for name in networks}
    for i in range(rounds + 2):
        seconds = {}
        for name, network in networks.items():
            begin = time.perf_counter()
            network(**inputs)
            seconds[name] = time.perf_counter() - begin
        if i >= 2:  # the first calls choose kernels and take memory
            for name in networks:
                shares[name].append(seconds[name] / seconds["whole"])
    cuts = {name: quantiles(values, n=10) for name, values in shares.items()}
    return {name: f"{cut[4]:.2f} ({cut[1]:.2f}, {cut[7]:.2f})" for name, cut in cuts.items()}


def with_unet(unet: Any) -> Any:
    """`emoji-sd` with another U-Net."""
    pipe = zoo.load("emoji-sd")
    pipe.unet = unet
    return pipe


def grid(out: Path, names: list[str], file: Path, columns: int = 10) -> None:
    """Rows of pictures: the whole network, fewer steps, some of the ways, at every target."""
    rows = ["whole"]
    for target in TARGETS:
        rows += [f"{round(target * STEPS)} steps", *(f"{target} {way}" for way in SHOWN)]
    rows = [name for name in rows if name in names]
    files = {name: sorted((out / "runs" / name.replace(" ", "-")).rglob("*.png")) for name in rows}
    count = len(files["whole"])
    places = [i * count // columns for i in range(min(columns, count))]
    pictures = [[Image.open(files[name][i]) for i in places] for name in rows]
    labels = [name.replace(" ", "\n", 1) for name in rows]
    save_picture(labelled_grid(pictures, labels, [""] * len(places), cell=64), file)


if __name__ == "__main__":
    main()
