"""Scores of runs against the plain functions, and every way in which a number can be missing."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffaccel.eval import (
    DataError,
    Estimate,
    Extractor,
    Prompt,
    ProtocolMismatch,
    clip_score,
    cmmd,
    extract,
    frechet,
    kid_full,
    psnr,
    read_run,
    save_reference,
    score,
    ssim,
)
from diffaccel.eval.command_line import DEFAULT_MEASURES
from diffaccel.eval.images import read_picture, to_floats
from diffaccel.eval.measure_names import DEFAULT, MEASURES
from diffaccel.eval.measures import SET_MEASURES, Features, Outcome
from diffaccel.eval.protocol import comparable
from diffaccel.eval.reports.layout import layout
from diffaccel.eval.reports.render import markdown
from diffaccel.eval.runs.run import Run
from diffaccel.eval.score import Scores
from tests.eval.noise_pipe import PROMPTS, colours, make_run
from tests.eval.offline import _no_network  # noqa: F401

SETS = ["fd", "kd", "cmmd", "cmmd_unbiased", "precision", "recall", "density", "coverage"]
PAIRS = ["psnr", "ssim", "latent_mse", "clip_distance"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: make_run(folder / name, steps, num=60) for name, steps in {"base": 9, "fast": 3, "faster": 1}.items()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("reference") / "real", 100, num=80, seed=7).folder


@pytest.fixture(scope="module")
def scores(runs: dict[str, Run], reference: Path) -> Scores:
    measures = [*SETS, "clip", *PAIRS]
    return score(runs, extractors=[colours()], measures=measures, reference=reference, progress=False)


def value(scores: Scores, row: str, key: str) -> Estimate:
    found = scores.values[row][key]
    assert isinstance(found, Estimate)
    return found


def pictures(run: Run) -> torch.Tensor:
    return to_floats(torch.stack([read_picture(path) for path in run.paths]))


def test_set_measures_are_those_of_the_plain_functions(scores: Scores, runs: dict[str, Run], reference: Path) -> None:
    y = extract(reference, colours(), progress=False)["features"]
    for name, run in runs.items():
        x = extract(run.folder, colours(), progress=False)["features"]
        plain = {"fd": frechet(x, y), "kd": kid_full(x, y), "cmmd": cmmd(x, y)}
        for key, expected in plain.items():
            assert value(scores, name, f"{key}[colours]").value == pytest.approx(expected, rel=1e-9, abs=1e-12)
            assert value(scores, name, f"{key}[colours]").n == 60


def test_clip_score_is_that_of_each_picture_and_its_own_prompt(scores: Scores, runs: dict[str, Run]) -> None:
    run = runs["fast"]
    text = colours().text
    assert text is not None
    images = torch.from_numpy(extract(run.folder, colours(), progress=False)["features"])
    expected = clip_score(images, text(list(run.prompts)))
    assert value(scores, "fast", "clip[colours]").value == pytest.approx(float(expected.mean()), abs=1e-9)
    assert np.allclose(scores.per_picture["clip[colours]"]["fast"], expected.numpy())


def test_paired_measures_are_those_of_the_plain_functions(scores: Scores, runs: dict[str, Run]) -> None:
    a, b = pictures(runs["faster"]), pictures(runs["base"])
    assert value(scores, "faster", "psnr").value == pytest.approx(float(psnr(a, b).median()), abs=0.2)
    assert value(scores, "faster", "psnr").value == np.median(psnr(a, b).numpy())
    assert value(scores, "faster", "ssim").value == pytest.approx(float(ssim(a, b).mean()), abs=1e-9)
    x, y = runs["faster"].latents(), runs["base"].latents()
    assert x is not None
    assert y is not None
    errors = (x - y).square().flatten(1).mean(1)
    assert value(scores, "faster", "latent_mse").value == pytest.approx(np.median(errors.numpy()), rel=1e-6)


def test_fewer_steps_are_worse_everywhere(scores: Scores) -> None:
    for key in ("psnr", "ssim", "latent_mse", "clip_distance[colours]"):
        sign = 1 if scores.columns[key].better == "higher" else -1
        assert sign * value(scores, "fast", key).value > sign * value(scores, "faster", key).value


def test_differences_are_those_of_the_values_and_the_baseline_has_none(scores: Scores) -> None:
    deltas = [key for key in scores.columns if key.startswith("delta:")]
    assert {key.split(":")[1].split("[")[0] for key in deltas} == {"fd", "kd", "cmmd_unbiased", "clip"}
    for key in deltas:
        assert key not in scores.values["base"]
        plain = key.removeprefix("delta:")
        for name in ("fast", "faster"):
            expected = value(scores, name, plain).value - value(scores, "base", plain).value
            assert value(scores, name, key).value == pytest.approx(expected, abs=1e-12)
    assert not {"psnr", "ssim", "latent_mse", "clip_distance[colours]"} & scores.values["base"].keys()


def test_shared_noise_makes_differences_more_certain_than_values(scores: Scores) -> None:
    difference, plain = (value(scores, "fast", key).se for key in ("delta:fd[colours]", "fd[colours]"))
    assert difference is not None
    assert plain is not None
    assert difference < plain / 2


def test_identical_runs_differ_by_nothing(runs: dict[str, Run], reference: Path, tmp_path: Path) -> None:
    twins = {"base": runs["base"], "twin": make_run(tmp_path / "twin", 9, num=60)}
    measures = ["fd", *PAIRS]
    found = score(twins, extractors=[colours()], measures=measures, reference=twins["twin"].folder, progress=False)
    assert abs(value(found, "base", "fd[colours]").value) < 1e-10
    assert abs(value(found, "twin", "fd[colours]").value) < 1e-10
    assert value(found, "twin", "psnr").value == math.inf
    assert value(found, "twin", "psnr").se is None
    assert value(found, "twin", "ssim").value == pytest.approx(1)
    assert value(found, "twin", "latent_mse").value == 0
    text = markdown(found.table("twins", twins, {}))
    assert "identical" in text
    assert "-0.0" not in text


def test_other_prompts_seeds_or_numbers_share_no_table(runs: dict[str, Run], tmp_path: Path) -> None:
    others = {
        "seed": make_run(tmp_path / "seed", 3, num=60, seed=1),
        "num": make_run(tmp_path / "num", 3, num=59),
        "prompts": make_run(tmp_path / "prompts", 3, num=60, prompts=PROMPTS[:-1]),
        "words": make_run(tmp_path / "words", 3, num=60, prompts=[Prompt(p.id, p.text + "!") for p in PROMPTS]),
    }
    groups = comparable({**runs, **others})
    assert [list(group) for group in groups] == [["base", "fast", "faster"], *([name] for name in others)]
    for name, run in others.items():
        with pytest.raises(ProtocolMismatch, match="score each group by itself"):
            score({"base": runs["base"], name: run}, extractors=[colours()], measures=["psnr"], progress=False)
    protocols = [score(group, extractors=[], measures=["psnr"], progress=False).protocol for group in groups]
    assert len({str(protocol) for protocol in protocols}) == len(groups)


def reasons(scores: Scores, row: str) -> dict[str, str]:
    return {key: found for key, found in scores.values[row].items() if isinstance(found, str)}


def scored(runs: dict[str, Run], *measures: str, **options: Any) -> Scores:
    return score(runs, **{"extractors": [colours()], "progress": False, **options}, measures=measures)


def test_without_a_reference_that_is_the_reason(runs: dict[str, Run]) -> None:
    found = scored(runs, "fd", "kd", "clip")
    assert reasons(found, "fast") == dict.fromkeys(["fd[colours]", "kd[colours]"], "no reference was given")
    assert "reference none" in found.table("", runs, {}).rows[0].protocol_text
    assert "says little" not in " ".join(found.footnotes)
    with pytest.raises(DataError, match=r"fd needs a reference; kd needs a reference$"):
        scored(runs, "fd", "kd", "clip", strict=True)


def test_without_latents_that_is_the_reason(runs: dict[str, Run], tmp_path: Path) -> None:
    pair = {"base": runs["base"], "bare": make_run(tmp_path / "bare", 3, num=60, latents=False)}
    assert "generate with latents" in reasons(scored(pair, "latent_mse"), "bare")["latent_mse"]
    with pytest.raises(DataError, match="latent MSE of bare: no latents were kept"):
        scored(pair, "latent_mse", strict=True)


def test_lpips_that_is_not_there_is_a_reason_and_one_that_is_there_is_used(runs: dict[str, Run]) -> None:
    found = scored(runs, "lpips", lpips="no weights")
    assert reasons(found, "fast") == {"lpips": "no weights"}
    with pytest.raises(DataError, match="lpips: no weights"):
        scored(runs, "lpips", lpips="no weights", strict=True)

    def brightness(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).mean((1, 2, 3)).abs()

    found = scored(runs, "lpips", lpips=brightness)
    expected = brightness(pictures(runs["fast"]), pictures(runs["base"])).mean()
    assert value(found, "fast", "lpips").value == pytest.approx(float(expected), rel=1e-5)
    assert found.protocol["lpips"] == "brightness"


def test_a_picture_that_a_measure_is_not_made_for_is_a_reason(runs: dict[str, Run]) -> None:
    def picky(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        raise DataError("at least 64 x 64 pixels")

    assert reasons(scored(runs, "lpips", "psnr", lpips=picky), "fast") == {"lpips": "at least 64 x 64 pixels"}


def test_pictures_of_two_sizes_have_set_measures_and_no_paired_ones(
    runs: dict[str, Run], reference: Path, tmp_path: Path
) -> None:
    pair = {"base": runs["base"], "large": make_run(tmp_path / "large", 3, num=60, size=24)}
    found = scored(pair, "fd", "psnr", "ssim", reference=reference)
    assert value(found, "large", "fd[colours]").value > 0
    assert set(reasons(found, "large")) == {"psnr", "ssim"}
    assert "several sizes (16 x 16, 24 x 24)" in reasons(found, "large")["psnr"]
    with pytest.raises(DataError, match="several sizes"):
        scored(pair, "psnr", strict=True)


def test_a_number_that_one_row_lacks_leaves_the_others_their_differences(
    runs: dict[str, Run], reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_large(features: Features, *args: Any) -> Outcome:
        if features["features"].std() > limit:
            raise DataError("too large")
        return SET_MEASURES["kd"].compute(features, *args)

    sizes = {name: extract(run.folder, colours(), progress=False)["features"].std() for name, run in runs.items()}
    assert sizes["faster"] > max(sizes["base"], sizes["fast"])
    limit = max(sizes["base"], sizes["fast"])
    monkeypatch.setitem(SET_MEASURES, "fd", replace(SET_MEASURES["fd"], compute=only_large))
    found = scored(runs, "fd", reference=reference)
    assert found.values["faster"] == {"fd[colours]": "too large"}
    assert value(found, "fast", "delta:fd[colours]").value != 0


def test_two_networks_of_one_name_would_share_a_column_and_are_refused(runs: dict[str, Run]) -> None:
    twins = [colours(), replace(colours(), protocol="legacy_tensorflow")]
    with pytest.raises(ValueError, match="two networks are called colours"):
        scored(runs, "clip", extractors=twins)


def test_a_damaged_picture_is_an_error_not_a_reason(runs: dict[str, Run], tmp_path: Path) -> None:
    run = make_run(tmp_path / "bad", 3, num=60)
    data = run.paths[17].read_bytes()
    run.paths[17].write_bytes(data[: len(data) // 2])
    for extractors in ([colours()], []):
        with pytest.raises(DataError, match=r"000017\.png"):
            scored({"base": runs["base"], "bad": run}, "psnr", extractors=extractors)


def test_moments_allow_fd_and_say_why_there_is_no_kd(runs: dict[str, Run], reference: Path, tmp_path: Path) -> None:
    save_reference(reference, colours(), tmp_path / "ref.safetensors", moments_only=True)
    found = scored(runs, *SETS, reference=tmp_path / "ref.safetensors")
    whole = scored(runs, "fd", reference=reference)
    assert value(found, "fast", "fd[colours]").value == pytest.approx(value(whole, "fast", "fd[colours]").value)
    assert set(reasons(found, "fast")) == {f"{key}[colours]" for key in SETS if key != "fd"}
    assert set(reasons(found, "fast").values()) == {"the reference holds moments only, no features"}


def test_a_reference_of_another_network_is_a_reason(runs: dict[str, Run], reference: Path, tmp_path: Path) -> None:
    save_reference(reference, colours("other"), tmp_path / "ref.safetensors")
    found = scored(runs, "fd", reference=tmp_path / "ref.safetensors")
    assert (
        "was made with other-clean, and the pictures are seen by colours-clean" in reasons(found, "base")["fd[colours]"]
    )
    with pytest.raises(ProtocolMismatch, match="made with other-clean"):
        scored(runs, "fd", reference=tmp_path / "ref.safetensors", strict=True)


def test_measures_that_no_network_suits_are_named_below_the_table(runs: dict[str, Run], reference: Path) -> None:
    found = scored(runs, "is", "cmmd", "clip", "psnr", "fd", extractors=[colours(text=False)], reference=reference)
    assert found.footnotes == [
        "No column: 'is' needs the features of the Inception of FID.",
        "No column: 'cmmd' needs the features of a network with CLIP's text side.",
        "No column: 'clip' needs the features of a network with CLIP's text side.",
    ]
    with pytest.raises(DataError, match="'is' needs the features of the Inception"):
        scored(runs, "is", reference=reference, strict=True)


def test_few_pictures_are_flagged(runs: dict[str, Run], reference: Path, tmp_path: Path) -> None:
    assert not scored(runs, "fd", reference=reference).footnotes
    few = {"few": make_run(tmp_path / "few", 3, num=12)}
    assert scored(few, "fd", reference=reference).footnotes == [
        "FD[colours] of 12 pictures says little: there are more features, 12, than pictures."
    ]


@pytest.mark.parametrize("num", [1, 2, 3])
@pytest.mark.parametrize("prompts", [1, 3])
def test_the_smallest_runs_have_what_they_can(num: int, prompts: int, reference: Path, tmp_path: Path) -> None:
    pair = {name: make_run(tmp_path / name, s, num=num, prompts=PROMPTS[:prompts]) for name, s in [("a", 3), ("b", 1)]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scored(pair, *SETS, "clip", *PAIRS, reference=reference)
        table = found.table("small", pair, {})
    assert value(found, "b", "psnr").value > 0
    if num == 1:
        assert "at least 2 pictures" in reasons(found, "a")["fd[colours]"]
        assert "at least 2 pictures" in reasons(found, "a")["kd[colours]"]
    else:
        y = extract(reference, colours(), progress=False)["features"]
        x = extract(pair["a"].folder, colours(), progress=False)["features"]
        assert value(found, "a", "fd[colours]").value == pytest.approx(frechet(x, y), abs=1e-9)
        assert value(found, "a", "kd[colours]").value == pytest.approx(kid_full(x, y), abs=1e-12)
    assert (value(found, "b", "psnr").se is None) == (min(num, prompts) < 2)
    assert layout(table)


def test_nearest_neighbours_of_too_few_pictures_are_a_reason(tmp_path: Path, reference: Path) -> None:
    few = {"few": make_run(tmp_path / "few", 3, num=4)}
    assert "need more samples" in reasons(scored(few, "recall", reference=reference), "few")["recall[colours]"]


def test_captions_that_were_cut_are_counted_below_the_table(runs: dict[str, Run]) -> None:
    plain = colours()

    def text(captions: list[str]) -> torch.Tensor:
        warnings.warn("3 of 30 captions are longer than 77 tokens and were cut", stacklevel=2)
        assert len(set(captions)) == len(captions), "each text once"
        assert plain.text is not None
        return plain.text(captions)

    cutting = Extractor("cutting", plain.dim, plain.size, plain.protocol, "", plain.network, text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scored(runs, "clip", extractors=[cutting])
    assert found.footnotes == ["cutting: 3 of 30 captions are longer than 77 tokens and were cut."]


def test_repeated_and_empty_pictures_are_told_below_the_table(tmp_path: Path) -> None:
    prompts = [Prompt("a", "red heart"), Prompt("b", "red heart")]  # the same words, noise of their own
    assert not make_run(tmp_path / "twice", 3, prompts=prompts).warnings()
    run = make_run(tmp_path / "same", 3, prompts=PROMPTS[:4])
    record = (run.folder / "images" / "00000" / "shard.json").read_text()
    first, second = run.hashes[:2]
    run.paths[1].write_bytes(run.paths[0].read_bytes())
    (run.folder / "images" / "00000" / "shard.json").write_text(
        record.replace(second, first).replace('"one_colour": []', '"one_colour": [3]')
    )
    same = {"same": read_run(run.folder)}
    text = markdown(scored(same, "clip").table("", same, {}))
    assert "1 of 4 pictures are of one colour" in text
    assert "1 of 4 pictures repeat another one" in text


def test_prompts_of_every_kind_reach_the_table(tmp_path: Path) -> None:
    texts = ["😀, 'quoted'", '<script>alert("x")</script>', "a, b; c|d\ne", "  \\alpha_{1} & 100 % #"]
    pair = {n: make_run(tmp_path / n, s, prompts=[Prompt(t, t) for t in texts]) for n, s in [("a", 3), ("b", 1)]}
    found = scored(pair, "clip", "psnr")
    assert pair["a"].prompts == tuple(texts)
    assert value(found, "b", "clip[colours]").n == 4


def test_unknown_measures_are_named_with_those_that_there_are(runs: dict[str, Run]) -> None:
    with pytest.raises(ValueError, match=r"unknown measure fid, foo; there are fd, .*FID and KID are fd and kd"):
        scored(runs, "fid", "psnr", "foo")


def test_the_command_line_has_the_same_measures() -> None:
    assert tuple(DEFAULT_MEASURES) == DEFAULT
    assert set(DEFAULT) < set(MEASURES)


def test_several_networks_have_columns_of_their_own(runs: dict[str, Run], reference: Path) -> None:
    found = scored(runs, "fd", "clip", extractors=[colours(), colours("other", text=False)], reference=reference)
    assert [key for key in found.columns if not key.startswith("delta")] == [
        "fd[colours]",
        "clip[colours]",
        "fd[other]",
    ]
    assert value(found, "fast", "fd[colours]") == value(found, "fast", "fd[other]")


def test_one_run_alone_has_no_differences_and_no_pairs(runs: dict[str, Run], reference: Path) -> None:
    found = scored({"base": runs["base"]}, "fd", "clip", *PAIRS, reference=reference)
    assert list(found.columns) == ["fd[colours]", "clip[colours]"]
    assert not scored({"base": runs["base"]}, *PAIRS, strict=True).columns
