"""Gates: reversible to the bit, differentiable, and refused where they would do nothing."""

from __future__ import annotations

import pytest
import torch

from diffaccel.pruning.find import find_groups
from diffaccel.pruning.gates import gate
from diffaccel.pruning.inputs import example_inputs
from diffaccel.pruning.plan import PruningPlan
from diffaccel.pruning.surgery import mask
from tests.pruning import toys


@pytest.mark.parametrize("name", toys.TOYS)
def test_removed_gates_leave_no_trace(name):
    model = toys.toy(name)
    inputs = example_inputs(model, size=8)
    before = model(**inputs).sample
    groups = list(find_groups(model).found.values())
    handle = gate(model, groups, {group.name: torch.zeros(group.units) for group in groups})
    assert not torch.equal(model(**inputs).sample, before)
    handle.remove()
    handle.remove()
    assert torch.equal(model(**inputs).sample, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", toys.TOYS)
def test_open_gates_change_nothing_and_have_gradients(name):
    model = toys.toy(name).requires_grad_(False)
    inputs = example_inputs(model, size=8)
    groups = list(find_groups(model).found.values())
    gates = {group.name: torch.ones(group.units, requires_grad=True) for group in groups}
    with gate(model, groups, gates):
        output = model(**inputs).sample
    torch.testing.assert_close(output, model(**inputs).sample, rtol=1e-4, atol=1e-5)
    output.square().sum().backward()
    for name_, values in gates.items():
        assert values.grad is not None, name_
        assert values.grad.abs().sum() > 0, name_


def test_gradient_of_a_gate_is_the_slope_of_the_loss():
    model = toys.toy("sd15").double().requires_grad_(False)
    inputs = example_inputs(model, size=8)
    groups = [group for group in find_groups(model).found.values() if group.kind in ("heads", "block", "channels")][:6]

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        with gate(model, groups, values):
            return model(**inputs).sample.square().sum()

    gates = {group.name: torch.full((group.units,), 0.7, dtype=torch.float64, requires_grad=True) for group in groups}
    loss(gates).backward()
    for group in groups:
        moved = {name: values.detach().clone() for name, values in gates.items()}
        moved[group.name][0] += 1e-6
        down = {name: values.detach().clone() for name, values in gates.items()}
        down[group.name][0] -= 1e-6
        slope = (loss(moved) - loss(down)) / 2e-6
        torch.testing.assert_close(gates[group.name].grad[0], slope, rtol=1e-4, atol=1e-4)


def test_a_mask_under_an_error_is_taken_off():
    model = toys.toy("dit")
    plan = PruningPlan.of(model, {"transformer_blocks.1": [0]})
    with pytest.raises(KeyboardInterrupt), mask(model, plan):
        raise KeyboardInterrupt
    assert not any(module._forward_hooks for module in model.modules())


def test_nothing_to_gate_and_gates_of_a_wrong_shape():
    model = toys.toy("dit")
    with pytest.raises(ValueError, match="no group"):
        gate(model, [], {})
    group = find_groups(model).found["transformer_blocks.1.attn1.heads"]
    with pytest.raises(ValueError, match=r"needs gates of shape \(4,\), not \(3,\)"):
        gate(model, [group], {group.name: torch.ones(3)})


def test_gated_network_works_with_gradient_checkpointing():
    model = toys.toy("sd3")
    inputs = example_inputs(model, size=8)
    plan = PruningPlan.of(model, {"transformer_blocks.1": [0], "transformer_blocks.2.attn.heads": [1]})
    with mask(model, plan):
        plain = model(**inputs).sample
        model.train()
        model.enable_gradient_checkpointing()
        torch.testing.assert_close(model(**inputs).sample, plain)
