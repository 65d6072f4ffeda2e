"""The whole of a comparison: interrupted, killed, resumed, extended, and made again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffaccel.cost import processor
from diffaccel.eval import DataError, Estimate, ProtocolMismatch, Subject, Timing, compare, save_reference
from diffaccel.eval.compare import folder_name, write_report
from diffaccel.eval.cost_columns import COST_FILE, with_costs
from diffaccel.eval.reports.render import markdown
from diffaccel.eval.reports.report import read_report
from diffaccel.eval.reports.table import Table, table_to_dict
from diffaccel.eval.runs.generate import generate
from diffaccel.eval.runs.run import read_run
from diffaccel.eval.score import score
from tests.eval.noise_pipe import PROMPTS, NoisePipe, colours, make_run
from tests.eval.offline import _no_network  # noqa: F401

MEASURES = ["fd", "kd", "clip", "psnr", "ssim", "latent_mse", "clip_distance"]
QUICK = Timing(warmup=0, runs=2)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    save_reference(make_run(folder / "real", 50, num=40, seed=3).folder, colours(), folder / "real.safetensors")
    return folder / "real.safetensors"


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the memory is measured all garbage is collected, which of a test session takes half a second."""
    monkeypatch.setattr("gc.collect", lambda: 0)


def subjects(**steps: int) -> dict[str, Subject]:
    return {name: Subject(NoisePipe, {"num_inference_steps": n}) for name, n in steps.items()}


def compared(out: Path, rows: dict[str, Subject], reference: Path, **options: Any) -> Table:
    settings: dict[str, Any] = {"extractors": [colours()], "measures": MEASURES, "timing": QUICK, "progress": False}
    table = compare(rows, PROMPTS, out, reference=reference, **settings | options)
    assert table is not None
    return table


def contents(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.iterdir()) if file.is_file()}


def test_a_comparison_is_generated_scored_timed_and_written(tmp_path: Path, reference: Path) -> None:
    table = compared(tmp_path, subjects(base=8, fast=2), reference)
    keys = [column.key for column in table.columns]
    assert keys[:4] == ["fd[colours]", "delta:fd[colours]", "kd[colours]", "delta:kd[colours]"]
    assert {"psnr", "ssim", "latent_mse", "nfe", "p50", "p95", "throughput", "speedup", "macs"} <= set(keys)
    assert [row.values["nfe"] for row in table.rows] == [Estimate(8), Estimate(2)]
    assert table.rows[0].values["speedup"] == Estimate(1.0, n=2)
    assert {f"report.{kind}" for kind in ("md", "csv", "json", "tex", "html")} < contents(tmp_path).keys()
    assert {"pareto-p50-fd-colours.svg", "grid-random-0.png"} < contents(tmp_path).keys()
    (read,), manifest = read_report(tmp_path / "report.json")
    assert markdown(read) == markdown(table)
    assert manifest["jobs"]["fast"]["call"] == {"num_inference_steps": 2}
    assert (tmp_path / "report.md").read_text() == markdown(table)


def test_again_gives_the_same_files_and_times_nothing_anew(tmp_path: Path, reference: Path) -> None:
    rows = subjects(base=8, fast=2)
    compared(tmp_path, rows, reference)
    before = contents(tmp_path)
    loaded = []

    def counted() -> NoisePipe:
        loaded.append(NoisePipe())
        return loaded[-1]

    compared(tmp_path, {name: Subject(counted, s.call) for name, s in rows.items()}, reference)
    assert contents(tmp_path) == before
    assert sum(pipe.calls for pipe in loaded) == 0


def test_another_way_of_timing_is_timed_anew(tmp_path: Path, reference: Path) -> None:
    rows = subjects(base=8, fast=2)
    compared(tmp_path, rows, reference)
    table = compared(tmp_path, rows, reference, timing=Timing(batch=3, warmup=0, runs=1))
    assert table.manifest["protocol"]["timed_on"][0].endswith("batch 3")
    assert "batch 3" in table.rows[0].protocol_text


def test_a_row_is_added_later(tmp_path: Path, reference: Path) -> None:
    first = compared(tmp_path, subjects(base=8, fast=2), reference)
    costs = {name: (tmp_path / "runs" / name / COST_FILE).read_bytes() for name in ("base", "fast")}
    second = compared(tmp_path, subjects(base=8, fast=2, faster=1), reference)
    assert [row.name for row in second.rows] == ["base", "fast", "faster"]
    assert [row.values for row in second.rows[:2]] == [row.values for row in first.rows]
    assert costs == {name: (tmp_path / "runs" / name / COST_FILE).read_bytes() for name in ("base", "fast")}


def test_a_pipeline_that_fails_leaves_the_others_and_a_rerun_goes_on(tmp_path: Path, reference: Path) -> None:
    def broken() -> NoisePipe:
        pipe = NoisePipe()
        pipe.spoil = lambda pictures: pictures * float("nan")
        return pipe

    rows = subjects(base=8, fast=2, faster=1)
    with pytest.raises(DataError, match="finite"):
        compared(tmp_path, rows | {"fast": Subject(broken, rows["fast"].call)}, reference)
    images = tmp_path / "runs" / "base" / "images" / "00000"
    before = {file.name: file.stat().st_mtime_ns for file in images.iterdir()}
    assert not (tmp_path / "report.json").exists()
    assert len(compared(tmp_path, rows, reference).rows) == 3
    assert before == {file.name: file.stat().st_mtime_ns for file in images.iterdir()}


SCRIPT = """
import os, signal, sys
from pathlib import Path
import diffaccel.eval.reports.report as report
from tests.eval import test_compare

whole = report.save_text
def fragile(text, path):
    if path.name == "report.json":
        path.with_name(".report.json.part").write_text(text[: len(text) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    whole(text, path)

report.save_text = fragile
test_compare.compared(Path(sys.argv[1]), test_compare.subjects(base=8, fast=2), sys.argv[2])
"""


def test_killed_in_the_middle_of_the_report_and_run_again_it_is_the_same(tmp_path: Path, reference: Path) -> None:
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", SCRIPT, str(killed), str(reference)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert "report.csv" in contents(killed)
    assert not {"report.json", "report.html"} & contents(killed).keys()
    compared(killed, subjects(base=8, fast=2), reference)
    assert_as_uninterrupted(killed, tmp_path / "whole", reference)


@pytest.mark.parametrize(
    ("module", "name"), [("compare", "measure"), ("compare", "score"), ("reports.report", "save_picture")]
)
def test_interrupted_anywhere_and_run_again_it_is_the_same(
    tmp_path: Path, reference: Path, module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[f"diffaccel.eval.{module}"], name, interrupted)  # `ev.compare` is the function
        with pytest.raises(KeyboardInterrupt):
            compared(tmp_path / "stopped", subjects(base=8, fast=2), reference)
    compared(tmp_path / "stopped", subjects(base=8, fast=2), reference)
    assert_as_uninterrupted(tmp_path / "stopped", tmp_path / "whole", reference)


def assert_as_uninterrupted(out: Path, whole: Path, reference: Path) -> None:
    """The report is, to the byte, what it is in another folder made at one go with the same times."""
    rows = subjects(base=8, fast=2)
    for name, subject in rows.items():
        generate(NoisePipe(), PROMPTS, whole / "runs" / name, latents=True, progress=False, **subject.call)
        (whole / "runs" / name / COST_FILE).write_bytes((out / "runs" / name / COST_FILE).read_bytes())
    compared(whole, rows, reference)
    found = {name: text.replace(bytes(out), bytes(whole)) for name, text in contents(out).items()}
    assert {name: text for name, text in found.items() if name[0] != "."} == contents(whole)


def test_without_times_there_are_no_cost_columns(tmp_path: Path, reference: Path) -> None:
    table = compared(tmp_path, subjects(base=8, fast=2), reference, timing=None)
    assert not {"nfe", "p50", "speedup"} & {column.key for column in table.columns}
    assert "timed" not in table.rows[0].protocol_text
    assert not any(name.startswith("pareto") for name in contents(tmp_path))


def test_measures_without_numbers_are_not_drawn(tmp_path: Path, reference: Path) -> None:
    compared(tmp_path, subjects(base=8, fast=2), reference, measures=["fd", "lpips", "psnr"])
    assert "pareto-p50-lpips.svg" not in contents(tmp_path)
    assert "pareto-p50-fd-colours.svg" in contents(tmp_path)


def test_what_is_wrong_is_told_before_anything_is_generated(tmp_path: Path, reference: Path) -> None:
    def never() -> NoisePipe:
        raise AssertionError("loaded")

    rows = {"a": Subject(never), "b": Subject(never)}
    same = {"a b": Subject(never), "A-b": Subject(never)}
    save_reference(make_run(tmp_path / "run", 3).folder, colours("other"), tmp_path / "other.safetensors")
    bad: list[tuple[type[Exception], str, dict[str, Subject], dict[str, Any]]] = [
        (ValueError, "unknown measure fid", rows, {"measures": ["fid"]}),
        (ValueError, "unknown report format pdf; known are md", rows, {"formats": ["pdf"]}),
        (ValueError, "none was given", {}, {}),
        (ValueError, "two networks are called colours", rows, {"extractors": [colours(), colours()]}),
        (ValueError, "'a b' and 'A-b' would be kept in the same folder", same, {}),
        (DataError, "no reference", rows, {"reference": tmp_path / "nowhere"}),
        (DataError, "lpips: no LPIPS", rows, {"measures": ["lpips"], "strict": True}),
        (DataError, "fd needs a reference", rows, {"reference": None, "strict": True}),
        (ProtocolMismatch, "made with other", rows, {"reference": tmp_path / "other.safetensors", "strict": True}),
    ]
    for error, sentence, given, options in bad:
        with pytest.raises(error, match=sentence):
            compared(tmp_path / "out", given, **{"reference": reference, **options})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"warmup": -1}, {"runs": 0}])
def test_timing_that_cannot_be_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="timing needs a batch of 1 or more"):
        Timing(**wrong)


def test_another_job_in_the_folder_is_refused(tmp_path: Path, reference: Path) -> None:
    compared(tmp_path, subjects(base=8, fast=2), reference)
    with pytest.raises(ProtocolMismatch, match="another job"):
        compared(tmp_path, subjects(base=8, fast=2), reference, seed=1)


@pytest.mark.parametrize(
    ("name", "folder"),
    [("DDIM, 8 steps", "DDIM-8-steps"), ("../../etc", "etc"), ("😀", "run"), ("a/b\\c", "a-b-c"), (".x.", "x")],
)
def test_names_become_folders_that_every_system_has(name: str, folder: str) -> None:
    assert folder_name(name) == folder


def timed(tmp_path: Path, reference: Path) -> dict[str, Path]:
    compared(tmp_path, subjects(base=8, fast=2), reference)
    return {name: tmp_path / "runs" / name for name in ("base", "fast")}


def with_costs_of(folders: dict[str, Path]) -> Table:
    runs = {name: read_run(folder) for name, folder in folders.items()}
    scores = score(runs, extractors=[], measures=["psnr"], progress=False)
    return with_costs(scores, runs).table("", runs, {})


def test_the_speed_up_is_the_baseline_s_time_over_the_row_s(tmp_path: Path, reference: Path) -> None:
    folders = timed(tmp_path, reference)
    for name, seconds in (("base", 3.0), ("fast", 0.5)):
        record = json.loads((folders[name] / COST_FILE).read_text())
        record["cost"]["latency"]["median"] = seconds
        (folders[name] / COST_FILE).write_text(json.dumps(record))
    rows = with_costs_of(folders).rows
    assert [row.values["speedup"] for row in rows] == [Estimate(1.0, n=2), Estimate(6.0, n=2)]
    assert [row.values["p50"] for row in rows] == [Estimate(3000.0, n=2), Estimate(500.0, n=2)]


def test_a_run_that_was_not_timed_says_so(tmp_path: Path, reference: Path) -> None:
    folders = timed(tmp_path, reference)
    (folders["fast"] / COST_FILE).unlink()
    rows = with_costs_of(folders).rows
    assert rows[1].values["p50"] == rows[1].values["nfe"] == "not timed"
    (folders["base"] / COST_FILE).unlink()
    assert "p50" not in with_costs_of(folders).rows[0].values


def test_without_the_baseline_s_time_there_is_no_speed_up(tmp_path: Path, reference: Path) -> None:
    folders = timed(tmp_path, reference)
    (folders["base"] / COST_FILE).unlink()
    rows = with_costs_of(folders).rows
    assert isinstance(rows[1].values["p50"], Estimate)
    assert "speedup" not in rows[1].values


def test_times_of_two_machines_give_no_speed_up(tmp_path: Path, reference: Path) -> None:
    folders = timed(tmp_path, reference)
    record = json.loads((folders["fast"] / COST_FILE).read_text())
    record["cost"]["device"] = "cuda, NVIDIA H200"
    (folders["fast"] / COST_FILE).write_text(json.dumps(record))
    table = with_costs_of(folders)
    assert str(table.rows[1].values["speedup"]).startswith(f"timed on cuda, NVIDIA H200, batch 1 and {processor()}")
    assert len(table.manifest["protocol"]["timed_on"]) == 2


def test_a_damaged_record_of_costs_is_named(tmp_path: Path, reference: Path) -> None:
    folders = timed(tmp_path, reference)
    for text in ("{", "[]", '{"timing": 1, "cost": {}}'):
        (folders["fast"] / COST_FILE).write_text(text)
        with pytest.raises(DataError, match=r"cost\.json is damaged; delete it"):
            with_costs_of(folders)


def test_tables_of_two_protocols_share_a_report(tmp_path: Path) -> None:
    runs = {name: make_run(tmp_path / name, 3, seed=seed) for name, seed in [("a", 0), ("b", 0), ("c", 1)]}
    parts = [{"a": runs["a"], "b": runs["b"]}, {"c": runs["c"]}]
    scores = [score(part, extractors=[colours()], measures=["clip", "psnr"], progress=False) for part in parts]
    tables = [s.table(f"Table {i}", part, {}) for i, (s, part) in enumerate(zip(scores, parts, strict=True))]
    names = {path.name for path in write_report(tables, scores, runs, tmp_path / "out")}
    assert {"report-1.csv", "report-2.csv", "report.html", "grid-random-0.png", "grid-random-0-2.png"} <= names
    read, _ = read_report(tmp_path / "out" / "report.json")
    assert [table_to_dict(table)["rows"] for table in read] == [table_to_dict(table)["rows"] for table in tables]


def test_a_pipeline_without_latents_is_compared_by_its_pictures(tmp_path: Path, reference: Path) -> None:
    class Closed(NoisePipe):
        def __call__(self, prompt, num_inference_steps=2, generator=None, output_type="np"):  # type: ignore[override]
            return super().__call__(prompt, num_inference_steps, generator, output_type)

    rows = {name: Subject(Closed, {"num_inference_steps": n}) for name, n in [("base", 8), ("fast", 2)]}
    table = compared(tmp_path, rows, reference)
    assert "no latents were kept" in str(table.rows[1].values["latent_mse"])
