import numpy as np
import pytest
import torch
from PIL import Image

from diffaccel.eval.networks.resize import RESIZE, resize

SHAPES = [(32, 32), (64, 64), (150, 233), (299, 512), (512, 512), (768, 511), (1024, 1024)]


def pictures(height: int, width: int, n: int = 2) -> torch.Tensor:
    """Half noise, which every filter treats differently, and half edges, where bicubic overshoots."""
    generator = torch.Generator().manual_seed(height * width)
    noise = torch.randint(0, 256, (n, 3, height, width), generator=generator, dtype=torch.uint8)
    noise[..., width // 2 :] = (noise[..., width // 2 :] > 127) * 255
    return noise


def array(picture: torch.Tensor) -> np.ndarray:
    return picture.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("shape", SHAPES)
def test_clean_is_clean_fids_resize(shape):
    cleanfid = pytest.importorskip("cleanfid.resize")
    batch = pictures(*shape)
    theirs = cleanfid.build_resizer("clean")
    ours = resize(batch, 299, "clean")
    for picture, mine in zip(batch, ours, strict=True):
        assert np.abs(array(mine) - theirs(array(picture))).max() < 3e-5
    assert ours.min() >= 0
    assert ours.max() <= 255
    if shape[0] > 299:  # a filter that clips and rounds would pass the test above only by chance
        assert (ours != ours.round()).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_legacy_pytorch_is_that_of_clean_fid_and_pytorch_fid(shape):
    cleanfid = pytest.importorskip("cleanfid.resize")
    inception = pytest.importorskip("pytorch_fid.inception")
    batch = pictures(*shape)
    ours = resize(batch, 299, "legacy_pytorch")
    theirs = cleanfid.build_resizer("legacy_pytorch")
    assert np.abs(array(ours[0]) - theirs(array(batch[0]))).max() < 1e-4
    # pytorch-fid resizes inside its network, in [0, 1]: its resize alone, from the forward of a network with no blocks
    net = inception.InceptionV3.__new__(inception.InceptionV3)
    torch.nn.Module.__init__(net)
    net.resize_input, net.normalize_input, net.output_blocks, net.last_needed_block = True, True, [0], 0
    net.blocks = torch.nn.ModuleList([torch.nn.Identity()])
    assert (net(batch.float() / 255)[0] - (ours / 127.5 - 1)).abs().max() < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_legacy_tensorflow_is_torch_fidelitys_to_the_bit(shape):
    interpolate = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    batch = pictures(*shape)
    theirs = interpolate.interpolate_bilinear_2d_like_tensorflow1x(batch.float(), size=(299, 299), align_corners=False)
    assert torch.equal(resize(batch, 299, "legacy_tensorflow"), theirs)


@pytest.mark.parametrize("shape", SHAPES)
def test_torchmetrics_is_what_its_inception_sees(shape):
    pytest.importorskip("torch_fidelity")
    fid = pytest.importorskip("torchmetrics.image.fid")
    net = fid.NoTrainInceptionV3.__new__(fid.NoTrainInceptionV3)
    torch.nn.Module.__init__(net)
    net.use_antialias, net.features_list, net.INPUT_IMAGE_SIZE = True, ["64"], 299
    seen: list[torch.Tensor] = []

    class First(torch.nn.Module):
        def forward(self, x):
            seen.append(x)
            raise StopIteration

    net.Conv2d_1a_3x3 = First()
    batch = pictures(*shape)
    with pytest.raises(StopIteration):
        net._torch_fidelity_forward(batch)
    assert torch.equal((resize(batch, 299, "torchmetrics") - 128) / 128, seen[0])


@pytest.mark.parametrize("shape", [*SHAPES, (224, 224), (224, 301), (301, 224)])
def test_clip_is_open_clips_preprocess_to_the_byte(shape):
    transform = pytest.importorskip("open_clip.transform")
    batch = pictures(*shape)
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    theirs = transform.image_transform(224, is_train=False, mean=mean, std=std)
    ours = resize(batch, 224, "clip")
    for picture, mine in zip(batch, ours, strict=True):
        assert torch.equal(mine / 255, theirs(Image.fromarray(array(picture))))


@pytest.mark.parametrize("shape", [(64, 64), (150, 233), (768, 511), (400, 336)])
def test_cmmd_crops_first(shape):
    batch = pictures(*shape)
    height, width = shape
    side = min(shape)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(array(batch[0])[top : top + side, left : left + side])
    expected = np.asarray(square.resize((336, 336), Image.Resampling.BICUBIC))
    ours = resize(batch, 336, "cmmd")[0]
    assert (array(ours) == expected).all()
    if height != width:
        assert not torch.equal(ours, resize(batch, 336, "dinov2")[0])


@pytest.mark.parametrize("shape", [(64, 64), (150, 233), (768, 511)])
def test_dinov2_is_torchvisions_resize_of_a_pillow_picture(shape):
    transforms = pytest.importorskip("torchvision.transforms")
    theirs = transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC)
    batch = pictures(*shape)
    for picture, mine in zip(batch, resize(batch, 224, "dinov2"), strict=True):
        assert (array(mine) == np.asarray(theirs(Image.fromarray(array(picture))))).all()


@pytest.mark.parametrize("protocol", RESIZE)
@pytest.mark.parametrize("shape", [(40, 40), (64, 64), (64, 90), (111, 70)])
def test_shape_type_range_and_batch(protocol, shape):
    batch = pictures(*shape, n=3)
    before = batch.clone()
    ours = resize(batch, 64, protocol)
    assert ours.shape == (3, 3, 64, 64)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    assert ours.min() >= -1e-3
    assert ours.max() <= 255 + 1e-3
    assert torch.equal(batch, before)
    for i in range(3):  # a picture's pixels do not depend on its batch
        assert torch.equal(ours[i : i + 1], resize(batch[i : i + 1], 64, protocol))


@pytest.mark.parametrize("protocol", RESIZE)
def test_a_picture_of_that_size_stays_as_it_is(protocol):
    batch = pictures(64, 64)
    assert torch.equal(resize(batch, 64, protocol), batch.float())
    assert torch.equal(RESIZE[protocol](batch, 64), batch.float())  # the program's own arithmetic does so too


def test_bad_input_gets_a_sentence():
    with pytest.raises(ValueError, match=r"'area'.*clean, legacy_pytorch"):
        resize(pictures(8, 8), 4, "area")
    with pytest.raises(ValueError, match=r"uint8 \(N, 3, H, W\), not torch.float32"):
        resize(pictures(8, 8).float(), 4, "clean")
    with pytest.raises(ValueError, match=r"\(3, 8, 8\)"):
        resize(pictures(8, 8)[0], 4, "clean")
