"""The picture of a recipe shows the recipe."""

import sys

import diffusers
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from diffaccel import SolverScheduler
from diffaccel.samplers.grid import time_grid
from diffaccel.samplers.search.picture import KNOWN, _noise, _search_of, _told, _weights, draw
from diffaccel.samplers.search.recipe import Entry, Recipe, schedule_facts
from diffaccel.samplers.solvers import SOLVERS
from diffaccel.samplers.tabulate import Table, tabulate

matplotlib.use("agg")
CONFIGS = {
    "vp": diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).config,
    "flow": diffusers.FlowMatchEulerDiscreteScheduler().config,
}
NOTES = {
    "dc": {"ratios": [1, 1, 0.8, 1.2, 0.95]},
    "auto": {"history": [["least squares", 0.4], ["evolution", 0.3], ["descent", 0.2], ["descent", 0.25]]},
    "ays": {
        "chosen": 2,
        "history": [
            {"intervals": n, "pass": k, "sigmas": [9.0, 2.0 - k / 10, 0.2], "klub": 1, "error": 1 / (k + 1)}
            for n, k in ((1, 0), (2, 0), (2, 1), (2, 2))
        ],
    },
    "gits": {"errors": {"1": 0.2, "1.15": 0.1, "1.3": 0.3}, "coeff": 1.15},
    "usf": {"history": [[20.0, 0.4], [33.5, 0.2]]},
    "autodiffusion": {"skips": [[], ["a"], ["a", "b"], [], []], "shares": {"a": 0.1, "b": 0.25}},
    "iia": {"coefficients": [[], [0.1, 0.2]]},
}


def config(name="vp"):
    return SolverScheduler.from_config(CONFIGS[name]).config


def entry_of(method="iia", name="vp", steps=5, final="zero", told=None):
    schedule = SolverScheduler.from_config(config(name)).schedule
    grid = time_grid(schedule, steps, "karras", final=final)
    found = tabulate(schedule, grid, SOLVERS["dpmpp_2m"])
    if told is not None:
        found = Table(type(grid)(grid.lambdas, grid.timesteps + told), found.rows)
    return Entry.of(found, method, 4.0, notes=NOTES[method])


def panel():
    return Figure().subplots()


def schedule_of(name="vp"):
    return SolverScheduler.from_config(config(name)).schedule


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("name", CONFIGS)
def test_noise_is_drawn_beside_known_schedules_of_as_many_calls(name, final):
    axes, entry, schedule = panel(), entry_of(name=name, final=final), schedule_of(name)
    _noise(axes, entry, schedule)
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(drawn) == [*KNOWN, "recipe"]
    np.testing.assert_allclose(drawn["recipe"], drawn["karras"])
    assert len(drawn["recipe"]) == 5 + (final == "sigma_min")
    logsnr = np.array(time_grid(schedule, 5, "logsnr", final=final).lambdas[:5])
    np.testing.assert_allclose(drawn["logsnr"][:5], np.minimum(np.exp(-logsnr), 1e3))
    assert axes.get_yscale() == "log"


def test_told_times_are_drawn_as_differences_to_the_exact_ones():
    shift = np.array([0.0, 3.0, -2.0, 5.0, 0.0])
    axes = panel()
    _told(axes, entry_of(told=shift), schedule_of())
    np.testing.assert_allclose([bar.get_height() for bar in axes.patches], shift, atol=1e-6)
    alone = panel()
    _told(alone, entry_of(told=shift), None)
    np.testing.assert_allclose(alone.lines[0].get_ydata(), entry_of(told=shift).timesteps)


def test_weights_are_written_newest_first():
    axes, entry = panel(), entry_of()
    _weights(axes, entry)
    written = {text.get_position(): text.get_text() for text in axes.texts}
    wanted = {
        (j, i): f"{weight:.2f}".replace("-0.00", "0.00")
        for i, row in enumerate(entry.rows)
        for j, weight in enumerate(row)
    }
    assert written == wanted
    assert [label.get_text() for label in axes.get_xticklabels()] == ["sample", "x0", "-1", "-2", "-3", "-4"]


@pytest.mark.parametrize("method", NOTES)
def test_how_it_was_found_is_drawn_where_it_was_kept(method):
    found = _search_of(entry_of(method))
    assert (found is None) == (method == "iia")
    assert _search_of(Entry.of(tabulated(), method, 1.0)) is None
    if found is None:
        return
    axes = panel()
    found(axes, entry_of(method))
    drawn = [np.asarray(line.get_ydata(), float) for line in axes.lines]
    wanted = {
        "dc": NOTES["dc"]["ratios"],
        "auto": [0.4, 0.3, 0.2, 0.25],
        "ays": [9.0, 1.9, 0.2],
        "gits": [0.2, 0.1, 0.3],
        "usf": [0.4, 0.2],
    }
    if method == "autodiffusion":
        np.testing.assert_allclose([bar.get_height() for bar in axes.patches], [1, 0.9, 0.65, 1, 1])
    else:
        assert any(line.shape == np.shape(wanted[method]) and np.allclose(line, wanted[method]) for line in drawn)


def tabulated():
    schedule = schedule_of()
    return tabulate(schedule, time_grid(schedule, 3, "logsnr"), SOLVERS["ddim"])


def test_a_line_for_each_entry_with_and_without_the_schedule(tmp_path):
    network = {"class": "UNet2DConditionModel", "config": {}} | schedule_facts(SolverScheduler.from_config(config()))
    recipe = Recipe(network, (entry_of("dc"), entry_of("auto", final="sigma_min"), entry_of("iia", steps=20)))
    sizes = []
    for name, drawn in {"one.png": recipe.entries[0], "all.png": recipe}.items():
        draw(drawn, tmp_path / name)
        sizes.append(Image.open(tmp_path / name).height)
    assert sizes[1] > 2.5 * sizes[0]
    assert recipe.draw(tmp_path / "known.png", config()) == tmp_path / "known.png"
    assert (tmp_path / "known.png").read_bytes() != (tmp_path / "all.png").read_bytes()
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(ValueError, match="another noise schedule"):
        recipe.draw(tmp_path / "no.png", SolverScheduler.from_config(config(), beta_end=0.02).config)


def test_without_matplotlib_there_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw(entry_of(), tmp_path / "no.png")
