"""What the rows of a table must have in common, and how it is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffaccel.eval.networks.extractor import Extractor
from diffaccel.eval.runs.run import Run

KEYS = ("prompts", "num", "seed", "seed_rule")


def comparable(runs: Mapping[str, Run]) -> list[dict[str, Run]]:
    """Runs in groups of the same prompts, number of pictures, seeds and seed rule; only these share a table."""
    groups: dict[tuple[Any, ...], dict[str, Run]] = {}
    for name, run in runs.items():
        key = tuple(run.job[k] for k in KEYS)
        groups.setdefault(key, {})[name] = run
    return list(groups.values())


def protocol_of(baseline: Run, extractors: Sequence[Extractor]) -> dict[str, Any]:
    """Prompts, seeds, number of pictures, baseline and networks; `score` adds references."""
    return {
        **{key: baseline.job[key] for key in KEYS},
        "distinct_prompts": len(set(baseline.ids)),
        "baseline": baseline.digest,
        "extractors": {e.id: {"weights": e.weights, "resize": e.protocol, "size": e.size} for e in extractors},
    }


def protocol_text(protocol: Mapping[str, Any]) -> str:
    """The protocol in a line or two, for the foot of a table."""
    first, prompts = protocol["seed"], protocol["distinct_prompts"]
    last = first + -(-protocol["num"] // prompts) - 1
    parts = [
        f"{protocol['num']} pictures of {prompts} prompt{'s' * (prompts > 1)} ({protocol['prompts'][:8]}), "
        f"{f'seeds {first} to {last}' if last > first else f'seed {first}'}, the same noise in every row"
    ]
    for name, values in protocol["extractors"].items():
        parts.append(f"{name}: resize {values['resize']}, reference {values.get('reference', 'none')}")
    parts += [f"LPIPS: {protocol['lpips']}"] if "lpips" in protocol else []
    if "timed_on" in protocol:
        parts.append(f"timed on {'; '.join(protocol['timed_on'])}")
    return "; ".join(parts)
