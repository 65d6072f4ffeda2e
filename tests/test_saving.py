"""Saved pipelines: ours reload as ours, portable ones open without diffaccel, and nothing is lost on the way."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import diffaccel
from diffaccel import DDIMSolverScheduler, DPMSolverScheduler, FlowEulerScheduler, SolverScheduler, UniPCScheduler
from tests import tiny
from tests.tiny import SD_BETAS, Toy, draw, relative

EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
OURS: dict[str, Callable[[], SolverScheduler]] = {
    "solver": lambda: SolverScheduler(**SD_BETAS, solver_options={"solver": "dpmpp_3m", "timesteps": "integer"}),
    "ddim": lambda: DDIMSolverScheduler(**SD_BETAS, timestep_spacing="leading", set_alpha_to_one=False),
    "dpm": lambda: DPMSolverScheduler(**SD_BETAS, solver_order=3, use_lu_lambdas=True),
    "beta": lambda: DPMSolverScheduler(**SD_BETAS, use_beta_sigmas=True),
    "unipc": lambda: UniPCScheduler(**SD_BETAS, solver_type="bh1", solver_options={"start": "singlestep"}),
    "flow_euler": lambda: FlowEulerScheduler(shift=3.0),
    "flow_dpm": lambda: DPMSolverScheduler(prediction_type="flow_prediction", shift=3.0, solver_order=3),
    "sana": lambda: DPMSolverScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    "sana_ddim": lambda: DDIMSolverScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    "edm": lambda: DPMSolverScheduler(**EDM, use_karras_sigmas=True),
    "edm_logsnr": lambda: DPMSolverScheduler(**EDM, use_lu_lambdas=True),
}
STOCK = {
    "solver": "DPMSolverMultistepScheduler",
    "ddim": "DDIMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "beta": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "flow_euler": "FlowMatchEulerDiscreteScheduler",
    "flow_dpm": "FlowMatchEulerDiscreteScheduler",
    "sana": "DPMSolverMultistepScheduler",
    "sana_ddim": "DPMSolverMultistepScheduler",
    "edm": "EDMDPMSolverMultistepScheduler",
    "edm_logsnr": "EDMDPMSolverMultistepScheduler",
}


def _pipe(name: str) -> Toy:
    pipe, call = tiny.sd3() if OURS[name]().schedule.path == "flow" else tiny.dit()
    pipe.scheduler = OURS[name]()
    return pipe, call


def _open(folder: Path, like: Any) -> Any:
    """Pipeline of a folder; parts that `like` has not got at toy size (text encoders) are passed by hand."""
    again = type(like).from_pretrained(folder, **{k: None for k, v in like.components.items() if v is None})
    again.set_progress_bar_config(disable=True)
    return again


@pytest.mark.parametrize("name", OURS)
def test_saved_pipeline_reloads_with_our_scheduler(tmp_path: Path, name: str) -> None:
    pipe, call = _pipe(name)
    picture = draw((pipe, call), pipe.scheduler, 5)
    pipe.save_pretrained(tmp_path)
    again = _open(tmp_path, pipe)
    assert _index(tmp_path)["scheduler"] == ["diffaccel", type(pipe.scheduler).__name__]
    assert type(again.scheduler) is type(pipe.scheduler)
    assert torch.equal(draw((again, call), again.scheduler, 5), picture)


STRANGER = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffaccel":
            raise ImportError("diffaccel is not installed")
sys.meta_path.insert(0, Block())
import torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
try:
    import diffaccel
except ImportError:
    pass
else:
    raise SystemExit("diffaccel was importable")
for folder in sys.argv[1:]:
    absent, call = torch.load(folder + ".pt", weights_only=True)
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(absent))
        picture = pipe(num_inference_steps=40, **call)[0]
        print(type(pipe.scheduler).__name__, "finite" if torch.as_tensor(picture).isfinite().all() else "NaN")
    except Exception as error:
        print(type(pipe.scheduler).__name__, repr(error))
"""


@pytest.fixture(scope="session")
def opened_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Portable saves of every scheduler, and what a process in which `import diffaccel` fails says of each."""
    root = tmp_path_factory.mktemp("portable")
    for name in OURS:
        pipe, call = _pipe(name)
        diffaccel.save_pretrained(pipe, root / name)
        torch.save(([k for k, v in pipe.components.items() if v is None], call), root / f"{name}.pt")
    command = [sys.executable, "-c", STRANGER, *(str(root / name) for name in OURS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return {name: (root / name, line) for name, line in zip(OURS, done.stdout.splitlines(), strict=True)}


@pytest.mark.parametrize("name", OURS)
def test_portable_save_opens_without_diffaccel(opened_elsewhere: dict[str, tuple[Path, str]], name: str) -> None:
    assert opened_elsewhere[name][1] == f"{STOCK[name]} finite"


@pytest.mark.parametrize("name", OURS)
def test_portable_save_restores_our_picture(opened_elsewhere: dict[str, tuple[Path, str]], name: str) -> None:
    pipe, call = _pipe(name)
    picture = draw((pipe, call), pipe.scheduler, 5)
    again = _open(opened_elsewhere[name][0], pipe)
    ours = type(pipe.scheduler).from_config(again.scheduler.config)
    assert torch.equal(draw((again, call), ours, 5), picture)


@pytest.mark.parametrize("name", OURS)
def test_portable_save_keeps_the_noise_levels_of_the_network(name: str, tmp_path: Path) -> None:
    """The stock class differs in its solver and grid, but not in betas, shift or range."""
    pipe, _ = _pipe(name)
    diffaccel.save_pretrained(pipe, tmp_path / "out")
    stock = _open(tmp_path / "out", pipe).scheduler
    ours = pipe.scheduler
    for scheduler in (ours, stock):
        scheduler.set_timesteps(1000 if ours.schedule.path == "flow" else 20)
    if ours.schedule.path == "vp":
        torch.testing.assert_close(stock.alphas_cumprod, ours.alphas_cumprod, atol=1e-6, rtol=1e-4)
    elif ours.schedule.path == "flow":
        assert stock.sigmas[500] == pytest.approx(float(ours.sigmas[500]), abs=0.01)
    else:
        torch.testing.assert_close(stock.sigmas[[0, -2]], ours.sigmas[[0, -2]], atol=0, rtol=1e-4)


@pytest.mark.parametrize("name", OURS)
def test_portable_save_says_what_opens_it(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    pipe, _ = _pipe(name)
    ours = pipe.scheduler
    with caplog.at_level(logging.WARNING, "diffaccel"):
        assert diffaccel.save_pretrained(pipe, tmp_path / "out") == STOCK[name]
    assert pipe.scheduler is ours
    assert _index(tmp_path / "out")["scheduler"] == ["diffusers", STOCK[name]]
    (record,) = [r for r in caplog.records if r.name.startswith("diffaccel")]
    assert STOCK[name] in record.message
    assert "pictures then differ" in record.message
    assert f"diffaccel.{type(ours).__name__}.from_config" in record.message


def test_hub_repositories_with_our_scheduler_are_not_refused(tmp_path: Path) -> None:
    """The check that Diffusers makes between the download of model_index.json and that of the components."""
    loading = pytest.importorskip("diffusers.pipelines.pipeline_loading_utils")
    _pipe("dpm")[0].save_pretrained(tmp_path)
    custom, folders = loading._get_custom_components_and_folders("someone/model", _index(tmp_path), filenames=[])
    assert not custom
    assert "scheduler" in folders


def test_portable_save_of_a_stock_scheduler_is_plain(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe, _ = tiny.dit()
    pipe.scheduler = diffusers.DDIMScheduler()
    assert diffaccel.save_pretrained(pipe, tmp_path) == "DDIMScheduler"
    assert not [r for r in caplog.records if r.name.startswith("diffaccel")]
    assert type(_open(tmp_path, pipe).scheduler) is diffusers.DDIMScheduler


def test_portable_save_replaces_a_pipeline_and_keeps_what_lies_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "out"
    diffaccel.save_pretrained(_pipe("dpm")[0], target)
    (target / "transformer" / "stale.txt").touch()
    (target / "lora.safetensors").touch()
    diffaccel.save_pretrained(_pipe("ddim")[0], target)
    assert _index(target)["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert not (target / "transformer" / "stale.txt").exists()
    assert (target / "lora.safetensors").exists()
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("moment", ["writing", "moving"])
def test_interrupted_save_leaves_the_old_folder_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    target = tmp_path / "out"
    diffaccel.save_pretrained(_pipe("dpm")[0], target)
    before = _contents(target)
    pipe, _ = _pipe("ddim")
    ours = pipe.scheduler
    rename = Path.rename

    def write_half(folder: Path, **kwargs: Any) -> None:
        folder.mkdir()
        (folder / "model_index.json").write_text("{")
        raise KeyboardInterrupt

    def move_half(path: Path, new: Path) -> Path:
        if new == target and path.name == "new":
            raise KeyboardInterrupt
        return rename(path, new)

    with monkeypatch.context() as patch:
        if moment == "writing":
            patch.setattr(pipe, "save_pretrained", write_half)
        else:
            patch.setattr(Path, "rename", move_half)
        with pytest.raises(KeyboardInterrupt):
            diffaccel.save_pretrained(pipe, target)
    assert pipe.scheduler is ours
    assert _contents(target) == before
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("kind", ["file", "other files"])
def test_portable_save_refuses_to_replace_anything_else(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "mine.txt").touch()
    with pytest.raises(ValueError, match="is not a pipeline folder; choose"):
        diffaccel.save_pretrained(_pipe("dpm")[0], target)
    assert target.exists()


def test_portable_save_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="expected a Diffusers pipeline"):
        diffaccel.save_pretrained(torch.nn.Linear(1, 1), tmp_path / "out")


def test_portable_save_passes_arguments_on(tmp_path: Path) -> None:
    diffaccel.save_pretrained(_pipe("dpm")[0], tmp_path / "out", variant="fp16")
    assert list((tmp_path / "out" / "transformer").glob("*.fp16.safetensors"))


def test_stable_diffusion_reloads_too(tmp_path: Path) -> None:
    pipe, call = toy = tiny.sd()
    picture = draw(toy, UniPCScheduler(**SD_BETAS), 5)
    diffaccel.save_pretrained(pipe, tmp_path / "out")
    again = _open(tmp_path / "out", pipe)
    restored = UniPCScheduler.from_config(again.scheduler.config)
    assert relative(draw((again, call), restored, 5), picture) == 0


def _index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model_index.json").read_text())


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
