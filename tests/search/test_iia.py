"""IIA: planted coefficients come back, and the fit is numpy's least squares over all pairs and numbers."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from diffaccel.samplers.grid import time_grid
from diffaccel.samplers.search.iia import iia
from diffaccel.samplers.search.reference import Trajectory, reference
from diffaccel.samplers.search.rollout import errors, rollout
from diffaccel.samplers.solvers import SOLVERS
from diffaccel.samplers.tabulate import tabulate
from tests import tiny
from tests.search.problems import SCHEDULES, mixture

STEPS = 5


def added(terms, i, ys, x0s, lambdas):
    """What step i may add, in y: written from the paper, newest last."""
    epsilon = [(y - x0) * np.exp(lam) for y, x0, lam in zip(ys, x0s, lambdas, strict=False)]
    if terms == "epsilon":
        return [epsilon[i]]
    if terms == "differences":
        return [x0s[i] - x0s[i - 1], epsilon[i] - epsilon[i - 1]] if i else []
    return [ys[i], *x0s]


def fitted(problem, grid, terms, weigh):
    """A run of DDIM in y whose step i adds terms with the weights `weigh(i, terms, landed)`; its nodes and weights."""
    schedule, lambdas = problem.schedule, grid.lambdas
    alphas = [schedule.alpha_sigma(lam)[0] for lam in lambdas]
    ys, x0s, found = [problem.noise / alphas[0]], [], []
    for i in range(len(grid.timesteps)):
        x0s.append(problem.denoise(alphas[i] * ys[i], lambdas[i], float(grid.timesteps[i])))
        kept = np.exp(lambdas[i] - lambdas[i + 1])
        columns = added(terms, i, ys, x0s, lambdas)
        landed = kept * ys[i] + (1 - kept) * x0s[i]
        found.append(weigh(i, columns, landed))
        ys.append(landed + sum((w * c for w, c in zip(found[-1], columns, strict=True)), torch.zeros_like(landed)))
    return [a * y for a, y in zip(alphas, ys, strict=True)], x0s, found


def planted(problem, grid, terms, size=0.05):
    rng = np.random.default_rng(1)

    def weigh(i, columns, landed):
        # as large as the noise of the step: those of the samples would leave the levels
        return [size * float(rng.normal()) * float(landed.norm() / c.norm()) for c in columns]

    x, x0, weights = fitted(problem, grid, terms, weigh)
    trajectory = Trajectory(
        problem.schedule, np.array(grid.lambdas[:-1]), torch.stack(x[:-1]), torch.stack([*x0[:-1], x[-1]])
    )
    return trajectory, weights


@pytest.mark.parametrize("path", SCHEDULES)
@pytest.mark.parametrize("terms", ["differences", "epsilon", "all"])
def test_recovers_planted_coefficients(terms, path):
    problem = mixture(SCHEDULES[path], 16)
    grid = time_grid(problem.schedule, STEPS, "logsnr")
    trajectory, weights = planted(problem, grid, terms)
    found = iia(problem, trajectory, STEPS, terms=terms, progress=False)
    plain = tabulate(problem.schedule, grid, SOLVERS["ddim"])
    before, after = (float(errors(problem, table, trajectory).mean()) for table in (plain, found.table))
    assert after < 1e-4 * before
    if terms != "all":  # the predictions of neighbouring steps are much alike: other weights do nearly the same
        # The first step is DDIM's own, and over such a step both differences are one: many weights do the same.
        for i in range(2 if terms == "differences" else 0, STEPS):
            np.testing.assert_allclose(found.notes["coefficients"][i], weights[i], rtol=0.02, err_msg=str(i))


@pytest.mark.parametrize("path", SCHEDULES)
@pytest.mark.parametrize("target", ["trajectory", "substeps"])
@pytest.mark.parametrize("terms", ["differences", "epsilon", "all"])
def test_it_is_least_squares_over_everything(terms, target, path, monkeypatch):
    """Without the ridge, but for what keeps columns that are one apart."""
    monkeypatch.setattr("diffaccel.samplers.search.iia.RIDGE", 1e-12)
    problem = mixture(SCHEDULES[path], 16)
    trajectory = reference(problem, 60, progress=False)
    steps = 3 if terms == "all" else STEPS  # of many predictions some are too much alike for the normal equations
    grid = time_grid(problem.schedule, steps, "logsnr")
    schedule = problem.schedule

    def finer(i, x):
        """Ten DDIM steps of equal length in log-SNR; to sigma = 0 the last of them is that to zero."""
        end = grid.lambdas[i + 1]
        alpha = schedule.alpha_sigma(grid.lambdas[i])[0]
        last = end if np.isfinite(end) else schedule.lambda_min_noise
        levels = np.linspace(grid.lambdas[i], last, 11)
        y = x / alpha
        for here, there in pairwise(levels):
            if here < there:
                kept = np.exp(here - there)
                y = kept * y + (1 - kept) * problem.denoise(schedule.alpha_sigma(here)[0] * y, here)
        return y if np.isfinite(end) else problem.denoise(schedule.alpha_sigma(last)[0] * y, last)

    def weigh(i, columns, landed):
        if not columns:
            return []
        # the sample where the step began, from where it landed
        kept = np.exp(grid.lambdas[i] - grid.lambdas[i + 1])
        y = (landed - (1 - kept) * seen[-1][1]) / kept if kept else seen[-1][0]
        alpha = schedule.alpha_sigma(grid.lambdas[i])[0]
        end = grid.lambdas[i + 1]
        wanted = finer(i, alpha * y) if target == "substeps" else trajectory.at(end) / schedule.alpha_sigma(end)[0]
        matrix = torch.stack([c.flatten() for c in columns], 1).numpy()
        scale = np.linalg.norm(matrix, axis=0)
        return (np.linalg.lstsq(matrix / scale, (wanted - landed).flatten().numpy(), rcond=1e-12)[0] / scale).tolist()

    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    plain = problem.function

    def listening(x, lam, time, rows):
        out = plain(x, lam, time, rows)
        alpha = schedule.alpha_sigma(float(lam[0]))[0]
        if len(seen) < steps and float(lam[0]) == grid.lambdas[len(seen)]:
            seen.append((x / alpha, out))
        return out

    problem.function = listening
    x, _, _ = fitted(problem, grid, terms, weigh)
    problem.function = plain
    found = iia(problem, trajectory, steps, terms=terms, target=target, progress=False)
    ours = float(errors(problem, found.table, trajectory).mean())
    theirs = float((x[-1] - trajectory.end).square().mean())
    assert ours == pytest.approx(theirs, rel=0.02)
    assert tiny.relative(rollout(problem, found.table), x[-1]) < 0.01


@pytest.mark.parametrize("terms", ["differences", "epsilon", "all"])
def test_held_out_pairs_gain_too(terms):
    """On pairs that were not fitted the errors fall against DDIM's on the same grid."""
    problem = mixture(SCHEDULES["vp"], 32)
    trajectory = reference(problem, 60, progress=False)
    fit, held = slice(0, 16), slice(16, 32)
    found = iia(problem.part(fit), trajectory.part(fit), STEPS, terms=terms, progress=False)
    plain = tabulate(problem.schedule, found.table.grid, SOLVERS["ddim"])
    before, after = (
        float(errors(problem.part(held), table, trajectory.part(held)).mean()) for table in (plain, found.table)
    )
    assert after < 0.9 * before


def test_any_multistep_solver_can_be_mended():
    problem = mixture(SCHEDULES["vp"], 16)
    trajectory = reference(problem, 60, progress=False)
    grid = time_grid(problem.schedule, STEPS, "beta", final="sigma_min")
    solver = SOLVERS["unipc"]
    found = iia(problem, trajectory, STEPS, solver=solver, grid=grid, progress=False)
    assert found.table.grid is grid
    end = trajectory.at(grid.lambdas[-1])
    before, after = (
        float((rollout(problem, table) - end).square().mean())
        for table in (tabulate(problem.schedule, grid, solver), found.table)
    )
    assert after < before


def test_beats_random_coefficients_at_equal_calls():
    problem = mixture(SCHEDULES["vp"])
    trajectory = reference(problem, 60, progress=False)
    grid = time_grid(problem.schedule, STEPS, "logsnr")
    problem.spent = 0
    found = iia(problem, trajectory, STEPS, target="substeps", progress=False)
    runs, rng, best = problem.spent // (STEPS * len(problem)), np.random.default_rng(0), []
    assert runs >= 10
    for _ in range(10):
        tried = []
        for _ in range(runs):
            x, _, _ = fitted(
                problem, grid, "differences", lambda i, columns, landed: rng.normal(0, 0.2, len(columns)).tolist()
            )
            tried.append(float((x[-1] - trajectory.end).square().mean()))
        best.append(min(tried))
    assert float(errors(problem, found.table, trajectory).mean()) < np.median(best)


def test_the_reference_costs_no_calls():
    problem = mixture(SCHEDULES["vp"], 4)
    trajectory = reference(problem, 20, progress=False)
    problem.spent = 0
    found = iia(problem, trajectory, STEPS, progress=False)
    assert problem.spent == 4 * STEPS
    assert [len(c) for c in found.notes["coefficients"]] == [0, 2, 2, 2, 2]
    assert found.notes["terms"] == "differences"


def test_grids_that_call_twice_are_refused():
    problem = mixture(SCHEDULES["vp"], 2)
    trajectory = reference(problem, 20, progress=False)
    grid = time_grid(problem.schedule, 5, "beta", final="corrector")
    with pytest.raises(ValueError, match="one call at each node"):
        iia(problem, trajectory, 5, grid=grid, progress=False)
