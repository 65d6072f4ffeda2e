"""The token executor: diffusion transformers of Diffusers run on an edit's tokens alone.

Everything in a transformer but its attention works token by token. So the picture's active tokens are gathered where
tokens are made and put among the recorded outputs where they leave; in between Diffusers' own blocks run on shorter
sequences, whose queries see the recorded keys and values with the new ones in their place. There is nothing else that
looks beyond a token: with all of them active, the result is the dense one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffaccel.kernels.attention import AttentionHook
from diffaccel.kernels.hooks import SiteHook
from diffaccel.kernels.region import Region

# Where the picture's tokens are made, and the last projection before they are a picture again.
TOKEN_PATHS: dict[str, tuple[str, str]] = {
    "DiTTransformer2DModel": ("pos_embed", "proj_out_2"),
    "PixArtTransformer2DModel": ("pos_embed", "proj_out"),
    "SD3Transformer2DModel": ("pos_embed", "proj_out"),
    "FluxTransformer2DModel": ("x_embedder", "proj_out"),
}
_JOINT = ("SD3Transformer2DModel", "FluxTransformer2DModel")
_RESIDUALS = ("block_controlnet_hidden_states", "controlnet_block_samples", "controlnet_single_block_samples")


class TokenRegion(Region):
    """An edit as the list of its tokens, margin included; arguments as of `Region`. It has no levels."""

    @cached_property
    def active(self) -> Tensor:
        """Tokens that are recomputed, ascending, long, (masks, n)."""
        return self.tokens()

    @property
    def share(self) -> float:
        """Tokens that are recomputed, as a share of the picture's."""
        return self.active.shape[1] / (self.size[0] * self.size[1])

    @property
    def dense(self) -> bool:
        """Whether they are too many to be worth it."""
        return self.share > self._dense_above

    def draw(self, picture: Image.Image) -> Image.Image:
        """The picture with the recomputed tokens of the first mask tinted blue, and the mask itself red."""
        shown = picture.convert("RGB")
        active = np.zeros(self.size, dtype=bool)
        active.flat[self.active[0].numpy()] = True
        for cells, colour in ((active, (0, 90, 255)), (self.masks[0], (255, 0, 0))):
            tint = Image.fromarray(cells.astype(np.uint8) * 110).resize(shown.size, Image.Resampling.NEAREST)
            shown.paste(colour, mask=tint)
        return shown


class TokenLayout:
    """Where the active tokens belong among all: of the picture (B, tokens, C), or of keys and values, the prompt's too.

    Row `r` of a batch belongs to row `r % masks` of `active`.

    Args:
        active: long, (masks, n).
        count: tokens of the picture.
        prompt_first: whether the prompt's tokens come before the picture's, or after.
    """

    def __init__(self, active: Tensor, count: int, prompt_first: bool):
        self._active, self._count, self._prompt_first = {active.device: active}, count, prompt_first

    def indices(self, device: torch.device) -> Tensor:
        """The active tokens, (masks, n)."""
        if device not in self._active:
            self._active[device] = next(iter(self._active.values())).to(device)
        return self._active[device]

    def read(self, full: Tensor) -> Tensor:
        """The picture's active tokens, (B, tokens, C) -> (B, n, C)."""
        active = self.indices(full.device)
        if full.shape[1] != self._count:
            raise ValueError(f"the picture has {full.shape[1]} tokens, and its reference {self._count}; keep the size")
        if len(full) % len(active):
            raise ValueError(f"{len(active)} masks for a batch of {len(full)}; give one mask, or one for each picture")
        if len(active) == 1:
            return full.index_select(1, active[0])
        rows = torch.arange(len(full), device=full.device)[:, None]
        return full[rows, active.repeat(len(full) // len(active), 1)]

    def write(self, full: Tensor, part: Tensor) -> Tensor:
        """Put the active tokens, and the prompt's where `part` has them, among all, in place; tokens are dim -2."""
        active = self.indices(full.device)
        prompt, given = full.shape[-2] - self._count, part.shape[-2] - active.shape[1]
        if given not in (0, prompt):
            raise ValueError(
                f"the prompt has {given} tokens, and that of the reference {prompt}; pad prompts to one length"
            )
        part = part.to(full)
        if given:
            self._prompt(full, prompt).copy_(self._prompt(part, prompt))
        old, new, masks = self._picture(full, prompt), self._picture(part, given), len(active)
        for mask, tokens in enumerate(active):
            old[mask::masks].index_copy_(full.ndim - 2, tokens, new[mask::masks])
        return full

    def _prompt(self, x: Tensor, prompt: int) -> Tensor:
        return x.narrow(-2, 0 if self._prompt_first else x.shape[-2] - prompt, prompt)

    def _picture(self, x: Tensor, prompt: int) -> Tensor:
        return x.narrow(-2, prompt if self._prompt_first else 0, x.shape[-2] - prompt)


class TokenSequence:
    """What the hooks of a transformer know of its tokens.

    Args:
        flux: whether the prompt's tokens come before the picture's, and positions come as one table for all rows of
            the batch, which then have equal active tokens.

    Attributes:
        count: tokens of the picture in the last whole call.
    """

    def __init__(self, flux: bool):
        self.flux, self.count = flux, 0

    def region(self, masks: np.ndarray, **options: Any) -> TokenRegion:
        """The region of the masks; options as of `Region`."""
        return TokenRegion(np.any(masks, axis=0, keepdims=True) if self.flux else masks, **options)

    def layout(self, region: TokenRegion) -> TokenLayout:
        """Where the region's tokens belong."""
        return TokenLayout(region.active, self.count, self.flux)

    def inputs(self, layout: TokenLayout, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the network, with ControlNet's residuals cut to the active tokens."""
        if given.get("attention_mask") is not None:
            raise ValueError("sparse edits know no attention_mask over the picture's tokens; leave it out")
        cut = {name: [layout.read(one) for one in given[name]] for name in _RESIDUALS if given.get(name) is not None}
        return given | cut


class TokensInHook(SiteHook):
    """The module that makes the picture's tokens: `PatchEmbed` of a map, or a projection of tokens."""

    def new_forward(self, module: Any, x: Tensor) -> Tensor:
        """As `SiteHook` says; the input is the whole picture."""
        engine = self.engine
        if engine.mode == "sparse":
            layout = engine.layout(engine.sequence.count)
            return self.original(layout.read(x)) if x.ndim == 3 else layout.read(self.original(x))
        out = self.original(x)
        engine.sequence.count = out.shape[1]
        if x.ndim == 4:
            engine.input_size = (x.shape[-2] // module.patch_size, x.shape[-1] // module.patch_size)
        return out


class TokensOutHook(SiteHook):
    """The last projection: its result is the reference's, with the active tokens replaced."""

    def new_forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """As `SiteHook` says."""
        engine, name, out = self.engine, f"{self.name}.out", self.original(x)
        if engine.mode == "record":
            engine.slot.put(name, out, exact=True)
        if engine.mode != "sparse":
            return out
        layout = engine.layout(engine.sequence.count)
        engine.slot.offer(name, out, layout, exact=True)
        return layout.write(engine.slot[name].to(out, copy=True), out)


class PromptHook(SiteHook):
    """`context_embedder`: a frozen prompt has no tokens, only its recorded keys and values."""

    def new_forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """As `SiteHook` says."""
        frozen = self.engine.mode == "sparse" and self.engine.config.text == "frozen"
        return self.original(x[:, :0] if frozen else x)


class RotaryHook(SiteHook):
    """Flux's `pos_embed`: knows where tokens are, and makes the table of positions of the prompt and active ones."""

    def new_forward(self, module: nn.Module, ids: Tensor) -> Any:
        """As `SiteHook` says; ids are (prompt and picture, 3)."""
        engine = self.engine
        prompt = len(ids) - engine.sequence.count
        if engine.mode != "sparse":
            engine.input_size = token_grid(ids[prompt:])
        else:
            active = engine.layout(engine.sequence.count).indices(ids.device)[0]
            first = ids[:0] if engine.config.text == "frozen" else ids[:prompt]
            ids = torch.cat([first, ids[prompt:][active]])
        return self.original(ids)


def token_grid(ids: Tensor) -> tuple[int, int]:
    """Rows and columns of the tokens that become the picture; others, such as Kontext's source, come after them.

    Args:
        ids: `img_ids` of Flux, (tokens, 3): number of the picture, row, column.

    Raises:
        ValueError: if the picture's own tokens do not fill a grid row by row.
    """
    own = ids[ids[:, 0] == ids[0, 0]].long().cpu()
    rows, columns = (int(own[:, i].max()) + 1 for i in (1, 2))
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    first = ids[: len(own)].long().cpu()
    if not torch.equal(first, own) or not torch.equal(own[:, 1:], grid):
        raise ValueError(
            f"the {len(own)} tokens of img_ids are no grid of {rows} rows and {columns} columns, row by row; sparse "
            "edits take img_ids as Flux's pipelines make them"
        )
    return rows, columns


def token_sites(engine: Any, network: nn.Module, kind: str) -> Iterator[tuple[nn.Module, SiteHook]]:
    """Modules of a transformer, with a hook for each.

    Args:
        engine: of the network; it learns what the tokens are.
        network: the transformer.
        kind: its class in Diffusers, one of `TOKEN_PATHS`.
    """
    entry, leave = TOKEN_PATHS[kind]
    engine.joint, flux = kind in _JOINT, kind == "FluxTransformer2DModel"
    engine.sequence = TokenSequence(flux)
    yield network.get_submodule(entry), TokensInHook(engine, entry)
    yield network.get_submodule(leave), TokensOutHook(engine, leave)
    if engine.joint:
        yield network.get_submodule("context_embedder"), PromptHook(engine, "context_embedder")
    if flux:
        yield network.get_submodule("pos_embed"), RotaryHook(engine, "pos_embed")
    for name, module in network.named_modules():
        attends = type(module).__name__ in ("Attention", "FluxAttention")
        if attends and not getattr(module, "is_cross_attention", False):
            yield module, AttentionHook(engine, name)
