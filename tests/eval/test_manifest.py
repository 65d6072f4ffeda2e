"""The job's record: all that decides the pictures, in JSON, and read back strictly."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from diffaccel.eval import DataError
from diffaccel.eval.runs.manifest import JOB_KEYS, SEED_RULE, digest, environment, job_of, read_job, start_run
from diffaccel.eval.runs.prompts import prompts_hash
from tests.eval import toy
from tests.eval.noise_pipe import NoisePipe
from tests.eval.offline import _no_network  # noqa: F401


def job(**changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"num": 5, "seed": 0, "batch": 4, "latents": False, "call": {"num_inference_steps": 2}}
    return job_of(toy.ddpm(), toy.PROMPTS, **(options | changes))


def test_a_job_names_what_decides_the_pictures() -> None:
    found = job(call={"sizes": (1, 2), "eta": 0.5})
    assert found["call"] == {"sizes": [1, 2], "eta": 0.5}
    assert found["prompts"] == prompts_hash(toy.PROMPTS)
    assert found["seed_rule"] == SEED_RULE
    assert found["scheduler"]["class"] == "DDPMScheduler"
    assert found["dtype"] == "float32"
    assert found.keys() >= JOB_KEYS
    assert json.loads(json.dumps(found)) == found


def test_the_weights_are_those_of_every_component() -> None:
    options: dict[str, Any] = {"num": 5, "seed": 0, "batch": 4, "latents": False, "call": {}}
    hashes = []
    for value in (1.0, 2.0, 2.0):
        pipe: Any = NoisePipe()
        pipe.controlnet = pipe.components["controlnet"] = torch.nn.Linear(2, 2, bias=False)
        torch.nn.init.constant_(pipe.controlnet.weight, value)
        hashes.append(job_of(pipe, toy.PROMPTS, **options)["weights"])
    assert hashes[0] != hashes[1] == hashes[2]


def test_numbers_that_json_does_not_have_can_be_compared() -> None:
    pipe = toy.ddpm()
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(lambda_min_clipped=-float("inf"))
    options: dict[str, Any] = {"num": 5, "seed": 0, "batch": 4, "latents": False}
    found = job_of(pipe, toy.PROMPTS, call={"clip": float("nan")}, **options)
    assert found == job_of(pipe, toy.PROMPTS, call={"clip": float("nan")}, **options)
    assert found["scheduler"]["lambda_min_clipped"] == "-Infinity"


def test_the_digest_is_of_the_content_not_of_the_order() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1, "b": [2]}) != digest({"a": 1, "b": [3]})
    assert digest(job()) == digest(job())
    assert digest(job()) != digest(job(seed=1))


def test_the_environment_says_what_was_used() -> None:
    about = environment()
    assert about["versions"]["torch"]
    assert about["processes"] == 1
    assert about["threads"] == 1


def test_a_run_begins_once(tmp_path: Path) -> None:
    start_run(tmp_path / "a" / "b", job())
    start_run(tmp_path / "a" / "b", job())
    assert read_job(tmp_path / "a" / "b") == job()
    assert sorted(file.name for file in (tmp_path / "a" / "b").iterdir()) == ["environment.json", "job.json"]


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[]", b'{"num": 3}', b"null"])
def test_a_damaged_job_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "job.json").write_bytes(content)
    with pytest.raises(DataError, match=r"job\.json is damaged .*delete the folder and generate again"):
        read_job(tmp_path)
    with pytest.raises(DataError, match="damaged"):
        start_run(tmp_path, job())


def test_a_folder_without_a_job_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(DataError, match=r"is no run: it has no job\.json"):
            read_job(path)


def test_what_changes_a_forward_is_another_job() -> None:
    """Caching, token merging, FreeU: in no weight and no config, and what this suite is there to measure."""

    def additions(change: Callable[[Any], Any]) -> str:
        pipe = copy.deepcopy(toy.pipeline("sd")[0])  # the toys are shared by all tests
        change(pipe)
        return job_of(pipe, toy.PROMPTS, num=2, seed=0, batch=2, latents=False, call={})["additions"]

    def replace_forward(pipe: Any) -> None:
        forward = pipe.unet.forward
        pipe.unet.forward = lambda *args, **kwargs: forward(*args, **kwargs)

    plain = additions(lambda pipe: None)
    assert additions(lambda pipe: None) == plain
    changed = [
        additions(lambda pipe: pipe.unet.register_forward_hook(lambda module, args, output: None)),
        additions(lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)),
        additions(lambda pipe: pipe.unet.set_attn_processor(AttnProcessor())),
        additions(replace_forward),
    ]
    assert len({plain, *changed}) == 5
