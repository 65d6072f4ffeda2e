"""The Inception-v3 of FID: the network of 2015-12-05, which is not torchvision's `inception_v3`.

It differs from the published Inception-v3 in its weights (1008 classes), in average pools that leave the padding out,
and in a max pool in the last block. Layers are named as in the state dict `pt_inception-2015-12-05-6726825d.pth` of
pytorch-fid and torch-fidelity. Batch norms are folded into the convolutions in float64: the features move by 1e-6 of
their size, and a CPU needs half the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH_NORM_EPS = 1e-3
FEATURES, LOGITS = 2048, 1008


class Inception(nn.Module):
    """float32 (N, 3, 299, 299), about -1 to 1 -> `features` (N, 2048), and `logits` and `spatial` if asked for.

    Attributes:
        has_logits: whether the weights came with the classifier; `logits` are then (N, 1008) *without bias*, which is
            what the Inception Score is computed from (Salimans et al. 2016; torch-fidelity's `logits_unbiased`).
        spatial: also give the first 7 maps of the 1x1 branch of `Mixed_6d`, flattened to (N, 2023): the features of
            sFID (Nash et al. 2021, arXiv:2103.03841; ADM's evaluator takes `mixed_6/conv`).
    """

    def __init__(self, *, has_logits: bool = False, spatial: bool = False) -> None:
        super().__init__()
        self.has_logits, self.spatial = has_logits, spatial
        self.Conv2d_1a_3x3 = _conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _conv(80, 192, 3)
        self.Mixed_5b = _block_a(192, 32)
        self.Mixed_5c = _block_a(256, 64)
        self.Mixed_5d = _block_a(288, 64)
        self.Mixed_6a = _block_b()
        self.Mixed_6b = _block_c(128)
        self.Mixed_6c = _block_c(160)
        self.Mixed_6d = _block_c(160)
        self.Mixed_6e = _block_c(192)
        self.Mixed_7a = _block_d()
        self.Mixed_7b = _block_e(1280, _average)
        self.Mixed_7c = _block_e(2048, lambda x: F.max_pool2d(x, 3, stride=1, padding=1))
        if has_logits:
            self.fc = nn.Linear(FEATURES, LOGITS, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """See the class."""
        for layer in (self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3):
            x = layer(x).relu_()
        x = F.max_pool2d(x, 3, stride=2)
        for layer in (self.Conv2d_3b_1x1, self.Conv2d_4a_3x3):
            x = layer(x).relu_()
        x = F.max_pool2d(x, 3, stride=2)
        for block in (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a, self.Mixed_6b, self.Mixed_6c):
            x = block(x)
        x = self.Mixed_6d(x)
        outputs = {"spatial": x[:, :7].flatten(1)} if self.spatial else {}  # the 1x1 branch comes first
        for block in (self.Mixed_6e, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c):
            x = block(x)
        outputs["features"] = x.mean((2, 3))
        if self.has_logits:
            outputs["logits"] = self.fc(outputs["features"])
        return outputs


class _Branches(nn.Module):
    """Branches side by side: a pool or none, then convolutions by name; "a+b" splits in two at the end."""

    def __init__(self, convs: Mapping[str, nn.Conv2d], branches: Sequence[tuple[Callable | None, list[str]]]) -> None:
        super().__init__()
        self.branches = branches
        for name, conv in convs.items():
            self.add_module(name, conv)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part for pool, names in self.branches for part in self._branch(x, pool, names)], 1)

    def _branch(self, x: Tensor, pool: Callable | None, names: list[str]) -> list[Tensor]:
        if pool is not None:
            x = pool(x)
        for name in names:
            if "+" in name:
                return [self.get_submodule(half)(x).relu_() for half in name.split("+")]
            x = self.get_submodule(name)(x).relu_()
        return [x]


def _conv(
    inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padding: int | str = 0
) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding)


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _shrink(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


def _block_a(inputs: int, pooled: int) -> _Branches:
    convs = {
        "branch1x1": _conv(inputs, 64, 1),
        "branch5x5_1": _conv(inputs, 48, 1),
        "branch5x5_2": _conv(48, 64, 5, padding=2),
        "branch3x3dbl_1": _conv(inputs, 64, 1),
        "branch3x3dbl_2": _conv(64, 96, 3, padding=1),
        "branch3x3dbl_3": _conv(96, 96, 3, padding=1),
        "branch_pool": _conv(inputs, pooled, 1),
    }
    triple = ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]
    rows = [(None, ["branch1x1"]), (None, ["branch5x5_1", "branch5x5_2"]), (None, triple), (_average, ["branch_pool"])]
    return _Branches(convs, rows)


def _block_b() -> _Branches:
    convs = {
        "branch3x3": _conv(288, 384, 3, stride=2),
        "branch3x3dbl_1": _conv(288, 64, 1),
        "branch3x3dbl_2": _conv(64, 96, 3, padding=1),
        "branch3x3dbl_3": _conv(96, 96, 3, stride=2),
    }
    triple = ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]
    return _Branches(convs, [(None, ["branch3x3"]), (None, triple), (_shrink, [])])


def _block_c(width: int) -> _Branches:
    flat, tall = (1, 7), (7, 1)
    convs = {"branch1x1": _conv(768, 192, 1), "branch7x7_1": _conv(768, width, 1)}
    convs["branch7x7_2"] = _conv(width, width, flat, padding="same")
    convs["branch7x7_3"] = _conv(width, 192, tall, padding="same")
    convs["branch7x7dbl_1"] = _conv(768, width, 1)
    for i, kernel in enumerate((tall, flat, tall, flat), start=2):
        convs[f"branch7x7dbl_{i}"] = _conv(width, 192 if i == 5 else width, kernel, padding="same")
    convs["branch_pool"] = _conv(768, 192, 1)
    rows = [(None, ["branch1x1"]), (None, [f"branch7x7_{i}" for i in (1, 2, 3)])]
    rows += [(None, [f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)]), (_average, ["branch_pool"])]
    return _Branches(convs, rows)


def _block_d() -> _Branches:
    convs = {
        "branch3x3_1": _conv(768, 192, 1),
        "branch3x3_2": _conv(192, 320, 3, stride=2),
        "branch7x7x3_1": _conv(768, 192, 1),
        "branch7x7x3_2": _conv(192, 192, (1, 7), padding="same"),
        "branch7x7x3_3": _conv(192, 192, (7, 1), padding="same"),
        "branch7x7x3_4": _conv(192, 192, 3, stride=2),
    }
    rows = [(None, ["branch3x3_1", "branch3x3_2"]), (None, [f"branch7x7x3_{i}" for i in (1, 2, 3, 4)]), (_shrink, [])]
    return _Branches(convs, rows)


def _block_e(inputs: int, pool: Callable[[Tensor], Tensor]) -> _Branches:
    flat, tall = (1, 3), (3, 1)
    convs = {
        "branch1x1": _conv(inputs, 320, 1),
        "branch3x3_1": _conv(inputs, 384, 1),
        "branch3x3_2a": _conv(384, 384, flat, padding="same"),
        "branch3x3_2b": _conv(384, 384, tall, padding="same"),
        "branch3x3dbl_1": _conv(inputs, 448, 1),
        "branch3x3dbl_2": _conv(448, 384, 3, padding=1),
        "branch3x3dbl_3a": _conv(384, 384, flat, padding="same"),
        "branch3x3dbl_3b": _conv(384, 384, tall, padding="same"),
        "branch_pool": _conv(inputs, 192, 1),
    }
    rows = [(None, ["branch1x1"]), (None, ["branch3x3_1", "branch3x3_2a+branch3x3_2b"])]
    rows += [(None, ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3a+branch3x3dbl_3b"]), (pool, ["branch_pool"])]
    return _Branches(convs, rows)
