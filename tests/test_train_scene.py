"""The recipe of `emoji-scene-256`: what is drawn is what the caption says, and the result opens in diffusers."""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffaccel import zoo

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "examples" / "train_zoo"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Imports the recipe's modules and those of the benchmarks by name, and forgets them afterwards."""
    monkeypatch.syspath_prepend(str(RECIPE))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "").parent in (RECIPE, ROOT / "benchmarks"):
            del sys.modules[name]


def test_places_are_inside_and_apart(recipe: Callable[[str], ModuleType]) -> None:
    scene = recipe("scene")
    random.seed(0)
    for _ in range(50):
        found = scene.places(5)
        assert 2 <= len(found) <= 5
        covered = np.zeros((scene.SIZE, scene.SIZE), int)
        for left, top, size in found:
            assert min(left, top) >= 0
            assert max(left, top) + size <= scene.SIZE
            covered[top : top + size, left : left + size] += 1
        assert (covered > 1).sum() < 0.2 * (covered > 0).sum()


def test_a_collage_holds_what_its_captions_list(recipe: Callable[[str], ModuleType]) -> None:
    scene = recipe("scene")
    random.seed(0)
    names = ["red", "green", "blue", "black", "grey", "yellow", "cyan"]
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (128, 128, 128), (255, 255, 0), (0, 255, 255)]
    emoji = torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 64, 64)
    for _ in range(10):
        picture, captions = scene.collage(emoji, names)
        assert picture.shape == (3, 256, 256)
        assert -1 <= picture.min() < picture.max() <= 1
        listed = {tuple(sorted(text.replace(" and ", ", ").split(", "))) for text in captions}
        assert len(listed) == 1, captions
        shown = [
            name
            for name, colour in zip(names, colours, strict=True)
            if (picture - (torch.tensor(colour)[:, None, None] / 127.5 - 1)).abs().amax(0).lt(0.01).sum() > 500
        ]
        assert tuple(sorted(shown)) == listed.pop()


@pytest.mark.parametrize(
    ("names", "text"), [(["cat"], "cat"), (["cat", "bus"], "cat and bus"), (["a", "b", "c"], "a, b and c")]
)
def test_captions(recipe: Callable[[str], ModuleType], names: list[str], text: str) -> None:
    assert recipe("scene").caption(names) == text


def test_the_vocabulary_holds_the_first_emoji_of_a_name(recipe: Callable[[str], ModuleType], tmp_path: Path) -> None:
    rows = [
        (["fish"], "noto", "animal marine", ""),
        (["fish"], "twemoji", "animal marine", "light skin"),
        (["heart suit"], "twemoji", "game", ""),
        (["slice of pizza", "pizza"], "twemoji", "food prepared", ""),
        (["cat"], "twemoji", "animal mammal", ""),
        (["other", "cat"], "twemoji", "animal mammal", ""),
    ]
    pictures = np.arange(len(rows), dtype=np.uint8)[:, None, None, None] * np.ones((1, 64, 64, 3), np.uint8)
    np.savez(tmp_path / "emoji64.npz", x=pictures)
    meta = {"captions": [names for names, *_ in rows], "keys": [key for _, *key in rows]}
    (tmp_path / "emoji_meta.json").write_text(json.dumps(meta))
    images, names = recipe("scene").vocabulary(tmp_path)
    assert dict(zip(names, images[:, 0, 0, 0].tolist(), strict=True)) == {"pizza": 3, "cat": 4}


def test_the_longest_caption_fits_the_text_encoder(recipe: Callable[[str], ModuleType]) -> None:
    scene, tokenizer = recipe("scene"), zoo.load("emoji-sd").tokenizer
    longest = sorted(scene.NAMES, key=lambda name: -len(tokenizer.tokenize(name)))[: scene._COUNT[1]]
    assert len(tokenizer(scene.caption(longest)).input_ids) <= recipe("tokenizer").LENGTH


def test_a_dry_run_makes_a_pipeline_and_resumes(
    recipe: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scene = recipe("scene")
    monkeypatch.setattr(scene, "_BATCH", 2)
    arguments = ["--data", "synthetic", "--output_dir", str(tmp_path), "--seconds", "600", "--collages", "2"]
    scene.main([*arguments, "--steps", "1"])
    scene.main([*arguments, "--steps", "2", "--resume"])
    printed = capsys.readouterr().out
    assert "resumed at step 1," in printed
    assert printed.count("0 of 2 collages") == 1  # the resumed run reads them
    folder = tmp_path / "emoji-scene-256"
    assert not any(str(tmp_path) in file.read_text() for file in folder.rglob("*.json"))
    whole = StableDiffusionPipeline.from_pretrained(folder).to(torch.float32)
    from_parts = recipe("scenes").load(folder)
    pictures = []
    pipe: Any
    for pipe in (whole, from_parts):
        pipe.set_progress_bar_config(disable=True)
        call = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
        pictures.append(pipe("thing 1 and thing 2", **call).images[0])
    assert pictures[0].shape == (256, 256, 3)
    np.testing.assert_allclose(pictures[0], pictures[1], atol=1e-5)


def test_text_encoder_and_unet_both_learn(recipe: Callable[[str], ModuleType]) -> None:
    scene = recipe("scene")
    torch.manual_seed(0)
    model = scene.Scene(zoo.load("emoji-sd")).requires_grad_(True)
    scene.SceneLoss()(model, (torch.randn(1, 4, 16, 16), torch.arange(24)[None])).backward()
    assert model.unet.conv_in.weight.grad.abs().sum() > 0
    assert model.text_encoder.get_input_embeddings().weight.grad.abs().sum() > 0


def test_a_second_round_starts_from_the_weights_of_the_first(
    recipe: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, first = recipe("scene"), tmp_path / "first"
    monkeypatch.setattr(scene, "_BATCH", 1)
    pipe = zoo.load("emoji-sd")
    for part in ("unet", "text_encoder"):
        model = getattr(pipe, part)
        for value in model.parameters():
            torch.nn.init.zeros_(value)
        model.save_pretrained(first / part)
    arguments = ["--data", "synthetic", "--output_dir", str(tmp_path), "--seconds", "600", "--collages", "1"]
    scene.main([*arguments, "--steps", "1", "--init", str(first)])
    trained: Any = recipe("scenes").load(tmp_path / "emoji-scene-256")
    for model in (trained.unet, trained.text_encoder):
        assert all(value.abs().max() < 1e-2 for value in model.parameters())
