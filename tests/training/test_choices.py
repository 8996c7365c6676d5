"""Options with a fixed set of values, from the command line, a recipe or Python; old values still work."""

import pytest

from samf.pretrain_encoder import EncoderArguments
from samf.training.arguments import DataArguments, ModelArguments, TuningArguments
from samf.utils.recipe import RecipeError, parse_recipe

WRONG = [
    (DataArguments, "objective", "both", "'text' or 'findings'"),
    (DataArguments, "objective", None, "'text' or 'findings'"),
    (DataArguments, "on_error", "ignore", "'raise' or 'skip'"),
    (ModelArguments, "fusion_type", "ao3d", "'samf' or 'ao2d' or 'slice_tokens'"),
    (ModelArguments, "fusion_scale", "sqrt", "'rsqrt'"),
    (TuningArguments, "trained_dtype", "int8", "'float32' or 'bfloat16'"),
    (EncoderArguments, "objective", "mae", "'dino' or 'labels'"),
]


@pytest.mark.parametrize(("kind", "name", "value", "expected"), WRONG)
def test_a_value_that_is_no_choice_is_named_with_the_choices(kind, name, value, expected, tmp_path):
    with pytest.raises(ValueError, match=f"{name} is {value!r}; it must be {expected}\\."):
        kind(**{name: value})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{name}: {'null' if value is None else value}\n", encoding="utf-8")
    choices = ".*".join(expected.replace("'", "").split(" or "))
    message = f"{name} is None; it must be" if value is None else f"recipe.yaml: .*--{name}.*'{value}'.*{choices}"
    with pytest.raises(ValueError, match=message):
        parse_recipe((kind,), ["--config", str(recipe)])


@pytest.mark.parametrize("old", ["stop", "error"])
def test_old_values_of_on_error_still_work_and_are_warned_of(old):
    for name in ("on_error", "on_missing"):
        with pytest.warns(FutureWarning, match=f"{name}={old} is now {name}=raise"):
            (arguments,) = parse_recipe((EncoderArguments,), [f"--{name}", old])
        assert getattr(arguments, name) == "raise"


def test_no_value_stays_no_value():
    (arguments,) = parse_recipe((ModelArguments,), [])
    assert arguments.fusion_scale is None and arguments.slab is None
    with pytest.raises(RecipeError, match="--slab"):
        parse_recipe((ModelArguments,), ["--slab", "thick"])


def test_slabs_are_one_or_one_for_each_window(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    for text, expected in (("mip", ["mip"]), ("[mip, mean, mean]", ["mip", "mean", "mean"])):
        recipe.write_text(f"slab: {text}\n", encoding="utf-8")
        (arguments,) = parse_recipe((ModelArguments,), ["--config", str(recipe)])
        assert arguments.slab == expected
