"""Writing tensors: whole or not at all, and readable by whoever may read the folder; and what a kill leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from safetensors.numpy import save_file

STALE_SECONDS = 3600  # nothing is written for so long: an older temporary file is of a process that was killed


def save_tensors(tensors: Mapping[str, ArrayLike], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays or CPU tensors as safetensors, under a temporary name that is renamed.

    Several processes may write the same file: equal content gives equal bytes, while safetensors alone orders the
    metadata by chance. It also makes files for their owner alone; here they get the rights of the user's umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    save_file({name: np.asarray(value, order="C") for name, value in tensors.items()}, scratch, dict(metadata or {}))
    _sort_header(scratch)
    umask = os.umask(0)
    os.umask(umask)
    scratch.chmod(0o666 & ~umask)
    os.replace(scratch, path)


def _sort_header(file: Path) -> None:
    """Rewrite the JSON at the head of a safetensors file in the order of its keys; its length stays."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        stream.seek(8)
        stream.write(text.ljust(size))


def remove_stale(folder: Path) -> None:
    """Remove the temporary files and folders (`.NAME.part`) in `folder` that killed processes have left."""
    for part in folder.glob(".*.part"):
        try:
            if time.time() - part.stat().st_mtime < STALE_SECONDS:
                continue
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        except FileNotFoundError:  # another process removed it, or finished it
            continue
