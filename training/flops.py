"""Floating-point operations of a training step, for MFU: the model's products, not those that checkpointing repeats.

A product of (m, k) and (k, n) counts 2·m·k·n. Attention counts as whole squares, causal or not, as is the custom.
Shapes: B volumes, S slices, T tokens, d = d_proj.
"""

from dataclasses import dataclass

from torch import nn

from samf.model.modeling_samf import SamfForConditionalGeneration
from samf.training.param_groups import part_of

#: Dense bfloat16 peaks in TFLOP/s by what a GPU's name contains, as its maker states them; the first that fits counts.
PEAK_TFLOPS = {
    "H200": 989.5,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H100": 989.5,
    "GH200": 989.5,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.1,
    "L40": 181.1,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "V100": 125.0,
    "T4": 65.0,
}


def known_peak(device_name: str) -> float | None:
    """A GPU's dense bfloat16 peak (float16 for those without) in TFLOP/s; None for one that isn't known."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


PATCHES = "patch_embed"  # what the names of a ViT's first layer contain


@dataclass
class Work:
    """What one or several batches held, summed over their rows.

    Attributes:
        rows: prompts. volumes: those with a volume. slices: of all volumes.
        pixels: slices that went through the slice encoder, 0 with cached embeddings.
        tokens, tokens_squared: of the language model's sequences, Σ T and Σ T².
        text: tokens that the fusion projects. text_slices: Σ T·S over these. slices_squared: Σ (S + 1)².
        padded: the places of all sequences, padding included.
    """

    rows: float = 0
    volumes: float = 0
    slices: float = 0
    pixels: float = 0
    tokens: float = 0
    tokens_squared: float = 0
    text: float = 0
    text_slices: float = 0
    slices_squared: float = 0
    padded: float = 0


class StepFlops:
    """Operations of forward and backward passes over a SAMF model, in peft's wrapper or not.

    A weight that is trained costs its product three times: forward, the gradient of its input, its own gradient. A frozen
    one costs two, or the forward pass alone where nothing below it is trained. An adapter's small matrices are trained.
    """

    def __init__(self, model: nn.Module):
        base: SamfForConditionalGeneration = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = base.config
        self.weights = _linear_weights(base)
        trains = {part_of(name) for name, weight in base.named_parameters() if weight.requires_grad}
        before = {"slice_encoder", "slice_position", "aggregator", "fusion"}
        embeddings = any(weight.requires_grad for weight in base.get_input_embeddings().parameters())
        # Whether a gradient must flow through a part's frozen weights: something that is trained feeds it.
        self.flows = {
            "slice_encoder": "slice_encoder" in trains,
            "slice_position": True,
            "aggregator": bool(trains & {"slice_encoder", "slice_position", "aggregator"}),
            "fusion": bool(trains & before) or embeddings,
            "finding_head": bool(trains & (before - {"fusion"})),
            "language_model": bool(trains & (before | {"language_model"})),
        }

    def __call__(self, work: Work) -> float:
        """Operations of a training step on what `work` counts."""
        products = 0.0
        for name, (size, is_trained) in self.weights.items():
            passes = 3 if is_trained else 2 if self.flows[part_of(name)] else 1
            passes -= passes > 1 and PATCHES in name  # pixels ask for no gradient
            products += 2.0 * size * passes * self._rows(name, work)
        return products + self._attention(work)

    def _rows(self, name: str, work: Work) -> float:
        """How many vectors a weight is applied to."""
        part = part_of(name)
        if part == "slice_encoder":
            patches = self._patches()
            return work.pixels * (patches if PATCHES in name else patches + 1)
        if part == "slice_position":
            return work.slices
        if part == "aggregator":
            return work.volumes if ".projection." in name else work.slices + work.volumes
        if part == "fusion":
            return self._fusion_rows(name, work)
        return work.volumes if part == "finding_head" else work.tokens

    def _fusion_rows(self, name: str, work: Work) -> float:
        if "project_slices" in name:
            return work.slices
        if "project_text" in name:
            return work.text
        if "mix" in name and self.config.fusion_type == "slice_tokens":
            return work.slices
        return work.volumes

    def _attention(self, work: Work) -> float:
        """Products of queries, keys and values: twice 2·N²·width a layer, and twice that again backward."""
        vision, text = self.config.vision_config, self.config.text_config
        heads = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        language = work.tokens_squared * heads * text.num_attention_heads * text.num_hidden_layers
        tokens = self._patches() + 1
        slices = work.pixels * tokens**2 * vision.hidden_size * vision.num_hidden_layers
        aggregator = work.slices_squared * vision.hidden_size * self.config.aggregator_num_layers
        dim, scores = self.config.fusion_dim, work.slices + work.text
        if self.config.fusion_type == "slice_tokens":
            scores = work.text_slices
        elif self.config.fusion_type == "ao2d":
            scores += work.text_slices
        passes = {part: 3 if flows else 1 for part, flows in self.flows.items()}
        return 4.0 * (
            language * passes["language_model"]
            + slices * passes["slice_encoder"]
            + aggregator * passes["aggregator"]
            + scores * dim * passes["fusion"]
        )

    def _patches(self) -> int:
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2


def can_count(model: nn.Module) -> bool:
    """Whether the slice encoder is one whose patches are known."""
    vision = getattr(model.config, "vision_config", None)
    return all(isinstance(getattr(vision, name, None), int) for name in ("image_size", "patch_size"))


def _linear_weights(model: nn.Module) -> dict[str, tuple[int, bool]]:
    """The size of each weight of a linear or convolutional layer that is in use, and whether it is trained."""
    return {
        f"{name}.weight": (module.weight.numel(), module.weight.requires_grad)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and ".original_module" not in name  # peft keeps what it replaces
    }
