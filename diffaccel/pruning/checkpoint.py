"""Checkpoints: a pipeline's folder, a model's folder, a hub id, a zoo name, or one `.safetensors` file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from torch import nn

from diffaccel import zoo
from diffaccel.cost import DENOISERS
from diffaccel.pruning.single_file import unpack
from diffaccel.pruning.stored import class_of, read_json, stored_dtype


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
        options: dict[str, Any] = {"dtype": dtype or self.dtype, "variant": self.variant, "use_safetensors": True}
        try:
            return DiffusionPipeline.from_pretrained(self.folder, **options, **given)
        except SafetensorError as error:
            raise ValueError(f"a part of {self.source} is damaged: {error}") from None


def open_checkpoint(
    source: str,
    scratch: Path | None = None,
    *,
    config: str | None = None,
    component: str | None = None,
    variant: str | None = None,
) -> Checkpoint:
    """Find out what `source` is.

    Args:
        source: a zoo name, a folder, a hub id, or a `.safetensors` file in Diffusers' or the original (LDM) layout.
        scratch: an existing folder in which a single file is unpacked; other sources need none.
        config: for a single file: folder (or hub id) of a pipeline or model of its architecture. Without it Diffusers
            guesses, and asks the hub.
        component: the denoiser to prune, if the pipeline has several.
        variant: of the files' names.

    Raises:
        ValueError: if it is no checkpoint, or its denoiser is of a class that cannot be pruned.
        OSError: if it is on the hub and cannot be fetched.
    """
    path = Path(zoo.path(source) if source in zoo.NAMES else source)
    if path.suffix == ".safetensors" and path.is_file():
        if scratch is None:
            raise ValueError(f"{source} is a single file and has to be unpacked; give a folder for it as `scratch`")
        path = unpack(path, scratch / "unpacked", config)
    elif not path.exists():
        path = _downloaded(source, variant)
    name = _component(path, source, component)
    class_of(path / name)
    return Checkpoint(path, name, stored_dtype(path / name, variant), variant, source)


def load_model(folder: str | Path, **kwargs: Any) -> nn.Module:
    """A network of a class that can be pruned, stock or pruned, from its own folder (with `config.json`).

    Raises:
        ValueError: if the folder has none.
    """
    return class_of(Path(folder)).from_pretrained(folder, use_safetensors=True, **kwargs)


def _component(folder: Path, source: str, wanted: str | None) -> str:
    if (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        there = [name for name in DENOISERS if isinstance(index.get(name), list) and index[name][0]]
        if wanted in there:
            return str(wanted)
        if wanted or not there:
            raise ValueError(f"{source} has no component {wanted or 'to prune'}; there are {_words(there or index)}")
        return there[0]
    if (folder / "config.json").is_file():
        if wanted:
            raise ValueError(f"{source} is a single network and has no component {wanted}; leave it out")
        return ""
    raise ValueError(
        f"{source} is no checkpoint: it has neither model_index.json nor config.json; give a pipeline's folder, a "
        "model's folder, a .safetensors file, a hub id or a zoo name"
    )


def _words(names: Iterable[str]) -> str:
    return ", ".join(name for name in names if not name.startswith("_"))


def _downloaded(source: str, variant: str | None) -> Path:
    """Folder in the hub's cache: of the pipeline, or of the network that is alone there."""
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"there is no folder or file {source}; a hub id would be owner/name")
    try:
        return Path(DiffusionPipeline.download(source, variant=variant, use_safetensors=True))
    except (EntryNotFoundError, OSError) as error:
        reason = error
    try:  # without a model_index.json, or without a network: what is in the cache
        patterns = ["config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.index*.json"]
        return Path(snapshot_download(source, allow_patterns=patterns))
    except OSError:
        told = str(reason).strip().partition("\n")[0]
        raise OSError(f"there is no folder {source}, and it cannot be fetched from the hub: {told}") from None
