"""Toy transformers of every class of the token executor, what they take, and their outputs token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffaccel.kernels import SparseEditConfig, apply_sparse_edit
from tests.pruning.toys import toy

NAMES = ("dit", "pixart", "sd3", "sd35", "flux")
JOINT = ("sd3", "sd35", "flux")
# Nothing but one attention looks beyond a token; Flux has blocks of two kinds.
SHALLOW = ("dit", "pixart", "sd3", "sd35", "flux double", "flux single")
PROMPT = 5


def grid(name: str) -> tuple[int, int]:
    """Rows and columns of tokens; DiT itself knows square pictures only."""
    return (8, 8) if name == "dit" else (8, 6)


def shallow(name: str) -> Any:
    """A network with one block."""
    network = toy(name.split()[0])
    network.transformer_blocks = network.transformer_blocks[: int(name != "flux single")]
    if "flux" in name:
        network.single_transformer_blocks = network.single_transformer_blocks[: int(name == "flux single")]
    return network


def inputs(name: str, batch: int = 2, seed: int = 0, prompt: int = 0, size: tuple[int, int] | None = None) -> Any:
    """What the network takes: `seed` of the picture, `prompt` of what is asked for, equal in all rows but for noise."""
    rows, columns = size or grid(name)
    patch = patch_size(name)
    x = noise(batch, 4, rows * patch, columns * patch, seed=seed)
    text, pooled = noise(batch, PROMPT, 8, seed=100 + prompt), noise(batch, 8, seed=200 + prompt)
    if name == "dit":
        labels = torch.arange(batch) + prompt
        return {"hidden_states": x, "timestep": torch.full((batch,), 500), "class_labels": labels}
    call = {"hidden_states": x, "timestep": torch.full((batch,), 0.5), "encoder_hidden_states": text}
    if name == "pixart":
        mask = torch.ones(batch, PROMPT)
        mask[:, -1] = 0
        return call | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "encoder_attention_mask": mask}
    if "flux" in name:
        x = noise(batch, rows * columns, 16, seed=seed)
        call |= {"hidden_states": x, "img_ids": img_ids(rows, columns), "txt_ids": torch.zeros(PROMPT, 3)}
    return call | {"pooled_projections": pooled}


def img_ids(rows: int, columns: int, number: float = 0.0) -> Tensor:
    """Positions as Flux's pipelines make them."""
    return torch.cartesian_prod(torch.tensor([number]), torch.arange(float(rows)), torch.arange(float(columns)))


def patch_size(name: str) -> int:
    return 2 if name in ("dit", "pixart") else 1


@torch.no_grad()
def call(network: Any, given: dict[str, Any], **more: Any) -> Tensor:
    return network(**given, **more).sample


def mask(name: str, top: int = 1, left: int = 1) -> np.ndarray:
    """Two tokens, one above the other."""
    cells = np.zeros(grid(name), dtype=bool)
    cells[top : top + 2, left] = True
    return cells


def by_token(name: str, output: Tensor) -> Tensor:
    """(B, rows, columns, whatever is in a token)."""
    rows, columns = grid(name)
    if output.ndim == 3:
        return output.unflatten(1, (rows, columns))
    size = patch_size(name)
    return output.unflatten(2, (rows, size)).unflatten(4, (columns, size)).permute(0, 2, 4, 1, 3, 5).flatten(3)


def changed(name: str, given: dict[str, Any], cells: Any, seed: int = 9) -> dict[str, Any]:
    """The same with other noise in the cells, (rows, columns) or one for each row of the batch."""
    x, patch = given["hidden_states"], patch_size(name)
    inside = torch.as_tensor(cells).expand(len(x), *grid(name))
    if x.ndim == 3:
        inside = inside.flatten(1)[..., None]
    else:
        inside = inside.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
    return given | {"hidden_states": torch.where(inside, noise(*x.shape, seed=seed), x)}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def recorded(network: Any, given: dict[str, Any], **config: Any) -> tuple[Any, Tensor]:
    """A handle on the network, and what it gave."""
    handle = apply_sparse_edit(network, SparseEditConfig(**{"margin": 1, "dense_above": 0.9} | config))
    with handle.record():
        reference = call(network, given)
    return handle, reference


def edited(handle: Any, cells: Any, given: dict[str, Any], **more: Any) -> Tensor:
    """What a sparse call gives."""
    with handle.edit(cells) as region:
        assert not region.dense
        return call(handle.network, given, **more)


def active(handle: Any, name: str, masks: Any) -> Tensor:
    """The recomputed tokens, bool, (masks, rows, columns)."""
    tokens = handle.region(masks).active
    rows, columns = grid(name)
    cells = torch.zeros(len(tokens), rows * columns, dtype=torch.bool)
    return cells.scatter(1, tokens, True).unflatten(1, (rows, columns))
