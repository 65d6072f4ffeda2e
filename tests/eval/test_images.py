import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from diffaccel.eval.errors import DataError
from diffaccel.eval.images import check_pictures, from_floats, list_pictures, read_picture, to_floats


def noise(height: int = 12, width: int = 9, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8).squeeze()


def saved(path: Path, array: np.ndarray | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise() if array is None else array).save(path, **options)
    return path


def array(picture: torch.Tensor) -> np.ndarray:
    assert picture.dtype == torch.uint8
    assert picture.is_contiguous()
    return picture.permute(1, 2, 0).numpy()


def test_list_is_recursive_natural_and_leaves_hidden_and_temporary_files_out(tmp_path):
    wanted = ["2.png", "10.PNG", "a/1.JPeG", "a/b/3.webp", "a.jpg", "b2/x.TIF", "b10/x.tiff", "c.bmp"]
    others = [".x.png", ".cache/1.png", "shard-3.tmp/1.png", "1.png.part", "notes.txt", "old.part/2.png", "png"]
    for name in [*wanted, *others]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in list_pictures(tmp_path)]
    assert found == ["2.png", "10.PNG", "a.jpg", "a/1.JPeG", "a/b/3.webp", "b2/x.TIF", "b10/x.tiff", "c.bmp"]


def test_list_follows_links_and_takes_a_folder_named_zip(tmp_path):
    saved(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "set.zip").mkdir()
    (tmp_path / "set.zip" / "part").symlink_to(tmp_path / "elsewhere")
    assert len(list_pictures(tmp_path / "set.zip")) == 1


def test_list_of_nothing_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no pictures in .*\.png, \.jpg"):
        list_pictures(tmp_path)
    with pytest.raises(DataError, match="not a folder"):
        list_pictures(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.tif", "x.webp"])
def test_lossless_files_come_back_to_the_byte(tmp_path, name):
    options = {"lossless": True} if name.endswith("webp") else {}
    assert (array(read_picture(saved(tmp_path / name, **options))) == noise()).all()


@pytest.mark.parametrize("keep", [0, 20, 60, 0.5, -16, -5])
def test_truncated_files_are_errors(tmp_path, keep):
    big = noise(64, 64)
    for name in ("x.png", "x.jpg", "x.webp", "x.bmp", "x.tif"):
        path = saved(tmp_path / name, big)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
        if keep in (-16, -5) and name in ("x.jpg", "x.webp", "x.bmp", "x.tif"):
            continue  # the last bytes of these may be padding
        with pytest.raises(DataError, match=name):
            read_picture(path)


def test_a_flipped_bit_in_a_png_is_an_error(tmp_path):
    path = saved(tmp_path / "x.png", noise(64, 64), compress_level=0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"x\.png"):
        read_picture(path)


def test_what_is_no_picture_is_an_error(tmp_path):
    (tmp_path / "x.png").write_text("<html>404</html>")
    (tmp_path / "folder.png").mkdir()
    for name in ("x.png", "folder.png", "missing.png"):
        with pytest.raises(DataError, match=name):
            read_picture(tmp_path / name)


def test_lenient_pillow_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(DataError, match="LOAD_TRUNCATED_IMAGES"):
        read_picture(saved(tmp_path / "x.png"))


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 128, 129, 257], [32768, 40000, 65406, 65535]], dtype=np.uint16)
    for name in ("x.png", "x.tif"):
        picture = array(read_picture(saved(tmp_path / name, values)))
        assert (picture == np.rint(values / 257).astype(np.uint8)[..., None]).all()
    clipped = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))[..., 0]
    assert (clipped[1] == 255).all()  # what other programs see


def test_sixteen_bit_colour_is_the_high_byte(tmp_path):
    values = noise(4, 5).astype(np.uint16) * 257
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    (tmp_path / "x.png").write_bytes(data)
    assert (array(read_picture(tmp_path / "x.png")) == noise(4, 5)).all()


def test_values_of_unknown_range_are_errors(tmp_path):
    for mode in (np.float32, np.int32):
        with pytest.raises(DataError, match="range is unknown"):
            read_picture(saved(tmp_path / "x.tif", noise(channels=1).astype(mode)))


def test_grey_palette_bilevel_and_cmyk_become_rgb(tmp_path):
    grey = noise(channels=1)
    assert (array(read_picture(saved(tmp_path / "l.png", grey))) == grey[..., None]).all()
    image = Image.fromarray(noise()).quantize(16)
    image.save(tmp_path / "p.png")
    assert (array(read_picture(tmp_path / "p.png")) == np.asarray(image.convert("RGB"))).all()
    Image.fromarray(grey > 127).save(tmp_path / "1.png")
    assert (array(read_picture(tmp_path / "1.png")) == (grey > 127)[..., None] * 255).all()
    flat = np.full((16, 16, 3), (200, 40, 90), dtype=np.uint8)
    Image.fromarray(flat).convert("CMYK").save(tmp_path / "c.jpg", quality=95)
    assert np.abs(array(read_picture(tmp_path / "c.jpg")).astype(int) - flat).max() <= 4


def test_alpha_is_an_error_unless_a_ground_is_given(tmp_path):
    rgba = noise(channels=4)
    path = saved(tmp_path / "x.png", rgba)
    with pytest.raises(DataError, match="alpha='white'"):
        read_picture(path)
    share = rgba[..., 3:] / 255
    for alpha, ground in (("white", 255), ("black", 0)):
        expected = rgba[..., :3] * share + ground * (1 - share)
        assert np.abs(array(read_picture(path, alpha)) - expected).max() <= 1
    assert not torch.equal(read_picture(path, "white"), read_picture(path, "black"))


def test_transparency_of_grey_and_palette_counts_and_opaque_alpha_does_not(tmp_path):
    saved(tmp_path / "la.png", noise(channels=2))
    Image.fromarray(noise()).quantize(16).save(tmp_path / "p.png", transparency=3)
    Image.fromarray(noise(channels=1)).save(tmp_path / "l.png", transparency=int(noise(channels=1)[0, 0]))
    for name in ("la.png", "p.png", "l.png"):
        with pytest.raises(DataError, match="transparency"):
            read_picture(tmp_path / name)
        assert read_picture(tmp_path / name, "black").shape == (3, 12, 9)
    opaque = np.dstack([noise(), np.full((12, 9), 255, np.uint8)])
    assert (array(read_picture(saved(tmp_path / "o.png", opaque))) == noise()).all()


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise
    picture = array(read_picture(saved(tmp_path / "x.png", exif=exif)))
    assert (picture == np.rot90(noise(), -1)).all()


def test_animations_are_errors(tmp_path):
    frames = [Image.fromarray(noise(seed=i)) for i in range(3)]
    frames[0].save(tmp_path / "x.webp", save_all=True, append_images=frames[1:], lossless=True)
    with pytest.raises(DataError, match="3 frames"):
        read_picture(tmp_path / "x.webp")


def folder_of(tmp_path: Path, good: int, bad: int) -> list[Path]:
    for i in range(good):
        saved(tmp_path / f"{i}.png", noise(4, 4, seed=i))
    for i in range(bad):
        (tmp_path / f"bad{i}.png").write_bytes(b"")
    return list_pictures(tmp_path)


def test_all_bad_files_are_named_at_once(tmp_path):
    paths = folder_of(tmp_path, 2, 3)
    with pytest.raises(DataError) as caught:
        check_pictures(paths)
    assert str(caught.value).startswith("3 of 5 pictures cannot be used:")
    assert all(f"bad{i}.png: " in str(caught.value) for i in range(3))
    assert "more" not in str(caught.value)


def test_only_the_first_twenty_are_listed(tmp_path):
    with pytest.raises(DataError) as caught:
        check_pictures(folder_of(tmp_path, 0, 25))
    assert str(caught.value).count("bad") == 20
    assert "... and 5 more" in str(caught.value)


def test_one_in_a_hundred_may_be_skipped_if_asked(tmp_path):
    paths = folder_of(tmp_path, 99, 1)
    with pytest.raises(DataError, match="1 of 100"):
        check_pictures(paths)
    check = check_pictures(paths, skip_bad=True)
    assert len(check.good) == 99
    assert [path.name for path in check.bad] == ["bad0.png"]
    with pytest.raises(DataError, match=r"1 of 99 .*more than the 1%"):
        check_pictures([path for path in paths if path.name != "5.png"], skip_bad=True)


def test_constant_pictures_duplicates_and_sizes_are_counted(tmp_path):
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 6, 3), 128, np.uint8)
    striped = black + np.array([255, 0, 0], np.uint8)  # one colour everywhere, not one value
    names = {
        "0.png": black,
        "1.png": grey,
        "2.png": striped,
        "3.png": noise(4, 4),
        "4.bmp": noise(4, 4),
        "5.png": black,
    }
    check = check_pictures([saved(tmp_path / name, value) for name, value in names.items()])
    assert [path.name for path in check.constant] == ["0.png", "1.png", "2.png", "5.png"]
    assert [path.name for path in check.duplicates] == ["4.bmp", "5.png"]
    assert check.sizes == {(4, 4): 5, (4, 6): 1}
    assert not check.bad
    # the same bytes in another shape are another picture
    paths = [saved(tmp_path / "a.png", black + 1), saved(tmp_path / "b.png", np.ones((2, 8, 3), np.uint8))]
    assert not check_pictures(paths).duplicates


def test_floats_are_rounded(tmp_path):
    values = torch.tensor([0.0, 1.4 / 255, 1.6 / 255, 0.9999, 1.0005, -0.0005]).view(1, 1, 6).repeat(3, 1, 1)
    assert from_floats(values)[0, 0].tolist() == [0, 1, 2, 255, 255, 0]
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(3, 1, 1)
    assert torch.equal(from_floats(to_floats(every)), every)
    assert torch.equal(from_floats((every.float() / 255).half()), every)


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "finite"), (float("inf"), "finite"), (1.01, "1.01"), (-0.5, r"\(x \+ 1\) / 2")],
)
def test_floats_that_would_wrap_are_errors(value, message):
    pictures = torch.full((2, 3, 4, 4), 0.5)
    pictures[1, 2, 3, 3] = value
    with pytest.raises(DataError, match=message):
        from_floats(pictures)


def test_other_tensors_are_errors():
    with pytest.raises(DataError, match="bytes already"):
        from_floats(torch.zeros(3, 4, 4, dtype=torch.uint8))
    with pytest.raises(DataError, match="int64"):
        to_floats(torch.zeros(3, 4, 4, dtype=torch.int64))
    with pytest.raises(DataError, match=r"\(4, 4, 3\)"):
        to_floats(torch.zeros(4, 4, 3))
