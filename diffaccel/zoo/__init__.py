"""Small trained models that travel inside the package; each folder has a card (README.md)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
NAMES = ("emoji-sd", "emoji-clip", "emoji-oms", "emoji-sd-small")


def path(name: str) -> Path:
    """Folder of a zoo model; raises `ValueError` with the names there are."""
    if name not in NAMES:
        raise ValueError(f"unknown zoo model {name!r}; use {' or '.join(NAMES)}")
    return FOLDER / name


def load(name: str, **kwargs: Any) -> Any:
    """Load a zoo model, in float32 unless `dtype` says otherwise.

    `emoji-sd` is a plain `StableDiffusionPipeline` (64 x 64 pictures), `emoji-clip` a pair (`CLIPModel`, processor),
    `emoji-oms` a `UNet2DConditionModel` for `diffaccel.starts.one_more_step` on `emoji-sd`, `emoji-sd-small` one that
    can stand in for the U-Net of `emoji-sd` (`diffaccel.stitch`).

    Args:
        name: one of `NAMES`.
        kwargs: passed to `from_pretrained`, such as `dtype=torch.float16`.
    """
    import torch

    folder = path(name)
    kwargs.setdefault("dtype", torch.float32)
    with quiet_loading():
        if name == "emoji-clip":
            from transformers import CLIPModel, CLIPProcessor

            return CLIPModel.from_pretrained(folder, **kwargs).eval(), CLIPProcessor.from_pretrained(folder)
        from diffusers import StableDiffusionPipeline, UNet2DConditionModel

        if name in ("emoji-oms", "emoji-sd-small"):
            return UNet2DConditionModel.from_pretrained(folder, **kwargs).eval()
        return StableDiffusionPipeline.from_pretrained(folder, **kwargs)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without the progress bars of Transformers and Diffusers: what is in the package is loaded in no time."""
    import diffusers
    import transformers

    loggers: tuple[Any, ...] = (transformers.utils.logging, diffusers.utils.logging)
    shown = [logger for logger in loggers if logger.is_progress_bar_enabled()]
    for logger in shown:
        logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger in shown:
            logger.enable_progress_bar()
