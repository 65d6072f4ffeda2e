"""What users do around sparse edits: LoRA, casting, other attention, edits in a row, and what is refused."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from diffusers.utils import recurse_remove_peft_layers
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch._dynamo.testing import CompileCounter

from diffaccel.kernels import Handle, SparseEditConfig, apply_sparse_edit
from tests.kernels.map_toys import Inputs, call, changed, ddpm, edited, error, inputs, recorded, sd, square, toy

SIZE = (32, 24)
MASK = square(SIZE, 3, 2) | square(SIZE, 20, 14)
OTHER = square(SIZE, 18, 4)
EVERYTHING = np.ones(SIZE, bool)
EXACT: dict[str, Any] = {"norm": "incremental", "dense_above": 1.0}


def traces(network: nn.Module) -> list[str]:
    return [name for name, m in network.named_modules() if {"forward", "_diffusers_hook"} & set(vars(m))]


# LoRA

LAYERS = ["conv_in", "conv_out", "conv1", "conv_shortcut", "conv", "proj_in", "to_k", "to_q"]


def add_lora(network: Any, name: str = "default", **config: Any) -> None:
    torch.manual_seed(5)
    options = LoraConfig(r=2, lora_alpha=4, target_modules=LAYERS, init_lora_weights=False, **config)
    if hasattr(network, "add_adapter"):
        network.add_adapter(options, name)
    else:
        inject_adapter_in_model(options, network, name)


def wrapped(network: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, m in network.named_modules() if hasattr(m, "base_layer")}


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=str)
def test_lora_loaded_before(config: Any) -> None:
    network, given = toy("sd"), inputs("sd", SIZE)
    plain = call(network, given)
    add_lora(network, **config)
    assert wrapped(network) == set(LAYERS)
    adapted = call(network, given)
    assert error(adapted, plain) > 1e-2
    handle, reference = recorded(network, given, **EXACT)
    assert torch.equal(reference, adapted)
    assert error(edited(handle, MASK, given), reference) < 1e-5
    new = inputs("sd", SIZE, seed=1)
    sparse = edited(handle, EVERYTHING, new)
    handle.remove()
    assert traces(network) == []
    assert error(sparse, call(network, new)) < 1e-5


@pytest.mark.parametrize("name", ["sd", "ddpm"])
def test_lora_loaded_and_unloaded_after(name: str) -> None:
    """It replaces the modules that are hooked; the next record finds them, and an edit of an older one says so."""
    network, given, new = toy(name), inputs(name, SIZE), inputs(name, SIZE, seed=1)
    plain = call(network, new)
    handle, _ = recorded(network, given, **EXACT)
    for change in (add_lora, recurse_remove_peft_layers):
        change(network)
        with pytest.raises(RuntimeError, match="record the call again"):
            edited(handle, MASK, given)
        with handle.record():
            reference = call(network, given)
        assert error(edited(handle, MASK, given), reference) < 1e-5
        sparse, dense = edited(handle, EVERYTHING, new), call(network, new)
        assert error(sparse, dense) < 1e-5
    assert torch.equal(dense, plain)
    handle.remove()
    assert traces(network) == []


def test_a_second_adapter_and_none() -> None:
    network, given, new = toy("sd"), inputs("sd", SIZE), inputs("sd", SIZE, seed=1)
    add_lora(network)
    handle, _ = recorded(network, given, **EXACT)
    add_lora(network, "second", bias="none", use_rslora=True)
    changes: list[Callable[[], Any]] = [
        lambda: network.set_adapters(["default", "second"], [0.5, 2.0]),
        network.disable_adapters,
        network.enable_adapters,
        network.fuse_lora,
    ]
    for change in changes:
        change()
        with handle.record():
            call(network, given)
        sparse = edited(handle, EVERYTHING, new)
        assert error(sparse, call(network, new)) < 1e-5


# Other ways to run the same network


def test_projections_that_are_fused() -> None:
    network, given = toy("sd"), inputs("sd", SIZE)
    network.fuse_qkv_projections()
    handle, reference = recorded(network, given, **EXACT)
    assert error(edited(handle, MASK, given), reference) < 1e-5
    new = inputs("sd", SIZE, seed=1)
    assert error(edited(handle, EVERYTHING, new), call(network, new)) < 1e-5
    assert handle.engine.cache.bytes() == storages(handle)  # no more than its own part of what is fused


@pytest.mark.parametrize("first", [True, False])
def test_weights_that_wait_in_another_type(first: bool) -> None:
    network, given = toy("sd"), inputs("sd", SIZE)
    if first:
        network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    handle = apply_sparse_edit(network, SparseEditConfig(**EXACT))
    if not first:
        network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with handle.record():
        reference = call(network, given)
    assert next(network.parameters()).dtype == torch.float8_e4m3fn
    assert error(edited(handle, MASK, given), reference) < 1e-5
    new = inputs("sd", SIZE, seed=1)
    sparse, dense = edited(handle, EVERYTHING, new), call(network, new)
    assert error(sparse, dense) < 1e-5
    handle.remove()
    assert torch.equal(call(network, new), dense)


def test_channels_last() -> None:
    network, given = toy("sd").to(memory_format=torch.channels_last), inputs("sd", SIZE)
    given["sample"] = given["sample"].to(memory_format=torch.channels_last)
    handle, reference = recorded(network, given)
    assert error(edited(handle, MASK, given), reference) < 1e-5


def test_inference_mode() -> None:
    network, given = toy("sd"), inputs("sd", SIZE)
    handle = apply_sparse_edit(network)
    with torch.inference_mode():
        with handle.record():
            reference = network(**given).sample
        with handle.edit(MASK):
            new = network(**changed(given, MASK)).sample
    handle.accept()
    assert error(edited(handle, MASK, changed(given, MASK)), new) < 1e-5
    assert error(new, reference) > 1e-2


@pytest.mark.parametrize("processor", [AttnProcessor(), SlicedAttnProcessor(1)], ids=lambda p: type(p).__name__)
def test_attention_that_is_computed_otherwise(processor: Any) -> None:
    network = toy("sd")
    network.set_attn_processor(processor)
    with pytest.raises(RuntimeError, match=r"attn1 called scaled_dot_product_attention 0 times.*AttnProcessor2_0"):
        recorded(network, inputs("sd", SIZE))


def test_freeu() -> None:
    network, given = toy("sd"), inputs("sd", SIZE)
    handle, _ = recorded(network, given)
    network.enable_freeu(0.9, 0.2, 1.2, 1.4)
    with pytest.raises(ValueError, match="disable_freeu"):
        edited(handle, MASK, given)
    network.disable_freeu()
    edited(handle, MASK, given)


def test_masks_of_ip_adapters() -> None:
    network, given = toy("sd"), inputs("sd", SIZE)
    with pytest.raises(ValueError, match="ip_adapter_masks"):
        recorded(network, given | {"cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 1, 8, 8)]}})


def test_compiled_after_the_hooks() -> None:
    """Records and edits are one graph each, which serves all steps; the second record knows the sizes of the levels."""
    small = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    torch.manual_seed(0)
    network = ddpm(block_out_channels=(8, 8), **small).eval()
    handle = apply_sparse_edit(network, SparseEditConfig(margin=1))
    steps, mask = [inputs("ddpm", (16, 16), seed=seed) for seed in range(3)], square((16, 16), 2, 2)
    with torch.no_grad():
        for key, given in enumerate(steps):
            with handle.record(key):
                network(**given)
    plain = [edited(handle, mask, changed(given, mask), key) for key, given in enumerate(steps)]
    handle.reject()
    graphs = CompileCounter()
    compiled = torch.compile(network, backend=graphs, fullgraph=True)
    for key, given in enumerate(steps):
        with handle.record(key):
            call(compiled, given)
    for key, given in enumerate(steps):
        with handle.edit(mask, key):
            assert error(call(compiled, changed(given, mask)), plain[key]) < 1e-5
    assert graphs.frame_count <= 3
    handle.accept()
    assert error(edited(handle, mask, changed(steps[0], mask)), plain[0]) < 1e-5


# Edits in a row


@pytest.mark.parametrize("config", [{}, {"norm": "incremental"}, {"dense_below": 8}, {"dense_above": 0.01}], ids=str)
@pytest.mark.parametrize("name", ["sd", "ddpm_resnet", "decoder"])
def test_accepted_edits_are_the_reference(name: str, config: Any) -> None:
    """Elsewhere too, and at levels that ran dense."""
    given = inputs(name, SIZE)
    handle, reference = recorded(toy(name), given, margin=1, **config)
    first, kept = changed(given, MASK), reference.clone()
    new = edited(handle, MASK, first)
    assert torch.equal(edited(handle, MASK, first), new)  # nothing is accepted by itself
    handle.accept()
    assert torch.equal(reference, kept)  # what the caller has is the caller's
    for mask in (MASK, OTHER):
        assert error(edited(handle, mask, first), new) < (1e-5 if mask is MASK or "dense_above" in config else 0.05)
    second = changed(first, OTHER, seed=2)
    both = edited(handle, OTHER, second)
    handle.accept()
    assert error(edited(handle, OTHER, second), both) < 1e-5


def test_an_accepted_edit_of_everything_is_as_if_recorded() -> None:
    """Every feature is then that of the new picture, whether its level ran dense or not."""
    given, new = inputs("sd", SIZE), inputs("sd", SIZE, seed=1)
    configs: list[dict[str, Any]] = [
        EXACT,
        EXACT | {"dense_below": 8},
        EXACT | {"dense_below": 16},
        {"dense_above": 0.5},
    ]
    for config in configs:
        handle, _ = recorded(toy("sd"), given, **config)
        edited(handle, EVERYTHING, new)
        handle.accept()
        fresh, _ = recorded(toy("sd"), new, **config)
        ours, theirs = handle.engine.cache[0], fresh.engine.cache[0]
        assert set(ours) == set(theirs)
        for name, feature in ours.items():
            assert error(feature, theirs[name]) < 1e-4, name


def test_rejected_edits_leave_no_trace() -> None:
    given = inputs("sd", SIZE)
    handle, reference = recorded(toy("sd"), given)
    before = handle.engine.cache.bytes()
    edited(handle, MASK, changed(given, MASK))
    assert handle.engine.cache.bytes() > before
    handle.reject()
    assert handle.engine.cache.bytes() == before
    handle.accept()
    assert error(edited(handle, MASK, given), reference) < 1e-5


@pytest.mark.parametrize("config", [{"dense_above": 0.5}, {"exactness": "strict"}], ids=str)
def test_of_two_edits_the_last_is_accepted(config: Any) -> None:
    """One of them is dense."""
    given, new = inputs("sd", SIZE), inputs("sd", SIZE, seed=1)
    handle, reference = recorded(toy("sd"), given, **config)
    dense = edited(handle, EVERYTHING, new)
    assert error(dense, call(toy("sd"), new)) == 0
    edited(handle, MASK, given)
    handle.accept()
    assert error(edited(handle, MASK, given), reference) < 1e-5
    edited(handle, MASK, given)
    edited(handle, EVERYTHING, new)
    handle.accept()
    assert error(edited(handle, MASK, new), dense) < 1e-5


def test_calls_under_several_keys() -> None:
    given, new = inputs("sd", SIZE), inputs("sd", SIZE, seed=1)
    handle, first = recorded(toy("sd"), given)
    with handle.record("second"):
        second = call(handle.network, new)
    assert error(edited(handle, MASK, given), first) < 1e-5
    assert error(edited(handle, MASK, new, "second"), second) < 1e-5
    edited(handle, MASK, changed(given, MASK))
    last = edited(handle, MASK, changed(new, MASK), "second")
    handle.accept()
    assert error(edited(handle, MASK, changed(new, MASK), "second"), last) < 1e-5
    with pytest.raises(RuntimeError, match="nothing is recorded under 'third'"):
        edited(handle, MASK, given, "third")


# Memory


def storages(handle: Handle) -> int:
    """Bytes behind all kept tensors, each once."""
    slots = [handle.engine.cache[key] for key in handle.engine.cache._slots]
    kept = [x for slot in slots for x in slot.values()] + [x for slot in slots for x, _ in slot.pending.values()]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}.values())


@pytest.mark.parametrize("name", ["sd", "ddpm", "ddpm_resnet", "decoder"])
@pytest.mark.parametrize("norm", ["cached", "incremental"])
def test_memory_is_counted(name: str, norm: Any) -> None:
    given = inputs(name, SIZE)
    handle, _ = recorded(toy(name), given, norm=norm)
    assert handle.engine.cache.bytes() == storages(handle)
    edited(handle, MASK, given)
    assert handle.engine.cache.bytes() == storages(handle)
    by_hand = sum(x.numel() * x.element_size() for x in handle.engine.cache[0].values())
    assert storages(handle) > by_hand * 0.9
    handle.remove()
    assert handle.engine.cache.bytes() == 0


def test_memory_limit() -> None:
    handle, _ = recorded(toy("sd"), inputs("sd", SIZE), memory_limit=3 * 2**20)
    taken = handle.engine.cache.bytes()
    assert 2**18 < taken < 3 * 2**20
    handle.engine.cache.check(1)
    with pytest.raises(MemoryError, match=r"50 network calls take .* memory_limit is 3 MiB; write cache_dtype"):
        handle.engine.cache.check(50)


# What is refused


@pytest.mark.parametrize(
    ("mask", "given", "message"),
    [
        (MASK, inputs("sd", SIZE, batch=1), r"input of \(2, 4, 32, 24\), and the edit has \(1, 4, 32, 24\)"),
        (MASK, inputs("sd", SIZE, batch=4), r"and the edit has \(4, 4, 32, 24\)"),
        (MASK, inputs("sd", (24, 32)), r"and the edit has \(2, 4, 24, 32\)"),
        ([MASK] * 3, inputs("sd", SIZE), "3 masks for a batch of 2"),
        (np.zeros(SIZE, bool), inputs("sd", SIZE), "nothing would be edited"),
    ],
    ids=["fewer", "more", "turned", "masks", "empty"],
)
def test_calls_that_are_not_as_recorded(mask: Any, given: Inputs, message: str) -> None:
    handle, _ = recorded(toy("sd"), inputs("sd", SIZE))
    with pytest.raises(ValueError, match=message):
        edited(handle, mask, given)
    assert handle.engine.mode == "off"


def test_a_call_recorded_at_another_size_before() -> None:
    handle, _ = recorded(toy("sd"), inputs("sd", SIZE))
    with handle.record("turned"):
        call(handle.network, inputs("sd", (24, 32)))
    with pytest.raises(ValueError, match="record a call with the same"):
        edited(handle, square((24, 32), 9, 9), inputs("sd", SIZE))


def test_before_a_record() -> None:
    handle = apply_sparse_edit(toy("sd"))
    with pytest.raises(RuntimeError, match="nothing is recorded"):
        edited(handle, MASK, inputs("sd", SIZE))
    with pytest.raises(RuntimeError, match="nothing is recorded yet"):
        handle.region(MASK)


def test_copies() -> None:
    handle, _ = recorded(toy("sd"), inputs("sd", SIZE))
    with pytest.raises(ValueError, match="cannot be copied"):
        copy.deepcopy(handle.network)
    handle.remove()
    copy.deepcopy(handle.network)


def test_hooks_twice_and_off_twice() -> None:
    network = toy("sd")
    with apply_sparse_edit(network) as handle, pytest.raises(ValueError, match="already"):
        apply_sparse_edit(network)
    handle.remove()
    assert traces(network) == []
    apply_sparse_edit(network).remove()


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: nn.Conv2d(3, 3, 3), TypeError, "not Conv2d"),
        (lambda: toy("decoder").mid_block, TypeError, "not UNetMidBlock2D"),
        (lambda: sd(class_embed_type=None, attention_type="gated"), ValueError, "GatedSelfAttentionDense"),
        (lambda: sd(dual_cross_attention=True), ValueError, "DualTransformer2DModel"),
        (
            lambda: toy_blocks("SkipDownBlock2D", "SkipUpBlock2D"),
            ValueError,
            "Fir(Down|Up)sample2D",
        ),
        (lambda: toy_blocks("KDownBlock2D", "KUpBlock2D"), ValueError, "UNet2D.* has a"),
    ],
    ids=["conv", "block", "gligen", "dual", "fir", "k"],
)
def test_networks_that_are_refused(build: Callable[[], Any], error: Any, message: str) -> None:
    network = build()
    with pytest.raises(error, match=message):
        apply_sparse_edit(network)
    assert traces(network) == []


def test_compiled_networks_are_refused() -> None:
    network = toy("sd")
    with pytest.raises(ValueError, match="compiled"):
        apply_sparse_edit(torch.compile(network))  # type: ignore[arg-type]
    network.compile()
    with pytest.raises(ValueError, match="compiled"):
        apply_sparse_edit(network)


def toy_blocks(down: str, up: str) -> nn.Module:
    if down.startswith("K"):
        return sd(down_block_types=(down,) * 3, up_block_types=(up,) * 3, mid_block_type=None)
    return ddpm(down_block_types=(down,) * 3, up_block_types=(up,) * 3)
