"""Sources that several tests prune."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file

import diffaccel
from tests import tiny
from tests.pruning.sources import PIPELINES, original_layout
from tests.pruning.toys import toy


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all sources; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("sources")
    for name in PIPELINES:
        getattr(tiny, name)()[0].save_pretrained(folder / name)
    diffusers.DDPMPipeline(toy("unconditional"), diffusers.DDPMScheduler()).save_pretrained(folder / "ddpm")
    toy("sd15").save_pretrained(folder / "model")
    (folder / "texts.txt").write_text("a red heart\n\na blue book\n")
    (folder / "classes.txt").write_text("3\n")
    (folder / "empty.txt").write_text("\n \n")
    pipe = diffaccel.zoo.load("emoji-sd", dtype=torch.float16)
    save_file(original_layout(pipe), folder / "original.safetensors")
    return folder
