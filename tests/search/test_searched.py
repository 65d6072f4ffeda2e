"""RecipeScheduler and DCSolverScheduler inside stock pipelines, in saved ones, and on the way back to others."""

import copy

import diffusers
import numpy as np
import pytest
import torch

import diffaccel
from diffaccel import DCSolverScheduler, DPMSolverScheduler, RecipeScheduler, UniPCScheduler
from diffaccel.samplers.compensation import CascadePolynomial, compensation
from diffaccel.samplers.grid import time_grid
from diffaccel.samplers.search.recipe import Entry, Recipe, network_facts
from diffaccel.samplers.solvers import SOLVERS
from diffaccel.samplers.tabulate import Table, grid_of, tabulate
from tests import tiny
from tests.eval import toy

KINDS = ["sd", "sdxl", "sd3", "flux", "pixart", "dit", "sana", "playground"]
RATIOS = [1.0, 1.0, 0.8, 1.1, 0.95]


def recipe_of(pipe, steps=(4,), scale=3.0, bend=1.05):
    """A recipe that no solver of ours is: weights of DPM-Solver++ with its predictions weighed differently."""
    entries = []
    for n in steps:
        schedule = diffaccel.SolverScheduler.from_config(pipe.scheduler.config).schedule
        table = tabulate(schedule, time_grid(schedule, n, "beta"), SOLVERS["dpmpp_2m"])
        rows = tuple((first, *(w * bend for w in rest)) for first, *rest in table.rows)
        table = Table(grid_of(schedule, table.lambdas[:-1]), rows)
        entries.append(Entry.of(table, "auto", scale, measured={"ratio": [1, 2]}, notes={"history": [["a", 0.5]]}))
    return Recipe(network_facts(pipe), tuple(entries))


@pytest.mark.parametrize("kind", KINDS)
def test_stock_pipelines_run_recipes(kind):
    """Flow pipelines pass sigmas and a shift of their own; where the calls are made is the recipe's."""
    pipe, call = getattr(tiny, kind)()
    recipe = recipe_of(pipe)
    scheduler = recipe.scheduler(pipe)
    heard = []
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    handle = network.register_forward_pre_hook(lambda module, args, kwargs: heard.append(1), with_kwargs=True)
    try:
        picture = tiny.draw((pipe, call), scheduler, 4)
    finally:
        handle.remove()
    assert picture.isfinite().all()
    assert len(heard) == 4
    np.testing.assert_allclose(scheduler.timesteps.numpy(), recipe.entries[0].timesteps, rtol=1e-6)
    again = tiny.draw((pipe, call), scheduler, 4)
    assert torch.equal(again, picture)
    plain = tiny.draw((pipe, call), recipe_of(pipe, bend=1.0).scheduler(pipe.scheduler.config), 4)
    assert tiny.relative(plain, picture) > 1e-3


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_a_table_of_a_solver_draws_its_picture(kind):
    pipe, call = getattr(tiny, kind)()
    scheduler = diffaccel.scheduler("er_ode_1_corrected", pipe, schedule="beta")
    wanted = tiny.draw((pipe, call), scheduler, 4)
    table = tabulate(scheduler.schedule, scheduler.grid, scheduler.solver)
    ours = Recipe(network_facts(pipe), (Entry.of(table, "auto", 3.0),)).scheduler(pipe)
    assert tiny.relative(tiny.draw((pipe, call), ours, 4), wanted) < 1e-4


def test_dc_without_ratios_is_unipc():
    pipe, call = tiny.sd()
    config = pipe.scheduler.config
    third = {"order": 3, "second": "bh1"}
    for options in ({}, third, third | {"start": "singlestep"}, {"dual_fast": 0.1}):
        ours, theirs = (c.from_config(config, solver_options=options) for c in (DCSolverScheduler, UniPCScheduler))
        wanted = tiny.draw((pipe, call), theirs, 6)
        for _ in range(2):  # the second run finds what the first left
            assert tiny.relative(tiny.draw((pipe, call), ours, 6), wanted) < 1e-5, options


@pytest.mark.parametrize("kind", ["sd", "sd3", "playground"])
def test_dc_runs_its_ratios(kind):
    """In every pipeline it is the table of UniPC with them; again after a save's JSON, whose keys are texts."""
    pipe, call = getattr(tiny, kind)()
    scheduler = DCSolverScheduler.from_config(pipe.scheduler.config, solver_options={"ratios": {"5": RATIOS}})
    picture = tiny.draw((pipe, call), scheduler, 5)
    base = UniPCScheduler.from_config(pipe.scheduler.config).make_solver()
    table = tabulate(scheduler.schedule, scheduler.grid, base, refine=compensation(RATIOS))
    wanted = Recipe(network_facts(pipe), (Entry.of(table, "dc", 3.0),)).scheduler(pipe)
    assert tiny.relative(picture, tiny.draw((pipe, call), wanted, 5)) < 1e-5
    plain = DCSolverScheduler.from_config(pipe.scheduler.config)
    assert tiny.relative(tiny.draw((pipe, call), plain, 5), picture) > 1e-3


def test_dc_keeps_the_options_of_its_solver():
    """Whatever else `solver_options` change of UniPC counts with ratios too."""
    pipe, _ = tiny.sd()
    options = {"ratios": {5: RATIOS}, "order": 3, "second": "bh1"}
    scheduler = DCSolverScheduler.from_config(pipe.scheduler.config, solver_options=options)
    scheduler.set_timesteps(5)
    base = UniPCScheduler.from_config(pipe.scheduler.config, solver_options={"order": 3, "second": "bh1"}).solver
    table = tabulate(scheduler.schedule, scheduler.grid, base, refine=compensation(RATIOS))
    assert scheduler.solver.rows == table.rows
    scheduler.set_timesteps(5)
    assert scheduler.solver.rows == table.rows


def test_the_cascade_needs_no_search():
    """On the authors' grid, 999 to the least noise trained; any number of steps."""
    pipe, call = tiny.sd()
    scheduler = DCSolverScheduler.from_config(
        pipe.scheduler.config,
        timestep_spacing="linspace",
        final_sigmas_type="sigma_min",
        solver_options={"cascade": "sd21", "guidance_scale": 7.5},
    )
    for n in (5, 8):
        assert tiny.draw((pipe, call), scheduler, n).isfinite().all()
        ratios = CascadePolynomial.named("sd21").ratios(n, 7.5)
        base = UniPCScheduler.from_config(pipe.scheduler.config).solver
        table = tabulate(scheduler.schedule, scheduler.grid, base, refine=compensation(ratios))
        assert scheduler.solver.rows == table.rows
        assert scheduler.timesteps[0] == 999
        assert scheduler.grid.lambdas[-1] == pytest.approx(scheduler.schedule.lambda_min_noise)


@pytest.mark.parametrize(
    ("options", "steps", "sentence"),
    [
        ({"ratios": {5: RATIOS}}, 6, r"ratios for \[5\] steps, not 6"),
        ({"ratios": {5: RATIOS[:4]}}, 5, "5 ratios"),
        ({"cascade": "sd21"}, 5, "a cascade gives ratios for a guidance scale"),
        ({"cascade": "sdxl", "guidance_scale": 5.0}, 5, "unknown cascade 'sdxl'"),
    ],
)
def test_dc_says_what_is_wrong(options, steps, sentence):
    scheduler = DCSolverScheduler(solver_options=options)
    with pytest.raises(ValueError, match=sentence):
        scheduler.set_timesteps(steps)


def test_recipes_say_what_they_are_for():
    pipe, _ = tiny.sd()
    scheduler = recipe_of(pipe, (4, 6)).scheduler(pipe)
    with pytest.raises(ValueError, match=r"this recipe is for 4 and 6 steps, not 5; diffaccel.search\(..., steps=5\)"):
        scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="its own timesteps"):
        scheduler.set_timesteps(timesteps=[900, 300])
    with pytest.raises(ValueError, match="its own timesteps"):
        scheduler.set_timesteps(sigmas=[10.0, 1.0])
    with pytest.raises(ValueError, match="has no recipe"):
        RecipeScheduler().set_timesteps(5)


@pytest.mark.parametrize("kind", ["sd_img2img", "sdxl_img2img", "sd3_img2img", "flux_img2img"])
def test_image_to_image_is_refused(kind):
    pipe, call = getattr(tiny, kind)()
    scheduler = recipe_of(pipe, (5,)).scheduler(pipe)
    with pytest.raises(ValueError, match="whole runs from pure noise; for image-to-image use another scheduler"):
        tiny.draw((pipe, call), scheduler, 5)
    dc = DCSolverScheduler.from_config(pipe.scheduler.config, solver_options={"ratios": {5: RATIOS}})
    with pytest.raises(ValueError, match="whole runs from pure noise"):
        tiny.draw((pipe, call), dc, 5)


def test_the_same_scheduler_serves_another_run_after_a_refusal():
    pipe, call = tiny.sd()
    scheduler = recipe_of(pipe, (4,)).scheduler(pipe)
    wanted = tiny.draw((pipe, call), scheduler, 4)
    with pytest.raises(ValueError, match="not 7"):
        tiny.draw((pipe, call), scheduler, 7)
    assert torch.equal(tiny.draw((pipe, call), scheduler, 4), wanted)


@pytest.mark.parametrize("made", ["recipe", "ratios", "cascade"])
def test_saved_pipelines_come_back_with_them(made, tmp_path):
    pipe, call = toy.pipeline("sd")
    if made == "recipe":
        pipe.scheduler = recipe_of(pipe, (4, 5)).scheduler(pipe)
    else:
        options = {"ratios": {4: RATIOS[:4]}} if made == "ratios" else {"cascade": "sd21", "guidance_scale": 3.0}
        pipe.scheduler = DCSolverScheduler.from_config(pipe.scheduler.config, solver_options=options)
    call |= {"num_inference_steps": 4, "output_type": "latent"}
    wanted = pipe("a cat", generator=torch.Generator().manual_seed(0), **call).images
    pipe.save_pretrained(tmp_path)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is type(pipe.scheduler)
    found = again("a cat", generator=torch.Generator().manual_seed(0), **call).images
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("other", [DPMSolverScheduler, UniPCScheduler, DCSolverScheduler, diffaccel.SolverScheduler])
def test_other_schedulers_take_over_without_it(other):
    """What a search found stays behind; what else the config says does not."""
    pipe, call = tiny.sd()
    plain = tiny.draw((pipe, call), other.from_config(pipe.scheduler.config), 4)
    recipe = recipe_of(pipe, (4,)).scheduler(pipe)
    back = other.from_config(recipe.config)
    assert "recipe" not in (back.config.solver_options or {})
    assert torch.equal(tiny.draw((pipe, call), back, 4), plain)
    dc = DCSolverScheduler.from_config(pipe.scheduler.config, solver_options={"ratios": {4: RATIOS[:4]}})
    if other is not DCSolverScheduler:
        assert torch.equal(tiny.draw((pipe, call), other.from_config(dc.config), 4), plain)
    foreign = diffusers.EulerDiscreteScheduler.from_config(recipe.config)
    assert tiny.draw((pipe, call), foreign, 4).isfinite().all()


def test_recipes_survive_copies_and_a_second_config():
    pipe, call = tiny.sd()
    scheduler = recipe_of(pipe, (4,)).scheduler(pipe)
    wanted = tiny.draw((pipe, call), scheduler, 4)
    assert torch.equal(tiny.draw((pipe, call), copy.deepcopy(scheduler), 4), wanted)
    assert torch.equal(tiny.draw((pipe, call), RecipeScheduler.from_config(scheduler.config), 4), wanted)
    assert torch.equal(tiny.draw((pipe, call), recipe_of(pipe, (4,)).scheduler(scheduler.config), 4), wanted)
