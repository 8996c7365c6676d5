"""Stage 3: train a SAMF model on reports and questions.

    python train.py --config recipes/ct_rate_ao2d.yaml --data /data/CT-RATE --output_dir runs/ao2d
    accelerate launch --config_file recipes/accelerate/ddp.yaml train.py --config recipes/ct_rate_ao2d.yaml …

A recipe is one YAML file; the command line overrides its keys. A new model is built from `--slice_encoder` and
`--text_model`; `--model` continues one. `--lora_rank 16` trains an adapter on the language model, and `--merge true` also
writes the model with the adapter merged into it. The output folder is a complete Hub repository: weights, code, processor
and model card. Ctrl-C and SIGTERM save a checkpoint; `--resume_from_checkpoint last` resumes from the newest one.
"""

import logging
import sys
from pathlib import Path

from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.integrations import unset_hf_deepspeed_config

from samf.data.collator import SamfCollator
from samf.data.schema import VolumeStore
from samf.data.volume_discovery import distinct_volumes
from samf.evaluation.answering.generation import GenerationSettings
from samf.model.model_card import hub_id
from samf.model.processing_samf import SamfProcessor
from samf.training.adapter import BASE, MERGED, add_lora, cast_trained, merge_adapter, save_base
from samf.training.arguments import DataArguments, ModelArguments, MonitorArguments, TuningArguments
from samf.training.checkpoints import checkpoint_to_resume
from samf.training.datasets import TrainerDatasets, build_mixture, has_text_only_records, load_datasets
from samf.training.factory import apply_liger, build_model, build_processor
from samf.training.launchers import check_launcher, refuse_unsharded_options
from samf.training.repository import card_settings, write_run_record
from samf.training.sample_generation import SampleWriter, choose_samples
from samf.training.shard_order import build_window
from samf.training.skipping import skip_unreadable
from samf.training.throughput import CountingCollator
from samf.training.trackers import keep_trackers_private
from samf.training.trainer import SamfTrainer, save_repository
from samf.training.trainer_base import train_to_end
from samf.training.volume_stores import build_volume_store, open_shards
from samf.utils.distributed import Processes, leaves_processes
from samf.utils.recipe import parse_recipe, recipes_of
from samf.utils.script_errors import input_errors

SCRIPT = "train.py"
ARGUMENTS = (ModelArguments, DataArguments, TuningArguments, MonitorArguments, TrainingArguments)


def wrap_model(
    model: PreTrainedModel,
    processor: SamfProcessor,
    model_args: ModelArguments,
    tuning: TuningArguments,
    training: TrainingArguments,
) -> PreTrainedModel:
    """Return the model with its kernels, its adapter and the precision of its trained weights.

    Args:
        model: The model to train.
        processor: Saved with the adapter's base model.
        model_args: Name the model and its trained parts.
        tuning: Settings of the adapter and precision.
        training: Arguments of the run; `use_liger_kernel` is reset.

    Raises:
        ValueError: The options don't go together.
    """
    if training.use_liger_kernel:
        apply_liger(model)
        training.use_liger_kernel = False  # Trainer looks kernels up by the whole model's type and finds none
    if tuning.lora_rank:
        base = model_args.model
        if base is None:
            base = Path(training.output_dir, BASE).resolve()
            processes = Processes()
            with processes.main_process_first():
                if processes.is_first:
                    save_base(model, processor, base)
        if training.push_to_hub and hub_id(str(base)) is None:
            raise ValueError(
                f"push_to_hub would push an adapter whose base model is {base}, a local folder: others couldn't load "
                "it. Push the base model first and continue it by its Hub id (--model), or train without push_to_hub, with "
                "--merge true, and push the merged folder."
            )
        model = add_lora(model, tuning, model_args.train_parts, base)
    if tuning.trained_dtype is not None:
        cast_trained(model, tuning.trained_dtype)
    return model


def build_samples(
    monitor: MonitorArguments,
    data: TrainerDatasets,
    processor: SamfProcessor,
    store: VolumeStore | None,
    training: TrainingArguments,
) -> SampleWriter | None:
    """Return the writer of sample answers at every evaluation; None without samples or without validation records.

    Args:
        monitor: Number of samples, and their length.
        data: Has the validation records.
        processor: Of the model.
        store: Prepared volumes; None = read from their files.
        training: Arguments of the run.
    """
    if not monitor.generate_samples or data["eval_dataset"] is None:
        return None
    if training.push_to_hub:
        keep_trackers_private(training.output_dir)
    return SampleWriter(
        choose_samples(data["eval_dataset"]["own"], monitor.generate_samples),
        processor,
        Path(training.output_dir),
        GenerationSettings(batch_size=training.per_device_eval_batch_size, max_new_tokens=monitor.generate_tokens),
        monitor.shown_samples,
        store,
    )


def configure(
    training: TrainingArguments,
    model_args: ModelArguments,
    data_args: DataArguments,
    tuning: TuningArguments,
    monitor: MonitorArguments,
) -> None:
    """Refuse what the launcher can't do and set the arguments that follow from others, before anything is loaded.

    Args:
        training: Get the checkpoint to resume from and the options of SAMF's batches.
        model_args: Get the adapter's own base model where an adapter's training resumes.
        data_args: Name the objective.
        tuning: Settings of the adapter.
        monitor: Number of samples.

    Raises:
        ValueError: The launcher can't do what the arguments ask for.
    """
    check_launcher(training)
    refuse_unsharded_options(training, samples=bool(monitor.generate_samples), merge=tuning.merge)
    set_seed(training.seed)
    training.remove_unused_columns = False
    training.prediction_loss_only = True
    # With both names, Trainer would report no loss for evaluation batches that lack one of them.
    training.label_names = ["finding_targets"] if data_args.objective == "findings" else ["labels"]
    base = Path(training.output_dir, BASE)
    training.resume_from_checkpoint = checkpoint_to_resume(training)
    if tuning.lora_rank and training.resume_from_checkpoint and (base / "config.json").is_file():
        model_args.model = str(base.resolve())
    # Otherwise ZeRO-3 shards each component as it loads, whatever its zero3_init_flag says; Trainer sets this again.
    unset_hf_deepspeed_config()


def finish(trainer: SamfTrainer, merge: bool) -> None:
    """Evaluate if training didn't, and save the repository.

    Args:
        trainer: After training.
        merge: Whether to also write the model with its adapter merged.
    """
    training = trainer.args
    if training.do_eval and training.eval_strategy == "no":
        try:
            trainer.evaluate()  # before the card, which states its losses
        except Exception:
            save_repository(trainer)  # a failed evaluation must not lose the trained weights
            raise
    save_repository(trainer)
    if merge and trainer.is_world_process_zero():
        merge_adapter(training.output_dir, Path(training.output_dir, MERGED))


@leaves_processes
def main(argv: list[str] | None = None) -> None:
    """Train from a recipe and the command line."""
    with input_errors(SCRIPT):
        model_args, data_args, tuning, monitor, training = parse_recipe(ARGUMENTS, argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    card = card_settings(model_args, data_args)
    configure(training, model_args, data_args, tuning, monitor)
    processor = build_processor(model_args)
    model = build_model(model_args, processor)
    with input_errors(SCRIPT):
        shards = open_shards(data_args, model, processor, model_args.train_parts)
        data = load_datasets(
            data_args,
            processor,
            model.config.finding_names,
            with_lengths=data_args.sort_steps or training.train_sampling_strategy == "group_by_length",
            with_valid=training.do_eval or training.eval_on_start,
            output_dir=training.output_dir,
            shards=shards,
        )
    # A batch without volumes or without labels uses only a part of the model; with checkpointing Trainer's default is False.
    if training.ddp_find_unused_parameters is None and (
        model.config.finding_names or has_text_only_records(data["train_dataset"])
    ):
        training.ddp_find_unused_parameters = True
    mixture = build_mixture(data_args, data["train_dataset"], training)
    measured = [data["eval_dataset"]["own"]] if data["eval_dataset"] else []
    store: VolumeStore | None = shards
    if shards is None:
        volumes = distinct_volumes(data["train_dataset"], *measured) if data_args.slice_cache else []
        store = build_volume_store(data_args, model, processor, model_args.train_parts, volumes, training.device)
    findings_only = data_args.objective == "findings"
    collator = SamfCollator(processor, volume_store=store, max_length=data_args.max_length, findings_only=findings_only)
    trainer = SamfTrainer(
        card=card,
        rates=tuning.learning_rates,
        monitor=monitor,
        mixture=mixture,
        sort_steps=data_args.sort_steps,
        window=build_window(data_args, shards, data["train_dataset"]),
        samples=None if findings_only else build_samples(monitor, data, processor, store, training),
        model=wrap_model(model, processor, model_args, tuning, training),
        args=training,
        processing_class=processor,
        data_collator=CountingCollator(skip_unreadable(collator, data_args.on_error, data["train_dataset"])),
        **data,
    )
    if trainer.is_world_process_zero():
        write_run_record(training, data_args, tuning, recipes_of(argv), data)
    train_to_end(trainer)
    finish(trainer, tuning.merge)


if __name__ == "__main__":
    main(sys.argv[1:])
