"""Shared parts of the experiments on phantoms: runs of scripts, a small language model, metrics, a table over seeds."""

import argparse
import json
import shutil
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

import datasets
import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from samf import train
from samf.cache.slice_cache import SliceCache
from samf.data.collator import SamfCollator
from samf.data.loading import load_records
from samf.evaluation.answering.generation import GenerationSettings, evaluate
from samf.evaluation.markdown import markdown_table
from samf.evaluation.scoring_options import ScoringOptions
from samf.experiments.demo import make_language_model
from samf.model.modeling_samf import SamfForConditionalGeneration
from samf.model.processing_samf import SamfProcessor
from samf.phantoms.findings import DEMO_FINDINGS
from samf.utils.files import atomic_write, write_json
from samf.utils.packaged import RECIPES

MAX_NEW_TOKENS = 200
_LOSS_RECORDS = 200  # records of the logged losses: valid_limit of recipes/table3/phantoms.yaml
# Metric of a run of stage 3 → title of its column.
COLUMNS = {
    "accuracy": "multiple choice",
    "finding_f1": "finding F1 (macro)",
    "own_loss": "held-out loss",
    "hidden_loss": "held-out loss, answer hidden",
    "gap": "gap",
    "train_loss": "training loss",
    "alpha_entropy": "entropy of alpha",
    "alpha_largest": "largest alpha",
    "gamma_entropy": "entropy of gamma",
}

Metrics = dict[str, float]
# Recipe keys that override a recipe's; None leaves a key to the recipe.
Options: TypeAlias = Mapping[str, str | int | float | Path | Sequence[str | Path] | None]


class Script(Protocol):
    """A script with a command line, such as train.py."""

    def main(self, argv: list[str] | None = None) -> object:
        """Run the script."""
        ...


def add_common_arguments(parser: argparse.ArgumentParser, steps: Mapping[str, int] | None = None) -> None:
    """Add the folders, the seeds and the numbers of steps, which `open_output` and the functions below read.

    Args:
        parser: of the experiment.
        steps: argument → number of steps that replaces the recipe's.
    """
    parser.add_argument("--data", type=Path, required=True, help="output of python -m samf.phantoms.dataset")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--valid_limit", type=int, help="held-out records that are answered; default: all")
    stages = {
        "max_steps": "each run of stage 3",
        "language_steps": "the language model's training on text",
        "warmup_steps": "the aggregator's warm-up",
    }
    for name, stage in stages.items():
        default = (steps or {}).get(name)
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"of {stage}; default: {default or 'the recipe'}"
        )


def open_output(args: argparse.Namespace, settings: Sequence[str]) -> None:
    """Create the output folder and save in it the `settings`, names in `args`, that all its runs share.

    Raises:
        ValueError: the folder holds runs of other settings.
    """
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "settings.json"
    shared = {"data": str(args.data.resolve()), **{name: getattr(args, name) for name in settings}}
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        other = [
            f"{name} ({found.get(name)}, now {value})" for name, value in shared.items() if found.get(name) != value
        ]
        if other:
            raise ValueError(f"{args.output} holds runs of other settings: {', '.join(other)}. Give another --output.")
    write_json(file, shared)


# --- Stages -----------------------------------------------------------------------------------------------------------


def call(script: Script, recipes: Sequence[Path], options: Options) -> None:
    """Run a script's `main`.

    Args:
        script: the script.
        recipes: for --config; later ones take precedence.
        options: keys that override the recipes.
    """
    given = {key: value for key, value in options.items() if value is not None}
    tokens = [
        token
        for key, value in given.items()
        for token in ([f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"])
    ]
    script.main(["--config", *map(str, recipes), *tokens])


def run_stage(script: Script, recipes: Sequence[Path], folder: Path, options: Options) -> Path:
    """Run a script unless its result exists.

    Args:
        script: the script.
        recipes: see `call`.
        folder: output folder of the script.
        options: see `call`.

    Returns:
        `folder`.
    """
    if not (folder / "trainer_state.json").is_file():
        call(script, recipes, {**options, "output_dir": folder})
    return folder


def prepare_language_model(args: argparse.Namespace) -> Path:
    """Train the tiny language model of all runs, which can find a statement's finding among options, unless it exists."""
    target, start, trained = (args.output / name for name in ("text_model", "language_model", "language"))
    if (target / "config.json").is_file():
        return target
    make_language_model(start, args.data, seed=0)
    shutil.rmtree(trained, ignore_errors=True)
    options = {
        "data": args.data,
        "vqa_files": [args.data / "dataset" / "vqa" / "train_text_vqa.json"],
        "text_model": start,
        "slice_encoder": RECIPES / "demo" / "slice_encoder",  # not used by text
        "output_dir": trained,
        "max_steps": args.language_steps,
    }
    call(train, [RECIPES / "table3" / "phantom_language.yaml"], options)
    model = SamfForConditionalGeneration.from_pretrained(trained)
    text_model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(start))
    text_model.base_model.load_state_dict(model.model.language_model.state_dict())
    text_model.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    text_model.generation_config = model.generation_config
    AutoTokenizer.from_pretrained(start).save_pretrained(target)
    text_model.save_pretrained(target)
    return target


def train_run(args: argparse.Namespace, recipe: str, folder: Path, options: Options) -> Metrics:
    """Train stage 3 and `measure` it, unless figures.json of a finished run exists in its folder.

    Args:
        args: common arguments.
        recipe: name in recipes/table3.
        folder: output folder of the run.
        options: keys that override the recipe.
    """
    file = folder / "figures.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
    common = {
        "data": args.data,
        "text_model": prepare_language_model(args),
        "slice_cache": args.output / "cache",
        "output_dir": folder,
        "max_steps": args.max_steps,
    }
    call(train, [RECIPES / "table3" / f"{recipe}.yaml", RECIPES / "table3" / "phantoms.yaml"], {**common, **options})
    found = measure(args, folder)
    write_json(file, found)
    return found


# --- Metrics ----------------------------------------------------------------------------------------------------------


def logged(folder: Path, name: str) -> list[float]:
    """Return the values of a metric in a run's log, in the order of its steps."""
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return [row[name] for row in state["log_history"] if name in row]


def measure(args: argparse.Namespace, folder: Path) -> Metrics:
    """Score answers to held-out records, and read the last losses and entropies of the log; names as in `COLUMNS`."""
    model, processor = SamfForConditionalGeneration.from_pretrained(folder), SamfProcessor.from_pretrained(folder)
    records = load_records(str(args.data), "valid", tasks=("report", "multiple_choice"), finding_names=DEMO_FINDINGS)
    records = records.shuffle(seed=0).select(range(min(len(records), args.valid_limit or len(records))))
    cache = SliceCache(args.output / "cache", processor.image_processor)
    results = evaluate(
        model,
        processor,
        records,
        folder / "evaluation",
        GenerationSettings(batch_size=32, max_new_tokens=MAX_NEW_TOKENS),
        scoring=ScoringOptions(finding_names=list(DEMO_FINDINGS), resamples=0),
        volume_store=cache,
    )["tasks"]
    hidden = {}
    if model.config.fusion_text_scope == "sequence":  # the logged loss had the answer in its image tokens
        hidden["hidden_loss"] = loss_with_answers_hidden(model, processor, records, cache)
    names = {"own_loss": "eval_own_loss", "gap": "eval_gap", "train_loss": "loss"}
    names |= {name: f"eval_own_{name}" for name in COLUMNS if name.startswith(("alpha", "gamma"))}
    return {
        "accuracy": results["multiple_choice"]["multiple_choice"]["accuracy"],
        "finding_f1": results["report"]["findings"]["macro"]["f1"],
        **hidden,
        **{name: values[-1] for name, key in names.items() if (values := logged(folder, key))},
    }


@torch.no_grad()
def loss_with_answers_hidden(
    model: SamfForConditionalGeneration, processor: SamfProcessor, records: datasets.Dataset, cache: SliceCache
) -> float:
    """Return the loss of the answers when the fusion reads only the prompt, as in inference.

    Args:
        model: its `fusion_text_scope` is set to "prompt".
        processor: of the model.
        records: held-out records; the first `_LOSS_RECORDS` are used.
        cache: slices of their volumes.
    """
    model.config.fusion_text_scope = "prompt"
    records = records.select(range(min(len(records), _LOSS_RECORDS))).remove_columns("finding_labels")
    loss, tokens = 0.0, 0
    for batch in DataLoader(records, batch_size=32, collate_fn=SamfCollator(processor, volume_store=cache)):
        count = int((batch["labels"] != -100).sum())
        loss, tokens = loss + model(**batch).loss.item() * count, tokens + count
    return loss / tokens


def table_rows(results: Mapping[str, Sequence[Metrics]], columns: Iterable[str]) -> Iterator[list[str]]:
    """Yield a row for each run: its name, its number of seeds, mean ± standard deviation of each metric."""
    for name, seeds in results.items():
        cells = []
        for column in columns:
            values = [metrics[column] for metrics in seeds if column in metrics]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
        yield [name, str(len(seeds)), *cells]


def write_table(
    output: Path, results: Mapping[str, Sequence[Metrics]], columns: Mapping[str, str] = COLUMNS, stem: str = "table"
) -> str:
    """Write the table as Markdown and its data as JSON.

    Args:
        output: folder.
        results: run → metrics of each seed.
        columns: metric → title of its column.
        stem: name of both files, without suffix.

    Returns:
        The table.
    """
    table = markdown_table(["run", "seeds", *columns.values()], list(table_rows(results, columns)))
    atomic_write(output / f"{stem}.md", table + "\n")
    write_json(output / f"{stem}.json", results)
    return table
