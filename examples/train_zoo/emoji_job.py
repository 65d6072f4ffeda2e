"""The job `emoji`: VAE, CLIP and text-to-image U-Net, one after the other, saved as a Stable Diffusion pipeline."""

# diffusers and torch annotate models, configs and outputs too loosely for these checks.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from clip import build_clip, text_encoder, train_clip
from data import Emoji, load_emoji, synthetic_emoji
from diffusers import AutoencoderKL
from fit import FitConfig
from pipeline import save_half, save_pipeline
from run import SYNTHETIC, Run
from tokenizer import train_tokenizer
from transformers import CLIPModel, CLIPTokenizer
from unet import build_unet, train_unet
from vae import build_vae, train_vae

STAGES = ("vae", "clip", "unet")
_RATE = {"vae": 1.5e-3, "clip": 1e-3, "unet": 8e-4}
_RATE_FROM_INIT = {"vae": 8e-4, "clip": 3e-4, "unet": 5e-4}
_SETTINGS = {
    "vae": {"ema_decay": 0.995},
    "clip": {"ema_decay": 0.995, "weight_decay": 0.05},
    "unet": {"ema_decay": 0.9995},
}


class EmojiJob:
    """Trains the chosen stages; the others are taken from the earlier run as they are."""

    def __init__(self, run: Run, stages: tuple[str, ...] = STAGES) -> None:
        """Read the data.

        Raises:
            ValueError: When a stage is left out and there is no earlier run to take its model from.
        """
        if run.init is None and set(stages) != set(STAGES):
            raise ValueError("a stage can be left out only with --init, which its model is taken from")
        self.run = run
        self.stages = stages
        self.folder = run.output / "emoji-sd"
        torch.manual_seed(0)
        data = synthetic_emoji() if run.data == SYNTHETIC else load_emoji(Path(run.data), run.preset)
        self.data: Emoji = data.to(run.device)

    def __call__(self) -> None:
        """Run the stages and leave the pipeline in `emoji-sd` and the CLIP model in `emoji-clip`."""
        vae = self._vae()
        tokenizer = self._tokenizer()
        clip = self._clip(tokenizer)
        self._unet(vae, clip, tokenizer)
        save_pipeline(self.folder)

    def _config(self, stage: str) -> FitConfig:
        shares = self.run.preset.shares
        seconds = self.run.seconds * shares[stage] / sum(shares[name] for name in self.stages)
        rate = (_RATE_FROM_INIT if self.run.init else _RATE)[stage]
        # The same draws at the start of a stage however the run came here: a resumed run makes the same latents.
        torch.manual_seed(STAGES.index(stage))
        return self.run.fit_config(stage, rate, seconds, **_SETTINGS[stage])

    def _vae(self) -> AutoencoderKL:
        run, save = self.run, partial(save_half, folder=self.folder / "vae")
        vae = build_vae(run.preset, run.started_from("emoji-sd/vae")).to(run.device)
        if "vae" in self.stages:
            return train_vae(vae, self.data, run, self._config("vae"), save)
        save(vae)
        return vae.eval()

    def _tokenizer(self) -> CLIPTokenizer:
        folder = self.folder / "tokenizer"
        if self.run.init is None:
            return train_tokenizer([caption for few in self.data.captions for caption in few], folder)
        tokenizer = CLIPTokenizer.from_pretrained(self.run.init / "emoji-sd/tokenizer")
        tokenizer.save_pretrained(folder)
        return tokenizer

    def _clip(self, tokenizer: CLIPTokenizer) -> CLIPModel:
        run, save = self.run, partial(save_half, folder=self.run.output / "emoji-clip")
        clip = build_clip(run.preset, tokenizer, run.started_from("emoji-clip")).to(run.device)
        if "clip" in self.stages:
            clip = train_clip(clip, tokenizer, self.data, run, self._config("clip"), save)
        save(clip)
        tokenizer.save_pretrained(run.output / "emoji-clip")
        save_half(text_encoder(clip), self.folder / "text_encoder")
        return clip.eval()

    def _unet(self, vae: AutoencoderKL, clip: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        run, save = self.run, partial(save_half, folder=self.folder / "unet")
        unet = build_unet(run.preset, run.started_from("emoji-sd/unet")).to(run.device)
        if "unet" in self.stages:
            train_unet(unet, vae, text_encoder(clip), tokenizer, self.data, run, self._config("unet"), save)
        else:
            save(unet)
