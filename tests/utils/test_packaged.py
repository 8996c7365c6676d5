"""Recipes by name, from any folder."""

from pathlib import Path

import pytest

from samf.pretraining.dino import DinoArguments
from samf.train import ARGUMENTS
from samf.utils.packaged import PACKAGE, RECIPES, find_recipe, packaged_path, recipe_names, recipe_text
from samf.utils.recipe import RecipeError, parse_recipe, read_recipe


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_recipe_is_found_by_its_name_and_by_its_path_in_a_clone():
    names = recipe_names()
    assert {"ct_rate_ao2d", "demo/3_report", "table3/phantoms", "accelerate/ddp"} <= set(names)
    for name in names:
        for spelling in (name, f"{name}.yaml", f"recipes/{name}.yaml"):
            assert find_recipe(spelling) == RECIPES / f"{name}.yaml"


def test_a_file_of_the_working_folder_counts_first(elsewhere):
    (elsewhere / "ct_rate").write_text("seed: 7\n")
    assert find_recipe("ct_rate") == Path("ct_rate")


def test_an_unknown_name_is_an_error_that_lists_the_recipes():
    with pytest.raises(RecipeError, match=r"--config ct_rat: no such file.*Did you mean ct_rate.*table3/phantoms"):
        parse_recipe(ARGUMENTS, ["--config", "ct_rat"])


def test_data_of_a_recipe_is_the_packages_unless_the_working_folder_has_it(elsewhere):
    arguments = ["--config", "demo/1_aggregator", "--use_cpu", "true"]
    encoder = "recipes/demo/slice_encoder"
    assert parse_recipe(ARGUMENTS, arguments)[0].slice_encoder == str(PACKAGE / encoder)
    (elsewhere / encoder).mkdir(parents=True)
    assert parse_recipe(ARGUMENTS, arguments)[0].slice_encoder == encoder
    assert packaged_path("recipes/none") == "recipes/none" and packaged_path("runs/demo") == "runs/demo"


@pytest.mark.parametrize("name", recipe_names())
def test_a_printed_recipe_means_the_same_in_another_folder(name, elsewhere):
    (elsewhere / "mine.yaml").write_text(recipe_text(name), encoding="utf-8")
    assert read_recipe("mine.yaml") == read_recipe(RECIPES / f"{name}.yaml")


def test_a_name_is_no_recipe_of_another_script():
    with pytest.raises(RecipeError, match=r"accelerate/ddp\.yaml: unknown key"):
        parse_recipe((DinoArguments,), ["--config", "accelerate/ddp"])
