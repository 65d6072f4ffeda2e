"""Edit a part of a picture: generate or open it, edit sparsely, take that back, make the same edit dense.

python examples/edit.py [--model PIPELINE] [--prompt "..."] [--edit-prompt "..."] [--mask FILE | --box 10 20 90 99]
python examples/edit.py --image FILE --prompt "what it shows" --edit-prompt "..." --reference self

Prints both reports, and what was gained with the reference counted. The folder gets both pictures and a grid.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops

import diffaccel
from diffaccel.kernels import EditReport, read_mask
from diffaccel.kernels.workbench import load
from diffaccel.pictures import labelled_grid, save_picture

SCENE = "emoji-scene-256"
PLACE = (0.61, 0.1, 1.0, 0.47)  # of a whale, in the picture that is made without arguments: left, top, right, bottom
WEIGHTS = Path(__file__).parent.parent / "benchmarks" / "weights"


def main() -> None:
    """A reference, and one edit of it twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SCENE, help=f"zoo name, folder, hub id (default: {SCENE})")
    parser.add_argument("--prompt", default="whale and boat", help="of the picture")
    parser.add_argument("--edit-prompt", default="frog", help="of the part that is edited")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--mask", type=Path, help="a picture, white where the edit is")
    where.add_argument("--box", type=int, nargs=4, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"), help="in pixels")
    parser.add_argument("--image", type=Path, help="a picture to edit, instead of a generated one")
    parser.add_argument("--reference", choices=("record", "self"), default="record", help="see docs/editing.md")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--strength", type=float, default=1.0, help="last share of the steps that is computed")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("edited"), help="folder")
    args = parser.parse_args()

    pipe: Any = load(str(WEIGHTS / SCENE) if args.model == SCENE else args.model)
    # This is the line. The config has margin, exactness, memory, and more.
    editor = diffaccel.SparseEditPipeline(pipe, diffaccel.SparseEditConfig(reference=args.reference))
    run: dict[str, Any] = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    run["generator"] = torch.Generator().manual_seed(args.seed)
    if args.image is None:
        before = editor.generate(args.prompt, **run).images[0]
    else:
        before = editor.encode(Image.open(args.image).convert("RGB"), args.prompt, **run).images[0]

    mask = Image.open(args.mask) if args.mask else boxed(before, args.box)
    edit = {"prompt": args.edit_prompt, "strength": args.strength}
    sparse, report = edited(editor, mask, **edit)
    editor.undo()  # the next edit begins with the first picture again
    dense, dense_report = edited(editor, mask, **edit, dense=True)
    editor.remove()  # the pipeline is what it was

    print(f"sparse: {report}\n\ndense: {dense_report}\n\n{compared(report, dense_report)}")
    error = (np.asarray(sparse, float) - np.asarray(dense, float))[read_mask(mask, before.size[::-1])[0]]
    print(f"Sparse and dense differ by {np.sqrt((error**2).mean()):.1f} of 255 in the mask (root mean square).")

    region = before if report.region is None else report.region.draw(before)
    change = ImageChops.difference(sparse, dense)
    pictures = {"reference": before, "region": region, "sparse": sparse, "dense": dense, "difference": change}
    titles = ["reference", "mask, and what\nis recomputed", "sparse", "dense", "difference of\nthe two"]
    args.output.mkdir(parents=True, exist_ok=True)
    for name in ("reference", "sparse", "dense"):
        save_picture(pictures[name], args.output / f"{name}.png")
    label = f"{args.prompt}\n-> {args.edit_prompt}\n\nsparse {report.seconds:.1f} s\ndense {dense_report.seconds:.1f} s"
    save_picture(labelled_grid([[*pictures.values()]], [label], titles, cell=256), args.output / "grid.png")
    print(args.output / "grid.png")


def boxed(picture: Image.Image, box: list[int] | None) -> Image.Image:
    """A mask: the box, or PLACE."""
    sides = picture.size * 2
    left, top, right, bottom = box or [round(share * side) for share, side in zip(PLACE, sides, strict=True)]
    mask = Image.new("L", picture.size)
    mask.paste(255, (left, top, right, bottom))
    return mask


def edited(editor: Any, mask: Image.Image, **how: Any) -> tuple[Image.Image, EditReport]:
    """Picture and report of one edit."""
    picture = editor.edit(mask, **how).images[0]
    return picture, editor.report


def compared(sparse: EditReport, dense: EditReport) -> str:
    """In words, the reference included."""
    reference, both = sparse.reference_seconds, sparse.reference_seconds + sparse.seconds
    lines = [
        f"The edit took {sparse.seconds:.2f} s sparse and {dense.seconds:.2f} s dense, each measured once, from text "
        f"to picture: {dense.seconds / sparse.seconds:.1f} times as fast.",
        f"With the reference ({reference:.2f} s, needed once for any number of edits) {both:.2f} s: "
        f"{dense.seconds / both:.1f} times as fast for this one edit.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
