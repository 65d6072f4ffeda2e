"""`diffaccel eval ...` as it is typed: what it prints, what it returns, and one sentence for everything that is bad."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffaccel.cli import main
from diffaccel.eval import Moments, emoji_clip, extract, frechet, psnr, read_run
from diffaccel.eval.images import read_picture, to_floats
from diffaccel.eval.reports.report import read_report
from tests.eval.noise_pipe import NoisePipe, make_run
from tests.eval.offline import _no_network  # noqa: F401

COMMANDS = ("compare", "sweep", "fid", "generate", "features", "ref", "score", "report", "perf", "verify", "doctor")
NO_LPIPS = "--measures=fd,kd,cmmd,clip,ssim,psnr,latent_mse,clip_distance"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights but those of the package, wherever the tests run, and features of folders kept in a new place."""
    monkeypatch.setenv("DIFFACCEL_EVAL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temporary"))
    monkeypatch.setattr("diffaccel.eval.networks.weights._in_package", lambda packaged: [])


@pytest.fixture(autouse=True)
def _models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models `noise`, `noise-large`, ... of the tests."""

    def load(model: str, device: str | None = None, dtype: str | None = None) -> NoisePipe:
        pipe = NoisePipe(24 if model == "noise-large" else 16)
        spoilt = {"noise-nan": float("nan"), "noise-bright": 2.0, "noise-black": 0.0}
        if model in spoilt:
            pipe.spoil = lambda pictures: pictures * spoilt[model]
        return pipe

    monkeypatch.setattr("diffaccel.eval.runs.variant.load_pipeline", load)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n😀, \"quoted\"\n<script>alert('x')</script>\na, b; c|d\n", encoding="utf-8")
    return str(path)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit status, output, errors."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        status = main(["eval", *map(str, arguments)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out, captured.err

    return call


@pytest.fixture
def refused(run: Run) -> Callable[..., str]:
    """The sentence with which a command is refused, and its exit status."""

    def call(status: int, *arguments: Any) -> str:
        found, out, error = run(*arguments)
        assert (found, out) == (status, "")
        start = error.index("diffaccel: error: ")
        return error[start:].removeprefix("diffaccel: error: ").strip()

    return call


def folder_of(path: Path, count: int = 20, size: int = 16, seed: int = 0) -> Path:
    """A folder of pictures of coloured noise."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((size, size)).save(path / f"{i:03d}.png")
    return path


# The way of everybody


def test_compare_prints_the_table_and_writes_the_report(run: Run, prompts: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = ["noise,steps=8,name=slow", "noise,steps=2,name=fast <b>&_1"]
    options = ["--prompts", prompts, "--runs-timed", 2, "--warmup", 0, "--reference", "twemoji", NO_LPIPS]
    status, printed, errors = run("compare", *rows, "--out", out, *options)
    assert status == 0
    assert printed.startswith("### Comparison\n")
    assert "| slow " in printed
    assert printed.endswith("".join(f"{out}/report.{kind}\n" for kind in ("md", "csv", "json", "tex", "html")))
    assert "Loading" not in errors, "bars of Transformers"
    (table,), _ = read_report(out / "report.json")
    assert [row.name for row in table.rows] == ["slow", "fast <b>&_1"]
    page = (out / "report.html").read_text()
    assert "<script>alert" not in page
    assert "<b>&_1" not in page
    assert "a cat" in page


def test_score_of_the_runs_is_the_same_table(run: Run, prompts: str, tmp_path: Path) -> None:
    rows = ["noise,steps=8,name=slow", "noise,steps=2,name=fast"]
    options = ["--reference", "twemoji", NO_LPIPS]
    timing = ["--runs-timed", 1, "--warmup", 0]
    _, compared, _ = run("compare", *rows, "--out", tmp_path / "out", "--prompts", prompts, *options, *timing)
    folders = [tmp_path / "out" / "runs" / name for name in ("slow", "fast")]
    status, scored, _ = run("score", *options, *folders)
    assert status == 0
    lines = [line for line in compared.splitlines() if line.startswith(("|", "-"))]
    assert [line for line in scored.splitlines() if line.startswith(("|", "-"))] == lines


def test_report_of_a_report_and_of_runs(run: Run, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, steps).folder for name, steps in [("slow", 8), ("fast", 2)]]
    first, second = tmp_path / "first", tmp_path / "second"
    status, printed, _ = run("report", *runs, "--out", first, "--measures", "clip,psnr", "--formats", "json,md,html")
    assert status == 0
    assert {str(first / "report.json"), str(first / "report.md")} <= set(printed.split())
    status, printed, _ = run("report", first / "report.json", "--out", second, "--formats", "md,tex")
    assert (status, printed.split()) == (0, [str(second / "report.md"), str(second / "report.tex")])
    assert (second / "report.md").read_text() == (first / "report.md").read_text()


def test_runs_of_other_protocols_get_tables_of_their_own(run: Run, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"seed{seed}-{steps}", steps, seed=seed).folder for seed in (0, 1) for steps in (8, 2)]
    status, printed, _ = run("score", *runs, "--measures", "psnr,clip")
    assert status == 0
    titles = [line for line in printed.splitlines() if line.startswith("###")]
    assert len(set(titles)) == 2
    assert all(title.startswith("### Scores (protocol ") for title in titles)
    assert printed.count("| seed1-2 ") == 1
    status, printed, _ = run("report", *runs, "--measures", "psnr", "--out", tmp_path / "out")
    assert (tmp_path / "out" / "report-2.csv").exists()


def test_sweep_is_the_baseline_and_all_combinations(run: Run, prompts: str, tmp_path: Path) -> None:
    base = "emoji-sd,scheduler=EulerDiscreteScheduler,timesteps=[900,500,200],guidance_scale=2,name=base"
    arguments = ["--base", base, "--scheduler", "dpmpp_2m,schedule=karras", "--scheduler", "own"]
    arguments += ["--scheduler", "EulerDiscreteScheduler", "--steps", 1, 2, "--no-timing", "--out", tmp_path]
    status, printed, errors = emoji_sd(run, *arguments, "--prompts", prompts, "--measures", "psnr,ssim", "--num", 2)
    assert (status, printed[:25]) == (0, "### Schedulers and steps\n"), errors
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")][2:]
    schedulers = ("dpmpp_2m schedule=karras", "own", "EulerDiscreteScheduler")
    assert rows == ["base", *(f"{name}, {steps} steps" for name in schedulers for steps in (1, 2))]
    calls = [json.loads(file.read_text())["call"] for file in sorted(tmp_path.glob("runs/*/job.json"))]
    assert [call["guidance_scale"] for call in calls] == [2] * 7, "the baseline's guidance holds for all"
    assert "Loading" not in errors


def emoji_sd(run: Run, *arguments: Any) -> tuple[int, str, str]:
    """`sweep` with the pipeline of the package."""
    from diffaccel import sample

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffaccel.eval.runs.variant.load_pipeline", sample.load_pipeline)
        return run("sweep", *arguments)


def test_generate_verify_and_features(run: Run, prompts: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run("generate", "noise,steps=3", "--prompts", prompts, "--num", 6, "--out", out, "--latents")[0] == 0
    assert (read_run(out).seeds, len(read_run(out).paths)) == ((0, 0, 0, 0, 1, 1), 6)
    status, _, told = run("verify", out)
    assert (status, told) == (0, "1 run is whole and unchanged\n")
    status, _, told = run("features", out)
    assert (status, told.splitlines()[-1]) == (0, "emoji-clip-d91ce013-clip: features (6, 128)")
    picture = read_run(out).paths[2]
    picture.write_bytes(picture.read_bytes() + b" ")
    status, _, told = run("verify", out)
    assert (status, told) == (3, f"diffaccel: error: {picture} has changed\n")


def test_perf_is_json(run: Run, prompts: str) -> None:
    variants = ["noise,steps=3,name=a", "noise,steps=1,name=b"]
    status, printed, _ = run("perf", *variants, "--prompts", prompts, "--runs-timed", 1, "--warmup", 0)
    costs = json.loads(printed)
    assert (status, costs["a"]["nfe"], costs["b"]["nfe"]) == (0, 3, 1)


def test_doctor_says_what_is_missing_and_where_it_goes(run: Run) -> None:
    status, printed, _ = run("doctor")
    assert status == 0
    assert "ready    emoji-clip" in printed
    assert "missing  LPIPS\n" in printed
    assert "pt_inception-2015-12-05-6726825d.pth" in printed


def test_ctrl_c_is_130(run: Run, monkeypatch: pytest.MonkeyPatch, prompts: str, tmp_path: Path) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffaccel.eval.command.generate", interrupted)
    status, printed, told = run("generate", "noise,steps=3", "--prompts", prompts, "--out", tmp_path / "run")
    assert (status, printed, told) == (130, "", "diffaccel: interrupted\n")


def test_no_memory_for_one_picture_is_a_sentence(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, prompts: str, tmp_path: Path
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("diffaccel.eval.command.generate", full)
    assert refused(2, "generate", "noise", "--prompts", prompts, "--out", tmp_path / "run") == "CUDA out of memory"


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["eval", command, "--help"])
    assert left.value.code == 0
    assert f"usage: diffaccel eval {command}" in capsys.readouterr().out


def test_help_imports_nothing_that_is_heavy_beside_what_the_package_does() -> None:
    heavy = "('diffaccel.eval.command', 'torchmetrics', 'torchvision', 'open_clip', 'scipy', 'matplotlib', 'cleanfid')"
    script = (
        "import sys, diffaccel; before = set(sys.modules)\n"
        "from diffaccel.cli import main\n"
        "try: main(['eval', '--help'])\n"
        "except SystemExit: pass\n"
        f"print([name for name in {heavy} if name in sys.modules and name not in before], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "compare" in done.stdout
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "arguments",
    [[], ["foo"], ["compare", "a"], ["sweep"], ["ref", "x"], ["score"], ["fid", "a", "b", "--alpha", "red"]],
)
def test_usage_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["eval", *arguments])
    assert left.value.code == 2
    assert "usage: diffaccel eval" in capsys.readouterr().err


# Bad input (the table of the design: every row once)


def test_all_damaged_pictures_are_told_at_once(refused: Callable[..., str], tmp_path: Path) -> None:
    good, bad = folder_of(tmp_path / "good"), folder_of(tmp_path / "bad")
    data = (bad / "003.png").read_bytes()
    (bad / "003.png").write_bytes(data[: len(data) // 2])
    (bad / "007.png").write_bytes(b"")
    (bad / "011.png").write_text("<html>404</html>")
    for arguments in (("fid", bad, good), ("fid", good, bad)):
        told = refused(3, *arguments, "--network", "emoji-clip")
        assert told.startswith("3 of 20 pictures cannot be used:")
        assert all(name in told for name in ("003.png", "007.png", "011.png"))
    for command in (("ref", bad, "--out", tmp_path / "ref.safetensors"), ("features", bad)):
        assert "3 of 20 pictures cannot be used" in refused(3, *command, "--network", "emoji-clip")
    assert not (tmp_path / "ref.safetensors").exists()
    told = refused(3, "fid", bad, good, "--network", "emoji-clip", "--skip-bad")
    assert "3 of 20 pictures cannot be used, more than the 1% that may be skipped" in told
    run = make_run(tmp_path / "run", 3).folder
    told = refused(3, "score", run, "--reference", bad, "--measures", "fd")
    assert "3 of 20 pictures" in told


def test_one_in_a_hundred_may_be_left_out_and_is_counted(run: Run, tmp_path: Path) -> None:
    good, bad = folder_of(tmp_path / "good", 100), folder_of(tmp_path / "bad", 100, seed=1)
    (bad / "050.png").write_bytes(b"")
    for a, b in ((bad, good), (good, bad)):
        status, printed, _ = run("fid", a, b, "--network", "emoji-clip", "--skip-bad", "--json")
        found = json.loads(printed)
        assert (status, sorted((found["n"], found["m"])), found["skipped"]) == (0, [99, 100], 1)
    out = tmp_path / "ref.safetensors"
    status, _, told = run("ref", bad, "--network", "emoji-clip", "--skip-bad", "--out", out)
    assert (status, "99 pictures of bad" in told) == (0, True)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [("noise-nan", "pictures must be finite"), ("noise-bright", "pictures must lie in [0, 1]")],
)
def test_pictures_that_are_none_stop_the_generation(
    refused: Callable[..., str], prompts: str, tmp_path: Path, model: str, sentence: str
) -> None:
    told = refused(3, "generate", f"{model},steps=3", "--prompts", prompts, "--out", tmp_path / "run")
    assert told.startswith("NoisePipe with SimpleNamespace: ")
    assert sentence in told


def test_black_and_repeated_pictures_are_told_below_the_table(run: Run, prompts: str, tmp_path: Path) -> None:
    assert run("generate", "noise-black,steps=3", "--prompts", prompts, "--out", tmp_path / "run")[0] == 0
    status, printed, _ = run("score", tmp_path / "run", "--measures", "clip")
    assert status == 0
    assert "4 of 4 pictures are of one colour" in printed
    assert "3 of 4 pictures repeat another one" in printed


def test_sixteen_bits_transparency_and_orientation(run: Run, refused: Callable[..., str], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    plain, deep, clear = (tmp_path / name for name in ("plain", "deep", "clear"))
    for folder in (plain, deep, clear):
        folder.mkdir()
    for i in range(10):
        grey = np.kron(rng.integers(0, 256, (4, 4), dtype=np.uint8), np.ones((4, 4), np.uint8))
        Image.fromarray(grey).save(plain / f"{i}.png")
        Image.fromarray(grey.astype(np.uint16) * 257).save(deep / f"{i}.png")
        alpha = np.full_like(grey, 255) if i else np.zeros_like(grey)
        Image.fromarray(np.dstack([grey, grey, grey, alpha])).save(clear / f"{i}.png")
    network = ("--network", "emoji-clip")
    status, printed, _ = run("fid", deep, plain, *network)
    assert (status, printed.splitlines()[0]) == (0, "FD[emoji-clip] 0.0000"), "scaled, not clipped to white"
    told = refused(3, "fid", clear, plain, *network)
    assert "0.png: has transparency; say what lies behind it" in told
    white, black = (
        json.loads(run("fid", clear, plain, *network, "--json", "--alpha", ground)[1])["frechet"]["value"]
        for ground in ("white", "black")
    )
    assert min(white, black) > 0
    assert white != black


def test_mixed_sizes_have_an_fid_and_no_paired_measure(run: Run, prompts: str, tmp_path: Path) -> None:
    mixed = folder_of(tmp_path / "mixed", 10)
    shutil.copytree(folder_of(tmp_path / "large", 10, size=40), mixed / "large")
    assert run("fid", mixed, folder_of(tmp_path / "good"), "--network", "emoji-clip")[0] == 0
    rows = ["noise,steps=8", "noise-large,steps=8"]
    options = ["--prompts", prompts, "--no-timing", "--measures", "psnr,clip", "--out", tmp_path / "out"]
    status, printed, _ = run("compare", *rows, *options)
    assert status == 0
    assert "several sizes (16 x 16, 24 x 24); paired measures need one" in printed
    folders = [tmp_path / "out" / "runs" / name for name in ("noise-8-steps", "noise-large-8-steps")]
    assert run("score", *folders, "--measures", "psnr", "--strict")[0] == 3


def test_one_picture_is_too_few_and_few_are_flagged(run: Run, refused: Callable[..., str], tmp_path: Path) -> None:
    one, few = folder_of(tmp_path / "one", 1), folder_of(tmp_path / "few", 5)
    for arguments in ((one, few), (few, one)):
        told = refused(3, "fid", *arguments, "--network", "emoji-clip")
        assert told == "a Frechet distance needs at least 2 pictures on each side, and there is 1"
    told = refused(3, "ref", one, "--network", "emoji-clip", "--out", tmp_path / "ref.safetensors")
    assert "at least 2 pictures" in told
    status, printed, _ = run("fid", few, folder_of(tmp_path / "other", 5, seed=1), "--network", "emoji-clip")
    assert (status, printed.splitlines()[-1]) == (
        0,
        "a side has no more pictures than there are features: too few for a number to publish",
    )


def test_rows_of_different_numbers_of_pictures_share_no_table(run: Run, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"n{num}", 3, num=num).folder for num in (20, 30)]
    status, printed, _ = run("score", *runs, "--reference", "twemoji", "--measures", "fd")
    assert (status, printed.count("### Scores (protocol ")) == (0, 2)
    assert "20 pictures of 20 prompts" in printed
    assert "30 pictures of 30 prompts" in printed


def test_identical_pictures_are_told_as_that(run: Run, prompts: str, tmp_path: Path) -> None:
    a = folder_of(tmp_path / "a", 130)
    shutil.copytree(a, tmp_path / "b")
    status, printed, _ = run("fid", a, tmp_path / "b", "--network", "emoji-clip")
    assert (status, printed.splitlines()[0]) == (0, "FD[emoji-clip] 0.0000")
    found = json.loads(run("fid", a, tmp_path / "b", "--network", "emoji-clip", "--json")[1])
    assert abs(found["frechet"]["value"]) < 1e-10
    rows = ["noise,steps=8,name=a", "noise,steps=8,name=b"]
    options = ["--prompts", prompts, "--no-timing", "--measures", "psnr", "--out", tmp_path / "out"]
    assert "| identical" in run("compare", *rows, *options)[1].replace("|   ", "| ").replace("  ", "")


def test_other_prompts_are_never_paired(run: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name} 1\n{name} 2\n")
        out = tmp_path / f"run-{name}"
        assert run("generate", "noise,steps=3", "--prompts", tmp_path / f"{name}.txt", "--out", out)[0] == 0
    status, printed, _ = run("score", tmp_path / "run-a", tmp_path / "run-b", "--measures", "psnr,clip")
    assert status == 0
    assert "PSNR" not in printed
    assert printed.count("### ") == 2


def test_long_captions_are_cut_with_their_end_and_counted(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("word " * 200 + "red heart\nblue book\n")
    assert run("generate", "noise,steps=3", "--prompts", path, "--out", tmp_path / "run")[0] == 0
    status, printed, errors = run("score", tmp_path / "run", "--measures", "clip")
    assert status == 0
    assert "emoji-clip: 1 of 2 captions are longer than" in printed
    assert "UserWarning" not in errors


# More bad input: the sentence and the exit status


@pytest.mark.parametrize(
    ("status", "arguments", "sentence"),
    [
        (4, ["fid", "{a}", "{b}"], "the weights pt_inception-2015-12-05-6726825d.pth are not on this machine"),
        (4, ["score", "{run}", "--network", "clip:{a}"], "lacks"),
        (4, ["score", "{run}", "{two}", "--measures", "lpips", "--strict"], "the weights alexnet"),
        (3, ["fid", "{a}", "{tmp}/nowhere", "--network", "emoji-clip"], "no reference"),
        (3, ["fid", "{tmp}/nowhere", "{a}", "--network", "emoji-clip"], "is not a folder"),
        (3, ["fid", "{empty}", "{a}", "--network", "emoji-clip"], "no pictures in"),
        (3, ["score", "{a}"], "is no run: it has no job.json"),
        (3, ["report", "{tmp}/broken.json"], "broken.json is no report, or damaged"),
        (3, ["report", "{tmp}/half.json"], "half.json is damaged ('tables')"),
        (2, ["report", "{tmp}/other.json"], "is no report of this version"),
        (3, ["fid", "{a}", "{npz}", "--network", "emoji-clip"], "write s.npz:50000"),
        (3, ["score", "{run}", "--measures", "fd", "--strict"], "fd needs a reference"),
        (3, ["score", "{run}", "--reference", "{prompts}", "--measures", "fd"], "is no reference, or damaged"),
        (5, ["score", "{run}", "--reference", "{other}", "--measures", "fd", "--strict"], "made with another-clean"),
        (5, ["fid", "{a}", "{other}", "--network", "emoji-clip"], "made with another-clean"),
        (5, ["fid", "{a}", "{npz}:5000", "--network", "emoji-clip"], "is of 3 features, and emoji-clip has 128"),
        (5, ["generate", "noise,steps=4", "--prompts", "{prompts}", "--out", "{run}"], "begun with another job"),
        (3, ["generate", "noise,steps=4", "--prompts", "{tmp}/no.txt", "--out", "{tmp}/x"], "cannot be read"),
        (2, ["generate", "noise,steps=4", "--out", "{tmp}/x"], "give --prompts"),
        (2, ["generate", "noise,steps=4", "--prompts", "{prompts}", "--num", "0", "--out", "{tmp}/x"], "at least 1"),
        (2, ["generate", "noise,steps", "--prompts", "{prompts}", "--out", "{tmp}/x"], "write MODEL,key=value"),
        (2, ["generate", "noise,wrong=1", "--prompts", "{prompts}", "--out", "{tmp}/x"], "no argument wrong"),
        (2, ["compare", "noise,steps=4", "noise,steps=4", "--prompts", "{prompts}"], "2 rows are called 'noise 4"),
        (2, ["perf", "noise,steps=4", "noise,steps=4", "--prompts", "{prompts}"], "2 rows are called"),
        (
            2,
            ["compare", "noise", "noise,steps=4", "--prompts", "{prompts}", "--measures", "fid"],
            "unknown measure fid",
        ),
        (
            2,
            ["compare", "noise", "noise,steps=4", "--prompts", "{prompts}", "--formats", "pdf"],
            "unknown report format",
        ),
        (2, ["compare", "noise", "noise,steps=4", "--prompts", "{prompts}", "--runs-timed", "0"], "timing needs"),
        (2, ["score", "{run}", "--network", "resnet"], "unknown network 'resnet'; there are emoji-clip"),
        (2, ["score", "{run}", "--weights", "inceptoin=x"], "no weights are called 'inceptoin'"),
        (2, ["score", "{run}", "--device", "tpu9"], "there is no device 'tpu9'"),
        (2, ["score", "{run}", "--device", "cuda"], "there is no CUDA device here"),
        (2, ["generate", "noise", "--prompts", "{prompts}", "--out", "{tmp}/x", "--device", "cuda"], "no CUDA device"),
        (2, ["score", "{run}", "{tmp}/elsewhere/run"], "two of these are called run"),
        (2, ["ref", "{a}", "--network", "emoji-clip", "--out", "{tmp}/ref.npz"], "a reference is a .safetensors file"),
        (
            2,
            ["sweep", "--base", "noise,steps=4", "--scheduler", "foo", "--prompts", "{prompts}"],
            "unknown solver 'foo'",
        ),
    ],
)
def test_bad_input_is_one_sentence(
    refused: Callable[..., str],
    prompts: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    arguments: list[str],
    sentence: str,
) -> None:
    from diffaccel.eval import save_reference
    from tests.eval.noise_pipe import colours

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    a = folder_of(tmp_path / "a", 5)
    (tmp_path / "empty").mkdir()
    folder = make_run(tmp_path / "run", 3).folder
    two = make_run(tmp_path / "two", 2).folder
    shutil.copytree(folder, tmp_path / "elsewhere" / "run")
    save_reference(a, colours("another"), tmp_path / "other.safetensors")
    np.savez(tmp_path / "s.npz", mu=np.zeros(3), sigma=np.eye(3))
    for name, text in [("broken", "{"), ("half", '{"diffaccel_report": 1}'), ("other", '{"a": 1}')]:
        (tmp_path / f"{name}.json").write_text(text)
    places = {"a": a, "b": a, "run": folder, "two": two, "tmp": tmp_path, "prompts": prompts}
    places |= {"empty": tmp_path / "empty", "other": tmp_path / "other.safetensors", "npz": tmp_path / "s.npz"}
    told = refused(status, *(argument.format(**places) for argument in arguments))
    if sentence == "made with another-clean":
        sentence = "was made with another-clean, and the pictures are seen by emoji-clip"
    assert sentence in told


def test_fid_against_moments(run: Run, tmp_path: Path) -> None:
    a, b = folder_of(tmp_path / "a", 30), folder_of(tmp_path / "b", 150, seed=1)
    x, y = (extract(folder, emoji_clip(), progress=False)["features"] for folder in (a, b))
    moments = Moments.of(y)
    np.savez(tmp_path / "b.npz", mu=moments.mean, sigma=moments.covariance())
    status, printed, _ = run("fid", a, f"{tmp_path / 'b.npz'}:150", "--network", "emoji-clip", "--json")
    found = json.loads(printed)
    assert (status, found["n"], found["m"], found["kernel"]) == (0, 30, 150, None)
    assert found["frechet"]["value"] == pytest.approx(frechet(x, y), rel=1e-9)
    assert "KD" not in run("fid", a, f"{tmp_path / 'b.npz'}:150", "--network", "emoji-clip")[1]
    assert run("fid", a, tmp_path / "b.npz", "--network", "emoji-clip")[0] == 3


def test_score_by_hand(run: Run, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, steps, num=8) for name, steps in [("slow", 8), ("fast", 2)]]
    _, printed, _ = run("score", *(r.folder for r in runs), "--measures", "psnr")
    a, b = (to_floats(torch.stack([read_picture(path) for path in r.paths])) for r in runs)
    assert f"{np.median(psnr(a, b).numpy()):.2f} ±" in printed
