import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffaccel import zoo
from diffaccel.eval.errors import DataError, MissingWeights
from diffaccel.eval.networks import clip_weights
from diffaccel.eval.networks.clip import (
    OPENAI_MEAN,
    OPENAI_STD,
    clip_score,
    emoji_clip,
    open_clip_extractor,
    transformers_clip,
)
from diffaccel.eval.networks.weights import HOME, WeightsFile, sha256_of
from tests.eval.offline import _no_network  # noqa: F401

CAPTIONS = ["red apple, twemoji style", "crying face", "red heart"]
LONG = "a very long caption of a red apple that lies on a table in the garden of a house by the sea and goes on and on"


def pictures(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]


def test_score_is_a_hundred_cosines():
    images, texts = torch.tensor([[3.0, 0], [1, 1], [1, 0]]), torch.tensor([[1.0, 0], [1, 0], [-2, 0]])
    scores = clip_score(images, texts)
    assert scores.dtype == torch.float64
    assert scores.tolist() == pytest.approx([100, 100 / 2**0.5, -100])
    with pytest.raises(DataError, match=r"\(3, 2\) and \(1, 2\)"):
        clip_score(images, texts[:1])


def test_emoji_clip_is_the_zoos_model_behind_its_processor():
    model, processor = zoo.load("emoji-clip")
    batch = pictures((64, 64), (128, 128), (40, 40))
    ours = emoji_clip()
    features = ours(batch)["features"]
    assert (features.shape, ours.dim, ours.size, ours.protocol) == ((3, 128), 128, 64, "clip")
    assert ours.weights == sha256_of(zoo.path("emoji-clip") / "model.safetensors")
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in batch]
    pixels = torch.stack(
        [torch.from_numpy(np.array(i.resize((64, 64), Image.Resampling.BICUBIC))).permute(2, 0, 1) for i in images]
    )
    with torch.no_grad():
        theirs = model.get_image_features(pixel_values=pixels / 127.5 - 1)
        tokens = processor.tokenizer(
            CAPTIONS, padding="max_length", truncation=True, max_length=24, return_tensors="pt"
        )
        texts = model.get_text_features(**tokens)
        processed = processor.image_processor(images=[batch[0]], return_tensors="pt")["pixel_values"]
        first = model.get_image_features(pixel_values=processed)
    theirs, texts, first = (getattr(x, "pooler_output", x) for x in (theirs, texts, first))
    assert (features - theirs).abs().max() < 1e-4
    assert (features[:1] - first).abs().max() < 1e-4
    assert ours.text is not None
    assert (ours.text(CAPTIONS) - texts).abs().max() < 1e-4


def test_emoji_clip_knows_its_emoji():
    """Captions of the training set score higher with their own kind than with others: the text side is no constant."""
    text = emoji_clip().text
    assert text is not None
    rows = text(["red apple", "red apple, twemoji style", "flag of france", "flag of italy"])
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    assert cosines[0, 1] > cosines[0, 2]
    assert cosines[2, 3] > cosines[0, 3]


def test_long_captions_keep_their_end_and_are_counted():
    text = emoji_clip().text
    assert text is not None
    with pytest.warns(UserWarning, match="2 of 3 captions are longer than 24 tokens"):
        rows = text([LONG, "blue " + LONG, "red heart"])
    assert torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=0) < 0.9999  # torchmetrics: 1.000000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = text(["red heart"])
    assert (rows[2] - alone[0]).abs().max() < 1e-5  # a caption's feature does not depend on its batch


def test_captions_are_taken_in_parts(monkeypatch):
    text = emoji_clip().text
    assert text is not None
    together = text(CAPTIONS)
    monkeypatch.setattr("diffaccel.eval.networks.clip.CAPTIONS_AT_ONCE", 2)
    assert (text(CAPTIONS) - together).abs().max() < 1e-5
    for wrong in ("one caption", []):
        with pytest.raises(DataError, match="must be a list"):
            text(wrong)


@pytest.fixture
def folder(tmp_path) -> Path:
    """The zoo's CLIP as a folder of anybody's CLIP."""
    path = tmp_path / "my-clip"
    shutil.copytree(zoo.path("emoji-clip"), path)
    settings = {"size": {"shortest_edge": 64}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (path / "preprocessor_config.json").write_text(json.dumps(settings | {"resample": 3, "rescale_factor": 1 / 255}))
    return path


def test_transformers_clip_takes_mean_and_deviation_of_the_processor(folder):
    ours, plain = transformers_clip(folder), emoji_clip()
    assert ours.name == "clip/my-clip"
    batch = pictures((64, 64))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    same = ((batch[0] / 255 - mean) / std + 1) * 127.5  # what gives the same numbers behind (x / 127.5 - 1)
    assert (ours(batch)["features"] - plain.network(same[None])["features"]).abs().max() < 1e-4


def test_transformers_clip_refuses_what_it_would_get_wrong(folder):
    with pytest.raises(MissingWeights, match=r"lacks preprocessor_config\.json"):
        transformers_clip(folder.parent)
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    for change in ({"size": {"height": 64, "width": 64}}, {"resample": 2}, {"rescale_factor": 1}):
        file.write_text(json.dumps(settings | change))
        with pytest.raises(DataError, match="another way"):
            transformers_clip(folder)
    file.write_text(json.dumps(settings | {"size": 64}))  # as in files of old
    transformers_clip(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingWeights, match=r"lacks model\.safetensors"):
        transformers_clip(folder)


# --- open_clip, on small networks of random weights

TOWERS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
TAGS = {"openai": True, "laion2b_s32b_b82k": False, "metaclip_400m": True, "squashed": False}


@pytest.fixture
def open_clip(tmp_path, monkeypatch):
    """open_clip with two small models, `tiny` and `tiny-quickgelu`, and a list of weights as ViT-L-14 has."""
    open_clip = pytest.importorskip("open_clip")
    from open_clip import factory, pretrained

    configs = dict(factory._MODEL_CONFIGS) | {"tiny": TOWERS, "tiny-quickgelu": TOWERS | {"quick_gelu": True}}
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", configs)
    real = pretrained._PRETRAINED["ViT-L-14"]
    tags = {tag: real.get(tag, pretrained._slpcfg()) for tag in TAGS}
    for name in ("tiny", "tiny-quickgelu"):
        monkeypatch.setitem(pretrained._PRETRAINED, name, tags)
    return open_clip


def network(open_clip, quick_gelu: bool = True):
    torch.manual_seed(0)
    return open_clip.CLIP(**TOWERS, quick_gelu=quick_gelu).eval()


@pytest.fixture
def weights(open_clip, tmp_path):
    def make(name: str = "some.safetensors") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        state = network(open_clip).state_dict()
        if path.suffix == ".safetensors":
            save_file({key: value.contiguous() for key, value in state.items()}, path)
        else:
            torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
        return path

    return make


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_open_clip_features_are_open_clips(open_clip, weights, quick_gelu):
    net = network(open_clip, quick_gelu)
    preprocess = open_clip.image_transform(32, is_train=False)
    batch = pictures((32, 32), (50, 70), (100, 64))
    model = "tiny-quickgelu" if quick_gelu else "tiny"
    ours = open_clip_extractor(model, weights=weights())
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in batch])
        images = net.encode_image(pixels)
        texts = net.encode_text(open_clip.get_tokenizer(model)(CAPTIONS))
    assert ours.name == f"open_clip/{model}"
    assert (ours.dim, ours.size, ours.protocol) == (16, 32, "clip")
    assert (ours(batch)["features"] - images).abs().max() < 1e-5
    assert ours.text is not None
    assert (ours.text(CAPTIONS) - texts).abs().max() < 1e-5
    other = open_clip_extractor("tiny" if quick_gelu else "tiny-quickgelu", weights=weights())
    assert (other(batch)["features"] - images).abs().max() > 1e-4  # the activation is no small matter


def test_long_captions_keep_their_end_with_open_clip_too(weights):
    text = open_clip_extractor("tiny-quickgelu", weights=weights()).text
    assert text is not None
    with pytest.warns(UserWarning, match="2 of 3 captions are longer than 77 tokens"):
        rows = text([4 * LONG, "blue " + 4 * LONG, "red heart"])
    assert torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=0) < 0.99999


@pytest.mark.parametrize(
    "name",
    ["vit-openai.safetensors", "ViT-L-14.pt", "openai/model.pt", "x-metaclip-400m.pt",
     "models--timm--vit_large_patch14_clip_224.openai/snapshots/0a/open_clip_model.safetensors"],
)  # fmt: skip
def test_quickgelu_weights_need_a_quickgelu_model(weights, name):
    path = weights(name)
    with pytest.raises(DataError, match=r"QuickGELU mismatch: .*use tiny-quickgelu"):
        open_clip_extractor("tiny", weights=path)
    open_clip_extractor("tiny-quickgelu", weights=path)


def test_gelu_weights_need_a_gelu_model_and_bring_their_mean(weights):
    path = weights("models--laion--CLIP-ViT-L-14-laion2B-s32B-b82K/snapshots/0a/open_clip_model.safetensors")
    with pytest.raises(DataError, match=r"QuickGELU mismatch: .*trained with GELU.*use tiny$"):
        open_clip_extractor("tiny-quickgelu", weights=path)
    known, plain = open_clip_extractor("tiny", weights=path), open_clip_extractor("tiny", weights=weights())
    x = torch.rand(1, 3, 32, 32) * 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (OPENAI_MEAN, OPENAI_STD))
    same = ((x / 127.5 - 1) * std + mean) * 255  # these weights want [-1, 1]
    assert (known.network(x)["features"] - plain.network(same)["features"]).abs().max() < 1e-5


def test_a_folder_far_above_says_nothing(weights):
    open_clip_extractor("tiny", weights=weights("openai/mine/checkpoint.pt"))


def test_other_resizing_is_refused(weights):
    with pytest.raises(DataError, match="another way"):
        open_clip_extractor("tiny", weights=weights("squashed.pt"))


def test_a_published_file_is_known_by_its_hash(open_clip, tmp_path, monkeypatch):
    """OpenAI's files are TorchScript with half-precision weights and three numbers among them."""
    from open_clip import pretrained

    class Archive(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in network(open_clip).state_dict().items():
                place: torch.nn.Module = self
                *path, last = name.split(".")
                for part in path:
                    if not hasattr(place, part):
                        place.add_module(part, torch.nn.Module())
                    place = getattr(place, part)
                place.register_buffer(last, value.half() if value.ndim else value)
            self.register_buffer("input_resolution", torch.tensor(32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    path = tmp_path / "any name.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Archive()).save(str(path))
    with pytest.raises(DataError, match="does not fit"):  # somebody's TorchScript is not opened
        open_clip_extractor("tiny-quickgelu", weights=path)
    digest = sha256_of(path)
    spec = WeightsFile("any name.pt", (digest,), "https://example.org", "MIT")
    monkeypatch.setitem(clip_weights.OPENAI, "tiny-quickgelu", spec)
    config = pretrained._PRETRAINED["tiny"]["openai"] | {"url": f"https://example.org/{digest}/tiny.pt"}
    for name in ("tiny", "tiny-quickgelu"):
        monkeypatch.setitem(pretrained._PRETRAINED, name, {"openai": config})
    with pytest.raises(DataError, match=r"QuickGELU mismatch"):
        open_clip_extractor("tiny", weights=path)
    monkeypatch.setenv(HOME, str(tmp_path))
    ours = open_clip_extractor("tiny-quickgelu")  # found by its name and hash
    assert ours.weights == digest
    x = torch.rand(1, 3, 32, 32) * 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (OPENAI_MEAN, OPENAI_STD))
    with torch.no_grad():
        expected = network(open_clip).encode_image((x / 255 - mean) / std)
        assert (ours.network(x)["features"] - expected).abs().max() < 5e-3  # rounded to half precision


def test_what_papers_use_is_looked_for_and_fits_open_clips_list():
    pretrained = pytest.importorskip("open_clip.pretrained")
    for model, spec in clip_weights.OPENAI.items():
        assert pretrained.get_pretrained_cfg(model, "openai")["url"] == spec.url
        assert spec.sha256[0] in spec.url
    with pytest.raises(MissingWeights, match=r"ViT-L-14-336px\.pt"):
        open_clip_extractor("ViT-L-14-336-quickgelu", protocol="cmmd")
    with pytest.raises(ValueError, match="give the weights of ViT-B-16"):
        open_clip_extractor("ViT-B-16")


def test_bad_models_and_files_get_a_sentence(weights, tmp_path):
    with pytest.raises(ValueError, match="no model 'ViT-B-33'"):
        open_clip_extractor("ViT-B-33", weights=weights())
    for model in ("ViT-B-16-SigLIP", "roberta-ViT-B-32", "coca_ViT-B-32"):
        with pytest.raises(ValueError, match="CLIP's own layout"):
            open_clip_extractor(model, weights=weights())
    with pytest.raises(MissingWeights, match="no file"):
        open_clip_extractor("tiny", weights=tmp_path / "nowhere.pt")
    with pytest.raises(DataError, match="does not fit"):
        open_clip_extractor("ViT-B-32", weights=weights())
    for name in ("x.pt", "x.safetensors"):
        (tmp_path / name).write_bytes(b"\x80\x02cos\ngetcwd\n)R.")
        with pytest.raises(DataError, match="does not fit"):
            open_clip_extractor("tiny", weights=tmp_path / name)


def test_protocol_cmmd_crops_first(weights):
    clip, cmmd = (open_clip_extractor("tiny", weights=weights(), protocol=p) for p in ("clip", "cmmd"))
    square, wide = pictures((64, 64), (65, 99))
    assert torch.equal(clip([square])["features"], cmmd([square])["features"])
    assert not torch.equal(clip([wide])["features"], cmmd([wide])["features"])
    assert clip.id != cmmd.id
