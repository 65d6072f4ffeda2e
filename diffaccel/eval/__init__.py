"""Measurements of what acceleration does to the pictures, and what it saves. Not imported by `import diffaccel`."""

from diffaccel.eval.compare import Subject, Timing, compare
from diffaccel.eval.errors import DataError, MissingWeights, ProtocolMismatch
from diffaccel.eval.fid import fid
from diffaccel.eval.fidelity import Interval, clip_distance, latent_mse, paired_interval, psnr
from diffaccel.eval.networks.clip import clip_score, emoji_clip, open_clip_extractor, transformers_clip
from diffaccel.eval.networks.dinov2 import dinov2
from diffaccel.eval.networks.extractor import Extractor, callable_extractor
from diffaccel.eval.networks.inception_weights import inception
from diffaccel.eval.networks.lpips import lpips
from diffaccel.eval.perf import Cost, measure
from diffaccel.eval.reference import Reference, ReferenceSettings, converged_reference
from diffaccel.eval.reports.render import markdown
from diffaccel.eval.runs.features import extract
from diffaccel.eval.runs.generate import generate
from diffaccel.eval.runs.prompts import Prompt, read_prompts
from diffaccel.eval.runs.reference_set import load_reference, save_reference
from diffaccel.eval.runs.run import read_run
from diffaccel.eval.runs.variant import Loader, Variant, parse_variant
from diffaccel.eval.score import score
from diffaccel.eval.ssim import ssim
from diffaccel.eval.statistics.frechet import frechet, gaussian
from diffaccel.eval.statistics.inception_score import inception_score
from diffaccel.eval.statistics.jackknife import Estimate, jackknife, jackknife_difference
from diffaccel.eval.statistics.mmd import cmmd, cmmd_unbiased, kid, kid_full
from diffaccel.eval.statistics.moments import Moments
from diffaccel.eval.statistics.neighbours import neighbours

__all__ = [
    "Cost",
    "DataError",
    "Estimate",
    "Extractor",
    "Interval",
    "Loader",
    "MissingWeights",
    "Moments",
    "Prompt",
    "ProtocolMismatch",
    "Reference",
    "ReferenceSettings",
    "Subject",
    "Timing",
    "Variant",
    "callable_extractor",
    "clip_distance",
    "clip_score",
    "cmmd",
    "cmmd_unbiased",
    "compare",
    "converged_reference",
    "dinov2",
    "emoji_clip",
    "extract",
    "fid",
    "frechet",
    "gaussian",
    "generate",
    "inception",
    "inception_score",
    "jackknife",
    "jackknife_difference",
    "kid",
    "kid_full",
    "latent_mse",
    "load_reference",
    "lpips",
    "markdown",
    "measure",
    "neighbours",
    "open_clip_extractor",
    "paired_interval",
    "parse_variant",
    "psnr",
    "read_prompts",
    "read_run",
    "save_reference",
    "score",
    "ssim",
    "transformers_clip",
]
