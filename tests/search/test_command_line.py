"""`diffaccel search` and `diffaccel sample --recipe`."""

import json
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from diffaccel import SolverScheduler, zoo
from diffaccel.cli import main
from diffaccel.samplers.grid import time_grid
from diffaccel.samplers.search import Recipe, api
from diffaccel.samplers.search.command_line import _classes, _takes_classes, described, usage
from diffaccel.samplers.search.recipe import Entry, network_facts
from diffaccel.samplers.search.reference import reference
from diffaccel.samplers.solvers import SOLVERS
from diffaccel.samplers.tabulate import tabulate

CAPTIONS = ["red heart", "blue book", "crying face", "open book", "tulip", "full moon", "umbrella", "japan flag"]
MEASURED = {
    "pairs": 16,
    "prompts": 4,
    "latent_mse": 0.0212,
    "start": {"sampler": "ddim, beta, sigma_min", "latent_mse": 0.08, "ratio": [0.2, 0.25, 0.3]},
    "default": {"sampler": "er_ode_1_corrected, beta, sigma_min", "latent_mse": 0.04, "ratio": [0.48, 0.53, 0.6]},
    "seconds": 61.4,
}


@pytest.fixture(scope="module")
def pipe():
    return zoo.load("emoji-sd")


@pytest.fixture
def captions(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("\n\n".join(f"{caption}, twemoji style " for caption in CAPTIONS) + "\n")
    return path


def entry_of(pipe, steps=3, scale=4.0, ratio=(0.48, 0.53, 0.6), **notes):
    schedule = SolverScheduler.from_config(pipe.scheduler.config).schedule
    table = tabulate(schedule, time_grid(schedule, steps, "karras"), SOLVERS["dpmpp_2m"])
    measured = MEASURED | {"default": MEASURED["default"] | {"ratio": list(ratio)}}
    return Entry.of(table, "auto", scale, measured=measured, notes=notes)


def recipe_of(pipe, *entries):
    return Recipe(network_facts(pipe), entries)


def test_arguments_reach_the_search_and_its_recipe_the_file(pipe, captions, tmp_path, capsys, monkeypatch):
    asked = {}

    def search(given, method, **options):
        asked.update(options, method=method, model=type(given.unet).__name__)
        return recipe_of(pipe, *(entry_of(pipe, n) for n in options["steps"]))

    monkeypatch.setattr("diffaccel.samplers.search.search", search)
    output = tmp_path / "recipe.json"
    command = ["search", "emoji-sd", "--method", "usf", "--steps", "3", "4", "--prompts", str(captions)]
    command += ["--guidance-scale", "4", "--output", str(output), "--pairs", "9", "--cache", str(tmp_path / "cache")]
    command += ["--seed", "7", "--solver", "ddim", "--schedule", "karras", "--final", "sigma_min", "--device", "cpu"]
    assert main([*command, "--picture", str(tmp_path / "recipe.png")]) == 0
    assert asked == {
        "model": "UNet2DConditionModel",
        "method": "usf",
        "prompts": [f"{caption}, twemoji style" for caption in CAPTIONS],
        "steps": [3, 4],
        "guidance_scale": 4.0,
        "pairs": 9,
        "solver": "ddim",
        "schedule": "karras",
        "final": "sigma_min",
        "seed": 7,
        "cache": tmp_path / "cache",
    }
    assert [entry.steps for entry in Recipe.load(output).entries] == [3, 4]
    assert Image.open(tmp_path / "recipe.png").height > 500
    printed = capsys.readouterr().out
    assert "judged on 16 pairs of 4 prompts that the search did not see" in printed
    assert f"diffaccel sample emoji-sd --recipe {output} --steps 3 --prompt" in printed

    # a second search adds to what is there
    assert main(["search", "emoji-sd", "--steps", "4", "5", "--prompts", str(captions), "--output", str(output)]) == 0
    assert [entry.steps for entry in Recipe.load(output).entries] == [3, 4, 5]


def test_a_small_search_from_end_to_end(pipe, captions, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(api, "reference", lambda problem, steps, **options: reference(problem, 6, **options))
    output = tmp_path / "recipe.json"
    command = ["search", "emoji-sd", "--method", "iia", "--steps", "3", "--prompts", str(captions), "--pairs", "6"]
    assert main([*command, "--guidance-scale", "1", "--output", str(output)]) == 0
    (entry,) = Recipe.load(output).entries
    low, middle, high = entry.measured["start"]["ratio"]
    assert f"{entry.measured['latent_mse']:.4g}" in (printed := capsys.readouterr().out)
    assert f"{middle:.2f} ({low:.2f} to {high:.2f})" in printed
    assert middle < 1  # least squares from DDIM; a recipe that was mixed up would not


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        ((0.48, 0.53, 0.6), "3 calls: the recipe helps; it has 0.53 times the error of the package's default."),
        ((0.9, 0.95, 1.2), "3 calls: the recipe cannot be told from the default"),
        ((1.1, 1.3, 1.5), "3 calls: the recipe does not help: it has 1.30 times the error of the default."),
    ],
)
def test_a_plain_sentence_says_if_it_helps(pipe, ratio, words):
    text = described([entry_of(pipe, ratio=ratio)])
    low, middle, high = ratio
    assert words in text
    assert f"{middle:.2f} ({low:.2f} to {high:.2f})" in text
    assert "0.25 (0.20 to 0.30)" in text
    assert "default: er_ode_1_corrected, beta, sigma_min; start: ddim, beta, sigma_min." in text


def test_one_held_out_prompt_is_said_to_tell_nothing(pipe):
    alone = {key: {"sampler": "x", "latent_mse": 1.0} for key in ("start", "default")}
    text = described([replace(entry_of(pipe), measured={"pairs": 16, "prompts": 1, "latent_mse": 0.1} | alone)])
    assert "one held-out prompt tells nothing for sure" in text


def test_what_calls_without_layers_cost_is_said(pipe):
    text = described([entry_of(pipe, skips=[["mid_block"], [], []], cost=2.7)])
    assert "3 calls at the cost of 2.7 whole ones: the recipe helps" in text


def test_usage_says_scale_and_layers_where_they_matter(pipe, tmp_path):
    path = tmp_path / "recipe.json"
    both = recipe_of(pipe, entry_of(pipe), entry_of(pipe, scale=7.5))
    assert "recipe.scheduler(pipe, guidance_scale=7.5)" in usage(both, both.entries[1:], "emoji-sd", path)
    assert "--guidance-scale 7.5 --prompt" in usage(both, both.entries[1:], "emoji-sd", path)
    skipping = recipe_of(pipe, entry_of(pipe, skips=[["mid_block"], [], []]))
    assert "recipe.apply(pipe, steps=3)" in usage(skipping, skipping.entries, "emoji-sd", path)


def test_sample_draws_what_the_pipeline_draws_with_the_recipe(pipe, tmp_path, capsys):
    recipe = recipe_of(pipe, entry_of(pipe))
    recipe.save(tmp_path / "recipe.json")
    command = ["sample", "emoji-sd", "--prompt", "red heart", "--recipe", str(tmp_path / "recipe.json")]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    drawn = np.array(Image.open(capsys.readouterr().out.strip()))
    own = pipe.scheduler
    pipe.scheduler = recipe.scheduler(pipe)
    generator = torch.Generator().manual_seed(0)
    wanted = pipe("red heart", num_inference_steps=3, guidance_scale=4.0, generator=generator).images[0]
    pipe.scheduler = own
    np.testing.assert_array_equal(drawn, np.array(wanted))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "7"], "this recipe is for 3 or 4 steps, not 7"),
        ([], "this recipe is for 3 or 4 steps; say which: --steps 3"),
        (["--steps", "3", "--guidance-scale", "2"], "this recipe is for guidance 4, not 2"),
        (["--steps", "3", "--scheduler", "ddim"], "leave out --scheduler"),
        (["--steps", "3", "--final", "sigma_min"], "leave out --scheduler"),
    ],
)
def test_sample_refuses_what_the_recipe_is_not_for(pipe, tmp_path, capsys, options, words):
    path = tmp_path / "recipe.json"
    recipe_of(pipe, entry_of(pipe, 3), entry_of(pipe, 4)).save(path)
    assert main(["sample", "emoji-sd", "--prompt", "x", "--recipe", str(path), *options]) == 2
    assert words in capsys.readouterr().err


def test_sample_asks_which_scale_of_two(pipe, tmp_path, capsys):
    path = tmp_path / "recipe.json"
    recipe_of(pipe, entry_of(pipe), entry_of(pipe, scale=7.5)).save(path)
    assert main(["sample", "emoji-sd", "--prompt", "x", "--recipe", str(path)]) == 2
    assert "for guidance 4 or 7.5; say which: --guidance-scale 4" in capsys.readouterr().err


def test_bad_input_is_refused_before_the_model_is_loaded(captions, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffaccel.sample.load_pipeline", lambda *_: pytest.fail("loaded"))
    (tmp_path / "few.txt").write_text("a\na\nb\nc\n")
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    good = ["--prompts", str(captions), "--output", str(tmp_path / "recipe.json")]
    for options, words in {
        (*good, "--steps", "0"): "--steps must be 1 or more, not 0",
        (*good, "--pairs", "0"): "--pairs must be 1 or more, not 0",
        ("--prompts", str(tmp_path / "none.txt")): "cannot read prompts from",
        ("--prompts", str(tmp_path / "few.txt")): "has 3 different prompts",
        ("--prompts", str(captions), "--output", str(tmp_path / "no" / "recipe.json")): "there is no folder",
        ("--prompts", str(captions), "--output", str(tmp_path / "other.json")): "is no recipe",
    }.items():
        assert main(["search", "emoji-sd", *options]) == 2
        assert words in capsys.readouterr().err


def test_models_that_draw_classes_get_numbers(tmp_path):
    assert _takes_classes(object.__new__(diffusers.DiTPipeline))
    assert not _takes_classes(object.__new__(diffusers.StableDiffusionPipeline))
    assert _classes(["3", "17"], tmp_path) == [3, 17]
    with pytest.raises(ValueError, match="a class number a line, not 'cat'"):
        _classes(["3", "cat"], tmp_path)


def test_a_recipe_of_another_network_is_not_overwritten(pipe, captions, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffaccel.samplers.search.search", lambda *_, **__: pytest.fail("searched"))
    path = tmp_path / "recipe.json"
    network = network_facts(pipe) | {"class": "DiTTransformer2DModel"}
    Recipe(network, (entry_of(pipe),)).save(path)
    before = path.read_bytes()
    assert main(["search", "emoji-sd", "--prompts", str(captions), "--output", str(path)]) == 2
    assert "is a recipe for another network" in capsys.readouterr().err
    assert path.read_bytes() == before
