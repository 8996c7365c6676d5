"""How many equal image tokens does the paper's fusion need? 1, 8, 32 or 256 of them, on phantoms, over several seeds.

    python -m samf.phantoms.dataset runs/phantoms --patients 500
    python -m samf.experiments.image_tokens --data runs/phantoms --output runs/image_tokens

SAMF + Ao2D gives one fused vector, which the prompt repeats. All runs start from one trained model, by default the package's
demo model, whose fusion is replaced by a new Ao2D fusion; stage 3 trains it with each number of image tokens and each seed,
and answers held-out phantoms. Finished runs are kept, so that an interrupted experiment resumes. `table.md` has means and
standard deviations over the seeds.
"""

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import set_seed

from samf import train
from samf.experiments.demo import DEMO_RECIPES
from samf.experiments.phantoms import COLUMNS, Metrics, call, logged, measure, open_output, write_table
from samf.model.modeling_samf import SamfForConditionalGeneration
from samf.model.modules_samf import SamfFusion
from samf.model.processing_samf import SamfProcessor
from samf.utils.files import write_json
from samf.utils.packaged import DEMO_MODEL

IMAGE_TOKENS = (1, 8, 32, 256)
SETTINGS = ("model", "max_steps", "batch_size", "valid_limit")
_SHOWN = ("accuracy", "finding_f1", "own_loss", "gap", "train_loss")
_COLUMNS = {**{name: COLUMNS[name] for name in _SHOWN}, "seconds": "seconds of training"}
_LOSS_RECORDS = 96


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m samf.experiments.image_tokens",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="output of python -m samf.phantoms.dataset")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--model", default=str(DEMO_MODEL), help="trained on other phantoms than the held-out ones")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the new fusion and of the batches")
    parser.add_argument("--image_tokens", type=int, nargs="+", default=list(IMAGE_TOKENS))
    parser.add_argument("--max_steps", type=int, default=400, help="of each run")
    parser.add_argument("--batch_size", type=int, default=16, help="records per step")
    parser.add_argument("--valid_limit", type=int, help="held-out records that are answered; default: all")
    return parser.parse_args(argv)


def write_start(source: str, folder: Path, tokens: int, seed: int) -> None:
    """Save a model with a new Ao2D fusion and another number of image tokens, and its processor.

    Args:
        source: folder or Hub id of the model.
        folder: where the changed one is saved.
        tokens: equal image tokens per volume.
        seed: of the fusion's weights, which don't depend on `tokens`.
    """
    model, processor = SamfForConditionalGeneration.from_pretrained(source), SamfProcessor.from_pretrained(source)
    model = model.float()
    # Unscaled scores, as in the paper.
    model.config.update({"fusion_type": "ao2d", "fusion_scale": None, "num_image_tokens": tokens})
    set_seed(seed)
    model.model.fusion = SamfFusion(model.config)
    model.model.fusion.apply(model._init_weights)
    processor.num_image_tokens = tokens
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def run_metrics(args: argparse.Namespace, tokens: int, seed: int) -> Metrics:
    """Train a model and measure it, unless it is finished.

    Args:
        args: arguments of the experiment.
        tokens: equal image tokens per volume.
        seed: of the fusion's weights and of the batches.
    """
    folder = args.output / f"tokens{tokens}_seed{seed}"
    file = folder / "figures.json"
    if file.is_file():
        metrics: Metrics = json.loads(file.read_text(encoding="utf-8"))
        return metrics
    start = folder.with_name(f"{folder.name}_start")
    for unfinished in (folder, start):
        shutil.rmtree(unfinished, ignore_errors=True)
    write_start(args.model, start, tokens, seed)
    options = {
        "model": start,
        "data": args.data,
        "slice_cache": args.output / "cache",
        "output_dir": folder,
        "max_steps": args.max_steps,
        "per_device_train_batch_size": args.batch_size,
        "do_eval": "true",
        "eval_strategy": "no",
        "valid_limit": _LOSS_RECORDS,
        "seed": seed,
    }
    call(train, [DEMO_RECIPES / "3_report.yaml"], options)
    metrics = {**measure(args, folder), "seconds": logged(folder, "train_runtime")[-1]}
    write_json(file, metrics)
    shutil.rmtree(start)
    return metrics


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment and print its table."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    open_output(args, SETTINGS)
    results: dict[str, list[Metrics]] = {}
    for seed in args.seeds:  # every number once before any has a second seed
        for tokens in args.image_tokens:
            results.setdefault(str(tokens), []).append(run_metrics(args, tokens, seed))
            table = write_table(args.output, results, _COLUMNS)
    sys.stdout.write(table + "\n")


if __name__ == "__main__":
    main()
