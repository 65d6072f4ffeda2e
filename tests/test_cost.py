"""MACs against hand counts, latency against a clock that is set by hand, network calls against what was called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import diffaccel
from diffaccel import cost
from diffaccel.cost import PeakMemory, latency, macs, macs_by_module, network_calls, parameters, peak_memory
from tests.tiny import dit, noise, sd, svd

CROSS_ATTENTION_UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


class Attention(nn.Module):
    """Queries from one sequence, keys and values from another, with the kernel that PyTorch picks."""

    def __init__(self, masked: bool = False) -> None:
        super().__init__()
        self.masked = masked

    def forward(self, q: Tensor, kv: Tensor) -> Tensor:
        mask = torch.ones(q.shape[-2], kv.shape[-2], dtype=torch.bool, device=q.device) if self.masked else None
        return F.scaled_dot_product_attention(q, kv, kv, attn_mask=mask)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_counted(device: str, masked: bool, dtype: torch.dtype) -> None:
    q, kv = (torch.ones(2, 3, tokens, 16, device=device, dtype=dtype) for tokens in (8, 24))
    products = 2 * 3 * (8 * 24 * 16)  # batch * heads * (queries * keys * width), once for Q K^T and once for A V
    assert macs(Attention(masked), q, kv) == 2 * products


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layers_match_hand_counts(device: str) -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.Flatten(), nn.Linear(6 * 4 * 4, 5))
    x = torch.ones(7, 4, 8, 8, device=device)
    conv = 7 * 6 * 4 * 4 * (4 // 2) * 3 * 3  # batch * outputs * inputs of a group * kernel
    linear = 7 * 96 * 5
    counted = macs_by_module(net.to(device), x)
    assert counted[""] == conv + linear
    assert (counted["0"], counted["2"]) == (conv, linear)


def test_parts_of_a_unet_sum_to_the_whole() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**CROSS_ATTENTION_UNET)
        counted = macs_by_module(unet, torch.empty(2, 4, 8, 8), torch.tensor(1), torch.empty(2, 4, 8))
    assert counted[""] == sum(count for name, count in counted.items() if name and "." not in name) + sum(
        counted.get(name, 0) for name in ("down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1")
    )


def test_meta_and_cpu_agree_on_a_unet() -> None:
    def count(device: str) -> int:
        with torch.device(device):
            unet = UNet2DConditionModel(**CROSS_ATTENTION_UNET)
            return macs(unet, torch.zeros(2, 4, 8, 8), torch.tensor(1), torch.zeros(2, 4, 8))

    assert count("cpu") == count("meta")


@pytest.mark.slow
def test_stable_diffusion_has_its_published_cost() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        cost = macs(unet, torch.empty(1, 4, 64, 64), torch.tensor(1), torch.empty(1, 77, 768))
    assert parameters(unet) == 859_520_964
    # BK-SDM (arXiv:2305.15798, table 1) gives 339 G without the attention products; they are 62 G more
    assert cost == pytest.approx(339e9 + 62.4e9, rel=0.01)


def test_a_pipeline_costs_its_network_calls_and_its_vae() -> None:
    pipe, arguments = dit()
    call = macs(pipe, **arguments, num_inference_steps=3)
    rows = noise(2, 4, 8, 8)  # guidance
    network = macs(pipe.transformer, rows, timestep=torch.ones(2), class_labels=torch.ones(2, dtype=torch.long))
    assert call == 3 * network + macs(pipe.vae.decode, noise(1, 4, 8, 8))


def test_counting_leaves_no_gradient() -> None:
    net = nn.Linear(3, 4)
    macs(net, torch.ones(2, 3, requires_grad=True))
    assert net.weight.grad is None


def test_shared_parameters_count_once() -> None:
    layer = nn.Linear(3, 4)
    assert parameters(nn.Sequential(layer, nn.ReLU(), layer)) == 3 * 4 + 4


def test_latency_leaves_out_the_warm_up() -> None:
    now, calls = [0.0], []

    def work() -> None:
        calls.append(1)
        now[0] += 100.0 if len(calls) <= 2 else float(len(calls) - 2)  # then 1, 2, 3, 4, 5 seconds

    timed = latency(work, warmup=2, runs=5, clock=lambda: now[0])
    assert len(calls) == 7
    assert (timed.median, timed.p20, timed.p80, timed.p95, timed.runs) == pytest.approx((3.0, 1.8, 4.2, 4.8, 5))


@pytest.mark.parametrize(("runs", "warmup"), [(0, 1), (1, -1)])
def test_latency_refuses_to_time_nothing(runs: int, warmup: int) -> None:
    with pytest.raises(ValueError, match="runs >= 1"):
        latency(lambda: None, runs=runs, warmup=warmup)


MEGABYTES = 64


PEAKS = f"""
import torch
from diffaccel.cost import peak_memory
for megabytes in (1, {MEGABYTES}, 1):
    with peak_memory() as peak:
        torch.ones(megabytes * 2**20, dtype=torch.uint8)
    print("peak", peak.resident)
"""


def test_peak_memory_is_that_of_the_block() -> None:
    """In a process of its own: a long one has free memory of its allocator's left, in which the block finds room."""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", PEAKS], capture_output=True, text=True, check=True)
    peaks = [line.split()[1] for line in run.stdout.splitlines() if line.startswith("peak ")]
    if "None" in peaks:
        pytest.skip("this system does not reset a process's peak")
    before, high, after = map(int, peaks)
    assert high - before > (MEGABYTES - 8) * 2**20
    assert high - after > (MEGABYTES - 8) * 2**20, "a peak from before the block"


def test_peak_memory_of_systems_that_do_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cost, "_PROCESS", tmp_path / "nothing")
    with peak_memory() as peak:
        pass
    assert peak == PeakMemory()
    monkeypatch.setattr(cost, "_PROCESS", tmp_path)
    (tmp_path / "status").write_text("VmPeak:\t  99 kB\nVmHWM:\t  12 kB\nVmRSS:\t   7 kB\n")
    with peak_memory() as peak:
        assert (tmp_path / "clear_refs").read_text() == "5"
    assert peak == PeakMemory(resident=12 * 1024)


def test_peak_memory_of_all_gpus_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated, reserved, emptied = {0: 500, 1: 500}, {0: 900, 1: 900}, []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(dict(allocated)))
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda i: (allocated.update({i: 10}), reserved.update({i: 20}))
    )
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", allocated.__getitem__)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", reserved.__getitem__)
    with peak_memory() as peak:
        assert emptied == [{0: 500, 1: 500}], "blocks are given back before the peaks are reset"
        allocated[1], reserved[0] = 70, 80
    assert (peak.allocated, peak.reserved) == (10 + 70, 80 + 20)


def test_guided_calls_see_two_rows_a_sample() -> None:
    pipe, arguments = sd()
    pipe.scheduler = diffaccel.scheduler("dpmpp_2m", pipe)
    with network_calls(pipe) as count:
        pipe(**arguments, num_inference_steps=3)
    assert (count.calls, count.rows) == (3, 6)
    pipe(**arguments, num_inference_steps=2)
    assert count.calls == 3, "calls after the block are not counted"


def test_video_pipelines_are_counted_too() -> None:
    pipe, arguments = svd()
    pipe.scheduler = diffaccel.scheduler("euler", pipe)
    with network_calls(pipe) as count:
        pipe(**arguments, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert (count.calls, count.by_name) == (2, {"unet": 2})


def test_calls_are_counted_when_the_run_fails() -> None:
    pipe, _ = sd()
    with pytest.raises(RuntimeError), network_calls(pipe) as count:
        pipe.unet(noise(1, 5, 8, 8), 1, noise(1, 4, 8))  # one channel too many
    assert count.calls == 1
    assert not pipe.unet._forward_pre_hooks


def test_pipelines_without_a_denoiser_are_refused() -> None:
    with pytest.raises(TypeError, match="no network to count"), network_calls(object()):
        pass
