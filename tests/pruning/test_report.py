import csv
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffaccel.pruning.costs import layer_table
from diffaccel.pruning.find import find_groups
from diffaccel.pruning.inputs import example_inputs
from diffaccel.pruning.plan import PruningPlan
from diffaccel.pruning.report import Loss, Report, losses, markdown, write_report
from diffaccel.pruning.surgery import cut
from tests.pruning.test_costs import NETWORKS

REPORT = Report(
    source="runwayml/stable_diffusion|v1",
    model="UNet2DConditionModel",
    facts={
        "criterion": "magnitude",
        "target": 0.7,
        "planned": 0.689,
        "kinds": ["heads", "mid_block"],
        "calls_from": "a\nb",
    },
    losses=[
        Loss("down_blocks.0", "heads", 1, 4),
        Loss("down_blocks.0", "neurons", 0, 64),
        Loss("up_blocks.0", "neurons", 32, 64),
        Loss("mid_block", "mid_block", 1, 1),
    ],
    macs=(408.1e6, 204.05e6),
    parameters=(11_901_000_000, 5_950_500_000),
    size=(1_720_000_000, 860_000_000),
    folder='out/my "model"',
    component="unet",
    variant="fp16",
    stock=False,
    reload=0.0,
    mask=3e-7,
    latency=(0.0123, 0.0082),
    where="a CPU, float32",
    memory={"main memory": 2_500_000_000},
)


def rows(page: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in page.splitlines() if line.startswith("|")
    ]


def test_costs_before_and_after() -> None:
    page = markdown(REPORT)
    table = {row[0].strip(): row[1:] for row in rows(page)}
    assert table["multiply-accumulates (MACs)"] == ["408.1 M", "204.1 M", "50.0%"]
    assert table["parameters"] == ["11.90 G", "5.950 G", "50.0%"]
    assert table["weights"] == ["1.720 GB", "0.860 GB", "50.0%"]
    assert table["time of a call"] == ["12.30 ms", "8.200 ms", "66.7%"]
    assert "1.50 times as fast. Measured with: a CPU, float32." in page
    assert "2.500 GB of main memory" in page
    assert "](pruning.png)" in page
    without = markdown(replace(REPORT, latency=None, memory={}))
    assert "time of a call" not in without
    assert "fast" not in without
    assert "at most" not in without


def test_what_was_removed_by_stage_and_kind() -> None:
    table = rows(markdown(REPORT).split("## What was removed")[1])
    assert table[0] == ["removed", "attention heads", "neurons", "middle"]
    assert table[2:] == [
        ["down_blocks.0", "1 of 4 (25%)", "0 of 64 (0%)", ""],
        ["up_blocks.0", "", "32 of 64 (50%)", ""],
        ["mid_block", "", "", "1 of 1 (100%)"],
        ["all", "1 of 4 (25%)", "32 of 128 (25%)", "1 of 1 (100%)"],
    ]


def test_facts_are_shown_as_they_are() -> None:
    page = markdown(REPORT)
    assert "- target: 70.0% of the cost\n" in page
    assert "- planned: 68.9% of the cost\n" in page
    assert "- kinds: heads, mid\\_block\n" in page
    assert "- calls from: a b\n" in page
    assert page.startswith("# UNet2DConditionModel of runwayml/stable\\_diffusion\\|v1, pruned\n")


def code(report: Report) -> str:
    found = re.search(r"```python\n(.*?)```", markdown(report), re.DOTALL)
    assert found
    return found[1]


def test_how_a_pipeline_is_opened() -> None:
    lines = code(REPORT).splitlines()
    assert lines[0].startswith("import diffaccel")
    assert lines[-1] == 'pipe = DiffusionPipeline.from_pretrained("out/my \\"model\\"", variant="fp16")'


def test_opening_names_the_type_of_half_precision() -> None:
    """Without it Transformers opens its parts in the stored type and Diffusers the others in float32."""
    page = markdown(replace(REPORT, folder="out", component="unet", variant="", dtype="float16"))
    assert "import torch\n" in page
    assert 'DiffusionPipeline.from_pretrained("out", dtype=torch.float16)' in page
    assert "diffaccel" not in code(replace(REPORT, stock=True))
    assert "Stock Diffusers opens it" in markdown(replace(REPORT, stock=True))
    assert "variant" not in code(replace(REPORT, variant=""))


@pytest.mark.parametrize("removed", [{"transformer_blocks.1": (0,)}, {"transformer_blocks.1.ff.neurons": range(24)}])
def test_the_code_of_a_single_network_runs(removed: dict[str, Any], tmp_path: Path) -> None:
    model = NETWORKS["dit"]()
    smaller: Any = cut(model, PruningPlan.of(model, removed))
    smaller.save_pretrained(tmp_path)
    stock = type(smaller) is type(model)
    assert stock == ("transformer_blocks.1" in removed)
    names: dict[str, Any] = {}
    single = replace(REPORT, model="DiTTransformer2DModel", folder=str(tmp_path), component="", variant="", stock=stock)
    exec(code(single), names)
    assert type(names["model"]) is type(smaller)
    assert ("diffaccel" in names) == (not stock)


def test_checks_and_dry_runs() -> None:
    page = markdown(REPORT)
    assert "outputs differ by 0.0e+00 from those in memory" in page
    assert "outputs differ by 3.0e-07" in page
    assert "was not compared" in markdown(replace(REPORT, mask=None))
    dry = markdown(replace(REPORT, folder=""))
    assert "(dry run)" in dry.splitlines()[0]
    assert "Nothing was written." in dry
    assert "pruning.png" not in dry
    assert "pruning_layers.csv" not in dry
    assert "from_pretrained" not in dry
    assert "Checks" not in dry


def test_losses_count_what_goes_with_a_block_once() -> None:
    model = NETWORKS["sdxl"]()
    groups = find_groups(model).found
    heads = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.heads"
    plan = PruningPlan.of(
        model,
        {heads: (0, 1), "mid_block": (0,), "mid_block.attentions.0": (0,), "down_blocks.0.layer.1": (0,)}
        | {"up_blocks.0.resnets.0.body": (0,), "up_blocks.0.resnets.0.channels": (0,)},
    )
    found = {(row.stage, row.kind): (row.removed, row.units) for row in losses(groups, plan)}
    count = groups[heads].units
    assert found["down_blocks.1", "heads"] == (2, 8 * count)
    assert found["mid_block", "heads"] == (4 * count, 4 * count)
    assert found["mid_block", "mid_block"] == (1, 1)
    assert ("mid_block", "transformer") not in found  # it went with the middle
    assert found["mid_block", "resnet"] == (0, 2)
    assert found["down_blocks.0", "layer"] == (1, 1)
    assert found["down_blocks.1", "layer"] == (0, 1)
    units = groups["up_blocks.0.resnets.0.channels"].units
    assert found["up_blocks.0", "channels"] == (units, 3 * units)  # all of the body, not all and one
    assert found["up_blocks.1", "channels"] == (units, 3 * units)  # the layer's partner
    order = list(dict.fromkeys(stage for stage, _ in found))
    assert order == ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]


def test_files_are_written(tmp_path: Path) -> None:
    model = NETWORKS["dit"]()
    layers = layer_table(model, example_inputs(model))
    files = write_report(tmp_path, REPORT, Image.new("RGB", (3, 2), "red"), layers)
    assert [file.name for file in files] == ["pruning_report.md", "pruning.png", "pruning_layers.csv"]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert files[0].read_text(encoding="utf-8") == markdown(REPORT)
    with Image.open(files[1]) as picture:
        assert picture.size == (3, 2)
    assert len(list(csv.DictReader(files[2].read_text().splitlines()))) == len(layers)
