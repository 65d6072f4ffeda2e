"""The CLIP stage: pictures and captions in one space; its text tower conditions the U-Net."""

# diffusers and torch annotate models, configs and outputs too loosely for these checks.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from captions import CaptionTable, tokens
from data import SIZE, Emoji, augment
from fit import FitConfig, fit
from presets import Preset
from run import Run
from tokenizer import LENGTH
from torch import nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

_LABEL_SMOOTHING = 0.1
_JOINT_WIDTH = 128


def build_clip(preset: Preset, tokenizer: CLIPTokenizer, init: Path | None) -> CLIPModel:
    """A new CLIP model in float32, or the one in the folder `init`."""
    if init is not None:
        return CLIPModel.from_pretrained(init).float()
    tower = {
        "hidden_size": preset.text_width,
        "intermediate_size": 4 * preset.text_width,
        "num_attention_heads": 4,
        "projection_dim": _JOINT_WIDTH,
    }
    text = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": preset.text_layers,
        "max_position_embeddings": LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"num_hidden_layers": preset.vision_layers, "image_size": SIZE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=_JOINT_WIDTH))


def text_encoder(clip: CLIPModel) -> CLIPTextModel:
    """The text tower as a model of its own, with copies of the weights."""
    encoder = CLIPTextModel(clip.config.text_config)
    weights = clip.text_model.state_dict()
    if hasattr(encoder, "text_model"):  # older releases of transformers wrap the tower once more
        encoder.text_model.load_state_dict(weights)
    else:
        encoder.load_state_dict(weights)
    return encoder.to(clip.device).eval()


def contrastive_loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Symmetric cross-entropy of (pictures, token numbers), with smoothed labels because captions are alike."""
    pictures, text = batch
    logits = model(input_ids=text, pixel_values=pictures).logits_per_image.float()
    target = torch.arange(len(logits), device=logits.device)
    by_picture = functional.cross_entropy(logits, target, label_smoothing=_LABEL_SMOOTHING)
    by_caption = functional.cross_entropy(logits.T, target, label_smoothing=_LABEL_SMOOTHING)
    return (by_picture + by_caption) / 2


@torch.no_grad()
def picture_features(clip: CLIPModel, pictures: torch.Tensor, batch: int = 256) -> torch.Tensor:
    """Unit vectors of pictures in [-1, 1], (n, 3, 64, 64) -> (n, 128)."""
    parts = [clip.visual_projection(clip.vision_model(part).pooler_output) for part in pictures.split(batch)]
    return functional.normalize(torch.cat(parts), dim=-1)


@torch.no_grad()
def caption_features(clip: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str], batch: int = 512) -> torch.Tensor:
    """Unit vectors of captions, (n, 128)."""
    rows = tokens(tokenizer, captions).to(clip.device).split(batch)
    parts = [clip.text_projection(clip.text_model(part).pooler_output) for part in rows]
    return functional.normalize(torch.cat(parts), dim=-1)


def train_clip(
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    data: Emoji,
    run: Run,
    config: FitConfig,
    export: Callable[[CLIPModel], None],
) -> CLIPModel:
    """Train both towers on augmented pictures and random captions; return the averaged model."""
    device = data.images.device
    table = CaptionTable.of(data.captions, tokenizer, device)

    def next_batch() -> tuple[torch.Tensor, torch.Tensor]:
        # Without repetition, so that no pair of the batch is both right and wrong.
        index = torch.randperm(len(data), device=device)[: run.preset.clip_batch]
        return augment(data.pictures(index)), table.draw(index)

    print(f"[{config.name}] {clip.num_parameters() / 1e6:.2f} M parameters", flush=True)
    return fit(clip, contrastive_loss, next_batch, config, run.checkpoints, run.resume, export)
