"""The whole thing: pictures of each pipeline with the same noise, their scores and costs, and the report."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffaccel.eval.cost_columns import COST_FILE, cost_record, with_costs
from diffaccel.eval.errors import ProtocolMismatch
from diffaccel.eval.measure_names import DEFAULT, PictureMeasure, check_inputs, check_measures, check_networks
from diffaccel.eval.networks.extractor import Extractor
from diffaccel.eval.perf import measure
from diffaccel.eval.reports.grids import Grid, random_grid, worst_grid
from diffaccel.eval.reports.plots import Plot, histogram_plot, pareto_plot
from diffaccel.eval.reports.report import FORMATS, save_report
from diffaccel.eval.reports.table import Table
from diffaccel.eval.runs.features import extract
from diffaccel.eval.runs.generate import can_keep_latents, generate
from diffaccel.eval.runs.manifest import environment
from diffaccel.eval.runs.prompts import Prompt
from diffaccel.eval.runs.reference_set import load_reference
from diffaccel.eval.runs.run import Run, read_run
from diffaccel.eval.runs.shards import is_first_process
from diffaccel.eval.score import Scores, score
from diffaccel.eval.statistics.jackknife import Estimate
from diffaccel.pictures import save_text

PARETO = ("fd[", "lpips", "clip_distance")  # quality columns that are drawn against latency
PICTURE_MEASURES = ("lpips", "clip_distance", "psnr")  # what the worst cases are chosen by: the first there is


@dataclass(frozen=True)
class Subject:
    """A pipeline that takes part, and how it is called.

    Finished pictures are found again by weights, configs, scheduler, call and the names of hooks, attention processors
    and the like. A hook whose settings alone have changed is not seen: give the row another name then.

    Attributes:
        load: gives the pipeline; called when it is needed, so that not all of them are in memory.
        call: its arguments beside the prompt.
    """

    load: Callable[[], Any]
    call: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """How costs are measured: `warmup` calls, then `runs` that are timed, of `batch` pictures each."""

    batch: int = 1
    warmup: int = 2
    runs: int = 20

    def __post_init__(self) -> None:
        if self.batch < 1 or self.warmup < 0 or self.runs < 1:
            values = f"{self.batch}, {self.warmup} and {self.runs}"
            raise ValueError(
                f"timing needs a batch of 1 or more, a warm-up of 0 or more and 1 run or more, not {values}"
            )


def compare(
    subjects: Mapping[str, Subject],
    prompts: Sequence[Prompt],
    out: str | os.PathLike[str],
    *,
    extractors: Sequence[Extractor],
    num: int | None = None,
    seed: int = 0,
    batch: int = 16,
    measures: Sequence[str] = DEFAULT,
    reference: str | os.PathLike[str] | None = None,
    lpips: PictureMeasure | str = "no LPIPS weights were given",
    strict: bool = False,
    timing: Timing | None = Timing(),
    formats: Sequence[str] = FORMATS,
    title: str = "Comparison",
    progress: bool = True,
) -> Table | None:
    """Generate, score and time pipelines, the first of which is the baseline, and write the report into `out`.

    Everything that was finished before is kept, so that an interrupted comparison goes on and another row can be added
    later. With `accelerate launch`, processes share pictures and features; the first one times and writes.

    Args:
        subjects: row name -> pipeline.
        prompts: see `read_prompts`.
        out: folder: `runs/NAME` for each subject, `report.*`.
        extractors: feature networks.
        num: pictures, see `generate`.
        seed: see `generate`.
        batch: pictures a call while generating.
        measures: see `score`.
        reference: see `load_reference`.
        lpips: see `score`.
        strict: see `score`.
        timing: how costs are measured; None leaves them out.
        formats: of the report.
        title: of the table.
        progress: show progress bars.

    Returns:
        The table; None in all processes but the first.

    Raises:
        ValueError: if there are no subjects, two have the same folder, two networks one name, or a measure or format
            is not known.
        DataError, ProtocolMismatch: see `generate` and `score`.
    """
    out, folders = Path(out), {name: folder_name(name) for name in subjects}
    _check(folders, measures, formats)
    check_networks(extractors)
    if strict:
        check_inputs(extractors, measures, reference, lpips)
    if reference is not None:  # what is wrong with it is told before hours of generation
        for extractor in extractors:
            with nullcontext() if strict else suppress(ProtocolMismatch):  # which becomes a reason in the table
                load_reference(reference, extractor, progress=progress)
    settings: dict[str, Any] = {"num": num, "seed": seed, "batch": batch, "progress": progress}
    for name, subject in subjects.items():
        pipe = subject.load()
        run = out / "runs" / folders[name]
        generate(pipe, prompts, run, latents=can_keep_latents(pipe), **settings, **subject.call)
    runs = {name: read_run(out / "runs" / folder) for name, folder in folders.items()}
    for extractor in extractors:  # all processes, each its share
        for run in runs.values():
            extract(run.folder, extractor, progress=progress)
    if not is_first_process():
        return None
    scored: dict[str, Any] = {"extractors": extractors, "measures": measures, "reference": reference}
    scores = score(runs, **scored, lpips=lpips, strict=strict, progress=False)
    if timing is not None:
        _measure_costs(subjects, runs, prompts, timing)
    table = with_costs(scores, runs).table(title, runs, {"environment": environment()})
    write_report([table], [scores], runs, out, formats)
    return table


def _check(folders: Mapping[str, str], measures: Sequence[str], formats: Sequence[str]) -> None:
    """Raise ValueError for what would else be found out at the end."""
    if not folders:
        raise ValueError("compare needs pipelines, and none was given")
    by_folder: dict[str, str] = {}
    for name, folder in folders.items():
        other = by_folder.setdefault(folder.lower(), name)  # some file systems do not tell A from a
        if other != name:
            raise ValueError(f"{other!r} and {name!r} would be kept in the same folder, {folder}; rename one of them")
    check_measures(measures)
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"unknown report format {', '.join(unknown)}; known are {', '.join(FORMATS)}")


def write_report(
    tables: Sequence[Table],
    scores: Sequence[Scores],
    runs: Mapping[str, Run],
    out: str | os.PathLike[str],
    formats: Sequence[str] = FORMATS,
) -> list[Path]:
    """Tables with their Pareto plots, histograms and picture grids, written into `out`."""
    plots: list[Plot] = []
    grids: list[Grid] = []
    for table, found in zip(tables, scores, strict=True):
        members = {row.name: runs[row.name] for row in table.rows}
        plots += _plots(table, found)
        grids += _grids(found, members)
    jobs = {name: run.job for name, run in runs.items()}
    return save_report(
        tables, out, formats, plots=plots, grids=grids, manifest={"environment": environment(), "jobs": jobs}
    )


def _plots(table: Table, scores: Scores) -> list[Plot]:
    """Quality against latency or, where nothing was timed, nothing; and the worst-case measure picture by picture."""
    measured = {key for row in table.rows for key, value in row.values.items() if isinstance(value, Estimate)}
    quality = [c.key for c in table.columns if c.key.startswith(PARETO) and c.key in measured]
    plots = [pareto_plot(table, "p50", key) for key in quality] if "p50" in measured else []
    key = _picture_measure(scores)
    return plots + ([histogram_plot(_lists(scores, key), scores.columns[key])] if key else [])


def _grids(scores: Scores, runs: Mapping[str, Run]) -> list[Grid]:
    files = {name: run.paths for name, run in runs.items()}
    prompts = next(iter(runs.values())).prompts
    grids, key = [random_grid(files, prompts)], _picture_measure(scores)
    return grids + ([worst_grid(files, prompts, _lists(scores, key), scores.columns[key])] if key else [])


def _lists(scores: Scores, key: str) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in scores.per_picture[key].items()}


def _picture_measure(scores: Scores) -> str | None:
    """What the worst pictures are chosen by."""
    keys = [key for wanted in PICTURE_MEASURES for key in scores.per_picture if key.startswith(wanted)]
    return keys[0] if keys else None


def folder_name(name: str) -> str:
    """A row's name as a folder's."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"


def _measure_costs(
    subjects: Mapping[str, Subject], runs: Mapping[str, Run], prompts: Sequence[Prompt], timing: Timing
) -> None:
    """Time each subject; what was timed before, in the same way, is kept: a report that is made again is the same."""
    options: dict[str, Any] = asdict(timing)
    for name, subject in subjects.items():
        file = runs[name].folder / COST_FILE
        if not file.exists() or cost_record(file)["timing"] != options:
            cost = measure(subject.load(), prompts, **options, **subject.call)
            save_text(json.dumps({"timing": options, "cost": cost.to_json()}, indent=1), file)
