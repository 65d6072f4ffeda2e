"""PixelPipeline: for models that make pixels, class-conditional or not, which no stock pipeline fits."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor


class PixelPipeline(DiffusionPipeline):
    """Sample pixels of a `UNet2DModel` or `DiTTransformer2DModel` with any Diffusers scheduler, flow matching included.

    `DDPMPipeline` knows no classes and `DiTPipeline` wants a VAE. The zoo's CIFAR-10 models are saved in this layout.

    Args:
        scheduler: any scheduler; ours, or a stock one.
        unet: the network, or
        transformer: the network. The null class of guided models is the last of their class embeddings.
    """

    model_cpu_offload_seq = "unet->transformer"
    _optional_components: ClassVar[list[str]] = ["unet", "transformer"]

    def __init__(
        self, scheduler: Any, unet: UNet2DModel | None = None, transformer: DiTTransformer2DModel | None = None
    ) -> None:
        super().__init__()
        if (unet is None) == (transformer is None):
            raise ValueError("PixelPipeline takes one network: unet or transformer")
        self.register_modules(scheduler=scheduler, unet=unet, transformer=transformer)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | None = None,
        batch_size: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Make one picture per label, or `batch_size` pictures of an unconditional model.

        Args:
            class_labels: classes, one per picture; needed by class-conditional models.
            batch_size: number of pictures where there are no labels.
            num_inference_steps: steps of the scheduler.
            guidance_scale: classifier-free guidance; 1 is none.
            generator: noise source, or a list with one per picture.
            output_type: `pil`, `pt` (NCHW in [0, 1]) or `latent` (NCHW in [-1, 1], as the network makes them).
            return_dict: return an `ImagePipelineOutput` instead of a 1-tuple.
        """
        network: Any = self.unet if self.unet is not None else self.transformer
        null = self._null_class(network)
        if null is not None and class_labels is None:
            raise ValueError(f"this model is class-conditional: pass class_labels, each from 0 to {null - 1}")
        if null is None and (class_labels is not None or guidance_scale != 1):
            raise ValueError("this model has no classes: leave class_labels and guidance_scale out")
        count = batch_size if class_labels is None else len(class_labels)
        device = self._execution_device
        labels = None if class_labels is None else torch.tensor(class_labels, device=device)
        size, channels = network.config.sample_size, network.config.in_channels
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        x = randn_tensor((count, channels, size, size), generator=generator, device=device, dtype=network.dtype)
        x = x * getattr(self.scheduler, "init_noise_sigma", 1.0)
        noisy = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if noisy else {}
        bar: Any = self.progress_bar  # its decorator hides its type
        for t in bar(self.scheduler.timesteps):
            seen = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
            output = self._predict(network, seen, t, labels, null, guidance_scale)
            x = self.scheduler.step(output, t, x, return_dict=False, **extra)[0]
        images: Any = x if output_type == "latent" else (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pil":
            whole = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            images = [Image.fromarray(picture.squeeze()) for picture in whole]
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @staticmethod
    def _null_class(network: Any) -> int | None:
        """Index of the class that stands for none, or None for unconditional models."""
        if "num_embeds_ada_norm" in network.config:  # DiT
            return network.config.num_embeds_ada_norm
        count = network.config.num_class_embeds
        return None if count is None else count - 1

    @staticmethod
    def _predict(network: Any, x: Tensor, t: Tensor, labels: Tensor | None, null: int | None, scale: float) -> Tensor:
        """Output of the network, guided, without a learned variance."""
        channels = x.shape[1]
        if labels is not None and scale != 1:
            labels, x = torch.cat([torch.full_like(labels, null), labels]), torch.cat([x, x])  # pyright: ignore
            output = network(x, timestep=t.expand(len(x)), class_labels=labels).sample[:, :channels]
            without, given = output.chunk(2)
            return without + scale * (given - without)
        return network(x, timestep=t.expand(len(x)), class_labels=labels).sample[:, :channels]
