"""What a sparse edit may do, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class SparseEditConfig:
    """Options of sparse edits; the defaults are what measured best (docs/editing.md).

    Args:
        margin: pixels of the network's input (latent pixels of Stable Diffusion, tokens of a DiT) around the mask that
            are recomputed too, as context. Wider is slower and nearer to the dense result.
        exactness: "fast": the margin as given. "bounded": the dense network checks some steps, and the margin grows
            until the error in the mask is at most `tolerance`; the checks take time, and are reported. "strict": dense,
            since one group norm or attention makes the receptive field the whole picture: the result that the others
            are compared with, at no gain.
        tolerance: of "bounded": relative RMSE of the network's output in the mask, against the dense network.
        norm: statistics of group norms. "cached": of the reference. "incremental": the reference's sums, less those of
            the old region, plus those of the new one, which is exact where the region covers all that changed.
            "last": that for the network's last norm alone, after which nothing makes good; the others are "cached".
            "corrected": what surrounds the region is taken to change as the region does, for features of another step
            (after DistriFusion's corrected group norm, 2402.19481). "auto": "corrected" with reference="self", else
            "last". "incremental" and "corrected" need about twice the memory, "last" one map more.
        reference: where features outside of the region come from. "record": every step of the reference run is kept,
            so that all steps of all later edits are sparse. "self": the edit itself runs dense every `refresh` steps;
            one step's features are kept, and a first edit on a foreign picture is fast too.
        refresh: dense every so many steps, with reference="self".
        text: tokens of the prompt in networks that update them (SD3, Flux). "fresh": computed in every step. "frozen":
            kept from the reference, for edits that keep the prompt.
        max_boxes: at most so many boxes for each picture; near ones are merged.
        dense_above: above this share of the picture, an edit runs dense.
        dense_below: levels of a U-Net whose maps have at most so many rows run dense.
        cache_dtype: type of the kept features; None as computed.
        cache_device: where they wait, such as "cpu"; None on the network's device.
        memory_limit: bytes that kept features may take; a reference that needs more is refused before it is run.
        vae: decode the region alone, where the pipeline has an `AutoencoderKL`.
    """

    margin: int = 4
    exactness: Literal["fast", "bounded", "strict"] = "fast"
    tolerance: float = 0.05
    norm: Literal["auto", "cached", "last", "incremental", "corrected"] = "auto"
    reference: Literal["record", "self"] = "record"
    refresh: int = 3
    text: Literal["fresh", "frozen"] = "fresh"
    max_boxes: int = 4
    dense_above: float = 0.5
    dense_below: int = 0
    cache_dtype: torch.dtype | None = None
    cache_device: str | None = None
    memory_limit: int | None = None
    vae: bool = True

    @property
    def statistics(self) -> Literal["cached", "last", "incremental", "corrected"]:
        """`norm`, with "auto" decided."""
        return self.norm if self.norm != "auto" else "corrected" if self.reference == "self" else "last"

    def __post_init__(self) -> None:
        _one_of("exactness", self.exactness, ("fast", "bounded", "strict"))
        _one_of("norm", self.norm, ("auto", "cached", "last", "incremental", "corrected"))
        _one_of("reference", self.reference, ("record", "self"))
        _one_of("text", self.text, ("fresh", "frozen"))
        for name, least in (("margin", 0), ("dense_below", 0), ("refresh", 1), ("max_boxes", 1)):
            _whole(name, getattr(self, name), least)
        if not 0 < self.dense_above <= 1:
            raise ValueError(f"dense_above={self.dense_above!r} is no share of the picture; give a number in (0, 1]")
        if self.tolerance <= 0:
            raise ValueError(f"tolerance={self.tolerance!r}: give a relative error above 0, such as 0.05")
        if self.memory_limit is not None and self.memory_limit <= 0:
            raise ValueError(f"memory_limit={self.memory_limit!r}: give bytes, such as 8 * 2**30, or None")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; use {' or '.join(map(repr, known))}")


def _whole(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: give a whole number of at least {least}")
