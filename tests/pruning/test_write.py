"""The folder that is written: whole or not there, the same weights, the same files, smaller; what opens it."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import diffaccel
from diffaccel.pruning.checkpoint import Checkpoint, load_model, open_checkpoint
from diffaccel.pruning.find import find_groups
from diffaccel.pruning.groups import DEPTH
from diffaccel.pruning.plan import PruningPlan
from diffaccel.pruning.stored import stored_dtype
from diffaccel.pruning.surgery import cut
from diffaccel.pruning.write import probe_masked, write_checkpoint
from tests import tiny
from tests.pruning.sources import same, tree
from tests.pruning.toys import TOYS, toy

ROOT = Path(__file__).parents[2]
NOTHING: dict[str, Any] = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor"))
WEIGHTS = "diffusion_pytorch_model.safetensors"


@cache
def plan_of(name: str) -> PruningPlan:
    groups = find_groups(toy(name)).of("heads", "neurons", "channels")
    return PruningPlan.of(toy(name), {group.name: range(group.units // 2) for group in groups})


def source(tmp_path: Path, name: str = "sd15", **saving: Any) -> Checkpoint:
    toy(name).save_pretrained(tmp_path / "source", **saving)
    return open_checkpoint(str(tmp_path / "source"), tmp_path, variant=saving.get("variant"))


def pipeline(tmp_path: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    if not (tmp_path / "source").exists():
        tiny.sd()[0].save_pretrained(tmp_path / "source")
    for file in (tmp_path / "source").rglob("*.safetensors") if dtype != torch.float32 else ():
        save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file)
    return open_checkpoint(str(tmp_path / "source"), tmp_path)


def halved(model: Any, *kinds: str) -> PruningPlan:
    groups = find_groups(model).of(*kinds or ("heads", "neurons", "channels"))
    return PruningPlan.of(model, {group.name: range(group.units // 2 or 1) for group in groups})


def written(checkpoint: Checkpoint, output: Path, plan: PruningPlan | None = None, **options: Any) -> Any:
    model = checkpoint.load(torch.float32)
    plan = plan or halved(model)
    return write_checkpoint(checkpoint, cut(model, plan), plan, output, masked=probe_masked(model, plan), **options)


@pytest.mark.parametrize("name", sorted(TOYS))
def test_every_class_is_written_and_read(tmp_path: Path, name: str) -> None:
    check = written(source(tmp_path, name), tmp_path / "a" / "b", plan_of(name))
    assert check.reload <= 1e-6
    assert check.mask is not None
    assert check.mask < 1e-4
    assert not check.stock
    assert {entry.name for entry in (tmp_path / "a" / "b").iterdir()} == {"config.json", WEIGHTS, "pruning_plan.json"}
    expected: Any = cut(toy(name), plan_of(name))
    assert same(load_model(tmp_path / "a" / "b"), expected)
    assert PruningPlan.load(tmp_path / "a" / "b").removed == plan_of(name).removed
    sizes = [(tmp_path / folder / WEIGHTS).stat().st_size for folder in ("source", "a/b")]
    assert sizes[1] < sizes[0]
    assert sizes[0] - sizes[1] >= 4 * (toy(name).num_parameters() - expected.num_parameters()) - 2000
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_keep_the_type_and_the_rest_its_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = pipeline(tmp_path, dtype)
    assert checkpoint.dtype == dtype
    written(checkpoint, tmp_path / "out")
    assert stored_dtype(tmp_path / "out" / "unet") == dtype
    assert {value.dtype for value in load_file(tmp_path / "out" / "unet" / WEIGHTS).values()} == {dtype}
    before, after = tree(tmp_path / "source"), tree(tmp_path / "out")
    others = [name for name in before if not name.startswith("unet/") and name != "model_index.json"]
    assert all(after[name] == before[name] for name in others)
    index = json.loads(after["model_index.json"])
    assert index["unet"] == ["diffaccel", "PrunedUNet2DConditionModel"]
    assert {**index, "unet": 0} == {**json.loads(before["model_index.json"]), "unet": 0}
    # what was computed in float32 is what was stored: no weight that stays is another
    expected = cut(checkpoint.load(), halved(checkpoint.load()))
    assert same(load_model(tmp_path / "out" / "unet", dtype=dtype), expected)


def test_mixed_types_become_one(tmp_path: Path) -> None:
    checkpoint = source(tmp_path)
    state = {name: value if "norm" in name else value.half() for name, value in toy("sd15").state_dict().items()}
    save_file(state, tmp_path / "source" / WEIGHTS)
    checkpoint = open_checkpoint(str(tmp_path / "source"), tmp_path)
    written(checkpoint, tmp_path / "out")
    assert {value.dtype for value in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.float16}


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_and_variants(tmp_path: Path, variant: str | None) -> None:
    checkpoint = source(tmp_path, variant=variant, max_shard_size="20KB")
    written(checkpoint, tmp_path / "out", plan_of("sd15"), max_shard_size="20KB")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    assert all((".fp16" in file) == bool(variant) for file in files)
    assert same(load_model(tmp_path / "out", variant=variant), cut(toy("sd15"), plan_of("sd15")))


def test_links_are_written_as_files_that_belong_to_the_user(tmp_path: Path) -> None:
    checkpoint = pipeline(tmp_path)
    (tmp_path / "blobs").mkdir()
    for i, file in enumerate([path for path in (tmp_path / "source").rglob("*") if path.is_file()]):
        file.rename(tmp_path / "blobs" / str(i))
        (tmp_path / "blobs" / str(i)).chmod(0o400)
        file.symlink_to(tmp_path / "blobs" / str(i))
    for folder in ("vae", "scheduler"):
        (tmp_path / "source" / folder).chmod(0o500)
    before = os.umask(0o027)
    try:
        written(checkpoint, tmp_path / "out")
    finally:
        os.umask(before)
        for folder in ("vae", "scheduler"):
            (tmp_path / "source" / folder).chmod(0o700)
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        assert not path.is_symlink()
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


def test_the_card_says_that_this_is_not_the_original(tmp_path: Path) -> None:
    checkpoint = pipeline(tmp_path)
    card = tmp_path / "source" / "README.md"
    card.write_text("---\nlicense: mit\n---\n\n# A model\n")
    written(checkpoint, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith("---\nlicense: mit\n---\n\n> Pruned by diffaccel")
    assert text.endswith("\n\n# A model\n")
    card.write_text("# A model\n")
    written(checkpoint, tmp_path / "plain")
    assert (tmp_path / "plain" / "README.md").read_text().startswith("> Pruned by diffaccel")


def test_what_is_no_part_of_the_pipeline_stays_behind(tmp_path: Path) -> None:
    checkpoint = pipeline(tmp_path)
    folder = tmp_path / "source"
    (folder / "samples").mkdir()
    (folder / ".cache").mkdir()
    for name in ("v1-5-pruned.safetensors", "v1-5-pruned.ckpt", "README.md", "LICENSE", ".gitattributes", "vae/x.bin"):
        (folder / name).write_text("x")
    (folder / "samples" / "x.png").write_text("x")
    written(checkpoint, tmp_path / "out")
    there = set(tree(tmp_path / "out"))
    assert {"README.md", "LICENSE", "vae/config.json", f"vae/{WEIGHTS}", "unet/pruning_plan.json"} <= there
    assert not there & {
        "v1-5-pruned.safetensors",
        "v1-5-pruned.ckpt",
        ".gitattributes",
        "vae/x.bin",
        "samples",
        ".cache",
    }


def test_parts_that_are_none_or_have_pickled_weights_only(tmp_path: Path) -> None:
    """Nothing is unpickled, and the pipeline opens as it did before."""
    checkpoint = pipeline(tmp_path)
    shutil.rmtree(tmp_path / "source" / "vae")
    tiny.sd()[0].vae.save_pretrained(tmp_path / "source" / "vae", safe_serialization=False)
    written(checkpoint, tmp_path / "out")
    pipe: Any = DiffusionPipeline.from_pretrained(tmp_path / "out", **NOTHING)
    assert same(pipe.vae, tiny.sd()[0].vae)
    assert type(pipe.unet).__name__ == "PrunedUNet2DConditionModel"


def test_pruned_twice(tmp_path: Path) -> None:
    written(pipeline(tmp_path), tmp_path / "one")
    once = open_checkpoint(str(tmp_path / "one"), tmp_path)
    plan = halved(once.load(), "neurons", "transformer")
    written(once, tmp_path / "two", plan)
    twice = open_checkpoint(str(tmp_path / "two"), tmp_path)
    written(twice, tmp_path / "three", halved(twice.load(), "channels"))
    names = ["pruning_plan.json", "pruning_plan.1.json", "pruning_plan.2.json"]
    plans = {folder: tree(tmp_path / folder / "unet") for folder in ("one", "two", "three")}
    assert sorted(name for name in plans["three"] if "plan" in name) == sorted(names)
    assert plans["three"]["pruning_plan.1.json"] == plans["one"]["pruning_plan.json"]
    assert plans["three"]["pruning_plan.2.json"] == plans["two"]["pruning_plan.json"]
    model: Any = tiny.sd()[0].unet
    for name in ("pruning_plan.1.json", "pruning_plan.2.json", "pruning_plan.json"):  # the plans lead to it
        model = cut(model, PruningPlan.load(tmp_path / "three" / "unet" / name))
    assert same(model, load_model(tmp_path / "three" / "unet"))


OPENED = """
import sys
from diffusers import DiffusionPipeline
nothing = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor"))
unet = DiffusionPipeline.from_pretrained(sys.argv[1], **nothing).unet
assert type(unet).__name__ == "UNet2DConditionModel", type(unet)
assert "diffaccel" not in sys.modules
import diffaccel
import torch
for dtype in (torch.float32, torch.float16):
    unet = DiffusionPipeline.from_pretrained(sys.argv[2], dtype=dtype, **nothing).unet
    assert type(unet) is diffaccel.PrunedUNet2DConditionModel, type(unet)
    assert unet.dtype == dtype
"""


def run(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_another_process_opens_it(tmp_path: Path) -> None:
    """What only lost blocks without diffaccel, the rest with a plain import."""
    model = tiny.sd()[0].unet
    checkpoint = pipeline(tmp_path)
    groups = find_groups(model).of(*DEPTH)
    middle = PruningPlan.of(model, {group.name: (0,) for group in groups if group.kind == "mid_block"})
    assert written(checkpoint, tmp_path / "depth", middle).stock
    assert not written(checkpoint, tmp_path / "width").stock
    done = run(OPENED, tmp_path / "depth", tmp_path / "width")
    assert done.returncode == 0, done.stderr[-2000:]


def test_pruned_classes_are_made_when_they_are_asked_for() -> None:
    assert diffaccel.PrunedFluxTransformer2DModel is diffaccel.PrunedFluxTransformer2DModel  # pickled by name, compared
    assert diffaccel.PrunedFluxTransformer2DModel.__module__ == "diffaccel"
    for name in ("PrunedAutoencoderKL", "Pruned", "prunedUNet2DModel"):
        with pytest.raises(AttributeError, match=f"module 'diffaccel' has no attribute '{name}'"):
            getattr(diffaccel, name)
    for name in TOYS:
        kind = getattr(diffaccel, f"Pruned{type(toy(name)).__name__}")
        assert issubclass(kind, type(toy(name)))
        plain = kind.from_config(toy(name).config)  # of a stock config: nothing is removed
        assert {key: value.shape for key, value in plain.state_dict().items()} == {
            key: value.shape for key, value in toy(name).state_dict().items()
        }
    with pytest.raises(ValueError, match="pruned_structure in the config names foo, which"):
        diffaccel.PrunedDiTTransformer2DModel(**{**toy("dit").config}, pruned_structure={"kept": {"foo": 1}})
