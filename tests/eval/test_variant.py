"""What is measured, read from text: nothing unknown is passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest

from diffaccel.eval.runs import variant
from diffaccel.eval.runs.variant import Loader, Variant, parse_variant
from tests.eval import toy
from tests.eval.offline import _no_network  # noqa: F401


def test_a_variant_is_a_model_a_scheduler_and_a_call() -> None:
    found = parse_variant("emoji-sd,scheduler=dpmpp_2m,schedule=beta,final=sigma_min,steps=8,guidance_scale=4")
    assert found == Variant(
        "emoji-sd",
        "dpmpp_2m",
        {"schedule": "beta", "final": "sigma_min"},
        {"guidance_scale": 4, "num_inference_steps": 8},
    )
    assert found.name == "emoji-sd dpmpp_2m beta sigma_min 8 steps"
    assert parse_variant("some/folder").name == "folder"
    assert parse_variant("m,name=Ours,steps=3").name == "Ours"
    assert parse_variant("m,scheduler=DDIMScheduler,scheduler.rescale_betas_zero_snr=true").name == (
        "m DDIMScheduler rescale_betas_zero_snr=True"
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("4.5", 4.5),
        ("1e-3", 1e-3),
        ("true", True),
        ("null", None),
        ("a blue bird", "a blue bird"),
        ("[999,500, 1]", [999, 500, 1]),
        ('{"a": 1, "b": [2, 3]}', {"a": 1, "b": [2, 3]}),
        ('"8"', "8"),
        ("", ""),
        ("a=b", "a=b"),
        (" 8 ", 8),
    ],
)
def test_values_are_json_or_text(text: str, value: Any) -> None:
    found = parse_variant(f"m,x={text},y=1").call
    assert found == {"x": value, "y": 1}
    assert type(found["x"]) is type(value)


def test_given_timesteps_are_the_pipeline_s_and_a_way_to_tell_time_the_scheduler_s() -> None:
    assert parse_variant("m,timesteps=[999,500]").call == {"timesteps": [999, 500]}
    assert parse_variant("m,scheduler=ddim,timesteps=integer").options == {"timesteps": "integer"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "cannot read"),
        ("m,steps", "cannot read 'm,steps': write MODEL,key=value"),
        ("m,=8", "cannot read"),
        ("m,,steps=8", "cannot read"),
        ("m,steps=8,", "cannot read"),
        ("steps=8", "cannot read"),
        ("m,timesteps=[999,500", "cannot read"),
        ("m,steps=8,steps=9", "gives num_inference_steps twice"),
        ("m,steps=8,num_inference_steps=9", "gives num_inference_steps twice"),
        ("m,scheduler=dpmpp_3", "unknown solver 'dpmpp_3'"),
        ("m,scheduler=4", "unknown solver '4'"),
        ("m,scheduler=NoSuchScheduler", "unknown solver"),
        ("m,scheduler=dpmpp_2m,schedule=bta", "unknown schedule 'bta'"),
        ("m,scheduler=dpmpp_2m,schedule=3", "unknown schedule '3'"),
        ("m,scheduler=dpmpp_2m,final=one", "unknown final 'one'; use zero, sigma_min"),
        ("m,schedule=beta", "scheduler options schedule need a scheduler"),
        ("m,scheduler.eta=1", "scheduler options eta need a scheduler"),
        ("m,scheduler=DDIMScheduler,schedule=beta", "DDIMScheduler has no option schedule; there are .*beta_start"),
        ("m,scheduler=DDIMScheduler,scheduler.use_karras=true", "has no option use_karras"),
        ("no/such.json", "there is no file no/such.json"),
    ],
)
def test_what_cannot_be_read_is_refused_before_a_model_is_loaded(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse_variant(text)


def test_a_json_file_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "fast.json"
    path.write_text(json.dumps({"model": "m", "scheduler": "dpmpp_2m", "steps": 8, "negative_prompt": "a, b"}))
    expected = Variant("m", "dpmpp_2m", {}, {"negative_prompt": "a, b", "num_inference_steps": 8})
    assert parse_variant(str(path)) == expected
    for content, sentence in [
        ("{", "is not JSON"),
        ("[]", "must hold an object with the key model"),
        ('{"steps": 8}', "must hold an object with the key model"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=sentence):
            parse_variant(str(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not JSON"):
        parse_variant(str(path))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Models that were loaded; all of them are toys."""
    names: list[str] = []

    def load(model: str, device: Any, dtype: Any) -> Any:
        names.append(model)
        if model == "broken":
            raise OSError("no such model")
        return toy.pipeline("sd")[0]

    monkeypatch.setattr(variant, "load_pipeline", load)
    return names


def test_variants_of_a_model_share_it_and_none_sees_the_scheduler_of_another(loaded: list[str]) -> None:
    load = Loader()
    pipe = load(parse_variant("m,steps=50"))
    own, config = pipe.scheduler, dict(pipe.scheduler.config)
    pipe = load(parse_variant("m,scheduler=dpmpp_2m,schedule=karras"))
    assert type(pipe.scheduler).__module__.startswith("diffaccel")
    ours = dict(pipe.scheduler.config)
    pipe = load(parse_variant("m,scheduler=UniPCMultistepScheduler,scheduler.solver_order=3"))
    assert isinstance(pipe.scheduler, diffusers.UniPCMultistepScheduler)
    assert pipe.scheduler.config["solver_order"] == 3
    assert not pipe.scheduler.config["use_karras_sigmas"]  # which the one before had
    assert pipe.scheduler.config["beta_start"] == config["beta_start"]
    assert load(parse_variant("m")).scheduler is own
    assert dict(own.config) == config
    assert dict(load(parse_variant("m,scheduler=dpmpp_2m,schedule=karras")).scheduler.config) == ours
    assert loaded == ["m"]


def test_one_model_at_a_time(loaded: list[str]) -> None:
    load = Loader()
    load(parse_variant("m"))
    load.bound(parse_variant("n"))()
    load(parse_variant("m"))
    assert loaded == ["m", "n", "m"]


def test_a_model_that_cannot_be_loaded_spoils_nothing(loaded: list[str]) -> None:
    load = Loader()
    load(parse_variant("m"))
    with pytest.raises(OSError, match="no such model"):
        load(parse_variant("broken"))
    assert load(parse_variant("m")).scheduler
    assert loaded == ["m", "broken", "m"]


def test_load_gives_the_pipeline_with_the_scheduler(loaded: list[str]) -> None:
    pipe = parse_variant("m,scheduler=DDIMScheduler,scheduler.timestep_spacing=trailing").load()
    assert pipe.scheduler.config["timestep_spacing"] == "trailing"
