"""Table 3 in miniature: its recipes, and choices of ours, on phantoms over several seeds.

    python -m samf.data.phantom runs/phantoms --patients 500
    python -m samf.training.table3 --data runs/phantoms --seeds 0 1 2 --output runs/table3

A run is one recipe, or one of the variants of a recipe, with one seed; what is finished is kept, so a broken call goes on where
it ended; other settings need another output folder. `table.md` has the mean and standard deviation over the seeds.
"""

import argparse
import json
import logging
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from samf import train, warmup_aggregator
from samf.data.ct_rate import load_records
from samf.data.phantom_findings import DEMO_FINDINGS
from samf.data.slice_cache import SliceCache
from samf.demo import make_language_model
from samf.evaluation.generation import GenerationSettings, evaluate
from samf.evaluation.results_table import markdown_table
from samf.evaluation.scoring import write_atomic
from samf.modeling_samf import SamfForConditionalGeneration
from samf.processing_samf import SamfProcessor
from samf.recipe import read_recipe

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
ROWS = (
    *("samf_vit_frozen", "samf_aggregator_frozen", "samf_warmup", "samf_warmup_vit_frozen"),
    *("samf_warmup_aggregator_frozen", "samf_warmup_both_frozen", "ao2d_vit_frozen", "ao2d_aggregator_frozen"),
    *("ao2d_warmup", "ao2d_warmup_both_frozen", "ao2d_both_frozen", "slice_tokens"),
)
VARIANT_RECIPE = "samf_warmup_vit_frozen"  # its slice embeddings are made once
MAX_NEW_TOKENS = 200
# Figures of a run, and what stands above their columns.
COLUMNS = {
    "accuracy": "multiple choice",
    "finding_f1": "finding F1 (macro)",
    "own_loss": "held-out loss",
    "gap": "gap",
    "train_loss": "training loss",
    "alpha_entropy": "entropy of alpha",
    "alpha_largest": "largest alpha",
    "gamma_entropy": "entropy of gamma",
}


@dataclass(frozen=True)
class Run:
    """One line of the table.

    Args:
        recipe: of recipes/table3.
        overrides: keys given over it.
    """

    name: str
    recipe: str
    overrides: Mapping[str, str] = field(default_factory=dict)


def all_runs() -> dict[str, Run]:
    """Every row of the table, then each fusion with scores scaled or not, positions on or off, then the published leak."""
    runs = [Run(name, name) for name in ROWS]
    for fusion in ("samf", "ao2d", "slice_tokens"):
        for scaled in (False, True):
            for positions in (False, True):
                name = f"{fusion}{'_scaled' if scaled else '_unscaled'}{'_positions' if positions else ''}"
                choices = {"fusion_type": fusion, "slice_position_scope": "all" if positions else "none"}
                runs.append(Run(name, VARIANT_RECIPE, choices | ({"fusion_scale": "rsqrt"} if scaled else {})))
    leak = {"fusion_type": "ao2d", "slice_position_scope": "none", "fusion_text_scope": "sequence"}
    runs.append(Run("ao2d_unscaled_leak", VARIANT_RECIPE, leak))
    return {run.name: run for run in runs}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m samf.training.table3", description="Table 3 in miniature, on phantoms."
    )
    parser.add_argument("--data", type=Path, required=True, help="what python -m samf.data.phantom wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder of all that is made")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", default=list(all_runs()), help="some of them; default: all")
    parser.add_argument("--max_steps", type=int, help="of each run; default: the recipe's")
    parser.add_argument(
        "--language_steps", type=int, help="of the language model's training on text; default: the recipe's"
    )
    parser.add_argument("--warmup_steps", type=int, help="of the aggregator's warm-up; default: the recipe's")
    parser.add_argument("--valid_limit", type=int, help="held-out records that are answered; default: all")
    parser.add_argument("--list", action="store_true", help="write the runs' names and stop")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.runs) - set(all_runs()))
    if unknown:
        parser.error(f"--runs names {unknown}; the runs are {', '.join(all_runs())}")
    return args


# What all runs start from ---------------------------------------------------------------------------------------------


def call(script: Any, recipes: Sequence[Path], options: Mapping[str, Any]) -> None:
    """A script's main with recipes and overriding keys; None leaves a key to the recipes."""
    given = {key: value for key, value in options.items() if value is not None}
    tokens = [
        token
        for key, value in given.items()
        for token in ([f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"])
    ]
    script.main(["--config", *map(str, recipes), *tokens])


def prepare_language_model(args: argparse.Namespace) -> Path:
    """A tiny language model that can find a statement's finding among options, the same one for all runs."""
    target, start, trained = (args.output / name for name in ("text_model", "language_model", "language"))
    if (target / "config.json").is_file():
        return target
    make_language_model(start, args.data, seed=0)
    shutil.rmtree(trained, ignore_errors=True)
    options = {
        "data": args.data,
        "vqa_files": [args.data / "dataset" / "vqa" / "train_text_vqa.json"],
        "text_model": start,
        "slice_encoder": RECIPES / "demo" / "slice_encoder",
        "output_dir": trained,
        "max_steps": args.language_steps,
    }
    call(train, [RECIPES / "table3" / "phantom_language.yaml"], options)
    model = SamfForConditionalGeneration.from_pretrained(trained)
    alone = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(start))
    alone.base_model.load_state_dict(model.model.language_model.state_dict())
    alone.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    alone.generation_config = model.generation_config
    AutoTokenizer.from_pretrained(start).save_pretrained(target)
    alone.save_pretrained(target)
    return target


def prepare_warmup(args: argparse.Namespace, scope: str) -> Path:
    """A warmed-up aggregator with positions as `scope` says."""
    target = args.output / f"warmup_{scope}"
    if not (target / "trainer_state.json").is_file():
        shutil.rmtree(target, ignore_errors=True)
        options = {
            "data": [args.data],
            "slice_encoder": RECIPES / "demo" / "slice_encoder",
            "slice_cache": args.output / "cache",
            "slice_position_scope": scope,
            "output_dir": target,
            "max_steps": args.warmup_steps,
        }
        call(warmup_aggregator, [RECIPES / "warmup_phantoms.yaml"], options)
    return target


# One run --------------------------------------------------------------------------------------------------------------


def run_options(args: argparse.Namespace, run: Run, seed: int, folder: Path) -> dict[str, Any]:
    """The keys that a run has over its recipes."""
    recipe = read_recipe(RECIPES / "table3" / f"{run.recipe}.yaml") | dict(run.overrides)
    warm = prepare_warmup(args, recipe["slice_position_scope"]) if "aggregator" in recipe else None
    return {
        **run.overrides,
        "data": args.data,
        "text_model": prepare_language_model(args),
        "slice_encoder": RECIPES / "demo" / "slice_encoder",
        "slice_cache": args.output / "cache",
        "aggregator": warm,
        "output_dir": folder,
        "seed": seed,
        "max_steps": args.max_steps,
    }


def train_run(args: argparse.Namespace, run: Run, seed: int) -> dict[str, float]:
    """Train and evaluate; the figures, which stay in the run's folder."""
    folder = args.output / "runs" / f"{run.name}_seed{seed}"
    figures = folder / "figures.json"
    if figures.is_file():
        return json.loads(figures.read_text(encoding="utf-8"))
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off
    recipes = [RECIPES / "table3" / f"{run.recipe}.yaml", RECIPES / "table3" / "phantoms.yaml"]
    call(train, recipes, run_options(args, run, seed, folder))
    found = measure(args, folder)
    write_atomic(figures, json.dumps(found, indent=2) + "\n")
    return found


def measure(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Answers to held-out reports and questions, and the last losses and entropies of the log."""
    model, processor = SamfForConditionalGeneration.from_pretrained(folder), SamfProcessor.from_pretrained(folder)
    records = load_records(str(args.data), "valid", tasks=("report", "multiple_choice"), finding_names=DEMO_FINDINGS)
    records = records.shuffle(seed=0).select(range(min(len(records), args.valid_limit or len(records))))
    results = evaluate(
        model,
        processor,
        records,
        folder / "evaluation",
        GenerationSettings(batch_size=32, max_new_tokens=MAX_NEW_TOKENS),
        finding_names=DEMO_FINDINGS,
        scoring={"resamples": 0},
        slice_cache=SliceCache(args.output / "cache", processor.image_processor),
    )["tasks"]
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    log = {key: value for row in state["log_history"] for key, value in row.items()}
    figures = {
        "accuracy": results["multiple_choice"]["multiple_choice"]["accuracy"],
        "finding_f1": results["report"]["findings"]["macro"]["f1"],
        "own_loss": log.get("eval_own_loss"),
        "gap": log.get("eval_gap"),
        "train_loss": log.get("loss"),
        **{name: log.get(f"eval_own_{name}") for name in COLUMNS if name.startswith(("alpha", "gamma"))},
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


# The table --------------------------------------------------------------------------------------------------------------


def table_rows(results: Mapping[str, Sequence[Mapping[str, float]]]) -> Iterator[list[str]]:
    """A row for each run: its name, its number of seeds, mean ± standard deviation of each figure."""
    for name, seeds in results.items():
        cells = []
        for column in COLUMNS:
            values = [figures[column] for figures in seeds if column in figures]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
        yield [name, str(len(seeds)), *cells]


def write_table(output: Path, results: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    table = markdown_table(["run", "seeds", *COLUMNS.values()], list(table_rows(results)))
    write_atomic(output / "table.md", table + "\n")
    write_atomic(output / "table.json", json.dumps(results, indent=2) + "\n")
    return table


def check_settings(args: argparse.Namespace) -> None:
    """Note what all runs of an output folder share.

    Raises:
        ValueError: the folder holds runs of other settings.
    """
    file = args.output / "settings.json"
    settings = {name: getattr(args, name) for name in ("max_steps", "language_steps", "warmup_steps", "valid_limit")}
    settings = {"data": str(args.data.resolve()), **settings}
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        other = [
            f"{name} ({found.get(name)}, now {value})" for name, value in settings.items() if found.get(name) != value
        ]
        if other:
            raise ValueError(f"{args.output} holds runs of other settings: {', '.join(other)}. Give another --output.")
    write_atomic(file, json.dumps(settings, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    if args.list:
        sys.stdout.write("\n".join(args.runs) + "\n")
        return
    args.output.mkdir(parents=True, exist_ok=True)
    check_settings(args)
    results: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:  # every run once before any has a second seed
        for name in args.runs:
            results.setdefault(name, []).append(train_run(args, all_runs()[name], seed))
            write_table(args.output, results)
    sys.stdout.write(write_table(args.output, results) + "\n")


if __name__ == "__main__":
    main()
