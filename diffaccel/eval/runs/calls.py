"""How a pipeline is called, whichever it is: what it names its condition, and without its own progress bar."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from diffaccel.eval.errors import DataError

# What the prompts, the seeds and the form of the pictures decide.
RESERVED = (
    *("prompt", "class_labels", "batch_size", "num_images_per_prompt", "generator"),
    *("output_type", "return_dict", "callback_on_step_end"),
)


def accepted(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """Parameters of the pipeline's call."""
    return inspect.signature(type(pipe).__call__).parameters


def check_call(pipe: Any, call: Mapping[str, Any]) -> None:
    """Refuse arguments that the pipeline does not know, or that are not the caller's to give.

    Raises:
        ValueError: naming them, and those that there are.
    """
    names = accepted(pipe)
    taken = [name for name in call if name in RESERVED]
    if taken:
        raise ValueError(f"{', '.join(taken)} cannot be given: prompts and seeds decide what each picture is")
    unknown = [name for name in call if name not in names]
    # Some pipelines of Diffusers take any name, and pass over it; elsewhere **kwargs may mean something.
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in names.values())
    if unknown and not (takes_any and not type(pipe).__module__.startswith("diffusers.")):
        known = [name for name in names if name not in ("self", "kwargs", *RESERVED)]
        raise ValueError(f"{type(pipe).__name__} has no argument {', '.join(unknown)}; there are {', '.join(known)}")


def conditioned(pipe: Any, texts: Sequence[str], call: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for a picture of each text: `prompt`, `class_labels` or, of a pipeline with neither, `batch_size`.

    A negative prompt is repeated for each: pipelines want both in one form. What `call` names already stays.

    Raises:
        DataError: if the pipeline wants class numbers and the texts are none, or it takes none of the three.
    """
    names = accepted(pipe)
    arguments = dict(call)
    if "prompt" in names:
        arguments.setdefault("prompt", list(texts))
        if isinstance(arguments.get("negative_prompt"), str):
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(texts)
    elif "class_labels" in names:
        if not all(text.isdecimal() for text in texts):
            raise DataError(f"{type(pipe).__name__} is conditioned on classes; its prompts must be class numbers")
        arguments.setdefault("class_labels", [int(text) for text in texts])
    elif "batch_size" in names:
        arguments.setdefault("batch_size", len(texts))
    else:
        raise DataError(
            f"{type(pipe).__name__} takes neither prompts nor class labels nor a number of pictures, and cannot be "
            "evaluated by prompts"
        )
    return arguments


@contextlib.contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Without the pipeline's progress bar, which would break ours, and whose drawing takes time."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


@contextlib.contextmanager
def seeded_noise_only(pipe: Any) -> Iterator[None]:
    """Raise ValueError if the block draws from PyTorch's global generators, as SDE schedulers do in some pipelines.

    DiT, Stable Diffusion 3 and Flux do not hand their generators on to the scheduler: its noise would then be another
    one in every run. Dropout that was left on is caught too.
    """
    before = _global_generators()
    yield
    if any(not torch.equal(a, b) for a, b in zip(before, _global_generators(), strict=True)):
        raise ValueError(
            f"{type(pipe).__name__} with {type(pipe.scheduler).__name__} drew noise that no seed decides, so that its "
            "pictures cannot be made again; use a scheduler without noise of its own, and networks in eval mode"
        )


def _global_generators() -> list[torch.Tensor]:
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *on_devices]
