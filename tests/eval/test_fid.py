"""FID of two folders: values, errors, what is flagged, and the real Inception where its file is given."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffaccel.cli import main
from diffaccel.eval import (
    DataError,
    Estimate,
    Extractor,
    MissingWeights,
    extract,
    fid,
    frechet,
    inception,
    kid_full,
    save_reference,
)
from diffaccel.eval.fid import FolderDistance
from diffaccel.eval.networks.inception_weights import find_inception
from tests.eval.noise_pipe import colours, make_run
from tests.eval.offline import _no_network  # noqa: F401


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return make_run(folder / "a", 2, num=60).folder, make_run(folder / "b", 9, num=90, seed=5).folder


def features(folder: Path) -> np.ndarray:
    return extract(folder, colours(), progress=False)["features"].astype(np.float64)


def test_values_are_those_of_the_plain_functions(folders: tuple[Path, Path]) -> None:
    found = fid(*folders, colours(), progress=False)
    x, y = map(features, folders)
    assert found.frechet.value == pytest.approx(frechet(x, y), rel=1e-9)
    assert found.kernel == pytest.approx(kid_full(x, y), rel=1e-9)
    assert (found.n, found.m, found.deficient, found.skipped) == (60, 90, False, 0)
    assert (found.network, found.protocol) == ("colours", "colours-clean")
    assert found.frechet.se is not None
    assert 0 < found.frechet.se < found.frechet.value
    corrected = found.frechet.corrected
    assert corrected is not None
    assert corrected < found.frechet.value, "few pictures make it too large"


def test_a_file_or_run_is_the_same_second_side(folders: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = folders
    save_reference(b, colours(), tmp_path / "b.safetensors")
    save_reference(b, colours(), tmp_path / "m.safetensors", moments_only=True)
    whole = fid(a, b, colours(), progress=False)
    assert fid(a, tmp_path / "b.safetensors", colours(), progress=False) == whole
    moments = fid(a, tmp_path / "m.safetensors", colours(), progress=False)
    assert moments.kernel is None
    assert moments.frechet.value == pytest.approx(whole.frechet.value, rel=1e-9)


def test_few_pictures_take_the_exact_path_and_are_flagged(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a", 2, num=6).folder, make_run(tmp_path / "b", 9, num=8, seed=5).folder
    found = fid(a, b, colours(), progress=False)
    x, y = features(a), features(b)
    p, q = x - x.mean(0), y - y.mean(0)
    trace = np.linalg.svd(p @ q.T, compute_uv=False).sum() / np.sqrt(5 * 7)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + (p**2).sum() / 5 + (q**2).sum() / 7 - 2 * trace
    assert found.frechet.value == pytest.approx(expected, rel=1e-9)
    assert found.deficient
    assert found.frechet.se is None, "20 groups of 6 pictures say nothing"
    assert "too few for a number to publish" in found.text()


def test_between_the_exact_path_has_an_error_too(tmp_path: Path) -> None:
    """Fewer pictures than features, and enough for a jackknife."""
    plain = colours()
    wide = Extractor("wide", 192, 8, "clean", "", lambda pixels: {"features": pixels.flatten(1) / 255})
    a, b = make_run(tmp_path / "a", 2, num=50).folder, make_run(tmp_path / "b", 9, num=60, seed=5).folder
    found = fid(a, b, wide, progress=False)
    assert found.deficient
    assert found.frechet.se is not None
    assert found.frechet.value > fid(a, b, plain, progress=False).frechet.value


def test_itself_is_at_no_distance(folders: tuple[Path, Path]) -> None:
    found = fid(folders[0], folders[0], colours(), progress=False)
    assert abs(found.frechet.value) < 1e-10
    assert found.text().startswith("FD[colours] 0.0000\n")
    assert "-0.0000" not in found.text()


def test_rounding_below_zero_is_shown_as_zero() -> None:
    distance = FolderDistance("inception", "inception-clean", 50, 50, Estimate(-3e-14, 1e-14, 50, -4e-14), None, False)
    assert distance.text().splitlines()[:2] == [
        "FID 0.0000",
        "  0.0000 without the bias of 50 pictures on the first side, 95 % from 0.0000 to 0.0000",
    ]


def test_few_pictures_on_the_second_side_are_flagged_too(folders: tuple[Path, Path], tmp_path: Path) -> None:
    few = make_run(tmp_path / "few", 9, num=8, seed=5).folder
    assert fid(folders[0], few, colours(), progress=False).deficient


def test_only_the_inception_makes_an_fid(folders: tuple[Path, Path]) -> None:
    plain = colours()
    named = Extractor("inception", plain.dim, plain.size, plain.protocol, "", plain.network)
    lines = fid(*folders, named, progress=False).text().splitlines()
    assert lines[0].startswith("FID ")
    assert "without the bias of 60 pictures on the first side, 95 % from" in lines[1]
    assert lines[2].startswith("KID ")
    assert lines[3] == "60 against 90 pictures, inception-clean; compare only with the same numbers of them"
    other = fid(*folders, plain, progress=False).text()
    assert other.startswith("FD[colours] ")
    assert "FID" not in other
    assert "KID" not in other


def test_json_has_all_of_it(folders: tuple[Path, Path]) -> None:
    found = fid(*folders, colours(), progress=False)
    read = json.loads(json.dumps(found.to_json()))
    assert read["frechet"]["value"] == found.frechet.value
    assert set(read) == {"network", "protocol", "n", "m", "frechet", "kernel", "deficient", "skipped"}


def test_one_picture_is_an_error(folders: tuple[Path, Path], tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", 2, num=1).folder
    for a, b in ((one, folders[0]), (folders[0], one)):
        with pytest.raises(DataError, match="at least 2 pictures"):
            fid(a, b, colours(), progress=False)


@pytest.mark.skipif("DIFFACCEL_EVAL_HOME" not in os.environ, reason="needs DIFFACCEL_EVAL_HOME with FID's weights")
def test_with_the_real_inception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        weights = find_inception()
    except MissingWeights as error:
        pytest.skip(str(error).splitlines()[0])
    monkeypatch.setenv("DIFFACCEL_EVAL_HOME", str(tmp_path / "home"))  # where features of folders are kept
    rng = np.random.default_rng(0)
    for name, low in (("a", 0), ("b", 100)):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.fromarray(rng.integers(low, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    command = ["eval", "fid", str(tmp_path / "a"), str(tmp_path / "b"), "--weights", f"inception={weights}", "--json"]
    assert main([*command, "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    extractor = inception(weights)
    x, y = (extract(tmp_path / name, extractor, progress=False)["features"] for name in ("a", "b"))
    assert x.shape == (4, 2048)
    assert found["network"] == "inception"
    assert found["frechet"]["value"] == pytest.approx(frechet(x, y), rel=1e-9)
    assert found["deficient"]
