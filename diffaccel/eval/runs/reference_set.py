"""The pictures that generated ones are compared with: a folder, or what is left of one in a file."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from diffaccel.eval.errors import DataError, ProtocolMismatch
from diffaccel.eval.files import save_tensors
from diffaccel.eval.images import Alpha
from diffaccel.eval.networks.extractor import Extractor
from diffaccel.eval.runs.features import extract
from diffaccel.eval.statistics.frechet import Gaussian, gaussian
from diffaccel.eval.statistics.moments import Moments, import_npz, load_moments, save_moments

TWEMOJI = Path(__file__).parent.parent / "data" / "twemoji-emoji-clip.safetensors"
PACKAGED = {"twemoji": TWEMOJI}


@dataclass(frozen=True, eq=False)
class ReferenceSet:
    """One extractor's view of the reference pictures.

    Attributes:
        name: for people: file or folder name.
        digest: SHA-256 of features or moments, first 16 hex digits.
        n: number of pictures.
        gaussian: for Frechet distances; its factor is the costly part and is made once.
        features: (N, d) and what else the extractor gives, by name; None where only moments are kept.
    """

    name: str
    digest: str
    n: int
    gaussian: Gaussian
    features: Mapping[str, NDArray[np.float32]] | None


def load_reference(
    source: str | os.PathLike[str],
    extractor: Extractor,
    *,
    alpha: Alpha | None = None,
    skip_bad: bool = False,
    progress: bool = True,
) -> ReferenceSet:
    """A folder of pictures, a run, a file of `save_reference`, an `.npz` with `mu` and `sigma`, or "twemoji".

    An `.npz` does not say which network it is of; whoever gives it must know. Most do not say either how many pictures
    they are of: write `FILE.npz:50000`.

    Raises:
        ProtocolMismatch: if a file was made with another extractor.
        DataError: if there is nothing of the kind, or it is damaged.
    """
    path, n = PACKAGED.get(str(source), Path(source)), None
    if counted := re.fullmatch(r"(.+\.npz):(\d+)", str(source)):
        path, n = Path(counted[1]), int(counted[2])
    if path.is_dir():
        features = extract(path, extractor, alpha=alpha, skip_bad=skip_bad, progress=progress)
        return _of_features(path.resolve().name, features)
    if not path.exists():
        raise DataError(
            f"no reference {source}: give a folder of pictures, a file of `diffaccel eval ref`, an .npz with mu and "
            f"sigma, or {', '.join(PACKAGED)}"
        )
    if path.suffix == ".npz":
        return _from_npz(path, n, extractor)
    return _from_file(path, extractor)


def save_reference(
    source: str | os.PathLike[str],
    extractor: Extractor,
    out: str | os.PathLike[str],
    *,
    moments_only: bool = False,
    alpha: Alpha | None = None,
    skip_bad: bool = False,
) -> ReferenceSet:
    """Write features, or moments alone, of a folder of pictures into a safetensors file that `load_reference` reads.

    KID, CMMD and precision need features, FID only moments: at d = 2048 these are 17 MB for any number of pictures.

    Raises:
        ValueError: if the file's name does not end in `.safetensors`.
        DataError: if there are fewer than 2 pictures, or damaged ones.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"a reference is a .safetensors file, not {out.name}")
    features = extract(source, extractor, alpha=alpha, skip_bad=skip_bad)
    reference = _of_features(Path(source).resolve().name, features)
    about = {"extractor": extractor.id, "weights": extractor.weights, "n": str(reference.n), "source": reference.name}
    out.parent.mkdir(parents=True, exist_ok=True)
    if moments_only:
        save_moments(Moments.of(features["features"]), out, about)
    else:
        save_tensors({name: torch.from_numpy(value) for name, value in features.items()}, out, about)
    return reference


def _from_file(path: Path, extractor: Extractor) -> ReferenceSet:
    try:
        with safe_open(path, framework="numpy") as file:
            about, names = file.metadata() or {}, list(file.keys())
            features = {name: file.get_tensor(name) for name in names} if "features" in names else None
    except SafetensorError as error:
        raise DataError(f"{path} is no reference, or damaged ({error}); write it with `diffaccel eval ref`") from None
    made_with = about.get("extractor", "")
    if made_with != extractor.id:
        raise ProtocolMismatch(
            f"{path.name} was made with {made_with or 'an unknown extractor'}, and the pictures are seen by "
            f"{extractor.id}; make the reference anew with `diffaccel eval ref`"
        )
    if features is not None:
        return _of_features(path.stem, {k: v.astype(np.float32) for k, v in features.items() if v.ndim == 2})
    return _of_moments(path.stem, load_moments(path)[0])


def _from_npz(path: Path, n: int | None, extractor: Extractor) -> ReferenceSet:
    moments = import_npz(path, n)
    if moments.dim != extractor.dim:
        raise ProtocolMismatch(
            f"{path.name} is of {moments.dim} features, and {extractor.name} has {extractor.dim}; they are of another "
            "network"
        )
    return _of_moments(path.name, moments)


def _of_features(name: str, features: Mapping[str, NDArray[np.float32]]) -> ReferenceSet:
    values = features["features"]
    return ReferenceSet(name, _digest(values), len(values), gaussian(values), features)


def _of_moments(name: str, moments: Moments) -> ReferenceSet:
    return ReferenceSet(name, _digest(moments.mean, moments.m2), moments.n, gaussian(moments), None)


def _digest(*arrays: NDArray[np.generic]) -> str:
    whole = hashlib.sha256()
    for array in arrays:
        whole.update(np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()[:16]
