"""Every picture is a function of its prompt and seed: not of the batch, the order, the number or an interruption."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from diffaccel.eval import DataError, Prompt, ProtocolMismatch, generate, read_run
from diffaccel.eval.files import STALE_SECONDS
from tests import tiny
from tests.eval import toy
from tests.eval.offline import _no_network  # noqa: F401

PROMPTS = toy.PROMPTS


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in read_run(folder).paths]).astype(int)


def make(out: Path, prompts: list[Prompt] = PROMPTS, pipe: Any = None, **options: Any) -> Path:
    return generate(pipe or toy.ddpm(), prompts, out, **{"progress": False, "num_inference_steps": 2, **options})


def test_a_run_says_what_each_picture_is(tmp_path: Path) -> None:
    run = read_run(make(tmp_path / "run", num=7, seed=3))
    assert [path.name for path in run.paths] == [f"{i:06d}.png" for i in range(7)]
    assert run.ids == ("p0", "p1", "p2", "p3", "p4", "p0", "p1")
    assert run.prompts[1] == "a red car"
    assert run.seeds == (3, 3, 3, 3, 3, 4, 4)
    assert len(set(run.hashes)) == 7  # another seed is another picture
    assert run.job["pipeline"] == "DDPMPipeline"
    assert run.job["call"] == {"num_inference_steps": 2}
    assert run.latents() is None
    assert [path.name for path in (tmp_path / "run" / "images").iterdir()] == ["00000"]


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_pictures_do_not_depend_on_the_batch(tmp_path: Path, batch: int) -> None:
    pipe, call = toy.pipeline("sd")
    whole = pictures(make(tmp_path / "whole", pipe=pipe, batch=5, **call))
    other = pictures(make(tmp_path / "other", pipe=pipe, batch=batch, **call))
    assert abs(whole - other).max() <= 1
    assert abs(whole - whole[::-1]).max() > 10


def test_noise_hangs_on_the_id_and_the_seed_not_on_the_place(tmp_path: Path) -> None:
    forwards = pictures(make(tmp_path / "forwards", num=10))
    backwards = pictures(make(tmp_path / "backwards", PROMPTS[::-1]))
    assert abs(forwards[:5] - backwards[::-1]).max() <= 1
    later = pictures(make(tmp_path / "later", seed=1))
    assert abs(forwards[5:] - later).max() <= 1
    renamed = pictures(make(tmp_path / "renamed", [Prompt("other", prompt.text) for prompt in PROMPTS[:1]]))
    assert abs(forwards[0] - renamed[0]).max() > 10


def test_the_global_generator_decides_nothing_and_stays(tmp_path: Path) -> None:
    first = pictures(make(tmp_path / "first"))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert (first == pictures(make(tmp_path / "second"))).all()
    assert torch.equal(state, torch.get_rng_state())


def test_an_interrupted_run_goes_on_with_the_same_bytes(tmp_path: Path) -> None:
    whole = read_run(make(tmp_path / "whole", num=70, batch=32))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "images" / "00001")
    before = (tmp_path / "cut" / "images" / "00000").stat().st_mtime_ns
    cut = read_run(make(tmp_path / "cut", num=70, batch=32))
    assert cut.hashes == whole.hashes
    assert (tmp_path / "cut" / "images" / "00000").stat().st_mtime_ns == before


def test_what_killed_processes_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    make(tmp_path)
    old, young = tmp_path / "images" / ".00000.123.part", tmp_path / "images" / ".00000.124.part"
    for part in (old, young):
        part.mkdir()
        (part / "000000.png").write_bytes(b"half")
    os.utime(old, (0, young.stat().st_mtime - STALE_SECONDS - 60))
    make(tmp_path)
    assert not old.exists()
    assert young.exists()  # another process may be writing it
    assert read_run(tmp_path).paths


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num": 6}, "num"),
        ({"seed": 1}, "seed"),
        ({"batch": 4}, "batch"),
        ({"num_inference_steps": 3}, "call"),
        ({"prompts": PROMPTS[:4]}, "num, prompts"),
        ({"prompts": [Prompt(p.id, p.text + ".") for p in PROMPTS]}, "prompts"),
    ],
)
def test_another_job_in_the_folder_is_refused_and_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    make(tmp_path)
    job = (tmp_path / "job.json").read_bytes()
    with pytest.raises(ProtocolMismatch, match=rf"\({named} differ\); give another folder"):
        make(tmp_path, **change)
    assert (tmp_path / "job.json").read_bytes() == job


def test_other_weights_and_another_scheduler_are_another_job(tmp_path: Path) -> None:
    make(tmp_path)
    pipe = toy.ddpm()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ProtocolMismatch, match=r"\(scheduler differ\)"):
        make(tmp_path, pipe=pipe)
    pipe = toy.ddpm()
    next(pipe.unet.parameters()).data.mul_(1.001)
    with pytest.raises(ProtocolMismatch, match=r"\(weights differ\)"):
        make(tmp_path, pipe=pipe)


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="not empty and holds no run"):
        make(tmp_path)
    with pytest.raises(DataError, match="is a file"):
        make(tmp_path / "thesis.tex")


def test_a_folder_of_which_only_the_environment_was_written_is_no_obstacle(tmp_path: Path) -> None:
    make(tmp_path / "run")
    (tmp_path / "run" / "job.json").rename(tmp_path / "run" / ".job.json.part")  # killed in between
    shutil.rmtree(tmp_path / "run" / "images")
    assert read_run(make(tmp_path / "run")).paths


@pytest.mark.parametrize("wrong", [{"num": 0}, {"batch": 0}, {"prompts": []}])
def test_nothing_to_do_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs prompts, num >= 1 and batch >= 1"):
        make(tmp_path, **wrong)


class Faulty(diffusers.DDPMPipeline):
    """Runs out of memory above 3 pictures, and spoils one of them if told to."""

    asked: list[int]
    spoil = 0.0

    @torch.no_grad()
    def __call__(self, batch_size: int = 1, generator: Any = None, num_inference_steps: int = 2, **call: Any) -> Any:
        self.asked.append(batch_size)
        if batch_size > 3:
            raise torch.OutOfMemoryError("too large")
        output: Any = super().__call__(batch_size, generator, num_inference_steps, **call)
        if self.spoil:
            output.images[0, 0, 0] = self.spoil
        return output


def faulty(spoil: float = 0.0) -> Faulty:
    base = toy.ddpm()
    pipe = Faulty(base.unet, base.scheduler)
    pipe.asked, pipe.spoil = [], spoil
    return pipe


def test_a_batch_that_does_not_fit_is_halved_with_the_same_pictures(tmp_path: Path) -> None:
    pipe = faulty()
    small = pictures(make(tmp_path / "small", pipe=pipe, num=9, batch=16))
    assert pipe.asked == [9, 4, 2, 2, 2, 2, 1]
    assert abs(small - pictures(make(tmp_path / "large", num=9, batch=16))).max() <= 1


def test_no_memory_for_one_picture_is_an_error(tmp_path: Path) -> None:
    class Full(Faulty):
        def __call__(self, batch_size: int = 1, num_inference_steps: int = 2, **call: Any) -> Any:
            raise torch.OutOfMemoryError("too large")

    base = toy.ddpm()
    with pytest.raises(torch.OutOfMemoryError):
        make(tmp_path, pipe=Full(base.unet, base.scheduler), num=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.5])
def test_a_spoilt_picture_is_an_error_and_leaves_no_shard(tmp_path: Path, value: float) -> None:
    with pytest.raises(DataError, match="Faulty with DDPMScheduler: pictures must"):
        make(tmp_path, pipe=faulty(value), batch=2)
    with pytest.raises(DataError, match="lacks 1 of 1 shards"):
        read_run(tmp_path)


def test_pictures_of_one_colour_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Faulty.__call__

    def censored(self: Faulty, batch_size: int = 1, generator: Any = None, **call: Any) -> Any:
        output = whole(self, batch_size, generator, **call)
        output.images[0] = 0.0
        return output

    monkeypatch.setattr(Faulty, "__call__", censored)
    run = read_run(make(tmp_path, pipe=faulty(), batch=2, num=8))
    assert run.one_colour == (0, 2, 4, 6)
    assert "4 of 8 pictures are of one colour" in run.warnings()[0]
    assert "3 of 8 pictures repeat another one" in run.warnings()[1]


def test_schedulers_whose_noise_is_of_the_batch_are_refused(tmp_path: Path) -> None:
    pipe, call = toy.pipeline("sd")
    stand_in = type("DPMSolverSDEScheduler", (diffusers.DDIMScheduler,), {})  # the real one needs torchsde
    pipe.scheduler = stand_in.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="a picture would depend on its neighbours"):
        make(tmp_path / "run", pipe=pipe, **call)
    assert not (tmp_path / "run").exists()


def test_noise_that_no_seed_decides_is_refused(tmp_path: Path) -> None:
    pipe = tiny.dit()[0]  # it does not hand its generators on to the scheduler
    pipe.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="DiTPipeline with DDPMScheduler drew noise that no seed decides"):
        make(tmp_path / "dit", [Prompt("a", "3")], pipe=pipe)
    pipe = toy.ddpm()
    pipe.unet.mid_block.resnets[0].dropout.p = 0.5
    make(tmp_path / "eval", pipe=pipe)
    pipe.unet.train()
    with pytest.raises(ValueError, match="networks in eval mode"):
        make(tmp_path / "train", pipe=pipe)


def test_class_numbers_are_prompts(tmp_path: Path) -> None:
    pipe = tiny.dit()[0]
    run = read_run(make(tmp_path / "run", [Prompt("a", "3"), Prompt("b", "7")], pipe=pipe))
    assert run.prompts == ("3", "7")
    assert len(set(run.hashes)) == 2
    with pytest.raises(DataError, match="its prompts must be class numbers"):
        make(tmp_path / "words", [Prompt("a", "a dog")], pipe=pipe)


@pytest.mark.parametrize("kind", list(toy.CALLS))
def test_pipelines_of_every_kind_with_latents(tmp_path: Path, kind: str) -> None:
    pipe, call = toy.pipeline(kind)
    latents = kind != "pixart"  # which does not show them
    run = read_run(make(tmp_path, pipe=pipe, batch=2, latents=latents, **call))
    assert len(set(run.hashes)) == 5
    assert run.warnings() == ()
    kept = run.latents()
    assert (kept is not None) == latents
    if kept is not None:
        assert kept.shape[0] == 5
        assert kept.dtype == torch.float32


def test_kept_latents_are_those_of_the_pictures(tmp_path: Path) -> None:
    pipe, call = toy.pipeline("sd")
    run = read_run(make(tmp_path, pipe=pipe, latents=True, batch=2, num=7, **call))
    kept = run.latents()
    assert kept is not None
    with torch.no_grad():
        decoded = pipe.vae.decode(kept / pipe.vae.config.scaling_factor).sample
    expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).movedim(1, -1).numpy()
    assert abs(expected - pictures(tmp_path)).max() <= 1
    pipe, call = toy.pipeline("pixart")
    with pytest.raises(ValueError, match="PixArtAlphaPipeline does not show its latents"):
        make(tmp_path / "pixart", pipe=pipe, latents=True, **call)


def test_a_negative_prompt_is_one_string(tmp_path: Path) -> None:
    pipe, call = toy.pipeline("sd")
    plain = pictures(make(tmp_path / "plain", pipe=pipe, **call))
    bent = pictures(make(tmp_path / "bent", pipe=pipe, batch=3, negative_prompt="a blue bird", **call))
    assert abs(plain - bent).max() > 3
    assert read_run(tmp_path / "bent").job["call"]["negative_prompt"] == "a blue bird"


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ({"guidence_scale": 3}, "has no argument guidence_scale; there are .*guidance_scale"),
        ({"num_images_per_prompt": 2}, "num_images_per_prompt cannot be given"),
        ({"prompt": "a cat"}, "prompt cannot be given"),
    ],
)
def test_arguments_that_are_unknown_or_ours_leave_no_folder(
    tmp_path: Path, call: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        make(tmp_path / "run", pipe=toy.pipeline("sd")[0], **call)
    assert not (tmp_path / "run").exists()


def test_arguments_need_a_json_form(tmp_path: Path) -> None:
    pipe, call = toy.pipeline("sd")
    with pytest.raises(TypeError, match="must have a JSON form"):
        make(tmp_path / "run", pipe=pipe, latents=True, **call, cross_attention_kwargs={"scale": torch.ones(1)})
    assert not (tmp_path / "run").exists()


def test_a_disk_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == "00000":
            raise OSError(28, "No space left on device")
        whole(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        make(tmp_path)


def test_the_pipeline_s_own_progress_bar_is_quiet_and_comes_back(tmp_path: Path, capsys: Any) -> None:
    pipe = toy.ddpm()
    pipe.set_progress_bar_config(disable=False, leave=False)
    make(tmp_path, pipe=pipe)
    assert capsys.readouterr().err == ""
    assert pipe._progress_bar_config == {"disable": False, "leave": False}
