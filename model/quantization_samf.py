"""Load and save a SAMF model whose language model has 4-bit or 8-bit weights, for a CPU.

    config = SamfQuantizationConfig(bits=4)
    model = SamfForConditionalGeneration.from_pretrained(folder, quantization_config=config)  # rounds while it loads
    model.save_pretrained("small")  # loads as it is, without a configuration

The linear layers of the language model and its head are rounded. Its embeddings are in bfloat16, and its norms in the
precision of its hidden states (`KernelPlan.compute`); all other parts keep their own.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .file_memory_samf import (
    AFTERWARDS,
    WHILE_LOADING,
    fetch_pages,
    in_file,
    keep_freed_blocks,
    release_memory,
    release_pages,
)
from .quantized_linear_samf import QuantizedLinear, kernel_plan
from .quantized_weights_samf import GROUP_SIZES

logger = logging.get_logger(__name__)

METHOD = "samf"
_BITS = (4, 8)
_SLICES_AT_ONCE = 8  # that are encoded: of 72, the hidden states would take as much memory as the encoder
_LEAST_IN_FILE = 1 << 20  # bytes of a weight that is kept in a file: each has a file of its own
_DEVICE_CHOICES = ("auto", "balanced", "balanced_low_0", "sequential")


class SamfQuantizationConfig(QuantizationConfigMixin):
    """How the language model's linear layers are rounded.

    Args:
        bits: 4 or 8.
        group_size: inputs that share a scale of 4-bit weights: 32, 64 or 128. Fewer are more exact and take more memory.
        head_bits: of the language modelling head: 4, 8, or None = not rounded. A head that shares its weight with the
            embeddings is never rounded.
        skip_modules: layers that aren't rounded, each by the end of its name, such as `"down_proj"`.
        **kwargs: ignored; a saved configuration has further entries.

    Raises:
        ValueError: a number of bits or a group size that doesn't exist.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 64,
        head_bits: int | None = 8,
        skip_modules: Sequence[str] = (),
        **kwargs: Any,
    ):
        self.quant_method = cast(Any, METHOD)  # the library's own methods are an enumeration
        self.bits = bits
        self.group_size = group_size
        self.head_bits = head_bits
        self.skip_modules = list(skip_modules)
        if bits not in _BITS or head_bits not in (None, *_BITS):
            raise ValueError(
                f"SamfQuantizationConfig has bits={bits!r} and head_bits={head_bits!r}; bits must be 4 or 8, and "
                "head_bits 4, 8 or None."
            )
        if group_size not in GROUP_SIZES:
            raise ValueError(f"SamfQuantizationConfig.group_size is {group_size!r}; it must be one of {GROUP_SIZES}.")


def quantizable_layers(model: PreTrainedModel, config: SamfQuantizationConfig) -> dict[str, int]:
    """Return the bits of each linear layer that a configuration rounds, by its name in the model.

    Args:
        model: a SAMF model.
        config: the configuration.
    """
    head = model.get_output_embeddings()
    inside = {id(module) for module in model.get_decoder().modules()}
    tied = {name for pair in (model.all_tied_weights_keys or {}).items() for name in pair}
    layers = {}
    for name, module in model.named_modules():
        bits = config.bits if id(module) in inside else config.head_bits if module is head else None
        skipped = name.endswith(tuple(config.skip_modules)) or f"{name}.weight" in tied
        if isinstance(module, nn.Linear) and bits is not None and not skipped:
            layers[name] = bits
    return layers


def quantize(model: PreTrainedModel, config: SamfQuantizationConfig) -> PreTrainedModel:
    """Round the language model of a model in memory, in place, and return the model.

    Args:
        model: a SAMF model on a CPU.
        config: the configuration.

    Raises:
        ValueError: the model is rounded already, or not on a CPU.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("The model's weights are quantised already. Load it again from unquantised weights.")
    if model.device.type != "cpu":
        raise ValueError(
            f"The model is on {model.device}; its quantised weights are for a CPU. Call model.cpu() first."
        )
    for name, bits in quantizable_layers(model, config).items():
        layer = QuantizedLinear.for_bits(bits).from_linear(
            cast(nn.Linear, model.get_submodule(name)), config.group_size
        )
        model.set_submodule(name, layer.requires_grad_(False))
    quantizer = SamfQuantizer(config, pre_quantized=False)
    quantizer.cast_language_model(model)
    cast(Any, model).hf_quantizer, cast(Any, model).is_quantized = quantizer, True
    cast(Any, model).quantization_method = METHOD
    quantizer.postprocess_model(model)
    return model


def describe_quantization(model: nn.Module) -> str | None:
    """Return in one line how a model's weights are rounded and what computes with them; None where none are."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    if not layers:
        return None
    plan = kernel_plan(min(layer.bits for layer in layers))
    size = sum(layer.weight.nbytes + layer.scales.nbytes for layer in layers)
    return f"{len(layers)} layers of the language model, {size / 1e9:.2f} GB: {plan}"


def quantization_name(model: nn.Module) -> str | None:
    """Return how a model's weights are quantised, such as "samf int4"; None where they aren't."""
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return None
    method = getattr(config, "quant_method", None)
    bits = f" int{config.bits}" if isinstance(getattr(config, "bits", None), int) else ""
    return f"{getattr(method, 'value', method)}{bits}"


class SamfQuantizer(HfQuantizer):
    """What the library asks of a method of quantisation."""

    quantization_config: SamfQuantizationConfig
    requires_calibration = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse another device than the CPU.

        Raises:
            ValueError: `device_map` names one.
        """
        places = kwargs.get("device_map")
        named = places.values() if isinstance(places, dict) else [] if places in (None, *_DEVICE_CHOICES) else [places]
        if any(place == "disk" or torch.device(place).type != "cpu" for place in named):
            raise ValueError(
                f"SamfQuantizationConfig is for a CPU, and device_map is {places}. Leave device_map out; on a GPU use "
                "quantization_config=BitsAndBytesConfig(load_in_4bit=True) or TorchAoConfig(Int8WeightOnlyConfig())."
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Return the CPU for every choice that is the library's."""
        return {"": "cpu"} if device_map in _DEVICE_CHOICES else device_map

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, bits in quantizable_layers(model, self.quantization_config).items():
            old = cast(nn.Linear, model.get_submodule(name))
            shape, has_bias = (old.in_features, old.out_features), old.bias is not None
            group_size = self.quantization_config.group_size
            model.set_submodule(name, QuantizedLinear.for_bits(bits)(*shape, has_bias, group_size, device="meta"))
        self.cast_language_model(model)
        return model

    def cast_language_model(self, model: PreTrainedModel) -> None:
        """Bring the parameters that aren't rounded to the type of the hidden states; buffers stay as they are.

        Embeddings that share no weight with the head are in bfloat16: one row of them is read for each token.
        """
        dtype = kernel_plan(self.quantization_config.bits).dtype
        if not model.all_tied_weights_keys:
            model.set_input_embeddings(Bfloat16Embedding.from_embedding(model.get_input_embeddings(), dtype))
        parts = [model.get_decoder(), model.get_output_embeddings()]
        for module in (module for part in parts if part is not None for module in part.modules()):
            kept = torch.bfloat16 if isinstance(module, Bfloat16Embedding) else dtype
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_floating_point() and parameter.dtype != kept:
                    setattr(module, name, nn.Parameter(parameter.detach().to(kept), parameter.requires_grad))
        model.tie_weights()

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
        for bits in {layer.bits for layer in layers}:
            kernel_plan(bits)  # measured before other threads are at work
        keep_freed_blocks(WHILE_LOADING)
        # The largest first: its copies are in memory for a moment, as long as others aren't yet.
        layers.sort(key=lambda layer: layer.weight.nbytes, reverse=True)
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            list(threads.map(QuantizedLinear.arrange, layers))
        for part in _parts_read_once(model):
            _keep_in_file(part)
        model.config.vision_chunk_size = model.config.vision_chunk_size or _SLICES_AT_ONCE
        keep_freed_blocks(AFTERWARDS)
        logger.info(describe_quantization(model))
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Return whether a weight of the checkpoint is rounded while it is loaded.

        Args:
            model: the model.
            param_name: the weight's name.
            **kwargs: ignored.
        """
        name, _, kind = param_name.rpartition(".")
        return not self.pre_quantized and kind == "weight" and isinstance(model.get_submodule(name), QuantizedLinear)

    def get_quantize_ops(self) -> ConversionOps:
        """Return what rounds a weight."""
        return _Round()

    def is_serializable(self) -> bool:
        """Return True: the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return False: Trainer refuses the model."""
        return False


def _parts_read_once(model: PreTrainedModel) -> list[nn.Module]:
    """Return the parts of a SAMF model that a prompt needs once: slice encoder, aggregator, fusion."""
    decoder = model.get_decoder()
    return [part for part in model.base_model.children() if not any(module is decoder for module in part.modules())]


def _keep_in_file(part: nn.Module) -> None:
    """Keep a part's large weights in temporary files, and in memory only while the layer that has them computes."""
    for layer in part.modules():
        large = [weight for weight in layer.parameters(recurse=False) if weight.nbytes >= _LEAST_IN_FILE]
        for weight in large:
            weight.data = in_file(weight.data)
        if large:
            release_memory()  # of the file that they were read from
            layer.register_forward_pre_hook(_fetch)
            layer.register_forward_hook(_release)


def _fetch(layer: nn.Module, args: Any) -> None:
    for weight in layer.parameters(recurse=False):
        fetch_pages(weight)


def _release(layer: nn.Module, args: Any, output: Any) -> None:
    for weight in layer.parameters(recurse=False):
        release_pages(weight)


class Bfloat16Embedding(nn.Embedding):
    """Embeddings in bfloat16 that are looked up in the type of the hidden states."""

    hidden_dtype: torch.dtype

    @classmethod
    def from_embedding(cls, embedding: nn.Module, hidden_dtype: torch.dtype) -> "Bfloat16Embedding":
        """Return embeddings with another's weight, which `cast_language_model` brings to bfloat16.

        Args:
            embedding: it isn't changed; the weight is shared.
            hidden_dtype: of what is looked up.
        """
        old = cast(nn.Embedding, embedding)
        new = cls(old.num_embeddings, old.embedding_dim, old.padding_idx, device="meta")
        new.weight, new.hidden_dtype = old.weight, hidden_dtype
        return new

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of tokens (…) as (…, D)."""
        return super().forward(input).to(self.hidden_dtype)


class _Round(ConversionOps):
    """Rounds a weight as soon as it has been read, so that no more than one is in memory whole."""

    def convert(  # type: ignore[override]  # the library passes more, by name
        self, input_dict: dict[str, Any], model: PreTrainedModel, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Return the weight and scales of a layer by their names.

        Args:
            input_dict: the weight (channels, inputs) by its name, or a list of it.
            model: the model.
            missing_keys: names that the checkpoint lacks; the scales are no longer among them.
            **kwargs: ignored.
        """
        ((name, value),) = input_dict.items()
        prefix = name.rpartition(".")[0]
        layer = cast(QuantizedLinear, model.get_submodule(prefix))
        weight, scales = layer.quantized(value[0] if isinstance(value, list) else value)
        if missing_keys is not None:
            missing_keys.discard(f"{prefix}.scales")
        release_memory()
        return {f"{prefix}.weight": weight, f"{prefix}.scales": scales}


def register() -> None:
    """Make these classes the library's for the method "samf".

    Each copy of this code, of the package and of repositories, does so before it loads a model.
    """
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = SamfQuantizationConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = SamfQuantizer


register()
