"""Features are taken once; what changed, and only that, is taken again."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffaccel.eval import DataError, Extractor, callable_extractor, extract, generate
from diffaccel.eval.files import STALE_SECONDS
from diffaccel.eval.images import read_picture
from diffaccel.eval.runs.features import cache_home, default_cache
from tests.eval import toy
from tests.eval.offline import _no_network  # noqa: F401


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFACCEL_EVAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def draw(path: Path, seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, len(mode)), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels, mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """130 pictures: shards of 64, 64 and 2."""
    for i in range(130):
        draw(tmp_path / "pictures" / f"{i}.png", i)
    return tmp_path / "pictures"


def counted(**options: Any) -> tuple[Extractor, list[int]]:
    """The toy extractor, and the sizes of the batches that its network has seen."""
    base, seen = toy.extractor(**options), []

    def network(pixels: Tensor) -> dict[str, Tensor]:
        seen.append(len(pixels))
        return base.network(pixels)

    return dataclasses.replace(base, network=network), seen


def take(source: Path, extractor: Extractor | None = None, **options: Any) -> np.ndarray:
    return extract(source, extractor or toy.extractor(), progress=False, **options)["features"]


def shards(home: Path) -> list[Path]:
    return sorted(home.rglob("*.safetensors"))


def test_features_are_in_the_order_of_the_pictures(folder: Path) -> None:
    features = take(folder)
    assert features.shape == (130, 6)
    assert features.dtype == np.float32
    for i in (0, 9, 10, 64, 129):  # 9 before 10
        alone = toy.extractor()([read_picture(folder / f"{i}.png")])["features"][0]
        assert np.abs(features[i] - alone.numpy()).max() < 1e-5


def test_the_second_time_nothing_is_computed(folder: Path) -> None:
    extractor, seen = counted()
    first = take(folder, extractor)
    assert sum(seen) == 130
    assert set(seen) == {8, 2}
    assert (take(folder, extractor) == first).all()
    assert sum(seen) == 130


def test_only_the_shard_of_a_changed_picture_is_taken_anew(folder: Path) -> None:
    extractor, seen = counted()
    before = take(folder, extractor)
    draw(folder / "70.png", 999)
    after = take(folder, extractor)
    assert sum(seen) == 130 + 64
    assert [i for i in range(130) if (before[i] != after[i]).any()] == [70]


def test_removed_and_new_pictures_are_noticed(folder: Path) -> None:
    before = take(folder)
    (folder / "0.png").unlink()
    assert np.allclose(take(folder), before[1:], atol=1e-5)
    draw(folder / "0.png", 0)
    assert np.allclose(take(folder), before, atol=1e-5)


@pytest.mark.parametrize("damage", ["truncate", "empty", "garbage", "unlink"])
def test_a_damaged_shard_is_taken_anew(folder: Path, home: Path, damage: str) -> None:
    extractor, seen = counted()
    before = take(folder, extractor)
    shard = shards(home)[1]
    whole = shard.read_bytes()
    if damage == "unlink":
        shard.unlink()
    else:
        shard.write_bytes({"truncate": whole[:-7], "empty": b"", "garbage": b"\xff" * 300}[damage])
    assert (take(folder, extractor) == before).all()
    assert sum(seen) == 130 + 64
    assert shard.read_bytes() == whole


def test_other_weights_protocols_and_grounds_have_folders_of_their_own(folder: Path, home: Path) -> None:
    base = toy.extractor()
    others = [
        base,
        dataclasses.replace(base, weights="a" * 64),
        dataclasses.replace(base, weights="b" * 64),
        dataclasses.replace(base, protocol="legacy_pytorch"),
        dataclasses.replace(base, name="open_clip/other"),
    ]
    for extractor in others:
        take(folder, extractor)
    take(folder, base, alpha="white")
    names = {shard.parent.name for shard in shards(home)}
    assert names == {
        "toy-clean",
        "toy-aaaaaaaa-clean",
        "toy-bbbbbbbb-clean",
        "toy-legacy_pytorch",
        "open_clip_other-clean",
        "toy-clean-on-white",
    }


def test_features_without_a_wanted_output_are_taken_anew(folder: Path) -> None:
    base, seen = counted()

    def more(pixels: Tensor) -> dict[str, Tensor]:
        features = base.network(pixels)["features"]
        return {"features": features, "spatial": features[:, :3]}

    rich = dataclasses.replace(base, network=more, outputs=("features", "spatial"))
    before = take(folder, base)
    found = extract(folder, rich, progress=False)
    assert found["spatial"].shape == (130, 3)
    assert sum(seen) == 2 * 130
    assert (take(folder, base) == before).all()  # which has all that the poor one wants
    assert sum(seen) == 2 * 130


def test_an_interrupted_extraction_goes_on(folder: Path, home: Path) -> None:
    whole, calls = toy.extractor(), 0

    def dying(pixels: Tensor) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls > 10:
            raise KeyboardInterrupt
        return whole.network(pixels)

    with pytest.raises(KeyboardInterrupt):
        take(folder, dataclasses.replace(whole, network=dying))
    assert [shard.name for shard in shards(home)] == ["00000.safetensors"]
    extractor, seen = counted()
    resumed = take(folder, extractor)
    assert sum(seen) == 66
    shutil.rmtree(home)
    assert (take(folder) == resumed).all()


def test_the_folder_of_the_user_stays_as_it_is(folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(folder.rglob("*"))
    take(folder)
    assert sorted(folder.rglob("*")) == before
    assert default_cache(folder).is_relative_to(home)
    assert default_cache(folder) != default_cache(folder.parent / "other" / folder.name)
    monkeypatch.delenv("DIFFACCEL_EVAL_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    assert cache_home() == home / "xdg" / "diffaccel"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_home() == Path.home() / ".cache" / "diffaccel"
    monkeypatch.setenv("DIFFACCEL_EVAL_HOME", "~/w")
    assert cache_home() == Path.home() / "w"


def test_a_given_cache_is_used(folder: Path, home: Path, tmp_path: Path) -> None:
    take(folder, cache=tmp_path / "given")
    assert not home.exists()
    assert len(shards(tmp_path / "given")) == 3


def test_a_cache_that_cannot_be_made_is_one_sentence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"features cannot be kept in .* set DIFFACCEL_EVAL_HOME to a folder that can"):
        take(folder, cache=tmp_path / "file")
    take(folder)
    whole = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and whole(path, mode))  # root may all
    take(folder)  # all is there: nothing needs to be written
    draw(folder / "70.png", 999)
    with pytest.raises(DataError, match="it is read-only"):
        take(folder)


def test_what_killed_processes_left_is_removed_once_it_is_old(folder: Path, home: Path) -> None:
    take(folder)
    old, young = (shards(home)[0].parent / f".00001.safetensors.{pid}.part" for pid in (1, 2))
    for part in (old, young):
        part.write_bytes(b"half")
    os.utime(old, (0, young.stat().st_mtime - STALE_SECONDS - 60))
    take(folder)
    assert not old.exists()
    assert young.exists()


def test_damaged_pictures_are_named_before_anything_is_computed(folder: Path) -> None:
    (folder / "3.png").write_bytes(b"x")
    (folder / "128.png").write_bytes(b"")
    extractor, seen = counted()
    with pytest.raises(DataError, match=r"(?s)2 of 130 pictures cannot be used:.*3\.png.*128\.png"):
        take(folder, extractor)
    assert seen == []


def test_a_damaged_picture_can_be_left_out(folder: Path) -> None:
    whole = take(folder)
    (folder / "3.png").write_bytes(b"x")
    rest = take(folder, skip_bad=True)
    assert np.allclose(rest, np.delete(whole, 3, 0), atol=1e-5)
    (folder / "4.png").write_bytes(b"x")
    with pytest.raises(DataError, match="2 of 130 pictures cannot be used, more than the 1%"):
        take(folder, skip_bad=True)


def test_transparency_is_refused_or_laid_on_a_ground(tmp_path: Path) -> None:
    draw(tmp_path / "pictures" / "0.png", 0, mode="RGBA")
    with pytest.raises(DataError, match="transparency"):
        take(tmp_path / "pictures")
    white, black = (take(tmp_path / "pictures", alpha=alpha) for alpha in ("white", "black"))
    assert (white != black).any()


def test_mixed_sizes_are_resized_each_by_itself(tmp_path: Path) -> None:
    sizes = [(8, 8), (16, 12), (8, 8), (5, 30), (16, 12)]
    paths = [draw(tmp_path / "pictures" / f"{i}.png", i, size) for i, size in enumerate(sizes)]
    features = take(tmp_path / "pictures")
    for path, row in zip(paths, features, strict=True):
        alone = toy.extractor()([read_picture(path)])["features"][0].numpy()
        assert np.abs(alone - row).max() < 1e-5


def test_a_folder_without_pictures_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures in"):
        take(tmp_path / "empty")
    with pytest.raises(DataError, match="is not a folder"):
        take(tmp_path / "missing")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    options: dict[str, Any] = {"num": 70, "progress": False, "num_inference_steps": 2}
    return generate(toy.ddpm(), toy.PROMPTS, tmp_path / "run", **options)


def test_features_of_a_run_lie_in_it_and_keep_step_with_its_prompts(run: Path, home: Path) -> None:
    features = take(run)
    assert not home.exists()
    assert [shard.name for shard in shards(run / "features" / "toy-clean")] == [
        "00000.safetensors",
        "00001.safetensors",
    ]
    draw(run / "images" / "00000" / "0.png", 5)  # which would be the first in the folder
    draw(run / "grid.png", 6)
    assert (take(run) == features).all()


def test_a_run_that_is_not_complete_is_refused(run: Path) -> None:
    shutil.rmtree(run / "images" / "00001")
    with pytest.raises(DataError, match="lacks 1 of 2 shards"):
        take(run)


def test_a_picture_of_a_run_that_is_missing_is_named(run: Path) -> None:
    (run / "images" / "00000" / "000003.png").unlink()
    with pytest.raises(DataError, match=r"000003\.png"):
        take(run)


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda pixels: torch.zeros(len(pixels), 6) / 0, "features that are not finite"),
        (lambda pixels: torch.zeros(len(pixels), 5), r"features of shape \(2, 5\), not \(2, 6\)"),
        (lambda pixels: torch.zeros(1, 6), r"features of shape \(1, 6\), not \(2, 6\)"),
    ],
)
def test_features_that_cannot_be_are_an_error(
    tmp_path: Path, home: Path, function: Callable[[Tensor], Tensor], sentence: str
) -> None:
    for i in range(2):
        draw(tmp_path / "pictures" / f"{i}.png", i)
    with pytest.raises(DataError, match=sentence):
        take(tmp_path / "pictures", callable_extractor(function, name="wrong", dim=6, size=8))
    assert shards(home) == []
