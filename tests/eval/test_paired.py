"""Pictures against their twins: who is whose twin, averages and their errors, and what cannot be compared."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffaccel.eval import DataError, ProtocolMismatch, latent_mse, psnr
from diffaccel.eval.paired import PAIRED_MEASURES, average, compare_latents, compare_pictures
from diffaccel.eval.runs.run import Run
from tests.eval.noise_pipe import PROMPTS, make_run
from tests.eval.offline import _no_network  # noqa: F401


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    folder = tmp_path_factory.mktemp("runs")
    return make_run(folder / "fast", 2, num=70), make_run(folder / "base", 8, num=70)


def test_twins_are_compared_in_order_whatever_the_batch(pair: tuple[Run, Run]) -> None:
    whole = compare_pictures(*pair, psnr, batch=70)
    assert isinstance(whole, np.ndarray)
    for batch in (1, 7, 64):
        assert np.array_equal(np.asarray(compare_pictures(*pair, psnr, batch=batch)), whole)
    a, b = (np.asarray(Image.open(run.paths[41]), dtype=np.float64) / 255 for run in pair)
    assert whole[41] == pytest.approx(-10 * np.log10(((a - b) ** 2).mean()), rel=1e-5)


def test_latents_are_compared_in_order_over_shards(pair: tuple[Run, Run]) -> None:
    found = compare_latents(*pair)
    a, b = (run.latents() for run in pair)
    assert a is not None
    assert b is not None
    assert np.array_equal(np.asarray(found), latent_mse(a, b).numpy())
    assert len(found) == 70


def test_latents_of_another_shape_are_a_reason(pair: tuple[Run, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    fast, base = pair
    shapes = {fast.folder: (70, 3, 8, 8), base.folder: (70, 3, 4, 4)}
    monkeypatch.setattr(Run, "latents", lambda run: torch.zeros(shapes[run.folder]))
    assert compare_latents(fast, base) == "its latents and the baseline's differ in shape, (3, 8, 8) and (3, 4, 4)"


def test_others_are_never_paired(pair: tuple[Run, Run], tmp_path: Path) -> None:
    base = pair[1]
    others = {
        "other seeds": make_run(tmp_path / "seed", 2, num=70, seed=1),
        "other prompts": make_run(tmp_path / "prompts", 2, num=70, prompts=PROMPTS[::-1]),
        "69 and 70 pictures": make_run(tmp_path / "num", 2, num=69),
    }
    for sentence, run in others.items():
        with pytest.raises(ProtocolMismatch, match=sentence):
            compare_pictures(run, base, psnr)
        with pytest.raises(ProtocolMismatch, match=sentence):
            compare_latents(run, base)


def test_several_sizes_are_a_reason_in_one_run_too(pair: tuple[Run, Run], tmp_path: Path) -> None:
    large = make_run(tmp_path / "large", 2, num=70, size=20)
    assert "(16 x 16, 20 x 20)" in str(compare_pictures(large, pair[1], psnr))
    mixed = make_run(tmp_path / "mixed", 2, num=70)
    Image.new("RGB", (16, 10)).save(mixed.paths[40])
    assert "(16 x 10, 16 x 16)" in str(compare_pictures(mixed, pair[1], psnr)), "width x height"


def test_a_damaged_picture_is_an_error(pair: tuple[Run, Run], tmp_path: Path) -> None:
    run = make_run(tmp_path / "bad", 2, num=70)
    run.paths[69].write_bytes(b"")
    with pytest.raises(DataError, match=r"000069\.png"):
        compare_pictures(run, pair[1], psnr)


def test_means_have_the_error_of_prompts_left_out() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = average(values, [f"p{i}" for i in range(400)], "mean")
    assert (found.value, found.n) == (pytest.approx(values.mean()), 400)
    assert found.se == pytest.approx(values.std(ddof=1) / 20, rel=0.35)
    each = np.repeat(values, 4)  # four pictures of a prompt that are the same tell no more than one
    twice = average(each, [f"p{i // 4}" for i in range(1600)], "mean")
    assert twice.se == pytest.approx(found.se, rel=0.05)


def test_medians_have_the_error_of_prompts_drawn_again() -> None:
    values = np.random.default_rng(0).normal(30, 2, 400)
    found = average(values, [f"p{i}" for i in range(400)], "median")
    assert found.value == np.median(values)
    assert found.se == pytest.approx(1.2533 * 2 / 20, rel=0.3)
    assert average(values, [f"p{i}" for i in range(400)], "median") == found, "it has seeds of its own"


@pytest.mark.parametrize("infinite", [0.6, 1.0])
def test_identical_pictures_make_the_median_infinite_without_an_error(infinite: float) -> None:
    values = np.full(50, 30.0) + np.arange(50)
    values[: int(infinite * 50)] = np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = average(values, [f"p{i}" for i in range(50)], "median")
    assert found.value == math.inf
    assert found.se is None


@pytest.mark.parametrize("kind", ["mean", "median"])
def test_one_prompt_has_no_error(kind: str) -> None:
    found = average(np.array([1.0, 2.0, 6.0]), ["p"] * 3, kind)  # type: ignore[arg-type]
    assert (found.value, found.se, found.n) == ({"mean": 3.0, "median": 2.0}[kind], None, 3)


def test_what_spans_decades_or_reaches_infinity_is_told_by_its_median() -> None:
    kinds = {key: measure.average for key, measure in PAIRED_MEASURES.items()}
    assert kinds == {"psnr": "median", "ssim": "mean", "lpips": "mean", "latent_mse": "median"}
