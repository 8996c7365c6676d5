"""Floating-point operations of a training step, for MFU.

A product of (m, k) and (k, n) counts 2·m·k·n. Attention counts in full, causal or not, as is customary; what gradient
checkpointing computes again doesn't count. `torch.utils.flop_counter` agrees within 5 % on a tiny model (a test compares
them), but it has to trace every step, counts recomputation, and can't see into custom attention kernels.
"""

from dataclasses import dataclass

from torch import nn

from samf.model.modeling_samf import SamfForConditionalGeneration
from samf.training.param_groups import part_of

#: Dense bfloat16 peaks in TFLOP/s, as their maker states them, by a part of the GPU's name; the first match counts.
_PEAK_TFLOPS = {
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
    """Return a GPU's dense bfloat16 peak (float16 where it has no bfloat16) in TFLOP/s; None for an unknown GPU."""
    return next((peak for name, peak in _PEAK_TFLOPS.items() if name in device_name), None)


_PATCHES = "patch_embed"  # part of the names of a ViT's first layer


@dataclass
class Work:
    """Sizes of one or several batches, summed over their rows, with S slices and T tokens each.

    Attributes:
        rows: Prompts.
        volumes: Prompts with a volume.
        slices: Σ S.
        pixels: Slices that go through the slice encoder; 0 with cached embeddings.
        tokens: Σ T of the language model's sequences.
        tokens_squared: Σ T² of the language model's sequences.
        text: Tokens that the fusion projects.
        text_slices: Σ T·S over the rows with a volume.
        slices_squared: Σ (S + 1)² over the rows with a volume.
        padded: Length of all sequences, padding included.
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
    """Counts the operations of forward and backward passes over a SAMF model, also wrapped by peft.

    A trained weight costs its product three times: forward, the gradient of its input, its own gradient. A frozen weight
    costs two, or only the forward product where nothing before it is trained. An adapter's small matrices are trained.

    Args:
        model: SamfForConditionalGeneration, with the weights to train chosen.
    """

    def __init__(self, model: nn.Module):
        base: SamfForConditionalGeneration = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = base.config
        self.weights = _linear_weights(base)
        trains = {part_of(name) for name, weight in base.named_parameters() if weight.requires_grad}
        before = {"slice_encoder", "slice_position", "aggregator", "fusion"}
        embeddings = any(weight.requires_grad for weight in base.get_input_embeddings().parameters())
        # Whether a gradient flows through a part's frozen weights, because something before it is trained.
        self.flows = {
            "slice_encoder": "slice_encoder" in trains,
            "slice_position": True,
            "aggregator": bool(trains & {"slice_encoder", "slice_position", "aggregator"}),
            "fusion": bool(trains & before) or embeddings,
            "finding_head": bool(trains & (before - {"fusion"})),
            "language_model": bool(trains & (before | {"language_model"})),
        }

    def __call__(self, work: Work) -> float:
        """Return the operations of training on batches of these sizes."""
        products = 0.0
        for name, (size, is_trained) in self.weights.items():
            passes = 3 if is_trained else 2 if self.flows[part_of(name)] else 1
            passes -= passes > 1 and _PATCHES in name  # pixels need no gradient
            products += 2.0 * size * passes * self._rows(name, work)
        return products + self._attention(work)

    def _rows(self, name: str, work: Work) -> float:
        """Return the number of vectors that a weight is applied to."""
        part = part_of(name)
        if part == "slice_encoder":
            patches = self._patches()
            return work.pixels * (patches if _PATCHES in name else patches + 1)
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
        """Return the operations of the products of queries, keys and values: 4·N²·width per layer forward, 8 backward."""
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
    """Return whether the sizes of the slice encoder's image and patches are known."""
    vision = getattr(model.config, "vision_config", None)
    return all(isinstance(getattr(vision, name, None), int) for name in ("image_size", "patch_size"))


def _linear_weights(model: nn.Module) -> dict[str, tuple[int, bool]]:
    """Return size and `requires_grad` of each weight of a linear or convolutional layer that is in use."""
    return {
        f"{name}.weight": (module.weight.numel(), module.weight.requires_grad)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and ".original_module" not in name  # peft keeps the modules that it replaces
    }
