"""An extractor sees what it should, in exact float32, and leaves the process as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from diffaccel.eval import DataError, callable_extractor
from diffaccel.eval.networks.extractor import exact_float32
from tests.eval import toy
from tests.eval.offline import _no_network  # noqa: F401

BACKENDS: Any = torch.backends
RENAMED = hasattr(BACKENDS.cuda.matmul, "fp32_precision")  # PyTorch 2.9


def seen(*values: Tensor, size: int = 8, protocol: str = "clean") -> Tensor:
    """The pixels that a network gets."""
    found: list[Tensor] = []

    def network(pixels: Tensor) -> Tensor:
        found.append(pixels)
        return pixels.mean((2, 3))

    callable_extractor(network, name="mean", dim=3, size=size, protocol=protocol)(values)
    return found[0]


def picture(height: int = 8, width: int = 8, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_the_network_sees_float32_from_0_to_255() -> None:
    pixels = seen(picture(), picture(seed=1))
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, torch.stack([picture(), picture(seed=1)]).float())


def test_pictures_of_other_sizes_stay_at_their_places() -> None:
    mixed = [picture(), picture(16, 16), picture(seed=2), picture(12, 20)]
    pixels = seen(*mixed)
    for i, one in enumerate(mixed):
        assert torch.equal(pixels[i], seen(one)[0])


def test_types_of_the_process_do_not_matter() -> None:
    extractor = toy.extractor()
    plain = extractor([picture()])["features"]
    torch.set_default_dtype(torch.float64)
    try:
        wide = extractor([picture()])["features"]
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        short = extractor([picture()])["features"]
    assert torch.equal(plain, wide)
    assert torch.equal(plain, short)


@pytest.mark.parametrize(
    "wrong",
    [[], [torch.zeros(3, 8, 8)], [torch.zeros(1, 8, 8, dtype=torch.uint8)], [torch.zeros(8, 8, dtype=torch.uint8)]],
)
def test_what_is_no_picture_is_refused(wrong: list[Tensor]) -> None:
    with pytest.raises(DataError, match="pictures"):
        toy.extractor()(wrong)


def test_features_are_named_after_all_that_decides_them() -> None:
    assert toy.extractor("a/b").id == "a_b-clean"


def state() -> dict[str, Any]:
    """The switches that can be read."""
    cudnn, matmul, cpu = BACKENDS.cudnn, BACKENDS.cuda.matmul, BACKENDS.mkldnn
    reads = {
        "benchmark": lambda: cudnn.benchmark,
        "deterministic": lambda: cudnn.deterministic,
        "cudnn": lambda: cudnn.allow_tf32,
        "matmul": lambda: matmul.allow_tf32,
        "precision": torch.get_float32_matmul_precision,
    }
    if RENAMED:
        owners = {"new matmul": matmul, "new conv": cudnn.conv, "cpu matmul": cpu.matmul, "cpu conv": cpu.conv}
        reads |= {name: lambda owner=owner: owner.fp32_precision for name, owner in owners.items()}
    found = {}
    for name, read in reads.items():
        try:
            found[name] = read()
        except RuntimeError:  # a new name and an old one disagree
            found[name] = "unreadable"
    return found


@pytest.fixture
def _restored() -> Iterator[None]:
    yield
    if RENAMED:
        for owner in (BACKENDS, BACKENDS.cuda.matmul, BACKENDS.cudnn, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn):
            owner.fp32_precision = "none"
        for owner in (BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv, BACKENDS.mkldnn.rnn):
            owner.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    BACKENDS.cudnn.benchmark = BACKENDS.cudnn.deterministic = False


def old_names() -> None:
    BACKENDS.cuda.matmul.allow_tf32 = True
    BACKENDS.cudnn.benchmark = True


def precision() -> None:
    torch.set_float32_matmul_precision("medium")


def new_names() -> None:
    BACKENDS.cuda.matmul.fp32_precision = "tf32"


def new_names_for_all() -> None:
    BACKENDS.fp32_precision = "tf32"


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("set_by_user", [lambda: None, old_names, precision, new_names, new_names_for_all])
def test_tf32_is_off_inside_and_as_it_was_after(set_by_user: Any) -> None:
    if set_by_user in (new_names, new_names_for_all) and not RENAMED:
        pytest.skip("PyTorch >= 2.9 has these names")
    set_by_user()
    before = state()
    with exact_float32():
        inside = state()
    assert state() == before
    exact = {"benchmark": False, "deterministic": True, "cudnn": False, "matmul": False, "precision": "highest"}
    assert {name: inside[name] for name in exact} == exact
    assert all(inside[name] == "ieee" for name in inside if name not in exact)


@pytest.mark.usefixtures("_restored")
def test_tf32_comes_back_after_an_error() -> None:
    old_names()
    before = state()
    with pytest.raises(RuntimeError, match="broken"), exact_float32():
        raise RuntimeError("broken")
    assert state() == before
