"""One `.safetensors` file as a folder of Diffusers: a network in Diffusers' own names, or the original (LDM) layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError

from diffaccel.cost import DENOISERS
from diffaccel.pruning.families import stock_class
from diffaccel.pruning.stored import CLASSES, class_of, dtype_of, header
from diffaccel.pruning.structure import build


def unpack(file: Path, target: Path, config: str | None) -> Path:
    """`target`, filled with what is in a single file: a pipeline if it has one, else the denoiser.

    A network in Diffusers' names is linked, not copied. The original layout is converted by Diffusers'
    `from_single_file`, which takes parts of a pipeline that are not in the file from the config's folder, if their
    weights are there.

    Args:
        file: the weights.
        target: a folder that does not exist.
        config: folder (or hub id) of a pipeline or a model of its architecture; None: Diffusers guesses, and asks the
            hub.

    Raises:
        ValueError: if the file does not fit the config, or is damaged.
        OSError: if the hub cannot be reached.
    """
    entries = header(file)
    dtype = dtype_of(entries.values(), file)
    shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    for folder in _model_folders(config):
        kind = class_of(folder)
        model: Any = build(kind, kind.load_config(folder))
        wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        if wanted == shapes:
            return _linked(model, file, target)
        if wanted.keys() == shapes.keys():
            name = next(name for name, shape in wanted.items() if shapes[name] != shape)
            told = f"{name} is {shapes[name]} in the file, {wanted[name]} in the config"
            raise ValueError(f"{file} is of another size than {folder}: {told}; give the config it was made with")
    try:
        _converted(file, config, dtype).save_pretrained(target)
    except (SingleFileComponentError, ValueError, LookupError, RuntimeError) as error:
        given = f"with the config {config}" if config else "without --config"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{file} cannot be opened {given}: {reason[:300]}") from None
    return target


def _model_folders(config: str | None) -> list[Path]:
    """Folders of networks that the file may hold alone.

    Raises:
        ValueError: if there is no such folder.
    """
    if config is None:
        return []
    folder = Path(config)
    if (folder / "config.json").is_file():
        return [folder]
    if (folder / "model_index.json").is_file():
        return [folder / name for name in DENOISERS if (folder / name / "config.json").is_file()]
    if folder.exists() or config.count("/") != 1:
        raise ValueError(f"--config {config} is no folder with model_index.json or config.json, and no hub id")
    return []


def _linked(model: Any, file: Path, target: Path) -> Path:
    target.mkdir()
    model.save_config(target)
    (target / "diffusion_pytorch_model.safetensors").symlink_to(file.resolve())
    return target


def _converted(file: Path, config: str | None, dtype: torch.dtype) -> Any:
    """The pipeline in a file of the original layout; the denoiser, if it is alone there."""
    base = config or _guessed(file)
    reading = {"config": base, "dtype": dtype, "local_files_only": Path(base).is_dir()}
    if (Path(base) / "config.json").is_file():
        return _reader(stock_class(class_of(Path(base))))(str(file), **reading)
    index: Any = DiffusionPipeline.load_config(base)
    pipeline = getattr(diffusers, str(index["_class_name"]), None)
    try:
        return _reader(pipeline)(str(file), **reading)
    except SingleFileComponentError:
        name = next((name for name in DENOISERS if (index.get(name) or ("", ""))[1] in CLASSES), None)
        if name is None:
            raise
        return _reader(CLASSES[index[name][1]])(str(file), subfolder=name, **reading)


def _reader(kind: Any) -> Any:
    """`from_single_file` of a class of Diffusers."""
    if not hasattr(kind, "from_single_file"):
        name = getattr(kind, "__name__", "pipeline of this config")
        raise ValueError(f"Diffusers reads no {name} in the original layout; give a file with Diffusers' own names")
    return kind.from_single_file


def _guessed(file: Path) -> str:
    """Hub id with the config of a single file's architecture, as Diffusers tells from its names."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint

    return fetch_diffusers_config(load_single_file_checkpoint(str(file)))["pretrained_model_name_or_path"]
