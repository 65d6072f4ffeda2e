"""Pictures that are edited again and again, each time computing only what changes."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffaccel.cost import denoisers
from diffaccel.kernels.config import SparseEditConfig
from diffaccel.kernels.decoder import DecoderEdit
from diffaccel.kernels.engine import apply_sparse_edit
from diffaccel.kernels.latents import encode, noised, prepared
from diffaccel.kernels.region import difference_mask, read_mask
from diffaccel.kernels.report import EditReport, differences, report_of
from diffaccel.kernels.session import Editing, Follower, Recording, Reference
from diffaccel.kernels.start import Shift, Start, copied, draw

# An edit has them as the reference, or the outside of the mask would change, or they are the edit's own.
_FIXED = (
    *("guidance_scale", "num_inference_steps", "height", "width", "num_images_per_prompt", "timesteps", "sigmas"),
    *("latents", "mask_image", "output_type", "return_dict"),
)


class SparseEditPipeline:
    """A pipeline of Diffusers whose pictures can be edited in parts.

        editor = SparseEditPipeline(pipe)
        picture = editor.generate("a cat on a chair", num_inference_steps=30, generator=torch.manual_seed(0))
        picture = editor.edit(mask, prompt="a dog on a chair")
        print(editor.report)

    The pipeline's own loop runs every time, with its own scheduler. Outside of the mask the network's answer is that of
    the reference run, so that there latents and picture stay what they were, without pasting.

    Args:
        pipe: a text-to-image, image-to-image or inpainting pipeline, with a network that `apply_sparse_edit` knows.
        config: `SparseEditConfig`.

    Raises:
        TypeError, ValueError: as `apply_sparse_edit`.
    """

    def __init__(self, pipe: Any, config: SparseEditConfig | None = None):
        self.pipe, self.config = pipe, config or SparseEditConfig()
        found = denoisers(pipe)
        if len(found) > 1:
            raise ValueError(f"{type(pipe).__name__} has several denoisers ({', '.join(found)}); edits are for one")
        self.handle = apply_sparse_edit(next(iter(found.values())), self.config)
        self._decoder = DecoderEdit.on(pipe) if self.config.vae else None
        self._follower = Follower(pipe)
        self._reset({})

    def _reset(self, call: dict[str, Any]) -> None:
        self._call, self._start = call, None
        self.reference = Reference()
        self.picture: Any = None
        self.report: EditReport | None = None
        self._seconds = 0.0
        self._undo: Callable[[], None] | None = None
        self._settle: Callable[[], None] | None = None
        self.handle.engine.cache.clear()

    # A reference

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the pipeline, and keep what edits need. Arguments and result are the pipeline's.

        Raises:
            MemoryError: if the features of all steps need more than `config.memory_limit`, after the first call.
        """
        call = self._named(args, kwargs)
        self._reset({**call, "generator": copied(call["generator"])})

        def remember(latents: Tensor) -> Tensor:
            noise = None if "image" in self._names() else latents / self.pipe.scheduler.init_noise_sigma
            self._start = Start(latents.detach().clone(), noise)
            return latents

        return self._record(call, remember, None)

    def encode(self, picture: Any, prompt: Any = "", **kwargs: Any) -> Any:
        """Take a picture from elsewhere. Returns it as the VAE sees it, in what the pipeline returns.

        The reference is the run that leads to this picture: from its latents with noise, by what a perfect network
        would say. With reference="record" the network runs at each step, to keep its features; with "self" it does not.

        Args:
            picture: PIL picture, array or tensor as the pipeline's image processor takes it.
            prompt: what it shows, for the features.
            kwargs: of the pipeline: steps, guidance, ...; `generator` makes the noise.

        Raises:
            TypeError: if the pipeline has no VAE, or packs its latents.
        """
        if not hasattr(self.pipe, "prepare_latents"):
            raise TypeError(f"{type(self.pipe).__name__} prepares no latents, which the picture would begin with")
        call = self._named((), {"prompt": prompt, **kwargs})
        started = time.perf_counter()
        with torch.no_grad():
            clean = encode(self.pipe, picture, height=call.get("height"), width=call.get("width"))
        sides = {"height": clean.shape[-2], "width": clean.shape[-1]}
        call |= {name: side * self.pipe.vae_scale_factor for name, side in sides.items() if name in self._names()}
        call = {**self._given(picture, None), **call}
        self._reset({**call, "generator": copied(call["generator"])})
        shift: list[Shift] = []  # from nothing to the picture

        def begin(latents: Tensor) -> Tensor:
            if latents.ndim != clean.ndim:
                raise TypeError(f"{type(self.pipe).__name__} packs its latents; edit a picture that it generated")
            whole = clean.repeat(len(latents) // len(clean), 1, 1, 1).to(latents)
            shift.append(Shift(whole, draw(whole, copied(self._call["generator"]))))
            self._start = Start(noised(self.pipe.scheduler, whole, shift[0].noise, self._first()), shift[0].noise)
            return self._start.latents

        def change(step: int, output: Tensor) -> Tensor:
            return shift[0].output(self.pipe.scheduler, step, torch.zeros_like(output))

        result = self._record(call, begin, change)
        self._seconds = time.perf_counter() - started
        return result

    # Edits

    def edit(
        self,
        mask: Any = None,
        *,
        prompt: Any = None,
        strength: float = 1.0,
        image: Any = None,
        generator: torch.Generator | None = None,
        dense: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Compute the picture anew in the mask. The edit before this one becomes part of the reference.

        Args:
            mask: white where the picture may change; see `read_mask`. May be left out where `image` is given: then it
                is where that differs from the picture.
            prompt: for the masked part; the reference's if left out.
            strength: in (0, 1]: the last share of the steps is computed, the ones before are the reference's.
            image: the picture with something painted over it, from which the edit begins (with a `strength` below 1).
            generator: of new noise in the mask; without, the noise is the reference's.
            dense: run the whole network instead, for comparison.
            kwargs: further conditions of the pipeline, such as `negative_prompt`.

        Returns:
            What the pipeline returns; `report` tells times and errors.

        Raises:
            RuntimeError: if there is no reference.
            ValueError: for an empty mask, a strength outside of (0, 1], or arguments that would change the outside.
        """
        if self.picture is None:
            raise RuntimeError("there is nothing to edit yet; call editor.generate(prompt) or editor.encode(picture)")
        if not 0 < strength <= 1:
            raise ValueError(f"strength={strength!r}: give a share of the steps in (0, 1]")
        for name in _FIXED:
            if name in kwargs and kwargs[name] != self._call.get(name):
                raise ValueError(f"{name} is the reference's, since the outside of the mask must stay; leave it out")
        self.accept()
        mask = self._mask(mask, image)
        call = {**self._call, **kwargs, **self._given(None, mask), "generator": copied(self._call["generator"])}
        call |= {} if prompt is None else {"prompt": prompt}
        steps = sorted({step for step, _ in self.reference.outputs})
        shift, scheduler = self._shift(image, generator), self.pipe.scheduler
        run = Editing(
            self.handle,
            self._follower,
            self.reference,
            mask,
            start=steps[int(len(steps) * (1 - strength) + 1e-6)],
            change=None if shift is None else lambda step, output: shift.output(scheduler, step, output),
            dense=dense,
        )
        starts: list[Start] = []

        def begin(latents: Tensor) -> Tensor:
            assert self._start is not None
            inside = self.handle.inside(mask, latents)
            starts.append(self._start.shifted(scheduler, steps[0], inside, shift))
            return starts[0].latents

        started, before = time.perf_counter(), self.picture
        with ExitStack() as stack:
            stack.enter_context(prepared(self.pipe, begin))
            if self._decoder is not None:
                stack.enter_context(self._decoder.editing(mask, dense=dense))
            result = self._run(run, call)
        self.report = report_of(
            run,
            seconds=time.perf_counter() - started,
            reference_seconds=self._seconds,
            decoder_seconds=(0, 0)
            if self._decoder is None
            else (self._decoder.recorded_seconds, self._decoder.seconds),
            differences=differences(_pictures(result), before, mask),
        )
        self.picture = _pictures(result)
        self._undo = lambda: setattr(self, "picture", before)
        self._settle = lambda: setattr(self, "_start", starts[0] if starts else None)
        return result

    def undo(self) -> None:
        """Forget the last edit: the next one begins with the picture before it.

        Raises:
            RuntimeError: if there is no edit, or it was accepted.
        """
        if self._undo is None:
            raise RuntimeError("there is no edit to undo; edits are accepted by the next one, or by accept()")
        self._undo()
        self._undo = None
        self.reference.pending = {}
        self.handle.reject()
        if self._decoder is not None:
            self._decoder.handle.reject()

    def accept(self) -> None:
        """Make the last edit part of the reference; `edit` does so with the one before it."""
        if self._undo is None or self._settle is None:
            return
        self._undo = None
        self._settle()
        self.reference.accept()
        self.handle.accept()
        if self._decoder is not None:
            self._decoder.handle.accept()

    def remove(self) -> None:
        """Take everything off the pipeline; it is what it was."""
        self.handle.remove()
        if self._decoder is not None:
            self._decoder.handle.remove()

    def __enter__(self) -> SparseEditPipeline:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    # Parts of the above

    def _names(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(type(self.pipe).__call__).parameters)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by name, with a generator, so that it can be repeated."""
        call = {**dict(zip(list(self._names())[1:], args, strict=False)), **kwargs}
        if call.get("generator") is None:
            call["generator"] = torch.Generator().manual_seed(int(torch.randint(2**31, ()).item()))
        return call

    def _record(self, call: dict[str, Any], begin: Any, change: Any) -> Any:
        start = time.perf_counter()
        with ExitStack() as stack:
            stack.enter_context(prepared(self.pipe, begin))
            if self._decoder is not None:
                stack.enter_context(self._decoder.recording())
            result = self._run(Recording(self.handle, self._follower, self.reference, change), call)
        self._seconds = time.perf_counter() - start
        self.picture = _pictures(result)
        return result

    def _run(self, driver: Any, call: dict[str, Any]) -> Any:
        self._follower.restart()
        self.handle.engine.driver = driver
        try:
            return self.pipe(**call)
        finally:
            self.handle.engine.driver = None

    def _given(self, picture: Any, mask: np.ndarray | None) -> dict[str, Any]:
        """What inpainting and image-to-image pipelines want besides."""
        given, names = {}, self._names()
        if "image" in names and picture is not None:
            given["image"] = picture
        if "mask_image" in names:
            if mask is not None:
                given["mask_image"] = [Image.fromarray(one.astype(np.uint8) * 255) for one in mask]
            elif isinstance(picture, Image.Image):
                given["mask_image"] = Image.new("L", picture.size)
        return given

    def _mask(self, mask: Any, image: Any) -> np.ndarray:
        if mask is None:
            if image is None:
                raise ValueError("say what to edit: a mask, or image=, the picture with something painted over it")
            mask = difference_mask(self.picture[0], image)
        found = read_mask(mask)
        if not found.any():
            raise ValueError("the mask is empty: nothing would be edited; paint what should change in white")
        return found

    def _first(self) -> int:
        return getattr(self.pipe.scheduler, "begin_index", None) or 0

    def _shift(self, image: Any, generator: torch.Generator | None) -> Shift | None:
        """What was painted, and new noise."""
        if image is None and generator is None:
            return None
        if self._start is None:
            raise TypeError(f"{type(self.pipe).__name__} prepares no latents, so that edits have no other start")
        clean = noise = torch.zeros_like(self._start.latents)
        if image is not None:
            size = {"height": self._call.get("height"), "width": self._call.get("width")}
            with torch.no_grad():
                clean = encode(self.pipe, image, **size) - encode(self.pipe, self.picture, **size)
        if generator is not None:
            if self._start.noise is None:
                raise TypeError(f"{type(self.pipe).__name__} begins with a picture; new noise is for those that do not")
            noise = draw(noise, generator) - self._start.noise
        return Shift(clean.to(noise), noise)


def _pictures(result: Any) -> Any:
    return result.images if hasattr(result, "images") else result[0]
