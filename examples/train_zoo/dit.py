"""Train a DiT of two sizes in the latents of `emoji-sd`: a class-conditional pair for T-Stitch and early exit.

    python examples/train_zoo/dit.py b --data DATA --output_dir OUT --seconds 3000     # OUT/emoji-dit-b/transformer
    python examples/train_zoo/dit.py s --data DATA --output_dir OUT --seconds 900

A class is one emoji: the first 1,000 without flags and people, so that Diffusers' `DiTPipeline` can draw them (its
class for "none" is number 1,000, fixed). VAE and noise schedule are those of `emoji-sd`. Ctrl-C saves and stops; the
same command with `--resume` goes on.
"""

# diffusers and torch annotate models, configs and outputs too loosely for these checks.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from data import Emoji, load_emoji, synthetic_emoji
from diffusers import DiTPipeline, DiTTransformer2DModel
from fit import FitConfig, fit
from pipeline import save_half, training_schedule
from presets import PRESETS
from run import SYNTHETIC
from unet import NoiseLoss, latent_pool

from diffaccel import zoo

CLASSES = 1000
_SHAPES = {"b": {"num_attention_heads": 3, "num_layers": 8}, "s": {"num_attention_heads": 2, "num_layers": 4}}
_LEFT_OUT = ("country flag", "subdivision flag", "flag", "family", "person")
_DROPPED_LABELS = 0.1
_BATCH = 64


def build_dit(size: str) -> DiTTransformer2DModel:
    """A DiT for 16x16 latents of 4 channels, 64 tokens; adaLN-Zero: it begins as 0, and its blocks do nothing."""
    model = DiTTransformer2DModel(
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
        norm_eps=1e-6,
        **_SHAPES[size],
    )
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
        # Every block embeds the label itself and would drop it by its own dice; here one draw decides for all.
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    torch.nn.init.zeros_(model.proj_out_2.weight)
    torch.nn.init.zeros_(model.proj_out_2.bias)
    return model


def chosen(data: Emoji, folder: Path) -> Emoji:
    """The emoji that are classes, in the order of their numbers."""
    keys = json.loads((folder / "emoji_meta.json").read_text())["keys"]
    groups = [group for style, group, tone in keys if style == "twemoji" and not tone]
    index = [i for i, group in enumerate(groups) if not group.startswith(_LEFT_OUT)][:CLASSES]
    return Emoji(data.images[index], [data.captions[i] for i in index])


def save_index(pipe: DiTPipeline, data: Emoji, folder: Path) -> None:
    """Write `model_index.json`, with the names of the classes (which Diffusers reads and does not write)."""
    pipe.save_config(folder)
    pipe.scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {str(i): captions[0].split(",")[0] for i, captions in enumerate(data.captions)}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


class LabelledNoiseLoss(NoiseLoss):
    """`NoiseLoss` of a network that is told a class."""

    def __call__(self, model: torch.nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Loss of (latents, labels)."""

        def told(sample: torch.Tensor, time: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return model(sample, timestep=time, class_labels=labels)

        return super().__call__(told, batch)


def main(arguments: list[str] | None = None) -> None:
    """Train the network of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=_SHAPES)
    parser.add_argument("--data", required=True, help=f"folder that prepare.py wrote, or '{SYNTHETIC}'")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="wall-clock budget of the training")
    parser.add_argument("--steps", type=int, help="also end after so many steps")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    synthetic = options.data == SYNTHETIC
    data = synthetic_emoji() if synthetic else load_emoji(Path(options.data), PRESETS["cpu"])
    data = data if synthetic else chosen(data, Path(options.data))
    vae = zoo.load("emoji-sd").vae
    pool = latent_pool(vae, data, 1 if synthetic else PRESETS["cpu"].latent_copies, mixed_precision=False)

    def next_batch() -> tuple[torch.Tensor, torch.Tensor]:
        copy, picture = torch.randint(len(pool), (_BATCH,)), torch.randint(len(data), (_BATCH,))
        return pool[copy, picture].float(), torch.where(torch.rand(_BATCH) < _DROPPED_LABELS, CLASSES, picture)

    folder = options.output_dir / f"emoji-dit-{options.size}"
    model = build_dit(options.size).train()
    print(f"[dit-{options.size}] {model.num_parameters() / 1e6:.2f} M parameters, {len(data)} classes", flush=True)
    config = FitConfig(
        name=f"dit-{options.size}",
        learning_rate=1e-3,
        seconds=options.seconds,
        steps=options.steps,
        ema_decay=0.9995,
        mixed_precision=True,
    )
    save_index(DiTPipeline(model, vae, training_schedule()), data, folder)
    save = partial(save_half, folder=folder / "transformer")
    loss = LabelledNoiseLoss(torch.device("cpu"))
    fit(model, loss, next_batch, config, options.output_dir / f"checkpoints-{options.size}", options.resume, save)


if __name__ == "__main__":
    main()
