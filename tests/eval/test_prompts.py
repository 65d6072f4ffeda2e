"""Prompts: every format read, every way a file can be wrong told in a sentence with its line, ids that stay unique."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from diffaccel import zoo
from diffaccel.eval.errors import DataError
from diffaccel.eval.runs.prompts import EMOJI, Prompt, prompts_hash, read_prompts


@pytest.fixture
def write(tmp_path: Path):
    def written(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return written


def pairs(prompts: list[Prompt]) -> list[tuple[str, str]]:
    return [(prompt.id, prompt.text) for prompt in prompts]


CAT_AND_DOG = [("cat", "cat"), ("7", "a dog, red")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"prompt": "cat"}\n\n{"caption": " a dog, red\\n", "id": 7}\n'),
        ("a.JSONL", '\ufeff{"text": "cat", "seed": 1}\r\n{"text": "a dog, red", "id": "7"}'),
        ("a.csv", '\ufeffid,Caption\n,cat\n7,"a dog, red"\n\n'),
        ("a.csv", 'prompt,id\rcat,\r"a dog, red",7\r'),
        ("a.tsv", "Prompt\tNote\tid\ncat\tx\t\na dog, red\t\t7\r\n"),
        ("a.tsv", 'id\ttext\n\tcat\n7\t"a dog, red"\n'),
    ],
)
def test_files_are_read(write, name: str, content: str) -> None:
    assert pairs(read_prompts(write(name, content))) == CAT_AND_DOG


def test_plain_text_is_a_prompt_a_line(write) -> None:
    path = write("a.txt", "\ufeffcat, red \r\n\n \n  dog\u2028cow\n")
    assert [prompt.text for prompt in read_prompts(path)] == ["cat, red", "dog\u2028cow"]
    assert read_prompts(str(path)) == read_prompts(path)


def test_line_breaks_inside_quotes_belong_to_the_prompt(write) -> None:
    assert read_prompts(write("a.csv", 'prompt\n"two\nlines, ""so"""\n')) == [Prompt(s := 'two\nlines, "so"', s)]


def test_quotes_within_a_tab_separated_prompt_stay(write) -> None:
    lines = ['"Stop" on a sign', '"all of ""it"""', 'a "word" here']
    texts = [prompt.text for prompt in read_prompts(write("a.tsv", "\n".join(["Prompt", *lines])))]
    assert texts == ['"Stop" on a sign', 'all of "it"', 'a "word" here']


def test_coco_gives_one_caption_a_picture(write) -> None:
    annotations = [
        {"id": 12, "image_id": 30, "caption": "late"},
        {"id": 11, "image_id": 9, "caption": "second\n"},
        {"id": 2, "image_id": 30, "caption": "early"},
        {"id": 10, "image_id": 9, "caption": "first"},
    ]
    path = write("captions.json", json.dumps({"images": [], "annotations": annotations}))
    assert pairs(read_prompts(path)) == [("9", "first"), ("30", "early")]
    assert pairs(read_prompts(path, limit=1)) == [("9", "first")]


def test_repeated_texts_get_ids_of_their_own(write) -> None:
    assert [p.id for p in read_prompts(["cat", "dog", "cat ", "cat"])] == ["cat", "dog", "cat#2", "cat#3"]
    assert [p.id for p in read_prompts(["cat", "cat", "cat#2"])] == ["cat", "cat#2", "cat#2#2"]
    lines = [{"prompt": "cat"}, {"prompt": "cow", "id": "cat"}, {"prompt": "cat"}]
    path = write("a.jsonl", "\n".join(map(json.dumps, lines)))
    assert [p.id for p in read_prompts(path)] == ["cat#2", "cat", "cat#3"]


def test_a_limit_keeps_the_ids(write) -> None:
    path = write("a.jsonl", '{"prompt": "cat"}\n{"prompt": "cow", "id": "cat"}\n')
    assert read_prompts(path, limit=1) == read_prompts(path)[:1]
    assert len(read_prompts(["a", "b"], limit=5)) == 2
    with pytest.raises(ValueError, match="limit must be at least 1"):
        read_prompts(["a"], limit=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"cat\ncaf\xe9\n", "line 2 is not UTF-8"),
        ("a.txt", b"\xef\xbb\xbfcat\n\xff", "line 2 is not UTF-8"),
        ("a.txt", "\n \n", "has no prompts"),
        ("a.md", "cat", r"not a list of prompts: .*\.jsonl"),
        ("a.jsonl", '{"prompt": "cat"}\n{"prompt": ', "line 2 is not JSON"),
        ("a.jsonl", '"cat"', "line 1 is not a JSON object"),
        ("a.jsonl", '\n{"Promt": "cat", "id": 1}', "line 2 has no prompt, caption or text; its keys are Promt, id"),
        ("a.jsonl", '{"prompt": 3}', "line 1 must have a string as prompt, not 3"),
        ("a.jsonl", '{"prompt": " "}', "line 1 is an empty prompt"),
        ("a.jsonl", r'{"prompt": "\ud800"}', "line 1 holds half of a surrogate pair"),
        ("a.jsonl", '{"prompt": "cat", "id": 1.5}', "line 1 has the id 1.5"),
        ("a.jsonl", '{"prompt": "cat", "id": true}', "line 1 has the id True"),
        ("a.jsonl", '{"prompt": "cat", "id": ""}', "line 1 has the id ''"),
        (
            "a.jsonl",
            '{"prompt": "cat", "id": 1}\n{"prompt": "dog", "id": "1"}',
            r"line 2 repeats the id '1' of .*line 1",
        ),
        ("a.csv", "", "no column named prompt, caption or text in its first line; its columns are none"),
        ("a.csv", "name,id\ncat,1\n", "its columns are name, id"),
        ("a.csv", "prompt,id\na dog, red,1\n", "line 2 has 3 fields, the first line 2; quote"),
        ("a.csv", 'prompt\n"cat\n', "is not CSV"),
        ("a.csv", "prompt,id\n,1\n", "line 2 is an empty prompt"),
        ("a.tsv", "prompt\tid\ncat\n", "line 2 has 1 fields"),
        ("a.json", '{"annotations": [{"id": 1, "image_id": 1, "category_id": 3}]}', "not a COCO captions file"),
        ("a.json", '["cat"]', "not a COCO captions file"),
        ("a.json", "{", "not a COCO captions file"),
        ("a.json", '{"annotations": []}', "has no prompts"),
        ("a.json", '{"annotations": [{"id": 1, "image_id": 4, "caption": ""}]}', "image 4 is an empty prompt"),
    ],
)
def test_wrong_files_are_told_in_a_sentence(write, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_prompts(write(name, content))


def test_missing_files_and_wrong_lists_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.txt cannot be read: No such file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(DataError, match="prompt 1 of the list must have a string as prompt, not None"):
        read_prompts(["cat", None])  # type: ignore[list-item]
    with pytest.raises(DataError, match="the list has no prompts"):
        read_prompts([])


def test_the_hash_is_of_ids_and_texts_in_order() -> None:
    a, b = Prompt("1", "é"), Prompt("2", "b")
    assert prompts_hash([a, b]) == hashlib.sha256(b'[["1","\\u00e9"],["2","b"]]').hexdigest()
    assert len({prompts_hash(p) for p in ([a, b], [b, a], [a], [Prompt("1", "b")], [Prompt("b", "1")])}) == 5


def test_the_packaged_captions_are_those_emoji_sd_was_trained_with() -> None:
    prompts = read_prompts("emoji")
    assert len(prompts) == 1905
    assert all(prompt.id == prompt.text and prompt.text.endswith(", twemoji style") for prompt in prompts)
    assert Prompt("grinning face, twemoji style", "grinning face, twemoji style") in prompts


def test_the_packaged_features_are_of_these_captions_and_the_zoo_s_weights() -> None:
    with safe_open(EMOJI.parent / "twemoji-emoji-clip.safetensors", framework="numpy") as file:
        features, about = file.get_tensor("features"), file.metadata()
    prompts = read_prompts("emoji")
    assert features.shape == (1905, 128)
    assert json.loads(about["ids"]) == [prompt.id for prompt in prompts]
    assert about["prompts"] == prompts_hash(prompts)
    weights = (zoo.path("emoji-clip") / "model.safetensors").read_bytes()
    assert about["weights"] == hashlib.sha256(weights).hexdigest()


@pytest.mark.slow
def test_the_script_that_makes_the_data(tmp_path: Path) -> None:
    package = tmp_path / "npm" / "emoji-datasource-twitter@16.0.0" / "package"
    pictures = package / "img" / "twitter" / "64"
    pictures.mkdir(parents=True)
    names = ["RED  APPLE", "Red apple", "SKIN", "gone", "Café no. 1"]  # twice, a component, without its picture
    entries = [
        {"name": name, "short_name": name, "image": f"{i}.png", "has_img_twitter": True, "category": "Food"}
        for i, name in enumerate(names)
    ]
    entries[2]["category"] = "Component"
    for i in (0, 1, 2, 4):
        Image.new("RGBA", (64, 64), (200, 40 * i, 0, 255)).save(pictures / f"{i}.png")
    (package / "emoji_pretty.json").write_text(json.dumps(entries))
    script = Path(__file__).parents[2] / "benchmarks" / "twemoji_reference.py"
    out = tmp_path / "out"
    command = [sys.executable, str(script), str(tmp_path / "npm"), "--output", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    lines = [json.loads(line) for line in (out / "emoji.jsonl").read_text().splitlines()]
    assert lines == [
        {"prompt": "red apple, twemoji style", "picture": "0"},
        {"prompt": "caf no 1, twemoji style", "picture": "4"},
    ]
    with safe_open(out / "twemoji-emoji-clip.safetensors", framework="numpy") as file:
        features, about = file.get_tensor("features"), file.metadata()
    assert features.shape == (2, 128)
    assert np.isfinite(features).all()
    assert about["prompts"] == prompts_hash(read_prompts(out / "emoji.jsonl"))
