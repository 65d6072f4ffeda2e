"""Memory that edits take, and what they report."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from diffaccel import SparseEditConfig, SparseEditPipeline
from tests.kernels.edits import ELSEWHERE, MASK, STEPS, editor, editor_of, inside, other, seed, toy
from tests.tiny import relative


def test_memory_limit() -> None:
    edit, call = editor()
    edit.generate(**call, generator=seed())
    needed = edit.handle.engine.cache.bytes()
    edit.remove()
    calls: list[Tensor] = []
    pipe, _ = toy()
    tight = SparseEditPipeline(pipe, SparseEditConfig(memory_limit=needed - 1))
    pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    with pytest.raises(MemoryError, match=f"the features of {STEPS} network calls take .* MiB"):
        tight.generate(**call, generator=seed())
    assert len(calls) == 1
    assert tight.handle.engine.cache.bytes() == 0
    with pytest.raises(RuntimeError, match="nothing to edit yet"):
        tight.edit(MASK)
    tight.generate(**call | {"num_inference_steps": 2}, generator=seed())
    tight.edit(MASK)
    tight.remove()
    exact = SparseEditPipeline(pipe, SparseEditConfig(memory_limit=needed))
    exact.generate(**call, generator=seed())
    exact.remove()
    half = SparseEditPipeline(pipe, SparseEditConfig(memory_limit=int(needed * 0.6), cache_dtype=torch.float16))
    half.generate(**call, generator=seed())
    half.remove()
    own = SparseEditPipeline(pipe, SparseEditConfig(memory_limit=needed // STEPS, reference="self"))
    own.generate(**call, generator=seed())
    own.edit(MASK)


def test_image_to_image_needs_memory_for_its_own_steps() -> None:
    pipe, call = toy("sd_img2img")
    edit = editor_of(pipe)
    edit.generate(**call, generator=seed())
    needed = edit.handle.engine.cache.bytes()
    edit.remove()
    editor_of(pipe, memory_limit=needed).generate(**call, generator=seed())


def test_half_features() -> None:
    """Features are kept in float16, and outputs are not: outside nothing changes."""
    full, call = editor()
    half, _ = editor(cache_dtype=torch.float16)
    made = full.generate(**call, generator=seed())[0]
    assert torch.equal(half.generate(**call, generator=seed())[0], made)
    sparse, rounded = (edit.edit(MASK, **other(call))[0] for edit in (full, half))
    assert torch.equal(rounded[~inside(made)], made[~inside(made)])
    assert 0 < relative(rounded, sparse) < 1e-2
    assert half.report.memory < 0.6 * full.report.memory


def test_report() -> None:
    pipe, call = toy()
    edit = editor_of(pipe, margin=1)
    call |= {"output_type": "np"}
    before = edit.generate(**call, generator=seed()).images
    after = edit.edit(MASK, strength=0.5, **other(call)).images
    report = edit.report
    assert report.calls == {"replayed": 2, "sparse": 3}
    assert report.share == (4 + 2) ** 2 / 16**2
    assert set(report.call_seconds) == {"reference", "sparse"}
    assert report.speedup == report.dense_seconds / report.seconds
    assert report.speedup_with_reference == report.dense_seconds / (report.seconds + report.reference_seconds)
    change = np.abs(after - before).max(-1)[0]
    grown = np.zeros_like(MASK)
    grown[0:14, 0:16] = True  # 8 pixels around
    assert report.seam == pytest.approx(np.sqrt((change[grown & ~MASK] ** 2).mean()), rel=1e-4)
    assert report.outside is None  # there is nothing as far as that
    assert report.region.draw(edit.pipe.image_processor.numpy_to_pil(before)[0]).size == (16, 16)
    text = str(report)
    for words in ("3 sparse", "2 replayed", "14% of the picture", f"{report.memory / 2**20:,.0f} MiB", "seam: "):
        assert words in text
    assert report.memory == edit.handle.engine.cache.bytes()
    edit.undo()
    edit.edit(MASK, dense=True, **other(call))
    report = edit.report
    assert report.dense_seconds == report.seconds
    assert report.share == 1
    assert report.region is None
    assert "dense" in str(report)
    assert "probe" not in str(report)


def test_time_of_a_dense_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which calls of the reference take 2 seconds, and calls of an edit 1."""
    ticks = itertools.count()
    monkeypatch.setattr("diffaccel.kernels.session.now", lambda: 2 * next(ticks))
    monkeypatch.setattr("diffaccel.kernels.editing.now", lambda: next(ticks))
    edit, call = editor()
    edit.generate(**call, generator=seed())
    edit.edit(MASK, strength=0.5)
    report = edit.report
    assert report.call_seconds == {"reference": 2, "sparse": 1}
    assert report.dense_seconds == pytest.approx(report.seconds + 3)
    edit.edit(ELSEWHERE, dense=True)
    assert edit.report.call_seconds == {"reference": 2, "dense": 1}


def test_report_of_latents() -> None:
    edit, call = editor()
    edit.generate(**call, generator=seed())
    edit.edit(MASK)
    assert edit.report.seam is None
    assert edit.report.outside is None
    assert "seam" not in str(edit.report)
