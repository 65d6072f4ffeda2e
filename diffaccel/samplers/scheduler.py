"""SolverScheduler: the one Diffusers adapter for every solver on every grid, and the named schedulers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffaccel.samplers import config as boundary
from diffaccel.samplers.grid import Final, TimeGrid
from diffaccel.samplers.options import solver_with
from diffaccel.samplers.plan import Layout, Step, is_singlestep, make_plan, table
from diffaccel.samplers.request import requested_grid, strength_calls
from diffaccel.samplers.row import PREDICTION_TYPES, combine, dynamic_threshold, edm_coefficients, x0_coefficients
from diffaccel.samplers.solver import Multistep, Singlestep
from diffaccel.samplers.solvers import SOLVERS

SEARCHED = ("recipe", "cascade", "ratios", "guidance_scale")  # options of searched samplers alone, see `searched.py`
CURSOR_START = 2  # torch.compile keeps an integer of 0 or 1 as a constant, so a step counter must not pass them


@dataclass
class SolverSchedulerOutput(SchedulerOutput):
    """Output of `SolverScheduler.step`.

    Attributes:
        prev_sample: sample at the next node, in the dtype of the model output.
        pred_original_sample: x0 as predicted at this node, float32.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class SolverScheduler(SchedulerMixin, ConfigMixin):
    """Run any solver on any time grid inside a stock Diffusers pipeline.

    `pipe.scheduler = SolverScheduler.from_config(pipe.scheduler.config)` takes over the noise schedule, prediction
    type and spacing of the pipeline's own scheduler, Gaussian (VP), EDM or flow matching. The config keys are those of
    `DPMSolverMultistepScheduler` and `FlowMatchEulerDiscreteScheduler` with their meaning; the one key of ours is
    `solver_options`, a dict of

    - `solver`: a name from `diffaccel list` (this base class only; default `dpmpp_2m`),
    - `schedule`: a spacing that Diffusers has no key for,
    - `timesteps`: `float` (default) tells the network exact times, `integer` rounds them as Diffusers does,
    - `start`: `euler` (default) or `singlestep`, see `make_plan`,
    - `strength`: that of an image-to-image pipeline, to spread the schedule over the noise that is left,
    - `dual_fast`: strength of `DualFast` around a multistep solver,
    - any field of the solver, such as `eta`.

    For every solver `num_inference_steps` is the number of network calls, those inside a step included.

    On the CPU a model output that is not finite raises; elsewhere the check would stall the device and is left out.
    Noise for `eta` > 0 comes from the pipeline's generator, in float32.
    """

    _compatibles: ClassVar[list[str]] = list(boundary.OPENED)
    order = 1  # network calls per entry of `timesteps`
    _leading = "leading"  # the grid that timestep_spacing="leading" means for the Diffusers class this one replaces
    _solver: ClassVar[str | None] = None  # name in `SOLVERS`, for classes of one solver
    _own_options: ClassVar[tuple[str, ...]] = ()  # of `SEARCHED`
    _clips = False  # whether `clip_sample` counts, as it does for the Diffusers class this one replaces
    _always_flow = False  # whether the class is for flow models only

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
        timestep_type: str = "discrete",
        steps_offset: int = 0,
        final_sigmas_type: str = "zero",
        set_alpha_to_one: bool = True,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        sigma_data: float | None = None,
        lambda_min_clipped: float = -float("inf"),
        solver_order: int = 2,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        solver_options: dict[str, Any] | None = None,
    ) -> None:
        if self._always_flow:
            self.register_to_config(prediction_type="flow_prediction")
        elif prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"unknown prediction_type {prediction_type!r}; use {', '.join(PREDICTION_TYPES)}")
        self.schedule = boundary.noise_schedule(self.config)
        if self._options().get("solver") and self._has_own_solver():
            raise ValueError(f"{type(self).__name__} has its own solver; name another one in SolverScheduler's options")
        self.solver = solver_with(self.make_solver(), self._options())
        self._layout = Layout(self.solver.order)
        if self.schedule.path == "vp":
            alpha = np.array([self.schedule.alpha_sigma(lam)[0] for lam in self.schedule.lambdas])
            self.alphas_cumprod = torch.from_numpy(alpha**2).float()
        self.timesteps = torch.from_numpy(self.schedule.times[::-1].astype(np.float32))
        self.num_inference_steps: int | None = None
        self._begin_index: int | None = None
        self._reset()

    # ---- reading the config -----------------------------------------------------------------------------------------
    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Scheduler of this class with the noise schedule and spacing of `config` (`pipe.scheduler.config`).

        Takes the configs of every `KarrasDiffusionSchedulers` member, of the EDM and of the FlowMatch schedulers;
        keyword arguments override keys. Raises `ValueError` or `TypeError` with the reason for anything else.
        """
        overrides = boundary.adopt(config, tuple(c.__name__ for c in (SolverScheduler, *_subclasses(SolverScheduler))))
        options = dict(config.get("solver_options") or {})
        foreign = [key for key in ("solver", *SEARCHED) if key in options and key not in cls._own_options]
        if "solver" in foreign and not cls._has_own_solver():
            foreign.remove("solver")
        if foreign:  # this class has its own
            overrides["solver_options"] = {key: value for key, value in options.items() if key not in foreign} or None
        adopted = cls._adopt(config)
        if adopted.get("solver_options") and kwargs.get("solver_options"):
            kwargs["solver_options"] = adopted["solver_options"] | kwargs["solver_options"]
        return super().from_config(dict(config), return_unused_kwargs, **(overrides | adopted | kwargs))

    @classmethod
    def _adopt(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """What this class alone overrides in a foreign config; raises for configs it has no rule for."""
        return {}

    @property
    def prediction_type(self) -> str:
        """What the network predicts."""
        return self.config["prediction_type"]

    def _options(self) -> dict[str, Any]:
        options = self.config["solver_options"] or {}
        if not isinstance(options, Mapping):
            raise TypeError(f"solver_options must be a dict such as {{'eta': 0.5}}, not {options!r}")
        return dict(options)

    @classmethod
    def _has_own_solver(cls) -> bool:
        return cls._solver is not None or cls.make_solver is not SolverScheduler.make_solver

    def make_solver(self) -> Multistep | Singlestep:
        """Solver that the config asks for, before `solver_options` change its fields."""
        name = self._solver or self._options().get("solver", "dpmpp_2m")
        if name not in SOLVERS:
            raise ValueError(f"unknown solver {name!r}; use {', '.join(SOLVERS)}")
        return SOLVERS[name]

    def _x0_of(self, lam: float) -> tuple[float, float]:
        alpha, sigma = self.schedule.alpha_sigma(lam)
        if self.schedule.path == "ve":
            return edm_coefficients(self.prediction_type, sigma, self.config["sigma_data"])
        return x0_coefficients(self.prediction_type, alpha, sigma)

    # ---- the time grid ----------------------------------------------------------------------------------------------
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Fix the trajectory: `num_inference_steps` network calls, or those at given `timesteps` or `sigmas`.

        Args:
            num_inference_steps: number of network calls, 1 to the number of training timesteps.
            device: where `timesteps` and the coefficients live.
            timesteps: strictly decreasing network times. With `sigmas`, only what the network is told.
            sigmas: strictly decreasing sigma / alpha, or sigma on flow paths, where the shift is applied to them; a
                last 0 may be left out. Such runs end at 0 and tell exact times.
            mu: shift of flow models with dynamic shifting; ignored by those with a static shift.
        """
        grid = requested_grid(
            self.config,
            self.schedule,
            self.solver,
            num_inference_steps,
            timesteps,
            sigmas,
            mu,
            leading=self._leading,
            final=self._final(),
        )
        self._use(grid, device)

    def _use(self, grid: TimeGrid, device: str | torch.device | None = None) -> None:
        """Run on `grid` from here on."""
        self.grid = grid
        self.num_inference_steps = len(grid.timesteps)
        whole = self._options().get("timesteps") == "integer" and np.array_equal(grid.timesteps, grid.timesteps.round())
        told = torch.from_numpy(grid.timesteps.astype(np.int64 if whole and self.schedule.path == "vp" else np.float32))
        self.timesteps = told.to(device)
        self._told = told.double().numpy()
        self.sigmas = torch.from_numpy(self.schedule.sigma_at(grid.lambdas).astype(np.float32))
        self._begin_index = None
        self._reset()
        self._prepare(0)

    def _final(self) -> Final:
        final = self.config["final_sigmas_type"]
        if final not in ("zero", "sigma_min", "corrector"):
            raise ValueError(f"unknown final_sigmas_type {final!r}; use zero, sigma_min or corrector")
        return final

    def _prepare(self, begin: int) -> None:
        """Plan the run from node `begin`; the table of float32 coefficients goes to the device once."""
        self._first = begin
        self._cursor = begin + CURSOR_START
        self._plan = self._make_plan(begin)
        self._rows = self._tabulated()
        self._used = (self._rows != 0).any(0).tolist()  # a column that is zero throughout costs nothing
        self._table = torch.from_numpy(self._rows.astype(np.float32)).to(self.timesteps.device)
        self._staged = is_singlestep(self.solver)
        self._corrects = is_singlestep(self.solver) or self.solver.corrector
        odd = [i for i, s in enumerate(self._plan) if s.again or s.hold or (s.correct and not self._corrects)]
        # Steps that are not like the others: the first ones of a singlestep start, and the last of final="corrector".
        self._odd_start, self._odd_end = 0, len(self._plan)
        if not self._staged and odd:
            if odd[-1] == len(self._plan) - 1 and not self._plan[-1].hold:
                self._odd_end = odd.pop()
            self._odd_start = max(odd, default=-1) + 1
        if self.schedule.path == "ve":
            c_in = [
                (self.schedule.alpha_sigma(v)[1] ** 2 + self.config["sigma_data"] ** 2) ** -0.5
                for v in self.grid.lambdas
            ]
            self._input_scale = torch.tensor(c_in, dtype=torch.float32).to(self.timesteps.device)

    def _make_plan(self, begin: int) -> list[Step]:
        start = self._options().get("start", "euler")
        return make_plan(self.schedule, self.grid, self.solver, self._x0_of, begin=begin, start=start)

    def _tabulated(self) -> np.ndarray:
        """Coefficients of the plan; where x0 is not filtered, what is kept is a combination of sample and output."""
        rows = table(self._plan, self.solver)
        if not self._filters():
            for line in rows:
                (p, q), (a, b) = line[self._layout.x0], line[self._layout.keep]
                line[self._layout.keep] = a + b * p, b * q
        return rows

    def _reset(self) -> None:
        self._started = False
        self._cursor = CURSOR_START
        self._history: list[Tensor] | None = None
        self._anchor: Tensor | None = None

    # ---- where in the run we are ------------------------------------------------------------------------------------
    @property
    def step_index(self) -> int | None:
        """Index of the next step, or None before the first."""
        return self._cursor - CURSOR_START if self._started else None

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, if the pipeline has set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at step `begin_index` (image-to-image); the multistep warm-up starts there too."""
        if self.num_inference_steps is not None:
            if not 0 <= begin_index < self.num_inference_steps:
                raise ValueError(
                    f"begin_index must lie between 0 and {self.num_inference_steps - 1}, not {begin_index}"
                )
            strength = self._options().get("strength", 1.0)
            n = self.num_inference_steps
            if strength != 1 and begin_index != n - strength_calls(self.schedule.path, n, strength):
                raise ValueError(
                    f"the scheduler was made for strength={strength:g}, and the pipeline skips {begin_index} of {n} "
                    "steps; give both the same strength"
                )
            unused = not self._started and begin_index == self._first
            self._reset()
            if unused:
                self._cursor = begin_index + CURSOR_START
            else:
                self._prepare(begin_index)
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """Index of the step made at `timestep`, one of `self.timesteps`; without a device sync where it is a view."""
        index = self._index(timestep)
        if index is None:
            index = self._nearest(float(timestep))
        return index

    def _index(self, timestep: Any) -> int | None:
        """Step index of `timestep`, or None where only a device sync could tell."""
        if isinstance(timestep, Tensor):
            if timestep.numel() != 1:
                return None
            if timestep.untyped_storage().data_ptr() == self.timesteps.untyped_storage().data_ptr():
                return int(timestep.storage_offset() - self.timesteps.storage_offset())
            if timestep.device.type != "cpu":
                return None
        return self._nearest(float(timestep))

    def _nearest(self, timestep: float) -> int:
        distance = np.abs(self._told - timestep)
        if not distance.min() <= np.ptp(self.schedule.times) / self.schedule.count:  # one training timestep
            raise ValueError(
                f"no step is made at timestep {timestep:g}; pass the entries of scheduler.timesteps, which go from "
                f"{self._told[0]:g} to {self._told[-1]:g}"
            )
        # Integer clocks may tell the network the same time twice: prefer the step that is due.
        due = self._cursor - CURSOR_START
        return due if due < len(distance) and distance[due] == distance.min() else int(distance.argmin())

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    # ---- one step ---------------------------------------------------------------------------------------------------
    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the initial noise: 1, or sqrt(sigma_max^2 + 1) for EDM models, as in Diffusers."""
        return (self.config["sigma_max"] ** 2 + 1) ** 0.5 if self.schedule.path == "ve" else 1.0

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """What the network sees of `sample`: the sample itself, or c_in * sample for EDM models."""
        if self.schedule.path != "ve":
            return sample
        if timestep is not None:
            self._start(timestep)
        return sample * self._input_scale[self._cursor - CURSOR_START].to(sample.dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SolverSchedulerOutput | tuple[Tensor]:
        """Sample at the next node, from the network's output at this one.

        Args:
            model_output: what the network predicts (`prediction_type`) at `timestep`, of the shape of `sample`.
            timestep: the entry of `self.timesteps` it was called at.
            sample: the current noisy sample, any float dtype; the step itself is done in float32 (float64 stays).
            generator: source of the noise of stochastic solvers, or a list with one per sample.
            return_dict: return a `SolverSchedulerOutput` instead of a 1-tuple.

        Raises:
            ValueError: before `set_timesteps()`, out of order, past the end, or (on the CPU) for NaN or inf.
        """
        if not torch.compiler.is_compiling():
            self._check_step(model_output, timestep, sample)
        index = self._cursor - CURSOR_START
        dtype = sample.dtype if sample.dtype == torch.float64 else torch.float32
        row, layout, i = self._table[index - self._first].unbind(), self._layout, index - self._first
        x = sample.to(dtype)
        if self._has_learned_variance() and model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output[:, : sample.shape[1]]
        seen = model_output.to(dtype)
        x0 = self._filter(combine(row[layout.x0], (x, seen)))
        kept = x0
        if self.solver.memory != "x0":
            kept = combine(row[layout.keep], (x, x0 if self._filters() else seen))
        odd = self._plan[i] if i < self._odd_start or i >= self._odd_end else None
        older = self._history or [torch.zeros_like(x0) for _ in range(self.solver.order + 1)]
        history = [kept, *(older[1:] if odd and odd.again else older[:-1])]
        redo = self._corrects if odd is None else odd.correct is not None
        if redo and (self._staged or self._anchor is not None):
            # Redo the step that led here, now that the prediction at its end is known, or start over from its start.
            anchor = x if self._anchor is None else self._anchor
            x = self._mix(row, layout.correct, (x, anchor, *history))
        out = self._mix(row, layout.predict, (x, x0, *history[:-1]))
        if self._used[layout.noise]:
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=torch.float32)
            out = torch.addcmul(out, noise.to(dtype), row[layout.noise])
        self._anchor = self._next_anchor(x, row[layout.hold], odd)
        self._history, self._cursor, self._started = history, self._cursor + 1, True
        prev_sample = out.to(model_output.dtype)
        return SolverSchedulerOutput(prev_sample, x0) if return_dict else (prev_sample,)

    def _mix(self, row: Sequence[Tensor], columns: slice, tensors: Sequence[Tensor]) -> Tensor:
        """Sum of the tensors by their columns, without those that no row of the run uses."""
        pairs = [(w, t) for w, t, used in zip(row[columns], tensors, self._used[columns], strict=True) if used]
        return combine(*zip(*pairs, strict=True)) if pairs else torch.zeros_like(tensors[0])

    def _next_anchor(self, x: Tensor, hold: Tensor, odd: Step | None) -> Tensor | None:
        """Sample that a later row of this step, or the correction of it, starts from."""
        if self._staged:
            needed = self._used[self._layout.correct][1]
            return None if not needed else x if self._anchor is None else torch.lerp(x, self._anchor, hold)
        if not self._corrects and not self._odd_start and self._odd_end == len(self._plan):
            return None
        return self._anchor if odd and odd.hold else x

    def _start(self, timestep: float | Tensor) -> None:
        """Before the first step of a run whose begin index was not set: find out which step it is."""
        if self._started:
            return
        if self._begin_index is None:
            begin = self.index_for_timestep(timestep)
            if begin != self._first:
                self._prepare(begin)
        self._started = True

    def _check_step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor) -> None:
        n = self.num_inference_steps
        if n is None:
            raise ValueError("step() was called before set_timesteps(); call scheduler.set_timesteps(n) first")
        self._start(timestep)
        index = self._cursor - CURSOR_START
        if index >= n:
            raise ValueError(f"step() was called after the last of {n} steps; call set_timesteps() to start again")
        given = self._index(timestep)
        if given is not None and given != index:
            raise ValueError(
                f"step() got timestep {float(timestep):g}, but step {index + 1} of {n} is at {self._told[index]:g}; "
                "each step is made once and in order; call set_timesteps() to start again"
            )
        given_shape, shape = tuple(model_output.shape), tuple(sample.shape)
        with_variance = self._has_learned_variance() and given_shape == (shape[0], 2 * shape[1], *shape[2:])
        if given_shape != shape and not with_variance:
            raise ValueError(f"model output and sample must have one shape, not {given_shape} and {shape}")
        if sample.dtype == torch.float64 and self._table.dtype != torch.float64:
            self._table = torch.from_numpy(self._rows)
        self._table = self._table.to(sample.device)
        # float32 sums of finite outputs stay finite, and one NaN or inf among them does not: one cheap reduction.
        if sample.device.type == "cpu" and not math.isfinite(model_output.sum(dtype=torch.float32)):
            raise ValueError(
                f"the model output at step {index + 1} of {n} is not finite (NaN or inf); if the network runs in "
                "float16, try bfloat16 or float32"
            )

    def _has_learned_variance(self) -> bool:
        return self.config["variance_type"] in ("learned", "learned_range")

    def _filters(self) -> bool:
        """Whether x0 is changed before it counts."""
        return bool(self.config["thresholding"] or (self._clips and self.config["clip_sample"]))

    def _filter(self, x0: Tensor) -> Tensor:
        """What becomes of x0 before it enters the history."""
        c = self.config
        if not c["thresholding"]:
            limit = c["clip_sample_range"]
            return x0.clamp(-limit, limit) if self._filters() else x0
        return dynamic_threshold(x0, c["dynamic_thresholding_ratio"], c["sample_max_value"])

    # ---- noising (image-to-image, inpainting, training) -------------------------------------------------------------
    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return alpha * original_samples + sigma * noise at `timesteps`, 0-d or (B,): nodes or any trained time."""
        times = timesteps.cpu().double().reshape(-1).numpy()
        lam = self.schedule.lambda_at(times)
        if self.num_inference_steps is not None:  # the network may be told a node's time rounded: use the node itself
            distance = np.abs(self._told[None] - times[:, None])
            lam = np.where(distance.min(1) == 0, np.asarray(self.grid.lambdas)[distance.argmin(1)], lam)
        pairs = torch.tensor([self.schedule.alpha_sigma(float(v)) for v in lam], dtype=torch.float32)
        alpha, sigma = pairs.to(noise.device, noise.dtype).T.reshape(2, -1, *[1] * (noise.ndim - 1))
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` under the name and argument order that flow pipelines use."""
        return self.add_noise(sample, noise, timestep)


def _subclasses(cls: type) -> list[type]:
    return [s for c in cls.__subclasses__() for s in (c, *_subclasses(c))]
