"""norm="last": the exact update for `conv_norm_out` alone, at the price of one map."""

import numpy as np
import torch

from diffaccel import zoo
from diffaccel.kernels import SparseEditConfig, apply_sparse_edit

MASK = np.zeros((16, 16), bool)
MASK[4:9, 5:11] = True


@torch.no_grad()
def made(norm: str) -> tuple[set[str], set[str]]:
    """Names of the kept features, and of the statistics that an edit updates."""
    unet = zoo.load("emoji-sd").unet
    noise = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 4, 16, 16, generator=noise), torch.randn(1, 24, 128, generator=noise)
    other = x + torch.from_numpy(MASK) * torch.randn(1, 4, 16, 16, generator=noise)
    with apply_sparse_edit(unet, SparseEditConfig(margin=2, norm=norm, dense_above=1.0)) as handle:
        with handle.record():
            unet(x, torch.tensor(500), text)
        names = set(handle.engine.cache[0])
        with handle.edit(MASK):
            unet(other, torch.tensor(500), text)
        updated = {name for name in handle.engine.cache[0].pending if name.endswith(".mean")}
    return names, updated


def test_it_keeps_one_map_more_and_updates_one_norm():
    names, updated = made("last")
    without, none = made("cached")
    assert names - without == {"conv_norm_out"}
    assert updated == {"conv_norm_out.mean"}
    assert not none
    assert len(made("incremental")[1]) > 10


def test_it_is_the_default_of_recorded_references():
    assert SparseEditConfig().statistics == "last"
    assert SparseEditConfig(reference="self").statistics == "corrected"
