"""Diffusers configs: every one that ours can run is taken over and given back, every other is refused."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from diffaccel import DDIMSolverScheduler, DPMSolverScheduler, FlowEulerScheduler, SolverScheduler, UniPCScheduler
from diffaccel.samplers.config import OPENED
from tests.tiny import SD_BETAS, noise, relative

VP_MEMBERS = [m.name for m in KarrasDiffusionSchedulers if m.name != "EDMEulerScheduler"]
EDM_MEMBERS = ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]
FLOW_MEMBERS = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]
VP_CLASSES = [SolverScheduler, DDIMSolverScheduler, DPMSolverScheduler, UniPCScheduler]
ALL_CLASSES = [*VP_CLASSES, FlowEulerScheduler]

# A scheduler built by hand does not say its class: these have the very keys of one we open, or plain DDPM networks.
ALIKE = {
    "DDIMInverseScheduler",
    "DPMSolverMultistepInverseScheduler",
    "FlowMapEulerDiscreteScheduler",
    "RePaintScheduler",
}
OTHERS = {
    name
    for name in dir(diffusers)
    if name.endswith("Scheduler")
    and not name.startswith("Flax")
    and inspect.isclass(getattr(diffusers, name))
    and issubclass(getattr(diffusers, name), diffusers.ConfigMixin)
} - set(OPENED)


def _build(name: str, **config: Any) -> Any:
    try:
        return getattr(diffusers, name)(**config)
    except ImportError as error:  # LMS needs scipy, DPM-Solver SDE torchsde
        pytest.skip(str(error).strip())


def _json(scheduler: Any) -> dict[str, Any]:
    return json.loads(scheduler.to_json_string())


def _run(scheduler: SolverScheduler, steps: int) -> torch.Tensor:
    scheduler.set_timesteps(steps, mu=0.5)
    x = noise(1, 4, 3, 3)
    for t in scheduler.timesteps:
        x = scheduler.step(0.1 * scheduler.scale_model_input(x, t), t, x, torch.Generator().manual_seed(0)).prev_sample
    return x


@pytest.mark.parametrize("cls", VP_CLASSES)
@pytest.mark.parametrize("name", VP_MEMBERS)
def test_saved_vp_scheduler_opens_in_ours(tmp_path: Path, name: str, cls: Any) -> None:
    stock = _build(name, num_train_timesteps=400, **SD_BETAS, prediction_type="v_prediction")
    stock.save_pretrained(tmp_path)
    ours = cls.from_pretrained(tmp_path)
    assert ours.prediction_type == "v_prediction"
    torch.testing.assert_close(ours.alphas_cumprod, stock.alphas_cumprod, rtol=1e-4, atol=1e-6)
    assert _run(ours, 7).isfinite().all()


def test_the_one_member_that_needs_torchsde_opens_without_it() -> None:
    """The file that Diffusers 0.42.1 saves, since the class itself may be absent here."""
    saved = {"_class_name": "DPMSolverSDEScheduler", "_diffusers_version": "0.42.1", "noise_sampler_seed": None}
    saved |= {"num_train_timesteps": 1000, "prediction_type": "epsilon", "trained_betas": None, "steps_offset": 0}
    saved |= {"timestep_spacing": "linspace", "use_karras_sigmas": True, "use_beta_sigmas": False, **SD_BETAS}
    ours = DPMSolverScheduler.from_config(saved)
    assert ours.config["use_karras_sigmas"]
    assert _run(ours, 5).isfinite().all()


@pytest.mark.parametrize("cls", VP_CLASSES)
@pytest.mark.parametrize("name", EDM_MEMBERS)
def test_saved_edm_scheduler_opens_in_ours(tmp_path: Path, name: str, cls: Any) -> None:
    stock = _build(name, sigma_max=50.0, sigma_data=1.0, sigma_schedule="exponential")
    stock.save_pretrained(tmp_path)
    for ours in (cls.from_pretrained(tmp_path), cls.from_config(stock.config)):
        stock.set_timesteps(7)
        assert _run(ours, 7).isfinite().all()
        assert ours.init_noise_sigma == pytest.approx(float(stock.init_noise_sigma))
        torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=1e-4, atol=0)


def test_edm_input_and_noise_scales_agree_with_diffusers() -> None:
    stock = diffusers.EDMEulerScheduler()
    ours = DDIMSolverScheduler.from_config(stock.config)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(5)
    x = noise(1, 4, 3, 3)
    assert ours.init_noise_sigma == pytest.approx(float(stock.init_noise_sigma), rel=1e-6)
    assert torch.allclose(ours.timesteps, stock.timesteps, atol=1e-5)
    for t, s in zip(ours.timesteps, stock.timesteps, strict=True):
        seen = ours.scale_model_input(x, t)
        torch.testing.assert_close(seen, stock.scale_model_input(x, s), rtol=1e-5, atol=1e-6)
        y = ours.step(seen, t, x).prev_sample
        torch.testing.assert_close(y, stock.step(seen, s, x).prev_sample, rtol=1e-4, atol=1e-5)
        x = y


@pytest.mark.parametrize("cls", ALL_CLASSES)
@pytest.mark.parametrize("name", FLOW_MEMBERS)
def test_saved_flow_scheduler_opens_in_ours(tmp_path: Path, name: str, cls: Any) -> None:
    stock = _build(name, shift=3.0, num_train_timesteps=500)
    stock.save_pretrained(tmp_path)
    for ours in (cls.from_pretrained(tmp_path), cls.from_config(stock.config)):
        assert ours.prediction_type == "flow_prediction"
        assert _run(ours, 7).isfinite().all()
        straight = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, num_train_timesteps=500)
        straight.set_timesteps(7)
        torch.testing.assert_close(ours.sigmas, straight.sigmas, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*VP_MEMBERS, *EDM_MEMBERS, *FLOW_MEMBERS])
def test_scheduler_built_by_hand_gives_its_own_noise_levels(name: str) -> None:
    """`from_config` drops keys that the source left at its default; the defaults of the classes differ."""
    stock = _build(name)
    ours = (FlowEulerScheduler if name in FLOW_MEMBERS else DPMSolverScheduler).from_config(stock.config)
    if name in VP_MEMBERS:
        torch.testing.assert_close(ours.alphas_cumprod, stock.alphas_cumprod, rtol=1e-4, atol=1e-6)
    else:
        for scheduler in (ours, straight := _build(name.replace("Heun", "Euler"))):
            scheduler.set_timesteps(5)
        torch.testing.assert_close(ours.sigmas, straight.sigmas, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", VP_MEMBERS)
def test_foreign_keys_survive_the_way_back(name: str) -> None:
    stock = _build(name, num_train_timesteps=400, **SD_BETAS)
    for cls in VP_CLASSES:
        back = type(stock).from_config(cls.from_config(stock.config).config)
        assert _public(back) == _public(stock)


@pytest.mark.parametrize("name", FLOW_MEMBERS)
def test_foreign_flow_keys_survive_the_way_back(name: str) -> None:
    stock = _build(name, shift=3.0)
    for cls in ALL_CLASSES:
        assert _public(type(stock).from_config(cls.from_config(stock.config).config)) == _public(stock)


@pytest.mark.parametrize(
    ("first", "config"),
    [
        (FlowEulerScheduler, {"shift": 3.0}),
        (DPMSolverScheduler, {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}),
        (UniPCScheduler, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, **SD_BETAS}),
        (SolverScheduler, {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "use_karras_sigmas": True}),
        (SolverScheduler, {**SD_BETAS, "solver_options": {"solver": "unipc_3", "timesteps": "integer"}}),
    ],
    ids=["flow", "flow-sigmas", "zero-snr", "edm", "named-solver"],
)
@pytest.mark.parametrize("saved", [False, True], ids=["live", "saved"])
def test_ours_take_over_from_each_other(first: Any, config: dict[str, Any], saved: bool) -> None:
    source = first(**config)
    source.set_timesteps(6)
    taken = _json(source) if saved else source.config
    for cls in ALL_CLASSES if source.schedule.path == "flow" else VP_CLASSES:
        ours = cls.from_config(taken)
        ours.set_timesteps(6)
        assert ours.prediction_type == source.prediction_type
        assert ours.schedule.path == source.schedule.path
        torch.testing.assert_close(ours.sigmas, source.sigmas, rtol=1e-6, atol=0)


@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
def test_solver_type_of_another_family_means_the_default(solver_type: str) -> None:
    """As in Diffusers, where DPM-Solver++ reads both of UniPC's as midpoint."""
    source = diffusers.UniPCMultistepScheduler(**SD_BETAS, solver_type=solver_type)
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(source.config)
    ours = DPMSolverScheduler.from_config(source.config, solver_options={"timesteps": "integer"})
    x = y = noise(1, 4, 3, 3)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(6)
    for t in ours.timesteps:
        x, y = ours.step(0.1 * x, t, x).prev_sample, theirs.step(0.1 * y, t, y).prev_sample
    assert relative(x, y) < 1e-5


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_flow_keys_of_solvers_keep_their_grid(name: str) -> None:
    """Sana and Wan drive flow models by `use_flow_sigmas`; they leave its last call at 1 / n, shifted."""
    stock = _build(name, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    ours = DPMSolverScheduler.from_config(stock.config)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(10)
    torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("EDMEulerScheduler", {"rho": 3.0}),
        ("EulerDiscreteScheduler", {"sigma_min": 0.1, "sigma_max": 5.0, "use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {"sigma_min": 0.1, "sigma_max": 5.0, "use_karras_sigmas": True}),
    ],
    ids=str,
)
def test_keys_that_set_the_levels_are_honoured_or_refused(name: str, keys: dict[str, Any]) -> None:
    stock = _build(name, **keys)
    try:
        ours = DPMSolverScheduler.from_config(stock.config)
    except ValueError:
        return
    for scheduler in (ours, stock):
        scheduler.set_timesteps(6)
    torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_pictures_of_a_config_do_not_depend_on_its_route(tmp_path: Path, name: str) -> None:
    """Live, saved by Diffusers, saved by ours: the same sampler."""
    stock = _build(name, **SD_BETAS, steps_offset=1)
    ours = DDIMSolverScheduler.from_config(stock.config)
    stock.save_pretrained(tmp_path / "stock")
    ours.save_pretrained(tmp_path / "ours")
    pictures = [_run(DDIMSolverScheduler.from_pretrained(tmp_path / folder), 8) for folder in ("stock", "ours")]
    assert [relative(picture, _run(ours, 8)) for picture in pictures] == [0, 0]


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_other_schedulers_are_refused(name: str) -> None:
    for cls in ALL_CLASSES:
        with pytest.raises(ValueError, match=f"cannot take over a {name} config"):
            cls.from_config({"_class_name": name, "num_train_timesteps": 1000})


@pytest.mark.parametrize("name", sorted(OTHERS - ALIKE))
def test_other_schedulers_built_by_hand_are_refused(name: str) -> None:
    """Without a class name, only the keys tell."""
    try:
        stock = getattr(diffusers, name)()
    except (ImportError, TypeError):
        pytest.skip(f"{name} cannot be built without arguments")
    config = {k: v for k, v in stock.config.items() if k != "_class_name"}
    with pytest.raises(ValueError, match=r"cannot take over|not a scheduler's config"):
        DPMSolverScheduler.from_config(config)


@pytest.mark.parametrize("name", [*VP_MEMBERS, *EDM_MEMBERS])
def test_flow_euler_refuses_other_trajectories(name: str) -> None:
    with pytest.raises(ValueError, match="FlowEulerScheduler is for flow-matching models"):
        FlowEulerScheduler.from_config(_json(_build(name)))


@pytest.mark.parametrize("key", ["invert_sigmas", "stochastic_sampling"])
def test_flow_variants_are_refused(key: str) -> None:
    stock = diffusers.FlowMatchEulerDiscreteScheduler(**{key: True})
    with pytest.raises(ValueError, match=f"{key}=True is not supported"):
        FlowEulerScheduler.from_config(stock.config)


def _public(scheduler: Any) -> dict[str, Any]:
    accepted = inspect.signature(type(scheduler)).parameters
    return {k: v for k, v in scheduler.config.items() if k in accepted}
