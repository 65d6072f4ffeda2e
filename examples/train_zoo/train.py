"""Train one model of the zoo.

    python examples/train_zoo/train.py emoji --data DATA --output_dir OUT --seconds 4500 --preset cpu

Ctrl-C saves and stops; the same command with `--resume` goes on. `--init` starts from what an earlier run saved.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from cifar import CIFAR_JOBS
from emoji_job import STAGES, EmojiJob
from presets import PRESETS
from run import SYNTHETIC, Run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=["emoji", *CIFAR_JOBS])
    parser.add_argument("--data", required=True, help=f"folder that prepare.py wrote, or '{SYNTHETIC}'")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="wall-clock budget of the training")
    parser.add_argument("--steps", type=int, help="also end each stage after so many steps")
    parser.add_argument("--preset", choices=PRESETS, default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--init", type=Path, help="output folder of an earlier run to start from")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="emoji: what to train")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")
    parser.add_argument("--save_every", type=float, default=180.0, help="seconds between checkpoints")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the job of the command line."""
    options = _parser().parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    run = Run(
        data=options.data,
        output=options.output_dir,
        seconds=options.seconds,
        preset=PRESETS[options.preset],
        device=device,
        init=options.init,
        resume=options.resume,
        steps=options.steps,
        save_every=options.save_every,
    )
    if options.job == "emoji":
        EmojiJob(run, tuple(options.stages))()
    else:
        CIFAR_JOBS[options.job](run)


if __name__ == "__main__":
    main()
