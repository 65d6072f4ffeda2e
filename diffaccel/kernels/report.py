"""What an edit did, and what it cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from diffaccel.kernels.editing import Editing
from diffaccel.kernels.region import Region, read_mask


@dataclass(frozen=True)
class EditReport:
    """Measured on one edit.

    Attributes:
        seconds: of the whole edit, from text to picture.
        reference_seconds: that `generate` or `encode` took before, once.
        dense_seconds: what the edit would have taken dense: its own time, with the reference's time a call for every
            call that was computed. An estimate; `edit(..., dense=True)` measures it.
        calls: of the network, "sparse", "dense", "probe", and "replayed" where the reference's output was used.
        call_seconds: median of each kind; "reference" while the reference was recorded.
        share: of the network's input that was recomputed, margin included; 1 if all of it.
        memory: bytes of kept features, those of this edit included until they are accepted.
        probes: of exactness="bounded": step, margin, and relative error in the mask against the dense network.
        seam: root mean square difference to the reference in the 8 pixels around the mask, of 1; None if not pictures.
        outside: greatest difference to the reference more than 64 pixels from the mask; None where the picture ends
            before.
        note: a sentence, if the edit ran dense or sparse lost.
        region: that was recomputed; `region.draw(picture)` shows it.
    """

    seconds: float
    reference_seconds: float
    dense_seconds: float
    calls: Mapping[str, int]
    call_seconds: Mapping[str, float]
    share: float
    memory: int
    probes: tuple[tuple[int, int, float], ...] = ()
    seam: float | None = None
    outside: float | None = None
    note: str = ""
    region: Region | None = field(default=None, repr=False)

    @property
    def speedup(self) -> float:
        """Of this edit against the same one dense, both end to end; the reference is not counted."""
        return self.dense_seconds / self.seconds

    @property
    def speedup_with_reference(self) -> float:
        """Of making the reference and this edit, against making the edit's picture dense at once."""
        return self.dense_seconds / (self.seconds + self.reference_seconds)

    def __str__(self) -> str:
        calls = ", ".join(f"{count} {kind}" for kind, count in self.calls.items())
        against = f"dense about {self.dense_seconds:.2f} s ({self.speedup:.1f} times as long)"
        if "sparse" not in self.calls:
            against = "no call was sparse"
        lines = [
            f"{self.seconds:.2f} s, {against}; the reference took {self.reference_seconds:.2f} s",
            f"network calls: {calls}; {self.share:.0%} of the picture recomputed",
            f"kept features: {self.memory / 2**20:,.0f} MiB",
        ]
        if self.probes:
            step, margin, error = self.probes[-1]
            lines.append(f"probe: error {error:.2%} in the mask at step {step + 1}, margin {margin}")
        if self.seam is not None:
            further = "" if self.outside is None else f"; beyond 64 pixels {self.outside:.4f}"
            lines.append(f"seam: {self.seam:.4f} in the 8 pixels around the mask{further}")
        return "\n".join([*lines, self.note] if self.note else lines)


def report_of(
    run: Editing,
    *,
    seconds: float,
    reference_seconds: float,
    decoder_seconds: tuple[float, float],
    differences: tuple[float | None, float | None],
) -> EditReport:
    """The report of a finished run.

    Args:
        run: of the edit.
        seconds: it took.
        reference_seconds: the reference took.
        decoder_seconds: decoding the reference took, and the edit.
        differences: see `differences`.
    """
    reference, config = run.reference.seconds, run.handle.engine.config
    medians = {
        kind: statistics.median(times) for kind, times in {"reference": reference, **run.seconds}.items() if times
    }
    dense_call = medians.get("dense", medians.get("probe", medians.get("reference", 0.0)))
    computed = sum(count for kind, count in run.calls.items() if kind != "replayed")
    dense = seconds - sum(map(sum, run.seconds.values())) + computed * dense_call
    note, region = "", run.region
    if region is not None and region.dense:
        note = f"ran dense: the region is {region.share:.0%} of the picture, and dense_above={config.dense_above}"
    elif run.exhausted:
        note = f"ran dense: no margin keeps the probe error under tolerance={config.tolerance}"
    elif medians.get("sparse", 0) > dense_call:
        note = f"sparse lost: {medians['sparse']:.3f} s a network call, and {dense_call:.3f} s dense"
    return EditReport(
        seconds=seconds,
        reference_seconds=reference_seconds,
        dense_seconds=seconds if run.dense else dense + decoder_seconds[0] - decoder_seconds[1],
        calls=dict(run.calls),
        call_seconds=medians,
        share=1.0 if region is None or region.dense or run.exhausted else region.share,
        memory=run.handle.engine.cache.bytes(),
        probes=tuple(run.probes),
        seam=differences[0],
        outside=differences[1],
        note=note,
        region=region,
    )


def differences(after: Any, before: Any, mask: np.ndarray) -> tuple[float | None, float | None]:
    """Root mean square difference in the 8 pixels around the mask, and the greatest beyond 64; of 1."""
    if isinstance(after, list) and after and isinstance(after[0], Image.Image):
        a, b = (np.stack([np.asarray(x, dtype=np.float32) / 255 for x in pictures]) for pictures in (after, before))
    elif isinstance(after, np.ndarray):
        a, b = after, before
    else:
        return None, None
    change = torch.from_numpy(np.abs(a - b).max(axis=-1))
    inside = torch.from_numpy(read_mask(mask, (change.shape[1], change.shape[2])))[:, None].float()
    inside = inside.repeat(len(change) // len(inside), 1, 1, 1)
    ring = (F.max_pool2d(inside, 17, 1, 8) - inside)[:, 0] > 0
    far = F.max_pool2d(inside, 129, 1, 64)[:, 0] == 0
    seam = float(change[ring].square().mean().sqrt()) if ring.any() else 0.0
    return seam, float(change[far].max()) if far.any() else None
