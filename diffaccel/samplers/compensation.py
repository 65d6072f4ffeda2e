"""The rule of DC-Solver, and its ratios as a polynomial of steps and guidance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from diffaccel.samplers.schedule import FloatArray
from diffaccel.samplers.tabulate import Refine

ORDER = 2  # of the interpolation: K in the paper, its best
# fmt: off
SD21 = (  # the authors' fit for Stable Diffusion 2.1
    1523.67661966, -1111.47464508, 198.38349618, -1346.08900228, 1007.19494126, -186.25475774,
    168.39730243, -128.03894894, 24.88478975, -8140.64401858, 5906.74827912, -1035.99411231,
    6941.4138994, -5193.98065982, 950.3205653, -848.21046751, 650.69033333, -121.28674277,
    13309.27038462, -9616.67032053, 1668.76859621, -11037.10779439, 8256.66668566, -1503.79920359,
    1293.97404351, -999.56293282, 188.22170414, -6747.42182161, 4853.15305335, -835.51167928,
    5489.11518378, -4096.89721821, 743.09534131, -619.56127633, 480.14971466, -90.89633129,
)
# fmt: on


def compensation(ratios: Sequence[float], order: int = ORDER) -> Refine:
    """The rule of DC-Solver (arXiv:2409.03755, section 3.2) for `tabulate`.

    The newest of what the solver keeps is replaced, for good, by the polynomial through it and the `order` before it,
    taken at time t' = ratio * t_i + (1 - ratio) * t_{i-1}: in the network's time, as the authors do. A ratio of 1
    changes nothing; so do all ratios before there are `order` + 1 predictions.
    """

    def refine(i: int, times: FloatArray) -> FloatArray | None:
        if len(times) <= order or ratios[i] == 1:
            return None
        return lagrange(ratios[i] * times[0] + (1 - ratios[i]) * times[1], times[: order + 1])

    return refine


def lagrange(at: float, nodes: FloatArray) -> FloatArray:
    """Weights of the values at `nodes` in the value at `at` of the polynomial through them."""
    products = [math.prod((at - b) / (a - b) for j, b in enumerate(nodes) if j != i) for i, a in enumerate(nodes)]
    return np.array(products, dtype=np.float64)


@dataclass(frozen=True)
class CascadePolynomial:
    """Ratios for any number of steps and guidance scale, from searched ones (arXiv:2409.03755, section 3.4).

    With g = guidance / 12, n = steps / 50 and s = step / steps (the first step is 1), the ratio is
    sum_k s^k sum_j g^(2-j) sum_l c[k, j, l] n^(2-l); it is 1 in the first two steps. Outside of what was fitted it may
    be anything: nothing clamps it.

    Attributes:
        coefficients: 4 * 3 * 3 numbers c, in C order.
    """

    coefficients: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.coefficients) != 36:
            raise ValueError(f"a cascade polynomial has 36 coefficients, not {len(self.coefficients)}")

    @classmethod
    def named(cls, name: str | Sequence[float]) -> CascadePolynomial:
        """The polynomial of given coefficients, or `sd21`."""
        if isinstance(name, str):
            if name != "sd21":
                raise ValueError(f"unknown cascade {name!r}; use 'sd21', or 36 coefficients")
            return cls(SD21)
        return cls(tuple(map(float, name)))

    @classmethod
    def fit(cls, found: Iterable[tuple[int, float, Sequence[float]]]) -> CascadePolynomial:
        """Fit (steps, guidance scale, ratios) by least squares: the polynomial is linear in its coefficients.

        Args:
            found: searched ratios; three guidance scales and three numbers of steps fix all 36 coefficients. With fewer
                they are the smallest that fit.
        """
        rows = [
            (_terms(step, n, g), ratio)
            for n, g, ratios in found
            for step, ratio in enumerate(ratios, 1)
            if step > ORDER
        ]
        if not rows:
            raise ValueError("no ratios to fit: searches of three steps or more have some")
        matrix, wanted = np.stack([terms for terms, _ in rows]), np.array([ratio for _, ratio in rows])
        size = np.linalg.norm(matrix, axis=0)
        # towards 1, which changes nothing, not towards 0
        offset = np.linalg.lstsq(matrix / size, wanted - 1, rcond=1e-9)[0] / size
        offset[8] += 1.0  # c[0, 2, 2], the constant
        return cls(tuple(offset.tolist()))

    def ratios(self, steps: int, guidance_scale: float) -> list[float]:
        """One for each step."""
        c = np.array(self.coefficients)
        return [1.0 if s <= ORDER else float(c @ _terms(s, steps, guidance_scale)) for s in range(1, steps + 1)]


def _terms(step: int, steps: int, guidance_scale: float) -> FloatArray:
    s, g, n = step / steps, guidance_scale / 12, steps / 50
    return np.einsum("k,j,l->kjl", s ** np.arange(4), g ** np.array([2, 1, 0]), n ** np.array([2, 1, 0])).ravel()
