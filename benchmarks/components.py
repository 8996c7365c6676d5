"""Try the library's language models and slice encoders in SAMF, each as a tiny configuration with random weights.

    python -m samf.benchmarks.components                     # the table of docs/reference/components.md, a few minutes
    python -m samf.benchmarks.components --only phi3 siglip  # some of them

A language model is right when SAMF gives its own logits and loss on text alone, the same logits with the cache on as off
(past every switch of its rotary embedding and past its sliding window), the same logits after save and load, and two
steps of DistributedDataParallel. A slice encoder is right when its embeddings are what its own class gives, twice the
same, and in bfloat16; saved and loaded the same; and two steps again. What SAMF can't run it refuses by name.
"""

import argparse
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from samf.model.configuration_samf import SamfConfig
from samf.model.modeling_samf import SamfForConditionalGeneration

logger = logging.getLogger(__name__)

VOCABULARY, IMAGE_ID, IMAGE_TOKENS, SLICES = 99, 5, 4, 6
PROMPT, ANSWER = 20, 16  # 24 positions before the answer, 40 after
SWITCH = 32  # positions that the tiny longrope models are rotated for by their short factors
WINDOW = 16
PROCESSES = 2

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LONGROPE = {
    "original_max_position_embeddings": SWITCH,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.05, 1.1, 1.2],
        "long_factor": [1.0, 4.0, 9.0, 16.0],
        "original_max_position_embeddings": SWITCH,
    },
}
MSCALE = {**LONGROPE, "rope_scaling": {**LONGROPE["rope_scaling"], "short_mscale": 1.1, "long_mscale": 1.3}}
# GPT-2 and its like have other names for their sizes.
GPT_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 64, "vocab_size": VOCABULARY}

# Name → model_type and settings beside SIZES; what is not a matrix in its class stands in the setting's name.
LANGUAGE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "phi3, longrope": ("phi3", LONGROPE),
    "phimoe, longrope": ("phimoe", {**EXPERTS, **MSCALE, "lm_head_bias": True, "output_router_logits": True}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "llama": ("llama", {}),
    "llama, dynamic rope": (
        "llama",
        {"max_position_embeddings": SWITCH, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    ),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "mixtral": ("mixtral", {**EXPERTS, "output_router_logits": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 8, "output_router_logits": True}),
    "gemma2": ("gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": WINDOW}),
    "gemma3_text": ("gemma3_text", {"head_dim": 8, "sliding_window": WINDOW}),
    "granite": ("granite", {"logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    "granitemoe": ("granitemoe", {**EXPERTS, "logits_scaling": 8.0, "output_router_logits": True}),
    "cohere2": ("cohere2", {"logit_scale": 0.25, "sliding_window": WINDOW}),
    "minicpm3": (
        "minicpm3",
        {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
    ),
    "olmo2": ("olmo2", {}),
    "glm4": ("glm4", {"head_dim": 8}),
    "starcoder2": ("starcoder2", {"sliding_window": WINDOW}),
    "gpt_oss": ("gpt_oss", {**EXPERTS, "head_dim": 8, "sliding_window": WINDOW}),
    "falcon_h1": (
        "falcon_h1",
        {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    ),
    "gpt2": ("gpt2", GPT_SIZES),
    "gptj": ("gptj", {**GPT_SIZES, "rotary_dim": 8}),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "do_layer_norm_before": True}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "biogpt": ("biogpt", {}),
    "gemma3n_text": (
        "gemma3n_text",
        {
            "head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "layer_types": ["full_attention"] * 2,
            "activation_sparsity_pattern": [0.0] * 2,
        },
    ),
    "bert": ("bert", {"is_decoder": True}),
    "bart": ("bart", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}),
    "xlnet": ("xlnet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "max_position_embeddings": None}),
}

IMAGE = {"image_size": 32, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE |= {"intermediate_size": 64}
STAGES = {"image_size": 32, "depths": [1, 1], "hidden_sizes": [16, 32]}
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2}

SLICE_ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit", IMAGE),
    "deit": ("deit", IMAGE),
    "dinov2": ("dinov2", IMAGE),
    "dinov2_with_registers": ("dinov2_with_registers", IMAGE),
    "dinov3_vit": ("dinov3_vit", IMAGE),
    "beit": ("beit", IMAGE),
    "data2vec-vision": ("data2vec-vision", IMAGE),
    "vit_mae": ("vit_mae", IMAGE),
    "vit_msn": ("vit_msn", IMAGE),
    "ijepa": ("ijepa", IMAGE),
    "clip_vision_model": ("clip_vision_model", IMAGE),
    "siglip_vision_model": ("siglip_vision_model", IMAGE),
    "aimv2_vision_model": ("aimv2_vision_model", IMAGE),
    "swin": ("swin", WINDOWS),
    "swinv2": ("swinv2", WINDOWS),
    "convnext": ("convnext", {**STAGES, "num_stages": 2}),
    "convnextv2": ("convnextv2", {**STAGES, "num_stages": 2}),
    "resnet": ("resnet", {**STAGES, "embedding_size": 16, "layer_type": "basic"}),
    "clip": ("clip", {}),
    "siglip2_vision_model": ("siglip2_vision_model", {**IMAGE, "num_patches": 4}),
}


def text_config(name: str) -> transformers.PretrainedConfig:
    """Return the tiny configuration of a language model of the table."""
    kind, settings = LANGUAGE_MODELS[name]
    known = AutoConfig.for_model(kind)
    sizes = {} if "n_embd" in settings else SIZES
    ids = {key: SIZES[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    given = {
        key: value for key, value in {**sizes, **ids}.items() if key in known.to_dict() or key in known.attribute_map
    }
    values = {**given, **settings}
    return AutoConfig.for_model(kind, **{key: value for key, value in values.items() if value is not None})


def vision_config(name: str) -> transformers.PretrainedConfig:
    """Return the tiny configuration of a slice encoder of the table."""
    kind, settings = SLICE_ENCODERS[name]
    return AutoConfig.for_model(kind, **settings)


def samf_config(text: str = "llama", vision: str = "vit", **settings: Any) -> SamfConfig:
    """Return a SamfConfig of a language model and a slice encoder of the table."""
    options = {"image_token_id": IMAGE_ID, "num_image_tokens": IMAGE_TOKENS, "volume_dim": 16, **settings}
    return SamfConfig(vision_config=vision_config(vision), text_config=text_config(text), **options)


def randomise(model: nn.Module) -> nn.Module:
    """Give every weight, norms and biases too, a value that a dropped weight would change the logits by."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3 if "fusion" in name else 0.15)
            elif "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def volume_batch(rows: int = 2, answer: int = 0, seed: int = 1) -> dict[str, torch.Tensor]:
    """Return a prompt with a volume for each row, and with `answer` labels on that many last tokens."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(6, VOCABULARY, (rows, PROMPT + answer), generator=generator)
    input_ids = torch.cat([torch.full((rows, IMAGE_TOKENS), IMAGE_ID), text], dim=1)
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(rows, SLICES, 3, 32, 32, generator=generator),
    }
    if answer:
        batch["labels"] = input_ids.clone()
        batch["labels"][:, :-answer] = -100
    return batch


def largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item()


def from_components(folder: Path, text: PreTrainedModel, **settings: Any) -> SamfForConditionalGeneration:
    """Save a language model and a tiny ViT, and build SAMF of the two as a user does."""
    text.save_pretrained(folder / "text")
    randomise(AutoModel.from_config(vision_config("vit"))).save_pretrained(folder / "encoder")
    options = {"image_token_id": IMAGE_ID, "num_image_tokens": IMAGE_TOKENS, "volume_dim": 16, **settings}
    return SamfForConditionalGeneration.from_component_pretrained(
        str(folder / "encoder"), str(folder / "text"), dtype="float32", **options
    )


def reloaded(model: SamfForConditionalGeneration, folder: Path) -> SamfForConditionalGeneration:
    model.save_pretrained(folder / "samf")
    return SamfForConditionalGeneration.from_pretrained(folder / "samf").eval()


@torch.no_grad()
def text_difference(own: PreTrainedModel, model: SamfForConditionalGeneration) -> float:
    """Return how far SAMF's logits, loss and router loss on text alone are from the language model's own."""
    input_ids = torch.randint(6, VOCABULARY, (2, 50), generator=torch.Generator().manual_seed(3))
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids}
    expected, actual = own(**inputs), model(**inputs)
    differences = [largest(expected[name] - actual[name]) for name in ("logits", "loss")]
    if expected.get("aux_loss") is not None:
        differences.append(largest(expected["aux_loss"] - actual["aux_loss"]))
    return max(differences)


def cache_difference(model: SamfForConditionalGeneration) -> float:
    """Return how far the logits of greedy tokens with the cache are from those without, past every switch."""
    batch = volume_batch(rows=1)
    greedy = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False, "suppress_tokens": [IMAGE_ID]}
    greedy |= {"output_logits": True, "return_dict_in_generate": True}
    with_cache, without = (model.generate(**batch, **greedy, use_cache=use) for use in (True, False))
    return max(largest(on - off) for on, off in zip(with_cache.logits, without.logits, strict=True))


@torch.no_grad()
def reload_difference(model: SamfForConditionalGeneration, folder: Path) -> float:
    """Return how far a volume's logits are from those after save and load."""
    batch = volume_batch()
    return largest(model(**batch).logits - reloaded(model, folder)(**batch).logits)


def try_language_model(name: str) -> dict[str, str]:
    """Return a language model's row of the table, without its two steps."""
    config = text_config(name)
    own = randomise(AutoModelForCausalLM.from_config(config))
    row = {"model": name, "class": type(own).__name__}
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = from_components(Path(folder), own)
        except ValueError as error:
            return row | {"refused": str(error)}
        randomise(model.model.fusion)
        row |= {
            "text": f"{text_difference(own, model):.0e}",
            "cache": f"{cache_difference(model):.0e}",
            "reload": f"{reload_difference(model, Path(folder)):.0e}",
        }
    return row


@torch.no_grad()
def encoder_difference(own: PreTrainedModel, model: SamfForConditionalGeneration) -> float:
    """Return how far z_2d is from what the encoder's own class gives for each slice by itself."""
    pixel_values = volume_batch()["pixel_values"]
    z_2d = model.get_image_features(pixel_values).last_hidden_state.flatten(0, 1)
    options = {}
    if own.config.model_type == "vit_mae":
        own.config.mask_ratio, options = 0.0, {"noise": torch.arange(4)[None]}
    expected = []
    for pixels in pixel_values.flatten(0, 1):
        output = own(pixel_values=pixels[None], **options)
        pooled = {"cls": lambda o: o.last_hidden_state[:, 0], "mean": lambda o: o.last_hidden_state.mean(1)}
        pooled["pooler"] = lambda o: o.pooler_output.flatten(1)
        expected.append(pooled[model.config.slice_pooling](output))
    return largest(z_2d - torch.cat(expected))


def try_slice_encoder(name: str) -> dict[str, str]:
    """Return a slice encoder's row of the table, without its two steps."""
    own = randomise(AutoModel.from_config(vision_config(name)))
    row = {"model": name, "class": type(own).__name__}
    try:
        model = randomise(SamfForConditionalGeneration(samf_config(vision=name)))
    except ValueError as error:
        return row | {"refused": str(error)}
    model.model.slice_encoder.load_state_dict(own.state_dict(), strict=False)  # its pooler may be left out
    pixel_values = volume_batch()["pixel_values"]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        first, second = (model.get_image_features(pixel_values).last_hidden_state for _ in range(2))
        row |= {
            "pooling": model.config.slice_pooling,
            "own": f"{encoder_difference(own, model):.0e}",
            "same twice": "yes" if torch.equal(first, second) else "no",
            "reload": f"{reload_difference(model, Path(folder)):.0e}",
        }
        half = model.to(torch.bfloat16).get_image_features(pixel_values).pooler_output
        row["bfloat16"] = "yes" if half.isfinite().all() else "no"
    return row


def two_steps(config: SamfConfig) -> str:
    """Train a new model for two steps under DistributedDataParallel; return "yes" or the error."""
    torch.manual_seed(0)
    model = SamfForConditionalGeneration(config).train()
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    try:
        for step in range(2):
            rank = torch.distributed.get_rank()
            parallel(**volume_batch(answer=ANSWER, seed=PROCESSES * step + rank)).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    except RuntimeError as error:
        return str(error).splitlines()[0][:80]
    sums = torch.stack([parameter.detach().double().sum() for parameter in model.parameters()])
    gathered = [torch.empty_like(sums) for _ in range(PROCESSES)]
    torch.distributed.all_gather(gathered, sums)
    return "yes" if torch.equal(*gathered) else "the processes' weights differ"


def _train_all(rank: int, port: int, names: Sequence[tuple[str, str]], folder: str) -> None:
    transformers.utils.logging.set_verbosity_error()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    results = {}
    for part, name in names:
        results[part, name] = two_steps(samf_config(**{part: name}))
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    torch.distributed.destroy_process_group()


def train_in_processes(names: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Train each of `names`, pairs of "text" or "vision" and a name, in two processes for two steps."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_train_all, (port, list(names), folder), nprocs=PROCESSES)
        return torch.load(Path(folder) / "results.pt")


def table(rows: Sequence[Mapping[str, str]], columns: Mapping[str, str]) -> str:
    """Return rows as a Markdown table; `columns` gives each key's heading. Refused rows are listed below it."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        if "refused" not in row:
            lines.append("| " + " | ".join(row[key] for key in columns) + " |")
    lines += ["", "Refused:", ""]
    for row in rows:
        if "refused" in row:
            lines.append(f"- `{row['model']}` ({row['class']}): {row['refused']}")
    return "\n".join(lines)


LANGUAGE_COLUMNS = {
    "model": "language model",
    "class": "class",
    "text": "logits and loss on text, from its own",
    "cache": "cache on, from off",
    "reload": "after save and load",
    "steps": "two DDP steps",
}
ENCODER_COLUMNS = {
    "model": "slice encoder",
    "class": "class",
    "pooling": "`slice_pooling` when left out",
    "own": "z_2d, from its own class's",
    "same twice": "same twice",
    "bfloat16": "float32 pixels into bfloat16",
    "reload": "after save and load",
    "steps": "two DDP steps",
}


def run(only: Sequence[str]) -> str:
    """Return the two tables of the models whose names contain one of `only` (all, without)."""

    def wanted(names: Mapping[str, Any]) -> list[str]:
        return [name for name in names if not only or any(part in name for part in only)]

    parts: list[tuple[str, Callable[[str], dict[str, str]], list[str]]] = [
        ("text", try_language_model, wanted(LANGUAGE_MODELS)),
        ("vision", try_slice_encoder, wanted(SLICE_ENCODERS)),
    ]
    rows = {}
    for part, attempt, names in parts:
        rows[part] = []
        for name in names:
            rows[part].append(attempt(name))
            logger.info("%s: %s", name, rows[part][-1])
    accepted = [(part, row["model"]) for part in rows for row in rows[part] if "refused" not in row]
    steps = train_in_processes(accepted)
    for part in rows:
        for row in rows[part]:
            row["steps"] = steps.get((part, row["model"]), "")
    return f"{table(rows['text'], LANGUAGE_COLUMNS)}\n\n{table(rows['vision'], ENCODER_COLUMNS)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of the models to try")
    parser.add_argument("--output", type=Path, help="write the tables here, for example components_table.md")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.set_verbosity_error()
    text = f"transformers {transformers.__version__}, torch {torch.__version__}\n\n{run(args.only)}"
    logger.info("\n%s", text)
    if args.output is not None:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
