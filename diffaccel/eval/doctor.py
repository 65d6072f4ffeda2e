"""What this machine has and what each measure lacks."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from diffaccel.eval.networks.clip import OPENAI, open_clip_extractor
from diffaccel.eval.networks.inception_weights import find_inception
from diffaccel.eval.networks.lpips import lpips
from diffaccel.eval.networks.weights import HOME
from diffaccel.eval.runs.features import cache_home
from diffaccel.eval.runs.manifest import environment

OPTIONAL = {
    "open-clip-torch": "CLIP score and CMMD with open_clip's models",
    "torchmetrics": "LPIPS (its linear heads travel inside)",
}


def examine() -> str:
    """Versions, packages, weights: a report for people, ending with what to do."""
    about = environment()
    lines = [f"device   {about['device']}, {about['threads']} threads; python {about['python']}"]
    lines.append("versions " + ", ".join(f"{name} {version}" for name, version in about["versions"].items()))
    lines.append(f"{HOME} is {os.environ.get(HOME, 'not set')}; features of plain folders go to {cache_home()}")
    lines.append("")
    lines.append("ready    emoji-clip: FD, KD, CMMD, CLIP of the packaged network; PSNR, SSIM, latent MSE")
    needs: dict[str, Callable[[], Any]] = {"inception: FID, KID, sFID, IS": find_inception, "LPIPS": lpips}
    for model in OPENAI:
        cmmd = "336" in model
        needs[f"open_clip:{model}{':cmmd' if cmmd else ''}: {'CMMD' if cmmd else 'CLIP score'}"] = partial(
            open_clip_extractor, model, protocol="cmmd" if cmmd else "clip"
        )
    problems = {what: _problem(find) for what, find in needs.items()}
    lines += [f"{'missing' if problem else 'ready':8} {what}" for what, problem in problems.items()]
    for package, what in OPTIONAL.items():
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"missing  package {package}: {what}; pip install 'diffaccel[eval]'")
    for what, problem in problems.items():
        lines += ["", f"{what}:", *(f"  {line}" for line in problem.splitlines())] if problem else []
    return "\n".join(lines)


def _problem(find: Callable[[], Any]) -> str:
    """Why something cannot be had; empty if it can."""
    try:
        find()
    except (OSError, ImportError, ValueError) as error:
        return str(error)
    return ""
