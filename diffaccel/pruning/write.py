"""Writing a pruned checkpoint: a folder that appears whole, after it was opened again and gave the same outputs."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from diffaccel.pictures import save_text
from diffaccel.pruning.checkpoint import Checkpoint, load_model
from diffaccel.pruning.gates import Fill
from diffaccel.pruning.inputs import example_inputs
from diffaccel.pruning.plan import FILE, PruningPlan
from diffaccel.pruning.stored import read_json
from diffaccel.pruning.surgery import mask

WEIGHTS = {".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb"}
PROBE_SIDE = 16  # latents of the comparison; less where the network is made for less, more for deep U-Nets
# Relative difference between the cut and the masked network: rounding only. They sum in another order.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Check:
    """What the comparison of outputs before and after saving found.

    Attributes:
        reload: largest relative difference (norms) of the network read from the disk to the one in memory.
        mask: the same to the original network with a mask; None if the original was not at hand.
        stock: whether the folder opens without diffaccel.
    """

    reload: float
    mask: float | None
    stock: bool


def check_output(target: Path, source: Path | None = None) -> Path:
    """Full path of a folder to write; what can be known before the work begins.

    Raises:
        ValueError: if there is something already, other than an empty folder, it lies inside of `source`, or nothing
            can be written there.
    """
    target = target.resolve()
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"{target} exists and is not empty; choose a new folder")
    if source is not None and target.is_relative_to(source.resolve()):
        raise ValueError(f"{target} lies inside of the checkpoint {source}; choose a folder elsewhere")
    there = next(folder for folder in target.parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"cannot write into {there}; choose a folder elsewhere")
    return target


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, that takes the place of `target` when the block ends well and is gone if it does not.

    A process that is killed leaves a hidden folder `.NAME.xxxxxxxx` beside `target`, which may be deleted.

    Raises:
        ValueError: if there is something at `target` already, other than an empty folder.
    """
    target = check_output(target)
    missing = [folder for folder in target.parents if not folder.exists()]
    scratch = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        (scratch / "new").mkdir()
        yield scratch / "new"
        if target.is_dir():
            target.rmdir()
        (scratch / "new").rename(target)
    except SafetensorError as error:  # no OSError: a full disk, most of the time
        raise OSError(f"writing {target} failed: {error}; nothing was left there") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        for folder in missing if not target.exists() else ():
            with suppress(OSError):  # never made, or another process has put something there by now
                folder.rmdir()


def write_checkpoint(
    checkpoint: Checkpoint,
    model: nn.Module,
    plan: PruningPlan,
    output: str | Path,
    *,
    masked: Tensor | None = None,
    extra: Callable[[Path, Check], None] | None = None,
    max_shard_size: str = "10GB",
) -> Check:
    """Write `model` as the denoiser of a copy of `checkpoint`, with its plan, open it again and compare.

    The other parts of a pipeline are copied file by file; what else lies beside them (the pipeline once more as a
    single file, say) is not, and pickled weights only where there are no others. Weights are stored in the type they
    had.

    Args:
        checkpoint: what was pruned.
        model: what `cut` returned.
        plan: goes beside its `config.json` as `pruning_plan.json`; plans of earlier prunings stay, with numbers.
        output: a folder that does not exist yet, or is empty.
        masked: `probe` of the original with the mask of the plan; with it the comparison covers the cut as well.
        extra: writes further files (a report) into the folder before it appears.
        max_shard_size: larger models are saved in several files.

    Raises:
        ValueError: if `output` is not empty or lies inside of the checkpoint, or if the outputs differ (then nothing is
            written).
        OSError: if the disk is full (then nothing is written either).
    """
    with new_folder(check_output(Path(output), checkpoint.folder)) as folder:
        inside = folder / checkpoint.component
        if checkpoint.component:
            _copy_others(checkpoint, folder)
        limit = TOLERANCE[next(model.parameters()).dtype]
        off_mask = None if masked is None else _difference(probe(model), masked)
        stored: Any = _cast(model, checkpoint.dtype)
        stored.save_pretrained(inside, max_shard_size=max_shard_size, variant=checkpoint.variant)
        plan.save(inside)
        _mark_card(folder, plan)
        _keep_plans(checkpoint.model_folder, inside)
        _readable(inside)
        if checkpoint.component:
            _name_class(folder, checkpoint.component, stored)
        check = _compare(inside, checkpoint, stored, off_mask, limit)
        if extra:
            extra(folder, check)
    return check


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network in another type; a copy, for the one that is given may be in use."""
    if next(model.parameters()).dtype == dtype:
        return model
    return nn.Module.to(copy.deepcopy(model), dtype)  # Diffusers' own `to` warns of modules that none of these has


def _copy_others(checkpoint: Checkpoint, folder: Path) -> None:
    """Components of the pipeline but the denoiser, and small files beside them (the card, the license)."""
    parts = read_json(checkpoint.folder / "model_index.json").keys() - {checkpoint.component}
    for entry in checkpoint.folder.iterdir():
        if entry.is_dir() and entry.name in parts:
            _copy(entry, folder / entry.name)
        elif entry.is_file() and entry.suffix not in WEIGHTS and not entry.name.startswith("."):
            shutil.copyfile(entry, folder / entry.name)


def _copy(source: Path, target: Path) -> None:
    """A folder with the permissions that new files have here: a checkpoint may be read-only, the copy is the user's."""
    target.mkdir()
    entries = list(source.iterdir())
    safe = any(entry.suffix == ".safetensors" for entry in entries)
    for entry in entries:
        if entry.is_dir():
            _copy(entry, target / entry.name)
        elif not (safe and entry.suffix in WEIGHTS - {".safetensors"}):
            shutil.copyfile(entry, target / entry.name)


def _keep_plans(source: Path, folder: Path) -> None:
    """Plans of earlier prunings as `pruning_plan.1.json`, ...: a LoRA of the original needs one after the other."""
    count = 1
    while (earlier := source / f"pruning_plan.{count}.json").is_file():
        shutil.copyfile(earlier, folder / earlier.name)
        count += 1
    if (source / FILE).is_file():
        shutil.copyfile(source / FILE, folder / f"pruning_plan.{count}.json")


def _mark_card(folder: Path, plan: PruningPlan) -> None:
    """Say in the model card, which is that of the original, that this is not the original."""
    card = folder / "README.md"
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    end = text.find("\n---", 3) + 4 if text.startswith("---") else 0  # behind the metadata
    share = f" to {plan.facts['target']:.0%} of its {plan.facts['cost']}" if "target" in plan.facts else ""
    note = (
        f"> Pruned by diffaccel{share}. What follows is the card of the original; its numbers are not of this model.\n"
    )
    save_text(f"{text[:end]}\n\n{note}\n{text[end:].lstrip()}".lstrip("\n"), card)


def _readable(folder: Path) -> None:
    """Give files the permissions that new files have here: safetensors writes for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~umask)


def _name_class(folder: Path, component: str, model: nn.Module) -> None:
    index = read_json(folder / "model_index.json")
    library = "diffusers" if _is_stock(model) else "diffaccel"
    index[component] = [library, type(model).__name__]
    save_text(json.dumps(index, indent=2) + "\n", folder / "model_index.json")


def _is_stock(model: nn.Module) -> bool:
    return not hasattr(type(model), "stock")


def _compare(folder: Path, checkpoint: Checkpoint, model: Any, off_mask: float | None, allowed: float) -> Check:
    expected = probe(model)
    if not expected.isfinite().all():
        raise ValueError(f"the pruned network returns NaN or infinity in {checkpoint.dtype}; nothing was written")
    again: Any = load_model(folder, dtype=checkpoint.dtype, variant=checkpoint.variant)
    off_disk = _difference(probe(again.to(model.device)), expected)
    # Read again, weights lie elsewhere in memory and kernels may round otherwise: hardly more than one rounding.
    for what, off, limit in (
        ("masked original", off_mask or 0.0, allowed),
        ("saved one", off_disk, TOLERANCE[model.dtype]),
    ):
        if not off <= limit:
            raise ValueError(
                f"the pruned network differs from the {what} by {off:.1e} (allowed {limit:.0e}); nothing was written, "
                "please report it"
            )
    return Check(off_disk, off_mask, _is_stock(model))


@torch.no_grad()
def probe(model: Any) -> Tensor:
    """Output of a network for small random inputs, always the same ones; float32."""
    side = getattr(model.config, "sample_size", None)
    least = max(PROBE_SIDE, 2 ** (len(getattr(model, "down_blocks", ())) - 1))  # every stage of a U-Net halves
    inputs = example_inputs(model, size=min(side, least) if isinstance(side, int) else least)
    training = model.training
    output = model.eval()(**inputs, return_dict=False)[0].float()
    model.train(training)
    return output


def probe_masked(model: nn.Module, plan: PruningPlan, fill: Fill | None = None) -> Tensor:
    """`probe` with the mask of a plan: what the cut network has to return."""
    with mask(model, plan, fill):
        return probe(model)


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.to(b.device) - b).norm() / b.norm().clamp_min(1e-30))
