"""Make the evaluation data that come with the package: captions of Twemoji, and features of its pictures.

`python benchmarks/twemoji_reference.py DOWNLOADS` (needs `npm`) writes diffaccel/eval/data/emoji.jsonl and
twemoji-emoji-clip.safetensors, in a minute on one core. What is in them: diffaccel/eval/data/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffaccel.eval.networks.clip import emoji_clip
from diffaccel.eval.runs.prompts import EMOJI, prompts_hash, read_prompts
from diffaccel.pictures import save_text

HERE = Path(__file__).parent
# Names and pictures exactly as in the training of emoji-sd and emoji-clip.
sys.path.insert(0, str(HERE.parent / "examples" / "train_zoo"))
from prepare import npm_package, on_white, plain_words  # noqa: E402  # pyright: ignore[reportMissingImports]

PACKAGE = "emoji-datasource-twitter@16.0.0"
BATCH = 64


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("downloads", type=Path, help="where the npm package is unpacked, or is from an earlier run")
    parser.add_argument("--output", type=Path, default=EMOJI.parent)
    args = parser.parse_args(argv)
    args.downloads.mkdir(parents=True, exist_ok=True)
    args.output.mkdir(parents=True, exist_ok=True)
    pictures = captioned(npm_package(PACKAGE, args.downloads))
    lines = [json.dumps({"prompt": caption, "picture": path.stem}) for caption, path in pictures.items()]
    save_text("\n".join(lines) + "\n", args.output / EMOJI.name)
    save_features(list(pictures.values()), args.output)
    print(f"{len(pictures)} captions and pictures in {args.output}")


def captioned(package: Path) -> dict[str, Path]:
    """Captions and their pictures, in the package's order: no skin tones, no bare components, no caption twice."""
    found: dict[str, Path] = {}
    for entry in json.loads((package / "emoji_pretty.json").read_text()):
        picture = package / "img" / "twitter" / "64" / entry["image"]
        if entry["category"] != "Component" and entry["has_img_twitter"] and picture.exists():
            # Two emoji are called "man in tuxedo": the first keeps the name.
            found.setdefault(f"{plain_words(entry['name'] or entry['short_name'])}, twemoji style", picture)
    return found


def save_features(pictures: Sequence[Path], output: Path) -> None:
    """Features of the pictures in the order of the captions, and in the metadata all that they depend on."""
    extractor = emoji_clip()
    pixels = [torch.tensor(on_white(path)).permute(2, 0, 1) for path in pictures]
    parts: list[Tensor] = [extractor(pixels[i : i + BATCH])["features"] for i in range(0, len(pixels), BATCH)]
    captions = read_prompts(output / EMOJI.name)
    metadata = {
        "extractor": extractor.id,
        "weights": extractor.weights,
        "n": str(len(pictures)),
        "ids": json.dumps([caption.id for caption in captions]),
        "prompts": prompts_hash(captions),
        "source": f"{PACKAGE}, img/twitter/64, on white; all of it is training data of emoji-clip and emoji-sd",
        "licence": "Twemoji, copyright Twitter, Inc and other contributors, CC-BY 4.0",
    }
    file = output / "twemoji-emoji-clip.safetensors"
    scratch = file.with_name(f".{file.name}.part")
    save_file({"features": torch.cat(parts)}, scratch, metadata)
    scratch.chmod(0o644)  # safetensors writes for the owner alone
    scratch.replace(file)


if __name__ == "__main__":
    main()
