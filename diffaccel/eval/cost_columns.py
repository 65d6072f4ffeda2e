"""Costs of pipelines: the record of each in its run, and the columns of the table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffaccel.eval.errors import DataError
from diffaccel.eval.perf import Cost
from diffaccel.eval.reports.table import Column, Value
from diffaccel.eval.runs.run import Run
from diffaccel.eval.score import Scores
from diffaccel.eval.statistics.jackknife import Estimate

COST_FILE = "cost.json"
MEGA, GIGA = 1e6, 1e9
COLUMNS = {
    "nfe": Column("nfe", "NFE", "", "lower", 0),
    "p50": Column("p50", "p50", "ms", "lower", 1),
    "p95": Column("p95", "p95", "ms", "lower", 1),
    "throughput": Column("throughput", "pictures/s", "", "higher", 2),
    "speedup": Column("speedup", "speed-up", "", "higher", 2),
    "memory": Column("memory", "peak memory", "MB", "lower", 0),
    "macs": Column("macs", "GMACs/picture", "", "lower", 2),
    "parameters": Column("parameters", "parameters", "M", "lower", 2),
    "energy": Column("energy", "energy/picture", "J", "lower", 2),
}


def with_costs(scores: Scores, runs: Mapping[str, Run]) -> Scores:
    """The scores with cost columns, of runs that have been timed; without columns that have no number in any row.

    Raises:
        DataError: if a record of costs is damaged.
    """
    costs = {name: _kept_cost(run) for name, run in runs.items()}
    timed = [cost for cost in costs.values() if cost is not None]
    baseline = costs[next(iter(runs))]
    rows = {name: cost_values(cost, baseline) for name, cost in costs.items()}
    for key, column in COLUMNS.items():
        if any(isinstance(row[key], Estimate) for row in rows.values()):
            for name, row in rows.items():
                scores.put(name, column, row[key])
    if timed:
        scores.protocol["timed_on"] = sorted({f"{cost.device}, {cost.dtype}, batch {cost.pictures}" for cost in timed})
        if any(cost.memory.allocated is None for cost in timed):
            scores.footnotes.append("Peak memory is that of the whole process, Python and its libraries included.")
    return scores


def cost_values(cost: Cost | None, baseline: Cost | None) -> dict[str, Value]:
    """Values of `COLUMNS` for one row; None stands for a run that was not timed.

    Speed-up is the baseline's median latency over this one's, where both were timed on the same device with the same
    batch. Memory is what CUDA allocated where there is CUDA, else the whole process's, interpreter included.
    """
    if cost is None:
        return dict.fromkeys(COLUMNS, "not timed")
    peak = cost.memory.allocated if cost.memory.allocated is not None else cost.memory.resident
    return {
        "nfe": Estimate(cost.nfe),
        "p50": Estimate(1000 * cost.latency.median, n=cost.latency.runs),
        "p95": Estimate(1000 * cost.latency.p95, n=cost.latency.runs),
        "throughput": Estimate(cost.throughput, n=cost.latency.runs),
        "speedup": _speedup(cost, baseline),
        "memory": "this machine does not tell" if peak is None else Estimate(peak / MEGA),
        "macs": Estimate(cost.macs / GIGA),
        "parameters": Estimate(cost.parameters / MEGA),
        "energy": cost.energy_source if cost.energy is None else Estimate(cost.energy),
    }


def _speedup(cost: Cost, baseline: Cost | None) -> Value:
    if baseline is None:
        return "the baseline was not timed"
    if (cost.device, cost.pictures) != (baseline.device, baseline.pictures):
        where = " and ".join(f"{c.device}, batch {c.pictures}" for c in (cost, baseline))
        return f"timed on {where} (the baseline)"
    return Estimate(baseline.latency.median / cost.latency.median, n=cost.latency.runs)


def cost_record(file: Path) -> dict[str, Any]:
    """`timing`, how it was measured, and `cost`, in JSON form."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        Cost.from_json(record["cost"])
        return {"timing": record["timing"], "cost": record["cost"]}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{file} is damaged; delete it, and compare times the pipeline again") from None


def _kept_cost(run: Run) -> Cost | None:
    file = run.folder / COST_FILE
    return Cost.from_json(cost_record(file)["cost"]) if file.exists() else None
