"""Recipes: what a search found, as a small JSON file that gives back its sampler."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffaccel.cost import denoisers
from diffaccel.pictures import save_text
from diffaccel.samplers.schedule import NoiseSchedule
from diffaccel.samplers.scheduler import SolverScheduler
from diffaccel.samplers.searched import RecipeScheduler
from diffaccel.samplers.tabulate import Table, grid_of

FORMAT = "diffaccel recipe 1"
# What tells families of networks apart, as far as their configs have it.
FAMILY = ("in_channels", "out_channels", "block_out_channels", "cross_attention_dim", "num_layers", "num_single_layers")
FAMILY += ("num_attention_heads", "attention_head_dim", "joint_attention_dim")
FACTS = {"class", "config", "path", "prediction_type", "log_snr"}  # of every network


@dataclass(frozen=True)
class Entry:
    """One searched sampler.

    Attributes:
        method: that found it.
        steps: network calls.
        guidance_scale: it was searched with.
        lambdas: half log-SNR of the calls.
        end: half log-SNR of the end; None: sigma = 0.
        timesteps: what the network is told.
        rows: see `NonStationary`.
        measured: on held-out prompts and seeds, see `diffaccel.search`.
        notes: what was learned and how; `skips` are layers left out in each step.
    """

    method: str
    steps: int
    guidance_scale: float
    lambdas: tuple[float, ...]
    end: float | None
    timesteps: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    measured: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, table: Table, method: str, guidance_scale: float, **facts: Any) -> Entry:
        """Of a table."""
        *calls, end = table.lambdas
        return cls(
            method,
            table.steps,
            guidance_scale,
            tuple(calls),
            None if math.isinf(end) else end,
            tuple(map(float, table.timesteps)),
            table.rows,
            **facts,
        )

    def table(self, schedule: NoiseSchedule) -> Table:
        """The sampler."""
        end = math.inf if self.end is None else self.end
        return Table(grid_of(schedule, self.lambdas, end, self.timesteps), self.rows)


@dataclass(frozen=True)
class Recipe:
    """Searched samplers of one network, by steps and guidance scale.

    Attributes:
        network: what the searches ran on, see `network_facts`.
        entries: one for each number of steps and guidance scale.
    """

    network: dict[str, Any]
    entries: tuple[Entry, ...]

    def scheduler(self, target: Any, guidance_scale: float | None = None) -> RecipeScheduler:
        """A scheduler for `pipe.scheduler`, with every number of steps that was searched at one guidance scale.

        Args:
            target: the pipeline, or its scheduler's config. With the pipeline, its network is checked too.
            guidance_scale: of the pictures that will be made; may be left out where the recipe has only one.

        Raises:
            ValueError: for another noise schedule, prediction type or network than was searched on, a guidance scale
                that was not searched, or a recipe that leaves out layers (see `apply`).
        """
        chosen = self._at(guidance_scale)
        if any(entry.notes.get("skips") for entry in chosen):
            raise ValueError(
                "this recipe also leaves out layers of the network; give it the pipeline: recipe.apply(pipe)"
            )
        return self._scheduler(target, chosen)

    def _scheduler(self, target: Any, chosen: Sequence[Entry]) -> RecipeScheduler:
        config = target.scheduler.config if hasattr(target, "scheduler") else target
        self._check(config, target if hasattr(target, "scheduler") else None)
        tables = [
            {
                "lambdas": list(e.lambdas),
                "end": e.end,
                "timesteps": list(e.timesteps),
                "rows": [list(r) for r in e.rows],
            }
            for e in chosen
        ]
        return RecipeScheduler.from_config(config, solver_options={"recipe": tables})

    def apply(self, pipe: Any, steps: int | None = None, guidance_scale: float | None = None) -> Any:
        """Set `pipe.scheduler`, and leave out the layers that the recipe leaves out.

        Args:
            pipe: the pipeline.
            steps: that will be made; may be left out where the recipe has only one.
            guidance_scale: as of `scheduler`.

        Returns:
            A handle whose `remove()` takes the layers back in, or None where there are none to leave out.
        """
        from diffaccel.samplers.search.skipping import skip_layers

        chosen = [entry for entry in self._at(guidance_scale) if steps in (None, entry.steps)]
        if len(chosen) != 1:
            have = ", ".join(str(entry.steps) for entry in self._at(guidance_scale))
            raise ValueError(f"this recipe is for {have} steps; say which: recipe.apply(pipe, steps=...)")
        pipe.scheduler = self._scheduler(pipe, chosen)
        skips = chosen[0].notes.get("skips")
        return skip_layers(pipe, skips) if skips and any(skips) else None

    def _at(self, guidance_scale: float | None) -> list[Entry]:
        scales = sorted({entry.guidance_scale for entry in self.entries})
        if guidance_scale is None and len(scales) > 1:
            raise ValueError(
                f"this recipe is for guidance scales {_listed(scales)}; say which: guidance_scale={scales[0]:g}"
            )
        wanted = scales[0] if guidance_scale is None else guidance_scale
        chosen = [entry for entry in self.entries if entry.guidance_scale == wanted]
        if not chosen:
            raise ValueError(
                f"this recipe is for guidance {_listed(scales)}, not {wanted:g}; "
                f"diffaccel.search(..., guidance_scale={wanted:g}) makes one"
            )
        return chosen

    def _check(self, config: Mapping[str, Any], pipe: Any) -> None:
        own = SolverScheduler.from_config(config)
        found = schedule_facts(own)
        if found["prediction_type"] != self.network["prediction_type"]:
            raise ValueError(
                f"this recipe was searched on a network that predicts {self.network['prediction_type']}, and this one "
                f"predicts {found['prediction_type']}; search on it: diffaccel.search(pipe, ...)"
            )
        if found["path"] != self.network["path"] or not np.allclose(
            found["log_snr"], self.network["log_snr"], atol=1e-4
        ):
            raise ValueError(
                "this recipe was searched on another noise schedule; search on this one: diffaccel.search(pipe, ...)"
            )
        if pipe is None:
            return
        facts = network_facts(pipe)
        for key in ("class", "config"):
            if facts[key] != self.network.get(key):
                raise ValueError(
                    f"this recipe was searched on another network ({self.network.get('class')}, "
                    f"{_differences(self.network.get('config', {}), facts['config']) or facts['class']}); "
                    "search on this one: diffaccel.search(pipe, ...)"
                )

    def __or__(self, other: Recipe) -> Recipe:
        """Both recipes' entries; the other's where both have one.

        Raises:
            ValueError: for recipes of two networks.
        """
        if self.network != other.network:
            raise ValueError("recipes of different networks or noise schedules cannot be one")
        both = {(entry.steps, entry.guidance_scale): entry for entry in (*self.entries, *other.entries)}
        return Recipe(self.network, tuple(both[key] for key in sorted(both)))

    def draw(self, path: str | Path, target: Any = None) -> Path:
        """Draw noise levels, what the network is told, weights, and how they were found, as a PNG.

        Args:
            path: of the PNG.
            target: as of `scheduler`; with it, known schedules and exact times are drawn too.

        Raises:
            ImportError: without matplotlib.
            ValueError: for another noise schedule or network than was searched on.
        """
        from diffaccel.samplers.search.picture import draw

        if target is not None:
            pipe = target if hasattr(target, "scheduler") else None
            self._check(target if pipe is None else pipe.scheduler.config, pipe)
        return draw(self, path, target)

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        text = {"format": FORMAT, "network": self.network, "entries": [asdict(entry) for entry in self.entries]}
        save_text(json.dumps(text, indent=1, allow_nan=False) + "\n", Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read what `save` wrote.

        Raises:
            ValueError: for any other file.
        """
        try:
            read = json.loads(Path(path).read_text())
            if read["format"] != FORMAT or not read["entries"] or FACTS - set(read["network"]):
                raise ValueError
            entries = tuple(
                Entry(
                    **entry
                    | {k: tuple(entry[k]) for k in ("lambdas", "timesteps")}
                    | {"rows": tuple(map(tuple, entry["rows"]))}
                )
                for entry in read["entries"]
            )
            return cls(read["network"], entries)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no recipe; give a file that Recipe.save or `diffaccel search` wrote"
            ) from error


def network_facts(pipe: Any) -> dict[str, Any]:
    """What a recipe remembers of the network it was searched on: its family and its noise schedule, not its weights."""
    network: Any = next(iter(denoisers(pipe).values()))
    config = {key: network.config[key] for key in FAMILY if network.config.get(key) is not None}
    config = json.loads(json.dumps(config))
    probe = SolverScheduler.from_config(pipe.scheduler.config)
    return {"class": type(network).__name__, "config": config, **schedule_facts(probe)}


def schedule_facts(scheduler: SolverScheduler) -> dict[str, Any]:
    """Path, prediction type, and half log-SNR at five training timesteps."""
    lambdas = scheduler.schedule.lambdas
    at = np.linspace(0, len(lambdas) - 1, 5).round().astype(int)
    return {
        "path": scheduler.schedule.path,
        "prediction_type": scheduler.prediction_type,
        "log_snr": [round(float(v), 6) for v in lambdas[at]],
    }


def _listed(numbers: Sequence[float]) -> str:
    return " and ".join(f"{number:g}" for number in numbers)


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    keys = [key for key in (*a, *b) if a.get(key) != b.get(key)]
    return ", ".join(f"{key} {a.get(key)} and not {b.get(key)}" for key in dict.fromkeys(keys))
