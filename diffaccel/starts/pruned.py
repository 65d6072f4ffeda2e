"""Gaussian noise without the directions in which there are no data (kwanseokk/SourceFM@b76e963, MIT)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

_MOST_ROUNDS = 1000  # draws a sample: at 98 % rejections one in 10^9 samples needs more
_ROWS = 4096  # data points compared with all axes at a time


@torch.no_grad()
def data_sparse_axes(data: Tensor, threshold: float = 0.01) -> Tensor:
    """Unit axes that no data point leans towards, for `pruned_gaussian`.

    The axes are the principal components of the flattened, L2-normalised (then centred) data and their opposites. An
    axis a is kept if max_n <a, x_n / |x_n|> <= threshold: all data lie on its other side, or at right angles to it.

    The released script does not do this: it saves the complement (`accepted_centroids`, the axes that data *do* lean
    towards) under the name that its sampler loads, against its own README. This function follows the README.

    Args:
        data: (N, ...) pictures or latents on the scale the model is trained on, such as [-1, 1]; finite and none all
            zero. N must exceed D, the number of values in each: directions that are empty for want of data are no
            property of the data. Add flips. Takes memory for two float32 copies of the data and some D x D matrices.
        threshold: largest cosine that counts as no data, in [0, 1). SourceFM uses 0.01 on CIFAR-10 with flips, where
            1 / sqrt(D) is 0.018.

    Returns:
        (A, D) float32 rows of length one on the device of `data`; A may be 0, and is 2 D at most.

    Raises:
        ValueError: for too few data, a point without direction, or a threshold out of range.
    """
    flat = data.flatten(1).float()
    count, size = flat.shape
    if count <= size:
        raise ValueError(
            f"{count} data points of {size} values leave directions empty by chance; give more than {size} (flips help)"
        )
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold is a cosine and must lie in [0, 1), not {threshold:g}")
    length = flat.norm(dim=1, keepdim=True)
    if not (length.isfinite() & (length > 0)).all():
        raise ValueError("every data point needs a direction; leave out those that are all zero, inf or nan")
    flat = flat / length
    covariance = torch.cov(flat.T).reshape(size, size)
    components = torch.linalg.eigh(covariance.double()).eigenvectors.T.float()
    axes = torch.cat([components, -components])
    lean = torch.stack([(axes @ part.T).amax(1) for part in flat.split(_ROWS)]).amax(0)
    return axes[lean <= threshold]


@torch.no_grad()
def pruned_gaussian(
    shape: Sequence[int],
    axes: Tensor,
    tau: float,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Tensor:
    """Standard normal noise, each sample drawn again while it lies close to one of `axes`.

    A sample g is rejected if max_a <g / |g|, a> > tau; what is returned is the unnormalised g. The model is not
    retrained: this only changes where sampling starts (for diffusion models at the noise end, where x = z).

    SourceFM's tau for CIFAR-10 (D = 3072) is 0.048 in its README and 0.06 by default in its code. On one axis the
    cosine of noise has standard deviation 1 / sqrt(D), so scale tau with that: these are 2.66 and 3.33 / sqrt(D). How
    many draws are rejected depends on the number of axes: about 54, 86 and 98 % for 200, 500 and 1000 of them at the
    first, and 8, 20 and 36 % at the second. Rejection costs no network call.

    Not built: SourceFM's NormAlign, which must be trained with and makes few-step sampling worse.

    Args:
        shape: (B, ...) of the result; B samples of D values each.
        axes: (A, D) unit rows of `data_sparse_axes`; A = 0 gives plain noise. Its device is that of the result.
        tau: largest cosine to any axis, > 0.
        generator: as Diffusers has it: one, or a list with one per sample, which makes each sample depend on its own
            generator alone.

    Returns:
        `shape`, float32.

    Raises:
        ValueError: for axes or tau that do not fit `shape`.
        RuntimeError: if a sample is rejected 1000 times, with the share of draws that were accepted.
    """
    shape = tuple(shape)
    size = math.prod(shape[1:])
    if axes.ndim != 2 or axes.shape[1] != size:
        raise ValueError(f"axes must be (A, {size}) for samples of shape {shape[1:]}, not {tuple(axes.shape)}")
    if not tau > 0:
        raise ValueError(f"tau is a cosine and must be positive, not {tau:g}; scale it with 1 / sqrt({size})")
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for {shape[0]} samples; pass one, or one for each sample")
    noise = torch.empty(shape, device=axes.device)
    pending, drawn = list(range(shape[0])), 0
    for _ in range(_MOST_ROUNDS):
        own = [generator[i] for i in pending] if isinstance(generator, list) else generator
        draw = randn_tensor((len(pending), *shape[1:]), generator=own, device=axes.device, dtype=torch.float32)
        close = ((draw.flatten(1) @ axes.float().T) > tau * draw.flatten(1).norm(dim=1, keepdim=True)).any(1)
        noise[pending] = draw  # of those that are close only for now
        drawn += len(pending)
        pending = [i for i, again in zip(pending, close.tolist(), strict=True) if again]
        if not pending:
            return noise
    accepted = (shape[0] - len(pending)) / drawn
    raise RuntimeError(
        f"{len(pending)} of {shape[0]} samples were rejected {_MOST_ROUNDS} times ({accepted:.2%} of {drawn} draws "
        f"were accepted); raise tau (now {tau * size**0.5:.3g} / sqrt({size})) or give fewer than {len(axes)} axes"
    )
