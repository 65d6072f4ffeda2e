"""A pruned network (width and depth) with everything else that people do with a pipeline."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor

import diffaccel
from diffaccel.pruning.find import find_groups
from diffaccel.pruning.groups import WIDTH
from diffaccel.pruning.inputs import example_inputs
from diffaccel.pruning.lora import remap_lora
from diffaccel.pruning.plan import PruningPlan
from diffaccel.pruning.surgery import cut, mask
from diffaccel.samplers.solvers import SOLVERS as ALL_SOLVERS
from tests import tiny
from tests.tiny import Toy, draw, noise, relative

CLOSE = 1e-5
# More layers than in tests/tiny, so that some can go
DEEPER: dict[str, dict[str, Any]] = {
    "sd": {"layers_per_block": 2},
    "sdxl": {"layers_per_block": 2, "transformer_layers_per_block": [1, 2]},
    "dit": {"num_layers": 3},
    "pixart": {"num_layers": 3},
    "sd3": {"num_layers": 3},
    "flux": {"num_layers": 2, "num_single_layers": 3},
}
DEPTH = {
    "sd": ("down_blocks.1.layer.1", "up_blocks.0.attentions.0.transformer_blocks.0"),
    "sdxl": ("down_blocks.0.layer.1", "up_blocks.0.attentions.1.transformer_blocks.0", "mid_block.attentions.0"),
    "dit": ("transformer_blocks.1",),
    "pixart": ("transformer_blocks.0",),
    "sd3": ("transformer_blocks.2",),
    "flux": ("transformer_blocks.0", "single_transformer_blocks.1"),
}
UNETS, ALL = ("sd", "sdxl"), tuple(DEEPER)
SOLVERS = (
    *("ddim", "dpmpp_3m_sde", "dpm_2s", "unipc", "deis_rho2heun", "ipndm", "seeds_2", "sa_solver", "er_sde_2"),
    *("accelerated_ddpm", "gradient_estimation"),
)


@cache
def original(name: str) -> Any:
    pipe, _ = getattr(tiny, name)()
    stock = denoiser(pipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return type(stock).from_config({**stock.config, **DEEPER[name]}).eval()


def width(model: Any) -> dict[str, range]:
    """Half of the units of every group, and every fifth whole."""
    groups = find_groups(model).of(*WIDTH)
    return {group.name: range(group.units if i % 5 == 2 else group.units // 2) for i, group in enumerate(groups)}


@cache
def plan_of(name: str) -> PruningPlan:
    return PruningPlan.of(original(name), dict.fromkeys(DEPTH[name], (0,)) | width(original(name)))


@cache
def smaller(name: str) -> Any:
    return cut(original(name), plan_of(name))


def pruned(name: str) -> Any:
    return copy.deepcopy(smaller(name))


def denoiser(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def pipeline(name: str, model: Any) -> Toy:
    pipe, call = getattr(tiny, name)()
    pipe = copy.copy(pipe)
    pipe.register_modules(**{"unet" if hasattr(pipe, "unet") else "transformer": model})
    return pipe, call


def inputs(model: Any) -> dict[str, Any]:
    text = {} if "UNet2DModel" in type(model).__name__ or "DiT" in type(model).__name__ else {"text_length": 4}
    return example_inputs(model, **text)


def output(model: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**{**inputs(model), **more}, return_dict=False)[0]


@pytest.fixture(params=ALL)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


# Samplers


@pytest.mark.parametrize("solver", SOLVERS)
def test_samplers(name, solver):
    """The picture of the cut network is that of the masked one."""
    small, whole = pipeline(name, smaller(name)), pipeline(name, original(name))
    picture = draw(small, diffaccel.scheduler(solver, small[0]), 4)
    with mask(original(name), plan_of(name)):
        expected = draw(whole, diffaccel.scheduler(solver, whole[0]), 4)
    assert relative(picture, expected) < 1e-4


def test_every_sampler_of_ours():
    small, whole = pipeline("sd", smaller("sd")), pipeline("sd", original("sd"))
    for solver in sorted(set(ALL_SOLVERS) - set(SOLVERS)):
        picture = draw(small, diffaccel.scheduler(solver, small[0]), 4)
        with mask(original("sd"), plan_of("sd")):
            expected = draw(whole, diffaccel.scheduler(solver, whole[0]), 4)
        assert torch.isfinite(picture).all(), solver
        assert relative(picture, expected) < 1e-3, solver


# ControlNet: residuals for the skips, whose widths pruning does not change


@cache
def controlled() -> tuple[Any, tuple[Tensor, ...], Tensor]:
    """A U-Net with three layers in its last stage, and residuals for its skips and its middle."""
    config = original("sd").config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = diffusers.UNet2DConditionModel.from_config({**config, "layers_per_block": [2, 3]}).eval()
    batch = inputs(model)["sample"].shape[0]
    sizes = [(8, 8)] * 3 + [(8, 4)] + [(16, 4)] * 3  # conv_in, two layers and the downsampler, three layers
    skips = tuple(noise(batch, channels, side, side, seed=i) for i, (channels, side) in enumerate(sizes))
    return model, skips, noise(batch, 16, 4, 4, seed=9)


def with_control(model: Any, skips: tuple[Tensor, ...], middle: Tensor) -> Tensor:
    return output(model, down_block_additional_residuals=skips, mid_block_additional_residual=middle)


@pytest.mark.parametrize(
    "removed",
    [
        None,
        {"down_blocks.1.attentions.0": [0], "up_blocks.0.attentions.2": [0]},
        {"down_blocks.0.resnets.1.body": [0]},
        {"mid_block": [0]},
    ],
    ids=["width", "transformers", "bodies", "middle"],
)
def test_controlnet(removed):
    model, skips, middle = controlled()
    plan = PruningPlan.of(model, width(model) if removed is None else removed)
    with mask(model, plan):
        expected = with_control(model, skips, middle)
    assert relative(with_control(cut(model, plan), skips, middle), expected) < CLOSE


@pytest.mark.parametrize(("stage", "layer", "gone"), [(0, 1, 1), (1, 1, 4), (1, 2, 5)])
def test_controlnet_and_layers(stage, layer, gone):
    """Without a layer there is a skip less. Diffusers pairs skips and residuals from the front and drops the last one.

    In the last stage that is silent (all have one shape), in others shapes do not fit and it raises. Without the
    residual of the layer before the removed one, whose skip the removed partner took, all is as with the mask.
    """
    model, skips, middle = controlled()
    plan = PruningPlan.of(model, {f"down_blocks.{stage}.layer.{layer}": [0]})
    smaller = cut(model, plan)
    with mask(model, plan):
        expected = with_control(model, skips, middle)
    assert relative(with_control(smaller, skips[:gone] + skips[gone + 1 :], middle), expected) < CLOSE
    if stage == 0:
        with pytest.raises(RuntimeError, match="must match the size"):
            with_control(smaller, skips, middle)
    else:
        assert relative(with_control(smaller, skips, middle), expected) > 1e-2


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_controlnet_of_transformers(kind):
    """Exact for width. Blocks share residuals by number and count: with fewer blocks others share, silently."""
    model = original(kind)
    tokens = model(**inputs(model), return_dict=False)[0].shape[1] if kind == "flux" else 64
    residuals = [noise(inputs(model)["hidden_states"].shape[0], tokens, model.inner_dim, seed=i) for i in range(2)]
    control = {"controlnet_block_samples" if kind == "flux" else "block_controlnet_hidden_states": residuals}
    narrow = PruningPlan.of(model, width(model))
    with mask(model, narrow):
        expected = output(model, **control)
    assert relative(output(cut(model, narrow), **control), expected) < CLOSE
    shallow = PruningPlan.of(model, {"transformer_blocks.0": [0]})
    with mask(model, shallow):
        expected = output(model, **control)
    assert relative(output(cut(model, shallow), **control), expected) > 1e-3


# Adapters


def test_lora_in_a_pipeline():
    pytest.importorskip("peft")
    key = "unet.up_blocks.0.attentions.2.proj_in"
    lora = {f"{key}.lora_A.weight": noise(2, 16, 1, 1, seed=1), f"{key}.lora_B.weight": noise(16, 2, 1, 1, seed=2)}
    pipe, call = pipeline("sd", pruned("sd"))
    before = draw((pipe, call), pipe.scheduler, 2)
    pipe.load_lora_weights(remap_lora(lora, plan_of("sd")))
    after = draw((pipe, call), pipe.scheduler, 2)
    assert relative(after, before) > 1e-3
    pipe.unload_lora_weights()
    assert torch.equal(draw((pipe, call), pipe.scheduler, 2), before)


def ip_adapter(model: Any) -> list[dict[str, dict[str, Tensor]]]:
    projection = {"proj.weight": noise(32, 6), "proj.bias": noise(32), "norm.weight": noise(8), "norm.bias": noise(8)}
    cross = [key for key in model.attn_processors if "attn2" in key]
    layers = {
        f"{2 * i + 1}.{key}.weight": noise(16, 8, seed=i) for i, _ in enumerate(cross) for key in ("to_k_ip", "to_v_ip")
    }
    return [{"image_proj": projection, "ip_adapter": layers}]


def test_ip_adapter_needs_all_heads():
    """Its keys are for every head of the original; Diffusers would reshape them into more tokens for fewer heads."""
    model = original("sd")
    with pytest.raises(ValueError, match="an IP-Adapter is for all heads and blocks of the original"):
        pruned("sd")._load_ip_adapter_weights(ip_adapter(model))
    neurons = {group.name: range(group.units // 2) for group in find_groups(model).of("neurons")}
    plan = PruningPlan.of(model, neurons)
    smaller, whole = cut(model, plan), copy.deepcopy(model)
    arguments = inputs(model)  # before there is an adapter, which takes pictures
    arguments["added_cond_kwargs"] = {"image_embeds": [noise(arguments["sample"].shape[0], 1, 6)]}
    with torch.no_grad(), mask(whole, plan):
        smaller._load_ip_adapter_weights(ip_adapter(model))
        whole._load_ip_adapter_weights(ip_adapter(model))
        assert relative(smaller(**arguments)[0], whole(**arguments)[0]) < CLOSE


def test_network_with_an_ip_adapter_is_not_pruned_at_its_heads():
    model = copy.deepcopy(original("sd"))
    model._load_ip_adapter_weights(ip_adapter(model))
    with pytest.raises(ValueError, match="has a processor with weights"):
        PruningPlan.of(model, {"mid_block.attentions.0.transformer_blocks.0.attn2.heads": [0]})


# Speed and memory


@pytest.mark.parametrize("kind", ["sd", "pixart", "sd3"])
def test_compile_in_one_graph(kind):
    torch._dynamo.reset()
    model = pruned(kind)
    expected = output(model)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    with torch.no_grad():
        assert relative(compiled(**inputs(model), return_dict=False)[0], expected) < CLOSE  # type: ignore[operator]


def test_compile_repeated_blocks():
    torch._dynamo.reset()
    model = pruned("flux")
    expected = output(model)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert relative(output(model), expected) < CLOSE


def test_gradient_checkpointing(name):
    """The same gradients; every parameter that acts has one."""
    gradients = []
    for checkpointing in (False, True):
        model = pruned(name).train()
        (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # dropout of class labels
            model(**inputs(model), return_dict=False)[0].square().mean().backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    plain, saved = gradients
    assert sum(gradient is not None for gradient in plain.values()) > 0.9 * len(
        plain
    )  # norms before constants have none
    for key, gradient in plain.items():
        assert (gradient is None) == (saved[key] is None)
        assert gradient is None or torch.allclose(gradient, saved[key], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype, tmp_path):
    """Loaded so; it is off by what rounding does to the whole network."""
    errors = []
    for model in (pruned(name), original(name)):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        half = type(model).from_pretrained(folder, dtype=dtype)
        assert {parameter.dtype for parameter in half.parameters()} == {dtype}
        arguments = {"dtype": dtype} | ({} if name == "dit" else {"text_length": 4})
        with torch.no_grad():
            result = half(**example_inputs(half, **arguments), return_dict=False)[0]
        errors.append(relative(result, output(model)))
    assert errors[0] < 5 * max(errors[1], 1e-3)


def test_offload(name):
    model = pruned(name)
    arguments, expected = inputs(model), output(model)
    cpu_offload(model, torch.device("cpu"), offload_buffers=True)  # what sequential offload does
    with torch.no_grad():
        assert relative(model(**arguments, return_dict=False)[0], expected) < CLOSE


def test_offload_of_a_pipeline(name):
    pipe, call = pipeline(name, pruned(name))
    expected = draw((pipe, call), pipe.scheduler, 2)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(draw((pipe, call), pipe.scheduler, 2), expected)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload(name, kind):
    model = pruned(name)
    expected = output(model)
    if not model._supports_group_offloading:
        pytest.skip(f"Diffusers has none for {type(original(name)).__name__}")
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **blocks)
    assert relative(output(model), expected) < CLOSE


def test_layerwise_casting(name):
    """Stored in 8 bits, computed in 32: off by as much as the whole network."""
    errors = []
    for model in (pruned(name), copy.deepcopy(original(name))):
        expected = output(model)
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        errors.append(relative(output(model), expected))
    assert 0 < errors[0] < 3 * errors[1]


def test_copies_share_nothing(name):
    model = pruned(name)
    again, expected = copy.deepcopy(model), output(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(output(again), expected)


@pytest.mark.parametrize("size", ["auto", "max", 1])
@pytest.mark.parametrize("kind", UNETS)
def test_attention_slicing(kind, size):
    model = pruned(kind)
    expected = output(model)
    model.set_attention_slice(size)
    assert relative(output(model), expected) < CLOSE


def test_fused_projections(name):
    model = pruned(name)
    if not hasattr(model, "fuse_qkv_projections"):
        pytest.skip(f"Diffusers has none for {type(original(name)).__name__}")
    expected = output(model)
    model.fuse_qkv_projections()
    assert relative(output(model), expected) < CLOSE
    with pytest.raises(ValueError, match="has fused projections"):
        PruningPlan.of(model, {group: [0] for group in find_groups_of_heads(name)})
    model.unfuse_qkv_projections()
    assert torch.equal(output(model), expected)


def find_groups_of_heads(name: str) -> list[str]:
    return [group.name for group in find_groups(pruned(name)).of("heads") if group.units > 0]


@pytest.mark.parametrize("kind", UNETS)
def test_freeu(kind):
    small, whole = pipeline(kind, pruned(kind)), pipeline(kind, copy.deepcopy(original(kind)))
    plain = draw(small, small[0].scheduler, 2)
    for pipe, _ in (small, whole):
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    picture = draw(small, small[0].scheduler, 2)
    assert relative(picture, plain) > 1e-3
    narrow = PruningPlan.of(original(kind), width(original(kind)))
    small[0].unet = cut(original(kind), narrow)
    small[0].enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with mask(whole[0].unet, narrow):
        assert relative(draw(small, small[0].scheduler, 2), draw(whole, whole[0].scheduler, 2)) < 1e-4


# Pruning again


@pytest.mark.parametrize("more", ["single_transformer_blocks.0.neurons", "single_transformer_blocks.1.attn.heads"])
def test_flux_again_after_a_block_has_lost_all_heads(more):
    model = original("flux")
    once = cut(model, PruningPlan.of(model, {"single_transformer_blocks.0.attn.heads": [0, 1]}))
    plan = PruningPlan.of(once, {more: [0]})
    with mask(once, plan):
        expected = output(once)
    assert relative(output(cut(once, plan)), expected) < CLOSE


# Saving and loading


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"low_cpu_mem_usage": False},
        {"device_map": {"": "cpu"}},
        {"device_map": "auto"},
    ],
    ids=str,
)
def test_shards(name, how, tmp_path):
    model = pruned(name)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    if how.get("device_map") == "auto" and not model._no_split_modules:
        pytest.skip(f"Diffusers has none for {type(original(name)).__name__}")
    again = type(model).from_pretrained(tmp_path, **how)
    assert relative(output(again), output(model)) < CLOSE


FRESH = """
import sys, torch, diffaccel
from diffusers import AutoModel, DiffusionPipeline
for folder, part, file in zip(*[iter(sys.argv[1:])] * 3):
    pipe = DiffusionPipeline.from_pretrained(folder, variant="fp16")
    alone = AutoModel.from_pretrained(folder, subfolder=part, variant="fp16")
    assert type(alone) is type(getattr(pipe, part)) and type(alone).__name__.startswith("Pruned")
    inputs, expected = torch.load(file, weights_only=True)
    with torch.no_grad():
        for model in (alone, getattr(pipe, part)):
            result = model(**inputs, return_dict=False)[0]
            assert (result - expected).norm() < 1e-5 * expected.norm()
    print(type(alone).__name__)
"""


def test_fresh_process_with_import_diffaccel_alone(tmp_path):
    """Whole pipelines, with a variant in the names of the files; `diffaccel.pruning` is not imported by hand."""
    arguments = []
    for kind in ("sdxl", "dit", "pixart"):
        model = pruned(kind)
        pipe, _ = pipeline(kind, model)
        pipe.save_pretrained(tmp_path / kind, variant="fp16")
        torch.save((inputs(model), output(model)), tmp_path / f"{kind}.pt")
        arguments += [str(tmp_path / kind), "unet" if kind == "sdxl" else "transformer", str(tmp_path / f"{kind}.pt")]
    command = [sys.executable, "-c", FRESH, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(diffaccel.__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "PrunedUNet2DConditionModel",
        "PrunedDiTTransformer2DModel",
        "PrunedPixArtTransformer2DModel",
    ]


def test_quantised_while_loading(name, tmp_path):
    """int8 weights: off by as much as the whole network. (torchao cannot quantise layers without features, as Flux's
    `proj_mlp` without neurons.)
    """
    quantization = pytest.importorskip("torchao.quantization")
    config = diffusers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    errors = []
    whole = original(name)
    half = {group.name: range(group.units // 2) for group in find_groups(whole).of(*WIDTH)}
    plan = PruningPlan.of(whole, half | dict.fromkeys(DEPTH[name], (0,)))
    for model in (cut(whole, plan), whole):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder, quantization_config=config)
        errors.append(relative(output(loaded), output(model)))
    assert 0 < errors[0] < 3 * errors[1]
