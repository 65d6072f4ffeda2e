"""Problems of pipelines: their denoiser is what a stock run gives its scheduler, and the pipeline stays as it was."""

import copy

import pytest
import torch

from diffaccel import SolverScheduler
from diffaccel.eval.reference import pair_generator
from diffaccel.samplers.search.pipeline import problem_of
from diffaccel.samplers.search.problem import Problem
from diffaccel.samplers.search.rollout import rollout
from diffaccel.samplers.tabulate import tabulate
from tests import tiny
from tests.eval import toy
from tests.search.problems import SCHEDULES

PROMPTS, SEEDS = ["a cat", "a red car"], [0, 7]
KINDS = ["sd", "sd v", "sdxl", "playground", "sd3", "flux", "pixart", "dit"]
GUIDED = [(kind, scale) for kind in KINDS for scale in (1.0, 4.0)]


def pipeline(kind):
    """A pipeline of its own, its prompts and the call's further arguments."""
    if kind == "dit":
        pipe = copy.copy(tiny.dit()[0])
        pipe.scheduler = copy.deepcopy(pipe.scheduler)
        return pipe, [3, 5], {}
    if kind == "playground":  # SDXL with EDM's preconditioning
        pipe, call = toy.pipeline("sdxl")
        pipe.scheduler = copy.deepcopy(tiny.playground()[0].scheduler)
    else:
        pipe, call = toy.pipeline(kind.split()[0])
    if kind == "sd v":
        config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **config)
    return pipe, PROMPTS, {k: v for k, v in call.items() if k not in ("num_inference_steps", "guidance_scale")}


class Spy(SolverScheduler):
    """Notes what its steps are given and what they make."""

    def step(self, model_output, timestep, sample, *args, **kwargs):
        i = self.step_index or 0
        out = super().step(model_output, timestep, sample, return_dict=True)
        seen = (self.grid.lambdas[i], float(self.grid.timesteps[i]), sample, out.pred_original_sample, out.prev_sample)
        self.seen = [*getattr(self, "seen", []), seen]
        return out if kwargs.get("return_dict", True) else (out.prev_sample,)


def stock(pipe, prompts, scale, steps, call, **options):
    """Steps of the pipeline's own run on all pairs."""
    pairs = [(prompt, seed) for prompt in prompts for seed in SEEDS]
    name = "class_labels" if isinstance(prompts[0], int) else "prompt"
    before, pipe.scheduler = pipe.scheduler, Spy.from_config(pipe.scheduler.config, solver_options=options)
    with torch.no_grad():
        pipe(
            **{name: [prompt for prompt, _ in pairs]},
            num_inference_steps=steps,
            guidance_scale=scale,
            generator=[pair_generator(str(prompt), seed) for prompt, seed in pairs],
            output_type="latent",
            **call,
        )
    spy, pipe.scheduler = pipe.scheduler, before
    return spy, [(lam, time, x[:4].float(), x0[:4], after[:4]) for lam, time, x, x0, after in spy.seen]


@pytest.mark.parametrize(("kind", "scale"), GUIDED)
def test_the_denoiser_is_the_pipelines(kind, scale):
    """All pairs, three noise levels, in two batches; then rows in any order; then a whole run."""
    pipe, prompts, call = pipeline(kind)
    problem = problem_of(pipe, prompts, SEEDS, scale, batch=3, **call)
    spy, steps = stock(pipe, prompts, scale, 3, call, solver="dpmpp_2m", schedule="beta")
    assert len(problem) == 4
    torch.testing.assert_close(problem.noise, steps[0][2], rtol=1e-5, atol=1e-5)
    rows = torch.tensor([3, 0, 0, 2])
    with torch.no_grad():
        for lam, time, x, x0, _ in steps:
            assert tiny.relative(problem.denoise(x, lam, time), x0) < 1e-4
            assert tiny.relative(problem.denoise(x[rows], lam, time, rows), x0[rows]) < 1e-4
    table = tabulate(problem.schedule, spy.grid, spy.solver)
    assert tiny.relative(rollout(problem, table), steps[-1][-1]) < 1e-4
    with torch.no_grad():  # conditions and guidance are heard at all
        other = problem.denoise(steps[1][2], steps[1][0], steps[1][1], torch.tensor([2, 3, 0, 1]))
    assert tiny.relative(other, steps[1][3]) > 1e-4


def test_each_pair_its_own_level():
    pipe, prompts, call = pipeline("sd")
    problem = problem_of(pipe, prompts, SEEDS, 4.0, **call)
    levels = torch.linspace(-2, 2, 4, dtype=torch.float64)
    with torch.no_grad():
        together = problem.denoise(problem.noise, levels)
        for i in range(4):
            alone = problem.denoise(problem.noise[i : i + 1], float(levels[i]), rows=torch.tensor([i]))
            assert tiny.relative(together[i : i + 1], alone) < 1e-5


def test_parts_are_pairs_of_the_whole_and_count_by_themselves():
    pipe, prompts, call = pipeline("sdxl")
    problem = problem_of(pipe, prompts, SEEDS, 4.0, batch=3, **call)
    rows = torch.tensor([2, 1])
    part = problem.part(rows)
    with torch.no_grad():
        assert tiny.relative(part.denoise(part.noise, 0.5), problem.denoise(problem.noise, 0.5)[rows]) < 1e-5
        again = part.part(slice(1, 2))
        assert tiny.relative(again.denoise(again.noise, 0.5), problem.denoise(problem.noise, 0.5)[1:2]) < 1e-5
    assert (problem.spent, part.spent, again.spent) == (8, 2, 1)


def test_positions_are_of_no_pair():
    """Flux's network is told where its 16 tokens are, and here there are 16 pairs."""
    pipe, _, call = pipeline("flux")
    problem = problem_of(pipe, PROMPTS, range(8), 4.0, **call)
    part = problem.part(torch.tensor([11, 3]))
    with torch.no_grad():
        found, wanted = part.denoise(part.noise, 0.5), problem.denoise(problem.noise, 0.5)
    assert tiny.relative(found, wanted[[11, 3]]) < 1e-5


@pytest.mark.parametrize("kind", ["sd", "sd v", "playground", "sd3", "dit"])
def test_gradients_are_differences(kind):
    """Through the sample, the noise level and the time, with guidance."""
    pipe, prompts, call = pipeline(kind)
    problem = problem_of(pipe, prompts, [0], 3.0, **call)
    x, lam = problem.noise, torch.tensor([0.3, -0.4], dtype=torch.float64)
    time = torch.from_numpy(problem.schedule.time_at(lam.numpy()))
    given = [x.clone().requires_grad_(), lam.clone().requires_grad_(), time.clone().requires_grad_()]
    weights = tiny.noise(*x.shape, seed=5).double()

    def value(*values):
        return (problem.denoise(*values).double() * weights).sum()

    found = torch.autograd.grad(value(*given), given)
    for i, (gradient, size) in enumerate(zip(found, (0.02, 0.01, 0.05), strict=True)):
        direction = tiny.noise(*gradient.shape, seed=i).to(gradient)
        ends = [
            [v + sign * size * direction if j == i else v for j, v in enumerate((x, lam, time))] for sign in (1, -1)
        ]
        with torch.no_grad():
            slope = float(value(*ends[0]) - value(*ends[1])) / (2 * size)
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=0.03, abs=1e-3), ("x", "lam", "time")[i]


def state(pipe):
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()]
    modes = [module.training for module in network.modules()]
    grads = [weight.requires_grad for weight in network.parameters()]
    return pipe.scheduler, hooks, modes, grads, dict(pipe._progress_bar_config), vars(pipe.scheduler).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_the_pipeline_stays_as_it_was(kind, monkeypatch):
    pipe, prompts, call = pipeline(kind)
    pipe.set_progress_bar_config(leave=False)
    before = state(pipe)
    problem = problem_of(pipe, prompts, SEEDS, 3.0, **call)
    with torch.no_grad():
        problem.denoise(problem.noise, 0.0)
    assert state(pipe) == before
    monkeypatch.setattr(pipe.unet if hasattr(pipe, "unet") else pipe.transformer, "forward", lambda: None)
    with pytest.raises(TypeError, match="argument"):
        problem_of(pipe, prompts, SEEDS, 3.0, **call)
    assert state(pipe) == before


@pytest.mark.parametrize(
    ("kind", "scale", "call"),
    [
        ("sd", 4.0, {"guidance_rescale": 0.7}),
        ("sdxl", 4.0, {"guidance_rescale": 0.7}),
        ("flux", 4.0, {"true_cfg_scale": 3.0, "negative_prompt": ["no"] * 4}),
    ],
)
def test_pipelines_that_do_more_are_refused(kind, scale, call):
    pipe, prompts, common = pipeline(kind)
    before = state(pipe)
    with pytest.raises(ValueError, match="does more with the network's output than classifier-free guidance"):
        problem_of(pipe, prompts, SEEDS, scale, **common, **call)
    assert state(pipe) == before


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_networks_that_say_something_else_each_time_are_refused(scale, monkeypatch):
    """With a cache inside, say: called alone they are not what the pipeline has."""
    pipe, prompts, call = pipeline("sd")
    plain, calls = pipe.unet.forward, []

    def forward(*args, **kwargs):
        calls.append(1)
        return (plain(*args, **kwargs)[0] * (1 + len(calls) / 10),)

    monkeypatch.setattr(pipe.unet, "forward", forward)
    with pytest.raises(ValueError, match="does more with the network's output"):
        problem_of(pipe, prompts, SEEDS, scale, **call)


def test_schedulers_that_change_x0_are_refused():
    pipe, prompts, call = pipeline("sd")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, thresholding=True)
    with pytest.raises(ValueError, match="switch it off"):
        problem_of(pipe, prompts, SEEDS, 3.0, **call)


@pytest.mark.parametrize(("prompts", "seeds"), [([], [0]), (["a"], [])])
def test_nothing_is_refused(prompts, seeds):
    with pytest.raises(ValueError, match="at least one prompt and one seed"):
        problem_of(pipeline("sd")[0], prompts, seeds, 3.0)


def test_pairs_given_twice_are_refused():
    """DiT's pipeline doubles its samples; two that are the same could not be told from it."""
    with pytest.raises(ValueError, match="once"):
        problem_of(pipeline("sd")[0], PROMPTS, [0, 0], 1.0)


@pytest.mark.parametrize("kind", ["sd", "dit"])
def test_any_spacing_of_the_config_will_do(kind):
    """The one step that is listened to is at another time in each of them, 0 too."""
    pipe, prompts, call = pipeline(kind)
    wanted = problem_of(pipe, prompts, SEEDS, 3.0, **call)
    with torch.no_grad():
        x0 = wanted.denoise(wanted.noise, 0.1)
        for spacing, offset in (("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)):
            config = {"timestep_spacing": spacing, "steps_offset": offset}
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **config)
            found = problem_of(pipe, prompts, SEEDS, 3.0, **call)
            assert tiny.relative(found.denoise(found.noise, 0.1), x0) < 1e-4, (spacing, offset)


def test_keys_tell_apart_what_decides_predictions():
    pipe, prompts, call = pipeline("sd")
    one = problem_of(pipe, prompts, SEEDS, 3.0, **call).key
    assert one
    assert problem_of(pipe, prompts, SEEDS, 3.0, **call).key == one
    assert problem_of(pipe, prompts, SEEDS, 4.0, **call).key != one
    assert problem_of(pipe, prompts, SEEDS, 3.0, negative_prompt=["no"] * 4, **call).key != one
    other = copy.deepcopy(pipe)
    next(other.unet.parameters()).data.add_(1e-3)
    assert problem_of(other, prompts, SEEDS, 3.0, **call).key != one


def test_functions_are_problems():
    """Levels, times and rows reach them, in batches."""
    seen = []

    def function(x, lam, time, rows):
        seen.append((len(x), lam.tolist(), time.tolist(), rows.tolist()))
        return x

    schedule = SCHEDULES["vp"]
    problem = Problem(schedule, function, torch.zeros(3, 2), batch=2)
    problem.denoise(problem.noise, 0.5)
    time = float(schedule.time_at(0.5))
    assert seen == [(2, [0.5] * 2, [time] * 2, [0, 1]), (1, [0.5], [time], [2])]
    seen.clear()
    problem.denoise(problem.noise[:2], torch.tensor([0.5, 1.0]), 7.0, torch.tensor([2, 2]))
    assert seen == [(2, [0.5, 1.0], [7.0, 7.0], [2, 2])]
    with pytest.raises(ValueError, match="2 samples were given for 3 pairs"):
        problem.denoise(problem.noise[:2], 0.5)
    assert problem.spent == 5
