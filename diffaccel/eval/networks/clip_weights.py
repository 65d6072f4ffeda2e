"""What a file with CLIP weights holds, told by its SHA-256 or its name: open_clip does not look at local files."""

from __future__ import annotations

import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffaccel.eval.errors import DataError
from diffaccel.eval.networks.weights import WeightsFile, sha256_of

NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # numbers that OpenAI's files hold as well


def _openai(file: str, sha256: str) -> WeightsFile:
    url = f"https://openaipublic.azureedge.net/clip/models/{sha256}/{file}"
    return WeightsFile(file, (sha256,), url, "MIT", folders=("~/.cache/clip",))


# What is looked for when no file is given: by their SHA-256, these are what papers mean by CLIP score and CMMD.
OPENAI = {
    "ViT-B-32-quickgelu": _openai("ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-L-14-quickgelu": _openai("ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "ViT-L-14-336-quickgelu": _openai(
        "ViT-L-14-336px.pt", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"
    ),
}


def trained_as(model: str, path: Path, quick_gelu: bool) -> dict[str, Any]:
    """How open_clip's list says these weights were trained: mean, deviation, activation; empty if not recognised.

    Raises:
        DataError: if it was with another activation than `model` computes, or on pictures that are not cut as CLIP's.
    """
    from open_clip import pretrained

    digest = sha256_of(path)
    folders = [part for part in path.absolute().parts[:-1] if part.startswith("models--")]  # the hub's cache
    names = "/".join([*folders, path.absolute().parent.name, path.name]).lower().replace("-", "_").replace(".", "_")
    known = {tag: pretrained.get_pretrained_cfg(model, tag) for tag in pretrained.list_pretrained_tags_by_model(model)}
    by_hash = [tag for tag, config in known.items() if digest in config["url"] or f"-{digest[:8]}." in config["url"]]
    by_hash += [tag for tag, config in known.items() if config["url"].endswith(f"/{path.name}")]
    by_name = sorted((tag for tag in known if tag in names), key=len)  # the longest says most
    if not (by_hash or by_name):
        return {}
    tag = by_hash[0] if by_hash else by_name[-1]
    if known[tag].get("quick_gelu", False) != quick_gelu:
        needed = "QuickGELU" if not quick_gelu else "GELU"
        other = f"{model}-quickgelu" if not quick_gelu else model.removesuffix("-quickgelu")
        raise DataError(
            f"QuickGELU mismatch: {path} holds the weights {tag!r}, which were trained with {needed}, and {model} "
            f"computes the other; use {other}"
        )
    if (known[tag]["interpolation"], known[tag]["resize_mode"]) != ("bicubic", "shortest"):
        raise DataError(f"{path} holds the weights {tag!r}, whose pictures are resized in another way than CLIP's")
    return known[tag]


def filled(config: dict[str, Any], path: Path) -> Any:
    """The network of an open_clip configuration with all the file's weights; `DataError` if they do not fit."""
    import open_clip

    net = open_clip.CLIP(**config)
    try:
        net.load_state_dict(state_dict(path))
    except (RuntimeError, KeyError, AttributeError, UnpicklingError, SafetensorError) as error:
        raise DataError(f"{path} does not fit the model: {str(error)[:500]}") from error
    return net


def state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name. A pickle is read for tensors only; TorchScript only where it is OpenAI's file."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if sha256_of(path) in {digest for spec in OPENAI.values() for digest in spec.sha256}:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated in torch 2.15, and still the only way to read these files
            state = torch.jit.load(path, map_location="cpu").state_dict()
        return {key: value for key, value in state.items() if key not in NOT_WEIGHTS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a file looks like TorchScript, which is then an error
        state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    return {key.removeprefix("module."): value for key, value in state.items()}
