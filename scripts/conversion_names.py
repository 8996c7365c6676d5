"""Names of weights: the reference implementation's, DINO's and transformers' ↔ ours."""

import re
from collections.abc import Iterable
from functools import cache

# Fields of a template. {qkv} is only on our side: one of their tensors stacks three of ours.
_FIELDS = {"n": r"\d+", "p": "weight|bias", "qkv": "[qkv]", "rest": ".+"}


@cache
def _pattern(template: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", template)  # text, field, text, field, …
    return re.compile(
        "".join(f"(?P<{piece}>{_FIELDS[piece]})" if i % 2 else re.escape(piece) for i, piece in enumerate(pieces))
    )


class Names:
    """A table of weight names, translated in both directions.

    Args:
        pairs: templates (theirs, ours): {n} is a layer's number, {p} weight or bias, {qkv} q, k or v, {rest} anything.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]):
        self.pairs = tuple(pairs)
        self._back = tuple((ours, theirs) for theirs, ours in self.pairs)

    def ours(self, name: str) -> str | None:
        """Return our name; None for an unknown one. "{qkv}" stays in the name of a tensor that stacks three of ours."""
        return _translate(name, self.pairs)

    def theirs(self, name: str) -> str:
        """Return their name of one of our weights; the same name for an unknown one."""
        return _translate(name, self._back) or name


def _translate(name: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    for source, target in pairs:
        match = _pattern(source).fullmatch(name)
        if match:
            return target.format(**{"qkv": "{qkv}", **match.groupdict()})
    return None


_DINO = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.{p}", "embeddings.patch_embeddings.projection.{p}"),
    ("blocks.{n}.norm1.{p}", "layers.{n}.layernorm_before.{p}"),
    ("blocks.{n}.attn.qkv.{p}", "layers.{n}.attention.{qkv}_proj.{p}"),
    ("blocks.{n}.attn.proj.{p}", "layers.{n}.attention.o_proj.{p}"),
    ("blocks.{n}.norm2.{p}", "layers.{n}.layernorm_after.{p}"),
    ("blocks.{n}.mlp.fc1.{p}", "layers.{n}.mlp.fc1.{p}"),
    ("blocks.{n}.mlp.fc2.{p}", "layers.{n}.mlp.fc2.{p}"),
    ("norm.{p}", "layernorm.{p}"),
)
# transformers' ViT, under its present names and those of older releases.
_VIT = (
    *((ours, ours) for _, ours in _DINO),
    ("encoder.layer.{n}.layernorm_before.{p}", "layers.{n}.layernorm_before.{p}"),
    ("encoder.layer.{n}.attention.attention.query.{p}", "layers.{n}.attention.q_proj.{p}"),
    ("encoder.layer.{n}.attention.attention.key.{p}", "layers.{n}.attention.k_proj.{p}"),
    ("encoder.layer.{n}.attention.attention.value.{p}", "layers.{n}.attention.v_proj.{p}"),
    ("encoder.layer.{n}.attention.output.dense.{p}", "layers.{n}.attention.o_proj.{p}"),
    ("encoder.layer.{n}.layernorm_after.{p}", "layers.{n}.layernorm_after.{p}"),
    ("encoder.layer.{n}.intermediate.dense.{p}", "layers.{n}.mlp.fc1.{p}"),
    ("encoder.layer.{n}.output.dense.{p}", "layers.{n}.mlp.fc2.{p}"),
)
_AGGREGATOR = (
    ("cls_token", "cls_token"),
    ("transformer_encoder.layers.{n}.self_attn.in_proj_{p}", "layers.{n}.attention.{qkv}_proj.{p}"),
    ("transformer_encoder.layers.{n}.self_attn.out_proj.{p}", "layers.{n}.attention.o_proj.{p}"),
    ("transformer_encoder.layers.{n}.norm1.{p}", "layers.{n}.attention_norm.{p}"),
    ("transformer_encoder.layers.{n}.linear1.{p}", "layers.{n}.up_proj.{p}"),
    ("transformer_encoder.layers.{n}.linear2.{p}", "layers.{n}.down_proj.{p}"),
    ("transformer_encoder.layers.{n}.norm2.{p}", "layers.{n}.feed_forward_norm.{p}"),
    ("volume_proj.{p}", "projection.{p}"),
)
_FUSION = (
    ("project_2d.{p}", "project_slices.{p}"),
    ("project_3d.{p}", "project_volume.{p}"),
    ("project_text.{p}", "project_text.{p}"),
    ("fusion_layer.{p}", "mix.{p}"),
)
_TEXT = (
    ("embed_tokens.weight", "embed_tokens.weight"),
    ("layers.{n}.{rest}", "layers.{n}.{rest}"),
    ("norm.weight", "norm.weight"),
)
_PARTS = (
    ("model.vision_tower.vision_tower.", "model.slice_encoder.", _DINO),
    ("model.mm_projector.", "model.aggregator.", _AGGREGATOR),
    ("model.mm_fusion.", "model.fusion.", _FUSION),
    ("model.", "model.language_model.", _TEXT),
    ("", "", (("lm_head.weight", "lm_head.weight"),)),
)

DINO_NAMES = Names(_DINO)
VIT_NAMES = Names(_VIT)
TEXT_NAMES = Names(_TEXT)
MODEL_NAMES = Names((theirs + a, ours + b) for theirs, ours, names in _PARTS for a, b in names)
