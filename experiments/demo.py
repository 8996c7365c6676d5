"""The whole system on phantoms: a report by the demo model; then draw phantoms, train a tiny SAMF in stages, evaluate it.

    python -m samf.experiments.demo                    # or: make demo, samf demo
    python -m samf.experiments.demo --ct scan.nii.gz   # also reports for a file or DICOM folder; make demo CT=scan.nii.gz

Finished stages under `--output` are kept: an interrupted run resumes.
"""

import argparse
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset
from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM, set_seed
from transformers.utils import logging as transformers_logging

from samf import SamfForConditionalGeneration, SamfProcessor, SamfReportPipeline, read_ct, train
from samf.cache.embedding_cache import EmbeddingCache
from samf.cache.slice_cache import SliceCache
from samf.data.loading import load_records
from samf.data.prompts import REPORT_QUESTION, record_conversation, record_prompt
from samf.evaluation.answering.generation import GenerationSettings, evaluate, shuffle_volumes
from samf.evaluation.markdown import format_value, markdown_table
from samf.evaluation.prediction_rows import read_predictions
from samf.evaluation.schema import Results
from samf.evaluation.scoring_options import ScoringOptions
from samf.model.report_samf import DISCLAIMER
from samf.phantoms.dataset import DEMO_FINDINGS, PhantomSettings, write_dataset
from samf.phantoms.single import write_phantom
from samf.phantoms.tokenizer import train_small_tokenizer
from samf.reporting.slice_view import save_slice_image
from samf.utils.packaged import DEMO_MODEL, RECIPES

DEMO_RECIPES = RECIPES / "demo"
STAGES = ("1_aggregator", "2_language", "3_report")
MAX_NEW_TOKENS = 200
_TEXT_QUESTIONS = 20_000


Volumes = Literal["own", "shuffled"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs", "demo"), help="folder for all output")
    parser.add_argument("--train_patients", type=int, default=400)
    parser.add_argument("--valid_patients", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of phantoms, weights and batches")
    parser.add_argument("--max_steps", type=int, help="steps of each stage; a few to check that everything runs")
    parser.add_argument("--ct", type=Path, help="CT file or DICOM folder to write reports for")
    return parser.parse_args(argv)


def say(text: str) -> None:
    """Print a text at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@contextmanager
def step(name: str) -> Iterator[None]:
    """Print when a step begins and how long it takes."""
    say(f"\n=== {name}")
    started = time.monotonic()
    yield
    say(f"=== {name}: {time.monotonic() - started:.0f} s")


def report_at_once(output: Path, seed: int, ct: Path | None) -> None:
    """Print the demo model's report of a phantom, and of a CT.

    Args:
        output: folder for all output.
        seed: of the phantom.
        ct: file or DICOM folder.
    """
    phantom = output / "phantom.nii.gz"
    shown = write_phantom(phantom, seed)
    model = SamfForConditionalGeneration.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    reporter = SamfReportPipeline(model=model, processor=SamfProcessor.from_pretrained(DEMO_MODEL))
    say(f"\nReport of {phantom}, which shows: {shown}\n  {reporter(str(phantom))}")
    if ct is not None:
        say(f"\nReport of {ct}:\n  {reporter(str(ct))}")
    say(f"{model.config.caution} {DISCLAIMER}")


def make_language_model(folder: Path, data: Path, seed: int) -> None:
    """Save a Phi-3 of 0.7 million random weights, and a tokenizer trained on the phantoms' training texts.

    Args:
        folder: where they are saved.
        data: folder of the phantoms.
        seed: of the weights.
    """
    records = load_records(str(data), "train", tasks=("report", "multiple_choice"), finding_names=DEMO_FINDINGS)
    texts = [text for record in records for text in (record_prompt(record), record["answer"])]
    tokenizer = train_small_tokenizer(texts)
    set_seed(seed)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "<|endoftext|>")]
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        tie_word_embeddings=True,
        initializer_range=0.08,  # about 1/sqrt(width); 0.02 suits real widths and trains slowly here
        max_position_embeddings=1024,
        original_max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends[0],
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Phi3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, max_new_tokens=MAX_NEW_TOKENS
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_stages(output: Path, data: Path, seed: int, max_steps: int | None) -> Path:
    """Run the three recipes one after the other, except finished ones.

    Args:
        output: folder for all output.
        data: folder of the phantoms.
        seed: of weights and batches.
        max_steps: steps of each stage; None for the recipes'.

    Returns:
        Folder of the last stage's model.
    """
    previous = None
    for stage in STAGES:
        folder = output / ("model" if stage == STAGES[-1] else stage)
        if not (folder / "trainer_state.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
            options = {"data": data, "output_dir": folder, "seed": seed, **stage_inputs(stage, output, data, previous)}
            if max_steps is not None:
                options["max_steps"] = max_steps
            with step(f"train {stage}"):
                overrides = [f"--{key}={value}" for key, value in options.items()]
                train.main(["--config", str(DEMO_RECIPES / f"{stage}.yaml"), *overrides])
        previous = folder
    return previous


def stage_inputs(stage: str, output: Path, data: Path, previous: Path | None) -> dict[str, Path]:
    """Return the recipe keys of what a stage starts from and reads.

    Args:
        stage: name of the recipe.
        output: folder for all output.
        data: folder of the phantoms.
        previous: model of the stage before; None for the first.
    """
    if previous is None:
        start = {"slice_encoder": DEMO_RECIPES / "slice_encoder", "text_model": output / "language_model"}
    else:
        start = {"model": previous}
    if stage == "2_language":
        return {**start, "vqa_files": data / "dataset" / "vqa" / "train_text_vqa.json"}
    return {**start, "slice_cache": output / "cache"}


def evaluate_twice(
    model: SamfForConditionalGeneration, processor: SamfProcessor, output: Path, data: Path
) -> dict[Volumes, Results]:
    """Score held-out patients with each patient's own volume ("own") and with another patient's ("shuffled").

    Args:
        model: trained on phantoms.
        processor: of the model.
        output: folder for all output.
        data: folder of the phantoms.
    """
    records = load_records(str(data), "valid", tasks=("report", "multiple_choice"), finding_names=DEMO_FINDINGS)
    volumes = EmbeddingCache(output / "cache", SliceCache(output / "cache", processor.image_processor), model.model)
    settings = GenerationSettings(batch_size=32, max_new_tokens=MAX_NEW_TOKENS)
    results: dict[Volumes, Results] = {}
    asked_records: dict[Volumes, Dataset] = {"own": records, "shuffled": shuffle_volumes(records)}
    for name, asked in asked_records.items():
        results[name] = evaluate(
            model,
            processor,
            asked,
            output / f"evaluation_{name}",
            settings,
            scoring=ScoringOptions(finding_names=list(DEMO_FINDINGS)),
            volume_store=volumes,
        )
    return results


def metric_values(results: Mapping[Volumes, Results]) -> list[tuple[str, float | None, float | None]]:
    """Return each metric's name, its value with own volumes, and its value with shuffled ones."""
    own, shuffled = results["own"]["tasks"], results["shuffled"]["tasks"]
    findings = [tasks["report"]["findings"] for tasks in (own, shuffled)]
    rows = [("reports: findings, macro-F1", *(found["macro"]["f1"] for found in findings))]
    for name in DEMO_FINDINGS:
        rows.append((f"reports: {name}, F1", *(found["per_finding"][name]["f1"] for found in findings)))
    choices = [tasks["multiple_choice"]["multiple_choice"] for tasks in (own, shuffled)]
    rows.append(("multiple choice: accuracy (chance 0.25)", *(choice["accuracy"] for choice in choices)))
    rows.append(("reports: BLEU-4", *(tasks["report"]["text"]["bleu_4"] for tasks in (own, shuffled))))
    return rows


def results_rows(results: Mapping[Volumes, Results]) -> list[list[str]]:
    """Return `metric_values` as text, one row per metric."""
    return [[name, *map(format_value, values)] for name, *values in metric_values(results)]


def write_report(model: SamfForConditionalGeneration, processor: SamfProcessor, ct: Path, image: Path) -> str:
    """Return the model's report for a CT, and save an image of the slices that it read.

    Args:
        model: trained model.
        processor: of the model.
        ct: file or DICOM folder.
        image: PNG to write.
    """
    slices = processor.image_processor.extract(read_ct(ct))
    save_slice_image(slices, image, image_processor=processor.image_processor, window=1)
    conversation = record_conversation({"question": REPORT_QUESTION, "choices": None}, slices)
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


def main(argv: list[str] | None = None) -> None:
    """Run the demo."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    transformers_logging.set_verbosity_error()
    output, data = args.output, args.output / "phantoms"
    with step("report, by the demo model of the package"):
        report_at_once(output, args.seed, args.ct)
    with step("draw phantoms"):
        write_dataset(
            data,
            train_patients=args.train_patients,
            valid_patients=args.valid_patients,
            settings=PhantomSettings(seed=args.seed),
            text_questions=_TEXT_QUESTIONS,
        )
    if not (output / "language_model" / "config.json").is_file():
        make_language_model(output / "language_model", data, args.seed)
    folder = train_stages(output, data, args.seed, args.max_steps)
    model, processor = SamfForConditionalGeneration.from_pretrained(folder), SamfProcessor.from_pretrained(folder)
    with step("evaluate on held-out patients"):
        results = evaluate_twice(model, processor, output, data)
    say("\n" + markdown_table(["held-out phantoms", "own volume", "another patient's"], results_rows(results)))
    example = next(
        row for row in read_predictions(output / "evaluation_own" / "predictions.jsonl") if row["task"] == "report"
    )
    volume = next(iter((data / "dataset" / "valid_fixed").rglob(f"{example['scan_id']}_1.nii.gz")))
    report = write_report(model, processor, volume, output / "slices.png")
    say(
        f"\nReport for {volume.name}:\n  {report}\nReference:\n  {example['reference']}\nIts slices: {output / 'slices.png'}"
    )
    if args.ct:
        image = output / f"{args.ct.name}.png"
        report = write_report(model, processor, args.ct, image)
        say(f"\nReport for {args.ct}, by a model trained only on phantoms:\n  {report}\nIts slices: {image}")
    say(
        f"\nThe model: {folder}. Load it with AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)."
    )
    say(DISCLAIMER)


if __name__ == "__main__":
    main()
