"""Pictures that are edited again and again, each time computing only what changes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffaccel.cost import denoisers
from diffaccel.hooking import hook_on
from diffaccel.kernels.arguments import FIXED, edited, given, named, names, refuse, refuse_policy, same
from diffaccel.kernels.attached import NAME
from diffaccel.kernels.config import SparseEditConfig
from diffaccel.kernels.decoder import DecoderEdit
from diffaccel.kernels.editing import Editing
from diffaccel.kernels.engine import apply_sparse_edit
from diffaccel.kernels.latents import encode, noised, packed, prepared
from diffaccel.kernels.region import difference_mask, read_mask
from diffaccel.kernels.report import EditReport, differences, report_of
from diffaccel.kernels.session import Follower, Recording, Reference
from diffaccel.kernels.start import Shift, Start, copied, draw, random_from, random_state


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
        network = next(iter(found.values()))
        refuse_policy(network)
        self.handle = apply_sparse_edit(network, self.config)
        try:
            self._decoder = DecoderEdit.on(pipe) if self.config.vae else None
        except BaseException:
            self.handle.remove()
            raise
        self._follower = Follower(pipe)
        self._reset({})

    def _reset(self, call: dict[str, Any]) -> None:
        self._call, self._start, self._random = call, None, random_state()
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
            ValueError: for what mixes the whole picture outside of the network, so that the outside would change with
                an edit.
        """
        call = named(self.pipe, args, kwargs)
        refuse(self.pipe, call)
        self._reset({**call, "generator": copied(call["generator"])})

        def remember(latents: Tensor, step: int | None) -> Tensor:
            begins = "image" in names(self.pipe)  # with a picture
            noise = None if begins else latents / getattr(self.pipe.scheduler, "init_noise_sigma", 1.0)
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
            TypeError: if the pipeline has no VAE, or prepares no latents.
            ValueError: if it makes fewer pictures than are given.
        """
        if not hasattr(self.pipe, "prepare_latents"):
            raise TypeError(f"{type(self.pipe).__name__} prepares no latents, which the picture would begin with")
        shown = {} if "prompt_embeds" in kwargs and prompt == "" else {"prompt": prompt}
        call = named(self.pipe, (), {**given(self.pipe, picture), **shown, **kwargs})
        started = time.perf_counter()
        with torch.no_grad():
            clean = encode(self.pipe, picture, height=call.get("height"), width=call.get("width"))
        sides = {"height": clean.shape[-2], "width": clean.shape[-1]}
        asked = names(self.pipe)
        call |= {name: side * self.pipe.vae_scale_factor for name, side in sides.items() if name in asked}
        refuse(self.pipe, call)
        clean = packed(self.pipe, clean)
        self._reset({**call, "generator": copied(call["generator"])})
        shift: list[Shift] = []  # from nothing to the picture

        def begin(latents: Tensor, step: int | None) -> Tensor:
            if len(latents) % len(clean):
                raise ValueError(f"{len(clean)} pictures for a run that makes {len(latents)}; give a prompt for each")
            whole = clean.repeat(len(latents) // len(clean), *[1] * (clean.ndim - 1)).to(latents)
            noise = draw(whole, copied(self._call["generator"]))
            shift.append(Shift(whole, noise))
            self._start = Start(noised(self.pipe.scheduler, whole, noise, step), noise)
            return self._start.latents

        def change(step: int, output: Tensor, state: Tensor) -> Tensor:
            return shift[0].output(self.pipe.scheduler, step, output, state)

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
        for name in FIXED:
            if name in kwargs and not same(kwargs[name], self._call.get(name)):
                raise ValueError(f"{name} is the reference's, since the outside of the mask must stay; leave it out")
        mask = self._mask(mask, image)
        self.accept()
        conditions = kwargs if prompt is None else {**kwargs, "prompt": prompt}
        call = edited(self.pipe, self._call, conditions, mask) | {"generator": copied(self._call["generator"])}
        steps = sorted({step for step, _ in self.reference.outputs})
        shift, scheduler = self._shift(image, generator), self.pipe.scheduler
        run = Editing(
            self.handle,
            self._follower,
            self.reference,
            mask,
            start=steps[min(int(len(steps) * (1 - strength) + 1e-6), len(steps) - 1)],
            change=None if shift is None else partial(shift.output, scheduler),
            dense=dense,
        )
        starts: list[Start] = []

        def begin(latents: Tensor, step: int | None) -> Tensor:
            assert self._start is not None
            inside = self.handle.inside(mask, latents)
            starts.append(self._start.shifted(scheduler, step, inside, shift))
            return starts[0].latents

        started, before = time.perf_counter(), self.picture
        try:
            with ExitStack() as stack:
                stack.enter_context(random_from(self._random))
                stack.enter_context(prepared(self.pipe, begin))
                if self._decoder is not None:
                    stack.enter_context(self._decoder.editing(mask, dense=run.dense))
                result = self._run(run, call)
        except BaseException:
            self._reject()
            raise
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

        def settle() -> None:
            self._start = starts[0] if starts else None
            if "mask_image" in call:
                self._call["mask_image"] = call["mask_image"]

        self._settle = settle
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
        self._reject()

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

    def _reject(self) -> None:
        self.reference.pending = {}
        self.handle.reject()
        if self._decoder is not None:
            self._decoder.handle.reject()

    def _record(self, call: dict[str, Any], begin: Any, change: Any) -> Any:
        start = time.perf_counter()
        with ExitStack() as stack:
            stack.enter_context(prepared(self.pipe, begin))
            if self._decoder is not None:
                stack.enter_context(self._decoder.recording())
            try:
                result = self._run(Recording(self.handle, self._follower, self.reference, change), call)
            except BaseException:
                self._reset({})
                raise
        self._seconds = time.perf_counter() - start
        self.picture = _pictures(result)
        return result

    def _run(self, driver: Any, call: dict[str, Any]) -> Any:
        network = self.handle.network
        if network not in denoisers(self.pipe).values() or hook_on(network, NAME) is None:
            raise RuntimeError(
                "the pipeline's network has no sparse edits any more, since they were removed or it was replaced; make "
                "a new SparseEditPipeline(pipe)"
            )
        refuse_policy(network)
        self._follower.restart()
        self.handle.engine.driver = driver
        try:
            return self.pipe(**call)
        finally:
            self.handle.engine.driver = None

    def _mask(self, mask: Any, image: Any) -> np.ndarray:
        if mask is None:
            if image is None:
                raise ValueError("say what to edit: a mask, or image=, the picture with something painted over it")
            several = isinstance(image, list) or getattr(image, "ndim", 0) == 4
            pairs = zip(self.picture, image if several else [image], strict=False)
            mask = [difference_mask(before, after) for before, after in pairs]
        found = read_mask(mask)
        if not found.any(axis=(1, 2)).all():
            raise ValueError("the mask is empty: nothing would be edited; paint what should change in white")
        if len(found) not in (1, len(self.picture)):
            raise ValueError(f"{len(found)} masks for {len(self.picture)} pictures; give one, or one for each picture")
        return found

    def _shift(self, image: Any, generator: torch.Generator | None) -> Shift | None:
        """What was painted, and new noise."""
        if image is None and generator is None:
            return None
        if self._start is None:
            raise TypeError(f"{type(self.pipe).__name__} prepares no latents, so that edits have no other start")
        clean = noise = torch.zeros_like(self._start.latents)
        if image is not None:
            if self._call.get("output_type") == "latent":
                raise ValueError("image= is compared with the reference's picture, and output_type='latent' makes none")
            size = {"height": self._call.get("height"), "width": self._call.get("width")}
            with torch.no_grad():
                change = encode(self.pipe, image, **size) - encode(self.pipe, self.picture, **size)
            clean = packed(self.pipe, change)
        if generator is not None:
            if self._start.noise is None:
                raise TypeError(f"{type(self.pipe).__name__} begins with a picture; new noise is for those that do not")
            noise = draw(noise, generator) - self._start.noise
        return Shift(clean.to(noise), noise)


def _pictures(result: Any) -> Any:
    return result.images if hasattr(result, "images") else result[0]
