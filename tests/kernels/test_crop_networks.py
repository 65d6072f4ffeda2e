"""The crop executor on networks of every kind it knows, against the same networks run whole."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diffaccel.kernels import SparseEditConfig, apply_sparse_edit
from diffaccel.kernels.crop import crop
from tests.kernels.map_toys import (
    BUILD,
    call,
    changed,
    controlnet,
    decoder,
    edited,
    error,
    inputs,
    recorded,
    sd,
    square,
    toy,
)

SIZES = {"emoji": (16, 16), "sd": (33, 20), "sdxl": (17, 24), "decoder": (26, 19)}  # the others halve without a rest


def size_of(name: str) -> tuple[int, int]:
    return SIZES.get(name, (32, 24))


def spots(size: tuple[int, int]) -> list[np.ndarray]:
    """Two masks: one spot, and two in corners far from each other."""
    one = square(size, size[0] // 2, size[1] // 3, 3)
    return [one, square(size, 0, 0, 2) | square(size, size[0] - 2, size[1] - 2, 2)]


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize(
    "config",
    [
        {"margin": 2, "dense_above": 1.0},
        {"margin": 0, "norm": "incremental"},
        {"margin": 1, "dense_below": 5},
        {"margin": 1, "dense_below": 10},
    ],
    ids=str,
)
def test_the_same_input_gives_the_recorded_output(name: str, config: dict[str, Any]) -> None:
    """Two masks with one and with two boxes, in a batch of four, odd sizes; twice, as nothing is used up."""
    size = size_of(name)
    given = inputs(name, size, batch=4)
    handle, reference = recorded(toy(name), given, **config)
    assert handle.region(spots(size)).boxes(*size).count == 2  # type: ignore[union-attr]
    for mask in (spots(size), spots(size)[1], spots(size)[0]):
        assert error(edited(handle, mask, given), reference) < 1e-5


@pytest.mark.parametrize("name", BUILD)
def test_recording_changes_nothing(name: str) -> None:
    network, given = toy(name), inputs(name, size_of(name))
    plain = call(network, given)
    handle, reference = recorded(network, given)
    assert torch.equal(reference, plain)
    assert torch.equal(call(network, given), plain)  # outside of the blocks too
    handle.remove()
    assert torch.equal(call(network, given), plain)
    for module in network.modules():
        assert not {"forward", "_diffusers_hook"} & set(vars(module))


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("norm", ["incremental", "cached"])
def test_a_mask_of_everything_is_the_dense_network(name: str, norm: Any) -> None:
    """With another picture and another prompt. Not so with the reference's statistics: they are used."""
    size = size_of(name)
    network, everything = toy(name), np.ones(size, bool)
    other = inputs(name, size, seed=1)
    dense = call(network, other)
    handle, _ = recorded(network, inputs(name, size), norm=norm, dense_above=1.0)
    off = error(edited(handle, everything, other), dense)
    assert off < 1e-5 if norm == "incremental" else off > 1e-3


@pytest.mark.parametrize("name", BUILD)
def test_outside_of_the_boxes_the_output_is_the_recorded_one(name: str) -> None:
    size = size_of(name)
    given = inputs(name, size, batch=4)
    handle, reference = recorded(toy(name), given, margin=1, dense_above=1.0)
    new = edited(handle, spots(size), changed(given, spots(size)[1]))
    boxes = handle.region(spots(size)).boxes(*new.shape[-2:])
    assert boxes is not None
    for row in range(4):
        held = torch.zeros(new.shape[-2:], dtype=torch.bool)
        for top, left in boxes.corners[row % 2]:
            held[top : top + boxes.height, left : left + boxes.width] = True
        assert torch.equal(new[row][:, ~held], reference[row][:, ~held])
        assert not torch.equal(new[row][:, held], reference[row][:, held])


@pytest.mark.parametrize("name", BUILD)
def test_margins_bring_it_nearer_to_the_dense_network(name: str) -> None:
    size = (16, 16) if name == "emoji" else (40, 40)
    side = size[0] // 8
    given = inputs(name, size)
    mask = square(size, 3 * side, 4 * side, side)
    network = toy(name)
    other = changed(given, mask)
    dense = call(network, other)
    scale = dense.shape[-1] // size[1]
    inside = np.kron(mask, np.ones((scale, scale), bool))
    errors = []
    for margin in (0, 2 * side // 2, 2 * side, 4 * side):
        handle, reference = recorded(network, given, margin=margin, norm="incremental", dense_above=1.0)
        errors.append(error(edited(handle, mask, other), dense, inside))
        handle.remove()
    assert errors[0] < error(reference, dense, inside)
    assert all(after < 1.05 * before for before, after in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.5 * errors[0], errors


def test_decoder_without_maps() -> None:
    """Its region stands alone: the margin, in pixels of every level, is all it sees of its surroundings."""
    size, given = (24, 20), inputs("decoder", (24, 20))
    mask = square(size, 10, 8)
    errors = []
    for margin in (0, 2, 4, 8):
        handle, reference = recorded(toy("decoder"), given, maps=False, margin=margin, dense_above=1.0)
        assert handle.engine.cache.bytes() < 2 * 4 * 96 * 80 * 16  # less than a map or two
        again = edited(handle, mask, given)
        errors.append(error(again, reference, np.kron(mask, np.ones((4, 4), bool))))
        boxes = handle.region(mask).boxes(96, 80)
        assert boxes is not None
        assert boxes.height == 16 + 2 * margin
    assert errors[0] > 1e-2
    assert all(after < before for before, after in itertools.pairwise(errors)), errors
    assert errors[-1] < 1e-2, errors
    everything = recorded(toy("decoder"), given, maps=False, dense_above=1.0)[0]
    assert error(edited(everything, np.ones(size, bool), given), reference) < 1e-5


# ControlNet

SIZE = (32, 24)
MASK = square(SIZE, 3, 2) | square(SIZE, 20, 14)


def controlled() -> tuple[nn.Module, Any, dict[str, Any], dict[str, Any]]:
    """A U-Net, a ControlNet, and the inputs of both."""
    torch.manual_seed(0)
    unet, control = sd().eval(), controlnet().eval()
    given = inputs("sd", SIZE)
    return unet, control, given, given | {"controlnet_cond": torch.rand(2, 3, 8 * SIZE[0], 8 * SIZE[1])}


def residuals(control: Any, given: dict[str, Any]) -> dict[str, Any]:
    with torch.no_grad():
        down, mid = control(**given, return_dict=False)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


@pytest.mark.parametrize("config", [{"dense_above": 1.0}, {"dense_below": 8}, {}], ids=str)
@pytest.mark.parametrize("sparse_control", [False, True])
def test_controlnet(config: dict[str, Any], sparse_control: bool) -> None:
    unet, control, given, condition = controlled()
    options = SparseEditConfig(margin=2, **config)
    handle, other = apply_sparse_edit(unet, options), apply_sparse_edit(control, options)
    with other.record():
        whole = residuals(control, condition)
    with handle.record():
        reference = call(unet, given | whole)
    assert error(call(unet, given), reference) > 1e-2  # it is heard
    if sparse_control:
        with other.edit(MASK):
            whole = residuals(control, condition)
        sizes = [tuple(one.shape[-2:]) for one in whole["down_block_additional_residuals"]]
        assert sizes[0] == (8, 16)  # two boxes of 8 x 8
    assert error(edited(handle, MASK, given | whole), reference) < 1e-5
    if not sparse_control:
        as_list = whole | {"down_block_additional_residuals": list(whole["down_block_additional_residuals"])}
        assert error(edited(handle, MASK, given | as_list), reference) < 1e-5
        assert len(as_list["down_block_additional_residuals"]) == 6


def test_controlnet_whose_strips_have_the_size_of_another_level() -> None:
    mask = np.zeros(SIZE, bool)
    mask[10:22, 8:16] = True  # with the margin half as high and wide as the map
    unet, control, given, condition = controlled()
    options = SparseEditConfig(margin=2, dense_above=1.0)
    handle, other = apply_sparse_edit(unet, options), apply_sparse_edit(control, options)
    with other.record():
        whole = residuals(control, condition)
    with handle.record():
        reference = call(unet, given | whole)
    with other.edit(mask):
        strips = residuals(control, condition)
    assert tuple(strips["down_block_additional_residuals"][0].shape[-2:]) == (16, 12)
    assert error(edited(handle, mask, given | strips), reference) < 1e-5
    assert error(edited(handle, mask, given | whole), reference) < 1e-5


@pytest.mark.parametrize("sparse_control", [False, True])
def test_controlnet_of_everything(sparse_control: bool) -> None:
    unet, control, given, condition = controlled()
    new, everything = inputs("sd", SIZE, seed=1), np.ones(SIZE, bool)
    dense = call(unet, new | residuals(control, condition | new))
    options = SparseEditConfig(norm="incremental", dense_above=1.0)
    handle, other = apply_sparse_edit(unet, options), apply_sparse_edit(control, options)
    with other.record():
        whole = residuals(control, condition)
    with handle.record():
        call(unet, given | whole)
    if sparse_control:
        with other.edit(everything):
            whole = residuals(control, condition | new)
    else:
        whole = residuals(control, condition | new)
    assert error(edited(handle, everything, new | whole), dense) < 1e-5


def test_adapters_of_t2i() -> None:
    unet, _, given, _ = controlled()
    maps = [torch.randn(2, 16, 32, 24), torch.randn(2, 32, 16, 12), torch.randn(2, 32, 8, 6)]
    handle = apply_sparse_edit(unet, SparseEditConfig(dense_above=1.0))
    with handle.record():
        reference = call(unet, given | {"down_intrablock_additional_residuals": list(maps)})
    assert error(call(unet, given), reference) > 1e-2
    again = edited(handle, MASK, given | {"down_intrablock_additional_residuals": list(maps)})
    assert error(again, reference) < 1e-5


@pytest.mark.parametrize("norm", ["cached", "incremental"])
def test_guidance_in_one_batch(norm: Any) -> None:
    """Two pictures, each without and with the prompt: row r has mask r % 2, and no row hears of another."""
    given, masks = inputs("sd", (32, 24), batch=4), spots((32, 24))
    new = inputs("sd", (32, 24), batch=4, seed=1)
    rows = torch.tensor([1, 0, 3, 2])

    def swapped(one: dict[str, Any]) -> dict[str, Any]:
        return {name: x[rows] if x.ndim else x for name, x in one.items()}

    network = toy("sd")
    handle, _ = recorded(network, given, norm=norm)
    together = edited(handle, masks, new)
    handle.remove()
    handle, _ = recorded(network, swapped(given), norm=norm)
    assert error(edited(handle, masks[::-1], swapped(new)), together[rows]) < 1e-5
    assert error(edited(handle, masks, swapped(new)), together[rows]) > 0.1


@pytest.mark.parametrize("norm", ["cached", "incremental", "corrected"])
def test_a_box_that_is_repeated_counts_once(norm: Any) -> None:
    """In a batch with a mask of two boxes, a mask of one has its box twice, and gives what it gives alone."""
    given, masks, config = inputs("sd", (64, 48), batch=2), spots((64, 48)), {"margin": 1, "dense_below": 16}
    config: dict[str, Any] = {"margin": 1, "dense_below": 16}
    new, network = inputs("sd", (64, 48), batch=2, seed=1), toy("sd")
    handle, _ = recorded(network, given, norm=norm, **config)
    together = edited(handle, masks, new)
    handle.remove()
    first = [{name: x[:1] if x.ndim else x for name, x in one.items()} for one in (given, new)]
    handle, _ = recorded(network, first[0], norm=norm, **config)
    assert error(edited(handle, masks[0], first[1]), together[:1]) < 1e-5


@pytest.mark.parametrize("name", ["sd", "ddpm", "decoder"])
@pytest.mark.parametrize("config", [{"margin": 1}, {"dense_below": 8}], ids=str)
def test_incremental_statistics_are_those_of_the_map(name: str, config: dict[str, Any]) -> None:
    """Of the reference with the region in its place; a box that is there twice counts once."""
    size = (32, 24)
    given, masks = inputs(name, size, batch=4), spots(size)
    handle, _ = recorded(toy(name), given, norm="incremental", **config)
    edited(handle, masks, changed(given, masks[0] | masks[1]))
    handle.accept()
    slot = handle.engine.cache[0]
    norms = [(n, m) for n, m in handle.network.named_modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) > 8
    for norm, module in norms:
        grouped = slot[norm].reshape(4, module.num_groups, -1)
        torch.testing.assert_close(slot[f"{norm}.mean"], grouped.mean(2), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(slot[f"{norm}.var"], grouped.var(2, correction=0), atol=1e-5, rtol=1e-4)


def test_statistics_in_half_precision() -> None:
    """Values far from zero: the type has digits for them, but none for their difference from the mean."""
    network = toy("sd").bfloat16()
    nn.init.constant_(network.conv_in.bias, 40.0)
    given = {n: x.bfloat16() if x.is_floating_point() else x for n, x in inputs("sd", (32, 24)).items()}
    seen: list[torch.Tensor] = []
    handle = apply_sparse_edit(network)
    network.down_blocks[0].resnets[0].norm1.register_forward_hook(lambda module, x, out: seen.append(out.float()))
    with handle.record():
        call(network, given)
    edited(handle, square((32, 24), 10, 8), given)
    boxes = handle.region(square((32, 24), 10, 8)).boxes(32, 24)
    assert boxes is not None
    assert error(seen[1], crop(seen[0], boxes)) < 5e-3


@pytest.mark.parametrize("name", ["sd", "ddpm_resnet", "decoder"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """As near to the recorded output as the type's own rounding is."""
    size = (32, 24)
    given = inputs(name, size)
    exact = call(toy(name), given)
    low = {key: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for key, x in given.items()}
    handle, reference = recorded(toy(name).to(dtype), low, margin=2, norm="incremental")
    assert reference.dtype == dtype
    again = edited(handle, spots(size), low)
    assert again.dtype == dtype
    assert error(again, reference) < 1.5 * error(reference, exact)


@pytest.mark.parametrize("name", ["sd", "decoder"])
def test_features_that_wait_in_half_precision(name: str) -> None:
    size = (32, 24)
    given = inputs(name, size)
    full, _ = recorded(toy(name), given, norm="incremental")
    handle, reference = recorded(toy(name), given, norm="incremental", cache_dtype=torch.float16, cache_device="cpu")
    assert 0.49 < handle.engine.cache.bytes() / full.engine.cache.bytes() < 0.55
    new = edited(handle, spots(size)[0], given)
    assert new.dtype == torch.float32
    assert 0 < error(new, reference) < 2e-3
    boxes = handle.region(spots(size)[0]).boxes(*new.shape[-2:])
    assert boxes is not None
    (top, left), outside = boxes.corners[0][0], torch.ones(new.shape[-2:], dtype=torch.bool)
    outside[top : top + boxes.height, left : left + boxes.width] = False
    assert torch.equal(new[..., outside], reference[..., outside])
    handle.accept()
    assert error(edited(handle, spots(size)[0], given), new) < 2e-3


def test_sizes_that_are_halved_with_a_rest_are_refused() -> None:
    given = inputs("sd", (18, 20))
    recorded(sd(downsample_padding=0).eval(), inputs("sd", (16, 20)))
    with pytest.raises(ValueError, match="halves without a rest"):
        recorded(sd(downsample_padding=0).eval(), given)


def test_decoder_at_other_sizes_of_latents() -> None:
    """A key for each; the mask is pooled to the size of the last one."""
    torch.manual_seed(0)
    handle = apply_sparse_edit(decoder().eval())
    given = inputs("decoder", (16, 16))
    with handle.record("a"):
        reference = call(handle.network, given)
    assert error(edited(handle, square((64, 64), 20, 20), given, "a"), reference) < 1e-5
