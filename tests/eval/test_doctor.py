"""What the doctor says with and without weights and packages."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from diffaccel.eval import doctor
from diffaccel.eval.errors import DataError, MissingWeights
from tests.eval.offline import _no_network  # noqa: F401

WEIGHTS = "the weights x.pth are not on this machine\n  file      x.pth\n  from      https://example.org/x.pth"


def lacking() -> None:
    raise MissingWeights(WEIGHTS)


@pytest.fixture
def nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFACCEL_EVAL_HOME", str(tmp_path))
    for name in ("find_inception", "lpips"):
        monkeypatch.setattr(doctor, name, lacking)
    monkeypatch.setattr(doctor, "open_clip_extractor", lambda *a, **k: lacking())


@pytest.mark.usefixtures("nothing_here")
def test_everything_that_is_missing_is_listed_and_then_explained() -> None:
    text = doctor.examine()
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("ready")] == [
        "ready    emoji-clip: FD, KD, CMMD, CLIP of the packaged network; PSNR, SSIM, latent MSE"
    ]
    missing = [line.removeprefix("missing  ") for line in lines if line.startswith("missing")]
    assert missing[:2] == ["inception: FID, KID, sFID, IS", "LPIPS"]
    assert "open_clip:ViT-L-14-336-quickgelu:cmmd: CMMD" in missing
    explained = text[text.index("\n\ninception: FID") :]
    assert explained.count("from      https://example.org/x.pth") == len([m for m in missing if "package" not in m])
    assert lines.index("missing  LPIPS") < lines.index("LPIPS:")


@pytest.mark.usefixtures("nothing_here")
def test_what_is_here_is_ready(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "find_inception", lambda: Path("x.pth"))
    monkeypatch.setattr(doctor, "lpips", lambda: None)
    text = doctor.examine()
    assert "ready    inception: FID, KID, sFID, IS\n" in text
    assert "ready    LPIPS\n" in text
    assert "\n\nLPIPS:" not in text
    assert f"DIFFACCEL_EVAL_HOME is {tmp_path}; features of plain folders go to {tmp_path}" in text


@pytest.mark.usefixtures("nothing_here")
def test_damaged_files_and_missing_packages_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged() -> None:
        raise DataError("x.pth is another file")

    def unpackaged(*args: object, **kwargs: object) -> None:
        raise ImportError("open_clip_extractor needs open_clip; pip install 'diffaccel[eval]'")

    whole = importlib.metadata.version

    def version(name: str) -> str:
        if name in doctor.OPTIONAL:
            raise importlib.metadata.PackageNotFoundError(name)
        return whole(name)

    monkeypatch.setattr(doctor, "find_inception", damaged)
    monkeypatch.setattr(doctor, "open_clip_extractor", unpackaged)
    monkeypatch.setattr(importlib.metadata, "version", version)
    text = doctor.examine()
    assert "  x.pth is another file" in text
    assert "  open_clip_extractor needs open_clip" in text
    for package in doctor.OPTIONAL:
        assert f"missing  package {package}: " in text
    assert "versions diffaccel" in text
