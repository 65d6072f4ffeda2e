"""Moments against NumPy's own, in pieces and whole, and files that are not what they should be."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from diffaccel.eval.errors import DataError
from diffaccel.eval.statistics.moments import Moments, import_npz, load_moments, merge_all, save_moments


def features(n: int = 200, d: int = 6, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + rng.standard_normal(d)


def test_moments_are_mean_and_covariance() -> None:
    x = features()
    moments = Moments.of(x)
    assert moments.n == 200
    np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(moments.covariance(), np.cov(x, rowvar=False), rtol=1e-12)


def test_float32_features_are_summed_in_float64() -> None:
    x = features().astype(np.float32)
    moments = Moments.of(x)
    assert moments.mean.dtype == moments.m2.dtype == np.float64
    np.testing.assert_array_equal(moments.m2, Moments.of(x.astype(np.float64)).m2)


@pytest.mark.parametrize("size", [1, 64, 199])
def test_merged_shards_are_the_whole(size: int) -> None:
    x = features()
    merged = merge_all([Moments.of(x[i : i + size]) for i in range(0, len(x), size)])
    whole = Moments.of(x)
    assert merged.n == whole.n
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-12, atol=1e-12 * whole.m2.max())
    np.testing.assert_array_equal(merged.m2, merged.m2.T)


def test_merging_repeats_bit_by_bit() -> None:
    shards = [Moments.of(features(64, seed=i)) for i in range(9)]
    one, two = merge_all(shards), merge_all(list(shards))
    assert one.m2.tobytes() == two.m2.tobytes()
    assert one.mean.tobytes() == two.mean.tobytes()


def test_digits_of_features_far_from_zero_survive() -> None:
    small = 1e-2 * features()
    far = 1e3 + small
    exact = Moments.of(far - 1e3)  # the subtraction is exact, so that these are the same vectors
    merged = merge_all([Moments.of(far[i : i + 16]) for i in range(0, len(far), 16)])
    np.testing.assert_allclose(merged.m2, exact.m2, rtol=1e-9, atol=1e-9 * exact.m2.max())
    raw = far.T @ far - len(far) * np.multiply.outer(far.mean(0), far.mean(0))
    assert np.abs(raw - exact.m2).max() > 1e-9 * exact.m2.max()  # what raw sums would give


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (np.ones(4), r"\(N, d\)"),
        (np.ones((0, 4)), r"\(N, d\)"),
        (np.ones((2, 3), dtype=complex), "numbers"),
        (np.array([["a", "b"]]), "numbers"),
        ([[1.0, 2.0], [np.nan, 0.0]], "row 1 is not"),
        ([[np.inf, 2.0], [1.0, 0.0]], "row 0 is not"),
    ],
)
def test_bad_features_are_refused(bad: np.ndarray, match: str) -> None:
    with pytest.raises(DataError, match=match):
        Moments.of(bad)


def test_moments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="6 and 5 features"):
        Moments.of(features()).merge(Moments.of(features(d=5)))
    with pytest.raises(DataError, match="at least one shard"):
        merge_all([])
    with pytest.raises(DataError, match="at least 2 pictures"):
        Moments.of(np.ones((1, 3))).covariance()
    with pytest.raises(DataError, match="scatter"):
        Moments(3, np.zeros(2), np.zeros((3, 3)))
    with pytest.raises(DataError, match="finite"):
        Moments(3, np.zeros(1), np.full((1, 1), np.nan))


def test_saved_moments_come_back_bit_by_bit(tmp_path: Path) -> None:
    moments, file = Moments.of(features()), tmp_path / "ref.safetensors"
    save_moments(moments, file, {"extractor": "emoji-clip"})
    again, metadata = load_moments(file)
    assert metadata == {"extractor": "emoji-clip"}
    assert again.n == moments.n
    assert again.mean.tobytes() == moments.mean.tobytes()
    assert again.m2.tobytes() == moments.m2.tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["ref.safetensors"]  # nothing half written


def test_processes_that_save_the_same_moments_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moments, file, replace = Moments.of(features()), tmp_path / "ref.safetensors", os.replace

    def another_is_faster(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(os, "getpid", lambda: -1)
        save_moments(moments, file)
        replace(source, target)

    monkeypatch.setattr(os, "replace", another_is_faster)
    save_moments(moments, file)
    assert load_moments(file)[0].n == moments.n
    assert [path.name for path in tmp_path.iterdir()] == ["ref.safetensors"]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "ref.safetensors"
    save_moments(Moments.of(features()), file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DataError, match="damaged"):
        load_moments(file)
    with pytest.raises(FileNotFoundError):
        load_moments(tmp_path / "none.safetensors")


def test_npz_statistics_are_imported(tmp_path: Path) -> None:
    x = features()
    np.savez(tmp_path / "a.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False), n=200)
    np.savez(tmp_path / "b.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False).astype(np.float32))
    for moments, rtol in ((import_npz(tmp_path / "a.npz"), 1e-12), (import_npz(tmp_path / "b.npz", n=200), 1e-5)):
        assert moments.n == 200
        np.testing.assert_allclose(moments.m2, Moments.of(x).m2, rtol=rtol, atol=rtol)
    with pytest.raises(DataError, match="n=50000"):
        import_npz(tmp_path / "b.npz")


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('unpickled')",))


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"mu": np.zeros(3)}, "`mu` and `sigma`"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, "wanted"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0.0, 1.0]])}, "not symmetric"),
        ({"mu": np.array([np.nan, 0]), "sigma": np.eye(2)}, "finite"),
        ({"mu": np.array([Trap(), 0], dtype=object), "sigma": np.eye(2)}, "pickled"),
    ],
)
def test_other_npz_files_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], match: str) -> None:
    file = tmp_path / "stats.npz"
    np.savez(file, **arrays)
    with pytest.raises(DataError, match=match):
        import_npz(file, n=10)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    file = tmp_path / "stats.npz"
    file.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match="pickled"):
        import_npz(file, n=10)
    file.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(DataError, match="damaged"):
        import_npz(file, n=10)
    np.save(tmp_path / "array.npy", np.eye(2))
    with pytest.raises(DataError, match=r"no \.npz"):
        import_npz(tmp_path / "array.npy", n=10)


def test_equal_moments_are_equal_bytes(tmp_path: Path) -> None:
    """safetensors orders metadata by chance: once in many the bytes would be equal without our order."""
    moments = Moments.of(np.random.default_rng(0).standard_normal((9, 3)))
    about = {name: name for name in ["extractor", "weights", "source", "n", "licence"]}
    for i in range(8):
        save_moments(moments, tmp_path / f"{i}.safetensors", about)
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(8)}) == 1
    assert load_moments(tmp_path / "0.safetensors")[1] == about
