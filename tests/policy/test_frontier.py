"""The frontier draws the same pictures in every row, and writes what it measured."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import diffaccel
from diffaccel.samplers.policy import attached
from diffaccel.samplers.policy.frontier import Frontier, frontier
from tests import tiny

STEPS = 5


@pytest.fixture(scope="module")
def pipe() -> Any:
    return copy.deepcopy(tiny.sd()[0])


@pytest.fixture(scope="module")
def small(pipe: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return type(pipe.unet).from_config({**pipe.unet.config, "block_out_channels": (4, 8)}).eval()


@pytest.fixture(scope="module")
def calls() -> list[dict[str, Any]]:
    """Two "prompts": this toy takes embeddings."""
    _, call = tiny.sd()
    call.pop("output_type")
    return [call, {**call, "prompt_embeds": call["prompt_embeds"].flip(-1)}]


@pytest.fixture(scope="module")
def measured(pipe: Any, small: Any, calls: list[dict[str, Any]]) -> Frontier:
    def brightness(pictures: Any, prompts: Any) -> list[float]:
        assert len(pictures) == len(prompts)
        return [float(np.asarray(picture).mean()) for picture in pictures]

    options = {"fractions": (0.0, 0.4, 1.0), "score": brightness, "num_inference_steps": STEPS}
    return diffaccel.stitch_frontier(pipe, small, calls, **options)


def test_rows_are_those_of_stitched_pipelines(pipe, small, calls, measured):
    assert [point.name for point in measured.points] == ["0% small", "40% small", "100% small"]
    for point, fraction in zip(measured.points, (0.0, 0.4, 1.0), strict=True):
        with diffaccel.stitch(pipe, small, fraction=fraction) as handle:
            seed = torch.Generator().manual_seed(0)
            picture = pipe(**calls[0], num_inference_steps=STEPS, generator=seed).images[0]
            assert point.macs == handle.report().macs
        assert point.score[0] == float(np.asarray(picture).mean())


def test_the_first_row_is_the_measure(measured):
    whole, some, all_ = measured.points
    assert whole.psnr == (float("inf"),) * 2
    assert whole.time == whole.share == 1
    assert some.psnr[0] > all_.psnr[0]
    assert 1 > some.share > all_.share > 0
    assert abs(some.share - (0.6 + 0.4 * all_.share)) < 1e-9


def test_psnr_is_that_of_the_pictures(measured):
    whole, some, _ = (np.asarray(row[1], np.float64) for row in measured.pictures)
    expected = 10 * np.log10(255**2 / np.square(whole - some).mean())
    assert measured.points[1].psnr[1] == pytest.approx(expected)


def test_nothing_stays_attached(pipe, measured):
    assert attached(pipe) is None


def test_files(measured, tmp_path):
    pytest.importorskip("matplotlib")
    files = measured.save(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(path.name for path in files)
    told = json.loads((tmp_path / "new" / "frontier.json").read_text())
    assert told["points"][0]["psnr"] == [None, None]
    assert told["points"][1]["share"] == measured.points[1].share
    assert len((tmp_path / "new" / "frontier.md").read_text().splitlines()) == 2 + len(measured.points)
    for name in ("frontier.png", "pictures.png"):
        with Image.open(tmp_path / "new" / name) as picture:
            assert min(picture.size) > 200


def test_a_policy_that_fails_is_taken_off(pipe, calls):
    def broken() -> Any:
        handle = diffaccel.early_exit(pipe, [2, 1])
        handle._hook.policy = object()  # type: ignore[assignment]
        return handle

    with pytest.raises(AttributeError):
        frontier(pipe, {"broken": broken}, calls, num_inference_steps=2)
    assert attached(pipe) is None


def test_bad_input(pipe, small, calls):
    with pytest.raises(ValueError, match="list of prompts"):
        frontier(pipe, {"whole": lambda: None}, "a red heart")
    with pytest.raises(ValueError, match="give one"):
        diffaccel.stitch_frontier(pipe, [small, small], calls)
