"""`diffaccel.search`, from a pipeline to a recipe that draws, with every cheap method."""

import copy
import inspect
import json

import pytest
import torch

import diffaccel
from diffaccel import Recipe
from diffaccel.eval.fidelity import paired_interval
from diffaccel.eval.reference import pair_generator
from diffaccel.samplers.grid import time_grid
from diffaccel.samplers.search import METHODS, search
from diffaccel.samplers.search.api import BASE, DEFAULT, SOLVER
from diffaccel.samplers.search.pipeline import problem_of
from diffaccel.samplers.search.reference import reference
from diffaccel.samplers.search.rollout import errors
from diffaccel.samplers.solvers import SOLVERS
from diffaccel.samplers.tabulate import tabulate
from tests import tiny
from tests.eval import toy

PROMPTS = ["a cat", "a red car", "the moon", "soup", "a bee", "two shoes", "rain", "a green hat"]
SMALL = {"pairs": 6, "reference_steps": 12, "progress": False, "guidance_scale": 3.0}
CHEAP = {
    "auto": {"rounds": 1, "iterations": 2, "batch": 2},
    "dc": {"evaluations": 4},
    "iia": {"terms": "epsilon"},
    "gits": {"coeff": [1.0, 1.2]},
}


def pipeline(kind="sd"):
    pipe, call = toy.pipeline(kind)
    return pipe, {k: v for k, v in call.items() if k not in ("num_inference_steps", "guidance_scale")}


def state(pipe):
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    return (
        pipe.scheduler,
        dict(pipe.scheduler.config),
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in network.modules()],
        [(p.requires_grad, p.grad is None, float(p.detach().sum())) for p in network.parameters()],
        dict(pipe._progress_bar_config),
    )


@pytest.mark.parametrize("kind", ["sd", "sd3"])
@pytest.mark.parametrize("method", CHEAP)
def test_from_a_pipeline_to_a_recipe_that_draws(method, kind, tmp_path):
    pipe, call = pipeline(kind)
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    network.train()
    next(network.parameters()).requires_grad_(False)
    before, rng = state(pipe), torch.get_rng_state()
    recipe = search(pipe, method, prompts=PROMPTS, steps=[4, 3], call=call, **SMALL, **CHEAP[method])
    assert state(pipe) == before
    assert torch.equal(torch.get_rng_state(), rng)
    network.eval()
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    assert [entry.steps for entry in recipe.entries] == [3, 4]
    for entry in recipe.entries:
        assert entry.method == method
        assert entry.guidance_scale == 3.0
        measured = entry.measured
        assert measured["prompts"] == 2
        assert measured["pairs"] == 16
        assert measured["latent_mse"] > 0
        assert measured["samples_seen"] > 0 or method == "gits"  # whose coefficients may agree
        assert measured["seconds"] >= 0
        for key in ("start", "default"):
            assert measured[key]["latent_mse"] > 0
            low, middle, high = measured[key]["ratio"]
            assert 0 < low <= middle <= high
        assert measured["default"]["sampler"] == ", ".join(DEFAULT)
    recipe.save(tmp_path / "a.json")
    again = Recipe.load(tmp_path / "a.json")
    assert json.loads(json.dumps(again.entries[0].notes)) == again.entries[0].notes
    pipe.scheduler = again.scheduler(pipe)
    picture = pipe("soup", num_inference_steps=3, guidance_scale=3.0, output_type="latent", **call).images
    assert picture.isfinite().all()


def test_what_is_measured_is_so():
    """The held-out pairs are those of every fourth prompt, with seeds that were not fitted; written out."""
    pipe, call = pipeline()
    recipe = search(pipe, "gits", prompts=PROMPTS, steps=3, seed=5, call=call, **SMALL)
    (entry,) = recipe.entries
    problem = problem_of(pipe, [PROMPTS[3], PROMPTS[7]], range(1_000_008, 1_000_016), 3.0, **call)
    with torch.no_grad():
        trajectory = reference(problem, 12, progress=False)
        found = errors(problem, entry.table(problem.schedule), trajectory)
        grid = time_grid(problem.schedule, 3, DEFAULT[1], final=DEFAULT[2])
        default = errors(problem, tabulate(problem.schedule, grid, SOLVERS[DEFAULT[0]]), trajectory)
    assert entry.measured["latent_mse"] == pytest.approx(float(found.median()), rel=1e-3)
    assert entry.measured["default"]["latent_mse"] == pytest.approx(float(default.median()), rel=1e-3)
    interval = paired_interval(found, default, [PROMPTS[3]] * 8 + [PROMPTS[7]] * 8)
    wanted = [interval.low, interval.median, interval.high]
    assert entry.measured["default"]["ratio"] == pytest.approx(wanted, abs=2e-4)
    # the latents are those of the pipeline's own run
    pipe.scheduler = recipe.scheduler(pipe)
    drawn = pipe(
        PROMPTS[3],
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=pair_generator(PROMPTS[3], 1_000_008),
        output_type="latent",
        **call,
    ).images
    assert float((drawn - trajectory.end[:1]).square().mean()) == pytest.approx(float(found[0]), rel=1e-3)


def test_held_out_prompts_are_not_fitted(monkeypatch):
    """The method sees three prompts of four, and the seeds that make up the pairs."""
    seen = []

    def listening(pipe, prompts, seeds, scale, **rest):
        seen.append((list(prompts), list(seeds)))
        return problem_of(pipe, prompts, seeds, scale, **rest)

    monkeypatch.setattr("diffaccel.samplers.search.api.problem_of", listening)
    pipe, call = pipeline()
    search(pipe, "iia", prompts=PROMPTS, steps=2, seed=3, call=call, **SMALL | {"pairs": 7})
    (fit, fit_seeds), (held, held_seeds) = seen
    assert fit == [PROMPTS[i] for i in (0, 1, 2, 4, 5, 6)]
    assert held == [PROMPTS[3], PROMPTS[7]]
    assert fit_seeds == [3, 4]
    assert len(held_seeds) == 8
    assert not set(fit_seeds) & set(held_seeds)


def test_one_held_out_prompt_has_no_interval():
    pipe, call = pipeline()
    recipe = search(pipe, "iia", prompts=PROMPTS[:4], steps=2, call=call, **SMALL)
    measured = recipe.entries[0].measured
    assert measured["prompts"] == 1
    assert "ratio" not in measured["default"]


def test_class_labels_are_prompts():
    pipe = copy.copy(tiny.dit()[0])
    before = state(pipe)
    recipe = search(pipe, "dc", prompts=[1, 2, 3, 4, 5, 6, 7, 8], steps=3, **SMALL)
    assert state(pipe) == before
    pipe.scheduler = recipe.scheduler(pipe)
    picture = pipe([3], num_inference_steps=3, guidance_scale=3.0, output_type="np").images
    assert picture.shape[0] == 1


def test_a_pipelines_own_guidance_is_the_default():
    pipe, call = pipeline()
    recipe = search(pipe, "iia", prompts=PROMPTS[:4], steps=2, call=call, **SMALL | {"guidance_scale": None})
    default = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default
    assert recipe.entries[0].guidance_scale == default == 7.5


def test_an_interrupted_search_goes_on(tmp_path, monkeypatch):
    pipe, call = pipeline()
    given = {"prompts": PROMPTS, "steps": 2, "call": call, "cache": tmp_path, **SMALL}
    plain = search(pipe, "iia", **given | {"cache": None})
    search(pipe, "iia", **given)
    assert list(tmp_path.iterdir())
    calls = []
    handle = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    again = search(pipe, "iia", **given)
    handle.remove()
    assert len(calls) < 2 * 12  # no reference of 12 steps was made
    assert again.entries[0].rows == plain.entries[0].rows


def test_the_same_seed_finds_the_same():
    pipe, call = pipeline()
    given = {"prompts": PROMPTS[:4], "steps": 2, "call": call, **SMALL, "iterations": 1, "batch": 2, "rounds": 0}
    one, two = (search(pipe, "auto", **given) for _ in range(2))
    assert one.entries[0].rows == two.entries[0].rows
    assert one.entries[0].rows != search(pipe, "auto", **given, seed=1).entries[0].rows


def test_the_method_starts_from_what_is_asked():
    pipe, call = pipeline()
    given = {"prompts": PROMPTS, "steps": 3, "call": call, **SMALL}
    entry = search(pipe, "dc", solver="dpmpp_2m", schedule="karras", final="zero", **given).entries[0]
    assert entry.measured["start"]["sampler"] == "dpmpp_2m, karras, zero"
    assert entry.end is None
    assert search(pipe, "dc", **given).entries[0].measured["start"]["sampler"] == ", ".join(BASE["dc"])


def test_it_is_the_packages_own():
    assert diffaccel.search is search
    assert set(METHODS) == {"auto", "dc", "ays", "usf", "iia", "gits", "autodiffusion"}
    for name in (BASE[key][0] for key in BASE):
        assert name in SOLVERS
    assert set(SOLVER.values()) <= set(SOLVERS)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"method": "best"}, "unknown method 'best'; use auto, dc, ays"),
        ({"prompts": "a cat"}, "a list of four different ones or more"),
        ({"prompts": PROMPTS[:3]}, "a list of four different ones or more"),
        ({"prompts": ["a cat"] * 8}, "a list of four different ones or more"),
        ({"steps": 0}, "steps must be 1 or more, not 0"),
        ({"steps": []}, r"steps must be 1 or more, not \[\]"),
        ({"steps": 2000}, "between 1 and the 1000"),
        ({"rounds": 3}, "dc has no option 'rounds'; it has evaluations, order"),
        ({"grid": None}, "dc has no option 'grid'"),
        ({"solver": "nonsense"}, "unknown solver 'nonsense'"),
        ({"solver": "heun"}, "multistep solvers without noise, and 'heun' is none"),
        ({"solver": "dpmpp_2m_sde"}, "multistep solvers without noise"),
        ({"schedule": "nonsense"}, "nonsense"),
        ({"final": "corrector"}, "end at 'zero' or 'sigma_min', not 'corrector'"),
        ({"final": "nonsense"}, "not 'nonsense'"),
        ({"pairs": 0}, "pairs must be 1 or more, not 0"),
        ({"call": {"guidance_rescale": 0.5}}, "does more with the network's output"),
    ],
)
def test_bad_input_gets_a_sentence(change, sentence, monkeypatch):
    pipe, call = pipeline()
    before, calls = state(pipe), []
    if "call" not in change:  # an input that is wrong is so before the first call of the network
        monkeypatch.setattr(pipe.unet, "forward", lambda *args, **kwargs: calls.append(1))
    given = {"method": "dc", "prompts": PROMPTS, "steps": 3, "call": call, **SMALL} | change
    with pytest.raises(ValueError, match=sentence):
        search(pipe, **given)
    assert not calls
    assert state(pipe) == before
