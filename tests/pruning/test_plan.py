"""Plans as files: what is written is read again, what is damaged or for another network is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffaccel.pruning.find import find_groups
from diffaccel.pruning.lora import remap_lora
from diffaccel.pruning.plan import FILE, PruningPlan, fingerprint, load_plans
from diffaccel.pruning.surgery import cut, mask
from tests.pruning.toys import TOYS, toy

NEURONS = "transformer_blocks.0.ff.neurons"
REMOVED = {NEURONS: [0, 1, 2, 3, 7], "transformer_blocks.1": [0], "transformer_blocks.2.attn1.heads": [1]}


@pytest.mark.parametrize("name", sorted(TOYS))
def test_a_plan_is_read_as_it_was_written(tmp_path: Path, name: str) -> None:
    model = toy(name)
    groups = find_groups(model).found
    removed = {group.name: range(0, group.units, 2) for group in groups.values()}
    plan = PruningPlan.of(model, removed, {"target": 0.7, "kinds": ["heads"]})
    assert plan.save(tmp_path) == tmp_path / FILE
    again = PruningPlan.load(tmp_path)
    assert (again.model, again.fingerprint) == (plan.model, plan.fingerprint)
    assert list(again.removed.items()) == [(name, tuple(removed[name])) for name in groups]
    assert (again.units, again.facts) == (plan.units, plan.facts)
    assert again.config == json.loads(json.dumps(plan.config))
    assert again.check(model).found.keys() == groups.keys()
    assert PruningPlan.load(tmp_path / FILE) == again


def test_units_are_written_as_runs(tmp_path: Path) -> None:
    file = PruningPlan.of(toy("dit"), REMOVED).save(tmp_path / "plan.json")
    groups = json.loads(file.read_text())["groups"]
    assert [group["removed"] for group in groups.values()] == ["0-3,7", "1", "0"]  # width, then depth


def test_units_may_come_in_any_order_and_twice() -> None:
    plan = PruningPlan.of(toy("dit"), {NEURONS: [7, 2, 7, 3], "transformer_blocks.1": []})
    assert plan.removed == {NEURONS: (2, 3, 7)}


def test_facts_may_be_what_programs_have(tmp_path: Path) -> None:
    facts = {"a": np.float32(0.5), "b": {1}, "c": tmp_path, "d": np.arange(2), "e": (1, 2)}
    PruningPlan.of(toy("dit"), REMOVED, facts).save(tmp_path)
    assert PruningPlan.load(tmp_path).facts == {"a": 0.5, "b": [1], "c": str(tmp_path), "d": [0, 1], "e": [1, 2]}


@pytest.mark.parametrize(
    ("removed", "words"),
    [
        ({}, "removes nothing"),
        ({NEURONS: []}, "removes nothing"),
        ({"foo": [0]}, "cannot remove units of foo: there is no such group"),
        ({NEURONS: [64]}, "has units 0 to 63, not 64"),
        ({NEURONS: [-1]}, "has units 0 to 63, not -1"),
        ({"transformer_blocks.0": [0]}, "must stay: the last norm reads its embedder"),
    ],
)
def test_what_is_not_there_cannot_be_removed(removed: dict[str, list[int]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PruningPlan.of(toy("dit"), removed)


@pytest.mark.parametrize("use", [cut, mask])
def test_a_plan_of_another_network_is_refused(use: Callable[..., Any]) -> None:
    plan = PruningPlan.of(toy("dit"), REMOVED)
    with pytest.raises(ValueError, match="this plan is for a DiTTransformer2DModel, the network is a PixArt"):
        use(toy("pixart"), plan)
    shorter = cut(toy("dit"), PruningPlan.of(toy("dit"), {"transformer_blocks.2": [0]}))
    with pytest.raises(
        ValueError, match=r"of another structure, for example transformer_blocks.2.attn1.heads \(4 units"
    ):
        use(shorter, plan)
    wider = type(toy("dit")).from_config({**toy("dit").config, "num_embeds_ada_norm": 11})
    with pytest.raises(ValueError, match="of another structure; make a plan"):
        use(wider, plan)


@pytest.mark.parametrize("use", [cut, mask])
def test_the_same_shapes_with_other_heads_are_another_network(use: Callable[..., Any]) -> None:
    """Nothing in the names and shapes of the parameters says how many heads they are."""
    model = toy("dit")
    plan = PruningPlan.of(model, {"transformer_blocks.0.attn1.heads": [0]})
    other = type(model).from_config({**model.config, "num_attention_heads": 8, "attention_head_dim": 2})
    assert fingerprint(other) == fingerprint(model)
    with pytest.raises(ValueError, match=r"another structure, for example .*attn1.heads \(4 units in the plan, 8 here"):
        use(other, plan)


def damaged(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    file = PruningPlan.of(toy("dit"), REMOVED).save(tmp_path)
    content = json.loads(file.read_text())
    file.write_text(json.dumps(change(content) or content))
    return file


def runs(text: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["groups"][NEURONS].update(removed=text)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: [content],
        lambda content: content.pop("groups") and None,
        lambda content: content["model"].pop("fingerprint") and None,
        lambda content: content.update(format=2),
        lambda content: content.update(groups=[]),
        lambda content: content.update(groups={}),
        lambda content: content.update(facts=3),
        lambda content: content["groups"][NEURONS].update(units="many"),
        *map(runs, ("", "a", "3-", "-1", "5-2", "1-2-3", "0,,1", "64", "0-99999999999999", [0], None)),
    ],
)
def test_a_damaged_plan_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = damaged(tmp_path, change)
    with pytest.raises(ValueError, match="is no pruning plan") as caught:
        PruningPlan.load(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_runs_of_a_file_may_overlap(tmp_path: Path) -> None:
    plan = PruningPlan.load(damaged(tmp_path, runs("7,0-3,2-3")))
    assert plan.removed[NEURONS] == (0, 1, 2, 3, 7)


def test_an_edited_name_is_refused(tmp_path: Path) -> None:
    def rename(content: dict[str, Any]) -> None:
        content["groups"]["foo"] = content["groups"].pop(NEURONS)

    with pytest.raises(ValueError, match="cannot remove units of foo"):
        PruningPlan.load(damaged(tmp_path, rename)).check(toy("dit"))


def test_no_plan_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no plan .*pruning_plan.json"):
        PruningPlan.load(tmp_path)
    (tmp_path / FILE).write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match="is no pruning plan"):
        PruningPlan.load(tmp_path)


def test_all_plans_of_a_network_that_was_pruned_twice(tmp_path):
    model = toy("pixart")
    first = PruningPlan.of(model, {"transformer_blocks.0": [0]})
    first.save(tmp_path / "pruning_plan.1.json")
    second = PruningPlan.of(cut(model, first), {"transformer_blocks.1": [0]})
    second.save(tmp_path)
    assert load_plans(tmp_path) == [first, second]
    with pytest.raises(ValueError, match="pruned more than once; read its plans with load_plans"):
        PruningPlan.load(tmp_path)
    # The original's second block is the only one left, and is the first one now.
    lora = {f"transformer_blocks.1.attn1.to_q.lora_{side}.weight": torch.randn(16, 16) for side in "AB"}
    assert set(remap_lora(lora, load_plans(tmp_path))) == {name.replace("blocks.1", "blocks.0") for name in lora}
    with pytest.raises(ValueError, match="one or more"):
        remap_lora(lora, [])


def test_the_file_has_the_index_map(tmp_path):
    model = toy("deep_sd15")
    plan = PruningPlan.of(model, {"down_blocks.0.layer.1": [0], "down_blocks.1.resnets.0.channels": [0]})
    written = json.loads(plan.save(tmp_path / "plan.json").read_text())["renamed"]
    assert written["down_blocks.0.resnets.1"] is None
    assert written["down_blocks.0.attentions.2"] == "down_blocks.0.attentions.1"
    assert written["up_blocks.1.resnets.3"] == "up_blocks.1.resnets.2"
    assert not any(name.startswith("down_blocks.1") for name in written)
    names = {name for name, _ in cut(model, plan).named_modules()}
    assert {new for new in written.values() if new} <= names
