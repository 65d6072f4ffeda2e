"""Networks that few people have, or in an unusual state: pruned as others, or refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from peft import LoraConfig
from torch import nn

from diffaccel.pruning.calibration import random_calls
from diffaccel.pruning.costs import latency_costs, macs_costs
from diffaccel.pruning.criteria import score
from diffaccel.pruning.find import find_groups
from diffaccel.pruning.inputs import example_inputs
from diffaccel.pruning.picture import draw
from diffaccel.pruning.plan import PruningPlan
from diffaccel.pruning.prune import prune
from diffaccel.pruning.surgery import cut, mask
from diffaccel.pruning.write import probe
from tests.pruning import toys
from tests.pruning.test_cut import cut_and_compare, half

NEURONS = "mid_block.attentions.0.transformer_blocks.0.ff.neurons"


def drawn(model: nn.Module) -> nn.Module:
    """Weights that matter, as those of the toys."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15 if parameter.ndim > 1 else 0.4)
    return model.eval()


def if_like() -> nn.Module:
    """As DeepFloyd IF: attentions with keys of the text added, whose processor counts on the number of heads."""
    return toys.sd15(
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        encoder_hid_dim=8,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        class_embed_type="timestep",
        cross_attention_dim=32,
        resnet_time_scale_shift="scale_shift",
        resnet_skip_time_act=True,
        resnet_out_scale_factor=1.4,
    )


def skips() -> nn.Module:
    """As the networks of NCSN++: skips of the picture itself, ResNets that resample beside the lists of a stage."""
    types = {
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    }
    return toys.unconditional(**types, norm_num_groups=32, block_out_channels=(32, 64), time_embedding_type="fourier")


def gligen() -> nn.Module:
    return toys.sd15(attention_type="gated")


def six_stages() -> nn.Module:
    """As google/ddpm-church-256."""
    down, up = ("DownBlock2D",) * 5 + ("AttnDownBlock2D",), ("AttnUpBlock2D",) + ("UpBlock2D",) * 5
    widths = (16,) * 6
    return toys.unconditional(sample_size=64, block_out_channels=widths, down_block_types=down, up_block_types=up)


def single_flux() -> nn.Module:
    sizes: dict[str, Any] = toys.JOINT | {"attention_head_dim": 8, "axes_dims_rope": (2, 2, 4)}
    return diffusers.FluxTransformer2DModel(patch_size=1, in_channels=16, num_layers=0, num_single_layers=2, **sizes)


RARE = {
    "IF": if_like,
    "NCSN++": skips,
    "class labels": lambda: toys.sd15(num_class_embeds=5),
    "resampling ResNets": lambda: toys.unconditional(downsample_type="resnet", upsample_type="resnet"),
    "Flux without double blocks": single_flux,
}


@pytest.mark.parametrize("name", RARE)
def test_cut_equals_mask(name: str) -> None:
    model = drawn(RARE[name]())
    inputs = example_inputs(model, size=8)
    cut_and_compare(model, inputs, half(model))


def test_heads_whose_processor_counts_on_them_are_refused() -> None:
    groups = find_groups(if_like())
    assert not groups.of("heads")
    assert "as wide as its input" in groups.refused["down_blocks.1.attentions.0"]


def test_a_block_goes_where_the_middle_has_no_attention() -> None:
    model = drawn(toys.sd15(mid_block_type="UNetMidBlock2D"))
    cut_and_compare(model, example_inputs(model, size=8), {"down_blocks.0.attentions.0.transformer_blocks.0": [0]})


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux"])
def test_no_block_left(name: str) -> None:
    model = toys.toy("shared_dit" if name == "dit" else name)
    blocks = {group.name: [0] for group in find_groups(model).of("block")}
    with pytest.raises(ValueError, match="no transformer block would be left"):
        cut(model, PruningPlan.of(model, blocks))


@pytest.mark.parametrize("criterion", ["activation", "flap", "taylor"])
def test_units_that_are_never_called_score_nothing(criterion: str) -> None:
    model = drawn(gligen())  # without boxes the fusers are not called
    groups = [group for group in find_groups(model).of("heads", "neurons") if group.name.startswith("mid_block")]
    scores = score(criterion, model, groups, random_calls(model, 1, size=8))
    assert {name: bool(values.any()) for name, values in scores.items()} == {
        name: ".fuser." not in name for name in scores
    }


@pytest.mark.parametrize("make", [gligen, skips])
def test_places_without_a_colour_of_their_own_are_drawn(make: Callable[[], nn.Module]) -> None:
    model = drawn(make())
    costs = macs_costs(model, list(find_groups(model).found.values()), example_inputs(model, size=8))
    assert draw(model, PruningPlan.of(model, half(model)), costs).size[0] > 100


def test_deep_unets_are_compared_on_latents_that_they_can_halve() -> None:
    assert probe(six_stages()).shape[-1] == 32
    assert probe(toys.toy("sd15")).shape[-1] == 16


@pytest.mark.parametrize("act", ["mask", "score", "time"])
def test_a_network_compiled_in_place_is_refused(act: str) -> None:
    """Its compiled code does not look for new hooks: a mask would do nothing, without a word."""
    model: Any = toys.toy("sd15")
    inputs, groups = example_inputs(model, size=8), list(find_groups(model).found.values())
    plan, calls = PruningPlan.of(model, {NEURONS: range(32)}), random_calls(model, 1, size=8)
    model.mid_block.compile(backend="eager")
    acts = {
        "mask": lambda: mask(model, plan),
        "score": lambda: score("activation", model, groups, calls),
        "time": lambda: latency_costs(model, groups, inputs, runs=1, warmup=0),
    }
    with pytest.raises(ValueError, match="compiled in place"):
        acts[act]()
    assert cut(model, plan)


def test_what_torch_compile_returned_is_refused() -> None:
    with pytest.raises(TypeError, match="give the network itself"):
        prune(torch.compile(toys.toy("sd15"), backend="eager"), 0.9)


def lora(model: Any) -> None:
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))


def wider_input(model: Any) -> None:
    model.conv_in = nn.Conv2d(9, 16, 3, padding=1)


@pytest.mark.parametrize(("change", "name"), [(lora, "to_q"), (wider_input, "conv_in.weight")])
def test_a_network_that_is_not_what_its_config_says(change: Callable[[Any], None], name: str) -> None:
    model = toys.toy("sd15")
    change(model)
    with pytest.raises(ValueError, match=rf"{name}.* is not what its config says"):
        cut(model, PruningPlan.of(model, {NEURONS: range(32)}))


def offloaded(model: Any) -> None:
    accelerate.cpu_offload(model, torch.device("cpu"))


def group_offloaded(model: Any) -> None:
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


def cast(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


@pytest.mark.parametrize("hook", [offloaded, group_offloaded, cast])
def test_weights_that_hooks_fetch_are_refused(hook: Callable[[Any], None]) -> None:
    model = toys.toy("sd15")
    plan = PruningPlan.of(model, {NEURONS: range(32)})
    hook(model)
    for act in (lambda: prune(model, 0.9), lambda: cut(model, plan), lambda: mask(model, plan)):
        with pytest.raises(ValueError, match="moved or cast by hooks"):
            act()


def test_a_network_that_a_pipeline_offloads_whole_is_counted() -> None:
    """As `pipe.enable_model_cpu_offload()`: its hook moves the network, and knows the one before."""
    model, other = toys.toy("sd15"), nn.Linear(1, 1)
    _, hook = accelerate.cpu_offload_with_hook(other, "cpu")
    accelerate.cpu_offload_with_hook(model, "cpu", hook)
    assert prune(model, 0.9).macs == prune(toys.toy("sd15"), 0.9).macs


def test_calls_in_half_precision_score_a_network_in_float32() -> None:
    model: Any = toys.toy("sd15")
    calls = random_calls(model, 1, size=8)
    groups = find_groups(model).of("heads")
    whole = score("taylor", model, groups, calls)
    halves = score("taylor", model, groups, random_calls(model, 1, size=8, dtype=torch.float16))
    for name, values in whole.items():
        assert halves[name] == pytest.approx(values, rel=0.1)


def test_calibration_of_another_kind_and_weights_without_numbers() -> None:
    model = toys.toy("dit")
    groups: Any = find_groups(model).of("heads")
    prompts: Any = ["a cat"]
    with pytest.raises(TypeError, match="not a list"):
        score("taylor", model, groups, prompts)
    with pytest.raises(ValueError, match="on the meta device"):
        score("magnitude", model.to("meta"), groups)
    assert score("random", model, groups)


@pytest.mark.parametrize("act", [mask, cut])
def test_fill_that_no_bias_can_take(act: Callable[..., Any]) -> None:
    model = toys.toy("sd15")
    plan = PruningPlan.of(model, {"mid_block.resnets.0.channels": [0]})
    with pytest.raises(ValueError, match="no Linear with a bias"):
        act(model, plan, {"mid_block.resnets.0.conv2": torch.zeros(32)})
