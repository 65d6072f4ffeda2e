"""What the converged reference rests on: which solver and grid converge, on which clock, and where they end.

`python benchmarks/reference_convergence.py --guidance-scale 4` writes results/reference_convergence_<model>_cfg4.md:
latent MSE of each solver and grid at N = 50 to 200 steps, pair by pair, to 800 steps on the log-SNR grid.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from solver_runs import load_pipe, quiet
from torch import Tensor
from tqdm.auto import tqdm

import diffaccel
from diffaccel.eval import latent_mse
from diffaccel.eval.reference import pair_generator, reference_key

HERE = Path(__file__).parent
TRUTH = ("dpmpp_2m", {"schedule": "logsnr"})
CONTENDERS: list[tuple[str, dict[str, Any]]] = [
    TRUTH,
    ("dpmpp_3m", {"schedule": "logsnr", "start": "singlestep"}),
    ("dpmpp_3m_shipped", {"schedule": "logsnr"}),
    ("unipc", {"schedule": "logsnr"}),
    ("unipc_3", {"schedule": "logsnr"}),
    ("dpmpp_2m", {"schedule": "karras"}),
    ("dpmpp_2m", {"schedule": "beta"}),
    ("dpmpp_2m", {"schedule": "trailing"}),
    ("dpmpp_2m", {"schedule": "logsnr", "timesteps": "integer"}),
    ("dpmpp_2m", {"schedule": "logsnr", "final": "sigma_min"}),
]


def main(argv: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-sd", help="zoo name, or folder of a Stable Diffusion pipeline")
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--prompts", type=int, default=4, help="screening prompts, one seed each")
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 100, 200])
    parser.add_argument("--truth-steps", type=int, default=800)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    quiet()
    pipe = load_pipe(args.model)
    config = dict(pipe.scheduler.config)
    prompts = (HERE / "prompts.txt").read_text().split("\n")[: args.prompts]

    def solve(solver: str, steps: int, **options: Any) -> Tensor:
        pipe.scheduler = diffaccel.scheduler(solver, config, **options)
        generators = [pair_generator(prompt, 0) for prompt in prompts]
        call = {"num_inference_steps": steps, "guidance_scale": args.guidance_scale, "output_type": "latent"}
        return pipe(prompts, generator=generators, **call).images.float().cpu()

    key = reference_key(pipe)[:16]  # before the pipeline gets other schedulers
    truth = solve(TRUTH[0], args.truth_steps, **TRUTH[1])
    runs = [(solver, options, steps) for solver, options in CONTENDERS for steps in args.steps]
    # Every trained timestep once, none between them: the solution as Diffusers' own clock has it.
    runs.append(("dpmpp_2m", {"schedule": "trailing", "timesteps": "integer"}, min(1000, 5 * max(args.steps))))
    lines = ["| solver and grid | steps |" + "".join(f" {p} |" for p in prompts), "|---|---|" + "---|" * len(prompts)]
    for solver, options, steps in tqdm(runs):
        errors = latent_mse(solve(solver, steps, **options), truth)
        cells = "".join(f" {error:.1e} |" for error in errors.tolist())
        lines.append(f"| {' '.join([solver, *map(str, options.values())])} | {steps} |{cells}")
    head = (
        f"# Convergence: `{args.model}`, guidance scale {args.guidance_scale:g}\n\nLatent MSE to {args.truth_steps} "
        f"steps of {TRUTH[0]} on the log-SNR grid, exact times, pair by pair. Weights and noise schedule "
        f"`{key}`, torch {torch.__version__}.\n\n"
    )
    text = head + "\n".join(lines) + "\n"
    args.output.mkdir(parents=True, exist_ok=True)
    name = f"reference_convergence_{Path(args.model).name}_cfg{args.guidance_scale:g}.md"
    (args.output / name).write_text(text)
    return text


if __name__ == "__main__":
    print(main())
