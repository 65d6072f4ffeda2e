"""DINOv2 features, for the Frechet distance that follows people's judgement best (Stein et al., NeurIPS 2023)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffaccel.eval.errors import DataError, MissingWeights
from diffaccel.eval.networks.extractor import Extractor
from diffaccel.eval.networks.weights import sha256_of

SIZE = 224  # dgm-eval's; the published networks were last trained at 518
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def dinov2(folder: str | os.PathLike[str], device: str = "cpu") -> Extractor:
    """The class token of a `Dinov2Model` of transformers, after the last norm; FD-DINOv2 takes ViT-L/14's, 1024 wide.

    Args:
        folder: with `config.json` and `model.safetensors`, such as a copy of facebook/dinov2-large.
        device: where to run.

    Raises:
        MissingWeights: if the folder lacks a file.
        DataError: if it holds another model, such as the one with registers.
    """
    from transformers import Dinov2Model

    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise MissingWeights(
                f"{folder} lacks {name}; put a copy of https://huggingface.co/facebook/dinov2-large (Apache-2.0) there"
            )
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind != "dinov2":
        raise DataError(f"{folder} holds a model of type {kind!r}; FD-DINOv2 is defined with 'dinov2'")
    net: Any = Dinov2Model.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
    _place_patches(net.embeddings, SIZE // net.config.patch_size)
    net = net.eval().requires_grad_(False).to(device)
    center, scale = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))

    def network(pixels: Tensor) -> dict[str, Tensor]:
        return {"features": net(pixel_values=(pixels / 255 - center) / scale).last_hidden_state[:, 0]}

    name = f"dinov2/{folder.resolve().name}"
    return Extractor(name, net.config.hidden_size, SIZE, "dinov2", sha256_of(folder / "model.safetensors"), network,
                     device=device)  # fmt: skip


def _place_patches(embeddings: Any, side: int) -> None:
    """Bring the position embeddings to side x side patches as Meta's program does; transformers does it otherwise.

    Meta's adds 0.1 to the side before it takes the scale, against a rounding error of old, and the places of the
    patches follow that scale: published features have it, and so have the distances made from them.
    """
    table = embeddings.position_embeddings
    old = round((table.shape[1] - 1) ** 0.5)
    if old == side:
        return
    grid = table.detach()[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    placed = F.interpolate(grid, scale_factor=(side + 0.1) / old, mode="bicubic").permute(0, 2, 3, 1)
    assert placed.shape[1] == side
    embeddings.position_embeddings = nn.Parameter(torch.cat([table.detach()[:, :1], placed.flatten(1, 2)], dim=1))
