"""Sparse edits of diffusion transformers against the networks themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels import token_toys
from tests.kernels.token_toys import (
    JOINT,
    NAMES,
    PROMPT,
    SHALLOW,
    active,
    by_token,
    call,
    changed,
    edited,
    error,
    inputs,
    noise,
    recorded,
)
from tests.pruning.toys import toy

CLOSE = 1e-5
WHOLE: dict[str, Any] = {"margin": 99, "dense_above": 1.0}


@pytest.mark.parametrize("text", ["fresh", "frozen"])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_input_gives_the_recorded_output(name: str, text: Any) -> None:
    network = toy(name)
    handle, reference = recorded(network, inputs(name), text=text)
    assert error(edited(handle, token_toys.mask(name), inputs(name)), reference) < CLOSE


@pytest.mark.parametrize("name", NAMES)
def test_with_all_tokens_active_another_picture_and_prompt_are_dense(name: str) -> None:
    network = toy(name)
    handle, reference = recorded(network, inputs(name), **WHOLE)
    other = inputs(name, seed=1, prompt=1)
    sparse = edited(handle, token_toys.mask(name), other)
    dense = call(network, other)
    assert error(dense, reference) > 0.1
    assert error(sparse, dense) < CLOSE


@pytest.mark.parametrize("text", ["fresh", "frozen"])
@pytest.mark.parametrize("name", SHALLOW)
def test_behind_one_attention_active_tokens_are_dense_and_others_recorded(name: str, text: Any) -> None:
    network, kind = token_toys.shallow(name), name.split()[0]
    masks = [token_toys.mask(kind), token_toys.mask(kind, 4, 3)]
    handle, reference = recorded(network, inputs(kind), text=text)
    cells = active(handle, kind, masks).expand(2, -1, -1)
    other = changed(kind, inputs(kind), cells)
    sparse, dense = edited(handle, masks, other), call(network, other)
    new, old, true = (by_token(kind, x) for x in (sparse, reference, dense))
    assert error(true[cells], old[cells]) > 0.05
    assert error(new[cells], true[cells]) < CLOSE
    assert torch.equal(new[~cells], old[~cells])


@pytest.mark.parametrize("name", JOINT)
def test_an_edit_depends_on_what_surrounds_it(name: str) -> None:
    network, mask = toy(name), token_toys.mask(name)
    handle, reference = recorded(network, inputs(name))
    cells = active(handle, name, mask)[0]
    there = edited(handle, mask, changed(name, inputs(name), cells))
    with handle.record():
        call(network, changed(name, inputs(name), ~cells, seed=5))
    elsewhere = edited(handle, mask, changed(name, inputs(name), cells))
    assert error(by_token(name, there)[:, cells], by_token(name, reference)[:, cells]) > 0.05
    assert error(by_token(name, elsewhere)[:, cells], by_token(name, there)[:, cells]) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_guidance_have_the_masks_of_their_pictures(name: str) -> None:
    """Two pictures with guidance are four rows; alone, each picture's two rows give the same."""
    network, given = toy(name), inputs(name, batch=4)
    masks = [token_toys.mask(name), token_toys.mask(name, 4, 3)]
    other = changed(name, given, True)
    handle, reference = recorded(network, given)
    together = by_token(name, edited(handle, masks, other))
    if name == "flux":  # one table of positions: both masks in all rows
        both = active(handle, name, np.stack(masks).any(0))[0]
        assert torch.equal(together[:, ~both], by_token(name, reference)[:, ~both])
        assert (together[:, both] != by_token(name, reference)[:, both]).any(-1).all()
        return
    for picture in (0, 1):
        alone = by_token(name, edited(handle, masks[picture], other))
        assert error(together[picture::2], alone[picture::2]) < CLOSE
        assert error(together[1 - picture :: 2], alone[1 - picture :: 2]) > 0.05


@pytest.mark.parametrize("text", ["fresh", "frozen"])
@pytest.mark.parametrize("name", NAMES)
def test_an_accepted_edit_is_the_reference_of_the_next(name: str, text: Any) -> None:
    network = toy(name)
    handle, reference = recorded(network, inputs(name), text=text)
    other = changed(name, inputs(name, prompt=int(text == "fresh")), True)
    first = edited(handle, token_toys.mask(name), other)
    handle.reject()
    handle.accept()
    assert error(edited(handle, token_toys.mask(name), inputs(name)), reference) < CLOSE
    again = edited(handle, token_toys.mask(name), other)
    assert torch.equal(again, first)
    handle.accept()
    assert error(edited(handle, token_toys.mask(name), other), first) < CLOSE
    second = edited(handle, token_toys.mask(name, 5, 4), other)
    cells = active(handle, name, token_toys.mask(name, 5, 4))[0]
    assert torch.equal(by_token(name, second)[:, ~cells], by_token(name, first)[:, ~cells])


@pytest.mark.parametrize("name", JOINT)
def test_a_frozen_prompt_has_no_tokens(name: str) -> None:
    lengths: list[int] = []
    for text in ("fresh", "frozen"):
        network: Any = toy(name)
        handle, _ = recorded(network, inputs(name), text=text)
        network.transformer_blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
        )
        edited(handle, token_toys.mask(name), inputs(name))
        call(network, inputs(name))
    assert lengths == [PROMPT, PROMPT, 0, PROMPT]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    def half(given: dict[str, Any]) -> dict[str, Any]:
        return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}

    network = toy(name).to(dtype)
    handle, reference = recorded(network, half(inputs(name)), cache_dtype=torch.float16, **WHOLE)
    other = half(inputs(name, seed=1))
    kept = handle.engine.cache[0]
    assert kept["proj_out_2.out" if name == "dit" else "proj_out.out"].dtype == dtype  # the outside stays to the bit
    assert {value.dtype for key, value in kept.items() if key.endswith((".k", ".v"))} == {torch.float16}
    sparse = edited(handle, token_toys.mask(name), other)
    assert sparse.dtype == reference.dtype == dtype
    assert error(sparse.float(), call(network, other).float()) < 0.05


@pytest.mark.parametrize("name", ["sd3", "flux double", "flux single"])
def test_residuals_of_controlnet(name: str) -> None:
    network, kind = token_toys.shallow(name), name.split()[0]
    rows, columns = token_toys.grid(kind)
    names = {
        "sd3": "block_controlnet_hidden_states",
        "flux double": "controlnet_block_samples",
        "flux single": "controlnet_single_block_samples",
    }
    residuals = {names[name]: [noise(2, rows * columns, network.inner_dim, seed=7)]}
    handle, reference = recorded(network, inputs(kind) | residuals)
    mask = token_toys.mask(kind)
    cells = active(handle, kind, mask)[0]
    sparse = edited(handle, mask, changed(kind, inputs(kind), cells) | residuals)
    dense = call(network, changed(kind, inputs(kind), cells) | residuals)
    assert error(by_token(kind, sparse)[:, cells], by_token(kind, dense)[:, cells]) < CLOSE
    assert error(call(network, inputs(kind)), reference) > 0.05


@pytest.mark.parametrize("name", NAMES)
def test_lora(name: str) -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import BaseTunerLayer

    network: Any = token_toys.shallow(name if name != "flux" else "flux double")
    targets = ["to_k", "to_out.0", "proj_out", "proj_out_2", "x_embedder", "context_embedder", "proj"]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), network)
    mask = token_toys.mask(name)
    handle, reference = recorded(network, inputs(name))
    cells = active(handle, name, mask)[0]
    other = changed(name, inputs(name), cells)
    sparse, dense = edited(handle, mask, other), call(network, other)
    assert error(by_token(name, sparse)[:, cells], by_token(name, dense)[:, cells]) < CLOSE
    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)
    assert error(call(network, inputs(name)), reference) > 0.01


def test_tokens_beyond_the_picture_are_never_active() -> None:
    """Kontext: the source picture's tokens come after those of the new picture."""
    network, (rows, columns) = token_toys.shallow("flux double"), token_toys.grid("flux")

    def with_source(given: dict[str, Any]) -> dict[str, Any]:
        x = torch.cat([given["hidden_states"], noise(2, 10, 16, seed=8)], dim=1)
        return given | {"hidden_states": x, "img_ids": torch.cat([given["img_ids"], token_toys.img_ids(2, 5, 1.0)])}

    handle, reference = recorded(network, with_source(inputs("flux")))
    cells = active(handle, "flux", token_toys.mask("flux"))[0]
    other = with_source(changed("flux", inputs("flux"), cells))
    sparse, dense = edited(handle, token_toys.mask("flux"), other), call(network, other)
    inside = torch.cat([cells.flatten(), torch.zeros(10, dtype=torch.bool)])
    assert handle.input_size == (rows, columns)
    assert error(sparse[:, inside], dense[:, inside]) < CLOSE
    assert torch.equal(sparse[:, ~inside], reference[:, ~inside])
    painted = handle.inside(token_toys.mask("flux"), sparse)
    assert painted.shape == (2, rows * columns + 10, 1)
    assert painted.sum() == 2 * 2
