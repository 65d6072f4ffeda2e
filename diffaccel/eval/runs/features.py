"""Features of a folder of pictures: taken once, kept in shards, taken again only where the pictures changed."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file
from torch import Tensor

from diffaccel.eval.errors import DataError
from diffaccel.eval.files import remove_stale, save_tensors
from diffaccel.eval.images import Alpha, check_pictures, list_pictures, read_picture
from diffaccel.eval.networks.extractor import Extractor
from diffaccel.eval.runs.run import read_run
from diffaccel.eval.runs.shards import run_shards, shard_ranges

CPU_BATCH, ACCELERATOR_BATCH = 8, 64  # 8 stay in the cache of a CPU core; both divide a shard


def extract(
    source: str | os.PathLike[str],
    extractor: Extractor,
    *,
    cache: str | os.PathLike[str] | None = None,
    alpha: Alpha | None = None,
    skip_bad: bool = False,
    progress: bool = True,
) -> dict[str, NDArray[np.float32]]:
    """Features of every picture: name -> (N, ...) float32, in the order of `list_pictures`, or of a run's indices.

    Shards lie in `cache` under the extractor's name, weights and protocol, each with a hash of the bytes of its
    pictures: an interrupted extraction goes on, a changed picture is taken anew, several processes (`accelerate
    launch`) share the work and read the same result.

    Args:
        source: a folder of pictures, or a run of `generate`.
        extractor: the network.
        cache: folder for the shards; default: `features` in a run, else a folder in `cache_home()`.
        alpha: what transparent pictures are laid on, "white" or "black"; None refuses them.
        skip_bad: leave damaged pictures out, at most 1 % of them, instead of raising.
        progress: show a progress bar.

    Raises:
        DataError: if there are no pictures or some are damaged, the run is not complete, or the cache cannot be
            written.
    """
    paths = _pictures(source)
    if skip_bad:
        paths = list(check_pictures(paths, alpha=alpha, skip_bad=True).good)
    folder = _made((Path(cache) if cache is not None else default_cache(source)) / _name(extractor, alpha))
    shards = [[paths[i] for i in indices] for indices in shard_ranges(len(paths))]
    files = [folder / f"{k:05d}.safetensors" for k in range(len(shards))]
    digest = functools.cache(lambda k: _digest(shards[k]))

    def is_done(k: int) -> bool:
        return files[k].exists() and _holds(files[k], digest(k), extractor.outputs)

    def work(k: int) -> None:
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
            pictures = list(pool.map(lambda path: read_picture(path, alpha), shards[k]))
        save_tensors(_in_batches(extractor, pictures), files[k], {"pictures": digest(k)})

    todo = [k for k in range(len(shards)) if not is_done(k)]
    if todo and not os.access(folder, os.W_OK):
        raise _unwritable(folder, "it is read-only")
    if not skip_bad:  # all that is wrong is told before the first feature is computed
        check_pictures([path for k in todo for path in shards[k]], alpha=alpha)
    run_shards(shard_ranges(len(paths)), is_done, work, label=f"features, {extractor.name}", progress=progress)
    parts = [load_file(file) for file in files]
    return {name: np.concatenate([part[name] for part in parts]) for name in extractor.outputs}


def _pictures(source: str | os.PathLike[str]) -> list[Path]:
    """Of a run those that belong to it, whatever else lies there, and unchanged: they go with its prompts."""
    if not (Path(source) / "job.json").exists():
        return list_pictures(source)
    run = read_run(source)
    for path, made in zip(run.paths, run.hashes, strict=True):
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != made:
            raise DataError(f"{path} is missing or has changed since it was made; `diffaccel eval verify` lists all")
    return list(run.paths)


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error.strerror or str(error)) from None
    remove_stale(folder)
    return folder


def _unwritable(folder: Path, why: str) -> DataError:
    return DataError(
        f"features cannot be kept in {folder} ({why}); set DIFFACCEL_EVAL_HOME to a folder that can be written, or "
        "give a cache"
    )


def cache_home() -> Path:
    """`DIFFACCEL_EVAL_HOME`, or `diffaccel` in the user's cache folder."""
    home, caches = os.environ.get("DIFFACCEL_EVAL_HOME"), os.environ.get("XDG_CACHE_HOME")
    return Path(home).expanduser() if home else Path(caches or Path.home() / ".cache") / "diffaccel"


def default_cache(source: str | os.PathLike[str]) -> Path:
    """`features` of a run; for a plain folder, which we do not write into, one in `cache_home()` after its path."""
    if (Path(source) / "job.json").exists():
        return Path(source) / "features"
    path = Path(source).resolve()
    return cache_home() / "features" / f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _in_batches(extractor: Extractor, pictures: Sequence[Tensor]) -> dict[str, Tensor]:
    size = CPU_BATCH if extractor.device == "cpu" else ACCELERATOR_BATCH
    outputs = [extractor(pictures[i : i + size]) for i in range(0, len(pictures), size)]
    return {name: torch.cat([output[name] for output in outputs]).contiguous() for name in outputs[0]}


def _name(extractor: Extractor, alpha: Alpha | None) -> str:
    return extractor.id if alpha is None else f"{extractor.id}-on-{alpha}"


def _digest(paths: Sequence[Path]) -> str:
    whole = hashlib.sha256()
    for path in paths:
        whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def _holds(file: Path, pictures: str, outputs: Sequence[str]) -> bool:
    """Whether a shard has these outputs of these pictures; a damaged file is as good as none."""
    try:
        with safe_open(file, framework="numpy") as shard:
            return (shard.metadata() or {}).get("pictures") == pictures and set(outputs) <= set(shard.keys())
    except SafetensorError:
        return False
