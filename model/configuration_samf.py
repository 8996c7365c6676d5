"""Configuration of a SAMF model: slice encoder, aggregator, fusion, language model.

Paper: "From Slices to Volumes: Multi-Scale Fusion of 2D and 3D Features for CT Scan Report Generation", MICCAI 2025.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

from transformers import AutoConfig, PretrainedConfig
from transformers.activations import ACT2CLS

# A sub-model's settings by name, with its `model_type`; which names exist depends on the type.
SubConfig: TypeAlias = dict[str, Any]

# Every class that a saved folder can be loaded as. Each saved configuration has all of them; `save_pretrained` by itself
# would enter only the class that was saved.
AUTO_MAP = {
    "AutoConfig": "configuration_samf.SamfConfig",
    "AutoModel": "modeling_samf.SamfForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_samf.SamfForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_samf.SamfForConditionalGeneration",
    "AutoProcessor": "processing_samf.SamfProcessor",
    "AutoImageProcessor": "image_processing_samf.SamfImageProcessor",
}

# ViT-B/16 at 224 pixels as DINO trains it: LayerNorm eps 1e-6, not the library's 1e-12.
DEFAULT_VISION_CONFIG: SubConfig = {"model_type": "vit", "layer_norm_eps": 1e-6}
# Phi-3-mini-4k-instruct.
DEFAULT_TEXT_CONFIG: SubConfig = {"model_type": "phi3", "sliding_window": 2047}

FusionType = Literal["samf", "ao2d", "slice_tokens"]
FusionScale = Literal["rsqrt"]
TextScope = Literal["prompt", "sequence"]
AggregatorNorm = Literal["post", "pre"]
AggregatorPooling = Literal["cls", "cls_max"]
PositionScope = Literal["none", "aggregator", "all"]
Pooling = Literal["cls", "mean", "pooler"]

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "fusion_type": get_args(FusionType),
    "fusion_scale": (None, *get_args(FusionScale)),
    "fusion_text_scope": get_args(TextScope),
    "aggregator_norm": get_args(AggregatorNorm),
    "aggregator_pooling": get_args(AggregatorPooling),
    "slice_position_scope": get_args(PositionScope),
    "slice_pooling": (None, *get_args(Pooling)),
}


class SamfConfig(PretrainedConfig):
    r"""Configuration of [`SamfModel`] and [`SamfForConditionalGeneration`].

    Args:
        vision_config (`PretrainedConfig | dict`, *optional*): the slice encoder f_2d. Default: ViT-B/16 at 224 pixels.
        text_config (`PretrainedConfig | dict`, *optional*): the language model. Default: Phi-3-mini-4k.
        image_token_id (`int`, defaults to 32011): id of the image placeholder; a spare embedding row of Phi-3.
        num_image_tokens (`int`, defaults to 256): image tokens in the prompt, all with the fused vector. Ignored by
            `slice_tokens`, which has one for each slice.
        slice_pooling (`str`, *optional*): z_2d is the encoder's `"cls"` token, the `"mean"` over all tokens, or its own
            `"pooler"`. `None` = the CLS token; for an encoder without one its own pooler, or else the mean. Building a model
            replaces `None` by the choice for its encoder.
        slice_position_scope (`str`, defaults to `"aggregator"`): which modules see the plane and depth embeddings: the
            `"aggregator"`, `"all"` (the fusion's slices too) or `"none"` (the paper: the order of the slices has no effect).
        aggregator_num_layers (`int`, defaults to 2): layers of the transformer encoder f_3d. This and the next five
            defaults are those of the reference implementation.
        aggregator_num_heads (`int`, defaults to 8): attention heads; must divide the slice encoder's width.
        aggregator_ffn_dim (`int`, defaults to 1024): width of the feed-forward blocks.
        aggregator_activation (`str`, defaults to `"relu"`): activation of the feed-forward blocks.
        aggregator_dropout (`float`, defaults to 0.1): probability of dropout.
        aggregator_layer_norm_eps (`float`, defaults to 1e-5): epsilon of the LayerNorms.
        aggregator_norm (`str`, defaults to `"post"`): LayerNorm after (`"post"`, paper) or before (`"pre"`) each block.
        aggregator_pooling (`str`, defaults to `"cls"`): z_3d is read out at the CLS token (`"cls"`, paper), or at the CLS
            token and the maximum over the slices of each feature (`"cls_max"`), which keeps what a single slice shows.
        volume_dim (`int`, defaults to 256): width of the volume embedding z_3d.
        fusion_type (`str`, defaults to `"ao2d"`): `"samf"` (eq. 10), `"ao2d"` (eq. 12) or `"slice_tokens"` (one image
            token for each slice, with that slice and the text that it attends to; not in the paper).
        fusion_dim (`int`, *optional*): d_proj. Default: the language model's width.
        fusion_scale (`str`, *optional*): `None` leaves the scores unscaled (paper), `"rsqrt"` divides them by sqrt(d_proj).
        fusion_text_scope (`str`, defaults to `"prompt"`): `"prompt"` lets the fusion read only prompt tokens. `"sequence"`
            reads every token, including answer and padding, as the reference implementation does; only for running its
            checkpoints.
        project_text (`bool`, defaults to `True`): whether W_text projects the prompt's embeddings. `False` needs
            `fusion_dim` to be the language model's width.
        finding_names (`Sequence[str]`, defaults to `()`): labels of the optional findings head on z_3d; empty = no head.
        finding_loss_weight (`float`, defaults to 1.0): factor of the findings' loss next to the language model's.
        finding_temperature (`float | Sequence[float]`, *optional*): divides the logit of each finding where its probability is
            computed, so that it agrees with frequencies on held-out data (calibrate_findings.py fits it); one number is for
            all findings. The loss and `finding_logits` are not scaled. `None` = no scaling.
        finding_bias (`Sequence[float]`, *optional*): added to each finding's scaled logit. `None` = none.
        finding_statements (`Mapping[str, Sequence]`, *optional*): for a model without a findings head, by finding, what a
            report says when it is present and when it is absent: `{"Lung nodule": ["A nodule is seen.", "No nodule."]}`, or
            several sentences in place of either. Their likelihoods then give the findings' probabilities.
        extra_sources (`Mapping[str, int]`, *optional*): further inputs of the fusion by name, each with the width of its
            vector: `{"prior_volume": 256, "age_sex": 2}` for an earlier scan's volume embedding and patient data. Each is
            projected to d_proj and joins the concatenation of eqs. 10 and 12; one that a patient lacks is masked. Stored in
            the order of their names. Default: none, the paper's model.
        vision_chunk_size (`int`, *optional*): largest number of slices in one call of the slice encoder; `None` = all.
        initializer_range (`float`, defaults to 0.02): standard deviation of new weights.
        caution (`str`, *optional*): a sentence for the readers of each report, such as that the model knows phantoms only.
            Reports have it among their warnings.
        **kwargs: further arguments of `PretrainedConfig`.

    Raises:
        ValueError: a choice that doesn't exist (the message lists those that do), or widths that don't fit together.
    """

    model_type = "samf"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    has_no_defaults_at_init = False
    # Trainer's predict and compute_metrics then get only the logits.
    keys_to_ignore_at_inference = [
        "cache",
        "past_key_values",
        "hidden_states",
        "attentions",
        "image_outputs",
        "slice_attentions",
        "router_logits",
        "aux_loss",
        "finding_logits",
    ]

    def __init__(
        self,
        vision_config: PretrainedConfig | SubConfig | None = None,
        text_config: PretrainedConfig | SubConfig | None = None,
        image_token_id: int = 32011,
        num_image_tokens: int = 256,
        slice_pooling: Pooling | None = None,
        slice_position_scope: PositionScope = "aggregator",
        aggregator_num_layers: int = 2,
        aggregator_num_heads: int = 8,
        aggregator_ffn_dim: int = 1024,
        aggregator_activation: str = "relu",
        aggregator_dropout: float = 0.1,
        aggregator_layer_norm_eps: float = 1e-5,
        aggregator_norm: AggregatorNorm = "post",
        aggregator_pooling: AggregatorPooling = "cls",
        volume_dim: int = 256,
        fusion_type: FusionType = "ao2d",
        fusion_dim: int | None = None,
        fusion_scale: FusionScale | None = None,
        fusion_text_scope: TextScope = "prompt",
        project_text: bool = True,
        finding_names: Sequence[str] = (),
        finding_loss_weight: float = 1.0,
        finding_temperature: float | Sequence[float] | None = None,
        finding_bias: Sequence[float] | None = None,
        finding_statements: Mapping[str, Sequence[str | Sequence[str]]] | None = None,
        extra_sources: Mapping[str, int] | None = None,
        vision_chunk_size: int | None = None,
        initializer_range: float = 0.02,
        caution: str | None = None,
        **kwargs: Any,
    ):
        self.vision_config = _as_config(vision_config, DEFAULT_VISION_CONFIG)
        self.text_config = _as_config(text_config, DEFAULT_TEXT_CONFIG)
        self.image_token_id = image_token_id
        self.num_image_tokens = num_image_tokens
        self.slice_pooling = slice_pooling
        self.slice_position_scope = slice_position_scope
        self.aggregator_num_layers = aggregator_num_layers
        self.aggregator_num_heads = aggregator_num_heads
        self.aggregator_ffn_dim = aggregator_ffn_dim
        self.aggregator_activation = aggregator_activation
        self.aggregator_dropout = aggregator_dropout
        self.aggregator_layer_norm_eps = aggregator_layer_norm_eps
        self.aggregator_norm = aggregator_norm
        self.aggregator_pooling = aggregator_pooling
        self.volume_dim = volume_dim
        self.fusion_type = fusion_type
        self.fusion_dim = fusion_dim if fusion_dim is not None else self.text_config.hidden_size
        self.fusion_scale = fusion_scale
        self.fusion_text_scope = fusion_text_scope
        self.project_text = project_text
        self.finding_names = list(finding_names)
        self.finding_loss_weight = finding_loss_weight
        self.finding_statements = dict(finding_statements or {})
        self.finding_temperature = _one_each(finding_temperature, len(self.scored_findings))
        self.finding_bias = None if finding_bias is None else list(finding_bias)
        self.extra_sources = dict(sorted((extra_sources or {}).items()))  # the order of a saved configuration
        self.vision_chunk_size = vision_chunk_size
        self.initializer_range = initializer_range
        self.caution = caution
        self._check()

        kwargs.setdefault("tie_word_embeddings", bool(getattr(self.text_config, "tie_word_embeddings", False)))
        self.auto_map = kwargs.pop("auto_map", None) or dict(AUTO_MAP)
        super().__init__(**kwargs)

    @property
    def slice_dim(self) -> int:
        """Return the width of z_2d, that of the slice encoder's last features."""
        width = getattr(self.vision_config, "hidden_size", None)
        if width is None:  # ConvNeXt and ResNet list one for each stage
            width = (getattr(self.vision_config, "hidden_sizes", None) or [None])[-1]
        if not isinstance(width, int):
            raise ValueError(
                f"SamfConfig.vision_config is a {type(self.vision_config).__name__}, which has no hidden_size. Give an image "
                "encoder; of a model of images and text (CLIP, SigLIP) its vision_config."
            )
        return width

    @property
    def scored_findings(self) -> list[str]:
        """Return the findings that have a probability: those of the head, else those with statements."""
        return self.finding_names or list(self.finding_statements)

    def _check(self) -> None:
        """Raise ValueError for a choice that doesn't exist, or widths that don't fit together."""
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"SamfConfig.{name} is {getattr(self, name)!r}; it must be one of {choices}.")
        if self.num_image_tokens < 1:
            raise ValueError(f"SamfConfig.num_image_tokens is {self.num_image_tokens}; it must be at least 1.")
        if self.aggregator_activation not in ACT2CLS:
            raise ValueError(
                f"SamfConfig.aggregator_activation is {self.aggregator_activation!r}; it must be one of {sorted(ACT2CLS)}."
            )
        if self.slice_dim % self.aggregator_num_heads:
            raise ValueError(
                f"The aggregator's width is the slice encoder's, {self.slice_dim}, which "
                f"aggregator_num_heads={self.aggregator_num_heads} doesn't divide. Choose a divisor."
            )
        for name, width in self.extra_sources.items():
            if not name.isidentifier() or not isinstance(width, int) or width < 1:
                raise ValueError(
                    f"SamfConfig.extra_sources has {name!r}: {width!r}; expected a name that is a Python identifier and "
                    "the width of its vector, a positive whole number."
                )
        self._check_calibration()
        if not self.project_text and self.fusion_dim != self.text_config.hidden_size:
            raise ValueError(
                f"project_text=False leaves the text embeddings {self.text_config.hidden_size} wide, but fusion_dim is "
                f"{self.fusion_dim}. Set project_text=True or fusion_dim={self.text_config.hidden_size}."
            )

    def _check_calibration(self) -> None:
        """Raise ValueError unless temperatures and biases are finite, one per finding, and temperatures positive."""
        for name, lowest in (("finding_temperature", 0.0), ("finding_bias", -math.inf)):
            values, count = getattr(self, name), len(self.scored_findings)
            if values is None:
                continue
            if len(values) != count or not all(lowest < value < math.inf for value in values):
                kind = "positive number" if lowest == 0.0 else "finite number"
                raise ValueError(
                    f"SamfConfig.{name} is {values}; expected one {kind} for each of the {count} findings "
                    f"{self.scored_findings}. Fit it again (samf calibrate), or leave it None."
                )
        for finding, pair in self.finding_statements.items():
            if isinstance(pair, str) or len(pair) != 2 or not all(pair):
                raise ValueError(
                    f"SamfConfig.finding_statements has {finding!r}: {pair!r}; expected two entries, what a report says when "
                    "the finding is present and when it is absent, each a sentence or a list of sentences."
                )


def _one_each(values: float | Sequence[float] | None, count: int) -> list[float] | None:
    """Return a list of one value per finding; a single number is repeated."""
    if values is None:
        return None
    return [float(values)] * count if isinstance(values, (int, float)) else list(values)


def _as_config(config: PretrainedConfig | SubConfig | None, default: SubConfig) -> PretrainedConfig:
    """Return a sub-model's configuration from an object, a dict with `model_type`, or None (`default`)."""
    if isinstance(config, PretrainedConfig):
        return config
    config = dict(default if config is None else config)
    return AutoConfig.for_model(config.pop("model_type", default["model_type"]), **config)


__all__ = ["SamfConfig"]
