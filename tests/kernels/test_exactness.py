"""How near sparse edits are to dense ones: strict, bounded, fast, and references of the edit's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.edits import ELSEWHERE, MASK, SIDE, STEPS, editor, inside, other, seed
from tests.tiny import relative

WHOLE: dict[str, Any] = {"margin": SIDE, "norm": "incremental"}  # the region is the picture
TOKENS = ("dit", "pixart", "sd3", "flux")


def counted(edit: Any) -> list[str]:
    """How the network is run from now on: "off" is dense without a trace."""
    modes: list[str] = []
    edit.handle.network.conv_in.register_forward_pre_hook(lambda *given: modes.append(edit.handle.engine.mode))
    return modes


@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp_2m", "heun", "euler ancestral"])
def test_the_whole_picture_is_the_dense_edit(scheduler: str) -> None:
    """Sparse code on all of it, over a whole run."""
    edit, call = editor("sd", scheduler, **WHOLE)
    edit.generate(**call, generator=seed())
    modes = counted(edit)
    sparse = edit.edit(MASK, **other(call))[0]
    assert set(modes) == {"sparse"}
    assert edit.report.share == 1
    edit.undo()
    dense = edit.edit(MASK, **other(call), dense=True)[0]
    assert relative(sparse, dense) < 1e-4
    assert set(modes) == {"sparse", "off"}
    assert edit.report.calls.keys() == {"dense"}


@pytest.mark.parametrize("name", ["sdxl", "sd_img2img", "sd_inpaint", *TOKENS])
def test_also_in_other_networks(name: str) -> None:
    edit, call = editor(name, **WHOLE)
    edit.generate(**call, generator=seed())
    mask = MASK[:8, :8].copy() if name == "dit" else MASK
    sparse = torch.as_tensor(edit.edit(mask, **other(call))[0])
    assert edit.report.calls.keys() == {"sparse"}
    edit.undo()
    assert relative(sparse, torch.as_tensor(edit.edit(mask, **other(call), dense=True)[0])) < 1e-4


def test_strict_is_dense_and_keeps_no_features() -> None:
    strict, call = editor("sd", exactness="strict")
    made = strict.generate(**call, generator=seed())[0]
    fast, _ = editor("sd")
    assert torch.equal(fast.generate(**call, generator=seed())[0], made)
    edited = strict.edit(MASK, **other(call))[0]
    assert torch.equal(edited, fast.edit(MASK, **other(call), dense=True)[0])
    assert strict.report.memory == 0
    assert fast.report.memory > 0
    assert strict.report.calls == {"dense": STEPS}
    assert strict.report.share == 1
    fast.undo()
    assert not torch.equal(edited, fast.edit(MASK, **other(call))[0])
    assert torch.equal(edited[~inside(made)], made[~inside(made)])


def test_fast_is_nearer_with_a_wider_margin() -> None:
    errors = []
    for margin in (1, 4, 8):
        edit, call = editor("sd", margin=margin, norm="incremental")
        edit.generate(**call, generator=seed())
        sparse = edit.edit(MASK, **other(call))[0]
        edit.undo()
        dense = edit.edit(MASK, **other(call), dense=True)[0]
        within = inside(dense)
        errors.append(relative(sparse[within], dense[within]))
    assert errors[0] > errors[1] > errors[2] > 1e-4


@pytest.mark.parametrize("reference", ["record", "self"])
def test_bounded_grows_its_margin(reference: Any) -> None:
    edit, call = editor("sd", exactness="bounded", tolerance=1.0, margin=0, norm="incremental", reference=reference)
    edit.generate(**call, generator=seed())
    edit.edit(MASK, **other(call))
    probes = edit.report.probes
    assert len(probes) == 2  # all within
    rest = {"sparse": 3} if reference == "record" else {"dense": 3}
    assert edit.report.calls == {"probe": 2} | rest
    (first, at_zero, easy), (later, _, _) = probes
    assert at_zero == 0
    assert first < later
    assert 0 < easy < 1
    edit.remove()
    near = easy / 2
    edit, call = editor("sd", exactness="bounded", tolerance=near, margin=0, norm="incremental", reference=reference)
    edit.generate(**call, generator=seed())
    edit.edit(MASK, **other(call))
    probes = edit.report.probes
    assert probes[0] == (first, 0, pytest.approx(easy))
    assert [margin for _, margin, _ in probes[:3]] == [0, 1, 2][: len(probes)]
    last = {step: error for step, _, error in probes}
    assert set(last) == {first, later}
    assert all(error <= near for error in last.values())
    assert f"{probes[-1][2]:.2%}" in str(edit.report)


@pytest.mark.parametrize("above", [1.0, 0.3])
def test_bounded_falls_back_to_dense(above: float) -> None:
    """With statistics of the reference not even the whole picture is exact."""
    edit, call = editor("sd", exactness="bounded", tolerance=1e-9, norm="cached", dense_above=above)
    edit.generate(**call, generator=seed())
    edited = edit.edit(MASK, **other(call))[0]
    assert edit.report.calls == {"probe": 1, "dense": STEPS - 1}
    assert edit.report.note.startswith("ran dense")
    assert edit.report.share == 1
    edit.undo()
    assert torch.equal(edited, edit.edit(MASK, **other(call), dense=True)[0])


def test_record_is_sparse_in_every_step_and_self_dense_in_some() -> None:
    for reference, refresh, expected in (
        ("record", 2, ["sparse"] * 5),
        ("self", 2, ["record", "sparse", "record", "sparse", "record"]),
        ("self", 4, ["record", "sparse", "sparse", "sparse", "record"]),
        ("self", 1, ["record"] * 5),
    ):
        edit, call = editor("sd", reference=reference, refresh=refresh)
        modes = counted(edit)
        edit.generate(**call, generator=seed())
        assert modes == [("record" if reference == "record" else "off")] * 5
        modes.clear()
        edit.edit(MASK, **other(call))
        assert modes == expected
        names = {"record": "dense", "sparse": "sparse"}
        assert edit.report.calls == {names[mode]: expected.count(mode) for mode in set(expected)}
        modes.clear()
        edit.edit(MASK, strength=0.6, **other(call))
        assert modes == expected[:3]
        edit.remove()


def test_self_with_a_refresh_in_every_step_is_the_dense_edit() -> None:
    edit, call = editor("sd", reference="self", refresh=1)
    edit.generate(**call, generator=seed())
    every = edit.edit(MASK, **other(call))[0]
    edit.undo()
    assert torch.equal(every, edit.edit(MASK, **other(call), dense=True)[0])


def test_large_edits_run_dense_and_say_so() -> None:
    for reference in ("record", "self"):
        edit, call = editor("sd", dense_above=0.2, reference=reference)
        edit.generate(**call, generator=seed())
        large = np.zeros_like(MASK)
        large[:8] = True
        edited = edit.edit(large, **other(call))[0]
        assert edit.report.calls == {"dense": STEPS}
        assert "dense_above=0.2" in str(edit.report)
        edit.undo()
        assert torch.equal(edited, edit.edit(large, **other(call), dense=True)[0])
        edit.undo()
        edit.edit(MASK, **other(call))
        assert edit.report.calls["sparse"] > 0
        assert "dense_above" not in str(edit.report)


def test_features_of_a_dense_edit_are_made_by_the_next() -> None:
    """After `dense=True` there are none; after a fall back there are, for sparse edits to go on with."""
    edit, call = editor("sd", **WHOLE)
    edit.generate(**call, generator=seed())
    edit.edit(MASK, **other(call), dense=True)
    once = edit.edit(ELSEWHERE, **other(call))[0]
    assert edit.report.calls == {"dense": STEPS}
    edit.undo()
    assert torch.equal(edit.edit(ELSEWHERE, **other(call))[0], once)
    sparse = edit.edit(MASK)[0]
    assert edit.report.calls == {"sparse": STEPS}
    edit.undo()
    assert relative(sparse, edit.edit(MASK, dense=True)[0]) < 1e-4


def test_features_follow_the_edits() -> None:
    """With a region of the whole picture sparse edits stay the dense ones, one after the other."""
    sparse, call = editor("sd", **WHOLE)
    dense, _ = editor("sd", exactness="strict")
    for edit in (sparse, dense):
        edit.generate(**call, generator=seed())
    for mask, change in ((MASK, other(call)), (ELSEWHERE, {}), (MASK | MASK.T, other(call)), (MASK, {})):
        assert relative(sparse.edit(mask, **change)[0], dense.edit(mask, **change)[0]) < 1e-4
        assert sparse.report.calls == {"sparse": STEPS}
