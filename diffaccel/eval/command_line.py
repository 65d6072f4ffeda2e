"""Arguments of `diffaccel eval`; nothing that is heavy is imported before a command runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEFAULT_MEASURES = ["fd", "kd", "cmmd", "clip", "lpips", "ssim", "psnr", "latent_mse", "clip_distance"]
FORMATS = ["md", "csv", "json", "tex", "html"]
VARIANT = "MODEL,key=value,... (steps, guidance_scale, scheduler, schedule, final, name, ...) or a .json file"


def add_eval(commands: Any) -> None:
    """Add `eval` and its subcommands to the parser of `diffaccel`."""
    parser = commands.add_parser("eval", help="pictures, scores, costs and the table of them; for any pipelines")
    sub = parser.add_subparsers(title="evaluation", required=True, metavar="WHAT")

    compare = _command(sub, "compare", "the whole thing: generate, score, time, report", *WHOLE)
    compare.add_argument("base", help=f"the baseline: {VARIANT}")
    compare.add_argument("fast", nargs="+", help="what is compared with it, written alike")
    compare.add_argument("--out", type=Path, default=Path("diffaccel-eval"), help="folder (default: diffaccel-eval)")

    sweep = _command(sub, "sweep", "compare schedulers x steps (x models)", *WHOLE)
    sweep.add_argument("--base", default="emoji-sd,steps=50,guidance_scale=4", help=f"the baseline: {VARIANT}")
    sweep.add_argument("--model", action="append", help="may be given several times (default: the baseline's)")
    what = "NAME or NAME,schedule=...,final=..., a class of Diffusers, or own; may be given several times"
    sweep.add_argument("--scheduler", action="append", required=True, help=what)
    sweep.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10, 20], help="default: 5 8 10 20")
    sweep.add_argument("--guidance-scale", type=float, help="of all rows but the baseline (default: the baseline's)")
    sweep.add_argument("--out", type=Path, default=Path("diffaccel-sweep"), help="folder (default: diffaccel-sweep)")

    fid = _command(sub, "fid", "FID and KID of two folders of pictures", _network, _pictures)
    fid.add_argument("a", type=Path, help="folder of pictures")
    what = "folder of pictures, a file of `eval ref`, or an .npz with mu and sigma (FILE.npz:N, if of N pictures)"
    fid.add_argument("b", help=what)
    fid.add_argument("--json", action="store_true", help="print JSON")

    generate = _command(sub, "generate", "pictures of one pipeline, resumable", _pipelines, _job)
    generate.add_argument("variant", help=VARIANT)
    generate.add_argument("--out", type=Path, required=True, help="folder of the run")
    generate.add_argument("--latents", action="store_true", help="keep the final latents, for the latent MSE")

    features = _command(sub, "features", "features of a run or a folder of pictures", _device, _networks, _pictures)
    features.add_argument("source", type=Path, help="run or folder")

    ref = _command(sub, "ref", "reference file of a folder of pictures", _network, _pictures)
    ref.add_argument("source", type=Path, help="folder of pictures")
    ref.add_argument("--out", type=Path, required=True, help="file, .safetensors")
    ref.add_argument("--moments-only", action="store_true", help="mean and covariance only: for FID, not for KID")
    ref.add_argument("--spatial", action="store_true", help="the features of sFID too")

    score = _command(sub, "score", "scores of runs, on the screen", _device, _scoring)
    score.add_argument("runs", type=Path, nargs="+", help="runs, the baseline first")

    report = _command(sub, "report", "scores and costs of runs, as files", _device, _scoring, _formats)
    report.add_argument("runs", type=Path, nargs="+", help="runs, the baseline first; or one report.json")
    report.add_argument("--out", type=Path, default=Path("diffaccel-report"), help="folder (default: diffaccel-report)")

    perf = _command(sub, "perf", "what a picture costs, as JSON", _pipelines, _timing)
    perf.add_argument("variants", nargs="+", help=VARIANT)
    perf.set_defaults(num=None)

    verify = _command(sub, "verify", "check the files of runs against their hashes")
    verify.add_argument("runs", type=Path, nargs="+", help="runs")
    _command(sub, "doctor", "which weights and packages are here, and what each measure lacks")


def _command(sub: Any, name: str, text: str, *groups: Callable[[argparse.ArgumentParser], None]) -> Any:
    def run(args: argparse.Namespace) -> None:
        from diffaccel.eval import command

        if getattr(args, "network", "") is None:  # a default of "append" would stay beside what is given
            args.network = ["emoji-clip"]
        getattr(command, f"run_{name}")(args)

    parser = sub.add_parser(name, help=text)
    for group in groups:
        group(parser)
    parser.set_defaults(run=run)
    return parser


def _names(text: str) -> list[str]:
    """Names with commas: parted by spaces, they would take the arguments behind them for names."""
    return [name.strip() for name in text.split(",")]


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, mps (default: what there is)")


def _pipelines(parser: argparse.ArgumentParser) -> None:
    _device(parser)
    what = "of the pipelines (default: float32 on the CPU, float16 elsewhere)"
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help=what)
    what = "a .jsonl, .csv, .tsv or .txt file, COCO captions (.json), or emoji (default with emoji-sd)"
    parser.add_argument("--prompts", help=what)


def _job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num", type=int, help="pictures (default: one for every prompt)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every prompt's first picture (default: 0)")
    parser.add_argument("--batch", type=int, default=16, help="pictures a call while generating (default: 16)")


def _weights(parser: argparse.ArgumentParser) -> None:
    what = "where weights lie: inception=FILE, open_clip=FILE, lpips=FILE; may be given several times"
    parser.add_argument("--weights", action="append", default=[], metavar="NAME=PATH", help=what)


NETWORKS = "emoji-clip, inception[:RESIZE], open_clip:MODEL[:cmmd], clip:FOLDER, dinov2:FOLDER"


def _network(parser: argparse.ArgumentParser) -> None:
    _device(parser)
    _weights(parser)
    parser.add_argument("--network", default="inception", help=f"{NETWORKS} (default: inception, resized as clean-fid)")


def _networks(parser: argparse.ArgumentParser) -> None:
    _weights(parser)
    what = f"{NETWORKS}; may be given several times (default: emoji-clip)"
    parser.add_argument("--network", action="append", help=what)


def _pictures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--alpha", choices=("white", "black"), help="what transparent pictures are laid on")
    parser.add_argument("--skip-bad", action="store_true", help="leave damaged pictures out, at most 1 %%")


def _scoring(parser: argparse.ArgumentParser) -> None:
    _networks(parser)
    what = "folder of pictures, file of `eval ref`, .npz (see fid), or twemoji (compare, sweep: default with emoji-sd)"
    parser.add_argument("--reference", help=what)
    others = "cmmd_unbiased, precision, recall, density, coverage, is, sfid"
    names = f"default: {', '.join(DEFAULT_MEASURES)}; also {others}"
    parser.add_argument("--measures", type=_names, default=DEFAULT_MEASURES, metavar="A,B,...", help=names)
    parser.add_argument("--strict", action="store_true", help="a measure that cannot be had is an error")


def _formats(parser: argparse.ArgumentParser) -> None:
    what = f"of the report (default: {','.join(FORMATS)})"
    parser.add_argument("--formats", type=_names, default=FORMATS, metavar="A,B,...", help=what)


def _timing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--perf-batch", type=int, default=1, help="pictures of a timed call (default: 1)")
    parser.add_argument("--warmup", type=int, default=2, help="calls before the timed ones (default: 2)")
    parser.add_argument("--runs-timed", type=int, default=20, help="timed calls (default: 20)")


def _no_timing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-timing", action="store_true", help="leave the costs out")


WHOLE = (_pipelines, _job, _scoring, _timing, _no_timing, _formats)
