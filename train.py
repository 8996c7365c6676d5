"""Stage 3: train a SAMF model on reports and questions.

    python train.py --config recipes/ct_rate_ao2d.yaml --data /data/CT-RATE --output_dir runs/ao2d

A recipe is one YAML file; every key can be given again on the command line, which wins. A new model is built from
`--slice_encoder` and `--text_model`; `--model` continues one. The output folder is a complete Hub repository: weights,
code, processor and model card.
"""

import dataclasses
import logging
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi
from transformers import AutoTokenizer, Trainer, TrainerState, TrainingArguments, set_seed

from samf.configuration_samf import SamfConfig
from samf.data.collator import SamfCollator, VolumeStore
from samf.data.ct_rate import check_patient_overlap, load_records
from samf.data.embedding_cache import EmbeddingCache, VolumeKey
from samf.data.prompts import record_prompt
from samf.data.slice_cache import SliceCache
from samf.evaluation.generation import shuffle_volumes
from samf.hub_samf import has_own_card
from samf.image_processing_samf import SamfImageProcessor
from samf.model_card import README, is_generated, write_model_card
from samf.modeling_samf import SamfForConditionalGeneration
from samf.pretraining.aggregator_weights import load_aggregator
from samf.processing_samf import SamfProcessor
from samf.recipe import parse_recipe

logger = logging.getLogger("samf.train")

PARTS = {
    "slice_encoder": ("model.slice_encoder.",),
    "slice_position": ("model.slice_position.",),
    "aggregator": ("model.aggregator.",),
    "fusion": ("model.fusion.",),
    "finding_head": ("model.finding_head.",),
    "language_model": ("model.language_model.", "lm_head."),
}


@dataclass
class ModelArguments:
    """What is trained. `model` continues a SAMF model; the other fields build a new one."""

    model: str | None = field(default=None, metadata={"help": "folder or Hub id of a SAMF model to continue"})
    slice_encoder: str = field(
        default="facebook/dino-vitb16", metadata={"help": "folder or Hub id of the slice encoder"}
    )
    text_model: str = field(
        default="microsoft/Phi-3-mini-4k-instruct", metadata={"help": "folder or Hub id of the language model"}
    )
    fusion_type: str = field(default="ao2d", metadata={"help": "samf, ao2d or slice_tokens"})
    fusion_scale: str | None = field(default=None, metadata={"help": "rsqrt divides the fusion's scores by sqrt(d)"})
    slice_position_scope: str = field(default="aggregator", metadata={"help": "none, aggregator or all"})
    num_image_tokens: int = field(default=256, metadata={"help": "image tokens a volume; slice_tokens has one a slice"})
    volume_dim: int = field(default=256, metadata={"help": "width of the volume embedding"})
    aggregator_num_heads: int = field(default=8)
    aggregator_ffn_dim: int = field(default=1024)
    aggregator_dropout: float = field(default=0.1)
    initializer_range: float = field(default=0.02, metadata={"help": "standard deviation of new weights"})
    vision_chunk_size: int | None = field(default=None, metadata={"help": "most slices the encoder reads in one call"})
    slices_per_plane: int | None = field(default=None, metadata={"help": "the image processor's; its default is 24"})
    slab: str | None = field(default=None, metadata={"help": "none, mean or mip over the voxels between two slices"})
    image_size: int | None = field(
        default=None, metadata={"help": "pixels a side; the image processor's default is 224"}
    )
    finding_names: list[str] = field(default_factory=list, metadata={"help": "labels of the findings head"})
    finding_loss_weight: float = field(default=1.0)
    aggregator: str | None = field(default=None, metadata={"help": "what warmup_aggregator.py wrote: start from it"})
    dtype: str = field(default="auto", metadata={"help": "of the weights: auto, float32 or bfloat16"})
    train_parts: list[str] = field(
        default_factory=lambda: list(PARTS), metadata={"help": f"parts that are trained, of {', '.join(PARTS)}"}
    )

    def __post_init__(self):
        unknown = sorted(set(self.train_parts) - set(PARTS))
        if unknown:
            raise ValueError(f"train_parts names {unknown}; a SAMF model's parts are {sorted(PARTS)}.")


@dataclass
class DataArguments:
    """What it is trained on."""

    data: str = field(default="", metadata={"help": "CT-RATE folder (v1 or v2), or one in its layout"})
    tasks: list[str] = field(default_factory=lambda: ["report", "multiple_choice"])
    vqa_files: list[str] = field(
        default_factory=list, metadata={"help": "question files to read instead of the split's own, for training alone"}
    )
    repeat: list[str] = field(
        default_factory=list, metadata={"help": "tasks that training reads several times an epoch, e.g. report=3"}
    )
    objective: str = field(default="text", metadata={"help": "text, or findings: the findings head's loss alone"})
    slice_cache: str | None = field(default=None, metadata={"help": "folder that keeps prepared slices"})
    cache_embeddings: bool = field(
        default=False, metadata={"help": "keep the embeddings of a slice encoder that isn't trained, beside the slices"}
    )
    max_length: int | None = field(default=None, metadata={"help": "longest sequence in tokens"})
    valid_limit: int | None = field(default=None, metadata={"help": "most validation records to measure the loss on"})

    def __post_init__(self):
        if self.objective not in ("text", "findings"):
            raise ValueError(f"objective is {self.objective!r}; it must be 'text' or 'findings'.")
        for item in self.repeat:
            task, _, times = item.partition("=")
            if task not in self.tasks or not times.isdigit() or int(times) < 1:
                raise ValueError(f"repeat has {item!r}; expected one of {self.tasks} and a number, like 'report=3'.")


def build_processor(args: ModelArguments) -> SamfProcessor:
    """The processor of `args.model`, or a new one from the language model's tokenizer and the slice settings."""
    if args.model is not None:
        return SamfProcessor.from_pretrained(args.model)
    settings = {"slices_per_plane": args.slices_per_plane, "slab": args.slab, "size": args.image_size}
    settings = {key: value for key, value in settings.items() if value is not None}
    if (Path(args.slice_encoder) / "preprocessor_config.json").is_file():
        image_processor = SamfImageProcessor.from_pretrained(args.slice_encoder, **settings)
    else:
        image_processor = SamfImageProcessor(**settings)
    tokenizer = AutoTokenizer.from_pretrained(args.text_model, trust_remote_code=False)
    num_image_tokens = None if args.fusion_type == "slice_tokens" else args.num_image_tokens
    return SamfProcessor(image_processor, tokenizer, num_image_tokens=num_image_tokens)


def build_model(args: ModelArguments, processor: SamfProcessor) -> SamfForConditionalGeneration:
    """`args.model`, or a new model from its components; parts that aren't trained are frozen."""
    if args.model is not None:
        model = SamfForConditionalGeneration.from_pretrained(args.model, dtype=args.dtype)
    else:
        own = {field.name for field in dataclasses.fields(ModelArguments)}
        config = {name: getattr(args, name) for name in own if name in SamfConfig.__init__.__annotations__}
        model = SamfForConditionalGeneration.from_component_pretrained(
            args.slice_encoder, args.text_model, dtype=args.dtype, image_token_id=processor.image_token_id, **config
        )
    if args.aggregator is not None:
        load_aggregator(model, args.aggregator)
    rows = model.get_input_embeddings().num_embeddings
    if model.config.image_token_id >= rows:
        raise ValueError(
            f"The placeholder {processor.image_token} has id {model.config.image_token_id}, but {args.text_model} embeds "
            f"{rows} tokens. Use a tokenizer that has the token, or a language model with a spare row."
        )
    trained = tuple(prefix for part in args.train_parts for prefix in PARTS[part])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    return model


def load_datasets(args: DataArguments, processor: SamfProcessor, finding_names: list[str], with_lengths: bool) -> dict:
    """Trainer's datasets: train, and validation twice, with each patient's own volume and with another's.

    A model that doesn't look at the volume has the same loss on both. With text, the validation loss is the text's alone.
    """
    options = {"tasks": args.tasks, "finding_names": finding_names}
    train = load_records(args.data, "train", **options, **({"vqa_files": args.vqa_files} if args.vqa_files else {}))
    valid = load_records(args.data, "valid", **options)
    check_patient_overlap(train, valid)
    if args.objective == "findings":
        train, valid = one_record_a_volume(train), one_record_a_volume(valid)
    else:
        valid = valid.remove_columns("finding_labels")
    train = repeat_tasks(train, args.repeat)
    valid = valid.shuffle(seed=0).select(range(min(len(valid), args.valid_limit or len(valid))))
    if with_lengths:
        train, valid = (add_lengths(split, processor) for split in (train, valid))
    return {"train_dataset": train, "eval_dataset": {"own": valid, "shuffled": shuffle_volumes(valid, seed=0)}}


def add_lengths(records: datasets.Dataset, processor: SamfProcessor) -> datasets.Dataset:
    """The records with `length`, the tokens of question and answer, for batches of about equal length."""
    texts = [f"{record_prompt(record)} {record['answer']}" for record in records]
    return records.add_column("length", [len(ids) for ids in processor.tokenizer(texts)["input_ids"]])


def repeat_tasks(records: datasets.Dataset, repeat: list[str]) -> datasets.Dataset:
    """The records with those of some tasks several times: `["report=3"]` has every report three times."""
    times = {task: int(number) for task, number in (item.split("=") for item in repeat)}
    rows = [index for index, task in enumerate(records["task"]) for _ in range(times.get(task, 1))]
    return records.select(rows) if times else records


def one_record_a_volume(records: datasets.Dataset) -> datasets.Dataset:
    """The first record of each volume: for the findings' loss the questions don't matter."""
    first: dict[str, int] = {}
    for index, volume in enumerate(records["volume"]):
        if volume is not None:
            first.setdefault(volume, index)
    return records.select(sorted(first.values()))


def distinct_volumes(*splits: datasets.Dataset) -> list[VolumeKey]:
    """Each volume of the records once, with the rescale that it needs."""
    rescales: dict[str, Any] = {}
    for split in splits:
        columns = split["rescale"] if "rescale" in split.column_names else [None] * len(split)
        rescales.update({path: rescale for path, rescale in zip(split["volume"], columns, strict=True) if path})
    return sorted(rescales.items())


def build_volume_store(
    args: DataArguments,
    model: SamfForConditionalGeneration,
    processor: SamfProcessor,
    trained: list[str],
    volumes: list[VolumeKey],
) -> VolumeStore | None:
    """Where the collator gets its volumes: the files, prepared slices, or a frozen encoder's embeddings."""
    if args.slice_cache is None:
        return None
    slices = SliceCache(args.slice_cache, processor.image_processor)
    if not args.cache_embeddings:
        return slices
    if "slice_encoder" in trained:
        raise ValueError("cache_embeddings needs a frozen slice encoder: leave slice_encoder out of train_parts.")
    embeddings = EmbeddingCache(args.slice_cache, slices, model.model)
    embeddings.fill(volumes)
    return embeddings


class SamfTrainer(Trainer):
    """Trainer whose folders and pushes load as a whole and bear SAMF's model card.

    Trainer itself writes a draft over README.md at the last push, and peft saves an adapter alone.

    Args:
        card: what `make_card` can't know from the model.
    """

    def __init__(self, *args: Any, card: Mapping[str, Any] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.card = dict(card or {})
        if self.args.push_to_hub:
            self.create_model_card()  # for the pushes during training

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's, with config.json and the code beside the adapter of a model that peft has wrapped."""
        readme = Path(output_dir or self.args.output_dir) / README
        card = readme.read_text(encoding="utf-8") if readme.is_file() else None
        push = getattr(self, "push_in_progress", None)
        if push is not None and (self.args.hub_always_push or readme.parent == Path(self.args.output_dir)):
            push.wait_until_done()  # or files would change while they are uploaded
        super().save_model(output_dir, _internal_call=True)
        if hasattr(self.model, "get_base_model") and self.args.should_save:
            base = self.model.get_base_model()
            base.save_config_and_code(readme.parent)
            readme.write_text(
                card or str(base.model_card()), encoding="utf-8"
            )  # peft has written its own, or into ours
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, *args: Any, tags: str | list[str] | None = None, **kwargs: Any) -> None:
        """Write README.md into the output folder. A card that somebody wrote stays, here and on the Hub."""
        if not self.is_world_process_zero():
            return
        folder, revision, token = Path(self.args.output_dir), self.args.hub_revision, self.args.hub_token
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        card = model.model_card(
            self.hub_model_id,
            [tags] if isinstance(tags, str) else tags or (),
            metrics=validation_losses(self.state),
            **{**self.card, "facts": {**self.card.get("facts", {}), "Steps": self.state.global_step}},
        )
        write_model_card(folder, card)
        written = is_generated((folder / README).read_text(encoding="utf-8"))
        if written and self.hub_model_id is not None and has_own_card(self.hub_model_id, revision, token):
            found = HfApi(token=token).hf_hub_download(self.hub_model_id, README, revision=revision)
            shutil.copyfile(found, folder / README)


def validation_losses(state: TrainerState) -> dict[str, float]:
    """The last validation loss with each patient's own volume and with another's, as far as they were measured."""
    names = {"eval_own_loss": "loss, own volumes", "eval_shuffled_loss": "loss, other patients' volumes"}
    found = {names[key]: value for row in state.log_history for key, value in row.items() if key in names}
    return {name: found[name] for name in names.values() if name in found}


def card_settings(model_args: ModelArguments, data_args: DataArguments) -> dict[str, Any]:
    """What the model card tells of a run: arguments of `make_card`."""
    if model_args.model is not None:
        sources = {"Continues": model_args.model}
    else:
        sources = {"Slice encoder": model_args.slice_encoder, "Language model": model_args.text_model}
    facts = {**sources, "Trained parts": ", ".join(model_args.train_parts), "Tasks": ", ".join(data_args.tasks)}
    return {"base_models": list(sources.values()), "facts": facts, "data": data_args.data}


def save_repository(trainer: SamfTrainer) -> None:
    """The output folder as a complete Hub repository: weights, code, processor, model card. Pushes when asked to."""
    trainer.save_state()
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir)
        shutil.copyfile(Path(__file__).with_name("requirements.txt"), folder / "requirements.txt")
    trainer.create_model_card()
    trainer.save_model()


def main(argv: list[str] | None = None) -> None:
    model_args, data_args, training = parse_recipe((ModelArguments, DataArguments, TrainingArguments), argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    set_seed(training.seed)
    training.remove_unused_columns = False
    training.prediction_loss_only = True
    findings_only = data_args.objective == "findings"
    # Trainer would ask each evaluation batch for both, and report no loss where one is missing.
    training.label_names = ["finding_labels"] if findings_only else ["labels"]

    processor = build_processor(model_args)
    model = build_model(model_args, processor)
    by_length = training.train_sampling_strategy == "group_by_length"
    data = load_datasets(data_args, processor, model.config.finding_names, with_lengths=by_length)
    volumes = distinct_volumes(data["train_dataset"], data["eval_dataset"]["own"])
    store = build_volume_store(data_args, model, processor, model_args.train_parts, volumes)
    trainer = SamfTrainer(
        card=card_settings(model_args, data_args),
        model=model,
        args=training,
        processing_class=processor,
        data_collator=SamfCollator(
            processor, slice_cache=store, max_length=data_args.max_length, findings_only=findings_only
        ),
        **data,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    save_repository(trainer)
    if training.do_eval and training.eval_strategy == "no":
        trainer.evaluate()


if __name__ == "__main__":
    main(sys.argv[1:])
