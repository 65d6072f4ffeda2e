"""Networks by name, their weights and devices by hand."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
import transformers

from diffaccel.eval.networks import by_name as networks
from diffaccel.eval.networks.by_name import checked_device, given_path, network
from diffaccel.zoo import quiet_loading
from tests.eval.offline import _no_network  # noqa: F401


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """What each maker of extractors was called with."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    for name in ("inception", "open_clip_extractor", "transformers_clip", "dinov2"):
        monkeypatch.setattr(networks, name, lambda *a, _name=name, **k: calls.append((_name, a, k)))
    return calls


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("inception", ("inception", ("F",), {"resize": "clean", "spatial": True, "device": "cpu"})),
        (
            "inception:legacy_pytorch",
            ("inception", ("F",), {"resize": "legacy_pytorch", "spatial": True, "device": "cpu"}),
        ),
        ("open_clip", ("open_clip_extractor", ("ViT-B-32-quickgelu",), {"protocol": "clip"})),
        ("open_clip:ViT-H-14", ("open_clip_extractor", ("ViT-H-14",), {"protocol": "clip"})),
        ("open_clip:ViT-L-14:cmmd", ("open_clip_extractor", ("ViT-L-14",), {"protocol": "cmmd"})),
        ("clip:/models/a", ("transformers_clip", ("/models/a", "cpu"), {})),
        ("dinov2", ("dinov2", ("/models/d", "cpu"), {})),
    ],
)
def test_names_and_details(made: list[Any], text: str, expected: tuple[str, tuple[Any, ...], dict[str, Any]]) -> None:
    network(text, weights=["inception=F", "open_clip=G", "dinov2=/models/d"], spatial=True)
    (found,) = made
    name, arguments, options = expected
    if name == "open_clip_extractor":
        options = options | {"weights": "G", "device": "cpu"}
    assert found == (name, arguments, options)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("resnet", "unknown network 'resnet'; there are emoji-clip, inception"),
        ("emoji-clip:large", "unknown network 'emoji-clip:large'"),
        ("", "unknown network ''"),
        ("inception:bicubic", "no resize protocol 'bicubic'; there are clean"),
        ("open_clip:ViT-B-32:foo", "no protocol 'foo'"),
        ("clip", "clip needs a folder; write clip:FOLDER"),
        ("dinov2:", "dinov2 needs a folder"),
    ],
)
def test_unknown_names_and_details_are_refused(made: list[Any], text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        network(text)
    assert not made


def test_weights_are_given_by_name() -> None:
    entries = ["inception=/w/a=b.pth", "lpips=x"]
    assert given_path("inception", entries) == "/w/a=b.pth"
    assert given_path("clip", entries) is None
    for wrong, sentence in [("inception", "write NAME=PATH"), ("lpips=", "write NAME=PATH"), ("fid=x", "called 'fid'")]:
        with pytest.raises(ValueError, match=sentence):
            given_path("inception", [*entries, wrong])


def test_the_packaged_network_loads_without_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    assert network("emoji-clip").dim == 128
    assert capsys.readouterr().err == ""
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_bars_come_back_after_an_error_and_stay_off_where_they_were() -> None:
    loggers: list[Any] = [transformers.utils.logging, diffusers.utils.logging]

    def fail() -> None:
        with quiet_loading():
            assert not any(logger.is_progress_bar_enabled() for logger in loggers)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(logger.is_progress_bar_enabled() for logger in loggers)
    transformers.utils.logging.disable_progress_bar()
    try:
        with quiet_loading():
            pass
        assert not transformers.utils.logging.is_progress_bar_enabled()
    finally:
        transformers.utils.logging.enable_progress_bar()


def test_devices_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checked_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, sentence in [("cuda:1", "no CUDA device here"), ("gpu", "no device 'gpu'; use cpu, cuda or mps")]:
        with pytest.raises(ValueError, match=sentence):
            checked_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert checked_device("cuda:1") == "cuda:1"
