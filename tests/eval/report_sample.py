"""A small report with everything that must be escaped; `python -m tests.eval.report_sample` writes the golden files."""

from __future__ import annotations

import math
import re
from pathlib import Path

from PIL import Image

from diffaccel.eval.reports.grids import Grid
from diffaccel.eval.reports.html import html_report
from diffaccel.eval.reports.plots import histogram_plot, pareto_plot
from diffaccel.eval.reports.render import csv_text, latex, markdown
from diffaccel.eval.reports.table import Column, Row, Table, delta_column
from diffaccel.eval.statistics.jackknife import Estimate

GOLDEN = Path(__file__).with_name("golden")
FD = Column("fd", "FD[emoji-clip]", "", "lower", 3)
PSNR = Column("psnr", "PSNR", "dB", "higher", 2)
P50 = Column("p50", "p50", "ms", "lower", 1)
FID = Column("fid", "FID", "", "lower", 2)
PROMPT = "<script>alert('_&%')</script> \"cat\""
NASTY = r"50% & #1_a ~{x}^2$ <b> \cmd *[i]* a|b"


def sample_table() -> Table:
    """Three rows: a baseline, one that is as good, one that is worse; FID is missing everywhere."""
    missing = "no weights in /a_b & c"
    values = [
        {"fd": Estimate(0.4, 0.011, 5000, 0.38), "psnr": Estimate(math.inf), "p50": Estimate(1145.04, 1.5, 30)},
        {"fd": Estimate(0.41, 0.012, 5000, 0.39), "delta:fd": Estimate(0.01, 0.006), "p50": Estimate(216.84, 1.25, 30)},
        {"fd": Estimate(0.3, 0.01, 5000, 0.28), "delta:fd": Estimate(-0.1, 0.02), "p50": "not timed"},
    ]
    values[1]["psnr"], values[2]["psnr"] = Estimate(35.094, 0.4), Estimate(-0.0001, 0.1)
    names, notes = ("dpmpp_2m, 50 steps", "er_ode_1, 8 steps", NASTY), ((), (), ("x_0 < 1 --fast",))
    rows = tuple(
        Row(name, v | {"fid": missing}, "3fa9c1d277aa", "N = 5000, 100% of emoji_prompts", f"runs/{i}", note)
        for i, (name, v, note) in enumerate(zip(names, values, notes, strict=True))
    )
    columns = (FD, delta_column(FD), PSNR, P50, FID)
    return Table("emoji-sd & steps_1", columns, rows, ("Footnote with 5% & <i>.",), {"prompts": [PROMPT], "seed": 0})


def sample_page() -> str:
    """The page of the sample, with plots and a grid of one grey picture."""
    table = sample_table()
    plots = [pareto_plot(table, "p50", "fd"), histogram_plot({NASTY: [1.0, 2.0, math.inf]}, PSNR)]
    grid = Grid("grid-random-0", "1 of 1 pictures", Image.new("RGB", (4, 4), "grey"), (f"0: {PROMPT}",))
    return html_report("Report <1>", [table], plots, [grid], {"weights": {"unet": "77<31"}})


def goldens() -> dict[str, str]:
    """File name -> text; pictures are left out, since their bytes depend on Pillow's zlib."""
    table = sample_table()
    page = re.sub(r"(data:image/png;base64,)[^\"]+", r"\1PICTURE", sample_page())
    return {
        "report.md": markdown(table),
        "report.csv": csv_text(table),
        "report.tex": latex(table),
        "report.html": page,
    }


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, text in goldens().items():
        (GOLDEN / name).write_text(text, encoding="utf-8", newline="\n")
