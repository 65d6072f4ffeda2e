"""What happens at each network call while a reference is edited."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffaccel.kernels.cache import Key
from diffaccel.kernels.engine import Handle
from diffaccel.kernels.region import Region
from diffaccel.kernels.session import Change, Follower, Forward, Reference, now, output_of, returned, with_output


class Editing:
    """Replays the reference up to a step, and from there computes the region alone.

    Args:
        handle: of the network.
        follower: of the pipeline.
        reference: of the run that is edited.
        mask: bool, (masks, rows, columns), at the picture's resolution.
        start: first step that is computed.
        change: of the reference's outputs, inside of the mask, before `start`.
        dense: run the whole network in every step, for comparison.

    Attributes:
        calls: how many were made in which way.
        seconds: of each.
        probes: step, margin and error of each.
        region: that is recomputed.
        exhausted: whether no margin kept the error under the tolerance.
    """

    def __init__(
        self,
        handle: Handle,
        follower: Follower,
        reference: Reference,
        mask: Any,
        start: int,
        change: Change | None = None,
        dense: bool = False,
    ):
        self.handle, self.follower, self.reference, self.mask = handle, follower, reference, mask
        self.start, self.change = start, change
        self.dense = dense or handle.engine.config.exactness == "strict"
        self.calls: Counter[str] = Counter()
        self.seconds: dict[str, list[float]] = {}
        self.probes: list[tuple[int, int, float]] = []
        self.region: Region | None = None
        self.exhausted = False
        self._margin = handle.engine.config.margin

    def __call__(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One network call."""
        step, number = key = self.follower.key(self.handle.network, args, kwargs)
        if key not in self.reference.outputs:
            raise ValueError(
                f"the reference has no network call {number + 1} at step {step + 1}; an edit has the reference's "
                "number of steps, guidance and pictures"
            )
        known, state = self.reference.outputs[key], self.follower.state(self.handle.network, args, kwargs)
        if len(state) != len(known):
            raise ValueError(
                f"the reference was made with batches of {len(known)}, and the edit has {len(state)}; keep the number "
                "of pictures, and guidance on or off as it was"
            )
        if step < self.start:
            self.calls["replayed"] += 1
            new = known
            if self.change is not None:
                new = self.composed(self.change(step, known, state - self.reference.states[key]), known)
            result = returned(new, kwargs)
        else:
            result, how = self._computed(key, forward, args, kwargs)
            self.calls[how] += 1
            new = self.composed(output_of(result), known)
            result = with_output(result, new)
        self.reference.pending[key] = new.detach(), state.detach()
        return result

    def composed(self, new: Tensor, known: Tensor) -> Tensor:
        """`new` in the mask, `known` outside."""
        return torch.where(self._inside(new), new, known.to(new))

    def _computed(self, key: tuple[int, int], forward: Forward, args: Any, kwargs: Any) -> tuple[Any, str]:
        cache, (step, number) = self.handle.engine.cache, key
        slot: Key = key
        if self.dense:  # without features, so that it takes the time of a dense call; the edit after it makes them
            return self._timed("dense", forward, args, kwargs, "off", cache.offer(key) if self._recorded else None)
        if not self._recorded:
            slot = ("self", number)
            if (step - self.start) % self.handle.engine.config.refresh == 0:
                return self._timed("dense", forward, args, kwargs, "record", cache.new(slot))
        elif not cache[key]:
            return self._whole(slot, forward, args, kwargs)
        if self.region is None:
            self.region = self.handle.region(self.mask, self._margin)
        if self._given_up:
            return self._whole(slot, forward, args, kwargs)
        if step in self._probed_steps:
            return self._probed(slot, step, forward, args, kwargs)
        return self._timed("sparse", forward, args, kwargs, "sparse", cache[slot], self.region)

    @property
    def _recorded(self) -> bool:
        """Whether the reference's features are there."""
        config = self.handle.engine.config
        return config.reference == "record" and config.exactness != "strict"

    @property
    def _given_up(self) -> bool:
        """Whether the region is too large to be worth it."""
        return self.exhausted or (self.region is not None and self.region.dense)

    @cached_property
    def _probed_steps(self) -> list[int]:
        """Of the sparse ones, the first and the one in the middle."""
        config = self.handle.engine.config
        steps = range(self.start, self.follower.steps)
        sparse = [step for step in steps if self._recorded or (step - self.start) % config.refresh]
        return [sparse[0], sparse[len(sparse) // 2]] if sparse and config.exactness == "bounded" else []

    def _whole(self, key: Key, forward: Forward, args: Any, kwargs: Any) -> tuple[Any, str]:
        """Dense, with features for the next edit if they are the reference's own."""
        if not self._recorded:
            return self._timed("dense", forward, args, kwargs, "off")
        return self._timed("dense", forward, args, kwargs, "record", self.handle.engine.cache.offer(key))

    def _probed(self, key: Key, step: int, forward: Forward, args: Any, kwargs: Any) -> tuple[Any, str]:
        """Grow the margin until the sparse network is near enough to the dense one; the dense result is used."""
        engine = self.handle.engine
        offered = ("record", engine.cache.offer(key)) if self._recorded else ("off",)
        truth, how = self._timed("probe", forward, args, kwargs, *offered)
        true = output_of(truth)
        inside = self._inside(true).expand_as(true)
        while not self._given_up:
            assert self.region is not None
            near, _ = self._timed("sparse", forward, args, kwargs, "sparse", engine.cache[key], self.region)
            error = float((output_of(near) - true)[inside].norm() / true[inside].norm())
            self.probes.append((step, self._margin, error))
            if error <= engine.config.tolerance:
                break
            self.exhausted = self.region.share >= 1
            if not self.exhausted:
                self._margin = max(1, 2 * self._margin)
                self.region = self.handle.region(self.mask, self._margin)
        return truth, how

    def _timed(self, how: str, forward: Forward, args: Any, kwargs: Any, *running: Any) -> tuple[Any, str]:
        start = now()
        with self.handle.engine.running(*running):
            result = forward(*args, **kwargs)
        self.seconds.setdefault(how, []).append(now() - start)
        return result, how

    def _inside(self, output: Tensor) -> Tensor:
        return self.handle.inside(self.mask, output)
