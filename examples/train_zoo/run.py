"""What every job is told: where data and results are, how long it may take, and on what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fit import FitConfig
from presets import Preset

SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class Run:
    """The command line of one job.

    Attributes:
        data: Folder that `prepare.py` wrote, or `synthetic` for random data made in memory.
        output: Folder of the results; checkpoints lie in its `checkpoints`.
        seconds: Wall-clock budget of the whole job.
        preset: Sizes and batches.
        device: Where to train.
        init: Output folder of an earlier run, whose weights this one starts from.
        resume: Go on from the newest checkpoint in `output`.
        steps: Optional step budget of each stage.
        save_every: Seconds between checkpoints.
    """

    data: str
    output: Path
    seconds: float
    preset: Preset
    device: torch.device
    init: Path | None = None
    resume: bool = False
    steps: int | None = None
    save_every: float = 180.0

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints go."""
        return self.output / "checkpoints"

    def started_from(self, folder: str) -> Path | None:
        """The folder of a model in the earlier run, if this run starts from one."""
        return self.init / folder if self.init else None

    def fit_config(self, name: str, learning_rate: float, seconds: float, **settings: Any) -> FitConfig:
        """The training settings of one stage; `settings` are further fields of `FitConfig`."""
        return FitConfig(
            name=name,
            learning_rate=learning_rate,
            seconds=seconds,
            steps=self.steps,
            mixed_precision=self.preset.mixed_precision,
            compile=self.preset.compile,
            save_every=self.save_every,
            **settings,
        )
