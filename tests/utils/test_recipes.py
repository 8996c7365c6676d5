"""Every recipe in the repository can be read by its script, on a machine without a GPU too."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from transformers import AutoConfig, TrainingArguments

from samf import SamfConfig, SamfForConditionalGeneration
from samf.experiments.table3 import ROWS, all_runs
from samf.pretrain_encoder import EncoderArguments
from samf.pretraining.dino import DinoArguments
from samf.train import ARGUMENTS
from samf.training.param_groups import PARTS
from samf.utils.recipe import RecipeError, parse_recipe, read_recipe
from samf.warmup_aggregator import WarmupArguments

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


LAUNCHERS = sorted((RECIPES / "accelerate").glob("*.yaml"))


def script_arguments(recipe: Path) -> tuple[type, ...]:
    """What the recipe's script reads, TrainingArguments last: by the recipe's name, stage 1, 2 or 3."""
    if recipe.stem.startswith(("slice_encoder", "phantom_encoder", "dino")):
        return (EncoderArguments, DinoArguments, TrainingArguments)
    return (WarmupArguments, TrainingArguments) if recipe.stem.startswith("warmup") else ARGUMENTS


@pytest.mark.parametrize(
    "recipe", sorted(set(RECIPES.rglob("*.yaml")) - set(LAUNCHERS)), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_recipe_is_read_by_its_script(recipe, tmp_path):
    types = script_arguments(recipe)
    overrides = ["--use_cpu", "true", "--output_dir", str(tmp_path)]
    arguments = parse_recipe(types, ["--config", str(recipe), *overrides])
    assert arguments[-1].learning_rate > 0
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


# Recipes that extend others -------------------------------------------------------------------------------------------


def write(folder: Path, **recipes: str) -> None:
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def test_a_recipe_has_its_bases_keys_unless_it_gives_them(tmp_path):
    (tmp_path / "below").mkdir()
    write(tmp_path, first="seed: 1\nfusion_type: samf\nmax_steps: 5\n", second="seed: 2\ntasks: [report]\n")
    write(tmp_path / "below", last="base: [../first.yaml, ../second.yaml]\nmax_steps: 7\n")
    expected = {"seed": 2, "fusion_type": "samf", "tasks": ["report"], "max_steps": 7}
    assert read_recipe(tmp_path / "below" / "last.yaml") == expected


def test_several_recipes_and_the_command_line(tmp_path):
    write(tmp_path, one="base: two.yaml\nseed: 1\nmax_steps: 5\n", two="learning_rate: 1e-4\n", three="max_steps: 9\n")
    files = [str(tmp_path / f"{name}.yaml") for name in ("one", "three")]
    training = parse_recipe(ARGUMENTS, ["--config", *files, "--seed", "4", "--use_cpu", "true"])[-1]
    assert (training.seed, training.max_steps, training.learning_rate) == (4, 9, 1e-4)


def test_a_wrong_key_is_named_with_the_file_that_has_it(tmp_path):
    write(tmp_path, one="base: two.yaml\n", two="learning_rat: 1\n")
    with pytest.raises(RecipeError, match=r"two.yaml: unknown key 'learning_rat'; did you mean 'learning_rate'"):
        parse_recipe(ARGUMENTS, ["--config", str(tmp_path / "one.yaml")])


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ({"one": "base: two.yaml\n", "two": "base: one.yaml\n"}, "can't extend itself"),
        ({"one": "base: nowhere.yaml\n"}, "nowhere.yaml: can't be read"),
        ({"one": "- a list\n"}, "one.yaml: a recipe is a YAML mapping"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_names_the_file(tmp_path, recipes, message):
    write(tmp_path, **recipes)
    with pytest.raises(RecipeError, match=message):
        read_recipe(tmp_path / "one.yaml")


# Table 3 ----------------------------------------------------------------------------------------------------------------


def test_table_3_has_both_readings_of_every_row():
    """What is frozen, whether the aggregator is warmed up, and the fusion, against the printed table."""
    optional = {"slice_encoder", "aggregator"}
    found = Counter()
    for name in ROWS:
        recipe = read_recipe(RECIPES / "table3" / f"{name}.yaml")
        frozen = frozenset(optional - set(recipe.get("train_parts", PARTS)))
        found[recipe["fusion_type"], "aggregator" in recipe, frozen] += 1
    one = [frozenset({part}) for part in sorted(optional)]
    both, none = frozenset(optional), frozenset()
    expected = [("samf", False, part) for part in one]
    expected += [("samf", True, frozen) for frozen in (none, *one, both)]
    expected += [("ao2d", False, part) for part in (*one, both)] + [("ao2d", True, none), ("ao2d", True, both)]
    expected += [("slice_tokens", False, none)]
    assert found == Counter(expected)


def test_the_papers_training_is_the_base_of_its_recipes():
    for name in ("ct_rate_ao2d", *(f"table3/{row}" for row in ROWS)):
        recipe = read_recipe(RECIPES / f"{name}.yaml")
        assert (recipe["lora_rank"], recipe["lora_alpha"], recipe["lora_dropout"]) == (16, 32, 0.05)
        assert (
            float(recipe["learning_rate"]) == 5e-5
            and recipe["num_train_epochs"] == 1
            and recipe["warmup_steps"] == 0.03
        )
        assert recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] == 4
        assert recipe["mixture"] == ["report=1", "multiple_choice=1"]  # every report, and as many questions
        assert recipe["lora_embeddings"] and recipe["lr_scheduler_type"] == "cosine"


def test_every_run_of_the_miniature_is_read_by_train(tmp_path):
    for run in all_runs().values():
        files = [str(RECIPES / "table3" / name) for name in (f"{run.recipe}.yaml", "phantoms.yaml")]
        overrides = [f"--{key}={value}" for key, value in {**run.overrides, "output_dir": tmp_path}.items()]
        model, data, tuning, _, training = parse_recipe(ARGUMENTS, ["--config", *files, *overrides])
        assert tuning.lora_rank == 0 and not training.bf16 and training.max_steps > 0
        assert data.cache_embeddings == ("slice_encoder" not in model.train_parts) and not data.mixture


def test_a_warmed_up_row_and_the_warm_up_have_the_same_positions():
    scope = read_recipe(RECIPES / "table3" / "warmup.yaml")["slice_position_scope"]
    for name in ROWS:
        recipe = read_recipe(RECIPES / "table3" / f"{name}.yaml")
        assert "aggregator" not in recipe or recipe["slice_position_scope"] == scope


# Launchers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: path.stem)
def test_accelerate_reads_the_launchers_file(launcher):
    """By accelerate's own classes; a key that they don't know would be an error."""
    config = load_config_from_file(str(launcher))
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}
    assert config.distributed_type.value == kinds[launcher.stem]
    assert config.mixed_precision == "bf16" and config.num_processes == 8
    flags = {option for action in launch_command_parser()._actions for option in action.option_strings}
    for key in (*config.fsdp_config, *config.deepspeed_config):
        assert f"--{key}" in flags or f"--{key.replace('zero_stage', 'zero-stage')}" in flags, key


def test_the_fsdp_launcher_shards_layers_that_the_model_has():
    settings = load_config_from_file(str(RECIPES / "accelerate" / "fsdp2.yaml")).fsdp_config
    with torch.device("meta"):
        model = SamfForConditionalGeneration(SamfConfig())
    layers = {type(module).__name__ for module in model.modules()}
    assert set(settings["fsdp_transformer_layer_cls_to_wrap"].split(",")) <= layers
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=settings["fsdp_version"],
        auto_wrap_policy=settings["fsdp_auto_wrap_policy"].lower(),
        transformer_cls_names_to_wrap=settings["fsdp_transformer_layer_cls_to_wrap"].split(","),
        reshard_after_forward=settings["fsdp_reshard_after_forward"],
        state_dict_type=settings["fsdp_state_dict_type"],
        cpu_ram_efficient_loading=settings["fsdp_cpu_ram_efficient_loading"],
    )
    plugin.set_auto_wrap_policy(model)
    assert plugin.fsdp_version == 2 and "FULL" in str(plugin.state_dict_type)


def test_zero_3_gathers_what_it_saves():
    settings = load_config_from_file(str(RECIPES / "accelerate" / "deepspeed_zero3.yaml")).deepspeed_config
    assert settings["zero_stage"] == 3 and settings["zero3_save_16bit_model"] and not settings["zero3_init_flag"]
