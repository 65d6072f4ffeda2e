"""Sparse edits on a single network: record a call, then repeat it with another input where a mask says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from diffaccel.hooking import hook_on, register, unregister
from diffaccel.kernels.attached import NAME, Attached
from diffaccel.kernels.boxes import Boxes
from diffaccel.kernels.cache import FeatureCache, GridLayout, Key, Slot
from diffaccel.kernels.config import SparseEditConfig
from diffaccel.kernels.crop import crop
from diffaccel.kernels.region import Region, read_mask
from diffaccel.kernels.tokens import TokenRegion, TokenSequence

Mode = Literal["off", "record", "sparse"]
# Decides what happens with a call of the network: gets its forward, and its arguments.
Driver = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Engine:
    """What the hooks of one network share.

    Attributes:
        mode: of the call that runs.
        slot: features that it writes ("record") or reads ("sparse").
        region: that is sparse.
        input_size: rows and columns of the network's input, as recorded; (0, 0) before.
        maps: whether feature maps are kept; without, regions are on their own, with statistics of the reference.
        joint: whether attention takes prompt and picture together.
        sequence: of tokens, in transformers; None in networks of maps.
    """

    joint = False
    sequence: TokenSequence | None = None

    def __init__(self, config: SparseEditConfig, *, maps: bool = True):
        self.config, self.maps = config, maps
        self.mode: Mode = "off"
        self.cache = FeatureCache(config.cache_dtype, config.cache_device, config.memory_limit)
        self.slot: Slot = Slot(self.cache)
        self.region: Region | None = None
        self.driver: Driver | None = None
        self.input_size: tuple[int, int] = (0, 0)
        self.turns: dict[str, int] = {}  # how often a module was called in this network call
        self._grids: dict[int, tuple[int, int]] = {}
        self._layouts: dict[int, Any] = {}

    @contextmanager
    def running(self, mode: Mode, slot: Slot | None = None, region: Region | None = None) -> Iterator[None]:
        """What the calls in the block do."""
        self.mode, self.slot = mode, Slot(self.cache) if slot is None else slot
        if region is not self.region:
            self.region, self._layouts = region, {}
            for tokens, size in self._grids.items() if region is not None else ():  # before torch.compile looks on
                self.boxes(size)
                self.layout(tokens)
        try:
            yield
        finally:
            self.slot.finish()
            self.mode = "off"

    def boxes(self, size: tuple[int, int]) -> Boxes | None:
        """The region on a map of that size; None if it runs dense there."""
        assert self.region is not None
        return self.region.boxes(*size)

    def see(self, size: tuple[int, int]) -> None:
        """Learn the size of a level."""
        self._grids[size[0] * size[1]] = size

    @property
    def coarsest(self) -> int:
        """Rows of the smallest level."""
        return min((rows for rows, _ in self._grids.values()), default=1)

    def grid(self, tokens: int) -> tuple[int, int]:
        """Rows and columns of the level with so many pixels."""
        if tokens not in self._grids:
            raise RuntimeError(f"attention over {tokens} tokens, which is no level of the network: {self._grids}")
        return self._grids[tokens]

    def layout(self, tokens: int) -> Any:
        """Where the region's keys belong among so many; None if that level runs dense."""
        if tokens not in self._layouts and self.sequence is not None:
            assert isinstance(self.region, TokenRegion)
            self._layouts[tokens] = self.sequence.layout(self.region)
        elif tokens not in self._layouts:
            boxes = self.boxes(self.grid(tokens))
            self._layouts[tokens] = None if boxes is None else GridLayout(boxes)
        return self._layouts[tokens]


class NetworkHook(ModelHook):
    """On the network itself: crops what comes from outside, and lets a driver decide about each call."""

    def __init__(self, engine: Engine, attached: Attached):
        super().__init__()
        self.engine, self.attached = engine, attached

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run as the engine's mode says, or as the driver decides."""
        run = partial(self._run, module)
        if self.engine.driver is not None and self.engine.mode == "off":
            return self.engine.driver(run, args, kwargs)
        return run(*args, **kwargs)

    def _run(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        engine = self.engine
        if engine.mode != "off":
            self._check(module, kwargs)
            engine.turns.clear()
        if engine.mode == "sparse" and engine.sequence is not None:
            kwargs = engine.sequence.inputs(engine.layout(engine.sequence.count), kwargs)
        elif engine.mode == "sparse":
            kwargs = self._cropped(kwargs)
        return self.fn_ref.original_forward(*args, **kwargs)  # type: ignore[reportOptionalCall]

    def _check(self, module: Any, kwargs: dict[str, Any]) -> None:
        if not self.attached.complete():
            if self.engine.mode == "sparse":
                raise RuntimeError(
                    "layers of the network were replaced since its call was recorded, as loading and unloading LoRA "
                    "does; record the call again"
                )
            self.attached.renew()
        if any(getattr(block, "s1", None) is not None for block in getattr(module, "up_blocks", ())):
            raise ValueError("FreeU filters whole maps, which a region is not; write pipe.disable_freeu()")
        if "ip_adapter_masks" in (kwargs.get("cross_attention_kwargs") or {}):
            raise ValueError("sparse edits know no ip_adapter_masks; leave them out")

    def _cropped(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The network's arguments, with ControlNet's and T2I-Adapter's maps cut to the region."""
        known = kwargs.get("down_block_additional_residuals")
        strips = known is not None and tuple(known[0].shape[-2:]) != self.engine.input_size  # of a sparse ControlNet
        names = _ADAPTER if strips else (*_CONTROLNET, *_ADAPTER)
        return {name: self._cut(value) if name in names else value for name, value in kwargs.items()}

    def _cut(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(self._cut(one) for one in value)
        boxes = self.engine.boxes((value.shape[-2], value.shape[-1])) if isinstance(value, Tensor) else None
        return value if boxes is None else crop(value, boxes)


_CONTROLNET = ("down_block_additional_residuals", "mid_block_additional_residual")
_ADAPTER = ("down_intrablock_additional_residuals",)


class Handle:
    """Sparse edits on a network. As a context manager it is removed at the end of the block.

        handle = apply_sparse_edit(unet)
        with handle.record():
            reference = unet(x, t, text).sample
        with handle.edit(mask):
            edited = unet(x + change, t, text).sample

    Where the recomputed boxes are not, `edited` is `reference`.
    """

    def __init__(self, network: nn.Module, engine: Engine, attached: Attached):
        self.network, self.engine, self._attached = network, engine, attached

    @contextmanager
    def record(self, key: Key = 0) -> Iterator[None]:
        """Keep what edits read of the network call in the block."""
        with self.engine.running("record", self.engine.cache.new(key)):
            yield

    @contextmanager
    def edit(self, mask: Any, key: Key = 0) -> Iterator[Region]:
        """Recompute only the region around `mask`, with the features recorded under `key`.

        The call has the same batch as the recorded one. `accept` makes what it computed the reference.

        Args:
            mask: what `read_mask` takes, at any resolution; one, or one for each of the pictures in the batch.
            key: of the recorded call.

        Raises:
            RuntimeError: if nothing was recorded under `key`.
        """
        if key not in self.engine.cache:
            raise RuntimeError(f"nothing is recorded under {key!r}; write `with handle.record({key!r}):` first")
        region, cache = self.region(mask), self.engine.cache
        cache.reject(key)
        if region.dense or self.engine.config.exactness == "strict":
            with self.engine.running("record", cache.offer(key)):
                yield region
        else:
            with self.engine.running("sparse", cache[key], region):
                yield region

    def region(self, mask: Any, margin: int | None = None) -> Region:
        """The region of a mask on this network, by its configuration; with another margin if one is given."""
        config, sequence = self.engine.config, self.engine.sequence
        make = Region if sequence is None else sequence.region
        return make(
            read_mask(mask, self.input_size),
            margin=config.margin if margin is None else margin,
            max_boxes=config.max_boxes,
            dense_above=config.dense_above,
            dense_below=config.dense_below,
            coarsest=self.engine.coarsest,
        )

    def inside(self, mask: Any, output: Tensor) -> Tensor:
        """The mask at the resolution of the network's output, bool, for every row of the batch."""
        size = self.input_size if output.ndim == 3 else (output.shape[-2], output.shape[-1])
        inside = torch.from_numpy(read_mask(mask, size)).to(output.device)
        inside = inside.repeat(len(output) // len(inside), 1, 1)
        if output.ndim == 4:
            return inside[:, None]
        inside = inside.flatten(1)  # tokens beyond the grid are not of the picture (Kontext)
        return F.pad(inside, (0, output.shape[1] - inside.shape[1]))[..., None]

    @property
    def input_size(self) -> tuple[int, int]:
        """Rows and columns of the recorded input.

        Raises:
            RuntimeError: before anything was recorded.
        """
        if self.engine.input_size == (0, 0):
            raise RuntimeError("nothing is recorded yet; write `with handle.record():` around a call of the network")
        return self.engine.input_size

    def accept(self) -> None:
        """Make what the last edit computed part of the reference, in place."""
        self.engine.cache.accept()

    def reject(self) -> None:
        """Forget what the last edit computed."""
        self.engine.cache.reject()

    def remove(self) -> None:
        """Take all hooks off; the network is what it was. A second time does nothing."""
        if hook_on(self.network, NAME) is not None:
            unregister(self.network, NAME)
        self._attached.remove()
        self.engine.cache.clear()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def apply_sparse_edit(network: nn.Module, config: SparseEditConfig | None = None, *, maps: bool = True) -> Handle:
    """Let a network of Diffusers recompute only what an edit changes.

    The network takes and returns whole maps as before; inside, from its first convolution to its last, Diffusers' own
    modules work on the region alone. Convolutions find what surrounds it in the recorded maps, group norms have the
    recorded statistics, and self-attention sees all recorded keys and values, with those of the region replaced.
    Transformers run on the region's tokens alone.

    Args:
        network: `UNet2DConditionModel`, `UNet2DModel`, `ControlNetModel`, the decoder of an `AutoencoderKL`, or
            `DiTTransformer2DModel`, `PixArtTransformer2DModel`, `SD3Transformer2DModel`, `FluxTransformer2DModel`.
        config: `SparseEditConfig`.
        maps: keep the feature maps. Without, a region is surrounded by its own edge; for decoders, whose maps are
            large, with a wide margin.

    Raises:
        TypeError: if it is another network.
        ValueError: if it has parts that sparse edits do not know, has them already, or was compiled.
    """
    if hook_on(network, NAME) is not None:
        raise ValueError("the network has sparse edits already; take them off first: handle.remove()")
    if hasattr(network, "_orig_mod") or network._compiled_call_impl is not None:
        raise ValueError("compiled networks call no hooks; apply sparse edits to the plain network")
    engine = Engine(config or SparseEditConfig(), maps=maps)
    attached = Attached(engine, network)
    register(network, NetworkHook(engine, attached), NAME)
    return Handle(network, engine, attached)
