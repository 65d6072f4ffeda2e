"""How pictures get to the size that a network sees. The filter is part of what FID measures.

A protocol is a function uint8 (N, 3, H, W), size -> float32 (N, 3, size, size) in [0, 255], on the device of the
pictures. Each follows one program exactly, so that its numbers can be compared with that program's:

- `clean`: clean-fid "clean" and, by it, most FIDs since 2022. Bicubic with antialiasing in float32, clipped to
  [0, 255], not rounded. Computed in float64, where it agrees with Pillow (mode F, float64 weights) to 2e-5 grey
  levels; `F.interpolate` in float32 is off by up to 1e-2 on noise.
- `legacy_pytorch`: pytorch-fid, clean-fid "legacy_pytorch". Bilinear without antialiasing, half-pixel centres.
- `legacy_tensorflow`: the first FID (TTUR), torch-fidelity, EDM. TensorFlow 1's bilinear: pixel i of the output lies
  at i * H / size of the input, which shifts the picture, and without antialiasing.
- `torchmetrics`: torchmetrics >= 1.8. Bilinear with antialiasing.
- `clip`: open_clip and OpenAI's CLIP. Pillow bicubic on bytes, shortest side to `size`, then the centre is cut out.
- `cmmd`: google-research's CMMD. The centre square is cut out, then Pillow bicubic on bytes.
- `dinov2`: dgm-eval. Pillow bicubic on bytes, both sides to `size` whatever the aspect ratio.

In all of them a picture that is `size` x `size` already stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def resize(pictures: Tensor, size: int, protocol: str) -> Tensor:
    """Pictures as a network of that protocol sees them: uint8 (N, 3, H, W) -> float32 (N, 3, size, size) in [0, 255].

    Raises:
        ValueError: if the protocol is not in `RESIZE`, or the pictures are no uint8 (N, 3, H, W).
    """
    if protocol not in RESIZE:
        raise ValueError(f"no resize protocol is named {protocol!r}; there are {', '.join(RESIZE)}")
    if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(f"pictures must be uint8 (N, 3, H, W), not {pictures.dtype} {tuple(pictures.shape)}")
    if pictures.shape[2:] == (size, size):
        return pictures.float()
    return RESIZE[protocol](pictures, size)


def _clean(pictures: Tensor, size: int) -> Tensor:
    place = torch.device("cpu") if pictures.device.type == "mps" else pictures.device  # MPS has no float64
    resized = torch.empty(len(pictures), 3, size, size, device=place)
    for i, picture in enumerate(pictures.to(place)):  # one at a time: float64 is eight times the bytes
        wide = F.interpolate(picture[None].double(), (size, size), mode="bicubic", antialias=True)
        resized[i] = wide[0].clamp_(0, 255)  # bicubic overshoots at edges
    return resized.to(pictures.device)


def _legacy_pytorch(pictures: Tensor, size: int) -> Tensor:
    return F.interpolate(pictures.float(), (size, size), mode="bilinear")


def _torchmetrics(pictures: Tensor, size: int) -> Tensor:
    return F.interpolate(pictures.float(), (size, size), mode="bilinear", antialias=True)


def _legacy_tensorflow(pictures: Tensor, size: int) -> Tensor:
    """TensorFlow 1 `resize_bilinear(align_corners=False)`: across, then down."""
    return _tf1_lerp(_tf1_lerp(pictures.float(), size, 3), size, 2)


def _tf1_lerp(pictures: Tensor, size: int, dim: int) -> Tensor:
    old = pictures.shape[dim]
    # TensorFlow multiplies in float32; in float64 some places would fall to the other side of a whole pixel.
    place = torch.arange(size, dtype=torch.float32, device=pictures.device) * torch.tensor(old / size)
    low = place.long()
    share = (place - low).view([-1 if i == dim else 1 for i in range(4)])
    before, after = (pictures.index_select(dim, i) for i in (low, (low + 1).clamp(max=old - 1)))
    return before + (after - before) * share


def _clip(picture: Image.Image, size: int) -> Image.Image:
    """`Resize(size)` of torchvision (the long side is rounded down) and its `CenterCrop(size)`."""
    short = min(picture.size)
    width, height = (size if side == short else int(size * side / short) for side in picture.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    # Pillow leaves a picture alone that has the size already, as torchvision does.
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return picture.crop((left, top, left + size, top + size))


def _cmmd(picture: Image.Image, size: int) -> Image.Image:
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def _squash(picture: Image.Image, size: int) -> Image.Image:
    return picture.resize((size, size), Image.Resampling.BICUBIC)


def _with_pillow(function: Callable[[Image.Image, int], Image.Image]) -> Callable[[Tensor, int], Tensor]:
    """Protocols that are defined by Pillow's arithmetic on bytes: no batched resize gives the same bytes."""

    def resized(pictures: Tensor, size: int) -> Tensor:
        images = (Image.fromarray(picture) for picture in pictures.permute(0, 2, 3, 1).contiguous().cpu().numpy())
        array = np.stack([np.asarray(function(image, size)) for image in images])
        return torch.from_numpy(array).to(pictures.device).permute(0, 3, 1, 2).float().contiguous()

    return resized


RESIZE: dict[str, Callable[[Tensor, int], Tensor]] = {
    "clean": _clean,
    "legacy_pytorch": _legacy_pytorch,
    "legacy_tensorflow": _legacy_tensorflow,
    "torchmetrics": _torchmetrics,
    "clip": _with_pillow(_clip),
    "cmmd": _with_pillow(_cmmd),
    "dinov2": _with_pillow(_squash),
}
