"""Sparse edits on networks of full size: error against margin with SIGE's rule beside it, and forward time, in one run.

    python benchmarks/sparse_edit.py ddpm256 [--init torch] [--rounds 5] [--threads 1 2]

Networks are DDPM-256 (`UNet2DModel`, as google/ddpm-church-256) and SD 1.5 at 512 pixels, with random weights: "torch"
initialises as PyTorch does, "variance" with N(0, 1 / fan-in). Pictures are smooth noise at half the signal power. Two
edits, squares off the grid, have another picture and other noise inside. Error is the relative RMSE against the dense
network on the edited input, in the mask, in the mask dilated by 5 pixels (as SIGE dilates it), and outside. The fastest
setting (by multiply-accumulates) with at most SIGE's error is timed against the dense network, by turns. The allocator
is told to give no memory back (Linux): the page faults of fresh memory, up to a third of a dense forward, come and go
with what ran before. Written to `results/sparse_edit_<network>_<init>.json`; the report of all is
`results/sparse_edit.md` and `.png`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from sige_rule import SigeRule, dilated
from sparse_edit_report import write_report
from torch import Tensor

from diffaccel.cost import flop_counter, macs, parameters, processor
from diffaccel.kernels import Handle, SparseEditConfig, apply_sparse_edit
from diffaccel.kernels.region import read_mask
from diffaccel.pictures import save_text

HERE = Path(__file__).parent
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
NORMS: tuple[Literal["cached", "last", "incremental"], ...] = ("cached", "last", "incremental")
SHARES = (0.01, 0.05, 0.15, 0.35)
PLACES = ((0.31, 0.43), (0.12, 0.27))  # of the square's corner, as shares of the picture


@dataclass(frozen=True)
class Case:
    """A network, and what is tried on it.

    Attributes:
        title: for people.
        make: builds it.
        picture: rows of the picture; `factor` times those of the network's input.
        factor: of the autoencoder.
        setting, sparse_from: of `SigeRule`.
        ring: pixels of the network's input in 5 pixels of the picture, rounded up.
        margins, dense_below: that are tried.
        places: of the edits.
        batches: rows of the timed calls.
        shares: of the picture that are edited.
    """

    title: str
    make: Callable[[], Any]
    picture: int
    factor: int
    setting: Literal["ddpm", "sd"]
    sparse_from: int
    ring: int
    margins: tuple[int, ...]
    dense_below: tuple[int, ...]
    places: tuple[tuple[float, float], ...] = PLACES
    batches: tuple[int, ...] = (1,)
    shares: tuple[float, ...] = SHARES


DDPM = {
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
SMALL: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
SMALL_DDPM = SMALL | {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "attention_head_dim": 8}
SMALL_DDPM |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "downsample_padding": 0}
SMALL_SD = SMALL | {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 2}
SMALL_SD |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 8}

MARGINS = (0, 2, 4, 8, 12, 16, 24, 32)
SD = partial(UNet2DConditionModel, cross_attention_dim=768)
CASES = {
    "ddpm256": Case(
        "DDPM-256", partial(UNet2DModel, sample_size=256, **DDPM), 256, 1, "ddpm", 64, 5, MARGINS, (0, 16, 32)
    ),
    "sd15": Case("SD 1.5, 512 px", SD, 512, 8, "sd", 0, 1, (0, 1, 2, 4, 6, 8, 12), (0, 16), PLACES[:1]),
}
DRY = {
    "ddpm256": Case(
        *("small DDPM", partial(UNet2DModel, sample_size=32, **SMALL_DDPM), 32, 1, "ddpm", 32, 5, (0, 4), (0, 16)),
        shares=(0.05, 0.35),
    ),
    "sd15": Case(
        *("small SD", partial(UNet2DConditionModel, sample_size=16, **SMALL_SD), 128, 8, "sd", 0, 1, (0, 2), (0,)),
        *(PLACES[:1], (1, 2), (0.05,)),
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--init", nargs="+", default=["torch"], choices=["torch", "variance"])
    parser.add_argument("--rounds", type=int, default=5, help="of timing; 0 leaves it out")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--report-only", action="store_true", help="from the JSON files that are there")
    parser.add_argument("--dry-run", action="store_true", help="small networks, in seconds; numbers without meaning")
    args = parser.parse_args(argv)
    keep_memory()
    for name in args.networks:
        for init in () if args.report_only else args.init:
            torch.set_num_threads(args.threads[0])
            found = measure((DRY if args.dry_run else CASES)[name], init, args.rounds, args.threads)
            save_text(json.dumps(found, indent=1) + "\n", args.output / f"sparse_edit_{name}_{init}.json")
    write_report(args.output)


def keep_memory() -> None:
    """Let glibc keep what was freed (mallopt(3))."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@torch.inference_mode()
def measure(case: Case, init: str, rounds: int, threads: Sequence[int]) -> dict[str, Any]:
    """All of one network."""
    network = random_weights(case.make, init)
    edits = {
        share: [Edit(case, network, share, place, seed + 1) for seed, place in enumerate(case.places)]
        for share in case.shares
    }
    found: dict[str, Any] = {
        "title": case.title,
        "init": init,
        "parameters": parameters(network),
        "macs": macs(network, **edits[0.05][0].before),
        "packages": {name: version(name) for name in ("diffaccel", "torch", "diffusers")},
        "processor": processor(),
        "defaults": {
            name: getattr(SparseEditConfig(), name) for name in ("margin", "norm", "dense_below", "dense_above")
        },
        "memory": memory(case, network, edits[0.05][0]),
        "edits": [],
    }
    for share, both in edits.items():
        row = {"share": share, "sige": sige(case, network, both), "curve": curve(case, network, both)}
        row["chosen"] = {where: chosen(row["curve"], row["sige"], where) for where in ("ring", "mask")}
        found["edits"].append(row)
        print(case.title, share, row["sige"], row["chosen"], flush=True)
    if rounds:
        found["times"] = {count: times(case, network, edits, found["edits"], rounds, count) for count in threads}
        found["break_even"] = break_even(case, network, rounds)
    return found


def random_weights(make: Callable[[], Any], init: str) -> Any:
    """The network, the same one every time."""
    torch.manual_seed(0)
    network = make().eval()
    for parameter in network.parameters() if init == "variance" else ():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return network


class Edit:
    """A reference input, one that differs from it in a square, and what the dense network makes of that.

    Attributes:
        picture: the mask on the picture.
        mask, ring: that mask, and that of 5 pixels more, on the network's input.
        before, after: arguments of the network.
        reference, dense: its results.
    """

    def __init__(self, case: Case, network: Any, share: float, place: tuple[float, float], seed: int = 1):
        draw, size = torch.Generator().manual_seed(seed), case.picture // case.factor
        channels = network.config.in_channels
        self.picture = square(case.picture, share, place)
        self.mask = torch.from_numpy(read_mask(self.picture, (size, size))[0])
        self.ring = dilated(self.mask, case.ring)
        text = {}
        if isinstance(network, UNet2DConditionModel):
            width = network.config["cross_attention_dim"]
            text = {"encoder_hidden_states": torch.randn(1, 77, width, generator=draw)}
        old, new = (noisy(draw, channels, size) for _ in range(2))
        self.before: dict[str, Any] = {"sample": old, "timestep": torch.tensor(500), **text}
        self.after = self.before | {"sample": torch.where(self.mask, new, old)}
        self.reference, self.dense = network(**self.before).sample, network(**self.after).sample

    def repeated(self, rows: int) -> Edit:
        """The same edit of so many rows, to be timed."""
        result = copy(self)
        for name in ("before", "after"):
            given = getattr(self, name).items()
            setattr(
                result, name, {key: value.repeat_interleave(rows, 0) if value.ndim else value for key, value in given}
            )
        return result

    def errors(self, result: Tensor) -> dict[str, float]:
        """Relative RMSE against the dense network."""
        places = {"mask": self.mask, "ring": self.ring, "outside": ~self.ring}
        return {name: _relative(result[..., where], self.dense[..., where]) for name, where in places.items()}


def square(size: int, share: float, place: tuple[float, float]) -> Tensor:
    """A square with so much of the picture, at odd coordinates."""
    side = round(size * share**0.5)
    top, left = (min(int(size * where) | 1, size - side - 1) for where in place)
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    return mask


def noisy(draw: torch.Generator, channels: int, size: int) -> Tensor:
    """A smooth picture and noise, of equal power."""
    picture = F.interpolate(torch.randn(1, channels, 8, 8, generator=draw), (size, size), mode="bicubic")
    return (picture / picture.std() + torch.randn(1, channels, size, size, generator=draw)) * 0.5**0.5


def sige(case: Case, network: Any, edits: Sequence[Edit]) -> dict[str, float]:
    """Mean errors of SIGE's rule, and of no change at all; the largest difference where nothing was edited."""
    rule, errors, same = SigeRule(network, case.setting, sparse_from=case.sparse_from), [], 0.0
    for edit in edits:
        with rule.record():
            network(**edit.before)
        with rule.edit(edit.picture):
            same = max(same, _relative(network(**edit.before).sample, edit.reference))
            errors.append(edit.errors(network(**edit.after).sample))
    rule.remove()
    nothing = _mean([edit.errors(edit.reference) for edit in edits])
    return _mean(errors) | {f"nothing_{name}": value for name, value in nothing.items()} | {"same_input": same}


def curve(case: Case, network: Any, edits: Sequence[Edit]) -> list[dict[str, Any]]:
    """Mean errors and multiply-accumulates of all settings; where two make the same boxes, they are run once."""
    rows: dict[Any, list[dict[str, Any]]] = {}
    with apply_sparse_edit(network, SparseEditConfig(norm="incremental")) as handle:
        for edit in edits:
            with handle.record():
                network(**edit.before)
            known: dict[Any, dict[str, Any]] = {}
            for config in settings(case):
                boxes = _boxes(configured(handle, config), edit)
                key = (config.norm, boxes)
                if boxes and key not in known:
                    with flop_counter() as count:
                        result = sparse(handle, network, edit)
                    known[key] = edit.errors(result) | {"macs": count.get_total_flops() // 2}
                if boxes:
                    chosen_by = (config.margin, config.norm, config.dense_below)
                    rows.setdefault(chosen_by, []).append(known[key])
    names = ("margin", "norm", "dense_below")
    return [
        dict(zip(names, key, strict=True)) | _mean(found) for key, found in rows.items() if len(found) == len(edits)
    ]


def settings(case: Case) -> Iterator[SparseEditConfig]:
    """What is tried."""
    for norm in NORMS:
        for below in case.dense_below:
            for margin in case.margins:
                yield SparseEditConfig(margin=margin, norm=norm, dense_below=below)


def configured(handle: Handle, config: SparseEditConfig) -> Handle:
    """The same handle with other settings; what was recorded with norm="incremental" serves all."""
    handle.engine.config = config
    return handle


def sparse(handle: Handle, network: Any, edit: Edit) -> Tensor:
    """The edit's result; the reference stays."""
    with handle.edit(edit.picture):
        result = network(**edit.after).sample
    handle.reject()
    return result


def chosen(rows: list[dict[str, Any]], limit: dict[str, float], where: str) -> dict[str, Any] | None:
    """The cheapest setting whose error is at most SIGE's, there."""
    good = [row for row in rows if row[where] <= limit[where]]
    return min(good, key=lambda row: row["macs"], default=None)


def times(
    case: Case,
    network: Any,
    edits: dict[float, list[Edit]],
    rows: list[dict[str, Any]],
    rounds: int,
    threads: int,
) -> list[dict[str, Any]]:
    """Dense, recording and sparse forwards by turns: the seconds of each."""
    torch.set_num_threads(threads)
    found = []
    for row in rows:
        for where, choice in row["chosen"].items():
            if choice is None:
                continue
            config = SparseEditConfig(**{name: choice[name] for name in ("margin", "norm", "dense_below")})
            for batch in case.batches:
                edit = edits[row["share"]][0].repeated(batch)
                found.append(
                    {"share": row["share"], "where": where, "batch": batch} | turns(network, edit, config, rounds)
                )
                print(
                    threads, *list(found[-1].values())[:3], found[-1]["cpu_ratio"], found[-1]["wall_ratio"], flush=True
                )
    return found


def turns(network: Any, edit: Edit, config: SparseEditConfig, rounds: int) -> dict[str, Any]:
    """One setting; the first round is not counted. Ratios are medians over rounds of dense / sparse."""
    seconds: dict[str, list[tuple[float, float]]] = {"dense": [], "record": [], "sparse": []}
    with apply_sparse_edit(network, config) as handle:

        def record() -> None:
            with handle.record():
                network(**edit.before)

        calls = {
            "dense": lambda: network(**edit.after),
            "record": record,
            "sparse": lambda: sparse(handle, network, edit),
        }
        for i in range(rounds + 1):
            for name, call in calls.items():
                begin = time.perf_counter(), time.process_time()
                call()
                spent = time.perf_counter() - begin[0], time.process_time() - begin[1]
                if i:
                    seconds[name].append(spent)
    found: dict[str, Any] = {}
    for k, clock in enumerate(("wall", "cpu")):
        of = {name: [pair[k] for pair in pairs] for name, pairs in seconds.items()}
        found |= {f"{clock}_{name}": round(median(values), 4) for name, values in of.items()}
        ratios = [a / b for a, b in zip(of["dense"], of["sparse"], strict=True)]
        found |= {f"{clock}_ratio": round(median(ratios), 3)}
        found |= {f"{clock}_ratio_of_minima": round(min(of["dense"]) / min(of["sparse"]), 3)}
    return found


def memory(case: Case, network: Any, edit: Edit) -> list[dict[str, Any]]:
    """What one recorded call takes, and the error with it, at the default margin."""
    found = []
    for dtype in (torch.float32, torch.float16):
        for norm in NORMS:
            config = SparseEditConfig(cache_dtype=dtype, norm=norm, margin=case.margins[len(case.margins) // 2])
            with apply_sparse_edit(network, config) as handle:
                with handle.record():
                    network(**edit.before)
                taken, name = handle.engine.cache.bytes(), str(dtype).removeprefix("torch.")
                errors = edit.errors(sparse(handle, network, edit))
                found.append({"dtype": name, "norm": config.norm, "bytes": taken, "margin": config.margin} | errors)
    return found


def break_even(case: Case, network: Any, rounds: int) -> list[dict[str, Any]]:
    """Large edits without a margin, on one thread: how much longer the dense network takes."""
    torch.set_num_threads(1)
    config = SparseEditConfig(margin=0, dense_above=1.0)
    found = []
    for share in (0.4, 0.5, 0.6, 0.7, 0.8):
        spent = turns(network, Edit(case, network, share, PLACES[1]), config, max(1, rounds // 2))
        found.append({"share": share, "cpu_ratio": spent["cpu_ratio"], "wall_ratio": spent["wall_ratio"]})
    return found


def _boxes(handle: Handle, edit: Edit) -> tuple[Any, ...]:
    """Of all levels; none if the edit runs dense."""
    region = handle.region(edit.picture)
    size = region.size[0]
    levels = [region.boxes(size >> i, size >> i) for i in range(size.bit_length())]
    return () if region.dense else tuple(levels)


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {name: float(f"{sum(row[name] for row in rows) / len(rows):.4g}") for name in rows[0]}


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


if __name__ == "__main__":
    main()
