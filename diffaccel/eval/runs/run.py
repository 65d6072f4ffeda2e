"""A finished run read back: which picture has which prompt, seed and latents."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffaccel.eval.errors import DataError, ProtocolMismatch
from diffaccel.eval.runs.generate import shard_folder
from diffaccel.eval.runs.manifest import digest, read_job
from diffaccel.eval.runs.shards import shard_ranges

REPEATED = 0.001  # share of pictures that may equal another one by chance


@dataclass(frozen=True)
class Run:
    """Pictures of a run, in the order of their indices.

    Attributes:
        folder: where it lies.
        job: what was asked for.
        paths: picture files.
        ids: id of each picture's prompt.
        prompts: text of each picture's prompt.
        seeds: seed of each picture.
        hashes: SHA-256 of each file, as they were written.
        one_colour: indices of pictures of one colour everywhere: a safety checker's black ones, or a failed run.
    """

    folder: Path
    job: dict[str, Any]
    paths: tuple[Path, ...]
    ids: tuple[str, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    hashes: tuple[str, ...]
    one_colour: tuple[int, ...]

    @property
    def digest(self) -> str:
        """Of the job: runs of one digest hold the same pictures."""
        return digest(self.job)

    def warnings(self) -> tuple[str, ...]:
        """What looks wrong with the pictures, for the table: of one colour, or the same file again and again."""
        found = []
        if self.one_colour:
            found.append(f"{len(self.one_colour)} of {len(self.paths)} pictures are of one colour (safety checker?)")
        repeated = len(self.hashes) - len(set(self.hashes))
        if repeated > REPEATED * len(self.hashes):
            found.append(f"{repeated} of {len(self.paths)} pictures repeat another one: are the seeds right?")
        return tuple(found)

    def latents(self) -> Tensor | None:
        """(N, ...) float32 final latents, if they were kept; DataError if a file of them is lost or damaged."""
        if not self.job["latents"]:
            return None
        folders = [shard_folder(self.folder, k) for k in range(len(shard_ranges(len(self.paths))))]
        try:
            return torch.cat([load_file(folder / "latents.safetensors")["latents"] for folder in folders])
        except (OSError, SafetensorError, KeyError) as error:
            raise DataError(
                f"latents of {self.folder} cannot be read ({error}); delete that shard, generate again"
            ) from None


def read_run(folder: str | os.PathLike[str]) -> Run:
    """The run in a folder.

    Raises:
        DataError: if it is no run, is not complete, or a record is damaged.
    """
    folder, job = Path(folder), read_job(folder)
    records, missing = [], []
    for k, indices in enumerate(shard_ranges(job["num"])):
        try:
            records.append(_record(shard_folder(folder, k), indices))
        except FileNotFoundError:
            missing.append(k)
    if missing:
        raise DataError(f"{folder} lacks {len(missing)} of {len(records) + len(missing)} shards; run generate again")
    paths, hashes = [], []
    for k, record in enumerate(records):
        names = [f"{i:06d}.png" for i in record["indices"]]
        paths += [shard_folder(folder, k) / name for name in names]
        hashes += [record["files"][name] for name in names]
    joined = {
        key: tuple(x for record in records for x in record[key]) for key in ("ids", "prompts", "seeds", "one_colour")
    }
    return Run(folder, job, tuple(paths), **joined, hashes=tuple(hashes))


def _record(shard: Path, indices: range) -> dict[str, Any]:
    """What `shard.json` says."""
    if not shard.is_dir():
        raise FileNotFoundError(shard)
    damaged = DataError(f"{shard} is damaged; delete it and run generate again")
    try:
        record = json.loads((shard / "shard.json").read_text(encoding="utf-8"))
        names = {f"{i:06d}.png" for i in indices}
        whole = record["indices"] == list(indices) and names <= record["files"].keys()
        whole = whole and all(len(record[key]) == len(indices) for key in ("ids", "prompts", "seeds"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise damaged from None
    if not whole or not isinstance(record.get("one_colour"), list):
        raise damaged
    return record


def check_pairs(a: Run, b: Run) -> None:
    """Raise ProtocolMismatch unless picture i of both runs has the same prompt and seed."""
    if (a.ids, a.seeds) == (b.ids, b.seeds) and a.job["seed_rule"] == b.job["seed_rule"]:
        return
    if len(a.ids) != len(b.ids):
        what = f"{len(a.ids)} and {len(b.ids)} pictures"
    else:
        what = "other prompts" if a.ids != b.ids else "other seeds"
    raise ProtocolMismatch(f"{a.folder} and {b.folder} cannot be compared: {what}; generate both with the same")


def verify(run: Run) -> list[str]:
    """What has changed since the run was made: one sentence for each file; none if all is well."""
    found = []
    for k in range(len(shard_ranges(len(run.paths)))):
        folder = shard_folder(run.folder, k)
        files: dict[str, str] = json.loads((folder / "shard.json").read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            path = folder / name
            if not path.exists():
                found.append(f"{path} is missing")
            elif hashlib.sha256(path.read_bytes()).hexdigest() != expected:
                found.append(f"{path} has changed")
        found += _strangers(folder, files.keys() | {"shard.json"})
    shards = {shard_folder(run.folder, k).name for k in range(len(shard_ranges(len(run.paths))))}
    return found + _strangers(run.folder / "images", shards)


def _strangers(folder: Path, expected: Set[str]) -> list[str]:
    names = {file.name for file in folder.iterdir() if not file.name.endswith(".part")} - expected
    return [f"{folder / name} does not belong to the run" for name in sorted(names)]


def jackknife_groups(ids: Sequence[str], count: int) -> list[list[int]]:
    """Indices of up to `count` groups; all pictures of a prompt are in one, since they resemble each other."""
    order = {name: place for place, name in enumerate(dict.fromkeys(ids))}
    count = min(count, len(order))
    groups: list[list[int]] = [[] for _ in range(count)]
    for i, name in enumerate(ids):
        groups[order[name] * count // len(order)].append(i)
    return groups
