import pytest
import torch

from diffaccel.eval.errors import DataError
from diffaccel.eval.ssim import C1, ssim


def pair(height: int = 40, width: int = 33, n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(n, 3, height, width, generator=generator)
    return a, (a + 0.2 * torch.randn(a.shape, generator=generator)).clamp(0, 1)


def test_is_torchmetrics_where_the_window_lies_inside():
    functional = pytest.importorskip("torchmetrics.functional.image")
    a, b = pair()
    whole, places = functional.structural_similarity_index_measure(
        a.double(), b.double(), data_range=1.0, reduction="none", return_full_image=True
    )
    inside = places[..., 5:-5, 5:-5].flatten(1).mean(1)
    assert (ssim(a, b) - inside).abs().max() < 1e-12
    assert (ssim(a, b) - whole).abs().max() > 1e-4  # its mean counts mirrored pixels too


def test_constant_pictures_have_a_closed_form():
    a, b = torch.full((1, 3, 16, 16), 0.25), torch.full((1, 3, 16, 16), 0.75)
    expected = (2 * 0.25 * 0.75 + C1) / (0.25**2 + 0.75**2 + C1)
    assert ssim(a, b).item() == pytest.approx(expected, abs=1e-9)


def test_equal_is_one_and_it_is_symmetric_and_falls_with_noise():
    a, b = pair()
    assert ssim(a, a).tolist() == pytest.approx([1, 1, 1], abs=1e-12)
    assert torch.equal(ssim(a, b), ssim(b, a))
    assert (ssim(a, (a + b) / 2) > ssim(a, b)).all()
    assert ssim(a, 1 - a).max() < 0


def test_each_picture_counts_alone_and_bytes_are_as_floats():
    a, b = pair()
    x, y = ((p * 255).round().to(torch.uint8) for p in (a, b))
    assert ssim(x, y).dtype == torch.float64
    assert (ssim(x, y) - ssim(x.float() / 255, y.float() / 255)).abs().max() == 0
    assert (ssim(a, b) - torch.cat([ssim(a[i : i + 1], b[i : i + 1]) for i in range(3)])).abs().max() < 1e-12


def test_bad_input_gets_a_sentence():
    a, b = pair()
    assert ssim(a[..., :11, :11], b[..., :11, :11]).shape == (3,)
    with pytest.raises(DataError, match=r"at least 11 x 11 pixels, not \(10, 33\)"):
        ssim(a[..., :10, :], b[..., :10, :])
    with pytest.raises(DataError, match="of one shape"):
        ssim(a, b[:2])
    with pytest.raises(DataError, match="of one shape"):
        ssim(a[0], b[0])
    with pytest.raises(DataError, match=r"\[0, 1\]"):
        ssim(a * 255, b * 255)
