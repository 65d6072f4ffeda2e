"""What the page of `diffaccel edit-demo` does, without the page: one picture, and each edit dense and sparse."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image, ImageOps

from diffaccel.kernels.comparison import Comparison
from diffaccel.kernels.config import SparseEditConfig
from diffaccel.kernels.pipeline import SparseEditPipeline
from diffaccel.kernels.region import read_mask
from diffaccel.kernels.report import EditReport
from diffaccel.sample import load_pipeline
from diffaccel.samplers.catalog import DEFAULT, scheduler

Tell = Callable[[float, str], Any]  # share that is done, and of what


class Workbench:
    """A pipeline, and the picture that is edited with it.

    Args:
        pipe: a text-to-image pipeline.
        steps: of a picture.
        size: side of a picture in pixels; default: the model's own, and at least 256.
        guidance_scale: classifier-free guidance.

    Raises:
        TypeError: if the pipeline takes no prompt.
        ValueError: for steps or a size that cannot be.
    """

    def __init__(self, pipe: Any, *, steps: int = 10, size: int | None = None, guidance_scale: float = 4.0):
        names = inspect.signature(type(pipe).__call__).parameters
        if "prompt" not in names:
            raise TypeError(f"{type(pipe).__name__} takes no prompt; edit-demo is for text-to-image pipelines")
        if steps < 1:
            raise ValueError(f"--steps must be 1 or more, not {steps}")
        network = getattr(pipe, "unet", None) or pipe.transformer
        self.own_size = network.config.sample_size * pipe.vae_scale_factor
        self.size = max(256, self.own_size) if size is None else size
        if self.size < 8 or self.size % 8:
            raise ValueError(f"--size must be a multiple of 8, such as 256, not {self.size}")
        # Features of all steps can be gigabytes; half, since an edit keeps its own besides until it is accepted.
        self.editor = SparseEditPipeline(pipe, SparseEditConfig(memory_limit=_free_memory(pipe.device) // 2))
        self._call = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
        if "callback_on_step_end" in names:
            self._call["callback_on_step_end"] = self._stepped
        self._tell: Callable[[int], Any] = lambda step: None
        self._steps = steps
        self._spent = {"edits": 0, "dense": 0.0, "sparse": 0.0}

    @property
    def device(self) -> str:
        """On which it runs."""
        device = torch.device(self.editor.pipe.device)
        return "the processor" if device.type == "cpu" else str(device)

    @property
    def picture(self) -> Image.Image | None:
        """The picture as it is now."""
        return None if self.editor.picture is None else self.editor.picture[0]

    def generate(self, prompt: str, seed: int, config: SparseEditConfig, tell: Tell) -> Image.Image:
        """A new picture, which is kept as the reference of edits."""
        if not prompt.strip():
            raise ValueError("Say in a few words what the picture should show, then click Generate.")
        self._begin(config, tell, "making the picture")
        sides = {"height": self.size, "width": self.size}
        return self.editor.generate(prompt=prompt, generator=_generator(seed), **sides, **self._call).images[0]

    def upload(self, path: str | Path, prompt: str, seed: int, config: SparseEditConfig, tell: Tell) -> Image.Image:
        """A picture from a file, its middle cut to a square; `prompt` may say what it shows."""
        try:
            with Image.open(path) as opened:
                picture = ImageOps.exif_transpose(opened).convert("RGBA")
        except OSError:
            raise ValueError("That file cannot be read as a picture; use a PNG, JPEG or WebP file.") from None
        paper = Image.new("RGBA", picture.size, "white")
        square = ImageOps.fit(Image.alpha_composite(paper, picture).convert("RGB"), (self.size, self.size))
        self._begin(config, tell, "taking the picture in")
        return self.editor.encode(square, prompt, generator=_generator(seed), **self._call).images[0]

    def edit(
        self,
        mask: Any,
        prompt: str,
        config: SparseEditConfig,
        tell: Tell,
        *,
        strength: float = 1.0,
        seed: int | None = None,
    ) -> Comparison:
        """Make the edit dense, take it back, and make it sparse; the sparse one stays.

        Args:
            mask: what `read_mask` takes, of any size; None is an empty one.
            prompt: for the masked part; the picture's own if empty.
            config: margin and exactness are taken from it. The reference stays as it was recorded.
            tell: is told how far it is.
            strength: see `SparseEditPipeline.edit`.
            seed: of new noise in the mask; without, the noise is the picture's.

        Raises:
            ValueError: if there is no picture, or nothing is painted.
        """
        before = self.picture
        if before is None:
            raise ValueError("There is no picture yet: click Generate, or upload one.")
        found = np.zeros((1, self.size, self.size), bool) if mask is None else read_mask(mask, (self.size, self.size))
        if not found.any():
            raise ValueError("Nothing is painted yet: paint over the part that should change, then click Edit.")
        self._configure(replace(config, reference=self.editor.config.reference))
        pictures, reports = {}, {}
        for number, kind in enumerate(("dense", "sparse")):
            self._follow(tell, f"{kind} edit", number / 2, (number + 1) / 2)
            pictures[kind] = self.editor.edit(
                found,
                prompt=prompt if prompt.strip() else None,
                strength=strength,
                generator=None if seed is None else _generator(seed),
                dense=kind == "dense",
            ).images[0]
            assert self.editor.report is not None
            reports[kind] = self.editor.report
            if kind == "dense":
                self.editor.undo()
        return self._compared(before, found, pictures, reports)

    def undo(self) -> Image.Image:
        """Take the last edit back.

        Raises:
            ValueError: if there is none, or it was taken back.
        """
        try:
            self.editor.undo()
        except RuntimeError:
            raise ValueError("There is no edit to take back; only the last one can be.") from None
        assert self.picture is not None
        return self.picture

    # Parts of the above

    def _compared(
        self,
        before: Image.Image,
        mask: np.ndarray,
        pictures: dict[str, Image.Image],
        reports: dict[str, EditReport],
    ) -> Comparison:
        self._spent["edits"] += 1
        for kind, report in reports.items():
            self._spent[kind] += report.seconds
        sparse = reports["sparse"]
        a, b = (np.asarray(picture, dtype=np.float32)[mask[0]] / 255 for picture in pictures.values())
        return Comparison(
            pictures=pictures,
            reports=reports,
            difference=float(np.sqrt(np.mean((a - b) ** 2))),
            edits=int(self._spent["edits"]),
            dense_seconds=self._spent["dense"],
            sparse_seconds=self._spent["sparse"] + sparse.reference_seconds,
            recomputed=before if sparse.region is None else sparse.region.draw(before),
        )

    def _begin(self, config: SparseEditConfig, tell: Tell, what: str) -> None:
        self._configure(config)
        self._spent = {"edits": 0, "dense": 0.0, "sparse": 0.0}
        self._follow(tell, what, 0, 1)

    def _configure(self, config: SparseEditConfig) -> None:
        """Both are read at every call, so that no picture need be made again."""
        self.editor.config = self.editor.handle.engine.config = config

    def _follow(self, tell: Tell, what: str, start: float, end: float) -> None:
        def stepped(step: int) -> None:
            steps = max(self._steps, step)
            tell(start + (end - start) * step / steps, f"{what}: step {step} of {steps}")

        self._tell = stepped
        tell(start, what)

    def _stepped(self, pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self._tell(step + 1)
        return {}


def load(model: str) -> Any:
    """A pipeline with the default scheduler.

    Args:
        model: zoo name, folder or hub id; or a folder with `unet` and `text_encoder` alone, which replace those of
            `emoji-sd`, as in `benchmarks/weights/emoji-scene-256`.
    """
    folder = Path(model)
    if (folder / "unet").is_dir() and not (folder / "model_index.json").exists():
        pipe = load_pipeline("emoji-sd")
        for name in ("unet", "text_encoder"):
            if (folder / name).is_dir():
                old = getattr(pipe, name)
                part = type(old).from_pretrained(folder / name, dtype=old.dtype)
                pipe.register_modules(**{name: part.to(old.device).eval()})
    else:
        pipe = load_pipeline(model)
    pipe.scheduler = scheduler(DEFAULT["solver"], pipe, schedule=DEFAULT["schedule"], final=DEFAULT["final"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _free_memory(device: torch.device) -> int:
    """Bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
