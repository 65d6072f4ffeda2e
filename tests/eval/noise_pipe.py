"""A pipeline of coloured noise, which costs nothing and gets better with its steps, and runs made with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor, nn

from diffaccel.eval import Extractor, Prompt, generate, read_run
from diffaccel.eval.runs.run import Run

CONFIG = {"num_train_timesteps": 10}
PROMPTS = [Prompt(f"p{i}", f"picture {i}") for i in range(30)]


class NoisePipe:
    """Smooth noise of each generator, and an error of 1 / steps; `size` is in pixels."""

    def __init__(self, size: int = 16) -> None:
        self.size = size
        self.unet = nn.Linear(4, 4, bias=False)
        nn.init.ones_(self.unet.weight)
        self.components = {"unet": self.unet}
        self.device = torch.device("cpu")
        self.scheduler: Any = SimpleNamespace(config=CONFIG)
        self.spoil: Callable[[Tensor], Tensor] = lambda pictures: pictures
        self.calls = 0

    def set_progress_bar_config(self, **config: Any) -> None:
        """There is no bar."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str],
        num_inference_steps: int = 2,
        generator: Any = None,
        output_type: str = "np",
        callback_on_step_end: Any = None,
    ) -> ImagePipelineOutput:
        self.calls += 1
        generators = generator if isinstance(generator, list) else [generator] * len(prompt)
        latents = torch.stack([torch.randn(2, 3, 4, 4, generator=g) for g in generators])
        for _ in range(num_inference_steps):
            self.unet(torch.ones(len(prompt), 4))
        final = latents[:, 0] + latents[:, 1] / num_inference_steps
        if callback_on_step_end is not None:
            callback_on_step_end(self, num_inference_steps - 1, 0, {"latents": final})
        pictures = F.interpolate(final, size=self.size, mode="bilinear").sigmoid()
        return ImagePipelineOutput(self.spoil(pictures.movedim(1, -1)).numpy())


def make_run(out: Path, steps: int, *, prompts: Sequence[Prompt] = PROMPTS, size: int = 16, **options: Any) -> Run:
    """A finished run."""
    options = {"latents": True, "progress": False, "num_inference_steps": steps} | options
    return read_run(generate(NoisePipe(size), prompts, out, **options))


def colours(name: str = "colours", text: bool = True) -> Extractor:
    """Mean colours of the four quarters of a picture, and lengths of words: 12 features of both."""

    def network(pixels: Tensor) -> dict[str, Tensor]:
        return {"features": F.adaptive_avg_pool2d(pixels / 255, 2).flatten(1)}

    def words(texts: Sequence[str]) -> Tensor:
        return torch.stack([torch.tensor([len(text) % k for k in range(2, 14)]).float() + 1 for text in texts])

    return Extractor(name, 12, 8, "clean", "", network, words if text else None)
