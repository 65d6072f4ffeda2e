"""Sparse edits on real weights: how near to the dense edit, how good, how fast, with pictures.

    python benchmarks/edit_scenes.py scene --num 24 --out edits      # benchmarks/weights/emoji-scene-256, 64x64 latents
    python benchmarks/edit_scenes.py emoji --num 24 --out edits      # emoji-sd, 16x16 latents: too small to gain

Each scene is generated from a list of three things. Then one of them, found in the picture by `emoji-clip`, is
replaced: the mask is its surroundings, and the caption names another thing. Rows make the same edit from the same
reference; the dense row runs the whole network, with the outside of the mask held as it is in all rows. Differences to
the dense edit are of pictures in the mask (root mean square, of 1). The score is the cosine of the masked crop to the
new name by `emoji-clip`, which was trained on the same emoji; its differences are paired, with 95 % intervals over the
scenes. Times: the edit end to end, all rows in turn for each scene; the reference's time is beside them.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import scenes
import torch
from PIL import Image

import diffaccel
from diffaccel import zoo
from diffaccel.cost import processor
from diffaccel.eval import paired_interval
from diffaccel.kernels import SparseEditConfig, SparseEditPipeline
from diffaccel.kernels.boxes import bounding_boxes
from diffaccel.pictures import labelled_grid, save_picture, save_text

NAMES = ("apple", "banana", "carrot", "pizza", "cake", "sunflower", "rose", "cat", "dog", "pig", "frog", "bear", "fish")
NAMES += ("whale", "heart", "star", "crescent moon", "rainbow", "fire", "bus", "rocket", "basketball")
GUIDANCE = 4.0
RECORD = {
    "record": SparseEditConfig(),
    "record, margin 0": SparseEditConfig(margin=0),
    "record, margin 8": SparseEditConfig(margin=8),
    "record, 16 rows dense": SparseEditConfig(dense_below=16),
    "record, 32 rows dense": SparseEditConfig(dense_below=32),
    "record, bounded 1 %": SparseEditConfig(exactness="bounded", tolerance=0.01),
}
CACHED = {"record, cached": SparseEditConfig(norm="cached")}
SUMS = {"record, sums": SparseEditConfig(norm="incremental")}
SELF = {
    "self 2": SparseEditConfig(reference="self", refresh=2),
    "self 3": SparseEditConfig(reference="self"),
    "self 5": SparseEditConfig(reference="self", refresh=5),
    "self 3, cached": SparseEditConfig(reference="self", norm="cached"),
    "self 3, 32 rows dense": SparseEditConfig(reference="self", dense_below=32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("scene", "emoji"))
    parser.add_argument("--weights", type=Path, default=scenes.FOLDER)
    parser.add_argument("--num", type=int, default=24, help="scenes")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--shown", type=int, default=8, help="scenes in the picture")
    parser.add_argument("--out", type=Path, default=Path("edits"))
    args = parser.parse_args()
    pipe: Any = scenes.load(args.weights) if args.model == "scene" else zoo.load("emoji-sd")
    pipe.scheduler = diffaccel.scheduler("er_ode_1_corrected", pipe, schedule="beta", final="sigma_min")
    pipe.set_progress_bar_config(disable=True)
    judge = Judge()
    rows: dict[str, list[dict[str, float]]] = {}
    shown: list[list[Image.Image]] = []
    for number in range(args.num):
        pictures = one_scene(pipe, judge, number, args.steps, rows)
        print(f"scene {number + 1} of {args.num}: {'no object found' if pictures is None else 'done'}", flush=True)
        if pictures is not None and len(shown) < args.shown:
            shown.append(list(pictures.values()))
            columns = [label.replace(", ", "\n") for label in pictures]
            labels = [f"scene {i + 1}" for i in range(len(shown))]
            args.out.mkdir(parents=True, exist_ok=True)
            save_picture(labelled_grid(shown, labels, columns, cell=128), args.out / f"{args.model}.png")
    settings = {
        "model": args.model,
        "steps": args.steps,
        "guidance_scale": GUIDANCE,
        "threads": torch.get_num_threads(),
    }
    result = settings | {
        "processor": processor(),
        "rows": {name: summary(values, rows) for name, values in rows.items()},
    }
    save_text(json.dumps(result, indent=1), args.out / f"{args.model}.json")
    print(json.dumps(result, indent=1))


def one_scene(
    pipe: Any, judge: Judge, number: int, steps: int, rows: dict[str, list[dict[str, float]]]
) -> dict[str, Image.Image] | None:
    """Make a scene and its edit by every row; pictures by row, or None if none of the things was found in it."""
    chosen = random.Random(number).sample(NAMES, 4)
    old, new = chosen[:3], chosen[3]
    call = {"num_inference_steps": steps, "guidance_scale": GUIDANCE}
    pictures: dict[str, Image.Image] = {}
    for group in (RECORD, CACHED, SUMS, SELF):
        with SparseEditPipeline(pipe, next(iter(group.values()))) as editor:
            noise = torch.Generator().manual_seed(number)
            editor.generate(listed(old), **call, generator=noise)
            before = editor.picture[0]
            if (found := judge.find(before, old)) is None:
                return None
            mask, name = found
            caption = listed([new if thing == name else thing for thing in old])
            if not pictures:
                pictures |= {"reference": before, "mask": tinted(before, mask)}
                pictures["dense"] = edited(editor, mask, caption, rows.setdefault("dense", []), judge, new, dense=True)
            for label, config in group.items():
                editor.config = editor.handle.engine.config = config  # what was recorded is the same for the group
                pictures[label] = edited(editor, mask, caption, rows.setdefault(label, []), judge, new)
                difference = (array(pictures[label]) - array(pictures["dense"]))[mask]
                rows[label][-1]["difference"] = float(np.sqrt((difference**2).mean()))
    return pictures


def edited(
    editor: SparseEditPipeline,
    mask: np.ndarray,
    caption: str,
    row: list[dict[str, float]],
    judge: Judge,
    new: str,
    dense: bool = False,
) -> Image.Image:
    """One row's picture of a scene; its figures are appended to the row."""
    before = editor.picture[0]
    editor.edit(mask, prompt=caption, dense=dense)
    picture, report = editor.picture[0], editor.report
    assert report is not None
    changed = np.abs(array(picture) - array(before))
    row.append(
        {
            "score": judge.score(picture, mask, new),
            "seconds": report.seconds,
            "reference_seconds": report.reference_seconds,
            "share": report.share,
            "memory": report.memory,
            "seam": report.seam or 0.0,
            "outside": report.outside or 0.0,
            "change": float(np.sqrt((changed[mask] ** 2).mean())),
            "difference": 0.0,
        }
    )
    editor.undo()
    return picture


class Judge:
    """What `emoji-clip` sees in parts of a picture."""

    def __init__(self) -> None:
        """Load it, and read the names."""
        self._model, self._processor = zoo.load("emoji-clip")
        self._texts = {name: self._text(name) for name in NAMES}

    def find(self, picture: Image.Image, names: Sequence[str]) -> tuple[np.ndarray, str] | None:
        """Mask around the thing that resembles one of the names most, and its name; None if none does."""
        ink = array(picture).min(axis=-1) < 0.9
        best: tuple[float, Any, str] = (0.2, None, "")
        for top, left, bottom, right in bounding_boxes(ink, 12) if ink.any() else []:
            if not picture.height / 12 <= max(bottom - top, right - left) <= picture.height / 2:
                continue
            mask = np.zeros(ink.shape, bool)
            edge = picture.height // 40
            mask[max(0, top - edge) : bottom + edge, max(0, left - edge) : right + edge] = True
            score, name = max((self.score(picture, mask, name), name) for name in names)
            best = max(best, (score, mask, name), key=lambda found: found[0])
        if best[1] is None and picture.height <= 64:  # a single emoji fills it
            mask = np.zeros(ink.shape, bool)
            mask[16:48, 16:48] = True
            return mask, names[0]
        return None if best[1] is None else (best[1], best[2])

    @torch.no_grad()
    def score(self, picture: Image.Image, mask: np.ndarray, name: str) -> float:
        """Cosine of the masked crop, made square with white, to a name."""
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        crop = picture.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
        side = max(crop.size)
        square = Image.new("RGB", (side, side), "white")
        square.paste(crop, ((side - crop.width) // 2, (side - crop.height) // 2))
        given = self._processor(images=square, return_tensors="pt")
        seen = self._model.visual_projection(self._model.vision_model(**given).pooler_output)[0]
        return float(torch.nn.functional.cosine_similarity(seen, self._texts[name], dim=0))

    @torch.no_grad()
    def _text(self, name: str) -> torch.Tensor:
        given = self._processor(text=[name], return_tensors="pt", padding="max_length", truncation=True)
        return self._model.text_projection(self._model.text_model(**given).pooler_output)[0]


def summary(values: list[dict[str, float]], rows: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of a row, and paired comparisons with the dense one."""
    result: dict[str, Any] = {key: round(float(np.median([v[key] for v in values])), 4) for key in values[0]}
    result["scenes"] = len(values)
    score, dense = ([v["score"] for v in row] for row in (values, rows["dense"]))
    result["score"] = round(float(np.mean(score)), 4)
    if len(values) < 2:
        return result
    gain = np.array(score) - np.array(dense)
    half = 1.96 * float(gain.std(ddof=1)) / len(gain) ** 0.5
    result["score_difference"] = [round(float(gain.mean()), 4), round(half, 4)]
    ratio = paired_interval([v["seconds"] for v in rows["dense"]], [v["seconds"] for v in values], range(len(values)))
    result["speedup"] = {key: round(value, 3) for key, value in asdict(ratio).items() if isinstance(value, float)}
    return result


def listed(names: Sequence[str]) -> str:
    """As the captions that the model was trained on."""
    return f"{', '.join(names[:-1])} and {names[-1]}"


def tinted(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """The picture with the mask in red."""
    shown = picture.copy()
    shown.paste((255, 60, 60), mask=Image.fromarray(mask.astype(np.uint8) * 110))
    return shown


def array(picture: Image.Image) -> np.ndarray:
    """In [0, 1]."""
    return np.asarray(picture.convert("RGB"), dtype=np.float64) / 255


if __name__ == "__main__":
    main()
