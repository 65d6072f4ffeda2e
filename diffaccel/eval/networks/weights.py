"""Where the weights of feature networks are looked for. Nothing is ever downloaded."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from diffaccel.eval.errors import DataError, MissingWeights

HOME = "DIFFACCEL_EVAL_HOME"


@dataclass(frozen=True)
class WeightsFile:
    """A published file of weights.

    Attributes:
        name: file name, as it is published.
        sha256: SHA-256 in hex of the files that are accepted, each whole or from its start (at least 8 digits, as
            PyTorch has them in its file names).
        url: where to get it.
        licence: of the weights.
        aliases: other names the same file goes by.
        folders: where the programs that use it keep it, besides those that `find_weights` names.
        packaged: `package/path` of the file in a Python package that carries it.
    """

    name: str
    sha256: tuple[str, ...]
    url: str
    licence: str
    aliases: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    packaged: str = ""

    def __post_init__(self) -> None:
        if not self.sha256 or any(len(prefix) < 8 for prefix in self.sha256):
            raise ValueError(f"{self.name}: give a SHA-256 with at least 8 digits; a file is never used unchecked")


def find_weights(spec: WeightsFile, given: str | os.PathLike[str] | None = None) -> Path:
    """The file on this machine, its SHA-256 checked.

    Where `given` is a file it alone is looked at, where it is a folder only that folder. Otherwise, in this order:
    the folder DIFFACCEL_EVAL_HOME; PyTorch's hub folder (TORCH_HOME/hub/checkpoints, by default below ~/.cache/torch),
    where torchvision, pytorch-fid and torch-fidelity put their downloads; the system's temporary folder, where
    clean-fid puts its own; and the Python package that carries it, which is not imported. A file found there with
    another SHA-256, such as half a download, is passed over.

    Raises:
        MissingWeights: if there is none; the message says what to put where.
        DataError: if the `given` file is another one.
    """
    if given is not None and Path(given).is_file():
        digest = sha256_of(given)
        if not _accepted(spec, digest):
            raise DataError(f"{given} is not {spec.name}: its SHA-256 is {digest}, not {' or '.join(spec.sha256)}")
        return Path(given)
    wrong, places = [], _places(spec, given)
    for place in places:
        if place.is_file():
            digest = sha256_of(place)
            if _accepted(spec, digest):
                return place
            wrong.append(f"{place} has another SHA-256, {digest}: damaged, or not this file")
    raise MissingWeights(_message(spec, places, wrong))


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file in hex; kept in memory until its size or time of change is another."""
    path = Path(path).resolve()
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of tensors' shapes, types and bytes in hex: the same for whichever file they came from."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _accepted(spec: WeightsFile, digest: str) -> bool:
    return any(digest.startswith(prefix.lower()) for prefix in spec.sha256)


def _places(spec: WeightsFile, given: str | os.PathLike[str] | None) -> list[Path]:
    names = (spec.name, *spec.aliases)
    if given is not None:
        given = Path(given)
        return [given / name for name in names] if given.is_dir() else [given]
    home = os.environ.get(HOME)
    folders = [Path(home).expanduser()] if home else []
    folders += [Path(torch.hub.get_dir()) / "checkpoints", Path(tempfile.gettempdir())]
    folders += [Path(folder).expanduser() for folder in spec.folders]
    return [folder / name for folder in folders for name in names] + _in_package(spec.packaged)


def _in_package(packaged: str) -> list[Path]:
    package, _, inside = packaged.partition("/")
    found = importlib.util.find_spec(package) if package else None  # finds it without running its code
    return [Path(folder) / inside for folder in (found.submodule_search_locations or ())] if found else []


def _message(spec: WeightsFile, places: list[Path], wrong: list[str]) -> str:
    home = os.environ.get(HOME)
    return "\n".join(
        [
            f"the weights {spec.name} are not on this machine, and are never downloaded without being asked for.",
            f"  file      {spec.name}",
            f"  SHA-256   {' or '.join(spec.sha256)}",
            f"  from      {spec.url}",
            f"  licence   {spec.licence}",
            f"  put it    into the folder ${HOME} ({f'now {home}' if home else 'not set now'}), or give its path",
            *(
                [f"  package   or install the Python package {spec.packaged.partition('/')[0]}"]
                if spec.packaged
                else []
            ),
            f"  looked at {', '.join(map(str, places))}",
            *(f"  found     {line}" for line in wrong),
        ]
    )
