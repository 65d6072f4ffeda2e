"""SIGE's rule on small networks, its masks and tiles, and the benchmark that compares with it."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

FOLDER = Path(__file__).parents[2] / "benchmarks"
SMALL: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports the benchmarks by name, and forgets their plain names afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "").parent == FOLDER:
            del sys.modules[name]


def ddpm() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    network = UNet2DModel(
        **SMALL, sample_size=32, down_block_types=down, up_block_types=up, downsample_padding=0, attention_head_dim=8
    )
    return network.eval(), {"sample": torch.randn(2, 3, 32, 32), "timestep": torch.tensor(500)}


def sd() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    network = UNet2DConditionModel(
        **SMALL, sample_size=32, down_block_types=down, up_block_types=up, cross_attention_dim=8, attention_head_dim=2
    )
    text = torch.randn(2, 5, 8)
    arguments = {"sample": torch.randn(2, 4, 32, 32), "timestep": torch.tensor(500), "encoder_hidden_states": text}
    return network.eval(), arguments


CASES = pytest.mark.parametrize(("make", "setting"), [(ddpm, "ddpm"), (sd, "sd")])


def mask(picture: int = 32) -> Tensor:
    painted = torch.zeros(picture, picture, dtype=torch.bool)
    painted[picture // 4 + 1 : picture // 2, picture // 3 : picture // 2 + 3] = True
    return painted


def changed(arguments: dict[str, Any], where: Tensor) -> dict[str, Any]:
    torch.manual_seed(1)
    return arguments | {"sample": torch.where(where, torch.randn_like(arguments["sample"]), arguments["sample"])}


@CASES
@torch.no_grad()
def test_same_input_gives_the_recorded_result(bench: Any, make: Any, setting: str) -> None:
    network, arguments = make()
    rule = bench("sige_rule").SigeRule(network, setting, sparse_from=32)
    plain = network(**arguments).sample
    with rule.record():
        assert torch.equal(network(**arguments).sample, plain)
    with rule.edit(mask()):
        torch.testing.assert_close(network(**arguments).sample, plain, rtol=0, atol=2e-6)
    rule.remove()
    assert torch.equal(network(**arguments).sample, plain)
    assert not any(module._forward_hooks for module in network.modules())


@CASES
@torch.no_grad()
def test_full_mask_differs_by_group_norm_alone(bench: Any, make: Any, setting: str) -> None:
    network, arguments = make()
    everywhere = torch.ones(32, 32, dtype=torch.bool)
    new = changed(arguments, everywhere)
    rule = bench("sige_rule").SigeRule(network, setting, sparse_from=32)

    def error() -> float:
        with rule.record():
            network(**arguments)
        with rule.edit(everywhere):
            edited = network(**new).sample
        dense = network(**new).sample
        return float((edited - dense).norm() / dense.norm())

    assert error() > 1e-3
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    assert error() < 1e-6


@CASES
@torch.no_grad()
def test_a_local_edit_is_near_the_dense_result_and_recorded_far_away(bench: Any, make: Any, setting: str) -> None:
    network, arguments = make()
    where = mask()
    rule = bench("sige_rule").SigeRule(network, setting, sparse_from=32)
    with rule.record():
        recorded = network(**arguments).sample
    new = changed(arguments, where)
    seen: dict[str, Tensor] = {}
    last = network.up_blocks[-1].resnets[-1].conv2
    # After the rule's hook: what conv_norm_out will see outside of the tiles is the recorded map.
    hook = last.register_forward_hook(lambda module, args, out: seen.update(out=out))
    with rule.record():
        network(**arguments)
    kept = seen["out"]
    with rule.edit(where):
        edited = network(**new).sample
    hook.remove()
    dense = network(**new).sample
    inside = float((edited - dense)[..., where].norm() / dense[..., where].norm())
    nothing = float((recorded - dense)[..., where].norm() / dense[..., where].norm())
    assert inside < 0.5 * nothing
    tiles = bench("sige_rule").active(rule._masks[32], 3, 1, 1)[:32, :32]
    assert tiles.any()
    assert not tiles.all()
    assert torch.equal(seen["out"][..., ~tiles], kept[..., ~tiles])
    assert not torch.equal(seen["out"][..., tiles], kept[..., tiles])


def test_dilation_is_a_plus(bench: Any) -> None:
    point = torch.zeros(7, 7, dtype=torch.bool)
    point[3, 3] = True
    grown = bench("sige_rule").dilated(point, 2)
    expected = torch.zeros(7, 7, dtype=torch.bool)
    expected[1:6, 3] = expected[3, 1:6] = True
    assert torch.equal(grown, expected)


def test_pyramid_halves_by_bilinear_interpolation_and_dilates_each_level(bench: Any) -> None:
    rule, painted = bench("sige_rule"), mask(64)
    masks, share = rule.pyramid(painted), painted[None, None].float()
    assert sorted(masks) == [4, 8, 16, 32, 64]
    for rows in (64, 32, 16, 8, 4):
        assert torch.equal(masks[rows], rule.dilated(share[0, 0] > min(0.3, float(share.max()) - 1e-3), 1))
        share = F.interpolate(share, (rows // 2, rows // 2), mode="bilinear", align_corners=False)


def test_a_single_pixel_stays_in_every_level(bench: Any) -> None:
    point = torch.zeros(64, 64, dtype=torch.bool)
    point[37, 21] = True
    assert all(level.any() for level in bench("sige_rule").pyramid(point).values())


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (1, 1, 0), (3, 2, 1), (3, 2, 0)])
def test_a_tile_is_new_where_its_input_window_touches_the_mask(
    bench: Any, kernel: int, stride: int, padding: int
) -> None:
    torch.manual_seed(0)
    painted = torch.rand(32, 32) > 0.99
    rows, tile = 32 // stride, 4 // stride
    found = bench("sige_rule").active(painted, kernel, stride, padding)[:rows, :rows]
    window = (tile - 1) * stride + kernel
    for y in range(0, rows, tile):
        for x in range(0, rows, tile):
            top, left = y * stride - padding, x * stride - padding
            read = painted[max(0, top) : top + window, max(0, left) : left + window]
            assert found[y : y + tile, x : x + tile].unique().tolist() == [bool(read.any())]


def test_benchmark_runs_small(bench: Any, tmp_path: Path) -> None:
    bench("sparse_edit").main(["--dry-run", "--rounds", "1", "--threads", "1", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "sparse_edit_ddpm256_torch.json").read_text("utf-8"))
    assert [edit["share"] for edit in found["edits"]] == [0.05, 0.35]
    assert found["edits"][0]["sige"]["same_input"] < 1e-5
    assert {row["norm"] for row in found["edits"][0]["curve"]} >= {"cached", "incremental"}
    assert str(tmp_path) not in json.dumps(found)
    text = (tmp_path / "sparse_edit.md").read_text("utf-8")
    assert "small DDPM, random weights" in text
    assert "small SD, random weights" in text
    assert (tmp_path / "sparse_edit.png").stat().st_size > 10_000


def test_chosen_is_the_cheapest_that_is_exact_enough(bench: Any) -> None:
    rows = [{"ring": e, "macs": m} for e, m in ((0.2, 1), (0.1, 5), (0.05, 4), (0.01, 9))]
    assert bench("sparse_edit").chosen(rows, {"ring": 0.1}, "ring") == {"ring": 0.05, "macs": 4}
    assert bench("sparse_edit").chosen(rows, {"ring": 0.001}, "ring") is None
