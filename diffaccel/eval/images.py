"""Reading pictures strictly: whatever would quietly change a score is an error that names the file."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from diffaccel.eval.errors import DataError
from diffaccel.eval.fidelity import RANGE_TOLERANCE

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MOST_BAD = 0.01  # share of damaged files that may be skipped
LISTED = 20  # damaged files named in a message

Alpha = Literal["white", "black"]


def list_pictures(folder: str | os.PathLike[str]) -> list[Path]:
    """Picture files in a folder and all folders below it (links are followed), `2.png` before `10.png`.

    Hidden files and folders (`.name`) and temporary ones (`name.tmp`, `name.part`) are left out.

    Raises:
        DataError: if there is no such folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give one with pictures in it")
    found: list[Path] = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not _passing(name)]
        found += [Path(parent, name) for name in names if not _passing(name) and name.lower().endswith(EXTENSIONS)]
    if not found:
        raise DataError(f"no pictures in {folder}: looked for {', '.join(EXTENSIONS)}, in folders below it too")
    return sorted(found, key=lambda path: _natural(path.relative_to(folder).as_posix()))


def _passing(name: str) -> bool:
    return name.startswith(".") or name.endswith((".tmp", ".part"))


def _natural(name: str) -> tuple[list[str | int], str]:
    parts = re.split(r"([0-9]+)", name)  # text and digits in turn, so that like is compared with like
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def read_picture(path: str | os.PathLike[str], alpha: Alpha | None = None) -> Tensor:
    """A picture file as bytes: uint8 (3, H, W), RGB, turned as its EXIF orientation says.

    Grey, palette, CMYK and YCbCr pictures become RGB; ICC profiles are ignored, as by every FID program. 16-bit grey
    becomes round(v / 257): Pillow's own conversion clips it to white. Of 16-bit RGB, Pillow gives the high byte.
    Transparency that shows is an error unless `alpha` says what lies behind; a channel that is opaque everywhere is
    dropped.

    Raises:
        DataError: if the file cannot be read whole (truncated, empty, checksum, unknown format), has transparency,
            several frames, or values of unknown range (32-bit integers, floats).
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise DataError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, so that damaged pictures would pass; set it to False"
        )
    try:
        data = Path(path).read_bytes()
        with Image.open(BytesIO(data)) as image:
            image.verify()  # checksums, which loading does not look at; the picture cannot be loaded afterwards
        with Image.open(BytesIO(data)) as image:
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # MPO: a photo and its preview
                raise DataError(f"has {image.n_frames} frames; a still picture is needed")  # type: ignore[attr-defined]
            image.load()
            array = np.array(_rgb(ImageOps.exif_transpose(image), alpha))
    except Exception as error:  # Pillow's decoders raise about every kind of exception on damaged files
        raise DataError(f"{os.fspath(path)}: {error or type(error).__name__}") from error
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def _rgb(image: Image.Image, alpha: Alpha | None) -> Image.Image:
    if image.mode in ("I", "F") and image.format != "PNG":
        raise DataError(f"has pixels of mode {image.mode}, whose range is unknown; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema() == (255, 255):
        return image.convert("RGB")
    if alpha is None:
        raise DataError("has transparency; say what lies behind it with alpha='white' or alpha='black'")
    return Image.alpha_composite(Image.new("RGBA", image.size, alpha), image).convert("RGB")


@dataclass(frozen=True)
class PictureCheck:
    """What `check_pictures` found.

    Attributes:
        good: files that can be read, in the order given.
        bad: damaged files and what is wrong with each; empty unless they were to be skipped.
        sizes: (height, width) -> pictures of that size.
        constant: pictures of one colour everywhere, such as a safety checker's black ones or a decoded NaN.
        duplicates: pictures whose pixels an earlier one has too; more than one in a thousand smells of a seed mistake.
    """

    good: tuple[Path, ...]
    bad: dict[Path, str]
    sizes: dict[tuple[int, int], int]
    constant: tuple[Path, ...]
    duplicates: tuple[Path, ...]


def check_pictures(
    paths: Iterable[str | os.PathLike[str]], *, alpha: Alpha | None = None, skip_bad: bool = False
) -> PictureCheck:
    """Read every picture once, before hours of work end at the last one.

    Args:
        paths: picture files.
        alpha: see `read_picture`.
        skip_bad: leave damaged files out, as long as they are at most 1 %.

    Raises:
        DataError: one for all damaged files together, naming the first 20 and their number.
    """
    paths = [Path(path) for path in paths]
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        looks = list(pool.map(lambda path: _look(path, alpha), paths))
    bad = {path: look for path, look in zip(paths, looks, strict=True) if isinstance(look, str)}
    if bad and not (skip_bad and len(bad) <= MOST_BAD * len(paths)):
        raise DataError(_complaint(bad, len(paths), skip_bad))
    seen: set[bytes] = set()
    good, constant, duplicates, sizes = [], [], [], Counter[tuple[int, int]]()
    for path, look in zip(paths, looks, strict=True):
        if isinstance(look, str):
            continue
        good.append(path)
        sizes[look.size] += 1
        if look.constant:
            constant.append(path)
        if look.digest in seen:
            duplicates.append(path)
        seen.add(look.digest)
    return PictureCheck(tuple(good), bad, dict(sizes), tuple(constant), tuple(duplicates))


@dataclass(frozen=True)
class _Look:
    size: tuple[int, int]
    constant: bool
    digest: bytes


def _look(path: Path, alpha: Alpha | None) -> _Look | str:
    """What a picture is, or what is wrong with its file."""
    try:
        picture = read_picture(path, alpha)
    except DataError as error:
        return str(error).removeprefix(f"{path}: ")
    size = (picture.shape[1], picture.shape[2])
    digest = hashlib.blake2b(repr(size).encode() + picture.numpy().tobytes(), digest_size=16).digest()
    return _Look(size, bool((picture == picture[:, :1, :1]).all()), digest)


def _complaint(bad: dict[Path, str], total: int, skip_bad: bool) -> str:
    lines = [f"  {path}: {reason}" for path, reason in list(bad.items())[:LISTED]]
    if len(bad) > LISTED:
        lines.append(f"  ... and {len(bad) - LISTED} more")
    limit = f", more than the {MOST_BAD:.0%} that may be skipped" if skip_bad else ""
    return "\n".join([f"{len(bad)} of {total} pictures cannot be used{limit}:", *lines])


def from_floats(pictures: Tensor) -> Tensor:
    """Floats in [0, 1] -> uint8 of the same shape (..., 3, H, W), rounded: truncating costs half a grey level.

    Raises:
        DataError: if values are not finite, or leave [0, 1] by more than 1e-3.
    """
    if pictures.dtype == torch.uint8:
        raise DataError("from_floats takes floats in [0, 1]; these pictures are bytes already")
    return (to_floats(pictures) * 255).round().to(torch.uint8)


def to_floats(pictures: Tensor) -> Tensor:
    """Bytes or floats -> float32 in [0, 1], (..., 3, H, W).

    Floats may leave [0, 1] by 1e-3, which is rounding, and are clamped; more is a forgotten clamp or (x + 1) / 2.

    Raises:
        DataError: if values are not finite or leave [0, 1], or the tensor is of another type or shape.
    """
    if pictures.ndim < 3 or pictures.shape[-3] != 3 or not pictures.numel():
        raise DataError(f"pictures must be (..., 3, H, W), not {tuple(pictures.shape)}")
    if pictures.dtype == torch.uint8:
        return pictures.float() / 255
    if not pictures.is_floating_point():
        raise DataError(f"pictures must be uint8, or floats in [0, 1], not {pictures.dtype}")
    if not pictures.isfinite().all():
        raise DataError("pictures must be finite: a NaN or inf means that the run failed")
    low, high = float(pictures.min()), float(pictures.max())
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise DataError(f"pictures must lie in [0, 1], not in [{low:.4g}, {high:.4g}]; write (x + 1) / 2 or clamp them")
    return pictures.float().clamp(0, 1)
