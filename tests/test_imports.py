"""`import diffaccel` stays light, and imports flow one way."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import diffaccel

PACKAGE = Path(diffaccel.__file__).parent
RULES = ["exponential", "adams_bashforth", "ancestral", "runge_kutta", "exponential_runge_kutta", "er_sde", "sa"]
RULES += ["gradient_estimation", "accelerated_ddpm", "dual_fast"]
# A module of the sampler core may import those to its left only: config -> schedule -> grid -> rows -> step.
LAYERS = [
    "schedule",
    "row",
    "solver",
    *RULES,
    "non_stationary",
    "solvers",
    "tables",
    "spacing",
    "grid",
    "stages",
    "plan",
    "tabulate",
    "compensation",
    "config",
    "request",
    "options",
    "scheduler",
    "named",
    "searched",
    "catalog",
]


def modules_after(statement: str) -> set[str]:
    code = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_import_loads_no_third_party_module_that_diffusers_does_not():
    added = modules_after("import diffaccel") - modules_after("from diffusers import DiffusionPipeline")
    own = {"diffaccel", *sys.stdlib_module_names}
    foreign = sorted(m for m in added if m.split(".")[0] not in own)
    assert not [m for m in foreign if m.split(".")[0] != "diffusers"], foreign
    assert not [m for m in foreign if m.startswith("diffusers.") and "schedul" not in m], foreign


def test_import_leaves_evaluation_and_cli_out():
    loaded = modules_after("import diffaccel")
    heavy = ("diffaccel.eval", "diffaccel.pruning", "diffaccel.cost", "diffaccel.demo", "diffaccel.cli")
    assert not {m for m in loaded if m.startswith(heavy)}


def test_sampler_core_imports_one_way():
    for position, name in enumerate(LAYERS):
        tree = ast.parse((PACKAGE / "samplers" / f"{name}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffaccel.samplers"):
                parts = node.module.split(".")[2:] or [alias.name for alias in node.names]
                assert all(LAYERS.index(part) < position for part in parts), (name, parts)


def test_evaluation_imports_one_way():
    """Numbers know no networks, networks no files of a run, reports neither."""
    above = {
        "statistics": ("networks", "runs", "reports"),
        "networks": ("runs", "reports"),
        "reports": ("networks", "runs"),
    }
    above["runs"] = ("reports",)
    for name, forbidden in above.items():
        for file in (PACKAGE / "eval" / name).glob("*.py"):
            text = file.read_text()
            assert not [other for other in forbidden if f"diffaccel.eval.{other}" in text], file
    for file in (PACKAGE / "eval" / "statistics").glob("*.py"):
        assert "import torch" not in file.read_text(), file


def test_pruning_and_evaluation_do_not_know_each_other():
    for folder, other in (("pruning", "eval"), ("eval", "pruning")):
        for file in (PACKAGE / folder).rglob("*.py"):
            assert f"diffaccel.{other}" not in file.read_text(), file


def test_pruning_imports_one_way():
    """Groups know no network, parts no plan, a cut no choice of what to cut, and nothing of it the disk."""
    order = ["groups", "numbering", "parts", "families", "find", "gates", "structure", "models", "plan", "surgery"]
    choosing = ["inputs", "influence", "calibration", "criteria", "costs", "budgets"]
    ending = ["prune", "checkpoint", "write", "picture", "report", "lora", "controlnet", "command", "command_line"]
    for position, name in enumerate(order):
        above = order[position + 1 :] + choosing + ending
        path = PACKAGE / "pruning" / name
        for file in path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
            text = file.read_text()
            assert not [other for other in above if f"diffaccel.pruning.{other} " in text], file


@pytest.mark.parametrize("name", ["sample", "demo", "samplers.search", "eval", "pruning", "kernels", "samplers.policy"])
def test_modules_can_be_the_first_to_be_imported(name):
    assert f"diffaccel.{name}" in modules_after(f"import diffaccel.{name}")


def test_mathematics_imports_no_torch():
    for name in LAYERS:
        if name in ("row", "scheduler", "named", "searched", "catalog"):  # tensors, or the adapter and its names
            continue
        imported = (PACKAGE / "samplers" / f"{name}.py").read_text()
        assert "import torch" not in imported, name
        assert "diffusers import" not in imported, name
