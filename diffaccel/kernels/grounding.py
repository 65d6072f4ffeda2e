"""Propose a mask: where the words that an edit replaces are seen in the picture."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffaccel.kernels.engine import Handle
from diffaccel.kernels.session import Follower, Forward, Reference, returned

_SPREAD = 2  # times that self-attention carries the map from patch to patch
_TOKENS = (128, 1100)  # of the level that is read: 16 x 16 or 32 x 32


class Grounding:
    """Replays a reference, and at some of its steps looks where the network sees certain words of the prompt.

    The words' cross-attention, averaged over heads, layers and steps, is carried along self-attention to the patches
    that belong to the same thing. After the grounding of ViMAEdit (Wang et al. 2024, arXiv:2410.10496), which
    thresholds the map in every round; here it is iterated as it is and cut once, by Otsu's threshold.

    Args:
        handle: of the network, a U-Net with attention to the prompt.
        follower: of the pipeline.
        reference: of the run.
        words: numbers of their tokens in the prompt.
        steps: of the reference at which the network is run.
    """

    def __init__(
        self, handle: Handle, follower: Follower, reference: Reference, words: Sequence[int], steps: Sequence[int]
    ):
        self._handle, self._follower, self._reference = handle, follower, reference
        self._words, self._steps = list(words), set(steps)
        self._crossed: dict[int, list[Tensor]] = {}
        self._own: dict[int, list[Tensor]] = {}

    def __call__(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One network call."""
        key = self._follower.key(self._handle.network, args, kwargs)
        if key[0] in self._steps:
            with self._handle.engine.running("off"), _Attention(self):
                forward(*args, **kwargs)
        return returned(self._reference.outputs[key], kwargs)

    def see(self, query: Tensor, key: Tensor) -> None:
        """One attention, (B, heads, tokens, width): of the prompt if it has other tokens than the picture."""
        count = query.shape[2]
        if not _TOKENS[0] <= count <= _TOKENS[1]:
            return
        conditional = slice(len(query) // 2 if len(query) > 1 else 0, None)  # guidance puts it last
        seen = (query[conditional] @ key[conditional].mT / query.shape[-1] ** 0.5).softmax(-1).mean(1).float()
        if key.shape[2] == count:
            self._own.setdefault(count, []).append(seen)
        else:
            self._crossed.setdefault(count, []).append(seen[..., self._words].mean(-1))

    def mask(self, size: tuple[int, int], input_size: tuple[int, int]) -> np.ndarray:
        """Masks of `size`, bool, (pictures, rows, columns).

        Raises:
            TypeError: if no attention to the prompt was seen.
        """
        counts = [count for count in self._crossed if count in self._own]
        if not counts:
            raise TypeError("this network shows no attention to single words; paint a mask instead")
        count = min(counts)
        seen, own = torch.stack(self._crossed[count]).mean(0), torch.stack(self._own[count]).mean(0)
        for _ in range(_SPREAD):
            seen = (own @ seen[..., None])[..., 0]
        factor = (count / (input_size[0] * input_size[1])) ** 0.5
        grid = seen.unflatten(1, (round(input_size[0] * factor), -1))[:, None]
        smooth = F.interpolate(grid, size, mode="bicubic", align_corners=False)[:, 0].cpu().numpy()
        return np.stack([one > _otsu(one) for one in smooth])


class _Attention(TorchFunctionMode):
    """Shows queries and keys of all attentions to `see`."""

    def __init__(self, grounding: Grounding):
        super().__init__()
        self._grounding = grounding

    def __torch_function__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        """Look, and pass on."""
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key"), args, strict=False)) | (kwargs or {})
            self._grounding.see(named["query"], named["key"])
        return func(*args, **(kwargs or {}))


def replaced(tokenizer: Any, before: str, after: str) -> list[int]:
    """Numbers of the tokens of `before` that `after` has not, or has others in their place.

    Raises:
        ValueError: if there are none, as where words are only added.
    """
    limits = {"truncation": True, "max_length": tokenizer.model_max_length}
    old, new = (tokenizer(text, **limits).input_ids for text in (before, after))
    changes = difflib.SequenceMatcher(a=old, b=new, autojunk=False).get_opcodes()
    words = [i for kind, start, stop, _, _ in changes if kind in ("replace", "delete") for i in range(start, stop)]
    if not words:
        raise ValueError(f"{after!r} replaces no word of {before!r}, so that nothing tells where; paint a mask instead")
    return words


def _otsu(values: np.ndarray) -> float:
    """The threshold that parts values into two groups of least variance (Otsu 1979)."""
    counts, edges = np.histogram(values, 256)
    centers = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)[:-1]
    above = below[-1] + counts[-1] - below
    sums = np.cumsum(counts * centers)
    gap = sums[:-1] / below.clip(1) - (sums[-1] - sums[:-1]) / above.clip(1)
    return float(centers[np.argmax(below * above * gap**2)])
