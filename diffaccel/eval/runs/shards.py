"""Work cut into shards of fixed size: over processes, and over interruptions, with the same bytes in the end.

What a shard holds depends on its number alone, never on how many processes there are or which of them does it. Ranks
take every world-size-th shard, write it under a temporary name and rename it; nothing is gathered and nothing is
padded (`DistributedSampler` would count the first items twice). Processes meet in the file system alone, so that no
collective can time out on a slow rank; `accelerate launch` ends all ranks when one of them fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

SHARD = 64  # pictures; also what a batch is cut from, so that kernels see the same shapes at any world size


def shard_ranges(total: int, size: int = SHARD) -> list[range]:
    """Indices of each shard; the last one may be shorter."""
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def run_shards(
    ranges: list[range],
    is_done: Callable[[int], bool],
    work: Callable[[int], None],
    *,
    label: str,
    progress: bool = True,
    poll_seconds: float = 0.2,
) -> None:
    """Call `work(k)` for this process's share of the shards that are not done, then wait for the other processes'.

    Args:
        ranges: indices of every shard.
        is_done: whether shard k lies finished on disk, whoever made it.
        work: makes shard k; what it writes must appear at once (rename).
        label: of the progress bar, which the first process shows and which counts items.
        progress: show it.
        poll_seconds: how often to look whether the others have finished.
    """
    state = _state()
    done = [is_done(k) for k in range(len(ranges))]
    counts = [len(indices) for indices in ranges]
    own = [k for k in range(state.process_index, len(ranges), state.num_processes) if not done[k]]
    hidden = not progress or not state.is_main_process or all(done)
    with tqdm(total=sum(counts), desc=label, unit="picture", disable=hidden) as bar:
        bar.update(sum(count for count, finished in zip(counts, done, strict=True) if finished))
        for k in own:
            work(k)
            done[k] = True
            bar.update(counts[k])
        while not all(done):
            time.sleep(poll_seconds)
            for k in range(len(ranges)):
                if not done[k] and is_done(k):
                    done[k] = True
                    bar.update(counts[k])


def process_device() -> str | None:
    """The device of this process where `accelerate launch` has started several; None otherwise."""
    state = _state()
    if state.num_processes == 1:
        return None
    return str(state.device).removesuffix(":0") if str(state.device).startswith("cpu") else str(state.device)


def is_first_process() -> bool:
    """Whether this process is the one that prints and writes what there is once."""
    return _state().is_main_process


def process_count() -> int:
    """How many processes share the work."""
    return _state().num_processes


def _state() -> PartialState:
    # Without an accelerator it must be told so: else every process of `torchrun` takes itself for the only one.
    return PartialState(cpu=not torch.accelerator.is_available())
