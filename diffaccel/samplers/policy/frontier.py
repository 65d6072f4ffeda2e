"""Quality against cost: the same pictures with more and more of the steps made by a smaller network."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from PIL import Image

from diffaccel.cost import drain
from diffaccel.pictures import labelled_grid, save_picture, save_text
from diffaccel.pruning.calibration import named
from diffaccel.samplers.policy.attach import Handle, attach
from diffaccel.samplers.policy.stitch import Stitch, check_numbers, small_networks

Score = Callable[[Sequence[Image.Image], Sequence[Any]], Sequence[float]]
_SHOWN = 10  # pictures of each row that are kept for the grid


@dataclass(frozen=True)
class Point:
    """One setting.

    Attributes:
        name: of the row.
        time: seconds of a picture as a share of the first row's, median over prompts, both drawn one after the other.
        low: 20th percentile of these shares.
        high: 80th percentile.
        seconds: median of a picture, whole pipeline.
        macs: multiply-accumulates of the networks, per picture; 0 for a row without a policy.
        share: of the first row's, where they are known.
        psnr: dB of every picture against the first row's; infinite if equal.
        score: of every picture, if a score was given.
    """

    name: str
    time: float
    low: float
    high: float
    seconds: float
    macs: float
    share: float
    psnr: tuple[float, ...]
    score: tuple[float, ...] = ()


@dataclass(frozen=True)
class Frontier:
    """All settings, the first of which is what the others are compared with.

    Attributes:
        points: one for each setting.
        pictures: the first pictures of each, for the grid.
        prompts: of these pictures.
    """

    points: tuple[Point, ...]
    pictures: tuple[tuple[Image.Image, ...], ...]
    prompts: tuple[Any, ...]

    def markdown(self) -> str:
        """A table."""
        scored = bool(self.points[0].score)
        lines = [
            "| | MACs | time | (20th, 80th percentile) | PSNR, dB |" + (" score |" if scored else ""),
            "|---|--:|--:|--:|--:|" + ("--:|" if scored else ""),
        ]
        for p in self.points:
            line = f"| {p.name} | {p.share:.3f} | {p.time:.2f} | ({p.low:.2f}, {p.high:.2f}) | {median(p.psnr):.1f} |"
            lines.append(line + (f" {np.mean(p.score):.4f} |" if scored else ""))
        return "\n".join(lines) + "\n"

    def save(self, folder: str | Path) -> list[Path]:
        """Write `frontier.md`, `frontier.json`, `pictures.png` and, where matplotlib is there, `frontier.png`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / name for name in ("frontier.md", "frontier.json", "pictures.png")]
        save_text(self.markdown(), written[0])
        # JSON has neither infinity (equal pictures) nor NaN (the share where nothing was counted)
        rows = [asdict(p) | {"psnr": [_number(x) for x in p.psnr], "share": _number(p.share)} for p in self.points]
        save_text(json.dumps({"prompts": list(map(str, self.prompts)), "points": rows}, indent=1), written[1])
        labels = [f"{p.name}\n{p.time:.2f} of the time" for p in self.points]
        save_picture(labelled_grid(self.pictures, labels, [""] * len(self.prompts), cell=96), written[2])
        if find_spec("matplotlib"):
            written.append(self.plot(folder / "frontier.png"))
        return written

    def plot(self, path: str | Path) -> Path:
        """Draw quality against time.

        Raises:
            ImportError: without matplotlib.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("the plot needs matplotlib; pip install matplotlib") from None
        scored = bool(self.points[0].score)
        figure = Figure(figsize=(10 if scored else 5.5, 4), layout="constrained")
        axes = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]
        drawn = [p for p in self.points if np.isfinite(median(p.psnr))]
        counted = all(np.isfinite(p.share) for p in self.points)  # MACs are steadier than times of a few pictures
        unit = "MACs" if counted else "time"
        _curve(axes[0], [(_cost(p), median(p.psnr), p.name) for p in drawn], "PSNR to the first row, dB (median)", unit)
        if scored:
            _curve(axes[1], [(_cost(p), float(np.mean(p.score)), p.name) for p in self.points], "score (mean)", unit)
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        figure.savefig(partial, format="png", dpi=110)
        partial.replace(path)
        return path


def stitch_frontier(
    pipe: Any,
    small: Any,
    prompts: Sequence[Any],
    *,
    fractions: Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    score: Score | None = None,
    seed: int = 0,
    **call: Any,
) -> Frontier:
    """Draw the same pictures with more and more small steps, and measure them: where to stop?

    `diffaccel.stitch_frontier(pipe, small, prompts, num_inference_steps=20).save("frontier")`.

    Args:
        pipe: see `stitch`; without a policy.
        small: one network or pipeline, see `stitch`.
        prompts: texts, class numbers, or mappings of arguments of the pipeline.
        fractions: shares of the steps, the first of which the others are compared with.
        score: of pictures for their prompts, higher is better (CLIP score); what it measures is its author's business.
        seed: of the first prompt's noise; prompt i has `seed + i` in every row.
        call: further arguments of the pipeline.

    Raises:
        ValueError, TypeError: see `stitch` and `frontier`.
    """
    networks = small_networks(pipe, small)
    if len(networks) > 1:
        raise ValueError("a frontier is over the share of one small network; give one")
    for share in fractions:
        check_numbers(1, (float(share),), ())
    rows = {f"{100 * share:g}% small": lambda share=share: _stitched(pipe, networks, share) for share in fractions}
    return frontier(pipe, rows, prompts, score=score, seed=seed, **call)


def frontier(
    pipe: Any,
    rows: Mapping[str, Callable[[], Handle | None]],
    prompts: Sequence[Any],
    *,
    score: Score | None = None,
    seed: int = 0,
    **call: Any,
) -> Frontier:
    """The same pictures under several policies; each prompt is drawn in all rows before the next one.

    Args:
        pipe: a pipeline without a policy.
        rows: name -> what attaches a policy; the first row is what the others are compared with. A row that returns
            None has none, and its multiply-accumulates are not counted.
        prompts: see `stitch_frontier`.
        score: likewise.
        seed: likewise.
        call: further arguments of the pipeline.

    Raises:
        ValueError: without prompts or rows.
    """
    if not rows or not prompts or isinstance(prompts, str):
        raise ValueError("a frontier needs rows and a list of prompts")
    first = next(iter(rows))
    for policy in rows.values():  # kernels, memory and the places of weights are settled when the clock starts
        _draw(pipe, policy, prompts[0], seed, call)
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    psnr: dict[str, list[float]] = {name: [] for name in rows}
    scores: dict[str, list[float]] = {name: [] for name in rows}
    shown: dict[str, list[Image.Image]] = {name: [] for name in rows}
    macs: dict[str, float] = {}
    for i, prompt in enumerate(logging.tqdm(prompts, desc="frontier")):
        pictures = {}
        for name, policy in rows.items():
            pictures[name], taken, cost = _draw(pipe, policy, prompt, seed + i, call, count=name not in macs)
            seconds[name].append(taken)
            macs.setdefault(name, cost)
        for name, picture in pictures.items():
            psnr[name].append(_psnr(picture, pictures[first]))
            scores[name] += list(score([picture], [prompt])) if score else []
            shown[name] += [picture] if i < _SHOWN else []
    points = []
    for name in rows:
        shares = [taken / base for taken, base in zip(seconds[name], seconds[first], strict=True)]
        cuts = quantiles(shares, n=5, method="inclusive") if len(shares) > 1 else shares * 4
        share = macs[name] / macs[first] if macs[first] else float("nan")
        numbers = (median(shares), cuts[0], cuts[3], median(seconds[name]), macs[name], share)
        points.append(Point(name, *numbers, tuple(psnr[name]), tuple(scores[name])))
    return Frontier(tuple(points), tuple(map(tuple, shown.values())), tuple(prompts[:_SHOWN]))


def _stitched(pipe: Any, networks: Mapping[str, Any], share: float) -> Handle:
    return attach(pipe, Stitch(tuple(networks), (share,)), networks)


def _draw(
    pipe: Any,
    policy: Callable[[], Handle | None],
    prompt: Any,
    seed: int,
    call: Mapping[str, Any],
    count: bool = False,
) -> tuple[Image.Image, float, float]:
    """Picture, seconds, and multiply-accumulates if they are to be counted."""
    handle = policy()
    try:
        drain()
        begin = time.perf_counter()
        picture = pipe(**{"generator": torch.Generator("cpu").manual_seed(seed), **call, **named(prompt)}).images[0]
        drain()
        seconds = time.perf_counter() - begin
        return picture, seconds, handle.report().macs if handle and count else 0.0
    finally:
        if handle:
            handle.remove()


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _psnr(a: Image.Image, b: Image.Image) -> float:
    error = np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def _cost(point: Point) -> float:
    return point.share if np.isfinite(point.share) else point.time


def _curve(axes: Any, points: Sequence[tuple[float, float, str]], title: str, unit: str) -> None:
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-")
    for x, y, name in points:
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axes.set(xlabel=f"{unit} of a picture, share of the first row's", ylabel=title)
    axes.margins(x=0.15)  # room for the last name
    axes.grid(alpha=0.3)
