"""The table of the README: how good and how fast `emoji-sd` is with fewer steps, scored without any download.

python examples/fid_table.py [--num 512] [--output fid-table]

Set-wise numbers are Frechet and kernel distances to the 1,905 Twemoji pictures as the packaged `emoji-clip` sees them:
FD[emoji-clip], not FID. For FID, replace the extractor and the reference:

    extractors=[ev.inception("pt_inception-2015-12-05-6726825d.pth")], reference="folder-of-real-pictures"

An interrupted run goes on where it stopped.
"""

import argparse
from pathlib import Path

from diffaccel import eval as ev

OURS = "scheduler=er_ode_1_corrected,schedule=beta,final=sigma_min"
# The best of 970 settings of Diffusers at 5 and 8 calls, see benchmarks/results/solvers_emoji-sd.md.
THEIRS = (
    "scheduler=DPMSolverMultistepScheduler,scheduler.timestep_spacing=trailing,scheduler.final_sigmas_type=sigma_min"
)
ROWS = (
    "steps=50,name=DDIM 50",  # the pipeline's own scheduler; the first row is what the others are compared with
    "steps=20,name=DDIM 20",
    "steps=8,name=DDIM 8",
    f"steps=5,{THEIRS},name=Diffusers' best 5",
    f"steps=8,{THEIRS},name=Diffusers' best 8",
    f"steps=5,{OURS},name=diffaccel 5",
    f"steps=8,{OURS},name=diffaccel 8",
    f"steps=10,{OURS},name=diffaccel 10",
)


def main() -> None:
    """Generate, score, time, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=512, help="pictures of each row (default: 512)")
    parser.add_argument("--rows", type=int, default=len(ROWS), help="only so many rows")
    parser.add_argument("--timed-runs", type=int, default=20, help="timed calls of each row (default: 20)")
    parser.add_argument("--output", type=Path, default=Path("fid-table"), help="folder (default: fid-table)")
    args = parser.parse_args()

    load = ev.Loader()
    variants = [ev.parse_variant(f"emoji-sd,guidance_scale=4,{row}") for row in ROWS[: args.rows]]
    table = ev.compare(
        {variant.name: ev.Subject(load.bound(variant), variant.call) for variant in variants},
        spread(ev.read_prompts("emoji"), args.num),
        args.output,
        extractors=[ev.emoji_clip()],
        reference="twemoji",
        measures=["fd", "kd", "clip", "clip_distance", "psnr", "ssim", "latent_mse"],
        timing=ev.Timing(runs=args.timed_runs),
        title=f"emoji-sd, guidance 4, {args.num} pictures",
    )
    if table is not None:  # with `accelerate launch`, only the first process has it
        print(ev.markdown(table))
        print(f"{args.output}/report.html shows it with plots and pictures")


def spread(prompts: list[ev.Prompt], count: int) -> list[ev.Prompt]:
    """`count` prompts from the whole list, evenly: the first ones are all faces."""
    return [prompts[i * len(prompts) // count] for i in range(count)] if count < len(prompts) else prompts


if __name__ == "__main__":
    main()
