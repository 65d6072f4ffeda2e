"""T-Stitch and early exit on real weights: what they save and what they cost, by a paired test over 1,000 pictures.

    python benchmarks/policies.py unet [--trained FOLDER]        # emoji-sd and emoji-sd-small, both in the package
    python benchmarks/policies.py dit [--trained FOLDER]         # benchmarks/weights/emoji-dit-b and emoji-dit-s

Every row makes the same pictures from the same noise: 10 steps of our default solver, guidance 4 (2 for the DiT, whose
classes are single emoji). "n steps" is the control: the whole network with as many MACs, saved by fewer steps.

Two scores of each picture, both by the packaged `emoji-clip`: cosine to its caption, and cosine to the true Twemoji.
The test is paired: the mean difference to the whole network's picture from the same noise, with a 95 % interval over
the captions. `emoji-clip` and the models were trained on the same pictures. A stopped run goes on where it was; after a
change of weights or exits take another --out, for a row's pictures are found again by its name.
Times: a picture alone, all rows in turn, picture after picture; every time is divided by that of the whole network.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

import diffaccel
from diffaccel import eval as ev
from diffaccel import zoo
from diffaccel.cost import processor
from diffaccel.eval.compare import folder_name
from diffaccel.pictures import labelled_grid, save_picture, save_text
from diffaccel.samplers.policy import Handle, attach
from diffaccel.samplers.policy.exits import FittedExits, fit_exits
from diffaccel.samplers.policy.frontier import Point, frontier
from diffaccel.samplers.policy.stitch import Stitch

RESULTS, WEIGHTS = Path(__file__).parent / "results", Path(__file__).parent / "weights"
STEPS = 10
FRACTIONS = (0.2, 0.3, 0.4, 0.6, 0.8)
TARGETS = (0.9, 0.75, 0.6)
FEWER = (7, 5)
GUIDANCE = {"unet": 4.0, "dit": 2.0}
Row = tuple[Callable[[], Any], Callable[[Any], Handle | None], int]  # pipeline, what attaches a policy, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=GUIDANCE)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder with emoji-dit-b and emoji-dit-s")
    parser.add_argument("--trained", type=Path, help="output of examples/train_early_exit.py")
    parser.add_argument("--num", type=int, default=1024, help="pictures of each row; at most 1,000 for the DiT")
    parser.add_argument("--timed", type=int, default=24, help="pictures that are timed")
    parser.add_argument("--rows", nargs="+", help="only rows whose names start so (to share the work)")
    parser.add_argument("--out", type=Path, default=Path("policies"))
    args = parser.parse_args()
    out = args.out / args.model
    out.mkdir(parents=True, exist_ok=True)
    captions = ev.read_prompts("emoji")
    load = load_unet if args.model == "unet" else partial(load_dit, args.weights / "emoji-dit-b")
    prompts, tested = (spread_captions if args.model == "unet" else spread_classes)(captions, args.num, load)
    rows = make_rows(args, load, out, [prompt.text for prompt in prompts])
    call = {"guidance_scale": GUIDANCE[args.model]}
    names = [name for name in rows if name == "whole" or not args.rows or name.startswith(tuple(args.rows))]
    table = ev.compare(
        {
            name: ev.Subject(partial(attached, *rows[name][:2]), call | {"num_inference_steps": rows[name][2]})
            for name in names
        },
        prompts,
        out,
        extractors=[ev.emoji_clip()],
        reference="twemoji",
        measures=["fd", "clip_distance", "psnr", *(["latent_mse"] if args.model == "unet" else [])],
        timing=None,
        title=f"{args.model}: {STEPS} steps, guidance {GUIDANCE[args.model]:g}, {len(prompts)} pictures",
    )
    if table is None or args.rows:
        return
    timed = times(
        {name: rows[name] for name in names}, [prompts[i * len(prompts) // args.timed] for i in range(args.timed)], call
    )
    text = ev.markdown(table) + "\n" + tests(out, names, tested, captions) + "\n" + times_table(timed, args.timed)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    save_text(text, RESULTS / f"policies_{args.model}.md")
    grid(out, names, RESULTS / f"policies_{args.model}_pictures.png")
    plot(out, names, tested, captions, timed, RESULTS / f"policies_{args.model}.png")


# Models


def load_unet() -> Any:
    """`emoji-sd` with our default solver."""
    return _with_solver(zoo.load("emoji-sd"))


def load_dit(folder: Path) -> Any:
    """A DiT of `examples/train_zoo/dit.py`, with the VAE of `emoji-sd`."""
    transformer = DiTTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32).eval()
    labels = json.loads((folder / "model_index.json").read_text())["id2label"]
    pipe = zoo.load("emoji-sd")
    return _with_solver(DiTPipeline(transformer, pipe.vae, pipe.scheduler, labels))


def _with_solver(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffaccel.scheduler("er_ode_1_corrected", pipe, schedule="beta", final="sigma_min")
    return pipe


def attached(load: Callable[[], Any], policy: Callable[[Any], Handle | None]) -> Any:
    """A pipeline with its policy."""
    pipe = load()
    policy(pipe)
    return pipe


# Rows


def make_rows(args: argparse.Namespace, load: Callable[[], Any], out: Path, texts: Sequence[str]) -> dict[str, Row]:
    """All settings, by name; the first is the whole network."""
    rows: dict[str, Row] = {"whole": (load, lambda pipe: None, STEPS)}
    small = load_small(args)
    for fraction in FRACTIONS:
        rows[f"stitch {fraction:.0%}"] = (load, partial(diffaccel.stitch, small=small, fraction=fraction), STEPS)
    fitted = exits(load, out / "exits.safetensors", args.model, texts)
    for target in TARGETS:
        schedule = fitted.schedule(target)
        rows[f"fitted exits {target:.0%}"] = (
            load,
            partial(diffaccel.early_exit, depths=schedule, maps=fitted.maps),
            STEPS,
        )
        print(f"fitted exits {target:.0%}: depths {schedule.depths} of {schedule.layers}")
    if args.trained:
        depths = json.loads((args.trained / "depths.json").read_text())["depths"]
        print(f"trained exits: depths {depths}")
        trained = partial(load_trained, load, args.trained)
        rows["trained exits"] = (trained, partial(diffaccel.early_exit, depths=depths), STEPS)
    for steps in FEWER:
        rows[f"{steps} steps"] = (load, lambda pipe: None, steps)
    return rows


def load_small(args: argparse.Namespace) -> Any:
    """The partner for the first steps."""
    if args.model == "dit":
        return load_dit(args.weights / "emoji-dit-s").transformer
    return zoo.load("emoji-sd-small")


def load_trained(load: Callable[[], Any], folder: Path) -> Any:
    """The pipeline with the network that was trained for its exits."""
    pipe = load()
    if isinstance(pipe, StableDiffusionPipeline):
        pipe.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32).eval()
    else:
        pipe.transformer = DiTTransformer2DModel.from_pretrained(
            folder, subfolder="transformer", torch_dtype=torch.float32
        ).eval()
    return pipe


def exits(load: Callable[[], Any], file: Path, model: str, texts: Sequence[str]) -> FittedExits:
    """Affine exits, fitted on 16 prompts and measured on 16 others with other noise; kept in a file."""
    if not file.exists():
        few = [texts[i * len(texts) // 32] for i in range(32)]
        prompts: list[Any] = list(few) if model == "unet" else list(map(int, few))
        fit_exits(load(), prompts, steps=STEPS, guidance_scale=GUIDANCE[model], seed=10_000).save(file)
    return FittedExits.load(file)


def spread_captions(captions: list[ev.Prompt], count: int, load: Any) -> tuple[list[ev.Prompt], list[int]]:
    """Captions from the whole list, evenly, and their places in it."""
    count = min(count, len(captions))
    places = [i * len(captions) // count for i in range(count)]
    return [captions[i] for i in places], places


def spread_classes(captions: list[ev.Prompt], count: int, load: Any) -> tuple[list[ev.Prompt], list[int]]:
    """Class numbers, evenly, and the places of their captions in the list."""
    by_name = {caption.text.split(",")[0]: i for i, caption in enumerate(captions)}
    names = load().labels  # name -> class
    known = sorted((number, by_name[name]) for name, number in names.items() if name in by_name)
    count = min(count, len(known))
    chosen = [known[i * len(known) // count] for i in range(count)]
    return [ev.Prompt(str(number), str(number)) for number, _ in chosen], [place for _, place in chosen]


# Tests


def scores(out: Path, name: str, tested: list[int], captions: list[ev.Prompt]) -> dict[str, np.ndarray]:
    """Cosine of every picture of a row to its caption and to its true picture."""
    clip = ev.emoji_clip()
    assert clip.text is not None
    found = torch.from_numpy(ev.extract(out / "runs" / folder_name(name), clip, progress=False)["features"])
    true = ev.load_reference("twemoji", clip).features
    assert true is not None
    targets = {
        "caption": clip.text([captions[i].text for i in tested]),
        "truth": torch.from_numpy(true["features"][tested]),
    }
    return {
        key: torch.nn.functional.cosine_similarity(found.double(), torch.as_tensor(value).double()).numpy()
        for key, value in targets.items()
    }


def difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean of a - b over the pairs, and half of its 95 % interval (normal: one pair a caption, 1,000 of them)."""
    d = a - b
    return float(d.mean()), float(1.96 * d.std(ddof=1) / np.sqrt(len(d)))


def tests(out: Path, names: list[str], tested: list[int], captions: list[ev.Prompt]) -> str:
    """The paired tests as a table."""
    whole = scores(out, "whole", tested, captions)
    means = ", ".join(f"{key} {value.mean():.4f}" for key, value in whole.items())
    lines = [
        f"Paired test on {len(tested)} pictures: mean difference to the whole network's ({means}), 95 % interval;",
        "bold where it excludes 0.",
        "",
        "| row | cosine to the caption | cosine to the true picture |",
        "|---|--:|--:|",
    ]
    for name in names[1:]:
        cells = []
        for key, value in scores(out, name, tested, captions).items():
            mean, half = difference(value, whole[key])
            text = f"{mean:+.4f} ± {half:.4f}"
            cells.append(f"**{text}**" if abs(mean) > half else text)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# Times


def times(rows: dict[str, Row], prompts: Sequence[ev.Prompt], call: dict[str, Any]) -> dict[str, Point]:
    """Rows with the same pipeline and number of steps, in turn, picture after picture."""
    load = rows["whole"][0]
    pipe = load()
    texts: list[Any] = [int(p.text) if isinstance(pipe, DiTPipeline) else p.text for p in prompts]
    policies: dict[str, Callable[[], Handle | None]] = {"whole": lambda: attach(pipe, Stitch(()), {})}  # counted
    for name, (other, policy, steps) in rows.items():
        if other is load and steps == STEPS and name != "whole":
            policies[name] = partial(policy, pipe)
        if name == "trained exits":  # other weights of the same shapes: they cost the same
            policies[name] = partial(policy, pipe)
    result = frontier(pipe, policies, texts, num_inference_steps=STEPS, **call)
    return {point.name: point for point in result.points}


def times_table(points: dict[str, Point], count: int) -> str:
    """MACs and times as a table."""
    lines = [
        f"MACs and time (with the VAE) of a picture, as shares of the whole network's; {count} pictures in turn,",
        f"median (20th, 80th percentile), {torch.get_num_threads()} thread(s) of {processor()}:",
        "",
        "| row | GMACs | share | time |",
        "|---|--:|--:|--:|",
    ]
    for name, p in points.items():
        lines.append(f"| {name} | {p.macs / 1e9:.2f} | {p.share:.3f} | {p.time:.2f} ({p.low:.2f}, {p.high:.2f}) |")
    return "\n".join(lines) + "\n"


def grid(out: Path, names: list[str], file: Path, columns: int = 12) -> None:
    """A row of pictures for each setting."""
    files = {name: sorted((out / "runs" / folder_name(name)).rglob("*.png")) for name in names}
    count = len(files["whole"])
    places = [(2 * i + 1) * count // (2 * columns) for i in range(columns)]
    pictures = [[Image.open(files[name][i]) for i in places] for name in names]
    save_picture(labelled_grid(pictures, names, [""] * columns, cell=64), file)


def plot(
    out: Path, names: list[str], tested: list[int], captions: list[ev.Prompt], timed: dict[str, Point], file: Path
) -> None:
    """Loss of score with its interval against the share of MACs."""
    from matplotlib.figure import Figure

    whole = scores(out, "whole", tested, captions)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    shares = {name: point.share for name, point in timed.items()}
    shares |= {name: int(name.split()[0]) / STEPS for name in names if name.endswith("steps")}
    kinds = {"stitch": "T-Stitch", "fitted": "fitted exits", "trained": "trained exits", "steps": "fewer steps"}
    for axes, key in zip(figure.subplots(1, 2), whole, strict=True):
        for kind, label in kinds.items():
            points = [
                (shares[name], *difference(scores(out, name, tested, captions)[key], whole[key]))
                for name in names
                if kind in (name.split()[0], name.split()[-1])
            ]
            if points:
                x, y, half = zip(*sorted(points), strict=True)
                axes.errorbar(x, y, half, fmt="o-", capsize=3, label=label)
        axes.axhline(0, color="grey", lw=0.8)
        axes.set(xlabel="MACs, share of the whole network's", ylabel=f"cosine to the {key}, difference to the whole")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
