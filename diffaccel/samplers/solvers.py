"""SOLVERS: the catalogue. A name, the rule behind it, where it was published."""

from __future__ import annotations

from dataclasses import replace

from diffaccel.samplers.accelerated_ddpm import AcceleratedDDPM
from diffaccel.samplers.adams_bashforth import AdamsBashforth
from diffaccel.samplers.er_sde import ERSDE
from diffaccel.samplers.exponential import ExponentialAdams
from diffaccel.samplers.exponential_runge_kutta import ExponentialRungeKutta
from diffaccel.samplers.gradient_estimation import GradientEstimation
from diffaccel.samplers.runge_kutta import RungeKutta
from diffaccel.samplers.sa import SASolver
from diffaccel.samplers.solver import ALWAYS, Multistep, Singlestep

DPMPP, DPM = "arXiv:2211.01095", "arXiv:2206.00927"  # DPM-Solver++, DPM-Solver
DEIS, UNIPC, EDM = "arXiv:2204.13902", "arXiv:2302.04867", "arXiv:2206.00364"
RES, SEEDS, ER_SDE, SA = "arXiv:2308.02157", "arXiv:2305.14267", "arXiv:2309.06169", "arXiv:2309.05019"
DDIM, DDPM, ACCELERATED, GE = "arXiv:2010.02502", "arXiv:2006.11239", "arXiv:2403.03852", "arXiv:2306.04848"
K_DIFFUSION = "k-diffusion"

_2m = ExponentialAdams(order=2, second="midpoint")
_3m = ExponentialAdams(order=3, second="midpoint")
_unipc = ExponentialAdams(order=2, second="midpoint", corrector=True, lower_final=ALWAYS)

_CATALOGUE: tuple[tuple[str, Multistep | Singlestep, str], ...] = (
    ("ddim", ExponentialAdams(order=1), DDIM),
    ("euler", ExponentialAdams(order=1), EDM),
    ("ddpm", ExponentialAdams(order=1, eta=1.0), DDPM),
    # DPM-Solver++: multistep, singlestep, SDE
    ("dpmpp_2m", _2m, DPMPP),
    ("dpmpp_3m", _3m, DPMPP),
    ("dpmpp_3m_shipped", replace(_3m, halve_curvature=True), DPMPP),
    ("dpmpp_2s", ExponentialRungeKutta(stages=2), DPMPP),
    ("dpmpp_3s", ExponentialRungeKutta(stages=3), DPMPP),
    ("dpmpp_2s_ancestral", ExponentialRungeKutta(stages=2, ancestral=1.0), K_DIFFUSION),
    ("dpmpp_2m_sde", replace(_2m, eta=1.0), DPMPP),
    ("dpmpp_3m_sde", replace(_3m, eta=1.0), DPMPP),
    ("dpmpp_3m_sde_shipped", replace(_3m, eta=1.0, halve_curvature=True), DPMPP),
    # DPM-Solver: the same on eps
    ("dpm_2m", replace(_2m, prediction="epsilon"), DPMPP),
    ("dpm_3m", replace(_3m, prediction="epsilon"), DPMPP),
    ("dpm_2s", ExponentialRungeKutta(stages=2, prediction="epsilon"), DPM),
    ("dpm_3s", ExponentialRungeKutta(stages=3, prediction="epsilon"), DPM),
    ("dpm_2m_sde", replace(_2m, prediction="epsilon", eta=1.0), DPMPP),
    ("dpm_3m_sde", replace(_3m, prediction="epsilon", eta=1.0), DPMPP),
    # UniPC
    ("unipc_1", replace(_unipc, order=1), UNIPC),
    ("unipc_1_bh1", replace(_unipc, order=1, second="bh1"), UNIPC),
    ("unipc_1_bh1_eps", replace(_unipc, order=1, second="bh1", prediction="epsilon"), UNIPC),
    ("unipc", _unipc, UNIPC),
    ("unipc_3", replace(_unipc, order=3), UNIPC),
    ("unipc_3_bh1", replace(_unipc, order=3, second="bh1"), UNIPC),
    ("unipc_vary", replace(_unipc, second="exact"), UNIPC),
    # DEIS
    ("deis_tab1", AdamsBashforth(2, "time"), DEIS),
    ("deis_tab2", AdamsBashforth(3, "time"), DEIS),
    ("deis_tab3", AdamsBashforth(4, "time"), DEIS),
    ("deis_rhoab1", AdamsBashforth(2), DEIS),
    ("deis_rhoab2", AdamsBashforth(3), DEIS),
    ("deis_rhoab3", AdamsBashforth(4), DEIS),
    ("deis_logrho1", ExponentialAdams(order=2, prediction="epsilon"), DEIS),
    ("deis_logrho2", ExponentialAdams(order=3, prediction="epsilon"), DEIS),
    ("deis_rho2heun", RungeKutta("heun"), DEIS),
    ("deis_rho3kutta", RungeKutta("kutta3"), DEIS),
    ("deis_rho3heun", RungeKutta("heun3"), DEIS),
    ("deis_rho4rk", RungeKutta("rk4"), DEIS),
    ("ipndm_2", AdamsBashforth(2, uniform=True), DEIS),
    ("ipndm", AdamsBashforth(4, uniform=True), DEIS),
    # RES, SEEDS, SA, ER-SDE
    ("res_2m", ExponentialAdams(order=2), RES),
    ("res_3m", ExponentialAdams(order=3), RES),
    ("res_2m_sde", ExponentialAdams(order=2, eta=1.0), K_DIFFUSION),
    ("res_2s", ExponentialRungeKutta(stages=2, second="exact"), RES),
    ("seeds_2", ExponentialRungeKutta(stages=2, eta=1.0), SEEDS),
    ("seeds_3", ExponentialRungeKutta(stages=3, eta=1.0), SEEDS),
    ("sa_solver", SASolver(), SA),
    ("er_sde_1", ERSDE(order=1), ER_SDE),
    ("er_sde_2", ERSDE(order=2), ER_SDE),
    ("er_sde_3", ERSDE(order=3), ER_SDE),
    ("er_ode_1_corrected", ERSDE(order=1, noise_scale="ode", corrector=True), ER_SDE),
    ("er_ode_3", ERSDE(order=3, noise_scale="ode"), ER_SDE),
    # EDM and k-diffusion
    ("heun", RungeKutta("heun"), EDM),
    ("edm_stochastic", RungeKutta("heun", s_churn=40.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003), EDM),
    ("euler_ancestral", RungeKutta("euler", eta=1.0), K_DIFFUSION),
    ("dpm_2s_ancestral", ExponentialRungeKutta(stages=2, prediction="epsilon", ancestral=1.0), K_DIFFUSION),
    # Others
    ("accelerated_ddim", AdamsBashforth(2, "alpha_bar"), ACCELERATED),
    ("accelerated_ddpm", AcceleratedDDPM(), ACCELERATED),
    ("gradient_estimation", GradientEstimation(), GE),
)
SOLVERS: dict[str, Multistep | Singlestep] = {name: rule for name, rule, _ in _CATALOGUE}
SOURCES: dict[str, str] = {name: source for name, _, source in _CATALOGUE}
