"""Checkpoints: a pipeline's folder, a model's folder, a hub id, a zoo name, or one `.safetensors` file."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from diffaccel import zoo
from diffaccel.cost import DENOISERS
from diffaccel.pruning.families import FAMILIES, stock_class
from diffaccel.pruning.models import NAMES, pruned_class
from diffaccel.pruning.structure import build

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CLASSES = {stock.__name__: stock for stock in FAMILIES}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as a folder of Diffusers.

    Attributes:
        folder: the pipeline's or the model's folder.
        component: name of the denoiser in the pipeline; "" for a model's folder.
        dtype: type its weights are stored in.
        variant: "fp16" in `diffusion_pytorch_model.fp16.safetensors`, for example.
        source: what the user named.
    """

    folder: Path
    component: str
    dtype: torch.dtype
    variant: str | None
    source: str

    @property
    def model_folder(self) -> Path:
        """Where the denoiser's config is."""
        return self.folder / self.component

    def load(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The denoiser alone, in its stored type unless another is given."""
        return load_model(self.model_folder, dtype=dtype or self.dtype, variant=self.variant)

    def load_pipeline(self, model: nn.Module | None = None, dtype: torch.dtype | None = None) -> Any:
        """The whole pipeline, with `model` as its denoiser.

        Raises:
            ValueError: for a model's folder.
        """
        if not self.component:
            raise ValueError(
                f"{self.source} is a single network: to calibrate with prompts, name the pipeline's folder"
            )
        given = {} if model is None else {self.component: model}
        return DiffusionPipeline.from_pretrained(self.folder, dtype=dtype or self.dtype, variant=self.variant, **given)


def open_checkpoint(
    source: str,
    scratch: Path,
    *,
    config: str | None = None,
    component: str | None = None,
    variant: str | None = None,
) -> Checkpoint:
    """Find out what `source` is.

    Args:
        source: a zoo name, a folder, a hub id, or a `.safetensors` file in Diffusers' or the original (LDM) layout.
        scratch: an existing folder in which a single file is unpacked.
        config: for a single file: folder (or hub id) of a pipeline or model of its architecture. Without it Diffusers asks
            the hub for the config.
        component: the denoiser to prune, if the pipeline has several.
        variant: of the files' names.

    Raises:
        ValueError: if it is no checkpoint, or its denoiser is of a class that cannot be pruned.
    """
    path = Path(zoo.path(source) if source in zoo.NAMES else source)
    if path.suffix == ".safetensors" and path.is_file():
        path = _unpacked(path, scratch, config)
    elif not path.exists():
        path = _downloaded(source, variant)
    name = _component(path, source, component)
    _class_of(path / name)
    return Checkpoint(path, name, stored_dtype(path / name, variant), variant, source)


def load_model(folder: str | Path, **kwargs: Any) -> nn.Module:
    """A network of a class that can be pruned, stock or pruned, from its own folder (with `config.json`).

    Raises:
        ValueError: if the folder has none.
    """
    return _class_of(Path(folder)).from_pretrained(folder, use_safetensors=True, **kwargs)


def _class_of(folder: Path) -> Any:
    name = _json(folder / "config.json").get("_class_name", "")
    if name in NAMES:
        return pruned_class(NAMES[name])
    if name in CLASSES:
        return CLASSES[name]
    known = ", ".join(CLASSES)
    raise ValueError(f"cannot prune the {name or 'network'} in {folder}; known are {known}")


def _component(folder: Path, source: str, wanted: str | None) -> str:
    if (folder / "model_index.json").is_file():
        index = _json(folder / "model_index.json")
        there = [name for name in DENOISERS if isinstance(index.get(name), list) and index[name][0]]
        if wanted in there:
            return str(wanted)
        if wanted or not there:
            raise ValueError(f"{source} has no component {wanted or 'to prune'}; there are {_words(there or index)}")
        return there[0]
    if (folder / "config.json").is_file():
        return ""
    raise ValueError(
        f"{source} is no checkpoint: it has neither model_index.json nor config.json; give a pipeline's folder, a "
        "model's folder, a .safetensors file, a hub id or a zoo name"
    )


def _words(names: Iterable[str]) -> str:
    return ", ".join(name for name in names if not name.startswith("_"))


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; a checkpoint of Diffusers has it") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None


def stored_dtype(folder: Path, variant: str | None = None) -> torch.dtype:
    """Floating-point type of a model's weights: that of the largest share of the bytes in its safetensors files.

    Raises:
        ValueError: if there are no safetensors files.
    """
    ending = f".{variant}.safetensors" if variant else ".safetensors"
    files = [file for file in folder.glob(f"*{ending}") if variant or file.name.count(".") == 1]
    if not files:
        raise ValueError(f"{folder} has no weights *{ending}; pickled weights are not read, and --variant names others")
    sizes: dict[str, int] = {}
    for file in files:
        for entry in header(file).values():
            begin, end = entry["data_offsets"]
            sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + end - begin
    known = {name: size for name, size in sizes.items() if name in DTYPES}
    if not known or sum(known.values()) < sum(sizes.values()) / 2:
        raise ValueError(f"{folder} is quantised ({_words(sizes)}); prune the original and quantise afterwards")
    return DTYPES[max(known, key=known.__getitem__)]


def header(file: Path) -> dict[str, Any]:
    """Names, types and shapes in a safetensors file.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            entries = json.loads(stream.read(length))
    except (struct.error, ValueError, OverflowError, MemoryError):
        raise ValueError(f"{file} is no safetensors file, or it is cut short") from None
    entries.pop("__metadata__", None)
    return entries


def _downloaded(source: str, variant: str | None) -> Path:
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"there is no folder or file {source}; a hub id would be owner/name")
    return Path(DiffusionPipeline.download(source, variant=variant, use_safetensors=True))


def _unpacked(file: Path, scratch: Path, config: str | None) -> Path:
    """Folder of Diffusers with what is in a single file."""
    target = scratch / "unpacked"
    names = header(file)
    if config and (Path(config) / "config.json").is_file():
        folders = [Path(config)]
    else:
        folders = [Path(config) / name for name in DENOISERS if (Path(config) / name).is_dir()] if config else []
    for folder in folders:
        kind = _class_of(folder)
        model: Any = build(kind, kind.load_config(folder))
        if model.state_dict().keys() == names.keys():
            return _model_folder(model, file, target)
    if config and (Path(config) / "config.json").is_file():
        kind = stock_class(_class_of(folders[0]))
        kind.from_single_file(str(file), config=config, dtype=_file_dtype(names)).save_pretrained(target)  # type: ignore[attr-defined]
        return target
    base = config or _guessed(file)
    index = DiffusionPipeline.load_config(base)
    pipeline = getattr(diffusers, str(index["_class_name"]))
    pipe = pipeline.from_single_file(
        str(file), config=base, dtype=_file_dtype(names), local_files_only=config is not None
    )
    pipe.save_pretrained(target)
    return target


def _file_dtype(names: dict[str, Any]) -> torch.dtype:
    kinds = [entry["dtype"] for entry in names.values() if entry["dtype"] in DTYPES]
    return DTYPES[max(set(kinds), key=kinds.count)] if kinds else torch.float32


def _model_folder(model: Any, file: Path, target: Path) -> Path:
    """A model's folder with the weights of `file`, which has Diffusers' own names."""
    target.mkdir()
    model.save_config(target)
    (target / "diffusion_pytorch_model.safetensors").symlink_to(file.resolve())
    return target


def _guessed(file: Path) -> str:
    """Hub id with the config of a single file's architecture, as Diffusers tells from its names."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint

    return fetch_diffusers_config(load_single_file_checkpoint(str(file)))["pretrained_model_name_or_path"]
