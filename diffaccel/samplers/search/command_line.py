"""`diffaccel search`: its arguments, and what is printed of a search."""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffaccel.samplers.search.api import METHODS
from diffaccel.samplers.search.recipe import Entry, Recipe, network_facts

ENDS = ("zero", "sigma_min", "corrector")
DTYPES = ("float32", "float16", "bfloat16")
EPILOG = """examples:
  diffaccel search emoji-sd --steps 5 8 --prompts captions.txt --guidance-scale 4 --output recipe.json
  diffaccel search my-pipeline --method dc --prompts captions.txt --output recipe.json --picture recipe.png
  diffaccel sample emoji-sd --recipe recipe.json --prompt "red heart, twemoji style"
"""


def add_search(commands: Any) -> None:
    """Add `search` to the parser of `diffaccel`."""
    what = "search a sampler for your model; a small JSON that anyone can load"
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser("search", help=what, description=what, epilog=EPILOG, formatter_class=raw)
    parser.add_argument("model", help="a zoo name (emoji-sd), a folder, or a hub id")
    parser.add_argument("--method", choices=METHODS, default="auto", help="see docs/search.md (default: auto)")
    parser.add_argument("--steps", type=int, nargs="+", default=[5], help="network calls, one or several (default: 5)")
    lines = "file with a prompt a line (DiT: a class number a line), four or more; every fourth judges only"
    parser.add_argument("--prompts", type=Path, required=True, help=lines)
    parser.add_argument("--guidance-scale", type=float, help="that will be used (default: the pipeline's)")
    kept = "JSON file to write (default: recipe.json); what is there already for other steps or scales is kept"
    parser.add_argument("--output", type=Path, default=Path("recipe.json"), help=kept)
    parser.add_argument("--picture", type=Path, help="PNG of schedule, times and weights to write; needs matplotlib")

    how = parser.add_argument_group("search")
    how.add_argument("--pairs", type=int, default=32, help="prompt and noise pairs to fit, at least (default: 32)")
    how.add_argument("--cache", type=Path, help="folder of references and of long searches, that go on if interrupted")
    how.add_argument("--seed", type=int, default=0, help="of the noise and of what methods draw (default: 0)")
    begin = "the method starts from where it does not choose (default: the method's)"
    how.add_argument("--solver", help=f"a name from `diffaccel list` that {begin}")
    how.add_argument("--schedule", help=f"a name from `diffaccel list` that {begin}")
    how.add_argument("--final", choices=ENDS, help="end of the run, likewise")
    how.add_argument("--device", help="cpu, cuda, mps (default: what there is)")
    how.add_argument("--dtype", choices=DTYPES, help="default: float32 on the CPU")
    parser.set_defaults(run=_search)


def _search(args: argparse.Namespace) -> None:
    """What can be refused is refused before the search, not after it."""
    import diffaccel
    from diffaccel.sample import load_pipeline

    if min(args.steps) < 1:
        raise ValueError(f"--steps must be 1 or more, not {min(args.steps)}")
    if args.pairs < 1:
        raise ValueError(f"--pairs must be 1 or more, not {args.pairs}")
    if args.picture and not find_spec("matplotlib"):
        raise ImportError("--picture needs matplotlib; pip install matplotlib")
    for path in (args.output, args.picture):
        if path and not path.parent.is_dir():
            raise ValueError(f"there is no folder {path.parent} to write {path.name} to")
    kept = Recipe.load(args.output) if args.output.exists() else None
    lines = _lines(args.prompts)
    pipe: Any = load_pipeline(args.model, args.device, args.dtype)
    if kept and kept.network != network_facts(pipe):
        raise ValueError(f"{args.output} is a recipe for another network; name another --output")
    recipe = diffaccel.search(
        pipe,
        args.method,
        prompts=_classes(lines, args.prompts) if _takes_classes(pipe) else lines,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        pairs=args.pairs,
        solver=args.solver,
        schedule=args.schedule,
        final=args.final,
        seed=args.seed,
        cache=args.cache,
    )
    whole = kept | recipe if kept else recipe
    whole.save(args.output)
    print(described(recipe.entries))
    print()
    print(usage(whole, recipe.entries, args.model, args.output))
    if args.picture:
        recipe.draw(args.picture, pipe)
        print(f"picture: {args.picture}")


def _lines(file: Path) -> list[str]:
    """Lines that are not empty, each once."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read prompts from {file}: {error}") from None
    prompts = list(dict.fromkeys(line for line in lines if line))
    if len(prompts) < 4:
        raise ValueError(
            f"{file} has {len(prompts)} different prompts; a search fits on some and is judged on others, give it four "
            "or more, one a line"
        )
    return prompts


def _takes_classes(pipe: Any) -> bool:
    return "class_labels" in inspect.signature(type(pipe).__call__).parameters


def _classes(lines: Sequence[str], file: Path) -> list[int]:
    if wrong := [line for line in lines if not line.isdecimal()]:
        raise ValueError(f"this model draws classes; {file} needs a class number a line, not {wrong[0]!r}")
    return [int(line) for line in lines]


def described(entries: Sequence[Entry]) -> str:
    """A table of the held-out measurements, and a sentence for each entry."""
    first = entries[0]
    seen = f"{first.measured['pairs']} pairs of {first.measured['prompts']} prompts that the search did not see"
    lines = [f"{first.method}, guidance {first.guidance_scale:g}, judged on {seen}:", ""]
    lines.append(f"{'calls':>5}  {'error':>9}  {'of the default':22}  {'of the start':22}  {'searched':>9}")
    for entry in entries:
        measured = entry.measured
        ratios = [_ratio(measured[name]) for name in ("default", "start")]
        seconds = f"{measured['seconds']:.0f} s" if "seconds" in measured else ""
        error = f"{measured['latent_mse']:.4g}"
        lines.append(f"{entry.steps:>5}  {error:>9}  {ratios[0]:22}  {ratios[1]:22}  {seconds:>9}")
    lines += ["", "error: median squared error of the latents to the converged picture of the same noise;"]
    lines += ["of the default, of the start: this error divided by theirs, median of the pairs (95 % interval);"]
    lines.append(f"default: {first.measured['default']['sampler']}; start: {first.measured['start']['sampler']}.")
    return "\n".join([*lines, "", *map(verdict, entries)])


def _ratio(measured: dict[str, Any]) -> str:
    """Of a fixed sampler's error; without an interval where there was a single prompt."""
    if "ratio" not in measured:
        return "-"
    low, middle, high = measured["ratio"]
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def verdict(entry: Entry) -> str:
    """Whether an entry is worth using, in a sentence."""
    default, calls = entry.measured["default"], f"{entry.steps} calls"
    if entry.notes.get("skips") and "cost" in entry.notes:
        calls += f" at the cost of {entry.notes['cost']:.2g} whole ones"
    if "ratio" not in default:
        return f"{calls}: one held-out prompt tells nothing for sure; give eight prompts or more."
    low, middle, high = default["ratio"]
    if high < 1:
        return f"{calls}: the recipe helps; it has {_times(middle)} the error of the package's default."
    if low > 1:
        return f"{calls}: the recipe does not help: it has {_times(middle)} the error of the default. Use the default."
    return f"{calls}: the recipe cannot be told from the default on these pairs. Use the default, or give more prompts."


def _times(ratio: float) -> str:
    return f"{ratio:.2f} times" if math.isfinite(ratio) else "many times"


def usage(recipe: Recipe, entries: Sequence[Entry], model: str, path: Path) -> str:
    """How to make pictures with a recipe."""
    several = len({entry.guidance_scale for entry in recipe.entries}) > 1
    example = entries[0]
    steps, scale = f"num_inference_steps={example.steps}", f"guidance_scale={example.guidance_scale:g}"
    chosen = f", {scale}" if several else ""
    if any(entry.notes.get("skips") for entry in entries):
        use = f"handle = recipe.apply(pipe, steps={example.steps}{chosen})  # leaves out layers; handle.remove()"
    else:
        use = f"pipe.scheduler = recipe.scheduler(pipe{chosen})"
    options = f" --guidance-scale {example.guidance_scale:g}" if several else ""
    return "\n".join(
        [
            f"{path} is written. To use it:",
            f'  recipe = diffaccel.Recipe.load("{path}")',
            f"  {use}",
            f'  image = pipe("...", {steps}, {scale}).images[0]',
            "or",
            f'  diffaccel sample {model} --recipe {path} --steps {example.steps}{options} --prompt "..."',
        ]
    )
