"""Train a network for early exit: fewer layers at high noise, one set of weights (ASE, arXiv:2408.05927).

    accelerate launch examples/train_early_exit.py --pretrained_model_name_or_path FOLDER --train_data_dir PICTURES
        --depths 3 3 2 2 1 --max_train_steps 10000 --use_ema --output_dir early-exit

then, with the loaded pipeline: `diffaccel.early_exit(pipe, json.load(open("early-exit/depths.json"))["depths"])`.

Every row of a batch is computed, and supervised, at the depth of its timestep, by the plain diffusion loss (lambda 1);
all weights are trained but the time embedder's, as in the paper. Opens Stable Diffusion and DiT. Of a DiT with a
learned variance only the mean is trained (the paper adds the variational bound).

The folder holds pictures and `metadata.jsonl`, a line each: {"file_name": "1.png", "text": "a cat"}, or a list of texts
of which each step takes one; for DiT {"file_name": "1.png", "label": 7}. Pictures are encoded once, at the start.
Arguments are named as in Diffusers' `train_text_to_image.py`. Ctrl-C saves a checkpoint; the same command with
`--resume_from_checkpoint latest` goes on.
"""

# diffusers and torch annotate models, configs and outputs too loosely for these checks.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from diffusers import DDPMScheduler, DiffusionPipeline, DiTPipeline, StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.embeddings import LabelEmbedding
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional

from diffaccel.samplers.policy.exits import DepthSchedule, layers, predict

_DROPPED = 0.1  # captions or labels, for guidance
_FROZEN = ("time_embedding.", "timestep_embedder.")
_MOST_CAPTIONS = 10_000  # are embedded once; more of them batch by batch
_LOG_EVERY = 20.0  # seconds
_ENCODED_AT_ONCE = 16


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="pipeline: a folder or a hub id")
    parser.add_argument("--train_data_dir", type=Path, required=True, help="folder with metadata.jsonl")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--depths", type=int, nargs="+", required=True, help="in equal parts of time, data to noise")
    parser.add_argument(
        "--distill", action="store_true", help="target: the whole network's prediction; not the paper's"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resolution", type=int, help="of the pictures; default: the network's")
    parser.add_argument("--train_batch_size", type=int, default=64, help="on each device (default: 64, as the paper)")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--lr_scheduler", default="constant", help="of Diffusers; cosine needs --max_train_steps")
    parser.add_argument("--lr_warmup_steps", type=int, default=0)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--max_train_steps", type=int)
    parser.add_argument("--max_train_seconds", type=float, help="wall clock, all resumed runs together; then it saves")
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"])
    parser.add_argument("--use_ema", action="store_true", help="save averaged weights")
    parser.add_argument("--ema_decay", type=float, default=0.9999, help="at the end; young averages are shorter")
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--checkpoints_total_limit", type=int, default=2)
    parser.add_argument("--resume_from_checkpoint", help="a checkpoint's folder, or 'latest'")
    args = parser.parse_args(arguments)
    if args.max_train_steps is None and args.max_train_seconds is None:
        parser.error("when does it end? give --max_train_steps or --max_train_seconds")
    if args.max_train_steps is None and not args.lr_scheduler.startswith("constant"):
        parser.error(f"--lr_scheduler {args.lr_scheduler} is a function of the steps to come; give --max_train_steps")
    return args


class Exits(nn.Module):
    """The network as it is trained, each row at its depth: what DistributedDataParallel wraps."""

    def __init__(self, network: nn.Module, schedule: DepthSchedule):
        super().__init__()
        self.network, self.schedule = network, schedule

    def forward(self, sample: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """Predictions (N, C, H, W), without a learned variance."""
        return predict(self.network, self.schedule, sample, timestep, **conditioning)[:, : sample.shape[1]]


class Progress:
    """How far the training is; saved with the checkpoints."""

    def __init__(self) -> None:
        self.step, self.seconds = 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """Called by Accelerate."""
        return dict(self.__dict__)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Called by Accelerate."""
        self.__dict__.update(state)


def open_pipeline(name: str) -> tuple[Any, str]:
    """The pipeline in float32, and which of its parts is the network."""
    pipe: Any = DiffusionPipeline.from_pretrained(name, dtype=torch.float32)
    if isinstance(pipe, StableDiffusionPipeline):
        return pipe, "unet"
    if isinstance(pipe, DiTPipeline):
        return pipe, "transformer"
    raise SystemExit(f"{type(pipe).__name__} is not trained here; give a StableDiffusionPipeline or a DiTPipeline")


def read_metadata(folder: Path, key: str) -> list[dict[str, Any]]:
    """Lines of metadata.jsonl, each with `file_name` and `key`."""
    if not (folder / "metadata.jsonl").is_file():
        raise SystemExit(f"{folder} has no metadata.jsonl; write a line for each picture with file_name and {key}")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines() if line.strip()]
    if (wrong := next((row for row in rows or [{}] if not {"file_name", key} <= row.keys()), None)) is not None:
        raise SystemExit(f"every line of {folder / 'metadata.jsonl'} has file_name and {key}, unlike {wrong}")
    return rows


@torch.no_grad()
def encode_pictures(vae: Any, files: list[Path], side: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of all pictures, (N, C, h, w), scaled; transparency is white."""
    processor, parts = VaeImageProcessor(), []
    for begin in range(0, len(files), _ENCODED_AT_ONCE):
        pictures = []
        for file in files[begin : begin + _ENCODED_AT_ONCE]:
            picture = Image.open(file).convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
            pictures.append(ImageOps.fit(picture, (side, side), Image.Resampling.BICUBIC))
        latents = vae.encode(processor.preprocess(pictures).to(vae.device)).latent_dist
        parts.append(torch.stack([latents.mean - (vae.config.get("shift_factor") or 0.0), latents.std]))
    return tuple(torch.cat(parts, 1) * vae.config.scaling_factor)


def labels_of(rows: list[dict[str, Any]], network: Any, device: Any) -> Callable[[Tensor], dict[str, Tensor]]:
    """Conditioning of a DiT for pictures by number; a tenth are told the class for "none"."""
    none = network.config.num_embeds_ada_norm
    labels = torch.tensor([row["label"] for row in rows], device=device)
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= none:
        raise SystemExit(f"labels of this network are 0 to {none - 1}, not {least} to {most}")
    for module in network.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0  # every block would drop the label by its own dice; here one draw decides for all

    def conditioning(chosen: Tensor) -> dict[str, Tensor]:
        dropped = torch.rand(len(chosen), device=device) < _DROPPED
        return {"class_labels": labels[chosen].masked_fill(dropped, none)}

    return conditioning


def texts_of(rows: list[dict[str, Any]], pipe: Any, device: Any) -> Callable[[Tensor], dict[str, Tensor]]:
    """Conditioning of Stable Diffusion for pictures by number; a tenth are told nothing ("")."""
    texts = [[row["text"]] if isinstance(row["text"], str) else row["text"] for row in rows]
    number = {text: i for i, text in enumerate(dict.fromkeys(["", *(text for some in texts for text in some)]))}

    @torch.no_grad()
    def embed(some: list[str]) -> Tensor:
        return pipe.encode_prompt(some, device, num_images_per_prompt=1, do_classifier_free_guidance=False)[0]

    table = None
    if len(number) <= _MOST_CAPTIONS:
        table = torch.cat([embed(list(number)[i : i + 64]) for i in range(0, len(number), 64)])

    def conditioning(chosen: Tensor) -> dict[str, Tensor]:
        some = ["" if random.random() < _DROPPED else random.choice(texts[i]) for i in chosen.tolist()]
        return {"encoder_hidden_states": embed(some) if table is None else table[[number[text] for text in some]]}

    return conditioning


def loss_of(model: nn.Module, teacher: nn.Module | None, noise_schedule: Any, clean: Tensor, told: Any) -> Tensor:
    """Squared error of every row at the depth of its timestep; the target is what the scheduler's config says."""
    noise = torch.randn_like(clean)
    timestep = torch.randint(noise_schedule.config.num_train_timesteps, (len(clean),), device=clean.device)
    noised = noise_schedule.add_noise(clean, noise, timestep)
    if teacher is not None:
        with torch.no_grad():
            target = teacher(noised, timestep=timestep, **told).sample[:, : clean.shape[1]]
    else:
        velocity = noise_schedule.get_velocity(clean, noise, timestep)
        targets = {"epsilon": noise, "sample": clean, "v_prediction": velocity}
        target = targets[noise_schedule.config.prediction_type]
    return functional.mse_loss(model(noised, timestep, told).float(), target.float())


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, limit: int) -> None:
    """Write checkpoint-STEP under another name first; the oldest above `limit` are deleted."""
    final, partial = folder / f"checkpoint-{step}", folder / ".checkpoint.partial"
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in checkpoints(folder)[:-limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def checkpoints(folder: Path) -> list[Path]:
    """Whole ones, the newest last."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))


def save_pipeline(pipe: Any, depths: list[int], folder: Path) -> None:
    """Write the pipeline in float16 and depths.json into `folder`, each under another name first."""
    partial = folder / ".pipeline.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.cpu().half()
    pipe.save_pretrained(partial)
    (partial / "depths.json").write_text(json.dumps({"depths": depths}) + "\n")
    for new in sorted(partial.iterdir(), key=lambda path: path.name == "model_index.json"):  # the last: all is there
        if (folder / new.name).is_dir():
            shutil.rmtree(folder / new.name)
        new.rename(folder / new.name)
    partial.rmdir()


@dataclass
class Training:
    """What a checkpoint holds, and the loop.

    Attributes:
        network: of the pipeline.
        model: the same, prepared by Accelerate.
        loss: of a new batch.
    """

    args: argparse.Namespace
    accelerator: Accelerator
    network: Any
    model: nn.Module
    optimizer: Any
    rate: Any
    ema: EMAModel | None
    progress: Progress
    loss: Callable[[], Tensor]

    def resume(self) -> None:
        """Go on from the checkpoint of the command line."""
        latest = self.args.resume_from_checkpoint == "latest"
        found = checkpoints(self.args.output_dir) if latest else [Path(self.args.resume_from_checkpoint)]
        if found:
            self.accelerator.load_state(str(found[-1]))
        self.accelerator.print(f"resumed from {found[-1]}" if found else "no checkpoint yet; starting anew", flush=True)
        if self.ema:
            self.ema.to(self.accelerator.device)

    def run(self, stopped: list[int]) -> bool:
        """Train until the steps or the seconds are used up, or a signal is in `stopped`; say if it is that."""
        args, progress = self.args, self.progress
        begin, logged, losses = time.monotonic() - progress.seconds, (time.monotonic(), progress.step), []
        while True:
            now = time.monotonic()
            progress.seconds = now - begin
            late = args.max_train_seconds is not None and progress.seconds >= args.max_train_seconds
            ends = torch.tensor([bool(stopped), late], dtype=torch.float32, device=self.accelerator.device)
            interrupted, late = map(bool, self.accelerator.reduce(ends))  # one process ends all
            done = interrupted or late or (args.max_train_steps is not None and progress.step >= args.max_train_steps)
            if losses and (done or now - logged[0] > _LOG_EVERY):
                speed = (progress.step - logged[1]) / (now - logged[0])
                line = (
                    f"step {progress.step} loss {torch.stack(losses).mean():.5f} lr {self.rate.get_last_lr()[0]:.2e} "
                )
                self.accelerator.print(line + f"{speed:.2f} steps/s after {progress.seconds:.0f} s", flush=True)
                logged, losses = (now, progress.step), []
            if done:
                save_checkpoint(self.accelerator, args.output_dir, progress.step, args.checkpoints_total_limit)
                return interrupted
            losses.append(self.step())
            if progress.step % args.checkpointing_steps == 0:
                save_checkpoint(self.accelerator, args.output_dir, progress.step, args.checkpoints_total_limit)

    def step(self) -> Tensor:
        """One step of the optimizer; the mean loss of its batches."""
        losses = []
        for _ in range(self.args.gradient_accumulation_steps):
            with self.accelerator.accumulate(self.model):
                loss = self.loss()
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.network.parameters(), self.args.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
                losses.append(loss.detach())
        self.rate.step()
        self.progress.step += 1
        if self.ema:
            self.ema.step(self.network.parameters())
        return torch.stack(losses).mean()


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM in a list, so that the loop can end between two steps, never inside one."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: list[str] | None = None) -> None:
    """Train, and save the pipeline."""
    args = parse(arguments)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        # What lies behind the deepest exit of a batch
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    device = accelerator.device
    set_seed(args.seed, device_specific=True)
    pipe, part = open_pipeline(args.pretrained_model_name_or_path)
    network = getattr(pipe.to(device), part)
    noise_schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    schedule = DepthSchedule(tuple(args.depths), layers(network), noise_schedule.config.num_train_timesteps)
    if not schedule.exits():
        raise SystemExit(f"--depths always computes all {schedule.layers} layers; give a lower depth somewhere")

    rows = read_metadata(args.train_data_dir, "text" if part == "unet" else "label")
    side = args.resolution or network.config.sample_size * 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    mean, std = encode_pictures(pipe.vae, [args.train_data_dir / row["file_name"] for row in rows], side)
    conditioning = texts_of(rows, pipe, device) if part == "unet" else labels_of(rows, network, device)
    teacher = copy.deepcopy(network).eval().requires_grad_(False) if args.distill else None

    network.train().requires_grad_(True)
    for name, parameter in network.named_parameters():
        if any(frozen in name for frozen in _FROZEN):
            parameter.requires_grad_(False)
    if args.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
    steps = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
    rate = get_scheduler(args.lr_scheduler, optimizer, **steps)
    ema = EMAModel(network.parameters(), decay=args.ema_decay) if args.use_ema else None
    model, optimizer = accelerator.prepare(Exits(network, schedule), optimizer)

    def loss() -> Tensor:
        chosen = torch.randint(len(rows), (args.train_batch_size,), device=device)
        clean = mean[chosen] + std[chosen] * torch.randn_like(std[chosen])
        return loss_of(model, teacher, noise_schedule, clean, conditioning(chosen))

    training = Training(args, accelerator, network, model, optimizer, rate, ema, Progress(), loss)
    accelerator.register_for_checkpointing(*([ema] if ema else []), training.progress, rate)
    if args.resume_from_checkpoint:
        training.resume()
    size = sum(parameter.numel() for parameter in trained) / 1e6
    accelerator.print(f"{len(rows)} pictures, {size:.2f} M trained weights, depths {args.depths}", flush=True)
    with stop_requests() as stopped:
        interrupted = training.run(stopped)
    if interrupted:
        raise SystemExit(f"stopped at step {training.progress.step}; go on with --resume_from_checkpoint latest")
    if accelerator.is_main_process:
        if ema:
            ema.copy_to(network.parameters())
        save_pipeline(pipe, args.depths, args.output_dir)
        print(f"saved {args.output_dir}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
