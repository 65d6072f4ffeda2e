"""What the subcommands of `diffaccel eval` do; `command_line.py` says what their arguments are."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from diffaccel.eval.compare import Subject, Timing, compare, write_report
from diffaccel.eval.cost_columns import with_costs
from diffaccel.eval.doctor import examine
from diffaccel.eval.errors import DataError, MissingWeights
from diffaccel.eval.fid import fid
from diffaccel.eval.measure_names import PictureMeasure
from diffaccel.eval.networks.by_name import checked_device, given_path, network
from diffaccel.eval.networks.extractor import Extractor
from diffaccel.eval.networks.lpips import lpips
from diffaccel.eval.perf import measure
from diffaccel.eval.protocol import comparable
from diffaccel.eval.reports.render import markdown
from diffaccel.eval.reports.report import read_report, save_report
from diffaccel.eval.runs.calls import check_call
from diffaccel.eval.runs.features import extract
from diffaccel.eval.runs.generate import generate
from diffaccel.eval.runs.manifest import digest, environment
from diffaccel.eval.runs.prompts import Prompt, read_prompts
from diffaccel.eval.runs.reference_set import save_reference
from diffaccel.eval.runs.run import Run, read_run, verify
from diffaccel.eval.runs.shards import is_first_process, process_device
from diffaccel.eval.runs.variant import Loader, Variant, parse_variant
from diffaccel.eval.score import Scores, score

STEPS = ("num_inference_steps", "timesteps", "sigmas")  # arguments of a pipeline that say how many steps


def run_generate(args: argparse.Namespace) -> None:
    """`eval generate`."""
    variant = parse_variant(args.variant)
    prompts = _prompts(args, [variant])
    generate(_loader(args)(variant), prompts, args.out, latents=args.latents, **_job(args), **variant.call)
    _say(f"{args.num or len(prompts)} pictures in {args.out}")


def run_features(args: argparse.Namespace) -> None:
    """`eval features`."""
    for extractor in _networks(args):
        features = extract(args.source, extractor, alpha=args.alpha, skip_bad=args.skip_bad)
        shapes = ", ".join(f"{name} {values.shape}" for name, values in features.items())
        _say(f"{extractor.id}: {shapes}")


def run_ref(args: argparse.Namespace) -> None:
    """`eval ref`."""
    extractor = network(args.network, weights=args.weights, device=_device(args), spatial=args.spatial)
    options = {"moments_only": args.moments_only, "alpha": args.alpha, "skip_bad": args.skip_bad}
    reference = save_reference(args.source, extractor, args.out, **options)
    _say(f"{args.out}: {reference.n} pictures of {reference.name}, {extractor.id}, {reference.digest}")


def run_score(args: argparse.Namespace) -> None:
    """`eval score`: the tables on the screen."""
    for found, runs, title in _scored(args):
        if is_first_process():
            print(markdown(found.table(title, runs, {"environment": environment()})))


def run_report(args: argparse.Namespace) -> None:
    """`eval report`: the tables as files; of a `report.json` only other formats of what it holds."""
    if len(args.runs) == 1 and args.runs[0].suffix == ".json":
        tables, manifest = read_report(args.runs[0])
        paths = save_report(tables, args.out, args.formats, manifest=manifest)
    else:
        parts = _scored(args)
        if not is_first_process():
            return
        tables = [found.table(title, group, {}) for found, group, title in parts]
        runs = {name: run for _, group, _ in parts for name, run in group.items()}
        paths = write_report(tables, [found for found, _, _ in parts], runs, args.out, args.formats)
    for path in paths:
        print(path)


def run_perf(args: argparse.Namespace) -> None:
    """`eval perf`: costs as JSON, one object for each variant."""
    load, variants = _loader(args), _distinct([parse_variant(text) for text in args.variants])
    prompts = _prompts(args, variants)
    timing = asdict(Timing(args.perf_batch, args.warmup, args.runs_timed))
    costs = {}
    for variant in variants:
        pipe = load(variant)
        check_call(pipe, variant.call)
        costs[variant.name] = measure(pipe, prompts, **timing, **variant.call).to_json()
    print(json.dumps(costs, indent=1))


def run_verify(args: argparse.Namespace) -> None:
    """`eval verify`: every file of every run against its hash."""
    problems = [problem for run in args.runs for problem in verify(read_run(run))]
    if problems:
        raise DataError("\n".join(problems))
    _say(f"{len(args.runs)} run{'s are' if len(args.runs) > 1 else ' is'} whole and unchanged")


def run_doctor(args: argparse.Namespace) -> None:
    """`eval doctor`."""
    print(examine())


def run_fid(args: argparse.Namespace) -> None:
    """`eval fid`."""
    extractor = network(args.network, weights=args.weights, device=_device(args))
    found = fid(args.a, args.b, extractor, alpha=args.alpha, skip_bad=args.skip_bad)
    if is_first_process():
        print(json.dumps(found.to_json(), indent=1) if args.json else found.text())


def run_compare(args: argparse.Namespace) -> None:
    """`eval compare`."""
    _compare(args, [parse_variant(text) for text in (args.base, *args.fast)], "Comparison")


def run_sweep(args: argparse.Namespace) -> None:
    """`eval sweep`: the baseline, then every model with every scheduler at every number of steps.

    What the baseline's call says beside the steps holds for all rows: other guidance would be another comparison.
    """
    base = parse_variant(args.base)
    call = {key: value for key, value in base.call.items() if key not in STEPS}
    call |= {} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}
    rows, models = [base], args.model or [base.model]
    for model, scheduler, steps in itertools.product(models, args.scheduler, args.steps):
        own, *options = scheduler.split(",")
        words = options if own == "own" else [f"scheduler={scheduler}"]
        variant = parse_variant(",".join([model, *words, f"steps={steps}"]))
        label = f"{scheduler.replace(',', ' ')}, {steps} steps"
        name = f"{Path(model).name} {label}" if len(models) > 1 else label
        rows.append(Variant(variant.model, variant.scheduler, variant.options, call | variant.call, name))
    _compare(args, rows, "Schedulers and steps")


def _compare(args: argparse.Namespace, variants: Sequence[Variant], title: str) -> None:
    load = _loader(args)
    table = compare(
        {v.name: Subject(load.bound(v), v.call) for v in _distinct(variants)},
        _prompts(args, variants),
        args.out,
        extractors=_networks(args),
        measures=args.measures,
        reference=_reference(args, [v.model for v in variants]),
        lpips=_lpips(args),
        strict=args.strict,
        timing=None if args.no_timing else Timing(args.perf_batch, args.warmup, args.runs_timed),
        formats=args.formats,
        title=title,
        **_job(args),
    )
    if table is not None:
        print(markdown(table))
        for name in args.formats:
            print(args.out / f"report.{name}")


def _distinct(variants: Sequence[Variant]) -> Sequence[Variant]:
    """The variants, which must differ in name: rows are told apart by it."""
    name, count = Counter(variant.name for variant in variants).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} rows are called {name!r}; add name=... to tell them apart")
    return variants


def _scored(args: argparse.Namespace) -> list[tuple[Scores, dict[str, Run], str]]:
    """Scores, runs and title of every table."""
    runs: dict[str, Run] = {}
    for folder in args.runs:
        name = folder.resolve().name
        if name in runs:
            raise ValueError(f"rows are called after the folders of their runs, and two of these are called {name}")
        runs[name] = read_run(folder)
    settings: dict[str, Any] = {
        "extractors": _networks(args),
        "measures": args.measures,
        "reference": args.reference,
        "lpips": _lpips(args),
        "strict": args.strict,
    }
    found = [(with_costs(score(group, **settings), group), group) for group in comparable(runs)]
    if len(found) == 1:
        return [(*found[0], "Scores")]
    return [(scores, group, f"Scores (protocol {digest(scores.protocol)[:8]})") for scores, group in found]


def _job(args: argparse.Namespace) -> dict[str, Any]:
    return {"num": args.num, "seed": args.seed, "batch": args.batch}


def _loader(args: argparse.Namespace) -> Loader:
    return Loader(process_device() or (args.device and checked_device(args.device)), args.dtype)


def _device(args: argparse.Namespace) -> str:
    if args.device is None:
        return process_device() or ("cuda" if torch.cuda.is_available() else "cpu")
    return process_device() or checked_device(args.device)


def _networks(args: argparse.Namespace) -> list[Extractor]:
    spatial = "sfid" in getattr(args, "measures", ())
    return [network(name, weights=args.weights, device=_device(args), spatial=spatial) for name in args.network]


def _lpips(args: argparse.Namespace) -> PictureMeasure | str:
    if "lpips" not in args.measures:
        return "not asked for"
    try:
        return lpips(weights=given_path("lpips", args.weights), device=_device(args))
    except (MissingWeights, ImportError) as error:
        if args.strict:
            raise
        return f"{str(error).splitlines()[0]} See diffaccel eval doctor."


def _prompts(args: argparse.Namespace, variants: Sequence[Variant]) -> list[Prompt]:
    if args.prompts is None and any(variant.model != "emoji-sd" for variant in variants):
        raise ValueError("give --prompts: a .jsonl, .csv or .txt file, COCO captions, or emoji for the packaged list")
    return read_prompts(args.prompts or "emoji", args.num)


def _reference(args: argparse.Namespace, models: Sequence[str]) -> str | None:
    """What was given; the packaged Twemoji features where only the packaged model and network are in play."""
    if args.reference is None and set(models) == {"emoji-sd"} and args.network == ["emoji-clip"]:
        return "twemoji"
    return args.reference


def _say(text: str) -> None:
    if is_first_process():
        print(text, file=sys.stderr)
