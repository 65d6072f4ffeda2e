"""The benchmark's bookkeeping: candidates make the calls they are counted with, and the tables say what was run."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from diffaccel import zoo
from diffaccel.cost import network_calls
from diffaccel.eval import callable_extractor, frechet, load_reference
from tests.tiny import sd

FOLDER = Path(__file__).parents[1] / "benchmarks"
CONFIG = json.loads((zoo.path("emoji-sd") / "scheduler" / "scheduler_config.json").read_text())


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports the benchmarks by name, and forgets their plain names afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "").parent == FOLDER:
            del sys.modules[name]


def usable(bench: Callable[[str], ModuleType], calls: int) -> list[tuple[Any, dict[str, Any]]]:
    """Every hundredth candidate that can make `calls` calls, and the first one of each class, with its arguments."""
    found, classes = [], set()
    for i, candidate in enumerate(bench("diffusers_candidates").candidates()):
        if i % 100 == 0 or candidate.scheduler not in classes:
            try:
                found.append((candidate, candidate.arguments(CONFIG, calls)))
            except Exception:
                continue
            classes.add(candidate.scheduler)
    return found


@pytest.mark.parametrize("calls", [5, 13])
def test_candidates_make_the_calls_they_are_counted_with(bench: Callable[[str], ModuleType], calls: int) -> None:
    pipe, arguments = sd()
    found = usable(bench, calls)
    assert len({candidate.scheduler for candidate, _ in found}) >= 13
    for candidate, steps in found:
        pipe.scheduler = candidate.make(CONFIG)
        with network_calls(pipe) as count:
            pipe(**arguments, **steps, generator=torch.Generator().manual_seed(0))
        assert count.calls == calls, candidate.label


def test_two_call_methods_are_counted_in_calls(bench: Callable[[str], ModuleType]) -> None:
    module = bench("diffusers_candidates")
    heun = module.Candidate("Heun", "HeunDiscreteScheduler")
    assert heun.arguments(CONFIG, 9) == {"num_inference_steps": 5}
    with pytest.raises(module.DoesNotFitError, match="no number of steps makes 8 calls"):
        heun.arguments(CONFIG, 8)
    pndm = module.Candidate("PNDM", "PNDMScheduler", {"skip_prk_steps": False})
    assert pndm.arguments(CONFIG, 14) == {"num_inference_steps": 5}
    assert module.Candidate("PLMS", "PNDMScheduler", {"skip_prk_steps": True}).arguments(CONFIG, 8) == {
        "num_inference_steps": 7
    }


def test_every_candidate_has_its_own_label(bench: Callable[[str], ModuleType]) -> None:
    labels = [c.label for c in bench("diffusers_candidates").candidates()]
    labels += [c.label for c in bench("our_candidates").our_candidates()]
    assert len(labels) == len(set(labels))


def test_dry_run_tells_methods_and_ends_apart(bench: Callable[[str], ModuleType]) -> None:
    dry_run, module = bench("dry_run").dry_run, bench("diffusers_candidates")

    def trace(scheduler: str, steps: int = 5, **options: Any) -> Any:
        candidate = module.Candidate("", scheduler, {"timestep_spacing": "trailing"} | options)
        return dry_run(candidate.make(CONFIG), {"num_inference_steps": steps}, CONFIG)

    ddim = trace("DDIMScheduler", set_alpha_to_one=True)
    first_order = trace("DPMSolverMultistepScheduler", solver_order=1)
    assert (ddim.grid, ddim.fingerprint) == (first_order.grid, first_order.fingerprint), "one method under two names"
    second_order = trace("DPMSolverMultistepScheduler", solver_order=2)
    assert second_order.grid == ddim.grid
    assert second_order.fingerprint != ddim.fingerprint
    assert ddim.timesteps == (999, 799, 599, 399, 199)
    assert ddim.ends_at == pytest.approx(0, abs=1e-3)
    noisy = trace("DDIMScheduler", set_alpha_to_one=False)
    assert noisy.ends_at == pytest.approx(1, abs=1e-2)
    assert noisy.grid != ddim.grid


def test_ays_table_is_the_published_one_and_interpolates(bench: Callable[[str], ModuleType]) -> None:
    ays = bench("diffusers_candidates").ays
    assert ays("timesteps", 10) == [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    sigmas = ays("sigmas", 5)
    assert len(sigmas) == 6
    assert sigmas[0] == pytest.approx(14.615)
    assert sigmas[2] == pytest.approx((1.886 * 1.396) ** 0.5)  # halfway between two entries, in the logarithm
    assert sigmas[-2:] == pytest.approx([0.152, 0.0])


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zoo's pipeline with a random U-Net of a few thousand weights in place of its own."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=128,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    folder = tmp_path_factory.mktemp("model") / "tiny"
    StableDiffusionPipeline.from_pretrained(zoo.path("emoji-sd"), unet=unet, safety_checker=None).save_pretrained(
        folder
    )
    return folder


def test_solver_tables_end_to_end(bench: Callable[[str], ModuleType], tiny_model: Path, tmp_path: Path) -> None:
    main = bench("solver_tables").main
    command = ["--model", str(tiny_model), "--prompts", "2", "--seeds", "2", "--steps", "4", "--screening-prompts", "2"]
    command += ["--reference-steps", "25", "--finalists", "2", "--question-prompts", "0", "--workers", "1"]
    command += ["--only", "trailing", "final=zero", "--cache", str(tmp_path / "cache"), "--output", str(tmp_path)]
    results = main(command)
    name = "solver_tables_tiny_cfg4"
    text, data = (tmp_path / f"{name}.md").read_text(), json.loads((tmp_path / f"{name}.json").read_text())
    assert (tmp_path / f"{name}.png").stat().st_size > 1000

    # the header says on what, and the tables compare at equal calls
    assert results.header["weights"] in text
    assert f"2 prompts x 2 seeds = 4. **Dropped: {data['header']['dropped']}**" in text
    assert "integer clock" in text
    assert [row["calls"] for row in data["best"]] == [4]
    assert [(row["grid"], row["calls"]) for row in data["same_grid"]] == [("trailing", 4)]
    # screening ranks, and the finalists are its best
    for side, found in results.screened.items():
        errors = [s.error for s in found[4] if len(s.mse) == 2 * 4]  # those of the last round
        assert errors == sorted(errors)
        assert len(errors) >= 5
        assert all(s.trace.calls == 4 for s in found[4])
        assert [e.label for e in results.best[side][4]] == [s.candidate.label for s in found[4][:2]]

    # a second run measures nothing again and says the same
    before = (tmp_path / f"{name}.json").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench("solver_runs").Worker, "_latents", None)
        main(command)
    assert (tmp_path / f"{name}.json").read_bytes() == before


def test_reference_convergence_end_to_end(bench: Callable[[str], ModuleType], tiny_model: Path, tmp_path: Path) -> None:
    command = ["--model", str(tiny_model), "--prompts", "1", "--steps", "5", "20", "--truth-steps", "60"]
    text = bench("reference_convergence").main([*command, "--output", str(tmp_path)])
    assert (tmp_path / "reference_convergence_tiny_cfg4.md").read_text() == text
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")][1:]
    errors = {(cells[0].strip(), int(cells[1])): float(cells[2]) for cells in rows}
    assert errors["dpmpp_2m logsnr", 20] < errors["dpmpp_2m logsnr", 5] / 10
    # the noise that an end at sigma_min leaves does not go away with more steps
    assert errors["dpmpp_2m logsnr sigma_min", 20] > 1e-4


def test_mixture_predicts_x0_as_its_density_says(bench: Callable[[str], ModuleType]) -> None:
    """Tweedie: x0 = (x + sigma^2 * d/dx log p(x)) / alpha, with the density written out."""
    generator = torch.Generator().manual_seed(0)
    mixtures = bench("mixture").Mixtures.drawn(2, (0.6, 0.03), generator)
    x = torch.randn(2, 3, 64, generator=generator, dtype=torch.float64, requires_grad=True)
    alpha, sigma = 0.8, 0.6
    total = alpha**2 * mixtures.variances + sigma**2
    distance = (x[:, :, None] - alpha * mixtures.means[:, None]).square() / total
    (score,) = torch.autograd.grad((-distance.sum(-1) / 2).logsumexp(-1).sum(), x)
    expected = (x + sigma**2 * score).detach() / alpha
    torch.testing.assert_close(mixtures.x0(x.detach(), alpha, sigma), expected)
    velocity = (x.detach() - alpha * expected) / sigma - expected
    torch.testing.assert_close(mixtures.output(x.detach(), alpha, sigma, "flow"), velocity)


def test_solvers_analytic_end_to_end(bench: Callable[[str], ModuleType], tmp_path: Path) -> None:
    command = ["--mixtures", "2", "--noises", "4", "--calls", "10", "160", "--solvers", "ddim", "dpmpp_2m", "heun"]
    command += ["--schedules", "logsnr", "normal", "ays_svd", "--draws", "20000", "--output", str(tmp_path)]
    found = bench("solvers_analytic").main(command)
    rows = {(r.solver, r.schedule, r.final): r.errors for r in found.rows["detailed"]}

    # more calls and more order end nearer to the truth
    assert rows["ddim", "logsnr", "zero"][160] < rows["ddim", "logsnr", "zero"][10] / 10
    assert rows["dpmpp_2m", "logsnr", "zero"][160] < 1e-4
    flow = {(r.solver, r.schedule, r.final): r.errors for r in found.rows["flow"]}
    assert flow["dpmpp_2m", "trailing", "zero"][160] < 2e-3
    # a run to sigma_min keeps its noise, and one that is the run to 0 is not made twice
    assert rows["dpmpp_2m", "logsnr", "sigma_min"][160] == pytest.approx(found.data["detailed"][2], rel=0.01)
    assert ("dpmpp_2m", "normal", "zero") in rows
    assert ("dpmpp_2m", "normal", "sigma_min") not in rows
    assert set(found.refused) == {"ays_svd"}
    # an ODE keeps what is wrong with the mean of the start, noise does not; a good SDE solver has the variance
    assert abs(found.stochastic["er_sde_3", "logsnr"][50][1]) < 0.04
    assert found.stochastic["ddim", "logsnr"][50][0] < -0.02 < found.stochastic["ddpm", "logsnr"][50][0]

    text = (tmp_path / "solvers_analytic.md").read_text()
    best = rows["dpmpp_2m", "logsnr", "zero"][160]
    assert "| 1 | " in text
    assert f"dpmpp_2m, logsnr {best:.1e} |" in text
    assert "`ays_svd`: schedule 'ays_svd' goes from" in text
    assert json.loads((tmp_path / "solvers_analytic.json").read_text())["rows"]["detailed"]
    assert (tmp_path / "solvers_analytic.png").stat().st_size > 1000


def test_step_time_end_to_end(bench: Callable[[str], ModuleType], tmp_path: Path) -> None:
    module = bench("step_time")
    text = module.main(["--repetitions", "2", "--only", "DDIM", "Heun", "Euler, flow", "--output", str(tmp_path)])
    assert (tmp_path / "step_time.md").read_text() == text
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows if row[0]] == ["---", "DDIM", "Heun", "Euler, flow"] * 2
    ours, theirs = (float(rows[2][i]) for i in (8, 7))
    assert ours < theirs, "DDIM has fewer operators here"


def test_step_time_runs_both_sides_alike(bench: Callable[[str], ModuleType]) -> None:
    """Every pair makes (almost) the same calls, and where the method is one, the same result."""
    module = bench("step_time")
    generator = torch.Generator().manual_seed(0)
    sample, *outputs = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(module.STEPS + 1))
    for name, *pair in module.PAIRS:
        ends = []
        for side in module.make(*pair):
            side.scheduler.set_timesteps(side.steps)
            made = [(x, step(output, t, x)) for x, t, output, step in module.calls(side.scheduler, sample, outputs)]
            assert len(side.scheduler.timesteps) == len(made), name
            assert len(made) in (module.STEPS, module.STEPS - 1), name
            ends.append(made[-1][0])
        if name in ("DPM++ 2M", "UniPC 2", "Euler, flow"):
            torch.testing.assert_close(*ends, rtol=0, atol=0.1)  # theirs rounds its timesteps


def test_field_guide_chooses_by_the_screening_and_scores_beside_diffusers(
    bench: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    solvers, report = bench("solvers"), bench("solvers_report")
    pool = list(solvers.ours())
    labels = [c.label for c in pool]
    assert len(labels) == len(set(labels))
    config = dict(DDIMScheduler(beta_schedule="scaled_linear").config)
    for candidate in pool[::7]:
        candidate.make(config).set_timesteps(5)

    def row(label: str, side: str, calls: int, mse: float) -> Any:
        pairs = {"mse": [mse, 2 * mse, mse], "psnr": [20.0] * 3, "clip": [0.1] * 3, "variance": [1.0] * 3}
        return solvers.Row(label, side, calls, pairs)

    known = "unipc_1_bh1 karras final=zero", "unipc_1_bh1 beta final=sigma_min", "ddim karras final=zero"
    screened = [row(label, "ours", 8, mse) for label, mse in zip(known, (0.3, 0.1, 0.2), strict=True)]
    chosen = [c.label for c in solvers.choose(screened, 8, 1)]
    assert chosen[0] == known[1]
    assert known[0] not in chosen
    assert set(solvers.THEIRS) <= set(chosen)
    held_out = [row(known[1], "ours", 8, 0.1), row(solvers.THEIRS[0], "theirs", 8, 0.2)]
    found = {"screened": screened, "noisy": screened, "weights": "w", "held_out": {4.0: held_out}}
    found |= {"errors": {4.0: [1e-9, 1e-9, 1.0]}, "pairs": [("a", 0), ("b", 0), ("c", 0)]}
    args = {"model": "emoji-sd", "clip": "c", "guidance_scale": [4.0], "prompts": 3, "seeds": 1}
    report.write_report(found, args | {"screening_seeds": 2, "compile": False}, tmp_path)
    text = (tmp_path / "solvers_emoji-sd.md").read_text()
    assert f"| 8 | ours | {known[1]} | 1.50e-01 | 0.50 [0.50, 0.50] |" in text
    assert "| 1.000 | 1 |" in text  # one pair dropped, whose reference is not exact


def test_searched_samplers_beside_fixed_ones(
    bench: Callable[[str], ModuleType], tiny_model: Path, tmp_path: Path
) -> None:
    main = bench("searched").main
    command = ["--model", str(tiny_model), "--clip", "", "--guidance-scale", "4", "--steps", "4", "--pairs", "4"]
    command += ["--searches", "iia", "dc-paper", "--prompts", "2", "--seeds", "1", "--workers", "1"]
    command += ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path)]
    main(command)
    text = (tmp_path / "searched_tiny.md").read_text()
    rows = json.loads((tmp_path / "searched_tiny.json").read_text())["rows"]
    assert {row["label"] for row in rows if row["side"] == "searched"} == {"iia", "dc-paper"}
    assert {row["calls"] for row in rows} == {4}
    assert "dc-paper / unipc linspace final=sigma_min, the same grid: " in text
    best = min((row for row in rows if row["side"] == "theirs"), key=lambda row: np.median(row["mse"]))
    assert f"| {best['label']} (theirs) | {np.median(best['mse']):.4g} | 1 |" in text

    # what was searched and scored is not again
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench("searched").diffaccel, "search", None)
        patch.setattr(bench("solver_runs").Worker, "_latents", None)
        main(command)
    assert (tmp_path / "searched_tiny.md").read_text() == text


def test_frechet_end_to_end(bench: Callable[[str], ModuleType], tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        text = bench("frechet").main(["--dim", "48", "--repetitions", "1", "--output", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "frechet.md").read_text() == text
    ours = [line for line in text.splitlines() if line.startswith("| ours")]
    assert len(ours) == 3
    assert all(abs(float(line.split("|")[-2])) < 1e-10 for line in ours)


def test_cifar10_fid_reports_by_number_of_pictures(
    bench: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = bench("cifar10_fid")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(module, "COUNTS", (100, 200))
    extractor = callable_extractor(lambda x: x.flatten(1)[:, :8], name="toy", dim=8, size=4)
    train, test = (np.random.default_rng(seed).standard_normal((200, 8)) for seed in (0, 1))
    for split, values in (("train", train), ("test", test)):
        module.save_moments_small(values, module.moments_file(split, len(values), extractor), extractor)
    text = module.section("clean", train, test, extractor)
    assert f"| 200 | 200 | {frechet(train, test):.4f} |" in text
    assert "| 100 | 200 |" in text
    reference = load_reference(module.moments_file("test", 200, extractor), extractor)
    assert frechet(train, reference.gaussian) == pytest.approx(frechet(train, test), abs=1e-6)


def test_pruning_benchmark_of_a_network_alone(bench: Callable[[str], ModuleType], monkeypatch, tmp_path) -> None:
    full_size, pruning = bench("full_size"), bench("prune_full_size")
    small = {"sample_size": 16, "cross_attention_dim": 8, "block_out_channels": (16, 32), "norm_num_groups": 4}
    small |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 4}
    small |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    monkeypatch.setitem(full_size.ARCHITECTURES, "sd15", ("small", UNet2DConditionModel, small))
    found = pruning.measure("sd15", tmp_path)
    assert found["class"] == "PrunedUNet2DConditionModel"
    assert found["mask"] < 0.1
    assert found["macs"][1] / found["macs"][0] == pytest.approx(0.7, abs=0.05)
    assert pruning.row("sd15", found).startswith("| small | PrunedUNet2DConditionModel |")


def test_pruning_speed_names_every_cut(bench: Callable[[str], ModuleType], monkeypatch) -> None:
    full_size, speed = bench("full_size"), bench("prune_speed")
    small = {"num_attention_heads": 4, "attention_head_dim": 4, "in_channels": 4, "out_channels": 8}
    small |= {"sample_size": 8, "num_layers": 4, "num_embeds_ada_norm": 10, "norm_num_groups": 4}
    monkeypatch.setitem(full_size.ARCHITECTURES, "dit", ("small", full_size.ARCHITECTURES["dit"][1], small))
    lines = speed.measure("dit", 1)
    assert lines[0] == "## small, 32x32 latents, batch 1"
    assert sum(line.startswith(("| width", "| depth", "| both")) for line in lines) >= 5
