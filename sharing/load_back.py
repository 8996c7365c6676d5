"""What a fresh process runs to load a pushed model as others do: by remote code, without this package.

    python load_back.py OWNER/NAME REVISION KIND outline|full

It prints one line of JSON. `python load_back.py FOLDER "" KIND full` does the same with a folder.
"""

import hashlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

_SHOWN = 3


def main(source: str, revision: str, kind: str, depth: str) -> None:
    """Load and describe a model.

    Args:
        source: Hub id or folder.
        revision: commit; empty for a folder.
        kind: "model", "adapter" or "quantized".
        depth: "outline" builds the model without weights, "full" loads them and runs it once.
    """
    sys.modules["samf"] = None  # type: ignore[assignment]  # whatever is installed here, others may not have it
    from transformers import AutoConfig, AutoProcessor

    place = {"revision": revision} if revision else {}
    config = AutoConfig.from_pretrained(source, trust_remote_code=True, **place)
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True, **place)
    found = {"config": type(config).__name__, "processor": type(processor).__name__}
    if depth == "full":
        found |= _run_once(source, revision)
    else:
        found |= _outline(source, revision, kind, config)
    sys.stdout.write(json.dumps(found) + "\n")


def _outline(source: str, revision: str, kind: str, config: Any) -> dict[str, Any]:
    """Build the model on the meta device and compare its tensors with the headers of the weights on the Hub."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    model_class = get_class_from_dynamic_module(
        config.auto_map["AutoModelForImageTextToText"], source, revision=revision
    )
    if kind != "model":
        return {"model": model_class.__name__, "parameters": None}
    with torch.device("meta"):
        model = model_class(config)
    own = revert_weight_conversion(model, model.state_dict())
    stored = _shapes(source, revision)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = sorted(own.keys() - stored.keys() - tied)
    different = sorted(name for name in own.keys() & stored.keys() if tuple(own[name].shape) != tuple(stored[name]))
    if missing or different:
        raise ValueError(f"weights missing: {missing[:_SHOWN]}; of another shape: {different[:_SHOWN]}")
    return {"model": model_class.__name__, "parameters": sum(tensor.numel() for tensor in model.parameters())}


def _shapes(source: str, revision: str) -> dict[str, list[int]]:
    """Return name → shape of the weights, from the headers of the files on the Hub."""
    from huggingface_hub import get_safetensors_metadata

    files = get_safetensors_metadata(source, revision=revision).files_metadata
    return {name: tensor.shape for file in files.values() for name, tensor in file.tensors.items()}


def _run_once(source: str, revision: str) -> dict[str, Any]:
    """Load the weights and return a digest of the logits for a fixed input."""
    import torch
    from transformers import AutoModelForImageTextToText

    if revision:  # an adapter's base has another revision than the adapter, which only a folder can tell
        from huggingface_hub import snapshot_download

        source = snapshot_download(source, revision=revision, ignore_patterns=["figures/*"])
    model = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True).eval()
    config = model.config
    size, slices = config.vision_config.image_size, 3
    tokens = slices if config.fusion_type == "slice_tokens" else config.num_image_tokens
    ids = torch.cat([torch.full((1, tokens), config.image_token_id), torch.arange(1, 9)[None]], dim=1)
    ids[:, tokens:][ids[:, tokens:] == config.image_token_id] = 0
    wave = torch.linspace(-2, 2, slices * 3 * size * size).sin().reshape(1, slices, 3, size, size)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": wave.to(model.dtype)}
    with torch.inference_mode():
        logits = model(**inputs).logits[0, -1].float()
    bits = struct.pack(f"<{logits.numel()}f", *logits.tolist())
    parameters = sum(tensor.numel() for tensor in model.parameters())
    return {
        "model": type(model).__name__,
        "parameters": parameters,
        "output": hashlib.sha256(bits).hexdigest()[:16],
        "weights": sorted(path.name for path in Path(source).glob("*.safetensors")),
    }


if __name__ == "__main__":
    main(*sys.argv[1:5])
