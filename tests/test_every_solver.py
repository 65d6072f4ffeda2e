"""Every solver in every kind of pipeline: it runs, calls the network as often as asked, and repeats itself exactly."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch

import diffaccel
from diffaccel.cost import network_calls
from diffaccel.samplers.catalog import SOLVERS
from tests import tiny
from tests.tiny import Toy, draw

PIPELINES = [
    *(tiny.sd, tiny.sd_img2img, tiny.sd_inpaint, tiny.sdxl, tiny.playground, tiny.dit, tiny.pixart),
    *(tiny.sana, tiny.sd3, tiny.flux, tiny.flux_img2img, tiny.wan),
]


@pytest.mark.parametrize("name", sorted(SOLVERS))
@pytest.mark.parametrize("toy", PIPELINES, ids=operator.attrgetter("__name__"))
def test_every_solver_runs_in_every_pipeline(toy: Callable[[], Toy], name: str) -> None:
    for steps in (6, 5):  # solvers of two or three stages a step divide the one, not the other
        pipe, call = toy()
        scheduler = diffaccel.scheduler(name, pipe)
        with network_calls(pipe) as count:
            picture = draw((pipe, call), scheduler, steps)
        assert picture.isfinite().all()
        skipped = scheduler.begin_index or 0  # image-to-image: `strength` leaves out the first steps
        guided = 2 if toy is tiny.wan else 1  # Wan's guidance is a call of its own
        assert count.calls == guided * (steps - skipped)
        assert (skipped > 0) == ("img2img" in toy.__name__ or "inpaint" in toy.__name__)
    assert torch.equal(draw(toy(), scheduler, steps), picture)
