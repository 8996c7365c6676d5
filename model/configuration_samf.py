"""What a SAMF model is made of: slice encoder, aggregator, fusion, language model.

Paper: "From Slices to Volumes: Multi-Scale Fusion of 2D and 3D Features for CT Scan Report Generation", MICCAI 2025.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.activations import ACT2CLS

# Every class that a saved folder can be loaded as. Kept whole in each saved configuration: `save_pretrained` alone would
# only enter the class that was saved.
AUTO_MAP = {
    "AutoConfig": "configuration_samf.SamfConfig",
    "AutoModel": "modeling_samf.SamfForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_samf.SamfForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_samf.SamfForConditionalGeneration",
    "AutoProcessor": "processing_samf.SamfProcessor",
    "AutoImageProcessor": "image_processing_samf.SamfImageProcessor",
}

# ViT-B/16 at 224 pixels, as DINO trains it (LayerNorm eps 1e-6, not the library's 1e-12).
DEFAULT_VISION_CONFIG = {"model_type": "vit", "layer_norm_eps": 1e-6}
# Phi-3-mini-4k-instruct.
DEFAULT_TEXT_CONFIG = {"model_type": "phi3", "sliding_window": 2047}

# The label of what has no loss: tokens of a prompt, findings that nobody has read.
IGNORE_INDEX = -100

CHOICES = {
    "fusion_type": ("samf", "ao2d", "slice_tokens"),
    "fusion_scale": (None, "rsqrt"),
    "fusion_text_scope": ("prompt", "sequence"),
    "aggregator_norm": ("post", "pre"),
    "slice_position_scope": ("none", "aggregator", "all"),
    "slice_pooling": (None, "cls", "mean", "pooler"),
}


class SamfConfig(PretrainedConfig):
    r"""Configuration of [`SamfModel`] and [`SamfForConditionalGeneration`].

    Args:
        vision_config (`PretrainedConfig | dict`, *optional*): the slice encoder f_2d; ViT-B/16 at 224 pixels by default.
        text_config (`PretrainedConfig | dict`, *optional*): the language model; Phi-3-mini-4k by default.
        image_token_id (`int`, defaults to 32011): the placeholder's id, a spare embedding row of Phi-3.
        num_image_tokens (`int`, defaults to 256): tokens that stand for the fused vector in the prompt. `slice_tokens`
            has one token a slice instead and doesn't read this.
        slice_pooling (`str`, *optional*): z_2d is the encoder's `"cls"` token, the `"mean"` over all tokens, or its own
            `"pooler"`. `None` = the CLS token; for an encoder without one its own pooler, or else the mean. A model sets
            what holds for its encoder.
        slice_position_scope (`str`, defaults to `"aggregator"`): who sees the plane and depth embeddings: the
            `"aggregator"`, `"all"` (the fusion's slices too) or `"none"` (the paper: shuffling the slices changes nothing).
        aggregator_num_layers, aggregator_num_heads, aggregator_ffn_dim, aggregator_activation, aggregator_dropout,
            aggregator_layer_norm_eps: the transformer encoder f_3d, as published 2, 8, 1024, `"relu"`, 0.1 and 1e-5.
        aggregator_norm (`str`, defaults to `"post"`): LayerNorm after (paper) or before (`"pre"`) each block.
        volume_dim (`int`, defaults to 256): width of the volume embedding z_3d.
        fusion_type (`str`, defaults to `"ao2d"`): `"samf"` (eq. 10), `"ao2d"` (eq. 12) or `"slice_tokens"` (one image
            token a slice, each with its own slice and text part).
        fusion_dim (`int`, *optional*): d_proj; the language model's width by default.
        fusion_scale (`str`, *optional*): `None` leaves the scores unscaled (paper), `"rsqrt"` divides them by sqrt(d_proj).
        fusion_text_scope (`str`, defaults to `"prompt"`): `"prompt"` lets the fusion read prompt tokens alone.
            `"sequence"` reads every token, answer and padding included: what the published code does, and only for
            running the published checkpoints.
        project_text (`bool`, defaults to `True`): whether W_text projects the prompt's embeddings. `False` needs
            `fusion_dim` to be the language model's width.
        finding_names (`Sequence[str]`, defaults to `()`): labels of the optional findings head on z_3d; empty = no head.
        finding_loss_weight (`float`, defaults to 1.0): factor of the findings' loss beside the language model's.
        extra_sources (`Mapping[str, int]`, *optional*): further modalities of the fusion by name, each with the width of
            its vector: `{"prior_volume": 256, "age_sex": 2}` for a prior scan's volume embedding and a patient's data.
            Each is projected to d_proj and joins the concatenation of eqs. 10 and 12; one that a patient lacks is masked.
            Kept in the order of their names. With none the model is the paper's.
        vision_chunk_size (`int`, *optional*): the most slices that the slice encoder reads in one call; `None` = all.
        initializer_range (`float`, defaults to 0.02): standard deviation of new weights.

    Raises:
        ValueError: a choice that doesn't exist (the message lists those that do), or widths that don't fit together.
    """

    model_type = "samf"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    has_no_defaults_at_init = False
    # What Trainer's predict and compute_metrics get is then the logits alone.
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
        vision_config: PretrainedConfig | dict[str, Any] | None = None,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        image_token_id: int = 32011,
        num_image_tokens: int = 256,
        slice_pooling: str | None = None,
        slice_position_scope: str = "aggregator",
        aggregator_num_layers: int = 2,
        aggregator_num_heads: int = 8,
        aggregator_ffn_dim: int = 1024,
        aggregator_activation: str = "relu",
        aggregator_dropout: float = 0.1,
        aggregator_layer_norm_eps: float = 1e-5,
        aggregator_norm: str = "post",
        volume_dim: int = 256,
        fusion_type: str = "ao2d",
        fusion_dim: int | None = None,
        fusion_scale: str | None = None,
        fusion_text_scope: str = "prompt",
        project_text: bool = True,
        finding_names: Sequence[str] = (),
        finding_loss_weight: float = 1.0,
        extra_sources: Mapping[str, int] | None = None,
        vision_chunk_size: int | None = None,
        initializer_range: float = 0.02,
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
        self.volume_dim = volume_dim
        self.fusion_type = fusion_type
        self.fusion_dim = fusion_dim if fusion_dim is not None else self.text_config.hidden_size
        self.fusion_scale = fusion_scale
        self.fusion_text_scope = fusion_text_scope
        self.project_text = project_text
        self.finding_names = list(finding_names)
        self.finding_loss_weight = finding_loss_weight
        self.extra_sources = dict(sorted((extra_sources or {}).items()))  # as a saved configuration orders them
        self.vision_chunk_size = vision_chunk_size
        self.initializer_range = initializer_range
        self._check()

        kwargs.setdefault("tie_word_embeddings", bool(getattr(self.text_config, "tie_word_embeddings", False)))
        self.auto_map = kwargs.pop("auto_map", None) or dict(AUTO_MAP)
        super().__init__(**kwargs)

    @property
    def slice_dim(self) -> int:
        """Width of z_2d: that of the slice encoder's last features."""
        width = getattr(self.vision_config, "hidden_size", None)
        if width is None:  # ConvNeXt and ResNet list one a stage
            width = (getattr(self.vision_config, "hidden_sizes", None) or [None])[-1]
        if not isinstance(width, int):
            raise ValueError(
                f"SamfConfig.vision_config is a {type(self.vision_config).__name__}, which has no hidden_size. Give an image "
                "encoder; of a model of images and text (CLIP, SigLIP) its vision_config."
            )
        return width

    def _check(self) -> None:
        for name, choices in CHOICES.items():
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
        if not self.project_text and self.fusion_dim != self.text_config.hidden_size:
            raise ValueError(
                f"project_text=False leaves the text embeddings {self.text_config.hidden_size} wide, but fusion_dim is "
                f"{self.fusion_dim}. Set project_text=True or fusion_dim={self.text_config.hidden_size}."
            )


def _as_config(config: PretrainedConfig | dict[str, Any] | None, default: dict[str, Any]) -> PretrainedConfig:
    """A sub-model's configuration from an object, a dict with `model_type`, or nothing (`default`)."""
    if isinstance(config, PretrainedConfig):
        return config
    config = dict(default if config is None else config)
    return AutoConfig.for_model(config.pop("model_type", default["model_type"]), **config)


__all__ = ["SamfConfig"]
