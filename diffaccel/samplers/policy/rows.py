"""One call of the denoiser, made of several networks: each takes the rows of its samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_POSITIONS = ("img_ids", "txt_ids")  # (tokens, 3) for all samples: there may be as many tokens as rows


def split(
    names: Sequence[str],
    call: Callable[[str, tuple[Any, ...], dict[str, Any]], Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Call each network on its rows, and put the rows of the outputs back in order.

    Args:
        names: network of each sample. With guidance a batch holds the samples several times over, one copy after the
            other: row r is sample r modulo their number.
        call: of one network, by name; returns a tuple or one of Diffusers' output classes with tensors.
        args: of the whole batch. Tensors whose first dimension is the batch are cut, others are given as they are.
        kwargs: likewise.

    Raises:
        ValueError: if the rows are no multiple of the samples.
    """
    rows = len(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 1))
    if rows % len(names):
        raise ValueError(
            f"the plan is for {len(names)} samples, and the batch has {rows} rows; plan one for each sample"
        )
    owners = [names[row % len(names)] for row in range(rows)]
    outputs, order = [], []
    for name in dict.fromkeys(owners):
        own = [row for row, owner in enumerate(owners) if owner == name]
        outputs.append(call(name, take(args, own, rows), take(dict(kwargs), own, rows)))
        order += own
    back = torch.tensor(order).argsort()
    return _merged(outputs, back)


def take(value: Any, own: list[int], rows: int) -> Any:
    """The rows `own` of every tensor with `rows` of them, through tuples, lists and dicts; not of Flux' positions."""
    if isinstance(value, Tensor):
        return value[own] if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        return {key: item if key in _POSITIONS else take(item, own, rows) for key, item in value.items()}
    return type(value)(take(item, own, rows) for item in value) if isinstance(value, tuple | list) else value


def _merged(outputs: list[Any], back: Tensor) -> Any:
    if isinstance(outputs[0], tuple):
        return tuple(_merged(list(parts), back) for parts in zip(*outputs, strict=True))
    if isinstance(outputs[0], dict):  # Diffusers' outputs are dicts
        return type(outputs[0])(**{key: _merged([output[key] for output in outputs], back) for key in outputs[0]})
    return torch.cat(outputs)[back.to(outputs[0].device)]
