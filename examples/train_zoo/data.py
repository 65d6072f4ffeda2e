"""The emoji pictures and their captions, as `prepare.py` wrote them, and the augmentation of the pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from presets import Preset
from torch.nn import functional

SIZE = 64
_LARGEST_SHIFT = 0.12
_ZOOM = (0.95, 1.25)
_UNCHANGED = 0.35


@dataclass
class Emoji:
    """Pictures and captions.

    Attributes:
        images: uint8, (N, 3, 64, 64), on white.
        captions: For each picture the captions it is trained with; the first is the plain "NAME, STYLE style".
    """

    images: torch.Tensor
    captions: list[list[str]]

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.images)

    def pictures(self, index: torch.Tensor | slice) -> torch.Tensor:
        """The chosen pictures as they are, float32 in [-1, 1], (n, 3, 64, 64)."""
        return self.images[index].float() / 127.5 - 1

    def to(self, device: torch.device) -> Emoji:
        """The same data with the pictures on `device`."""
        return Emoji(self.images.to(device), self.captions)


def _captions(names: list[str], style: str, group: str, tone: str) -> list[str]:
    """Captions of one picture: name or alias, with or without style and group; the styled name is twice as likely."""
    out = []
    for name in names[:3]:
        full = f"{name} {tone}".strip()
        styled = f"{full}, {style} style"
        out += [styled, styled, full, f"an emoji of {styled}", f"{full}, {group}, {style} style"]
    return out


def load_emoji(folder: Path, preset: Preset) -> Emoji:
    """Read `emoji64.npz` and `emoji_meta.json`; keep the preset's styles, and skin tones only if it wants them."""
    images = np.load(folder / "emoji64.npz")["x"]
    meta = json.loads((folder / "emoji_meta.json").read_text())
    keep_tones = preset.skin_tones
    keys = enumerate(meta["keys"])
    kept = [i for i, (style, _, tone) in keys if style in preset.styles and (keep_tones or not tone)]
    captions = [_captions(meta["captions"][i], *meta["keys"][i]) for i in kept]
    return Emoji(torch.from_numpy(images[kept]).permute(0, 3, 1, 2).contiguous(), captions)


def synthetic_emoji(count: int = 8) -> Emoji:
    """Random pictures with captions of their own, for dry runs."""
    images = torch.randint(256, (count, 3, SIZE, SIZE), dtype=torch.uint8)
    return Emoji(images, [_captions([f"thing number {i}"], "random", "test", "") for i in range(count)])


def augment(pictures: torch.Tensor) -> torch.Tensor:
    """Shift and zoom at random on white; about a third stays as it is. (n, 3, 64, 64) in [-1, 1], as the result."""
    count, device = len(pictures), pictures.device
    zoom = torch.empty(count, device=device).uniform_(*_ZOOM)
    shift = torch.empty(count, 2, device=device).uniform_(-_LARGEST_SHIFT, _LARGEST_SHIFT)
    same = torch.rand(count, device=device) < _UNCHANGED
    transform = torch.zeros(count, 2, 3, device=device)
    transform[:, 0, 0] = transform[:, 1, 1] = torch.where(same, 1.0, zoom)
    transform[:, :, 2] = torch.where(same[:, None], 0.0, shift)
    grid = functional.affine_grid(transform, list(pictures.shape), align_corners=False)
    # White is moved to 0, which is what grid_sample pads with.
    return functional.grid_sample(pictures - 1, grid, align_corners=False).clamp(-2, 0) + 1
