"""What is removed from a network, as a small file: `pruning_plan.json`, beside `config.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from diffaccel.pictures import save_text
from diffaccel.pruning.families import FAMILIES, stock_class
from diffaccel.pruning.find import find_groups
from diffaccel.pruning.groups import DEPTH, Group, Groups
from diffaccel.pruning.models import pruned_class
from diffaccel.pruning.numbering import numbering_of
from diffaccel.pruning.structure import build

FILE, FORMAT = "pruning_plan.json", 1


@dataclass(frozen=True)
class PruningPlan:
    """Removed units of a network, by group.

    Attributes:
        model: name of the stock class of Diffusers.
        config: config of the network that the plan is for.
        fingerprint: SHA-256 of the names and shapes of its parameters.
        units: number of units of every group that loses some.
        removed: indices of the removed units, ascending; (0,) for a group of depth.
        facts: how it came about: criterion, budget, target, costs before and after, ...
    """

    model: str
    config: dict[str, Any]
    fingerprint: str
    units: dict[str, int]
    removed: dict[str, tuple[int, ...]]
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: nn.Module, removed: Mapping[str, Sequence[int]], facts: Mapping[str, Any] | None = None
    ) -> PruningPlan:
        """Plan that removes units of `model`: indices by the name of the group (`find_groups`).

        Raises:
            ValueError: if a group is not known, a unit is not in it, or nothing is removed.
        """
        groups = find_groups(model)
        chosen = {name: tuple(sorted({int(unit) for unit in units})) for name, units in removed.items()}
        chosen = {name: units for name, units in chosen.items() if units}
        if not chosen:
            raise ValueError("a plan that removes nothing; name units of groups of find_groups(model)")
        _check_units(groups, chosen)
        ordered = {name: chosen[name] for name in groups.found if name in chosen}
        settings: dict[str, Any] = dict(model.config)  # type: ignore[call-overload]
        config = {key: value for key, value in settings.items() if not key.startswith("_")}
        units = {name: groups.found[name].units for name in ordered}
        return cls(stock_class(model).__name__, config, fingerprint(model), units, ordered, dict(facts or {}))

    def check(self, model: nn.Module) -> Groups:
        """The groups of `model`, if this plan is for a network of its structure.

        Raises:
            ValueError: if it is for another one.
        """
        name = stock_class(model).__name__
        if name != self.model:
            raise ValueError(f"this plan is for a {self.model}, the network is a {name}; make a plan for it")
        groups = find_groups(model)
        # Heads are not in the shapes: two networks may have the same parameters and split them differently.
        lost = next((group for group, count in self.units.items() if _units(groups, group) != count), None)
        if fingerprint(model) != self.fingerprint or (lost and lost in groups.found):
            counts = f"({self.units[lost]} units in the plan, {_units(groups, lost)} here)" if lost else ""
            detail = f", for example {lost} {counts}" if lost else ""
            raise ValueError(f"this plan is for a {name} of another structure{detail}; make a plan for this one")
        _check_units(groups, self.removed)  # a module that has a LoRA by now, ...
        return groups

    def original(self) -> Any:
        """The network that the plan is for, without weights: parameters on the `meta` device.

        Raises:
            ValueError: if this version does not know its class.
        """
        stock = next((kind for kind in FAMILIES if kind.__name__ == self.model), None)
        if stock is None:
            raise ValueError(f"the plan is for a {self.model}, which this version does not know")
        return build(pruned_class(stock) if self.config.get("pruned_structure") else stock, self.config)

    def renamed(self) -> dict[str, str | None]:
        """Index map: new names of the entries of lists that lose some, by their old names; None for those that go."""
        original = self.original()
        gone = [group for group in self.gone(find_groups(original)) if group.kind in ("block", "layer")]
        numbering = numbering_of(gone)
        lists = dict.fromkeys(name.rpartition(".")[0] for group in gone for name in group.modules)
        entries = [f"{name}.{i}" for name in lists for i in range(len(original.get_submodule(name)))]
        return {name: numbering.new(name) for name in entries}

    def gone(self, groups: Groups) -> list[Group]:
        """Modules that are left out whole, without those inside of others (a ResNet's body leaves its shortcut)."""
        removed = [groups.found[name] for name in self.removed]
        depth = [group for group in removed if group.kind in DEPTH and not group.sites]
        return [group for group in depth if not any(other.contains(group) for other in depth)]

    def save(self, path: str | Path) -> Path:
        """Write it as JSON; a folder gets a `pruning_plan.json`. Units are written as runs: "0-3,7".

        `renamed()` is written for other programs; it follows from the groups, and is not read again.
        """
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        groups = {name: {"units": self.units[name], "removed": _runs(units)} for name, units in self.removed.items()}
        model = {"class": self.model, "fingerprint": self.fingerprint, "config": self.config}
        content = {"format": FORMAT, "model": model, "facts": self.facts, "groups": groups, "renamed": self.renamed()}
        save_text(json.dumps(content, indent=1, default=_plain) + "\n", file)
        return file

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Read a plan: a file, or the folder it lies in.

        Raises:
            ValueError: if there is none, it is damaged, or the folder was pruned more than once (`load_plans`).
        """
        if (Path(path) / "pruning_plan.1.json").is_file():
            raise ValueError(f"{path} was pruned more than once; read its plans with load_plans, or name a file")
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, and this version reads {FORMAT}")
            model, groups = content["model"], content["groups"]
            units = {name: int(group["units"]) for name, group in groups.items()}
            removed = {name: _from_runs(group["removed"], units[name]) for name, group in groups.items()}
            if not removed:
                raise ValueError("it removes nothing")
            return cls(
                model["class"], dict(model["config"]), model["fingerprint"], units, removed, dict(content["facts"])
            )
        except FileNotFoundError:
            raise ValueError(f"there is no plan {file}; `diffaccel prune` writes one beside config.json") from None
        except KeyError as error:
            raise ValueError(f"{file} is no pruning plan ({error} is missing)") from None
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{file} is no pruning plan ({error})") from None


def load_plans(folder: str | Path) -> list[PruningPlan]:
    """All plans of a pruned network, the first one first: `pruning_plan.1.json`, ..., and `pruning_plan.json`.

    Raises:
        ValueError: if there is none, or one is damaged.
    """
    earlier = []
    while (file := Path(folder) / f"pruning_plan.{len(earlier) + 1}.json").is_file():
        earlier.append(PruningPlan.load(file))
    return [*earlier, PruningPlan.load(Path(folder) / FILE)]


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names and shapes of a network's parameters: its structure, not its weights."""
    lines = sorted(f"{name} {tuple(parameter.shape)}" for name, parameter in model.named_parameters())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _units(groups: Groups, name: str) -> int:
    return groups.found[name].units if name in groups.found else 0


def _check_units(groups: Groups, removed: Mapping[str, Sequence[int]]) -> None:
    for name, units in removed.items():
        if name not in groups.found:
            module = next((at for at in groups.refused if name == at or name.startswith(at + ".")), None)
            reason = groups.refused[module] if module else "there is no such group; find_groups(model).found has them"
            raise ValueError(f"cannot remove units of {name}: {reason}")
        if bad := [unit for unit in units if not 0 <= unit < groups.found[name].units]:
            raise ValueError(f"{name} has units 0 to {groups.found[name].units - 1}, not {bad[0]}")


def _runs(units: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for unit in units:
        if runs and unit == runs[-1][1] + 1:
            runs[-1][1] = unit
        else:
            runs.append([unit, unit])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _from_runs(text: str, count: int) -> tuple[int, ...]:
    """Units of the runs, ascending; `count` is the number there are."""
    units: set[int] = set()
    for run in text.split(","):
        ends = [int(end) for end in run.split("-")]
        if len(ends) > 2 or not 0 <= ends[0] <= ends[-1] < count:
            raise ValueError(f"{run} is no run of units 0 to {count - 1}")
        units.update(range(ends[0], ends[-1] + 1))
    return tuple(sorted(units))


def _plain(value: Any) -> Any:
    """What JSON does not know, as what it knows: NumPy's numbers and arrays, sets, paths."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, Iterable) else str(value)
