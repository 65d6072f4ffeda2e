"""What the token executor refuses, hooks and leaves behind."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image

from benchmarks.full_size import shapes
from diffaccel.hooking import hook_on
from diffaccel.kernels import apply_sparse_edit
from diffaccel.kernels.engine import NAME
from diffaccel.kernels.tokens import TokenRegion, token_grid
from tests.kernels import token_toys
from tests.kernels.token_toys import NAMES, call, edited, inputs, recorded
from tests.pruning.toys import toy


def test_ids_that_are_no_grid_are_refused() -> None:
    ids = token_toys.img_ids(2, 3)
    assert token_grid(torch.cat([ids, token_toys.img_ids(4, 4, 1.0)]).bfloat16()) == (2, 3)
    for wrong in (torch.zeros(6, 3), ids.flip(0), torch.cat([ids[:3], token_toys.img_ids(1, 1, 1.0), ids[3:]])):
        with pytest.raises(ValueError, match="no grid of"):
            token_grid(wrong)


@pytest.mark.parametrize("name", NAMES)
def test_a_call_that_records_nothing_tells_the_grid_too(name: str) -> None:
    """With reference="self" the mask is needed before anything is recorded."""
    network = toy(name)
    with apply_sparse_edit(network) as handle:
        output = call(network, inputs(name))
        assert handle.input_size == token_toys.grid(name)
        assert handle.inside(token_toys.mask(name), output).sum() == 2 * 2 * token_toys.patch_size(name) ** 2


@pytest.mark.parametrize("name", NAMES)
def test_removal_leaves_nothing(name: str) -> None:
    network = toy(name)
    plain = copy.deepcopy(network)
    handle, _ = recorded(network, inputs(name))
    edited(handle, token_toys.mask(name), inputs(name, seed=1))
    handle.remove()
    for module in network.modules():
        assert not {"forward", "_diffusers_hook"} & set(vars(module))
    assert torch.equal(call(network, inputs(name)), call(plain, inputs(name)))


@pytest.mark.parametrize(
    ("name", "attentions"), [("dit", 28), ("pixart", 28), ("sd3", 24), ("flux-2+4", 6), ("flux", 57)]
)
def test_architectures_of_full_size(name: str, attentions: int) -> None:
    network = shapes(name)
    with apply_sparse_edit(network):
        hooks = [type(hook_on(module, NAME)).__name__ for module in network.modules() if hook_on(module, NAME)]
    others = {"dit": 0, "pixart": 0, "sd3": 1}.get(name, 2)  # the prompt's embedder, and Flux's positions
    assert hooks.count("AttentionHook") == attentions
    assert len(hooks) == attentions + 3 + others


def test_what_does_not_fit_is_refused_with_a_sentence() -> None:
    handle, _ = recorded(toy("sd3"), inputs("sd3"))
    mask = token_toys.mask("sd3")
    with pytest.raises(ValueError, match="3 masks for a batch of 2"):
        edited(handle, [mask] * 3, inputs("sd3"))
    with pytest.raises(ValueError, match="35 tokens, and its reference 48"):
        edited(handle, mask, inputs("sd3", size=(7, 5)))
    short = inputs("sd3")
    with pytest.raises(ValueError, match="3 tokens, and that of the reference 5"):
        edited(handle, mask, short | {"encoder_hidden_states": short["encoder_hidden_states"][:, :3]})
    handle, _ = recorded(toy("pixart"), inputs("pixart"))
    with pytest.raises(ValueError, match="no attention_mask"):
        edited(handle, token_toys.mask("pixart"), inputs("pixart"), attention_mask=torch.ones(2, 48))
    network: Any = toy("dit")
    network.transformer_blocks[1].attn1.set_processor(AttnProcessor())
    with pytest.raises(RuntimeError, match="scaled_dot_product_attention 0 times"):
        recorded(network, inputs("dit"))


def test_a_region_is_the_list_of_its_tokens() -> None:
    mask = np.zeros((6, 8), dtype=bool)
    mask[0, 0] = mask[5, 7] = True  # two corners: boxes of 2 x 2, of which other boxes would make much more
    region = TokenRegion(mask, margin=1, max_boxes=1, dense_above=0.2)
    assert region.active.tolist() == [[0, 1, 8, 9, 38, 39, 46, 47]]
    assert region.share == 8 / 48
    assert not region.dense
    assert TokenRegion(mask, margin=1, dense_above=0.1).dense
    drawn = np.asarray(region.draw(Image.new("RGB", (16, 12))))
    blue, red = drawn[..., 2] > 0, drawn[..., 0] > 0
    assert blue.sum() == 8 * 4
    assert red.sum() == 2 * 4
