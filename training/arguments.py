"""Arguments of train.py in addition to `TrainingArguments`; a recipe's keys are these fields."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from samf.cache.entries import local_directory
from samf.data.mixture import parse_weights
from samf.data.source_arguments import SourceArguments
from samf.training.aggregator_arguments import AggregatorArguments
from samf.training.choices import OnErrorOption, check_choices
from samf.training.param_groups import PARTS, check_parts


@dataclass
class ModelArguments(AggregatorArguments):
    """The model to train. `model` continues a SAMF model; the other fields build a new one."""

    model: str | None = field(default=None, metadata={"help": "folder or Hub id of a SAMF model to continue"})
    text_model: str = field(
        default="microsoft/Phi-3-mini-4k-instruct", metadata={"help": "folder or Hub id of the language model"}
    )
    fusion_type: Literal["samf", "ao2d", "slice_tokens"] = field(
        default="ao2d", metadata={"help": "slice_tokens is one image token per slice"}
    )
    fusion_scale: Literal["rsqrt"] | None = field(
        default=None, metadata={"help": "rsqrt divides the fusion's scores by sqrt(d)"}
    )
    fusion_text_scope: Literal["prompt", "sequence"] = field(
        default="prompt",
        metadata={"help": "text of the fusion; sequence is the published code's leak of the answer into image tokens"},
    )
    num_image_tokens: int = field(
        default=256, metadata={"help": "image tokens per volume; ignored for slice_tokens, which has one per slice"}
    )
    finding_names: list[str] = field(default_factory=list, metadata={"help": "labels of the findings head"})
    finding_loss_weight: float = field(default=1.0)
    aggregator: str | None = field(
        default=None, metadata={"help": "output folder of warmup_aggregator.py to start the aggregator from"}
    )
    dtype: str = field(
        default="auto", metadata={"help": "of the weights: float32, bfloat16, or auto: the language model's own"}
    )
    train_parts: list[str] = field(
        default_factory=lambda: list(PARTS), metadata={"help": f"parts that are trained, of {', '.join(PARTS)}"}
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_parts(self.train_parts, "train_parts")


@dataclass
class DataArguments(SourceArguments):
    """The data to train on."""

    data: str = field(
        default="",
        metadata={
            "help": "CT-RATE folder (v1 or v2), or one in its layout; with dataset that one's folder, with volume_column any "
            "data set or table"
        },
    )
    data_shards: str | None = field(
        default=None,
        metadata={
            "help": "folder or address (s3://bucket/prefix) of shards that samf data pack wrote, in place of data and "
            "slice_cache"
        },
    )
    shard_cache: str | None = field(
        default=None, metadata={"help": "local folder for fetched shards; default: samf-shards in the temporary folder"}
    )
    shard_cache_gb: float = field(default=16.0, metadata={"help": "most GB of it; the least recently used are deleted"})
    shuffle_volumes: int = field(default=256, metadata={"help": "volumes of shards whose records are mixed at a time"})
    shard_prefetch: int = field(
        default=8, metadata={"help": "shards that are fetched before they are needed; 0 = none"}
    )
    tasks: list[str] = field(default_factory=lambda: ["report", "multiple_choice"])
    vqa_files: list[str] = field(
        default_factory=list, metadata={"help": "question files for training instead of the split's own"}
    )
    repeat: list[str] = field(
        default_factory=list, metadata={"help": "tasks that training reads several times per epoch, e.g. report=3"}
    )
    mixture: list[str] = field(
        default_factory=list,
        metadata={
            "help": "weights of the tasks in training, e.g. report=1 multiple_choice=1; default: every record once"
        },
    )
    report_sections: list[str] = field(
        default_factory=list,
        metadata={"help": "of CT-RATE's reports: findings (the default), impression, clinical_information"},
    )
    reconstructions: Literal["all", "first", "sample"] | None = field(
        default=None, metadata={"help": "of each of CT-RATE's scans; default: all"}
    )
    on_error: OnErrorOption = field(
        default="raise",
        metadata={
            "help": "volumes that are missing or that preprocess.py couldn't read: raise an error, or skip and count them"
        },
    )
    objective: Literal["text", "findings"] = field(
        default="text", metadata={"help": "findings: only the findings head's loss"}
    )
    finding_labels: Literal["auto", "rules"] = field(
        default="auto",
        metadata={"help": "auto: the data's label CSV, or rules where it has none; rules: always from the reports"},
    )
    slice_cache: str | None = field(default=None, metadata={"help": "folder that keeps prepared slices"})
    cache_embeddings: bool = field(
        default=False, metadata={"help": "keep the embeddings of a slice encoder that isn't trained in slice_cache too"}
    )
    max_length: int | None = field(default=None, metadata={"help": "longest sequence in tokens"})
    sort_steps: bool = field(
        default=False,
        metadata={
            "help": "with gradient accumulation: sort each step's records by length, so that micro-batches have less "
            "padding; the step has the same records"
        },
    )
    valid_limit: int | None = field(
        default=None, metadata={"help": "most validation records that the loss is measured on"}
    )

    def __post_init__(self) -> None:
        self.check_source()
        check_choices(self)
        if self.data_shards is not None:
            check_shard_options(self)
        if self.min_coverage and self.slice_cache is None and self.data_shards is None:
            raise ValueError("min_coverage is checked when slices are made: give slice_cache too.")
        if self.slice_cache is not None:
            local_directory(self.slice_cache)
        if unknown := sorted(set(parse_weights(self.mixture)) - set(self.tasks)):
            weights = " ".join(f"{task}=1" for task in self.tasks)
            raise ValueError(f"mixture has {unknown}; expected some of tasks, {self.tasks}: --mixture {weights}.")
        for item in self.repeat:
            task, _, times = item.partition("=")
            if task not in self.tasks or not times.isdigit() or int(times) < 1:
                raise ValueError(f"repeat has {item!r}; expected one of {self.tasks} and a number, like 'report=3'.")


def check_shard_options(args: DataArguments) -> None:
    """Raise ValueError for options that shards fix when they are packed, or that can't be."""
    fixed = {name: getattr(args, name) for name in ("vqa_files", "report_sections", "reconstructions", "dataset")}
    fixed |= {name: getattr(args, name) for name in ("volume_column", "patient_rule", "patient_column", "image_root")}
    if given := [name for name, value in fixed.items() if value]:
        raise ValueError(
            f"{', '.join(given)}: fixed when shards are packed. Leave it out with data_shards, or give it to samf data pack."
        )
    if args.shard_cache_gb <= 0 or args.shuffle_volumes < 1 or args.shard_prefetch < 0:
        raise ValueError(
            f"shard_cache_gb is {args.shard_cache_gb}, shuffle_volumes {args.shuffle_volumes}, shard_prefetch "
            f"{args.shard_prefetch}; expected a positive size, at least 1, and at least 0."
        )


@dataclass
class TuningArguments:
    """How the weights are trained: an adapter on the language model, a learning rate for each part."""

    lora_rank: int = field(default=0, metadata={"help": "LoRA on the language model; 0 trains it in full"})
    lora_alpha: float = field(default=32.0)
    lora_dropout: float = field(default=0.05)
    use_dora: bool = field(default=False, metadata={"help": "DoRA instead of LoRA"})
    lora_targets: str | None = field(
        default=None, metadata={"help": "regular expression of layers; default: the language model's linear layers"}
    )
    lora_embeddings: bool = field(
        default=False,
        metadata={"help": "with LoRA, train the input embeddings and the head in full, as the paper does"},
    )
    merge: bool = field(
        default=False, metadata={"help": "at the end, write the model with its adapter merged into `merged`"}
    )
    trained_dtype: Literal["float32", "bfloat16"] | None = field(
        default=None, metadata={"help": "of the trained weights, e.g. float32 next to frozen bfloat16"}
    )
    learning_rates: dict[str, float] | str | None = field(
        default=None,
        metadata={"help": 'by part, e.g. \'{"fusion": 1e-4, "language_model": 2e-4}\'; others: learning_rate'},
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank is {self.lora_rank}; it must be 0 (no adapter) or positive.")
        for name in ("merge", "use_dora", "lora_embeddings"):
            if getattr(self, name) and not self.lora_rank:
                raise ValueError(f"{name} is about an adapter, and lora_rank is 0: set lora_rank, e.g. 16.")
        self.learning_rates = _read_rates(self.learning_rates)


@dataclass
class MonitorArguments:
    """What is measured during training."""

    generate_samples: int = field(
        default=0, metadata={"help": "validation records per task that every evaluation answers and scores"}
    )
    generate_tokens: int = field(default=512, metadata={"help": "most tokens of such an answer"})
    shown_samples: int = field(
        default=2, metadata={"help": "reports that the trackers show with their references and slices"}
    )
    blind_gap: float = field(
        default=0.01,
        metadata={"help": "warn when other patients' volumes raise the loss by less than this share of it"},
    )
    blind_evaluations: int = field(default=3, metadata={"help": "… in this many evaluations in a row"})
    peak_tflops: float | None = field(
        default=None, metadata={"help": "of one device at the trained precision, for MFU; known for common GPUs"}
    )


def _read_rates(value: Mapping[str, float] | str | None) -> dict[str, float]:
    """Return learning rates by part from a mapping or its JSON. Raises ValueError that names what is wrong."""
    try:
        rates = json.loads(value) if isinstance(value, str) else dict(value or {})
        rates = {part: float(rate) for part, rate in rates.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"learning_rates is {value!r}; expected a mapping from parts to numbers, like {{fusion: 1e-4}}."
        ) from error
    check_parts(rates, "learning_rates")
    return rates
