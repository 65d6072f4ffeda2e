"""Checkpoints of a training run: complete or absent, and enough to go on from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn


class Checkpoint:
    """A folder of `step-N` folders, each complete: written under a temporary name, then renamed."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, which need not exist yet."""
        self.folder = folder

    def latest(self) -> Path | None:
        """The newest complete checkpoint, if there is one."""
        return max(self.folder.glob("step-*"), default=None)

    def save(self, step: int, model: nn.Module, average: nn.Module, state: dict[str, Any]) -> None:
        """Write a checkpoint and remove the ones before it."""
        partial = self.folder / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_contiguous(model), partial / "model.safetensors")
        save_file(_contiguous(average), partial / "ema.safetensors")
        torch.save({"step": step, **state}, partial / "state.pt")
        target = self.folder / f"step-{step:09d}"
        shutil.rmtree(target, ignore_errors=True)  # a finished run that is resumed saves the same step again
        os.replace(partial, target)
        for old in self.folder.glob("step-*"):
            if old != target:
                shutil.rmtree(old)

    def load(self, model: nn.Module, average: nn.Module) -> dict[str, Any] | None:
        """Load the newest weights into both models and return the rest of the state; None when there is nothing."""
        folder = self.latest()
        if folder is None:
            return None
        model.load_state_dict(load_file(folder / "model.safetensors"))
        average.load_state_dict(load_file(folder / "ema.safetensors"))
        return torch.load(folder / "state.pt", weights_only=True, map_location="cpu")


def _contiguous(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights in the layout that safetensors demands (in training they are channels-last)."""
    return {name: value.contiguous() for name, value in model.state_dict().items()}


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of the global generators that a run on `device` draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Undo the draws since `random_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
