"""Write the emoji as a folder of pictures with `metadata.jsonl`, as training scripts want them.

    python examples/train_zoo/pictures.py --data DATA --output_dir PICTURES            # captions
    python examples/train_zoo/pictures.py --data DATA --output_dir CLASSES --classes   # the classes of dit.py

For `examples/train_early_exit.py`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from data import load_emoji
from dit import chosen
from PIL import Image
from presets import PRESETS


def main() -> None:
    """Write the pictures of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare.py wrote")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--classes", action="store_true", help="only the emoji that are classes, with their numbers")
    options = parser.parse_args()
    data = load_emoji(options.data, PRESETS["cpu"])
    data = chosen(data, options.data) if options.classes else data
    options.output_dir.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (picture, captions) in enumerate(zip(data.images, data.captions, strict=True)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(options.output_dir / f"{i:04d}.png")
        told = {"label": i} if options.classes else {"text": captions}
        lines.append(json.dumps({"file_name": f"{i:04d}.png", **told}))
    (options.output_dir / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} pictures")


if __name__ == "__main__":
    main()
