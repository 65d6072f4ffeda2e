"""Feature networks by name, as the command line and the report call them."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from diffaccel.eval.networks.clip import emoji_clip, open_clip_extractor, transformers_clip
from diffaccel.eval.networks.dinov2 import dinov2
from diffaccel.eval.networks.extractor import Extractor
from diffaccel.eval.networks.inception_weights import PROTOCOLS, inception

NAMES = ("emoji-clip", "inception", "open_clip", "clip", "dinov2")
WITH_WEIGHTS = ("inception", "open_clip", "clip", "dinov2", "lpips")


def network(text: str, *, weights: Sequence[str] = (), device: str = "cpu", spatial: bool = False) -> Extractor:
    """`NAME` or `NAME:DETAIL` -> extractor.

    - `emoji-clip`: the zoo's, always at hand.
    - `inception`, `inception:legacy_tensorflow`, ...: FID, with a resize protocol.
    - `open_clip:ViT-B-32-quickgelu`, `open_clip:ViT-L-14-336-quickgelu:cmmd`: a model of open_clip, and a protocol.
    - `clip:FOLDER`, `dinov2:FOLDER`: a model of transformers in a local folder.

    Args:
        text: see above.
        weights: `NAME=PATH` for each network whose weights are not where they are looked for.
        device: where to run.
        spatial: of the Inception: also the features of sFID.

    Raises:
        ValueError: for an unknown name or detail.
        MissingWeights: if the weights are not on this machine.
    """
    name, _, detail = text.partition(":")
    path = given_path(name, weights)
    if text == "emoji-clip":
        return emoji_clip(device)
    if name == "inception":
        protocol = detail or "clean"
        if protocol not in PROTOCOLS:
            raise ValueError(f"the Inception has no resize protocol {detail!r}; there are {', '.join(PROTOCOLS)}")
        return inception(path, resize=protocol, spatial=spatial, device=device)
    if name == "open_clip":
        model, _, protocol = (detail or "ViT-B-32-quickgelu").partition(":")
        if protocol not in ("", "clip", "cmmd"):
            raise ValueError(f"open_clip models have no protocol {protocol!r}; there are clip and cmmd")
        cut = "cmmd" if protocol == "cmmd" else "clip"
        return open_clip_extractor(model, weights=path, protocol=cut, device=device)
    if name in ("clip", "dinov2"):
        if not (detail or path):
            raise ValueError(f"{name} needs a folder; write {name}:FOLDER")
        return (transformers_clip if name == "clip" else dinov2)(detail or str(path), device)
    raise ValueError(f"unknown network {text!r}; there are {', '.join(NAMES)}")


def given_path(name: str, weights: Sequence[str]) -> str | os.PathLike[str] | None:
    """The path among `NAME=PATH` entries.

    Raises:
        ValueError: for an entry that is none, or of an unknown name, which nobody would miss.
    """
    paths = {}
    for entry in weights:
        key, _, path = entry.partition("=")
        if not path:
            raise ValueError(f"cannot read {entry!r}; write NAME=PATH, such as inception=/w/pt_inception.pth")
        if key not in WITH_WEIGHTS:
            raise ValueError(f"no weights are called {key!r}; there are {', '.join(WITH_WEIGHTS)}")
        paths[key] = path
    return paths.get(name)


def checked_device(name: str) -> str:
    """The name, if there is such a device here; ValueError otherwise."""
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise ValueError(f"there is no device {name!r}; use cpu, cuda or mps") from None
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(kind, True):
        raise ValueError(f"there is no {kind.upper()} device here; use --device cpu")
    return name
