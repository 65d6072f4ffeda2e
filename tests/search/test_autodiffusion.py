"""AutoDiffusion: skipped layers add nothing, the search finds those that do nothing, and keeps those that matter."""

import json
import math

import diffusers
import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from diffaccel.cost import macs
from diffaccel.samplers.schedule import NoiseSchedule, betas
from diffaccel.samplers.search.autodiffusion import autodiffusion, measured
from diffaccel.samplers.search.problem import Problem
from diffaccel.samplers.search.reference import reference
from diffaccel.samplers.search.skipping import shares, skip_layers, skippable, skipping
from diffaccel.samplers.search.skips import Layers, Skipping, Skips
from tests import tiny

SCHEDULE = NoiseSchedule.from_alphas_cumprod(np.cumprod(1 - betas("scaled_linear", 0.00085, 0.012, 1000)))
STDS = torch.linspace(0.05, 2, 4)[:, None, None]


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()


def dit(layers=4):
    torch.manual_seed(0)
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        norm_num_groups=4,
        sample_size=4,
        num_embeds_ada_norm=10,
    )
    return network.eval()


def without(network, index):
    """Make a block add nothing: its gates are 0, and so it is its shortcut in full."""
    norm = network.transformer_blocks[index].norm1.linear
    nn.init.zeros_(norm.weight)
    nn.init.zeros_(norm.bias)


def problem_with(network, strength, count=6):
    """Independent Gaussian numbers, and what the network says on top."""

    def x0(x, lam, time, rows):
        alpha, sigma = (
            torch.tensor(v).float()[:, None, None, None]
            for v in zip(*map(SCHEDULE.alpha_sigma, lam.tolist()), strict=True)
        )
        plain = STDS**2 * alpha * x / (STDS**2 * alpha**2 + sigma**2)
        return plain + strength * network(x, time, class_labels=rows % 10).sample

    noise = torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    problem = Problem(SCHEDULE, x0, noise, network=network)
    trajectory = reference(problem, 60, progress=False)
    problem.spent = 0
    return problem, trajectory


def test_skippable_layers_of_real_networks(unet):
    assert skippable(unet) == [
        "down_blocks.0.resnets.0",
        "down_blocks.1.attentions.0",
        "down_blocks.1.resnets.0",
        *(f"up_blocks.0.{kind}.{i}" for kind in ("attentions", "resnets") for i in range(2)),
        "up_blocks.1.resnets.0",
        "up_blocks.1.resnets.1",
        "mid_block.attentions.0",
        "mid_block.resnets.0",
        "mid_block.resnets.1",
    ]
    assert skippable(dit()) == [f"transformer_blocks.{i}" for i in (1, 2, 3)]
    assert skippable(tiny.pixart()[0].transformer) == ["transformer_blocks.0"]
    with pytest.raises(TypeError, match="skip layers of a Linear"):
        skippable(nn.Linear(2, 2))


def test_skipping_is_an_identity_made_by_hand(unet):
    given = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, 3, 8)
    names = ["up_blocks.0.resnets.1", "mid_block.resnets.0", "mid_block.attentions.0", "down_blocks.1.attentions.0"]
    with torch.no_grad():
        plain = unet(*given).sample
        with skipping(unet, names):
            skipped = unet(*given).sample
        again = unet(*given).sample
        hooks = []
        for name in names:
            module = unet.get_submodule(name)

            def identity(module, args, output):
                x = args[0]
                x = module.conv_shortcut(x) if getattr(module, "conv_shortcut", None) is not None else x
                return (x,) if isinstance(output, tuple) else x

            hooks.append(module.register_forward_hook(identity))
        wanted = unet(*given).sample
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(skipped, wanted)
    assert not torch.allclose(skipped, plain)
    assert torch.equal(again, plain)


def test_skipping_a_block_of_a_transformer():
    network, given = dit(3), (torch.randn(1, 4, 4, 4), torch.tensor([500]), torch.tensor([3]))
    shorter = dit(2)
    state = {k.replace("blocks.2", "blocks.1"): v for k, v in network.state_dict().items() if "blocks.1" not in k}
    shorter.load_state_dict(state)
    with torch.no_grad(), skipping(network, ["transformer_blocks.1"]):
        x, t, c = given
        torch.testing.assert_close(network(x, t, c).sample, shorter(x, t, c).sample)


def test_an_error_in_the_block_leaves_the_network_whole(unet):
    before = [id(module) for module in unet.modules()]
    with pytest.raises(RuntimeError, match="stop"), skipping(unet, ["mid_block.resnets.0"]):
        raise RuntimeError("stop")
    assert [id(module) for module in unet.modules()] == before
    with pytest.raises(ValueError, match="'conv_in' is no layer"), skipping(unet, ["conv_in"]):
        pass


def test_shares_are_what_is_saved(unet):
    given = torch.randn(1, 4, 8, 8), torch.tensor(500), torch.randn(1, 3, 8)
    whole, found = macs(unet, *given), shares(unet, (given, {}))
    assert sum(found.values()) < 1
    for name in ("up_blocks.0.resnets.1", "mid_block.attentions.0"):  # the first has a shortcut, which stays
        with skipping(unet, [name]):
            assert macs(unet, *given) == pytest.approx(whole * (1 - found[name]), rel=0.01)


@pytest.mark.parametrize("toy", [tiny.sd, tiny.pixart])
def test_a_pipeline_skips_what_it_is_told(toy):
    pipe, call = toy()
    network = getattr(pipe, "unet", None) or pipe.transformer
    names = skippable(network)[:1]
    pipe.scheduler = diffusers.DDIMScheduler(**tiny.SD_BETAS, clip_sample=False)

    def draw():
        return torch.as_tensor(pipe(num_inference_steps=3, generator=torch.Generator().manual_seed(0), **call)[0])

    plain, calls = draw(), []
    original = network.get_submodule(names[0])
    hook = original.register_forward_hook(lambda *_: calls.append(1))
    with skip_layers(pipe, [[], names, []]) as handle:
        skipped = draw()
        assert len(calls) == 2
        assert handle.plan.names() == ["full", "skip 1"]
        with pytest.raises(ValueError, match="3 network calls, and this run has 2"):
            pipe(num_inference_steps=2, **call)
    hook.remove()
    assert not torch.equal(skipped, plain)
    assert torch.equal(draw(), plain)
    counter = iter(range(3))
    forward = type(network).forward

    def by_hand(*args, **kwargs):
        with skipping(network, names if next(counter) == 1 else []):
            return forward(network, *args, **kwargs)

    network.forward = by_hand
    try:
        torch.testing.assert_close(draw(), skipped)
    finally:
        del network.forward
    with pytest.raises(ValueError, match="no layer"):
        skip_layers(pipe, [["conv_in"]])


def test_finds_layers_that_do_nothing_and_the_best_nodes_for_the_calls_they_pay_for():
    network = dit(4)
    for index in (2, 3):
        without(network, index)
    problem, trajectory = problem_with(network, 0.05, count=4)
    found = autodiffusion(problem, trajectory, 2, evaluations=120, progress=False)
    spent = problem.spent
    table, notes = found.table, json.loads(json.dumps(found.notes))
    idle = {"transformer_blocks.2", "transformer_blocks.3"}
    assert table.steps > 2
    assert len(notes["skips"]) == table.steps
    assert notes["cost"] <= 2 + 1e-6
    assert notes["without_skips"]["mean"] > notes["selected_on"]["found"]["mean"]
    # The planted optimum: both idle layers are never run, and the calls that leaves are at the best nodes.
    saved = sum(notes["shares"][name] for name in idle)
    calls = math.floor(2 / (1 - saved))
    layers = measured(problem, trajectory, network, [0, 1])
    space, start = Skipping(problem, trajectory, network, layers, 2), table.lambdas[0]
    both = tuple(layers.names.index(name) for name in sorted(idle))

    def error(nodes):
        return space.score(Skips((start, *map(float, np.sort(nodes))), (both,) * calls), range(4)).mean()

    best = minimize(error, np.linspace(start, 3.4, calls + 1)[1:-1], method="Nelder-Mead", options={"xatol": 1e-2}).fun
    final = space.score(Skips(table.lambdas[:-1], _numbers(notes["skips"], layers)), range(4)).mean()
    assert final <= 1.02 * best
    # Random runs within the same budget of network calls
    rng, problem.spent, random = np.random.default_rng(0), 0, [math.inf]
    while problem.spent < spent:
        n = int(rng.integers(1, 5))
        nodes = (start, *np.sort(rng.uniform(start, SCHEDULE.lambda_min_noise, n - 1)))
        run = space._fitted(space._apart(nodes, ((),) * n), rng)
        random.append(float(space.score(run, range(4)).mean()))
    assert final < 0.95 * min(random)


def _numbers(skips, layers: Layers):
    return tuple(tuple(sorted(layers.names.index(name) for name in names)) for names in skips)


def test_layers_that_matter_are_kept():
    network = dit(3)
    for block in network.transformer_blocks:
        nn.init.normal_(block.norm1.linear.weight, std=1.0)
    problem, trajectory = problem_with(network, 0.5)
    found = autodiffusion(problem, trajectory, 3, evaluations=60, progress=False)
    assert not any(found.notes["skips"])
    assert "better" in found.notes["said_of_skips"]
    assert found.notes["without_skips"]["mean"] == pytest.approx(found.notes["selected_on"]["found"]["mean"])
    assert found.table.steps == 3


def test_every_child_is_within_the_budget():
    network = dit(4)
    problem, trajectory = problem_with(network, 0.1, count=2)
    layers = measured(problem, trajectory, network, [0, 1])
    space, rng = Skipping(problem, trajectory, network, layers, 3), np.random.default_rng(0)
    run = other = Skips((-2.682, 0.0, 2.0), ((), (), ()))
    sizes = set()
    for _ in range(500):
        run, other = space.mutate(run, rng), run
        run = space.cross(run, other, rng) if rng.random() < 0.3 else run
        assert space.whole_calls(run) <= 3 + 1e-6
        assert len(run.lambdas) == len(run.skipped)
        assert np.diff(run.lambdas).min(initial=1) > 0
        assert run.lambdas[0] == -2.682
        assert run.lambdas[-1] <= SCHEDULE.lambda_min_noise
        assert len(space.features(run)) == len(space.features(other))
        sizes.add(len(run.lambdas))
    assert max(sizes) > 3


class StoppedError(Exception):
    pass


def test_an_interrupted_search_goes_on(tmp_path):
    problem, trajectory = problem_with(dit(3), 0.1, count=4)
    whole = autodiffusion(problem, trajectory, 2, evaluations=40, progress=False)
    plain, limit = problem.function, problem.spent / 2
    problem.spent = 0

    def failing(*args):
        if problem.spent > limit:
            raise StoppedError
        return plain(*args)

    problem.function = failing
    with pytest.raises(StoppedError):
        autodiffusion(problem, trajectory, 2, evaluations=40, cache=tmp_path, progress=False)
    problem.function, problem.spent = plain, 0
    again = autodiffusion(problem, trajectory, 2, evaluations=40, cache=tmp_path, progress=False)
    assert again.table.rows == whole.table.rows
    assert again.notes["skips"] == whole.notes["skips"]
    assert again.notes["evaluations_now"] < 0.7 * whole.notes["evaluations"]


def test_a_problem_without_a_network_says_so():
    problem, trajectory = problem_with(dit(2), 0.1, count=2)
    with pytest.raises(ValueError, match="never calls this network"):
        autodiffusion(problem, trajectory, 2, network=dit(2), progress=False)
    problem.network = None
    with pytest.raises(ValueError, match=r"give network=pipe\.unet"):
        autodiffusion(problem, trajectory, 2, progress=False)


@pytest.mark.parametrize("toy", [tiny.sd, tiny.sdxl, tiny.pixart, tiny.sd3, tiny.flux])
def test_every_layer_can_be_skipped_and_all_at_once(toy):
    pipe, call = toy()
    names = skippable(getattr(pipe, "unet", None) or pipe.transformer)
    pictures = []
    for skipped in [[], *([name] for name in names), names]:
        with skip_layers(pipe, [skipped] * 2):  # PixArt fails at one step
            pictures.append(
                torch.as_tensor(pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0), **call)[0])
            )
    assert len(pictures) > 2
    assert all(picture.isfinite().all() for picture in pictures)
    assert not any(torch.equal(picture, pictures[0]) for picture in pictures[1:])
