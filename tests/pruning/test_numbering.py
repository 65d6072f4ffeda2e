"""Names before and after entries of lists are deleted."""

from __future__ import annotations

import itertools

import pytest

from diffaccel.pruning.find import find_groups
from diffaccel.pruning.numbering import Numbering, numbering_of
from diffaccel.pruning.plan import PruningPlan
from diffaccel.pruning.surgery import cut
from tests.pruning.toys import toy


@pytest.mark.parametrize("deleted", [c for n in range(5) for c in itertools.combinations(range(5), n)])
def test_old_undoes_new_in_one_list(deleted: tuple[int, ...]) -> None:
    numbering = Numbering(f"blocks.{i}" for i in deleted)
    kept = [i for i in range(5) if i not in deleted]
    assert [numbering.new(f"blocks.{i}.a.0") for i in kept] == [f"blocks.{j}.a.0" for j in range(len(kept))]
    assert [numbering.old(f"blocks.{j}.a.0") for j in range(len(kept))] == [f"blocks.{i}.a.0" for i in kept]
    assert all(numbering.new(f"blocks.{i}{rest}") is None for i in deleted for rest in ("", ".a.weight"))


def test_other_lists_keep_their_numbers() -> None:
    numbering = Numbering(["transformer_blocks.1"])
    for name in (
        "single_transformer_blocks.3.attn",
        "transformer_blocks.0.ff.net.2",
        "x.transformer_blocks.2",
        "y",
        "",
    ):
        assert numbering.new(name) == numbering.old(name) == name
    assert numbering.new("transformer_blocks.10.w") == "transformer_blocks.9.w"


def test_lists_in_lists() -> None:
    """A layer goes and, in one that stays, a block: the block's list has its old name in the plan."""
    numbering = Numbering(["up.1.layers.0", "up.1.layers.2.blocks.1"])
    pairs = {
        "up.1.layers.2.blocks.0.w": "up.1.layers.1.blocks.0.w",
        "up.1.layers.2.blocks.3.w": "up.1.layers.1.blocks.2.w",
        "up.1.layers.1.blocks.1.w": "up.1.layers.0.blocks.1.w",
        "up.0.layers.2.blocks.1.w": "up.0.layers.2.blocks.1.w",
    }
    for old, new in pairs.items():
        assert numbering.new(old) == new
        assert numbering.old(new) == old
    assert numbering.new("up.1.layers.2.blocks.1.w") is None
    assert numbering.new("up.1.layers.0.blocks.5") is None


def test_only_blocks_and_layers_leave_a_list() -> None:
    found = find_groups(toy("deep_sd15")).found
    assert numbering_of([found["mid_block"], found["down_blocks.0.attentions.1"]]).new("mid_block.x") == "mid_block.x"
    layer = numbering_of([found["down_blocks.0.layer.1"]])
    assert layer.new("down_blocks.0.resnets.1.conv1.weight") is None
    assert layer.new("down_blocks.0.attentions.2.proj_in.bias") == "down_blocks.0.attentions.1.proj_in.bias"
    assert layer.new("up_blocks.1.resnets.2.conv1.weight") is None


@pytest.mark.parametrize("name", ["deep_sd15", "flux"])
def test_weights_of_a_cut_network_are_those_with_the_old_names(name: str) -> None:
    model = toy(name)
    groups = find_groups(model).found
    gone = {"deep_sd15": "down_blocks.0.layer.2", "flux": "single_transformer_blocks.1"}[name]
    smaller = cut(model, PruningPlan.of(model, {gone: (0,)}))
    numbering, state = numbering_of([groups[gone]]), model.state_dict()
    for key, value in smaller.state_dict().items():
        assert value.equal(state[numbering.old(key)]), key
    left = {numbering.new(key) for key in state} - {None}
    assert left == smaller.state_dict().keys()
