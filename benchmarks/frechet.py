"""Frechet distance at d = 2048: ours beside SciPy's matrix square root and eigenvalues of the product, in one run.

`python benchmarks/frechet.py` writes results/frechet.md, in some 5 minutes on two quiet cores.

The second covariance is S2 = M S1 M with a symmetric positive M that does not commute with S1. Then the trace of
(S1 S2)^(1/2) is that of M S1, and the distance |(1 - M) F|^2 for any factor S1 = F F^T: every error below is against
that number, computed without cancellation.
"""

from __future__ import annotations

import argparse
import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "2"  # read when NumPy, SciPy, torch are imported

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch

from diffaccel.cost import processor
from diffaccel.eval.statistics.frechet import frechet
from diffaccel.eval.statistics.moments import Array, Moments
from diffaccel.pictures import save_text

THREADS = 2
HERE = Path(__file__).parent
OURS = "ours"


@dataclass(frozen=True, eq=False)
class Case:
    """Two sets of features, or two populations, with their true distance.

    `sides` is what ours is given: features where there are fewer pictures than features, else moments. The others
    take means and covariances, as they do everywhere.
    """

    name: str
    sides: tuple[Array, Array] | tuple[Moments, Moments]
    moments: tuple[Moments, Moments]
    truth: float


@dataclass(frozen=True)
class Result:
    """Seconds of wall clock and of all cores, and the error of the distance."""

    wall: float
    cpu: float
    error: float


def main(argv: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    torch.set_num_threads(THREADS)
    load = os.getloadavg()[0]
    results = {case: measured(case, args.repetitions) for case in cases(args.dim)}
    text = report(results, args.dim, args.repetitions, load)
    save_text(text, args.output / "frechet.md")
    print(text)
    return text


def cases(d: int) -> list[Case]:
    """Full rank with a spectrum as features have it, full rank and ill-conditioned, and few pictures."""
    rng = np.random.default_rng(0)
    q, v = (np.linalg.qr(rng.standard_normal((d, d)))[0] for _ in range(2))
    m = (v * np.linspace(0.5, 1.5, d)) @ v.T
    found = []
    for name, spectrum in (
        ("full rank, eigenvalues k^-1.5", np.arange(1, d + 1) ** -1.5),
        ("full rank, condition 1e11", np.geomspace(1, 1e-11, d)),
    ):
        factor = q * np.sqrt(spectrum)
        pair = (population(factor), population(m @ factor))
        found.append(Case(name, pair, pair, float(np.square(factor - m @ factor).sum())))
    n = d * 1000 // 2048
    x = rng.standard_normal((n, d)) @ (q * np.arange(1, d + 1) ** -0.75).T
    x -= x.mean(0)
    features = (x, x @ m)
    truth = float(np.square(x - x @ m).sum() / (n - 1))
    found.append(Case(f"N = {n} < d", features, (Moments.of(x), Moments.of(x @ m)), truth))
    return found


def population(factor: Array) -> Moments:
    n = 50_000
    return Moments(n, np.zeros(len(factor)), factor @ factor.T * (n - 1))


def by_sqrtm(a: Array, b: Array) -> float:
    """Trace of the square root as clean-fid, pytorch-fid and EDM take it."""
    root: Any = scipy.linalg.sqrtm(a @ b)
    return float(np.trace(root).real)


def by_numpy(a: Array, b: Array) -> float:
    """The same from eigenvalues, as torch-fidelity takes it."""
    roots: Any = np.sqrt(np.linalg.eigvals(a @ b).astype(np.complex128))
    return float(roots.real.sum())


def by_torch(a: Array, b: Array) -> float:
    """The same from eigenvalues, as torchmetrics takes it."""
    return float(torch.linalg.eigvals(torch.from_numpy(a) @ torch.from_numpy(b)).sqrt().real.sum())


OTHERS: dict[str, Callable[[Array, Array], float]] = {
    "scipy.linalg.sqrtm (clean-fid, pytorch-fid, EDM)": by_sqrtm,
    "numpy.linalg.eigvals (torch-fidelity)": by_numpy,
    "torch.linalg.eigvals (torchmetrics)": by_torch,
}


def measured(case: Case, repetitions: int) -> dict[str, Result]:
    """All methods in turn, so that they see the same machine; of each the fastest repetition."""
    a, b = (side.covariance() for side in case.moments)
    difference = case.moments[0].mean - case.moments[1].mean
    rest = float(difference @ difference + np.trace(a) + np.trace(b))

    def distance(trace: Callable[[Array, Array], float]) -> Callable[[], float]:
        return lambda: rest - 2 * trace(a, b)

    methods = {name: distance(trace) for name, trace in OTHERS.items()}
    methods[OURS] = lambda: frechet(*case.sides)
    runs: dict[str, list[Result]] = {name: [] for name in methods}
    for _ in range(repetitions):
        for name, method in methods.items():
            wall, cpu = time.perf_counter(), time.process_time()
            value = method()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            runs[name].append(Result(wall, cpu, value - case.truth))
    return {name: min(results, key=lambda result: result.wall) for name, results in runs.items()}


def report(results: dict[Case, dict[str, Result]], d: int, repetitions: int, load: float) -> str:
    """The tables as Markdown."""
    packages = ", ".join(f"{p} {version(p)}" for p in ("diffaccel", "numpy", "scipy", "torch"))
    sections = "\n\n".join(
        f"## {case.name}\n\nTrue distance {case.truth:.6g}.\n\n{_table(rows)}" for case, rows in results.items()
    )
    return f"""# Frechet distance at d = {d}

- {THREADS} threads of {processor()}, load {load:.1f} on {os.cpu_count()} cores when it began.
  {packages}, Python {platform.python_version()}.
- Seconds from means and covariances to the distance; where N < d, ours starts from the features, which it needs for its
  exact path, and the others still from covariances. Methods in turn, the fastest of {repetitions} runs.
- Errors are against the closed form for covariances that do not commute (see the script). The covariances are rounded
  themselves.

{sections}
"""


def _table(rows: dict[str, Result]) -> str:
    ours = rows[OURS]
    lines = ["| method | wall s | CPU s | x ours | error |", "| --- | --- | --- | --- | --- |"]
    for name, row in rows.items():
        lines.append(f"| {name} | {row.wall:.2f} | {row.cpu:.2f} | {row.wall / ours.wall:.1f} | {row.error:.1e} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
