"""What a pipeline is called with, and that it is quiet."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffaccel.eval import DataError
from diffaccel.eval.runs.calls import check_call, conditioned, quiet, seeded_noise_only
from tests import tiny
from tests.eval import toy
from tests.eval.offline import _no_network  # noqa: F401


class Open:
    """A pipeline of somebody's own."""

    def __call__(self, prompt: list[str], **call: Any) -> None: ...


class Bare:
    """No pipeline for prompts."""

    def __call__(self, image: Any) -> None: ...


def test_each_kind_gets_its_condition() -> None:
    sd, dit, ddpm = toy.pipeline("sd")[0], tiny.dit()[0], toy.ddpm()
    assert conditioned(sd, ["a", "b"], {"eta": 1}) == {"prompt": ["a", "b"], "eta": 1}
    assert conditioned(dit, ["3", "07"], {}) == {"class_labels": [3, 7]}
    assert conditioned(ddpm, ["a", "b"], {}) == {"batch_size": 2}
    with pytest.raises(DataError, match="must be class numbers"):
        conditioned(dit, ["3", "-1"], {})
    with pytest.raises(DataError, match="Bare takes neither prompts nor class labels"):
        conditioned(Bare(), ["a"], {})


def test_a_negative_prompt_is_repeated_and_the_call_stays_as_it_was() -> None:
    call = {"negative_prompt": "ugly"}
    assert conditioned(Open(), ["a", "b"], call)["negative_prompt"] == ["ugly", "ugly"]
    assert conditioned(Open(), ["a"], {"negative_prompt": ["x"]})["negative_prompt"] == ["x"]
    assert call == {"negative_prompt": "ugly"}


def test_unknown_arguments_are_refused_where_they_would_be_passed_over() -> None:
    check_call(toy.pipeline("sd")[0], {"guidance_scale": 2, "num_inference_steps": 3})
    check_call(Open(), {"anything": 1})
    for pipe in (toy.pipeline("sd")[0], toy.ddpm()):
        with pytest.raises(ValueError, match=r"has no argument steps, guide; there are .*num_inference_steps"):
            check_call(pipe, {"steps": 2, "guide": 3})
    with pytest.raises(ValueError, match="generator, output_type cannot be given"):
        check_call(Open(), {"generator": 1, "output_type": "pil"})


def test_the_bar_comes_back_after_an_error() -> None:
    pipe = toy.ddpm()
    pipe.set_progress_bar_config(desc="mine")

    def fail() -> None:
        with quiet(pipe):
            assert pipe._progress_bar_config["disable"]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert pipe._progress_bar_config == {"desc": "mine"}


def test_noise_from_the_global_generator_is_an_error() -> None:
    with seeded_noise_only(toy.ddpm()):
        torch.randn(2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="no seed decides"), seeded_noise_only(toy.ddpm()):
        torch.randn(2)
