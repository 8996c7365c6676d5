"""Every recipe in the repository can be read by its script, on a machine without a GPU too."""

from pathlib import Path

import pytest
from transformers import AutoConfig, TrainingArguments

from samf.pretrain_encoder import EncoderArguments
from samf.pretraining.dino import DinoArguments
from samf.recipe import parse_recipe
from samf.train import DataArguments, ModelArguments
from samf.warmup_aggregator import WarmupArguments

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def script_arguments(recipe: Path) -> tuple[type, ...]:
    """What the recipe's script reads beside TrainingArguments: by the recipe's name, stage 1, 2 or 3."""
    if recipe.stem.startswith(("slice_encoder", "dino")):
        return (EncoderArguments, DinoArguments)
    return (WarmupArguments,) if recipe.stem.startswith("warmup") else (ModelArguments, DataArguments)


@pytest.mark.parametrize("recipe", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_is_read_by_its_script(recipe, tmp_path):
    types = script_arguments(recipe)
    overrides = ["--use_cpu", "true", "--output_dir", str(tmp_path)]
    *arguments, training = parse_recipe((*types, TrainingArguments), ["--config", str(recipe), *overrides])
    assert training.learning_rate > 0
    assert all(type(argument) is kind for argument, kind in zip(arguments, types, strict=True))


def test_the_demos_encoder_is_small_and_is_what_its_recipe_makes():
    folder = RECIPES / "demo" / "slice_encoder"
    assert (folder / "model.safetensors").stat().st_size < 4_000_000
    arguments, *_ = parse_recipe(
        (EncoderArguments, DinoArguments, TrainingArguments), ["--config", f"{folder}.yaml", "--use_cpu", "true"]
    )
    config = AutoConfig.from_pretrained(folder)
    for name in ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "intermediate_size"):
        assert getattr(config, name) == getattr(arguments, name), name
