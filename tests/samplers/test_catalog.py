"""Names mean what they say, whoever's they are."""

import re
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest

import diffaccel
from diffaccel.samplers.catalog import SCHEDULES, SOLVER_ALIASES, parse_solver
from diffaccel.samplers.exponential import ExponentialAdams
from diffaccel.samplers.solvers import SOLVERS
from diffaccel.samplers.spacing import FLOW_ONLY, NEVER_FLOW

CONFIG = diffusers.DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1).config
FLOW = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config


@pytest.mark.parametrize("config", [CONFIG, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize("name", SOLVERS)
def test_factory_makes_the_named_solver(name, config):
    solver, rule = diffaccel.scheduler(name, config).solver, SOLVERS[name]
    if isinstance(rule, ExponentialAdams) and rule.order == 1 and not rule.corrector:
        solver = replace(solver, second=rule.second)  # which says nothing about one point
    assert solver == rule


@pytest.mark.parametrize("config", [CONFIG, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_factory_sets_the_named_schedule(schedule, config):
    if schedule in (NEVER_FLOW if config is FLOW else FLOW_ONLY):
        with pytest.raises(ValueError, match=r"is (not )?for flow-matching models"):
            diffaccel.scheduler("dpmpp_2m", config, schedule=schedule)
        return
    if schedule in ("ays_svd", "ays_deepfloyd"):
        pytest.skip("for networks with another range of noise: see test_spacings.py")
    levels = []
    for other in (schedule, "karras" if schedule != "karras" else "trailing"):
        scheduler = diffaccel.scheduler("dpmpp_2m", config, schedule=other)
        scheduler.set_timesteps(8)
        levels.append(scheduler.sigmas.tolist())
    assert levels[0] != pytest.approx(levels[1], rel=1e-2)


@pytest.mark.parametrize(
    ("given", "solver", "schedule"),
    [
        ("DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("dpmpp_2m", "dpmpp_2m", None),
        ("DPM++ 2M SDE Exponential", "dpmpp_2m_sde", "exponential"),
        ("dpmpp_3m_sde_gpu", "dpmpp_3m_sde_shipped", None),
        ("DPM++ 3M SDE", "dpmpp_3m_sde_shipped", None),
        ("uni_pc_bh2", "unipc_3", None),
        ("UniPC", "unipc", None),
        ("Euler SGM Uniform", "euler", "linspace"),
        ("uni_pc", "unipc_3_bh1", None),
        ("DPM++ 2M normal", "dpmpp_2m", "normal"),
        ("DDIM", "ddim", None),
    ],
)
def test_names_of_other_programs(given, solver, schedule):
    assert parse_solver(given) == (solver, schedule)


def test_every_alias_names_a_solver():
    assert set(SOLVER_ALIASES.values()) <= set(SOLVERS)


def test_order_3_of_the_class_is_the_shipped_form_and_the_name_is_third_order():
    assert diffaccel.DPMSolverScheduler(solver_order=3).solver.halve_curvature
    assert not diffaccel.scheduler("dpmpp_3m", CONFIG).solver.halve_curvature


def test_options_reach_config_and_solver():
    scheduler = diffaccel.scheduler("dpmpp_2m", CONFIG, thresholding=True, second="exact", final="sigma_min")
    assert scheduler.config["thresholding"]
    assert scheduler.solver.second == "exact"
    assert scheduler.config["final_sigmas_type"] == "sigma_min"


def test_a_name_wins_over_the_solver_keys_of_the_config():
    stock = diffusers.DPMSolverMultistepScheduler(solver_type="heun", lower_order_final=False)
    assert diffaccel.scheduler("dpmpp_2m", stock.config).solver == SOLVERS["dpmpp_2m"]


@pytest.mark.parametrize("schedule", ["beta", "karras", "trailing"])
@pytest.mark.parametrize("config", [CONFIG, FLOW], ids=["vp", "flow"])
def test_another_solver_keeps_the_schedule_of_a_config_of_ours(schedule, config):
    first = diffaccel.scheduler("unipc", config, schedule=schedule)
    second = diffaccel.scheduler("dpmpp_2m", first.config)
    for scheduler in (first, second):
        scheduler.set_timesteps(7)
    assert first.sigmas.tolist() == second.sigmas.tolist()


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name not in NEVER_FLOW])
def test_runs_on_a_flow_pipelines_sigmas_end_without_noise(schedule, final):
    scheduler = diffaccel.scheduler("dpmpp_2m", FLOW, schedule=schedule, final=final)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert scheduler.sigmas[-1] < 0.01  # the end of the shifted table


def test_no_page_waits_for_numbers():
    root = Path(__file__).parents[2]
    assert not [page for page in (*root.glob("docs/*.md"), root / "README.md") if "@@" in page.read_text()]


def test_field_guide_names_every_solver_and_schedule():
    text = (Path(__file__).parents[2] / "docs" / "solvers.md").read_text()
    assert not [name for name in (*SOLVERS, *SCHEDULES) if f"`{name}`" not in text]


def test_field_guide_states_the_declared_orders():
    """Rows are `names | noise | orders | calls | what`; one number stands for all names of a row."""
    for line in (Path(__file__).parents[2] / "docs" / "solvers.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = [name for name in re.findall(r"`(\w+)`", cells[0]) if name in SOLVERS]
        if not names or len(cells) < 5 or cells[1] not in ("ODE", "SDE"):
            continue
        orders, calls = (cells[i].split(", ") for i in (2, 3))
        for i, name in enumerate(names):
            rule = SOLVERS[name]
            assert cells[1] == ("SDE" if rule.stochastic else "ODE"), name
            assert int(orders[i if len(orders) > 1 else 0]) == rule.convergence_order, name
            assert int(calls[i if len(calls) > 1 else 0]) == getattr(rule, "stages", 1), name


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("DPM++2M Karras", ("dpmpp_2m", "karras")),
        ("DPM++ 2S a Karras", ("dpmpp_2s_ancestral", "karras")),
        ("DPM++ SDE Karras", ("seeds_2", "karras")),
        ("Euler a", ("euler_ancestral", None)),
        ("LMS Karras", ("deis_rhoab3", "karras")),
        ("DPM2 a Karras", ("dpm_2s_ancestral", "karras")),
        ("uni_pc_bh2", ("unipc_3", None)),
        ("dpmpp_2m_sde_heun", ("res_2m_sde", None)),
        ("k_euler_a", ("euler_ancestral", None)),
        ("res_multistep beta57", ("res_2m", "beta57")),
    ],
)
def test_names_that_people_type(name, meant):
    assert parse_solver(name) == meant


def test_wrong_names_are_answered_with_a_guess():
    with pytest.raises(ValueError, match="did you mean dpmpp_2m"):
        diffaccel.scheduler("dpmp_2m", CONFIG)
    with pytest.raises(ValueError, match="ays_sd15, ays_sdxl, ays_svd or ays_deepfloyd"):
        diffaccel.scheduler("ddim", CONFIG, schedule="Align Your Steps")


def test_two_schedules_are_refused():
    with pytest.raises(ValueError, match="names schedule 'karras', and schedule= another one, 'beta'"):
        diffaccel.scheduler("DPM++ 2M Karras", CONFIG, schedule="beta")
    assert diffaccel.scheduler("DPM++ 2M Karras", CONFIG, schedule="karras").config["use_karras_sigmas"]


@pytest.mark.parametrize("keys", [{"sigma_min": -1.0}, {"sigma_min": 3.0, "sigma_max": 2.0}])
def test_a_sigma_range_that_is_none(keys):
    scheduler = diffaccel.scheduler("dpmpp_2m", CONFIG, schedule="karras", **keys)
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        scheduler.set_timesteps(5)


def test_solver_options_are_keywords_of_the_factory():
    with pytest.raises(ValueError, match=r"such as eta=0\.5"):
        diffaccel.scheduler("dpmpp_2m", CONFIG, solver_options={"eta": 0.5})
    with pytest.raises(TypeError, match="must be a dict"):
        diffaccel.SolverScheduler(solver_options="heun")


def test_an_unknown_end_is_refused_when_it_is_named():
    with pytest.raises(ValueError, match="final must be zero, sigma_min, corrector, not 'banana'"):
        diffaccel.scheduler("dpmpp_2m", CONFIG, final="banana")  # type: ignore[arg-type]
