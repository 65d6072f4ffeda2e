"""What stitching and leaving early save on networks of full size: multiply-accumulates against wall clock.

    python benchmarks/policies_full_size.py [--rounds 5] [--threads 2]

Random weights: speed depends on shapes alone. Every network and view takes turns with the whole one in one process; a
time is divided by that of the whole network's call before it. The MACs are counted on the `meta` device. A trajectory's
share follows: 40 % of the steps at share s cost 0.6 + 0.4 s. Last, what the hook itself costs, on a toy network.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel
from full_size import ARCHITECTURES, random_network

from diffaccel.cost import parameters, processor
from diffaccel.pictures import save_text
from diffaccel.pruning import example_inputs
from diffaccel.pruning.prune import count_macs
from diffaccel.samplers.policy import attach
from diffaccel.samplers.policy.exits import LinearExit, layers, shallow
from diffaccel.samplers.policy.exits.depth import exits_of
from diffaccel.samplers.policy.exits.tap import listening
from diffaccel.samplers.policy.stitch import Stitch

RESULTS = Path(__file__).parent / "results"
BK_SDM_TINY = {  # arXiv:2305.15798: one layer a stage, no innermost stage, no middle; 323 M parameters
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 1,
    "mid_block_type": None,
    "sample_size": 64,
    "cross_attention_dim": 768,
}
SMALLER: dict[str, dict[str, tuple[type, dict[str, Any]]]] = {
    "sd15": {"BK-SDM-Tiny": (UNet2DConditionModel, BK_SDM_TINY)},
    "dit": {
        "DiT-B/2": (DiTTransformer2DModel, {"num_attention_heads": 12, "attention_head_dim": 64, "num_layers": 12}),
        "DiT-S/2": (DiTTransformer2DModel, {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 12}),
    },
}
DEPTHS = {"sd15": (1, 2, 3), "dit": (7, 14, 21)}


@torch.inference_mode()
def seconds(network: Any, inputs: dict[str, Any]) -> float:
    begin = time.perf_counter()
    network(**inputs)
    return time.perf_counter() - begin


def others(name: str, whole: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Smaller networks, and views of the whole one that leave early through an affine map."""
    found = {}
    for title, (kind, config) in SMALLER[name].items():
        shared = {key: whole.config[key] for key in ("in_channels", "out_channels", "sample_size")}
        found[title] = kind(**{**shared, **config}).eval()
    for depth in DEPTHS[name]:
        taps = dict(zip("xy", exits_of(whole).taps(whole, depth), strict=True))
        with torch.inference_mode(), listening(whole, taps) as heard:
            whole(**inputs)
        sizes = [heard[key].shape[1 if heard[key].ndim == 4 else -1] for key in "yx"]
        exit_map = LinearExit(torch.randn(*sizes) / sizes[1] ** 0.5, torch.zeros(sizes[0]))
        found[f"depth {depth} of {layers(whole)}"] = shallow(whole, depth, exit_map)
    return found


def measure(name: str, rounds: int) -> list[str]:
    """Lines of the table of one network."""
    whole = random_network(name)
    inputs = example_inputs(whole)
    base, lines, full = [], [], count_macs(whole, inputs)
    for title, network in others(name, whole, inputs).items():
        for one in (network, whole):  # kernels are chosen and memory is taken in the first call
            seconds(one, inputs)
        ratios = []
        for _ in range(rounds):
            base.append(seconds(whole, inputs))
            ratios.append(seconds(network, inputs) / base[-1])
        share, cost = median(ratios), count_macs(network, inputs) / full
        stitched = f"{0.6 + 0.4 * cost:.3f} | {0.6 + 0.4 * share:.3f}"
        spread = f"{min(ratios):.3f}, {max(ratios):.3f}"
        lines.append(
            f"| {title} | {parameters(network) / 1e6:.0f} M | {cost:.3f} | {share:.3f} | {spread} | {stitched} |"
        )
        print(name, lines[-1], flush=True)
    head = [
        "| at a step | parameters | MACs | time | min, max | MACs of a run with 40 % such steps | time |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    about = f"{parameters(whole) / 1e6:.0f} M parameters, {full / 1e9:.0f} GMACs and {median(base):.2f} s a call."
    return [f"## {ARCHITECTURES[name][0]}, batch 1", "", about, "", *head, *lines, ""]


class _Pipe:
    """As much of a pipeline as a policy needs."""

    def __init__(self, network: Any):
        self.transformer, self.scheduler = network, DDIMScheduler()
        self.scheduler.set_timesteps(10)
        self.components = {"transformer": network, "scheduler": self.scheduler}


def overhead(rounds: int) -> str:
    """Seconds that a policy adds to a call."""
    network: Any = DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, num_layers=1, in_channels=4, sample_size=8, norm_num_groups=4
    ).eval()
    inputs = example_inputs(network) | {"timestep": torch.tensor([900])}
    plain, hooked = [], []
    for _ in range(rounds):
        plain.append(seconds(network, inputs))
        with attach(_Pipe(network), Stitch(()), {}):
            seconds(network, inputs)  # plans the run
            hooked.append(seconds(network, inputs))
    return f"The hook adds {1e6 * (median(hooked) - median(plain)):.0f} microseconds to a call (medians of {rounds})."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=SMALLER, default=list(SMALLER))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "policies_full_size.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = ["# Stitched and left early: time against MACs", ""]
    lines += [
        f"`python benchmarks/policies_full_size.py`: shares of the whole network, median of {args.rounds} rounds in one"
    ]
    lines += [f"run, {args.threads} threads of {processor()}, float32, torch {torch.__version__}, random weights.", ""]
    for name in args.model:
        lines += measure(name, args.rounds)
    lines += [overhead(200)]
    args.out.parent.mkdir(exist_ok=True)
    save_text("\n".join(lines) + "\n", args.out)


if __name__ == "__main__":
    main()
