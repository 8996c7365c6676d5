"""Settings of a run of answering, and what it reports at its end."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Literal, TypeAlias, TypedDict, get_args

from torch import nn

from samf.evaluation.schema import AnswerStatistics, Failure, GenerationReport

__all__ = ["ChoiceMethod", "GenerateArguments", "GenerationSettings", "GenerationSummary", "fitting_batch_size"]

_USUAL_BATCH, _LARGEST_BATCH = 8, 64  # a batch beyond 64 gains little
_CACHE_BYTES = 4 << 30  # of keys and values
_PROMPT_TOKENS = 256  # more than the text of a question takes

# How multiple choice is answered: in words that are parsed, or by the likelihood of each option.
ChoiceMethod: TypeAlias = Literal["generate", "likelihood"]


class GenerateArguments(TypedDict, total=False):
    """Keyword arguments of `model.generate`."""

    max_new_tokens: int
    num_beams: int
    do_sample: bool
    temperature: float
    top_p: float


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated; greedily unless `do_sample`.

    Attributes:
        batch_size: records answered at once; None = see `fitting_batch_size`.
        max_new_tokens: limit of one answer; an answer that reaches it without an end token counts as truncated.
        num_beams: 1 = no beam search.
        do_sample: draw tokens.
        seed: of the drawing. Each batch has a seed of its own, so that a resumed run draws what an uninterrupted one does.
        temperature: of drawn tokens; None = the model's own.
        top_p: of drawn tokens; None = the model's own.
        mcq: "generate": multiple choice is answered in words, and the answer is parsed. "likelihood": the answer is the
            option whose text "(b) …" the model finds most likely.

    Raises:
        ValueError: a value out of range, or drawing options without `do_sample`.
    """

    batch_size: int | None = None
    max_new_tokens: int = 512
    num_beams: int = 1
    do_sample: bool = False
    seed: int = 0
    temperature: float | None = None
    top_p: float | None = None
    mcq: ChoiceMethod = "generate"

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens", "num_beams"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if self.mcq not in get_args(ChoiceMethod):
            raise ValueError(f"mcq is {self.mcq!r}; expected {' or '.join(get_args(ChoiceMethod))}.")
        if not self.do_sample and (self.temperature is not None or self.top_p is not None):
            raise ValueError("temperature and top_p have no meaning without do_sample.")

    def generate_arguments(self) -> GenerateArguments:
        """Return the keyword arguments of `model.generate`."""
        arguments: GenerateArguments = {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "do_sample": self.do_sample,
        }
        if self.temperature is not None:
            arguments["temperature"] = self.temperature
        if self.top_p is not None:
            arguments["top_p"] = self.top_p
        return arguments


def fitting_batch_size(model: nn.Module, settings: GenerationSettings) -> int:
    """Return for how many records keys and values fit into 4 GiB, at most 64; 8 for a model that doesn't say its shape.

    It follows from the configuration, not from the memory that is free, so that a run is resumed with the same batches.

    Args:
        model: its configuration and dtype count.
        settings: length of the answers, and beams.
    """
    config = getattr(model, "config", None)
    text = getattr(config, "text_config", None)
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
    if config is None or text is None or heads is None or not getattr(text, "num_hidden_layers", None):
        return _USUAL_BATCH
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    tokens = config.num_image_tokens + _PROMPT_TOKENS + settings.max_new_tokens
    row = 2 * text.num_hidden_layers * heads * width * model.dtype.itemsize * tokens * settings.num_beams
    return int(min(max(_CACHE_BYTES // row, 1), _LARGEST_BATCH))


@dataclass
class GenerationSummary:
    """What a run did, over all its processes.

    Attributes:
        written: answers written by this run.
        resumed: answers found from an earlier run.
        seconds: wall-clock time of this run.
        new_tokens: tokens of the answers written by this run.
        processes: how many answered.
        failures: the content of failures.jsonl.
        tasks: see `answer_statistics`.
    """

    written: int = 0
    resumed: int = 0
    seconds: float = 0.0
    new_tokens: int = 0
    processes: int = 1
    failures: list[Failure] = field(default_factory=list)
    tasks: dict[str, AnswerStatistics] = field(default_factory=dict)

    def to_json(self) -> GenerationReport:
        """Return the entry of results.json: of the failures their number and kinds only."""
        kinds = Counter(failure["error"].split(":")[0] for failure in self.failures)
        return {**asdict(self), "failures": len(self.failures), "failure_kinds": dict(kinds)}  # type: ignore[typeddict-item]
