"""What can be opened: folders, shards, variants, the hub's cache, single files of both layouts; what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import diffaccel
from diffaccel.pruning.checkpoint import Checkpoint, load_model, open_checkpoint
from diffaccel.pruning.stored import header
from tests import tiny
from tests.pruning.sources import original_layout
from tests.pruning.toys import toy

PIPELINES = ("sd", "sdxl", "dit", "pixart", "sd3", "flux")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def opened(source: str | Path, tmp_path: Path, **options: Any) -> Checkpoint:
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    return open_checkpoint(str(source), scratch, **options)


def same(model: Any, other: Any) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(value.equal(theirs[name]) for name, value in ours.items())


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
    with pytest.raises(
        ValueError, match=r"has no weights .*; pickled weights are not read, and --variant names others"
    ):
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


@pytest.mark.parametrize("name", ["x", "./x/y", "a/b/c", "/x/y", "~/x"])
def test_what_is_not_there_is_not_looked_for_on_the_hub(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"there is no folder or file {name}; a hub id would be owner/name"):
        opened(name, tmp_path)


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no checkpoint: it has neither model_index.json nor config.json"):
        opened(tmp_path, tmp_path)
    (tmp_path / "a.ckpt").write_bytes(b"x")
    with pytest.raises(ValueError, match="is no checkpoint"):
        opened(tmp_path / "a.ckpt", tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="is no safetensors file, or it is cut short"):
        opened(tmp_path / "a.safetensors", tmp_path)


def edited(tmp_path: Path, file: str, text: str | None) -> Path:
    tiny.sd()[0].save_pretrained(tmp_path / "pipe")
    path = tmp_path / "pipe" / file
    path.unlink() if text is None else path.write_text(text)
    return tmp_path / "pipe"


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("model_index.json", "[]", "is no config: it holds a list"),
        ("model_index.json", "{", "is not JSON"),
        ("model_index.json", '{"_class_name": "X", "vae": ["a", "b"]}', "has no component to prune; there are vae"),
        ("model_index.json", '{"unet": [null, null], "prior": null}', "has no component to prune"),
        ("unet/config.json", None, "config.json is missing; a checkpoint of Diffusers has it"),
        ("unet/config.json", '{"_class_name": "UNet3DConditionModel"}', "cannot prune the UNet3DConditionModel in"),
        ("unet/config.json", "{}", "cannot prune the network in"),
        (f"unet/{WEIGHTS}", None, r"has no weights \*.safetensors; pickled weights are not read"),
    ],
)
def test_damaged_folders(tmp_path: Path, file: str, text: str | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        opened(edited(tmp_path, file, text), tmp_path)


def test_components(tmp_path: Path) -> None:
    tiny.sd()[0].save_pretrained(tmp_path / "pipe")
    assert opened(tmp_path / "pipe", tmp_path, component="unet").component == "unet"
    with pytest.raises(ValueError, match="has no component vae; there are unet"):
        opened(tmp_path / "pipe", tmp_path, component="vae")
    with pytest.raises(ValueError, match="is a single network and has no component unet"):
        opened(tmp_path / "pipe" / "unet", tmp_path, component="unet")


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    toy("sd15").save_pretrained(tmp_path / "m", safe_serialization=False)
    with pytest.raises(ValueError, match="pickled weights are not read"):
        opened(tmp_path / "m", tmp_path)
    pipe, _ = tiny.sd()
    pipe.save_pretrained(tmp_path / "pipe")
    shutil.rmtree(tmp_path / "pipe" / "vae")
    pipe.vae.save_pretrained(tmp_path / "pipe" / "vae", safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        opened(tmp_path / "pipe", tmp_path).load_pipeline()


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    toy("sd15").save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / WEIGHTS
    state = load_file(file)
    save_file({name: value.to(torch.int8) for name, value in state.items()}, file)
    with pytest.raises(ValueError, match=r"is quantised \(I8\); prune the original and quantise afterwards"):
        opened(tmp_path / "m", tmp_path)
    with pytest.raises(ValueError, match=r"is quantised \(I8\)"):
        opened(file, tmp_path, config=str(tmp_path / "m"))
    save_file(state, file)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}  # most bytes may be those of what is left out
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is quantised \(bitsandbytes\)"):
        opened(tmp_path / "m", tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1])
def test_a_weights_file_that_is_cut_short(tmp_path: Path, keep: int) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "a", {"format": "pt"})
    assert list(header(tmp_path / "a")) == ["a"]
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:keep])
    with pytest.raises(ValueError, match="is no safetensors file, or it is cut short"):
        header(tmp_path / "a")


@pytest.mark.parametrize("text", ["[]", "1", '{"a": 1}', '{"a": {}}', '{"a": {"data_offsets": "x"}}'])
def test_a_weights_file_with_another_header(tmp_path: Path, text: str) -> None:
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text.encode())
    with pytest.raises(ValueError, match="is no safetensors file"):
        header(tmp_path / "a")
