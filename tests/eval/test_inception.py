"""Our Inception against those of pytorch-fid, torch-fidelity and the TorchScript files, with the same weights."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffaccel.eval import DataError, MissingWeights, inception
from diffaccel.eval.networks import inception_weights
from diffaccel.eval.networks.inception import FEATURES, LOGITS, Inception
from diffaccel.eval.networks.inception_weights import FILES, PACKAGED, STATE_DICT, TORCHSCRIPT, find_inception
from diffaccel.eval.networks.weights import sha256_of
from tests.eval.offline import _no_network  # noqa: F401

KEYS = ("conv.weight", "bn.bias", "bn.running_mean", "bn.running_var")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Random weights under the names of pytorch-fid, of sizes that let the signal through all 94 convolutions."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    found: dict[str, Tensor] = {}
    for name, module in Inception().named_modules():
        if isinstance(module, nn.Conv2d):
            width, fan = module.out_channels, module.weight[0].numel()
            found[f"{name}.conv.weight"] = normal(*module.weight.shape) * (2 / fan) ** 0.5
            found[f"{name}.bn.weight"] = torch.ones(width)
            found[f"{name}.bn.bias"] = normal(width) / 5
            found[f"{name}.bn.running_mean"] = normal(width) / 5
            found[f"{name}.bn.running_var"] = normal(width).exp()
            found[f"{name}.bn.num_batches_tracked"] = torch.tensor(1)
    found["fc.weight"] = normal(LOGITS, FEATURES) / FEATURES**0.5
    found["fc.bias"] = normal(LOGITS)
    return found


@pytest.fixture(scope="module")
def file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("weights") / STATE_DICT.name
    torch.save(state, path)
    yield path
    path.unlink()  # 95 MB


@pytest.fixture
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights have no right hash."""
    monkeypatch.setattr(inception_weights, "find_inception", lambda given: Path(given))


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.randint(0, 256, (2, 3, 48, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def spatial_of(net: Any, run: Any) -> tuple[Any, Tensor]:
    """What `run` returns, and the first 7 maps of the 1x1 branch of Mixed_6d."""
    maps: list[Tensor] = []
    handle = net.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: maps.append(output[:, :7]))
    with torch.inference_mode():
        result = run()
    handle.remove()
    return result, maps[0].flatten(1)


@pytest.mark.usefixtures("_unchecked")
def test_as_torch_fidelity(
    state: dict[str, Tensor], file: Path, pictures: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: state)
    net = module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], verbose=False).eval()
    (features, logits), spatial = spatial_of(net, lambda: net(pictures))
    ours = inception(file, resize="legacy_tensorflow", spatial=True)
    found = ours(list(pictures))
    assert ours.outputs == ("features", "logits", "spatial")
    assert found.keys() == set(ours.outputs)
    assert found["spatial"].shape == (2, 7 * 17 * 17)
    for value, expected in [(found["features"], features), (found["logits"], logits), (found["spatial"], spatial)]:
        assert expected.abs().max() > 0.01
        assert apart(expected[0], expected[1]) > 1e-2  # the pictures differ by more than the networks
        assert apart(value, expected) < 1e-4


@pytest.mark.usefixtures("_unchecked")
def test_as_pytorch_fid(
    state: dict[str, Tensor], file: Path, pictures: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: state)
    net = module.InceptionV3([3]).eval()
    with torch.inference_mode():
        expected = net(pictures.float() / 255)[0].flatten(1)
    ours = inception(file, resize="legacy_pytorch")
    assert ours.outputs == ("features", "logits")
    assert apart(ours(list(pictures))["features"], expected) < 1e-4


class Layer(nn.Module):
    """A convolution as NVIDIA's TorchScript keeps it."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in zip(("weight", "beta", "mean", "var"), tensors, strict=True):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_all_kinds_of_files_are_read_alike_whatever_their_names(
    state: dict[str, Tensor], file: Path, tmp_path: Path
) -> None:
    names = [name.removesuffix(".conv.weight") for name in state if name.endswith(".conv.weight")]
    assert len(names) == 94
    layers = [Layer(*(state[f"{name}.{key}"] for key in KEYS)) for name in names]
    output = nn.Linear(FEATURES, LOGITS)
    output.weight.data = state["fc.weight"]
    old, script, bare = tmp_path / "old.bin", tmp_path / "script.pth", tmp_path / "bare.pt"
    torch.save(state, old, _use_new_zipfile_serialization=False)  # as pytorch-fid's file is
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Sequential(*layers, output)).save(script)
        torch.jit.script(nn.Sequential(*layers)).save(bare)
    expected, classifier = inception_weights._read(file)
    for path in (old, script, bare):
        found, logits = inception_weights._read(path)
        assert len(found) == 94
        for ours, theirs in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        if path == bare:
            assert logits is None
        else:
            assert logits is not None
            assert classifier is not None
            assert torch.equal(logits, classifier)
        path.unlink()


@pytest.mark.usefixtures("_unchecked")
def test_weights_protocol_and_outputs_are_told(file: Path) -> None:
    ours = inception(file)
    assert (ours.name, ours.dim, ours.size, ours.protocol) == ("inception", 2048, 299, "clean")
    assert ours.id == f"inception-{ours.weights[:8]}-clean"
    assert len(ours.weights) == 64


@pytest.fixture
def _nothing_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception_weights, "FILES", tuple(FILES))
    monkeypatch.setenv("DIFFACCEL_EVAL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "tmp"))
    monkeypatch.setattr("diffaccel.eval.networks.weights._in_package", lambda packaged: [])


@pytest.mark.usefixtures("_nothing_found")
def test_missing_weights_say_what_to_put_where(tmp_path: Path) -> None:
    with pytest.raises(MissingWeights, match=rf"(?s){STATE_DICT.name}.*6726825d.*https://.*DIFFACCEL_EVAL_HOME"):
        inception()
    with pytest.raises(MissingWeights, match=r"no-such\.pth"):
        inception(tmp_path / "no-such.pth")


@pytest.mark.usefixtures("_nothing_found")
def test_another_file_is_refused(tmp_path: Path, file: Path) -> None:
    with pytest.raises(DataError, match=r"is not pt_inception-2015-12-05-6726825d\.pth: its SHA-256 is"):
        inception(file)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / STATE_DICT.name).write_bytes(b"half a download")
    with pytest.raises(MissingWeights, match="has another SHA-256"):
        inception(tmp_path / "folder")


@pytest.mark.usefixtures("_nothing_found")
def test_files_with_the_classifier_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {spec.name: bytes(name) for spec, name in zip(FILES, (b"1", b"2", b"3"), strict=True)}
    for name, content in wanted.items():
        (tmp_path / name).write_bytes(content)
    hashes = {spec.sha256[0][:8]: spec for spec in FILES}
    assert len(hashes) == 3
    monkeypatch.setattr(
        "diffaccel.eval.networks.weights._accepted", lambda spec, digest: digest == sha256_of(tmp_path / spec.name)
    )
    assert [spec.name for spec in FILES] == [STATE_DICT.name, TORCHSCRIPT.name, PACKAGED.name]
    for spec in FILES:
        assert find_inception(tmp_path).name == spec.name
        (tmp_path / spec.name).unlink()
    with pytest.raises(MissingWeights, match=STATE_DICT.name):
        find_inception(tmp_path)


@pytest.mark.skipif("DIFFACCEL_EVAL_HOME" not in os.environ, reason="needs DIFFACCEL_EVAL_HOME with FID's weights")
def test_real_weights(pictures: Tensor) -> None:
    """The network as it is published, and the features that FID has been computed from since 2017."""
    try:
        path = find_inception()
    except MissingWeights as error:
        pytest.skip(str(error).splitlines()[0])
    ours = inception(path, resize="legacy_tensorflow", spatial=True)
    found = ours(list(pictures))
    assert 0.2 < found["features"].mean() < 0.6
    if not inception_weights._is_torchscript(path):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        published = torch.jit.load(path, map_location="cpu").eval()
    pixels = ours._prepared(list(pictures))
    if path.name == PACKAGED.name:
        run = lambda: published((pixels - 128) / 128)  # noqa: E731
    else:
        run = lambda: published(pixels, return_features=True)  # noqa: E731
    with torch.inference_mode():
        expected = run().flatten(1)
    assert apart(found["features"], expected) < 1e-4
