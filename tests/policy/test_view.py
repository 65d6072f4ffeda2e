"""A view is another arrangement of the same modules, and follows what is done to the network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from diffaccel.cost import network_calls
from diffaccel.pruning.inputs import example_inputs
from diffaccel.samplers.policy.exits import DepthSchedule, LinearExit, early_exit, layers, predict, shallow
from diffaccel.samplers.policy.exits.view import view
from tests import tiny
from tests.pruning.toys import toy
from tests.tiny import draw, noise, relative

NAMES = ("sd15", "dit", "pixart", "sd3", "flux")


class Nested(nn.Module):
    """Two layers, one of them in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for row in self.rows:
            x = row(x)
        return x


def inputs(model: Any, **more: Any) -> dict[str, Any]:
    sizes = {"size": 4} if "Flux" in type(model).__name__ else {}
    text = {} if "DiT" in type(model).__name__ else {"text_length": 4}
    return example_inputs(model, **sizes, **text, **more)


def output(model: Any, given: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**given, return_dict=False)[0]


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest) -> Any:
    return toy(request.param)


def test_only_what_is_named_is_another():
    network, x = Nested(), noise(3, 2)
    other = view(network, {"rows.0.0": nn.Identity()})
    assert torch.equal(other(x), network.rows[1](x.relu()))
    assert torch.equal(network(x), network.rows[1](network.rows[0](x)))
    assert other.rows[1] is network.rows[1]
    assert other.rows[0][1] is network.rows[0][1]
    assert type(other) is Nested


@pytest.mark.parametrize("name", ["rows.0.7", "rows.3", "columns", "columns.0"])
def test_unknown_places_are_refused(name):
    with pytest.raises(KeyError, match="has no submodule"):
        view(Nested(), {name: nn.Identity()})


def test_hooks_of_the_network_are_not_the_views():
    """They are around it when a policy calls it; those of its parts are in it."""
    network, heard = Nested(), []
    network.register_forward_hook(lambda *_: heard.append("whole"))
    network.register_forward_pre_hook(lambda *_: heard.append("before"))
    network.rows[0].register_forward_hook(lambda *_: heard.append("part"))
    other = view(network, {"rows.0.1": nn.Identity()})
    other(noise(1, 2))
    assert heard == ["part"]
    other.register_forward_hook(lambda *_: heard.append("view"))
    network(noise(1, 2))
    assert heard == ["part", "before", "part", "whole"]


def test_calls_are_counted_once():
    pipe, call = tiny.sd()
    pipe = copy.deepcopy(pipe)
    with early_exit(pipe, [2, 1]), network_calls(pipe) as count:
        draw((pipe, call), pipe.scheduler, 4)
    assert count.calls == 4


def test_weights_are_the_same_and_follow_the_type(model):
    leaving = shallow(model, 1)
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    found = list(leaving.parameters())
    assert found
    assert all(id(parameter) in own for parameter in found)
    assert len(found) < len(own)
    before = output(leaving, inputs(model))
    model.to(torch.float64)
    assert {parameter.dtype for parameter in found} == {torch.float64} == {leaving.dtype}
    assert output(leaving, inputs(model)).dtype == torch.float64
    assert relative(output(leaving, inputs(model)), before) < 1e-3
    found[0].data.zero_()
    assert not model.get_parameter(own[id(found[0])]).any()


def test_map_keeps_its_type_in_a_network_of_half_precision(model):
    channels = getattr(model, "inner_dim", None)
    exit_map = LinearExit(noise(channels or 32, channels or 16), noise(channels or 32))
    model.to(torch.bfloat16)
    leaving = shallow(model, 1, exit_map)
    assert output(leaving, inputs(model)).dtype == leaving.dtype == torch.bfloat16
    assert exit_map.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_lora_that_is_loaded_later(name):
    """In an attention, which is shared, the view has it."""
    peft = pytest.importorskip("peft")
    model = toy(name)
    leaving, given = shallow(model, 1), inputs(model)
    before = output(leaving, given)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False), "inside")
    after = output(leaving, given)
    assert relative(after, before) > 1e-3
    assert torch.equal(output(shallow(model, 1), given), after)
    model.disable_adapters()
    assert relative(output(leaving, given), before) < 1e-5


def test_lora_in_a_layer_of_the_whole_needs_a_new_view():
    """A policy makes its views at the beginning of every run."""
    peft = pytest.importorskip("peft")
    model = toy("sd15")
    leaving, given = shallow(model, 1), inputs(model)
    before = output(leaving, given)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["conv_in"], init_lora_weights=False))
    assert torch.equal(output(leaving, given), before)
    assert relative(output(shallow(model, 1), given), before) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_textbook(name):
    """ASE's code runs the whole network at every exit, and picks for each row that of its time."""
    model = toy(name).train()
    for module in model.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    depths = [layers(model), 1, 1, max(1, layers(model) - 1)]
    schedule = DepthSchedule(tuple(depths), layers(model))
    times = torch.tensor([100.0, 900.0, 300.0, 600.0, 240.0, 250.0])
    given = inputs(model, batch=6) | {"timestep": times / (1000 if name == "flux" else 1)}
    told = dict(given)
    key = "sample" if "sample" in told else "hidden_states"
    sample, timestep = told.pop(key), told.pop("timestep")

    picked = [depths[min(3, int(time) // 250)] for time in times]
    everywhere = {depth: shallow(model, depth)(**given, return_dict=False)[0] for depth in set(depths)}
    expected = torch.stack([everywhere[depth][row] for row, depth in enumerate(picked)])
    gradients = []
    for checkpointing in (False, True):
        (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
        found = predict(model, schedule, sample, timestep, **told)
        assert relative(found.detach(), expected.detach()) < 1e-5
        gradients.append(_gradients(model, found))
    textbook = _gradients(model, expected)
    for own in gradients:
        assert own.keys() == textbook.keys()
        for weight, gradient in own.items():
            assert relative(gradient, textbook[weight]) < 1e-4 or textbook[weight].norm() < 1e-4, weight


def _gradients(model: Any, prediction: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    prediction.square().mean().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def test_offloaded_weights(model):
    """Accelerate's hooks are on the layers, which are shared; that of the whole (PixArt has one) is around a policy."""
    maps = (
        [None]
        if hasattr(model, "down_blocks")
        else [None, LinearExit(noise(model.inner_dim, model.inner_dim), noise(1))]
    )
    given = inputs(model)
    expected = [output(shallow(model, 1, exit_map), given) for exit_map in maps]
    cpu_offload(model, torch.device("cpu"), offload_buffers=True)  # what sequential offload does
    assert next(model.parameters()).is_meta
    for exit_map, picture in zip(maps, expected, strict=True):
        with torch.no_grad():
            if hasattr(model, "_hf_hook"):
                model._hf_hook.pre_forward(model)
            assert torch.equal(shallow(model, 1, exit_map)(**given, return_dict=False)[0], picture)


def test_evaluation_mode_is_followed():
    """DiT drops labels in training mode."""
    model = toy("dit").train()
    leaving = shallow(model, 2)
    model.eval()
    given = inputs(model, batch=8)
    assert torch.equal(output(leaving, given), output(leaving, given))
