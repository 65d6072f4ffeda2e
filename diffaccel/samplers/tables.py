"""Published lists of noise levels, and how a list serves any number of calls."""

from __future__ import annotations

import numpy as np

from diffaccel.samplers.schedule import FloatArray, NoiseSchedule

PRINTED = 5e-4  # the lists are printed to three decimals: half of the last one

# Align Your Steps (arXiv:2404.14507, table 3): sigma / alpha of ten calls, and the end of the run.
AYS: dict[str, tuple[float, ...]] = {
    "ays_sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays_sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "ays_svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
    "ays_deepfloyd": (160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006),
}
# GITS (arXiv:2405.11326) for Stable Diffusion 1.5, coefficient 1.15, by the number of calls.
GITS: dict[int, tuple[float, ...]] = {
    5: (14.6146, 5.8552, 1.9132, 0.8319, 0.3437, 0.0292),
    8: (14.6146, 5.8552, 2.8448, 1.5627, 0.8912, 0.5012, 0.2505, 0.0982, 0.0292),
    10: (14.6146, 6.7731, 3.0728, 1.9132, 1.2415, 0.8033, 0.5242, 0.3437, 0.1989, 0.0982, 0.0292),
}


def align_your_steps(name: str, schedule: NoiseSchedule, high: float, low: float, n: int) -> FloatArray:
    """Align Your Steps for the kind of network in the name, log-linear between the ten published calls.

    The authors interpolate a 40-step optimum, which is not public; ComfyUI interpolates this list as we do.
    """
    return _along(name, AYS[name], schedule, high, n)


def gits_sd15(schedule: NoiseSchedule, high: float, low: float, n: int) -> FloatArray:
    """GITS, searched on Stable Diffusion 1.5 (arXiv:2405.11326), for networks like it.

    Lists of 5, 8 and 10 calls; other numbers are log-linear on the next longer list, or on the longest.
    """
    longer = [calls for calls in GITS if calls >= n]
    return _along("gits_sd15", GITS[min(longer) if longer else max(GITS)], schedule, high, n)


def _along(name: str, levels: tuple[float, ...], schedule: NoiseSchedule, high: float, n: int) -> FloatArray:
    """N + 1 points of a list, evenly over its index and log-linear between its entries, from `high` to its end.

    A network trained on less than the list's range is refused. Ends that lie outside it by the rounding of the print
    are moved to the trained ones (14.615 to 14.6146). On VE paths the list must begin where training does, since a
    pipeline starts from noise of that sigma; on VP paths it starts from unit noise at any level.
    """
    whole = schedule.whole or schedule
    least, most = (float(s) for s in whole.sigma_at([whole.lambdas[0], whole.lambdas[-1]]))
    begins_below = whole.path == "ve" and levels[0] < most - PRINTED
    if levels[-1] < least - PRINTED or levels[0] > most + PRINTED or begins_below:
        raise ValueError(
            f"schedule {name!r} goes from sigma {levels[0]:g} to {levels[-1]:g} and this network was trained from "
            f"{most:.4g} to {least:.4g}; use karras, kl_optimal or logsnr here"
        )
    logs = np.log(np.clip(levels, least, most))
    index = np.arange(len(logs))
    start = np.interp(-np.log(high), -logs, index)
    return np.exp(np.interp(np.linspace(start, index[-1], n + 1), index, logs))
