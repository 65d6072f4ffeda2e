"""Recipes: files that come back as they were, and everything they are not for, which they refuse."""

import copy
import json
import math

import diffusers
import pytest

from diffaccel.samplers.search.recipe import Entry, Recipe, network_facts
from diffaccel.samplers.tabulate import grid_of
from tests import tiny
from tests.search.problems import SCHEDULES
from tests.search.test_searched import recipe_of


@pytest.fixture
def pipe():
    return copy.copy(tiny.sd()[0])


def with_scheduler(pipe, **config):
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **config)
    return pipe


def test_files_give_back_what_was_saved(pipe, tmp_path):
    recipe = recipe_of(pipe, (3, 5))
    recipe.save(tmp_path / "a.json")
    assert Recipe.load(tmp_path / "a.json") == recipe
    assert Recipe.load(str(tmp_path / "a.json")).scheduler(pipe).config == recipe.scheduler(pipe).config
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_entries_give_back_their_table():
    schedule = SCHEDULES["vp"]
    for end in (math.inf, 2.5):
        recipe_table = recipe_of(tiny.sd()[0], (4,)).entries[0].table(schedule)
        grid = grid_of(schedule, recipe_table.lambdas[:-1], end, [900, 700, 333.25, 1])
        table = type(recipe_table)(grid, recipe_table.rows)
        entry = Entry.of(table, "gits", 7.5, measured={"a": 1})
        assert (entry.end is None) == math.isinf(end)
        back = entry.table(schedule)
        assert back.lambdas == table.lambdas
        assert back.rows == table.rows
        assert back.timesteps.tolist() == [900, 700, 333.25, 1]
        assert (entry.method, entry.steps, entry.guidance_scale) == ("gits", 4, 7.5)


def test_files_are_json_that_any_reader_takes(pipe, tmp_path):
    recipe_of(pipe).save(tmp_path / "a.json")

    def refuse(name):
        raise AssertionError(name)

    read = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert read["format"] == "diffaccel recipe 1"
    bad = Recipe(network_facts(pipe), (Entry("auto", 1, 3.0, (-2.0,), None, (999.0,), ((0.0, 1.0),), {"x": math.nan}),))
    with pytest.raises(ValueError, match="JSON"):
        bad.save(tmp_path / "b.json")
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        "[]",
        "3",
        '{"format": "diffaccel recipe 2"}',
        '{"format": "diffaccel recipe 1"}',
        '{"format": "diffaccel recipe 1", "network": {}, "entries": [{}]}',
        '{"format": "diffaccel recipe 1", "network": {}, "entries": 3}',
        '{"format": "diffaccel recipe 1", "network": {}, "entries": []}',
        '{"format": "diffaccel recipe 1", "network": {}, "entries": [{"lambdas": 1, "timesteps": [], "rows": []}]}',
    ],
)
def test_any_other_file_is_no_recipe(text, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"is no recipe; give a file that Recipe\.save"):
        Recipe.load(path)


def test_pictures_are_no_recipes(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match="is no recipe"):
        Recipe.load(path)


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        Recipe.load(tmp_path / "nothing.json")


def test_other_prediction_types_are_refused(pipe):
    recipe = recipe_of(pipe)
    with pytest.raises(ValueError, match="predicts epsilon, and this one predicts v_prediction"):
        recipe.scheduler(with_scheduler(pipe, prediction_type="v_prediction"))


@pytest.mark.parametrize("change", [{"beta_schedule": "linear"}, {"beta_end": 0.02}, {"num_train_timesteps": 500}])
def test_other_noise_schedules_are_refused(pipe, change):
    recipe = recipe_of(pipe)
    with pytest.raises(ValueError, match="searched on another noise schedule"):
        recipe.scheduler(with_scheduler(pipe, **change))
    with pytest.raises(ValueError, match="searched on another noise schedule"):
        recipe.scheduler(with_scheduler(pipe, **change).scheduler.config)


def test_other_paths_are_refused(pipe):
    recipe = recipe_of(pipe)
    with pytest.raises(ValueError, match="search"):
        recipe.scheduler(tiny.sd3()[0])
    with pytest.raises(ValueError, match="search"):
        recipe.scheduler(tiny.playground()[0])


def test_other_families_are_refused_and_other_weights_are_not(pipe):
    recipe = recipe_of(pipe)
    wide = diffusers.UNet2DConditionModel.from_config(pipe.unet.config, block_out_channels=(16, 16))
    other = copy.copy(pipe)
    other.unet = wide
    with pytest.raises(
        ValueError, match=r"another network \(UNet2DConditionModel, block_out_channels \[8, 16\] and not"
    ):
        recipe.scheduler(other)
    transformer = copy.copy(tiny.pixart()[0])
    transformer.scheduler = pipe.scheduler  # one for both, so that only the networks differ
    with pytest.raises(ValueError, match="another network"):
        recipe.scheduler(transformer)
    other.unet = copy.deepcopy(pipe.unet)
    next(other.unet.parameters()).data.add_(1)  # a fine-tuned one
    assert recipe.scheduler(other)
    recipe.scheduler(pipe.scheduler.config)  # without a pipeline there is no network to check


def test_the_recipe_knows_its_network_after_a_file(pipe, tmp_path):
    """Tuples of a config are lists in a file: they are still the same network."""
    recipe_of(pipe).save(tmp_path / "a.json")
    assert Recipe.load(tmp_path / "a.json").scheduler(pipe)


def test_guidance_is_part_of_it(pipe):
    recipe = recipe_of(pipe, (4,), 3.0) | recipe_of(pipe, (4,), 7.5)
    with pytest.raises(ValueError, match=r"guidance scales 3 and 7.5; say which: guidance_scale=3"):
        recipe.scheduler(pipe)
    with pytest.raises(ValueError, match=r"guidance 3 and 7.5, not 5; diffaccel.search\(..., guidance_scale=5\)"):
        recipe.scheduler(pipe, 5.0)
    assert recipe.scheduler(pipe, 7.5)
    with pytest.raises(ValueError, match=r"guidance 3, not 0"):
        recipe_of(pipe).scheduler(pipe, 0.0)


def test_joined_recipes_have_both(pipe):
    a, b = recipe_of(pipe, (4, 6), bend=1.1), recipe_of(pipe, (5, 6), bend=0.9)
    both = a | b
    assert [entry.steps for entry in both.entries] == [4, 5, 6]
    assert both.entries[0] == a.entries[0]
    assert both.entries[2] == b.entries[1]
    scheduler = both.scheduler(pipe)
    for n in (4, 5, 6):
        scheduler.set_timesteps(n)
        assert len(scheduler.timesteps) == n
    with pytest.raises(ValueError, match="different networks or noise schedules"):
        a | recipe_of(tiny.sd3()[0])


def test_apply_sets_the_scheduler(pipe):
    recipe = recipe_of(pipe, (4, 6))
    with pytest.raises(ValueError, match=r"for 4, 6 steps; say which: recipe.apply\(pipe, steps=...\)"):
        recipe.apply(pipe)
    assert recipe.apply(pipe, 6) is None
    pipe.scheduler.set_timesteps(6)
    with pytest.raises(ValueError, match="not 4"):
        pipe.scheduler.set_timesteps(4)
    before = pipe.scheduler
    with pytest.raises(ValueError, match="say which"):
        recipe.apply(pipe, 5)
    assert pipe.scheduler is before


def test_left_out_layers_come_back(pipe):
    """A recipe that leaves out layers wants the pipeline, and its handle puts them back."""
    recipe = recipe_of(pipe, (2,))
    name = "mid_block.resnets.1"
    notes = {"skips": [[], [name]]}
    recipe = Recipe(recipe.network, (Entry(**vars(recipe.entries[0]) | {"notes": notes}),))
    with pytest.raises(ValueError, match=r"also leaves out layers of the network; give it the pipeline: recipe.apply"):
        recipe.scheduler(pipe)
    _, call = tiny.sd()
    whole = tiny.draw((pipe, call), recipe_of(pipe, (2,)).scheduler(pipe), 2)
    handle = recipe.apply(pipe)
    assert tiny.relative(tiny.draw((pipe, call), pipe.scheduler, 2), whole) > 1e-5
    handle.remove()
    assert tiny.relative(tiny.draw((pipe, call), pipe.scheduler, 2), whole) == 0


def test_facts_are_of_the_family_not_of_the_scheduler(pipe):
    facts = network_facts(pipe)
    assert facts == json.loads(json.dumps(facts))
    assert facts == network_facts(with_scheduler(pipe, timestep_spacing="trailing"))
    assert facts["class"] == "UNet2DConditionModel"
    assert facts["prediction_type"] == "epsilon"
    recipe = recipe_of(pipe)
    pipe.scheduler = recipe.scheduler(pipe)
    assert network_facts(pipe) == facts
