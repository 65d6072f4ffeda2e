"""Decode the region of an edit alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from diffaccel.cost import drain
from diffaccel.kernels.config import SparseEditConfig
from diffaccel.kernels.engine import Handle, apply_sparse_edit
from diffaccel.kernels.session import Forward

MARGIN = 8  # pixels at each level of the decoder: see docs/editing.md for the error


class DecoderEdit:
    """On the decoder of a pipeline's VAE: keeps the picture of the reference, and replaces the region in it.

    No feature maps are kept, which would be large: the region is decoded with a margin that is thrown away, with the
    reference's statistics of group norms and its keys and values. Beyond the region the picture is the reference's, bit
    for bit.
    """

    def __init__(self, vae: Any):
        self._vae = vae
        self.handle: Handle = apply_sparse_edit(
            vae.decoder, SparseEditConfig(margin=MARGIN, dense_above=0.6), maps=False
        )
        self.handle.engine.driver = self._call
        self._phase, self._number = "off", 0
        self._mask: np.ndarray | None = None
        self._batches: dict[int, torch.Size] = {}
        self.recorded_seconds, self.seconds = 0.0, 0.0

    @classmethod
    def on(cls, pipe: Any) -> DecoderEdit | None:
        """On the pipeline's VAE; None if it has none of a known kind."""
        vae = getattr(pipe, "vae", None)
        return cls(vae) if type(getattr(vae, "decoder", None)).__name__ == "Decoder" else None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what edits need of the decoding in the block."""
        self._batches, self.recorded_seconds = {}, 0.0
        with self._during("record"):
            yield

    @contextmanager
    def editing(self, mask: np.ndarray, dense: bool = False) -> Iterator[None]:
        """Decode only the region around `mask` in the block; all, if `dense`."""
        self._mask, self.seconds = mask, 0.0
        with self._during("dense" if dense else "edit"):
            yield

    @contextmanager
    def _during(self, phase: str) -> Iterator[None]:
        self._phase, self._number = phase, 0
        try:
            yield
        finally:
            self._phase = "off"

    def _call(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = self._number
        self._number += 1
        drain()
        start = time.perf_counter()
        if self._phase == "off":
            return forward(*args, **kwargs)
        if self._phase == "record":
            self._batches[key] = args[0].shape
        if getattr(self._vae, "use_tiling", False):  # each call may be a tile, where the mask is another
            self._batches = {}
        if key not in self._batches or self._batches[key] != args[0].shape:
            self._batches = {}  # the picture is not this decoder's any more; the edits after this one run dense
            result = forward(*args, **kwargs)
        else:
            result = self._kept(key, forward, args, kwargs)
        drain()
        if self._phase == "record":
            self.recorded_seconds += time.perf_counter() - start
        else:
            self.seconds += time.perf_counter() - start
        return result

    def _kept(self, key: int, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        engine = self.handle.engine
        if self._phase == "record":
            with engine.running("record", engine.cache.new(key)):
                return forward(*args, **kwargs)
        assert self._mask is not None
        sliced = len(self._batches) > 1 and len(self._mask) > 1  # `enable_slicing`: a call for each picture
        region = self.handle.region(self._mask[key : key + 1] if sliced else self._mask)
        if self._phase == "edit" and not region.dense:
            with engine.running("sparse", engine.cache[key], region):
                return forward(*args, **kwargs)
        with engine.running("record", engine.cache.offer(key)):
            return forward(*args, **kwargs)
