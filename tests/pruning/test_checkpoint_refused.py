"""What is no checkpoint, is damaged, pickled or quantised: refused with a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffaccel.pruning.stored import header
from tests import tiny
from tests.pruning.test_checkpoint import WEIGHTS, opened
from tests.pruning.toys import toy


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
