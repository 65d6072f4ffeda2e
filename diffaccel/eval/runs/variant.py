"""What is measured, as text: a model, a scheduler and how the pipeline is called.

`emoji-sd,scheduler=dpmpp_2m,schedule=beta,final=sigma_min,steps=8,guidance_scale=4`, or a JSON file with these keys.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import diffusers

from diffaccel.sample import load_pipeline
from diffaccel.samplers.catalog import parse_schedule, parse_solver
from diffaccel.samplers.catalog import scheduler as make_scheduler
from diffaccel.samplers.grid import Final

OURS = ("schedule", "final", "start", "timesteps")  # options of `diffaccel.scheduler`; others are passed on
COMMA = re.compile(r",(?![^\[]*\])(?![^{]*\})")  # outside of JSON's lists and objects


@dataclass(frozen=True)
class Variant:
    """A pipeline and its call.

    Attributes:
        model: zoo name, folder or hub id.
        scheduler: name of `diffaccel list`, class of Diffusers (`UniPCMultistepScheduler`), or None: the model's own.
        options: options of the scheduler: `schedule`, `final`, ... of ours; config keys of Diffusers' classes.
        call: arguments of the pipeline: `num_inference_steps`, `guidance_scale`, `height`, ...
        name: as it stands in the table.
    """

    model: str
    scheduler: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self._default_name())
        if self.scheduler is None and self.options:
            raise ValueError(f"scheduler options {', '.join(self.options)} need a scheduler; add scheduler=NAME")
        if self.scheduler is not None:  # unknown names are refused before a model is loaded
            self._check_scheduler(self.scheduler)

    def _check_scheduler(self, scheduler: str) -> None:
        if not _is_diffusers_class(scheduler):
            parse_solver(scheduler)
            if "schedule" in self.options:
                parse_schedule(str(self.options["schedule"]))
            if self.options.get("final", "zero") not in get_args(Final):
                raise ValueError(f"unknown final {self.options['final']!r}; use {', '.join(get_args(Final))}")
            return
        known = inspect.signature(getattr(diffusers, scheduler)).parameters
        unknown = [key for key in self.options if key not in known]  # `from_config` would pass over them
        if unknown:
            raise ValueError(f"{scheduler} has no option {', '.join(unknown)}; there are {', '.join(known)}")

    def _default_name(self) -> str:
        options = [str(value) if key in OURS else f"{key}={value}" for key, value in self.options.items()]
        words = [Path(self.model).name, self.scheduler or "", *options]
        steps = self.call.get("num_inference_steps")
        return " ".join(filter(None, [*words, f"{steps} steps" if steps else ""]))

    def load(self, device: str | None = None, dtype: str | None = None) -> Any:
        """The pipeline with its scheduler."""
        return self.applied(load_pipeline(self.model, device, dtype))

    def applied(self, pipe: Any) -> Any:
        """`pipe` with the scheduler of this variant, made from the config of the scheduler that `pipe` has."""
        if self.scheduler is None:
            return pipe
        if _is_diffusers_class(self.scheduler):
            pipe.scheduler = getattr(diffusers, self.scheduler).from_config(pipe.scheduler.config, **self.options)
        else:
            pipe.scheduler = make_scheduler(self.scheduler, pipe, **self.options)
        return pipe


def parse_variant(text: str) -> Variant:
    """`MODEL,key=value,...` or the path of a `.json` file -> Variant.

    `steps` is short for `num_inference_steps`; `scheduler`, `schedule`, `final`, `start`, `timesteps` and everything
    that starts with `scheduler.` concern the scheduler; `name` is the row's name; all else goes to the pipeline.

    Values are JSON where they can be read as such (`8`, `true`, `[999,500]`), and text otherwise. A list of `timesteps`
    is the pipeline's.

    Raises:
        ValueError: if a part has no `=`, a key comes twice, or a name is not known.
    """
    if text.endswith(".json"):
        return _from_file(Path(text))
    model, *parts = (part.strip() for part in COMMA.split(text))
    pairs = [[word.strip() for word in part.partition("=")] for part in parts]
    if not model or "=" in model or any(not sign or not key for key, sign, _ in pairs):
        raise ValueError(f"cannot read {text!r}: write MODEL,key=value,... such as emoji-sd,scheduler=dpmpp_2m,steps=8")
    keys = ["num_inference_steps" if key == "steps" else key for key, _, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"{text!r} gives {max(keys, key=keys.count)} twice; give it once")
    return _variant(model, {key: _value(value) for key, _, value in pairs})


def _from_file(path: Path) -> Variant:
    example = '{"model": "emoji-sd", "steps": 8}'
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}; it would hold an object such as {example}") from None
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{path} is not JSON ({error}); write an object such as {example}") from None
    if not isinstance(values, dict) or "model" not in values:
        raise ValueError(f"{path} must hold an object with the key model, such as {example}")
    return _variant(str(values.pop("model")), values)


def _variant(model: str, values: dict[str, Any]) -> Variant:
    scheduler, name = values.pop("scheduler", None), str(values.pop("name", ""))
    if "steps" in values:
        values["num_inference_steps"] = values.pop("steps")
    options = {key: values.pop(key) for key in OURS if key in values and not isinstance(values[key], list)}
    dotted = [key for key in values if key.startswith("scheduler.")]
    options |= {key.removeprefix("scheduler."): values.pop(key) for key in dotted}
    return Variant(model, None if scheduler is None else str(scheduler), options, values, name)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _is_diffusers_class(name: str) -> bool:
    return name.endswith("Scheduler") and hasattr(diffusers, name)


class Loader:
    """Pipelines of variants, one model in memory at a time: variants of the same model share it.

    The model's own scheduler is put back before each variant, so that no variant sees the one before.
    """

    def __init__(self, device: str | None = None, dtype: str | None = None) -> None:
        self.device, self.dtype = device, dtype
        self.model: str | None = None
        self.pipe: Any = None
        self.own: Any = None

    def __call__(self, variant: Variant) -> Any:
        """The variant's pipeline; valid until the next call."""
        if self.model != variant.model:
            self.model = self.pipe = self.own = None  # let the old one go before the new one is loaded
            self.pipe, self.model = load_pipeline(variant.model, self.device, self.dtype), variant.model
            self.own = self.pipe.scheduler
        self.pipe.scheduler = self.own
        return variant.applied(self.pipe)

    def bound(self, variant: Variant) -> Callable[[], Any]:
        """A function without arguments that loads the variant."""
        return lambda: self(variant)
