"""What is found in a network, and what is refused, with the reason."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from torch import nn

from diffaccel.pruning.find import find_groups
from diffaccel.pruning.groups import DEPTH, WIDTH, Group, Groups, Site
from diffaccel.pruning.parts.attention import heads
from diffaccel.pruning.parts.feed_forward import step_of
from diffaccel.pruning.plan import PruningPlan
from tests.pruning import toys


def kinds(model: nn.Module) -> dict[str, int]:
    found = find_groups(model)
    return {kind: len(found.of(kind)) for kind in WIDTH + DEPTH if found.of(kind)}


@pytest.mark.parametrize(
    ("make", "counts"),
    [
        (
            lambda: diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768),  # SD 1.5
            {
                "heads": 32,
                "neurons": 16,
                "channels": 22,
                "block": 16,
                "layer": 4,
                "transformer": 16,
                "resnet": 22,
                "mid_block": 1,
            },
        ),
        (lambda: diffusers.DiTTransformer2DModel(out_channels=8), {"heads": 28, "neurons": 28, "block": 28}),
        (lambda: diffusers.FluxTransformer2DModel(), {"heads": 57, "neurons": 2 * 19 + 38, "block": 57}),
        (lambda: diffusers.SD3Transformer2DModel(num_layers=24), {"heads": 24, "neurons": 47, "block": 24}),
    ],
)
def test_groups_of_full_size_networks(make, counts):
    with torch.device("meta"):
        assert kinds(make()) == counts


def test_every_site_is_within_its_layer_and_units_do_not_overlap():
    for name in toys.TOYS:
        model = toys.toy(name)
        for group in find_groups(model).found.values():
            for site in group.sites:
                weight = model.get_submodule(site.module).weight
                features = site.features(range(group.units))
                assert len(set(features)) == len(features)
                assert max(features) < weight.shape[0 if site.side == "out" else 1], (group.name, site)


def test_a_block_contains_what_is_inside_and_not_its_namesake():
    block = Group("blocks.1", "block", 1, ("blocks.1",))
    assert block.contains(Group("blocks.1.attn.heads", "heads", 2, ("blocks.1.attn",)))
    assert not block.contains(Group("blocks.10.attn.heads", "heads", 2, ("blocks.10.attn",)))
    assert not block.contains(block)
    pair = Group("layer", "layer", 1, ("down.1", "up.1"))
    assert pair.contains(Group("up.1.channels", "channels", 2, ("up.1",)))


def test_features_of_both_halves_of_a_geglu():
    assert Site("proj", "out", 1, (0, 10)).features([1, 3]) == [1, 3, 11, 13]
    assert Site("to_q", "out", 3).features([0, 2]) == [0, 1, 2, 6, 7, 8]


def test_unknown_kind_and_unknown_class():
    with pytest.raises(ValueError, match="unknown kind 'head'; use heads"):
        Groups({}).of("head")
    with pytest.raises(TypeError, match="cannot prune a AutoencoderKL; known are UNet2DModel"):
        find_groups(diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4))


def test_a_lora_is_refused_until_it_is_fused_or_unloaded():
    peft = pytest.importorskip("peft")
    model = toys.toy("sd15")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    found = find_groups(model)
    assert not found.of("heads")
    assert "fuse or unload a LoRA" in found.refused["down_blocks.0.attentions.0.transformer_blocks.0.attn1"]
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.heads"
    with pytest.raises(ValueError, match="fuse or unload a LoRA"):
        PruningPlan.of(model, {name: [0]})


class Int8Linear(nn.Linear):
    """As quantisers do: a subclass of Linear whose weight means something else."""


def test_a_quantised_layer_is_refused():
    model = toys.toy("dit")
    model.transformer_blocks[0].ff.net[2].__class__ = Int8Linear
    assert "prune before quantising" in find_groups(model).refused["transformer_blocks.0.ff"]
    for block in model.transformer_blocks:
        block.ff.net[2].__class__ = block.attn1.to_q.__class__ = Int8Linear
    with pytest.raises(ValueError, match=r"nothing in this DiTTransformer2DModel can be pruned: .*prune before quant"):
        find_groups(model)


def test_fused_projections_are_refused():
    model = toys.toy("flux")
    model.fuse_qkv_projections()
    assert "unfuse_qkv_projections" in find_groups(model).refused["transformer_blocks.0.attn"]


def test_an_ip_adapter_is_refused():
    model = toys.toy("sd15")
    attn = model.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    attn.set_processor(IPAdapterAttnProcessor2_0(16, 8))
    refused = find_groups(model).refused["down_blocks.0.attentions.0.transformer_blocks.0.attn2"]
    assert "IPAdapterAttnProcessor2_0" in refused


@pytest.mark.parametrize(
    ("config", "reason"),
    [({"qk_norm": "rms_norm_across_heads", "kv_heads": 4}, "norm over all heads"), ({"kv_heads": 2}, "shares keys")],
)
def test_heads_that_are_not_independent_are_refused(config: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        heads("attn", Attention(16, heads=4, dim_head=4, **config))
    heads("attn", Attention(16, heads=4, dim_head=4, qk_norm="rms_norm"))


def test_the_first_block_of_dit_stays_unless_the_embedder_is_shared():
    assert "reads its embedder" in find_groups(toys.toy("dit")).refused["transformer_blocks.0"]
    assert "transformer_blocks.0" in find_groups(toys.toy("shared_dit")).found


@pytest.mark.parametrize(("neurons", "step"), [(5120, 64), (1280, 64), (1024, 64), (512, 32), (64, 4), (20, 1)])
def test_neurons_go_in_steps_that_leave_good_widths(neurons, step):
    assert step_of(neurons) == step
