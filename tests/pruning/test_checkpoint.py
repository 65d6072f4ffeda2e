"""What can be opened: folders, shards, variants, the hub's cache, single files of both layouts; what is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

import diffaccel
from diffaccel.pruning.checkpoint import Checkpoint, load_model, open_checkpoint
from tests import tiny
from tests.pruning.sources import PIPELINES, original_layout, same
from tests.pruning.toys import toy

WEIGHTS = "diffusion_pytorch_model.safetensors"


def opened(source: str | Path, tmp_path: Path, **options: Any) -> Checkpoint:
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    return open_checkpoint(str(source), scratch, **options)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipelines_folder(tmp_path: Path, name: str) -> None:
    pipe, _ = getattr(tiny, name)()
    pipe.save_pretrained(tmp_path / "pipe")
    checkpoint = opened(tmp_path / "pipe", tmp_path)
    denoiser = "unet" if name.startswith("sd") and name != "sd3" else "transformer"
    assert (checkpoint.component, checkpoint.dtype, checkpoint.variant) == (denoiser, torch.float32, None)
    assert same(checkpoint.load(), getattr(pipe, denoiser))
    model = opened(tmp_path / "pipe" / denoiser, tmp_path)
    assert model.component == ""
    assert same(model.load(), getattr(pipe, denoiser))
    with pytest.raises(ValueError, match="is a single network: to calibrate with prompts, name the pipeline's folder"):
        model.load_pipeline()


def test_a_pipeline_without_text(tmp_path: Path) -> None:
    model = toy("unconditional")
    diffusers.DDPMPipeline(model, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "pipe")
    checkpoint = opened(tmp_path / "pipe", tmp_path)
    assert same(checkpoint.load_pipeline(model).unet, model)
    assert checkpoint.load_pipeline(model).unet is model


@pytest.mark.parametrize("name", diffaccel.zoo.NAMES)
def test_zoo_names(tmp_path: Path, name: str) -> None:
    if name == "emoji-clip":
        with pytest.raises(ValueError, match=r"cannot prune the network in .*; known are UNet2DModel"):
            opened(name, tmp_path)
        return
    checkpoint = opened(name, tmp_path)
    assert checkpoint.component == ("unet" if name == "emoji-sd" else "")
    assert checkpoint.dtype == torch.float16
    assert checkpoint.source == name


@pytest.mark.parametrize("shards", ["10GB", "20KB"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_and_variants(tmp_path: Path, shards: str, variant: str | None) -> None:
    model = toy("sd15").half()
    model.save_pretrained(tmp_path / "m", variant=variant, max_shard_size=shards)
    assert (len(list((tmp_path / "m").glob("*.safetensors"))) > 1) == (shards == "20KB")
    checkpoint = opened(tmp_path / "m", tmp_path, variant=variant)
    assert checkpoint.dtype == torch.float16
    assert same(checkpoint.load(), model)
    with pytest.raises(ValueError, match=r"has no weights .*; pickled weights are not read, and --variant"):
        opened(tmp_path / "m", tmp_path, variant=None if variant else "fp16")


def test_the_type_is_that_of_the_variant_and_of_most_weights(tmp_path: Path) -> None:
    model = toy("sd15")
    model.save_pretrained(tmp_path / "m")
    toy("sd15").half().save_pretrained(tmp_path / "m", variant="fp16")
    assert opened(tmp_path / "m", tmp_path).dtype == torch.float32
    assert opened(tmp_path / "m", tmp_path, variant="fp16").dtype == torch.float16
    state = {name: value if "norm" in name else value.bfloat16() for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "m" / WEIGHTS)
    assert opened(tmp_path / "m", tmp_path).dtype == torch.bfloat16
    save_file(state, tmp_path / "m" / "pytorch_lora_weights.fp16.safetensors")  # none of the network's
    assert opened(tmp_path / "m", tmp_path).dtype == torch.bfloat16


def cached(tmp_path: Path, save: Any) -> str:
    """A hub id whose files lie in a cache as the hub makes it: links to blobs."""
    repo = tmp_path / "hub" / "models--owner--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    save(snapshot)
    (repo / "blobs").mkdir()
    for i, file in enumerate([path for path in snapshot.rglob("*") if path.is_file()]):
        file.rename(repo / "blobs" / str(i))
        file.symlink_to(os.path.relpath(repo / "blobs" / str(i), file.parent))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    return str(snapshot)


def test_a_folder_of_links_as_in_the_hubs_cache(tmp_path: Path) -> None:
    pipe, _ = tiny.sd()
    snapshot = cached(tmp_path, pipe.save_pretrained)
    assert same(opened(snapshot, tmp_path).load(), pipe.unet)


def test_a_hub_id_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub\nmore lines")

    monkeypatch.setattr(DiffusionPipeline, "download", offline)
    monkeypatch.setattr("diffaccel.pruning.checkpoint.snapshot_download", offline)
    with pytest.raises(
        OSError, match="there is no folder owner/name, and it cannot be fetched from the hub: no route to"
    ) as e:
        opened("owner/name", tmp_path)
    assert "\n" not in str(e.value)


def test_a_hub_id_of_a_single_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_index(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("model_index.json")

    toy("dit").save_pretrained(tmp_path / "m")
    monkeypatch.setattr(DiffusionPipeline, "download", no_index)
    monkeypatch.setattr("diffaccel.pruning.checkpoint.snapshot_download", lambda *_, **__: str(tmp_path / "m"))
    assert same(opened("owner/name", tmp_path).load(), toy("dit"))


@pytest.mark.parametrize("which", ["model", "pipeline"])
def test_one_file_in_diffusers_names(tmp_path: Path, which: str) -> None:
    folder = diffaccel.zoo.path("emoji-sd")
    model: Any = load_model(folder / "unet", dtype=torch.float16)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    config = folder / "unet" if which == "model" else folder
    checkpoint = opened(tmp_path / "a.safetensors", tmp_path, config=str(config))
    assert (checkpoint.component, checkpoint.dtype) == ("", torch.float16)
    assert same(checkpoint.load(), model)


def test_one_file_of_a_pruned_network(tmp_path: Path) -> None:
    model: Any = diffaccel.pruning.prune(toy("dit"), 0.8).model
    model.save_pretrained(tmp_path / "m")
    shutil.move(tmp_path / "m" / WEIGHTS, tmp_path / "a.safetensors")
    checkpoint = opened(tmp_path / "a.safetensors", tmp_path, config=str(tmp_path / "m"))
    assert type(checkpoint.load()).__name__ == "PrunedDiTTransformer2DModel"


def test_a_whole_pipeline_in_the_original_layout(tmp_path: Path) -> None:
    pipe = diffaccel.zoo.load("emoji-sd", dtype=torch.float16)
    save_file(original_layout(pipe), tmp_path / "a.safetensors")
    checkpoint = opened(tmp_path / "a.safetensors", tmp_path, config=str(diffaccel.zoo.path("emoji-sd")))
    assert (checkpoint.component, checkpoint.dtype) == ("unet", torch.float16)
    again = checkpoint.load_pipeline()
    assert all(same(getattr(again, part), getattr(pipe, part)) for part in ("unet", "vae", "text_encoder"))


@pytest.mark.parametrize("which", ["model", "pipeline"])
def test_a_network_alone_in_the_original_layout(tmp_path: Path, which: str) -> None:
    pipe = diffaccel.zoo.load("emoji-sd", dtype=torch.float16)
    state = {name: value for name, value in original_layout(pipe).items() if name.startswith("model.")}
    save_file(state, tmp_path / "a.safetensors")
    config = diffaccel.zoo.path("emoji-sd") / ("unet" if which == "model" else "")
    checkpoint = opened(tmp_path / "a.safetensors", tmp_path, config=str(config))
    assert checkpoint.component == ""
    assert same(checkpoint.load(), pipe.unet)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("m", r"is of another size than .*: .* is \(.*\) in the file, \(.*\) in the config"),
        ("deep", "cannot be opened with the config .*: "),
        ("dit", "Diffusers reads no DiTTransformer2DModel in the original layout"),
        ("nosuch", "is no folder with model_index.json or config.json, and no hub id"),
        ("scratch", "is no folder with model_index.json or config.json, and no hub id"),
    ],
)
def test_a_file_and_a_config_that_do_not_fit(tmp_path: Path, config: str, words: str) -> None:
    save_file(toy("sd15").state_dict(), tmp_path / "a.safetensors")
    type(toy("sd15")).from_config({**toy("sd15").config, "cross_attention_dim": 12}).save_config(tmp_path / "m")
    toy("deep_sd15").save_config(tmp_path / "deep")
    toy("dit").save_config(tmp_path / "dit")
    with pytest.raises(ValueError, match=words) as caught:
        opened(tmp_path / "a.safetensors", tmp_path, config=str(tmp_path / config))
    assert "\n" not in str(caught.value)
