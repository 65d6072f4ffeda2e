"""A step has no device sync, few ops, and compiles whole in two graphs."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import diffaccel

CONFIG = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SOLVERS = ["ddim", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc", "unipc_3", "euler"]
SOLVERS += ["deis_tab2", "ipndm", "er_sde_3", "sa_solver", "gradient_estimation", "unipc on eps"]
STAGED = ["heun", "dpmpp_2s", "seeds_2"]


def make(name: str) -> diffaccel.SolverScheduler:
    if name == "unipc on eps":
        return diffaccel.scheduler("unipc", CONFIG, prediction="epsilon")
    return diffaccel.scheduler(name, CONFIG)


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*SOLVERS, *STAGED])
def test_steady_step_costs_at_most_16_ops(name):
    """Also where a step has stages: one call of it is one row. SA-Solver has two more, it corrects with four points."""
    scheduler = make(name)
    scheduler.set_timesteps(10)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(scheduler.timesteps):
        with Ops() as ops:
            x = scheduler.step(x * 0.1, t, x, return_dict=False)[0]
        if i > 4:
            assert len(ops.names) <= (18 if name == "sa_solver" else 16) + 1, ops.names  # + 1: the test's own x * 0.1


@pytest.mark.parametrize("name", [*SOLVERS, *STAGED])
def test_step_moves_nothing_between_host_and_device(name):
    """On a device that cannot be read (meta), a step that reads a value back would raise."""
    scheduler = make(name)
    scheduler.set_timesteps(6, device="meta")
    scheduler.set_begin_index(0)
    x = torch.empty(2, 4, 8, 8, device="meta")
    for t in scheduler.timesteps:
        x = scheduler.step(torch.empty_like(x), t, x, return_dict=False)[0]
    assert scheduler.step_index == 6


@pytest.mark.parametrize("name", [*SOLVERS, *STAGED])
def test_step_compiles_whole_in_two_graphs(name):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    scheduler = make(name)
    scheduler.set_timesteps(20)
    plain = copy.deepcopy(scheduler)

    def guided_step(output, t, x):  # classifier-free guidance and the step, as in a pipeline's loop
        uncond, cond = output.chunk(2)
        return scheduler.step(uncond + 4.0 * (cond - uncond), t, x, return_dict=False)[0]

    compiled = torch.compile(guided_step, fullgraph=True, backend=counter)
    x = y = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        output = torch.cat([x * 0.1, x * 0.12])
        torch.manual_seed(0)
        x = compiled(output, t, x)
        uncond, cond = output.chunk(2)
        torch.manual_seed(0)
        y = plain.step(uncond + 4.0 * (cond - uncond), t, y, return_dict=False)[0]
    assert counter.frame_count <= 2
    assert scheduler.step_index == 20
    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_scheduler_step_itself_compiles():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    scheduler = diffaccel.scheduler("unipc_3", CONFIG)
    scheduler.set_timesteps(20)
    step = torch.compile(scheduler.step, fullgraph=True, backend=counter)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        x = step(x * 0.1, t, x, return_dict=False)[0]
    assert counter.frame_count <= 2
    assert torch.isfinite(x).all()
