"""The named schedulers: one Diffusers class each that they replace, and the solver its config asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from diffaccel.samplers.config import is_flow
from diffaccel.samplers.exponential import ExponentialAdams, SecondOrder
from diffaccel.samplers.exponential_runge_kutta import ExponentialRungeKutta
from diffaccel.samplers.grid import Final
from diffaccel.samplers.scheduler import SolverScheduler
from diffaccel.samplers.solver import ALWAYS, Multistep, Singlestep
from diffaccel.samplers.solvers import SOLVERS


def _second_order(solver_type: str, own: str) -> SecondOrder:
    """Rule of Diffusers' `solver_type`; other families' values than `own` mean the default, as in Diffusers."""
    known = ("midpoint", "heun", "bh1", "bh2")
    if solver_type not in known:
        raise ValueError(f"unknown solver_type {solver_type!r}; use {', '.join(known)}")
    rules: dict[str, SecondOrder] = {"heun": "exact", "bh1": "bh1"}
    return rules[solver_type] if solver_type == own else "midpoint"


def _algorithm(algorithm_type: str) -> tuple[float, Literal["x0", "epsilon"]]:
    """(eta, prediction) of Diffusers' `algorithm_type`."""
    known = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
    if algorithm_type not in known:
        raise ValueError(f"unknown algorithm_type {algorithm_type!r}; use {', '.join(known)}")
    return float(algorithm_type.startswith("sde")), "x0" if algorithm_type.endswith("++") else "epsilon"


class DPMSolverScheduler(SolverScheduler):
    """DPM-Solver and DPM-Solver++ multistep of order 1 to 3, ODE and SDE; for `DPMSolverMultistepScheduler`.

    (arXiv:2206.00927, arXiv:2211.01095.) `solver_order=3` is the form that is shipped everywhere, which halves one
    weight and is of second order: at up to 20 calls it was the better one wherever we measured (benchmarks/results).
    The third-order one is the factory's `dpmpp_3m`, or `solver_options={"halve_curvature": False}`.
    """

    def make_solver(self) -> ExponentialAdams:
        """Order, noise and prediction, and rule by `solver_order`, `algorithm_type` and `solver_type`."""
        eta, prediction = _algorithm(self.config["algorithm_type"])
        return ExponentialAdams(
            order=self.config["solver_order"],
            second=_second_order(self.config["solver_type"], own="heun"),
            eta=eta,
            prediction=prediction,
            halve_curvature=self.config["solver_order"] == 3,
            lower_final=15 if self.config["lower_order_final"] else 0,
        )


class DPMSinglestepScheduler(SolverScheduler):
    """DPM-Solver-2S and -3S (arXiv:2206.00927, algorithms 4, 5), and ++; for `DPMSolverSinglestepScheduler`.

    Stages lie at halves and thirds of a step in log-SNR, as in the papers; Diffusers puts them on nodes of its grid.
    """

    def make_solver(self) -> ExponentialAdams | ExponentialRungeKutta:
        """Two or three stages by `solver_order`, with the noise and prediction of `algorithm_type`."""
        eta, prediction = _algorithm(self.config["algorithm_type"])
        if self.config["solver_order"] not in (1, 2, 3):
            raise ValueError(f"solver_order must be 1, 2 or 3, not {self.config['solver_order']!r}")
        if self.config["solver_order"] == 1:
            return ExponentialAdams(order=1, eta=eta, prediction=prediction)
        second = "exact" if self.config["solver_type"] == "heun" else "midpoint"
        return ExponentialRungeKutta(self.config["solver_order"], prediction, second, eta)


class UniPCScheduler(SolverScheduler):
    """UniPC of order 1 to 3 with its corrector, B1(h) or B2(h) (arXiv:2302.04867); for `UniPCMultistepScheduler`."""

    @classmethod
    def _adopt(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        if config.get("disable_corrector"):
            raise ValueError("UniPCScheduler corrects every step; leave disable_corrector out of the config")
        if config.get("predict_x0", True):
            return {}
        return {"solver_options": dict(config.get("solver_options") or {}) | {"prediction": "epsilon"}}

    def make_solver(self) -> ExponentialAdams:
        """UniPC of `solver_order`; `solver_type` bh1 or bh2, other families' values mean bh2 as in Diffusers."""
        return ExponentialAdams(
            order=self.config["solver_order"],
            second=_second_order(self.config["solver_type"], own="bh1"),
            corrector=True,
            lower_final=ALWAYS if self.config["lower_order_final"] else 0,
        )


class DDIMSolverScheduler(SolverScheduler):
    """DDIM (arXiv:2010.02502), deterministic unless `solver_options` sets `eta`; for `DDIMScheduler`, `DDPMScheduler`.

    `leading` means DDIM's own grid, `set_alpha_to_one=False` ends at the smallest trained sigma and `clip_sample`
    clamps x0, as there. `eta` here is the share of the reverse SDE's noise: 0 and 1 are DDIM's 0 and 1, values between
    differ; the pipelines' own `eta=` argument does not reach it.
    """

    _leading = "ddim_uniform"
    _clips = True

    @classmethod
    def _adopt(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        # from_config drops what the source left at its default, but these defaults of DDIMScheduler are not ours.
        return {k: config[k] for k in ("timestep_spacing", "clip_sample") if k in config}

    def make_solver(self) -> Multistep | Singlestep:
        """First order."""
        return SOLVERS["ddim"]

    def _final(self) -> Final:
        return super()._final() if self.config["set_alpha_to_one"] else "sigma_min"


class FlowEulerScheduler(SolverScheduler):
    """Euler for flow-matching models (SD3, arXiv:2403.03206); for `FlowMatchEulerDiscreteScheduler`."""

    _always_flow = True

    @classmethod
    def _adopt(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        if not is_flow(config):
            raise ValueError(
                "FlowEulerScheduler is for flow-matching models, and this config is of another kind; use "
                "DDIMSolverScheduler, which is the same first-order rule"
            )
        return {}

    def make_solver(self) -> Multistep | Singlestep:
        """First order."""
        return SOLVERS["euler"]


class DEISScheduler(SolverScheduler):
    """DEIS of order 1 to 3 in log rho (arXiv:2204.13902), to sigma = 0; for `DEISMultistepScheduler`.

    The paper's own forms are the factory's `deis_tab3`, `deis_rhoab3`, `deis_rho2heun` and their kin.
    """

    def make_solver(self) -> ExponentialAdams:
        """Exact weights of `solver_order` predictions of eps."""
        low = 15 if self.config["lower_order_final"] else 0
        return ExponentialAdams(order=self.config["solver_order"], prediction="epsilon", lower_final=low)


class HeunScheduler(SolverScheduler):
    """Heun in sigma (arXiv:2206.00364, algorithm 1); for `HeunDiscreteScheduler`, whose N steps are 2N - 1 calls."""

    _solver: ClassVar[str | None] = "heun"
    _clips = True


class EDMStochasticScheduler(SolverScheduler):
    """EDM's stochastic sampler (arXiv:2206.00364, algorithm 2); its constants are `solver_options`."""

    _solver: ClassVar[str | None] = "edm_stochastic"


class EulerAncestralScheduler(SolverScheduler):
    """Euler ancestral of k-diffusion; for `EulerAncestralDiscreteScheduler`."""

    _solver: ClassVar[str | None] = "euler_ancestral"


class LMSScheduler(SolverScheduler):
    """Linear multistep of order 4 with exact weights, rho-AB3 of DEIS; for `LMSDiscreteScheduler`."""

    _solver: ClassVar[str | None] = "deis_rhoab3"


class IPNDMSolverScheduler(SolverScheduler):
    """iPNDM of order 4 (arXiv:2204.13902): Adams-Bashforth with the weights of even steps."""

    _solver: ClassVar[str | None] = "ipndm"


class RESScheduler(SolverScheduler):
    """RES multistep (arXiv:2308.02157): exponential Adams of order 2 with exact weights."""

    _solver: ClassVar[str | None] = "res_2m"


class SEEDSScheduler(SolverScheduler):
    """SEEDS-3 (arXiv:2305.14267): three stages that share the noise of one Brownian path."""

    _solver: ClassVar[str | None] = "seeds_3"


class SAScheduler(SolverScheduler):
    """SA-Solver (arXiv:2309.05019), P3C4 with noise in the middle of the run; for `SASolverScheduler`."""

    _solver: ClassVar[str | None] = "sa_solver"


class ERSDEScheduler(SolverScheduler):
    """ER-SDE-Solver-3 (arXiv:2309.06169); the noise scale is a solver option."""

    _solver: ClassVar[str | None] = "er_sde_3"


class GradientEstimationScheduler(SolverScheduler):
    """Gradient-estimation sampler (arXiv:2306.04848) with gamma = 2."""

    _solver: ClassVar[str | None] = "gradient_estimation"


class AcceleratedDDIMScheduler(SolverScheduler):
    """Accelerated DDIM of Li et al. (arXiv:2403.03852)."""

    _solver: ClassVar[str | None] = "accelerated_ddim"


class AcceleratedDDPMScheduler(SolverScheduler):
    """Accelerated DDPM of Li et al. (arXiv:2403.03852)."""

    _solver: ClassVar[str | None] = "accelerated_ddpm"


ONE_SOLVER = (
    HeunScheduler,
    EDMStochasticScheduler,
    EulerAncestralScheduler,
    LMSScheduler,
    IPNDMSolverScheduler,
    RESScheduler,
    SEEDSScheduler,
    SAScheduler,
    ERSDEScheduler,
    GradientEstimationScheduler,
    AcceleratedDDIMScheduler,
    AcceleratedDDPMScheduler,
)
NAMED = (
    SolverScheduler,
    DDIMSolverScheduler,
    DPMSolverScheduler,
    DPMSinglestepScheduler,
    UniPCScheduler,
    DEISScheduler,
    FlowEulerScheduler,
    *ONE_SOLVER,
)
