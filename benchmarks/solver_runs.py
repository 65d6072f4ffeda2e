"""Runs of the solver benchmark: what is measured (`Job`), by whom (`Worker`, one a process), and kept (`Runner`)."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers_candidates import Candidate
from dry_run import Trace, dry_run
from our_candidates import Ours
from torch import Tensor
from tqdm.auto import tqdm

import diffaccel
from diffaccel import cost, zoo
from diffaccel.eval import Reference, ReferenceSettings, clip_distance, converged_reference, latent_mse, psnr
from diffaccel.eval.reference import pair_generator, reference_key

BATCH_PROMPTS = 8  # prompts a pipeline call, each with all its seeds


@dataclass(frozen=True)
class Setup:
    """What a worker needs to know: model and CLIP are names of the zoo or folders ("" for none).

    `compiled` runs the network through torch.compile: half the time, and outputs that differ in the last bits.
    """

    model: str
    clip: str
    guidance_scale: float
    cache: str
    reference: ReferenceSettings
    compiled: bool = False


@dataclass(frozen=True)
class Job:
    """One candidate at `calls` network calls, on every prompt with every seed.

    `images` asks for PSNR and CLIP distance too, `against` for the latent MSE to further references.
    """

    candidate: Candidate | Ours
    calls: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    images: bool = False
    against: tuple[ReferenceSettings, ...] = ()

    def key(self, setup: Setup, weights: str) -> str:
        """Name in the cache: what is run with which code, on which weights and pairs, against which reference."""
        what = [weights, setup.guidance_scale, asdict(setup.reference), setup.clip if self.images else "", self.calls]
        code = _our_code() if isinstance(self.candidate, Ours) else diffusers.__version__
        options = sorted((key, str(getattr(v, "__name__", v))) for key, v in self.candidate.options.items())
        who = [code, self.candidate.label, options, self.images]
        against = [asdict(settings) for settings in self.against]
        return hashlib.sha256(json.dumps([what, who, against, self.prompts, self.seeds]).encode()).hexdigest()[:24]


@cache
def _our_code() -> str:
    """Hash of our samplers' source: after a change they are measured again."""
    folder = Path(diffaccel.__file__).parent / "samplers"
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))).hexdigest()[:16]


class Worker:
    """A pipeline, its references and the metric's backbone, in one process."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.pipe = load_pipe(setup.model)
        if setup.compiled:
            self.pipe.unet.compile()
        self.config = dict(self.pipe.scheduler.config)
        self._scheduler = self.pipe.scheduler
        self._clip: Any = None
        self._references: dict[Any, Reference] = {}
        self._pictures: dict[Any, Tensor] = {}

    def trace(self, candidate: Candidate | Ours, calls: int) -> Trace | str:
        """What a candidate does on the toy network, or a sentence that says why it fails."""
        try:
            arguments = candidate.arguments(self.config, calls)
            return dry_run(candidate.make(self.config), arguments, self.config)
        except Exception as error:
            return sentence(error)

    def reference(self, prompts: Sequence[str], seeds: Sequence[int], settings: ReferenceSettings) -> Reference:
        """Reference of these pairs; computed once, then read from disk or memory."""
        self.pipe.scheduler = self._scheduler
        key = (tuple(prompts), tuple(seeds), settings)
        if key not in self._references:
            self._references[key] = converged_reference(
                self.pipe,
                prompts,
                seeds,
                guidance_scale=self.setup.guidance_scale,
                settings=settings,
                cache=Path(self.setup.cache) / "references",
                progress=False,
            )
        return self._references[key]

    @torch.no_grad()
    def score(self, job: Job) -> dict[str, Any]:
        """Measures of a job, one list each with a number per pair; or {"fails": sentence}."""
        try:
            latents = self._latents(job)
        except Exception as error:
            return {"fails": sentence(error)}
        if not latents.isfinite().all():
            return {"fails": "ArithmeticError: its result is not finite"}
        references = [self.reference(job.prompts, job.seeds, s) for s in (self.setup.reference, *job.against)]
        scores = {"mse": latent_mse(latents, references[0].latents).tolist()}
        variance, wanted = (x.flatten(1).var(1) for x in (latents.double(), references[0].latents.double()))
        scores["variance"] = (variance / wanted).tolist()
        scores["mse_against"] = [latent_mse(latents, r.latents).tolist() for r in references[1:]]
        if job.images:
            ours, theirs = self._decode(latents), self._reference_pictures(job, references[0])
            scores["psnr"] = psnr(ours, theirs).tolist()
            if self.setup.clip:
                self._clip = self._clip or load_clip(self.setup.clip)
                scores["clip"] = clip_distance(ours, theirs, *self._clip).tolist()
        return scores

    def _latents(self, job: Job) -> Tensor:
        self.pipe.scheduler = job.candidate.make(self.config)
        arguments = job.candidate.arguments(self.config, job.calls)
        parts = []
        for i in range(0, len(job.prompts), BATCH_PROMPTS):
            pairs = [(prompt, seed) for prompt in job.prompts[i : i + BATCH_PROMPTS] for seed in job.seeds]
            with cost.network_calls(self.pipe) as count:
                images = self.pipe(
                    [prompt for prompt, _ in pairs],
                    guidance_scale=self.setup.guidance_scale,
                    generator=[pair_generator(*pair) for pair in pairs],
                    output_type="latent",
                    **arguments,
                ).images
            if count.calls != job.calls:
                raise RuntimeError(f"it made {count.calls} network calls, not {job.calls}")
            parts.append(images.float().cpu())
        return torch.cat(parts)

    def _reference_pictures(self, job: Job, reference: Reference) -> Tensor:
        key = (job.prompts, job.seeds)
        if key not in self._pictures:
            self._pictures[key] = self._decode(reference.latents)
        return self._pictures[key]

    def _decode(self, latents: Tensor) -> Tensor:
        """(N, 3, H, W) pictures in [0, 1]."""
        vae = self.pipe.vae
        parts = [vae.decode(x.to(vae.device, vae.dtype) / vae.config.scaling_factor)[0] for x in latents.split(32)]
        return (torch.cat(parts).float().cpu() / 2 + 0.5).clamp(0, 1)


def load_pipe(model: str) -> Any:
    """A Stable Diffusion pipeline by its zoo name or folder, quiet, in float32, on the accelerator if there is one."""
    load = zoo.load if model in zoo.NAMES else diffusers.DiffusionPipeline.from_pretrained
    pipe = load(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if torch.accelerator.is_available():
        return pipe.to(torch.accelerator.current_accelerator())
    pipe.unet.to(memory_format=torch.channels_last)  # 1.2 times as fast on a CPU
    return pipe


def load_clip(name: str) -> tuple[Any, Any]:
    if name in zoo.NAMES:
        return zoo.load(name)
    return transformers.CLIPModel.from_pretrained(name).eval(), transformers.CLIPProcessor.from_pretrained(name)


def sentence(error: Exception) -> str:
    """First line of an exception."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"


_worker: Worker | None = None  # of this process, made by the pool's initializer


def _start(setup: Setup) -> None:
    global _worker
    quiet()
    torch.set_num_threads(1)  # two processes of one thread do twice the work of one process with two
    _worker = Worker(setup)


def quiet() -> None:
    """Keep what Diffusers and transformers say about each of a thousand schedulers out of the progress bars."""
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _call(method: str, *args: Any) -> Any:
    return getattr(_worker, method)(*args)


class Runner:
    """Spreads jobs over processes and keeps every score in one file, so that a run goes on where it stopped."""

    def __init__(self, setup: Setup, workers: int) -> None:
        self.setup = setup
        self.local = Worker(setup)
        self.weights = reference_key(self.local.pipe)
        self._file = Path(setup.cache) / f"scores-{self.weights[:16]}.jsonl"
        self._kept: dict[str, Any] = {}
        if self._file.exists():
            for line in self._file.read_text().splitlines():
                with suppress(json.JSONDecodeError):  # the last line of a run that was killed
                    entry = json.loads(line)
                    self._kept[entry["key"]] = entry["scores"]
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            context = get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(setup,))

    def map(self, what: str, method: str, calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """(position, result) of a worker's method for every tuple of arguments, as they come."""
        if self._pool is None:
            for i, args in enumerate(tqdm(calls, desc=what)):
                yield i, getattr(self.local, method)(*args)
            return
        futures: dict[Future[Any], int] = {self._pool.submit(_call, method, *args): i for i, args in enumerate(calls)}
        for future in tqdm(as_completed(futures), desc=what, total=len(futures)):
            yield futures[future], future.result()

    def scores(self, what: str, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Scores of the jobs, in their order."""
        keys = [job.key(self.setup, self.weights) for job in jobs]
        open_jobs = [(key, job) for key, job in dict(zip(keys, jobs, strict=True)).items() if key not in self._kept]
        open_jobs.sort(key=lambda item: -item[1].calls)  # longest first: the processes finish together
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            for i, scores in self.map(what, "score", [(job,) for _, job in open_jobs]):
                key, job = open_jobs[i]
                self._kept[key] = scores
                entry = {"key": key, "label": job.candidate.label, "calls": job.calls, "scores": scores}
                file.write("\n" + json.dumps(entry))  # newline first: it closes a line that a killed run left open
                file.flush()
        return [self._kept[key] for key in keys]

    def reference(self, prompts: Sequence[str], seeds: Sequence[int], settings: ReferenceSettings) -> Reference:
        """Reference of these pairs, computed in all processes, a batch of prompts each."""
        size = min(4, -(-len(prompts) // self.workers))  # converged_reference itself takes 4 at a time
        batches = [tuple(prompts[i : i + size]) for i in range(0, len(prompts), size)]
        for _ in self.map(f"reference ({settings.timesteps})", "reference", [(b, seeds, settings) for b in batches]):
            pass
        return self.local.reference(prompts, seeds, settings)

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
