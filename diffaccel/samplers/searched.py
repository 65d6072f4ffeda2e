"""Schedulers that run what a search found: recipes, and DC-Solver with its ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from diffaccel.samplers.compensation import CascadePolynomial, compensation
from diffaccel.samplers.grid import TimeGrid
from diffaccel.samplers.named import UniPCScheduler
from diffaccel.samplers.non_stationary import NonStationary
from diffaccel.samplers.options import solver_with
from diffaccel.samplers.plan import Layout, Step
from diffaccel.samplers.row import Row, rescale
from diffaccel.samplers.scheduler import SEARCHED, SolverScheduler
from diffaccel.samplers.solver import Multistep, Node, Singlestep
from diffaccel.samplers.tabulate import tabulate


class _Tabled(SolverScheduler):
    """A scheduler whose weights are a table, made for the grid of a run."""

    def make_solver(self) -> Multistep | Singlestep:
        """None is known before the number of steps is."""
        return NonStationary(((0.0, 1.0),))

    def _options(self) -> dict[str, Any]:
        """Those that any scheduler has."""
        return {key: value for key, value in super()._options().items() if key not in SEARCHED}

    def _option(self, name: str) -> Any:
        return super()._options().get(name)

    def _rows_on(self, grid: TimeGrid) -> tuple[tuple[float, ...], ...]:
        raise NotImplementedError

    def _use(self, grid: TimeGrid, device: str | torch.device | None = None) -> None:
        self.solver = NonStationary(self._rows_on(grid))
        self._layout = Layout(self.solver.order)
        super()._use(grid, device)

    def _make_plan(self, begin: int) -> list[Step]:
        if begin:
            raise ValueError(
                "a searched sampler is for whole runs from pure noise; for image-to-image use another scheduler, such "
                "as diffaccel.scheduler('dpmpp_2m', pipe)"
            )
        # Straight from the rows: `make_plan` would take a level that stands twice for one node that is called again.
        nodes = [Node(lam, self.schedule) for lam in self.grid.lambdas]
        return [
            Step(self._x0_of(a.lam), (0.0, 1.0), rescale(Row(first, tuple(rest)), a.alpha, b.alpha))
            for a, b, (first, *rest) in zip(nodes[:-1], nodes[1:], self.solver.rows, strict=True)
        ]


class RecipeScheduler(_Tabled):
    """Runs a recipe of `diffaccel.search`: made by `Recipe.scheduler`, and saved whole in the pipeline's config.

    `solver_options["recipe"]` holds one table for each number of steps, of one guidance scale.
    """

    _own_options: ClassVar[tuple[str, ...]] = ("recipe",)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Take the table of `num_inference_steps` network calls.

        Pipelines of flow models pass as many sigmas, and a shift: where the calls are made is the recipe's.

        Raises:
            ValueError: for a number of steps that was not searched, or given timesteps.
        """
        if timesteps is not None or (sigmas is not None and self.schedule.path != "flow"):
            raise ValueError("a recipe has its own timesteps; pass num_inference_steps alone")
        steps = num_inference_steps if sigmas is None else len(sigmas)
        entry = self._entry(steps)
        end = float("inf") if entry["end"] is None else float(entry["end"])
        self._use(TimeGrid((*entry["lambdas"], end), np.asarray(entry["timesteps"], dtype=np.float64)), device)

    def _entry(self, steps: int | None) -> Mapping[str, Any]:
        recipe = self._option("recipe")
        if not recipe:
            raise ValueError("RecipeScheduler has no recipe; make it by Recipe.load(path).scheduler(pipe)")
        known = {len(entry["rows"]): entry for entry in recipe}
        if steps not in known:
            have = " and ".join(map(str, sorted(known)))
            raise ValueError(
                f"this recipe is for {have} steps, not {steps}; diffaccel.search(..., steps={steps}) makes one"
            )
        return known[steps]

    def _rows_on(self, grid: TimeGrid) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(map(float, row)) for row in self._entry(len(grid.timesteps))["rows"])


class DCSolverScheduler(_Tabled, UniPCScheduler):
    """DC-Solver (arXiv:2409.03755): UniPC whose newest prediction is moved along the history, by one ratio a step.

    `solver_options` has one of

    - `ratios`: {steps: list of that many ratios}, from `diffaccel.search(method="dc")`;
    - `cascade`: 36 numbers of a cascade polynomial, or `"sd21"`, the authors' for Stable Diffusion 2.1, with
      `guidance_scale`: ratios for any number of steps and guidance, without a search.

    Without either it is UniPC. The grid is the config's; ratios fit the one that they were searched on: the authors'
    is `timestep_spacing="linspace"` with `final_sigmas_type="sigma_min"`.
    """

    _own_options: ClassVar[tuple[str, ...]] = ("cascade", "ratios", "guidance_scale")

    def make_solver(self) -> Multistep | Singlestep:
        """UniPC as the config has it, that the ratios compensate."""
        return UniPCScheduler.make_solver(self)

    def _rows_on(self, grid: TimeGrid) -> tuple[tuple[float, ...], ...]:
        ratios = self._ratios(len(grid.timesteps))
        refine = compensation(ratios) if ratios else None
        start = self._options().get("start", "euler")
        return tabulate(self.schedule, grid, self._base(), start=start, refine=refine).rows

    def _base(self) -> Multistep | Singlestep:
        return solver_with(self.make_solver(), self._options())

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """As any scheduler's; its grid is made for UniPC, not for the table of the run before."""
        self.solver = self._base()
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas, mu)

    def _ratios(self, steps: int) -> Sequence[float] | None:
        ratios, cascade, scale = (self._option(name) for name in ("ratios", "cascade", "guidance_scale"))
        if ratios is not None:
            found = {int(n): values for n, values in ratios.items()}
            if steps not in found:
                raise ValueError(
                    f"there are ratios for {sorted(found)} steps, not {steps}; search them, or fit a cascade"
                )
            if len(found[steps]) != steps:
                raise ValueError(f"a run of {steps} steps takes {steps} ratios, not {len(found[steps])}")
            return found[steps]
        if cascade is None:
            return None
        if scale is None:
            raise ValueError(
                "a cascade gives ratios for a guidance scale; add it: solver_options={'guidance_scale': 7.5, ...}"
            )
        return CascadePolynomial.named(cascade).ratios(steps, float(scale))
