"""References: folders, files, moments, the packaged one, and those of other networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from diffaccel.eval import DataError, Moments, ProtocolMismatch, emoji_clip, extract, frechet
from diffaccel.eval.runs.reference_set import TWEMOJI, load_reference, save_reference
from tests.eval.noise_pipe import colours, make_run
from tests.eval.offline import _no_network  # noqa: F401


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_run(tmp_path / "real", 8, num=40).folder


@pytest.fixture
def features(folder: Path) -> np.ndarray:
    return extract(folder, colours(), progress=False)["features"]


def test_a_folder_a_file_and_moments_are_the_same_reference(folder: Path, features: np.ndarray, tmp_path: Path) -> None:
    saved = save_reference(folder, colours(), tmp_path / "new" / "a.safetensors")
    save_reference(folder, colours(), tmp_path / "b.safetensors", moments_only=True)
    read = load_reference(folder, colours(), progress=False)
    whole = load_reference(tmp_path / "new" / "a.safetensors", colours())
    moments = load_reference(tmp_path / "b.safetensors", colours())
    assert saved.digest == read.digest == whole.digest
    assert (read.name, whole.name, moments.name) == ("real", "a", "b")
    assert read.n == whole.n == moments.n == 40
    assert whole.features is not None
    assert np.array_equal(whole.features["features"], features)
    assert moments.features is None
    x = np.random.default_rng(0).random((30, 12))
    for reference in (whole, moments):
        assert frechet(x, reference.gaussian) == pytest.approx(frechet(x, features), rel=1e-9)


def test_the_file_says_what_it_was_made_of(folder: Path, tmp_path: Path) -> None:
    save_reference(folder, colours(), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="numpy") as file:
        assert file.metadata() == {"extractor": "colours-clean", "weights": "", "n": "40", "source": "real"}


def test_twemoji_is_in_the_package() -> None:
    found = load_reference("twemoji", emoji_clip())
    assert (found.n, found.gaussian.mean.shape) == (1905, (128,))
    assert found.name == TWEMOJI.stem
    with pytest.raises(ProtocolMismatch, match=r"made with emoji-clip-[0-9a-f]{8}-clip"):
        load_reference("twemoji", colours())


def test_a_file_of_another_network_resize_or_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    save_reference(folder, colours("other"), tmp_path / "a.safetensors")
    with pytest.raises(ProtocolMismatch, match="made with other-clean, and the pictures are seen by colours-clean"):
        load_reference(tmp_path / "a.safetensors", colours())
    save_file({"features": np.zeros((4, 12), np.float32)}, tmp_path / "b.safetensors")
    with pytest.raises(ProtocolMismatch, match="an unknown extractor"):
        load_reference(tmp_path / "b.safetensors", colours())


def test_npz_of_the_field_has_moments_and_may_lack_their_number(features: np.ndarray, tmp_path: Path) -> None:
    moments = Moments.of(features)
    arrays = {"mu": moments.mean, "sigma": moments.covariance()}
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez(tmp_path / "b.npz", **arrays, n=40)
    x = np.random.default_rng(0).random((30, 12))
    for source in (f"{tmp_path}/a.npz:40", tmp_path / "b.npz"):
        found = load_reference(source, colours())
        assert (found.n, found.features) == (40, None)
        assert frechet(x, found.gaussian) == pytest.approx(frechet(x, features), rel=1e-9)
    with pytest.raises(DataError, match="does not say how many pictures"):
        load_reference(tmp_path / "a.npz", colours())


def test_npz_of_another_dimension_is_of_another_network(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", mu=np.zeros(2048), sigma=np.eye(2048), n=5000)
    with pytest.raises(ProtocolMismatch, match=r"a\.npz is of 2048 features, and colours has 12"):
        load_reference(tmp_path / "a.npz", colours())


def test_what_is_no_reference_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no reference .*nowhere: give a folder of pictures"):
        load_reference(tmp_path / "nowhere", colours())
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures in"):
        load_reference(tmp_path / "empty", colours())
    for name in ("a.safetensors", "a.png", "a.txt"):
        (tmp_path / name).write_bytes(b"\0" * 100)
        with pytest.raises(DataError, match="is no reference, or damaged"):
            load_reference(tmp_path / name, colours())
    (tmp_path / "a.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match="damaged"):
        load_reference(f"{tmp_path}/a.npz:3", colours())
    save_reference(folder, colours(), tmp_path / "b.safetensors", moments_only=True)
    data = (tmp_path / "b.safetensors").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(data[:-10])
    with pytest.raises(DataError, match="is no reference, or damaged"):
        load_reference(tmp_path / "b.safetensors", colours())


def test_a_reference_is_not_made_of_one_picture_or_into_another_kind_of_file(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a \.safetensors file, not a\.npz"):
        save_reference(folder, colours(), tmp_path / "a.npz")
    one = make_run(tmp_path / "one", 8, num=1).folder
    with pytest.raises(DataError, match="at least 2 pictures"):
        save_reference(one, colours(), tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()
