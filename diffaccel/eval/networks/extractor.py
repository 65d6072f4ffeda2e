"""A feature network together with everything that its numbers depend on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffaccel.eval.errors import DataError
from diffaccel.eval.networks.resize import resize


@dataclass(frozen=True, eq=False)
class Extractor:
    """Pictures -> features: resize protocol, network and weights.

    Attributes:
        name: as it stands in column names, such as `inception` or `emoji-clip`.
        dim: features of a picture.
        size: side of the square that the network sees, in pixels.
        protocol: name of the resize protocol (`diffaccel.eval.networks.resize.RESIZE`).
        weights: SHA-256 of the weights in hex; empty for a callable, whose weights nobody can tell.
        network: float32 (N, 3, size, size) in [0, 255] -> `features` (N, dim), and more by name where it has more.
        text: prompts -> (N, dim) text features, of networks that have a text side.
        device: where the network is.
        outputs: names that the network gives; kept features without one of them are taken anew.
    """

    name: str
    dim: int
    size: int
    protocol: str
    weights: str
    network: Callable[[Tensor], dict[str, Tensor]]
    text: Callable[[Sequence[str]], Tensor] | None = None
    device: str = "cpu"
    outputs: tuple[str, ...] = ("features",)

    @property
    def id(self) -> str:
        """Name, weights and protocol in one word that a folder can have."""
        name = self.name.replace("/", "_")
        return "-".join(part for part in (name, self.weights[:8], self.protocol) if part)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Tensor]) -> dict[str, Tensor]:
        """Features of pictures, uint8 (3, H, W) each, of any sizes: `features` (N, dim) float32 on the CPU, in order.

        The network runs in float32 with TF32 off, whatever the process has set: it moves FID in the second decimal.

        Raises:
            DataError: if a picture is no uint8 (3, H, W), or the features are not finite or of another shape.
        """
        if not pictures:
            raise DataError("there are no pictures to take features of")
        for picture in pictures:
            if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
                raise DataError(f"pictures must be uint8 (3, H, W), not {picture.dtype} {tuple(picture.shape)}")
        with exact_float32(), torch.autocast(torch.device(self.device).type, enabled=False):
            outputs = self.network(self._prepared(pictures))
        outputs = {name: value.float().cpu() for name, value in outputs.items()}
        shape = tuple(outputs["features"].shape)
        if shape != (len(pictures), self.dim):
            raise DataError(f"{self.name} gave features of shape {shape}, not {(len(pictures), self.dim)}")
        if not outputs["features"].isfinite().all():
            raise DataError(f"{self.name} gave features that are not finite: the weights or the pictures are damaged")
        return outputs

    def _prepared(self, pictures: Sequence[Tensor]) -> Tensor:
        """(N, 3, size, size): pictures of one size are resized together, each stays at its place."""
        by_size: dict[tuple[int, ...], list[int]] = {}
        for i, picture in enumerate(pictures):
            by_size.setdefault(tuple(picture.shape), []).append(i)
        prepared = torch.empty(len(pictures), 3, self.size, self.size, device=self.device, dtype=torch.float32)
        for places in by_size.values():
            batch = torch.stack([pictures[i] for i in places]).to(self.device)
            prepared[places] = resize(batch, self.size, self.protocol)
        return prepared


def callable_extractor(
    function: Callable[[Tensor], Tensor], *, name: str, dim: int, size: int, protocol: str = "clean"
) -> Extractor:
    """Any function float32 (N, 3, size, size) in [0, 255] -> (N, dim) as an extractor.

    Its name goes into the table, and kept features are found by it: another function needs another name.
    """
    return Extractor(name, dim, size, protocol, "", lambda pixels: {"features": function(pixels)})


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """TF32, other short products and cuDNN's autotuner off inside the block, and as they were after it."""
    switches = _switches()
    before = [(owner, name, _now(lambda o=owner, n=name: getattr(o, n))) for owner, name, _ in switches]
    precision = _now(torch.get_float32_matmul_precision)
    torch.set_float32_matmul_precision("highest")
    for owner, name, value in switches:
        setattr(owner, name, value)
    try:
        yield
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        for owner, name, value in before:
            if value is not None:
                setattr(owner, name, value)


def _switches() -> list[tuple[Any, str, Any]]:
    """What to set: owner, name, value.

    PyTorch 2.9 named these switches anew. It refuses to read an old name where the new one says otherwise, and some
    kernels read: both are set, the old ones first, as they change the new ones.
    """
    backends: Any = torch.backends
    cudnn, matmul, cpu = backends.cudnn, backends.cuda.matmul, backends.mkldnn
    old: list[tuple[Any, str, Any]] = [
        (cudnn, "allow_tf32", False),
        (cudnn, "benchmark", False),
        (cudnn, "deterministic", True),
    ]
    renamed = hasattr(matmul, "fp32_precision")
    owners = (matmul, cudnn.conv, cudnn.rnn, cpu.matmul, cpu.conv, cpu.rnn) if renamed else ()
    return old + [(owner, "fp32_precision", "ieee") for owner in owners]


def _now(read: Callable[[], Any]) -> Any:
    """The value, or None where the user has set a new name and the old one cannot be read."""
    try:
        return read()
    except RuntimeError:
        return None
