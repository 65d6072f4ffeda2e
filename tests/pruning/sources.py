"""Checkpoints in every form they come in, from toy networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffaccel.cli import main

PIPELINES = ("sd", "sdxl", "dit", "pixart", "sd3", "flux")
LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def tree(folder: Path) -> dict[str, bytes]:
    """All files of a folder, hidden ones too, with what is in them; folders as empty entries."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def same(model: nn.Module, other: nn.Module) -> bool:
    """Whether all weights are equal, with their names."""
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(value.equal(theirs[name]) for name, value in ours.items())


def original_layout(pipe: Any) -> dict[str, Tensor]:
    """A Stable Diffusion pipeline in the names of the original (LDM) layout."""
    unet, vae = pipe.unet, pipe.vae
    state = {_unet(name, unet): value for name, value in unet.state_dict().items()}
    stages = len(vae.config.block_out_channels)
    state |= {_vae(name, stages): value for name, value in vae.state_dict().items()}
    text = {name.removeprefix("text_model."): value for name, value in pipe.text_encoder.state_dict().items()}
    state |= {f"cond_stage_model.transformer.text_model.{name}": value for name, value in text.items()}
    return {name: value.contiguous() for name, value in state.items()}


def _unet(name: str, unet: Any) -> str:
    module, _, kind = name.rpartition(".")
    if module in ENDS:
        return f"model.diffusion_model.{ENDS[module]}.{kind}"
    count = unet.config.layers_per_block
    side, *path = module.split(".")
    stage, (what, index, *rest) = (0, path) if side == "mid_block" else (int(path[0]), path[1:])
    layer = int(index)
    if side == "mid_block":
        place = f"middle_block.{1 if what == 'attentions' else 2 * layer}"
    elif what == "downsamplers":
        place, rest = f"input_blocks.{(count + 1) * (stage + 1)}.0.op", rest[1:]
    elif side == "down_blocks":
        place = f"input_blocks.{(count + 1) * stage + layer + 1}.{int(what == 'attentions')}"
    elif what == "upsamplers":
        place = f"output_blocks.{(count + 1) * stage + count}.{1 + hasattr(unet.up_blocks[stage], 'attentions')}"
    else:
        place = f"output_blocks.{(count + 1) * stage + layer}.{int(what == 'attentions')}"
    rest = [LAYERS[rest[0]]] if what == "resnets" else rest
    return ".".join(["model.diffusion_model", place, *rest, kind])


def _vae(name: str, stages: int) -> str:
    parts = ["nin_shortcut" if part == "conv_shortcut" else part for part in name.split(".")]
    if parts[1] == "conv_norm_out":
        parts[1] = "norm_out"
    elif parts[1] == "mid_block":
        parts[1:4] = ["mid", f"block_{int(parts[3]) + 1}"]
    elif parts[1] in ("down_blocks", "up_blocks"):
        place = ["down", parts[2]] if parts[1] == "down_blocks" else ["up", str(stages - 1 - int(parts[2]))]
        layers = {"resnets": ["block", parts[4]], "downsamplers": ["downsample"], "upsamplers": ["upsample"]}
        parts[1:5] = place + layers[parts[3]]
    return ".".join(["first_stage_model", *parts])


def pruned(source: str | Path, output: Path, *options: str, target: str = "0.8") -> int:
    quick = () if "--runs" in options else ("--runs", "0")
    return main(
        ["prune", str(source), "--target", target, "--output", str(output), "--device", "cpu", *quick, *options]
    )
