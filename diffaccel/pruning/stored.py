"""What is stored in a model's folder: its class, the type of its weights. Nothing is loaded, nothing unpickled."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from diffaccel.pruning.families import FAMILIES
from diffaccel.pruning.models import NAMES, pruned_class

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CLASSES = {stock.__name__: stock for stock in FAMILIES}
SHARD = r"(-\d+-of-\d+)?"


def class_of(folder: Path) -> Any:
    """Class that a model's folder is of, stock or pruned.

    Raises:
        ValueError: if it cannot be pruned, or there is no config.
    """
    name = read_json(folder / "config.json").get("_class_name", "")
    if name in NAMES:
        return pruned_class(NAMES[name])
    if name in CLASSES:
        return CLASSES[name]
    raise ValueError(f"cannot prune the {name or 'network'} in {folder}; known are {', '.join(CLASSES)}")


def read_json(file: Path) -> dict[str, Any]:
    """A config.

    Raises:
        ValueError: if it is missing or damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; a checkpoint of Diffusers has it") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no config: it holds a {type(content).__name__}, not names and values")
    return content


def stored_dtype(folder: Path, variant: str | None = None) -> torch.dtype:
    """Floating-point type of a model's weights: that of the largest share of the bytes in its safetensors files.

    Raises:
        ValueError: if there are no safetensors files, one is damaged, or the weights are quantised.
    """
    if method := read_json(folder / "config.json").get("quantization_config"):
        raise _quantised(folder, method.get("quant_method", "see its config") if isinstance(method, dict) else method)
    ending = f"{re.escape('.' + variant) if variant else ''}"
    name = re.compile(rf"diffusion_pytorch_model{SHARD}{ending}{SHARD}\.safetensors")
    files = [file for file in folder.iterdir() if name.fullmatch(file.name)]
    if not files:
        wanted = f"*.{variant}.safetensors" if variant else "*.safetensors"
        raise ValueError(f"{folder} has no weights {wanted}; pickled weights are not read, and --variant names others")
    return dtype_of((entry for file in files for entry in header(file).values()), folder)


def dtype_of(entries: Iterable[dict[str, Any]], source: Path) -> torch.dtype:
    """Floating-point type of the largest share of the bytes.

    Raises:
        ValueError: if most are of another kind.
    """
    sizes: dict[str, int] = {}
    for entry in entries:
        begin, end = entry["data_offsets"]
        sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + end - begin
    known = {name: size for name, size in sizes.items() if name in DTYPES}
    if not known or sum(known.values()) < sum(sizes.values()) / 2:
        raise _quantised(source, ", ".join(sizes) or "no weights at all")
    return DTYPES[max(known, key=known.__getitem__)]


def _quantised(source: Path, how: Any) -> ValueError:
    return ValueError(f"{source} is quantised ({how}); prune the original and quantise afterwards")


def header(file: Path) -> dict[str, Any]:
    """Names, types and shapes in a safetensors file.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            entries = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        whole = file.stat().st_size == 8 + length + end
    except (struct.error, ValueError, OverflowError, MemoryError, AttributeError, LookupError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{file} is no safetensors file, or it is cut short")
    return entries
