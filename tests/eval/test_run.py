"""A run read back, checked, and paired with another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from diffaccel.eval import DataError, ProtocolMismatch, extract, generate, read_run
from diffaccel.eval.runs.run import Run, check_pairs, jackknife_groups, verify
from tests.eval import toy
from tests.eval.offline import _no_network  # noqa: F401


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    pipe, call = toy.pipeline("sd")
    return generate(pipe, toy.PROMPTS, out, num=66, batch=64, latents=True, progress=False, **call)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def test_a_run_is_in_the_order_of_its_indices(made: Path) -> None:
    run = read_run(made)
    assert [int(path.stem) for path in run.paths] == list(range(66))
    assert all(path.is_file() for path in run.paths)
    assert run.ids == tuple(toy.PROMPTS[i % 5].id for i in range(66))
    assert run.seeds == tuple(i // 5 for i in range(66))
    kept = run.latents()
    assert kept is not None
    assert kept.shape == (66, 4, 8, 8)
    assert len(torch.unique(kept[:, 0, 0, 0])) == 66
    assert run.warnings() == ()
    assert verify(run) == []


def test_an_incomplete_run_is_refused(folder: Path) -> None:
    shutil.rmtree(folder / "images" / "00000")
    with pytest.raises(DataError, match="lacks 1 of 2 shards; run generate again"):
        read_run(folder)
    shutil.rmtree(folder / "images")
    with pytest.raises(DataError, match="lacks 2 of 2 shards"):
        read_run(folder)


@pytest.mark.parametrize("content", [None, b"{", b"\xff", b"[]", b"{}"])
def test_a_damaged_record_says_what_to_delete(folder: Path, content: bytes | None) -> None:
    record = folder / "images" / "00001" / "shard.json"
    record.unlink() if content is None else record.write_bytes(content)
    with pytest.raises(DataError, match="00001 is damaged; delete it and run generate again"):
        read_run(folder)


@pytest.mark.parametrize("key", ["indices", "ids", "prompts", "seeds", "one_colour", "files"])
def test_a_record_that_lacks_something_is_damaged(folder: Path, key: str) -> None:
    path = folder / "images" / "00001" / "shard.json"
    record = json.loads(path.read_text())
    for spoilt in ({k: v for k, v in record.items() if k != key}, record | {key: 3}):
        path.write_text(json.dumps(spoilt))
        with pytest.raises(DataError, match="is damaged"):
            read_run(folder)


def test_the_record_of_another_shard_is_damage(folder: Path) -> None:
    images = folder / "images"
    shutil.copy(images / "00000" / "shard.json", images / "00001" / "shard.json")
    with pytest.raises(DataError, match="00001 is damaged"):
        read_run(folder)


def test_verify_finds_what_is_missing_changed_or_strange(folder: Path) -> None:
    images = folder / "images"
    (images / "00000" / "000003.png").unlink()
    data = bytearray((images / "00001" / "000064.png").read_bytes())
    data[40] ^= 1
    (images / "00001" / "000064.png").write_bytes(data)
    (images / "00001" / "latents.safetensors").write_bytes(b"x")
    (images / "00001" / "000066.png").write_bytes(b"x")
    (images / "00002").mkdir()
    (images / "grid.png").write_bytes(b"x")
    (images / ".00000.77.part").mkdir()  # of a killed process: no harm
    assert verify(read_run(folder)) == [
        f"{images / '00000' / '000003.png'} is missing",
        f"{images / '00001' / '000064.png'} has changed",
        f"{images / '00001' / 'latents.safetensors'} has changed",
        f"{images / '00001' / '000066.png'} does not belong to the run",
        f"{images / '00002'} does not belong to the run",
        f"{images / 'grid.png'} does not belong to the run",
    ]


def test_features_and_costs_are_no_strangers(folder: Path) -> None:
    (folder / "features").mkdir()
    (folder / "cost.json").write_text("{}")
    assert verify(read_run(folder)) == []


def bare(**changes: Any) -> Run:
    values: dict[str, Any] = {
        "ids": ("a", "b"),
        "prompts": ("A", "B"),
        "seeds": (0, 0),
        "hashes": ("1", "2"),
        "one_colour": (),
    }
    job = {"seed_rule": "r"}
    return Run(**({"folder": Path("x"), "job": job, "paths": (Path("0"), Path("1"))} | values | changes))


def test_pairs_need_the_same_prompts_seeds_and_rule() -> None:
    check_pairs(bare(), bare(prompts=("A!", "B"), hashes=("3", "4")))
    for other, what in [
        (bare(ids=("a", "b", "c"), seeds=(0, 0, 0)), "2 and 3 pictures"),
        (bare(ids=("b", "a")), "other prompts"),
        (bare(seeds=(0, 1)), "other seeds"),
        (bare(job={"seed_rule": "other"}), "other seeds"),
    ]:
        with pytest.raises(ProtocolMismatch, match=what):
            check_pairs(bare(), other)


def test_a_picture_that_comes_again_and_again_is_suspicious() -> None:
    assert bare().warnings() == ()
    assert "1 of 2 pictures repeat another one" in bare(hashes=("1", "1")).warnings()[0]
    few = tuple(map(str, range(2000)))
    assert bare(hashes=(*few, "0")).warnings() == ()  # one in two thousand may be chance


@pytest.mark.parametrize("count", [2, 3, 20])
def test_all_pictures_of_a_prompt_are_left_out_together(count: int) -> None:
    ids = [f"p{i % 7}" for i in range(20)]
    groups = jackknife_groups(ids, count)
    assert len(groups) == min(count, 7)
    assert sorted(i for group in groups for i in group) == list(range(20))
    homes = [{g for g, group in enumerate(groups) for i in group if ids[i] == name} for name in set(ids)]
    assert all(len(home) == 1 for home in homes)
    sizes = [len({ids[i] for i in group}) for group in groups]
    assert max(sizes) - min(sizes) <= 1


def test_a_picture_that_was_exchanged_is_not_scored(folder: Path) -> None:
    paths = read_run(folder).paths
    paths[0].write_bytes(paths[1].read_bytes())
    with pytest.raises(DataError, match=r"000000\.png is missing or has changed since it was made"):
        extract(folder, toy.extractor(), progress=False)
