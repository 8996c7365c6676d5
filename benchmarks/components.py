"""Try the library's language models and slice encoders in SAMF, each as a tiny configuration with random weights.

    python -m samf.benchmarks.components                     # the table of docs/reference/components.md, a few minutes
    python -m samf.benchmarks.components --only phi3 siglip  # some of them

A language model passes if SAMF returns its own logits and loss on plain text, the same logits with and without the cache
(past every switch of its rotary embedding and past its sliding window), the same logits after save and load, and trains
for two steps of DistributedDataParallel. A slice encoder passes if its embeddings are those of its own class, reproducible,
finite in bfloat16, the same after save and load, and if it trains for two steps. SAMF refuses models that it can't run.
"""

import argparse
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from samf.benchmarks.component_tables import LANGUAGE_MODELS, SIZES, SLICE_ENCODERS, VOCABULARY
from samf.model.configuration_samf import SamfConfig
from samf.model.modeling_samf import SamfForConditionalGeneration

logger = logging.getLogger(__name__)

IMAGE_ID, IMAGE_TOKENS, SLICES = 5, 4, 6
PROMPT, ANSWER = 20, 16  # 24 positions before the answer, 40 after
_PROCESSES = 2


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
    """Return a SamfConfig of two models of the tables.

    Args:
        text: language model.
        vision: slice encoder.
        settings: further arguments of `SamfConfig`.
    """
    options = {"image_token_id": IMAGE_ID, "num_image_tokens": IMAGE_TOKENS, "volume_dim": 16, **settings}
    return SamfConfig(vision_config=vision_config(vision), text_config=text_config(text), **options)


def randomise(model: nn.Module) -> nn.Module:
    """Give every weight, norms and biases included, values large enough that losing it changes the logits."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3 if "fusion" in name else 0.15)
            elif "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def volume_batch(rows: int = 2, answer: int = 0, seed: int = 1) -> dict[str, torch.Tensor]:
    """Return prompts with one volume each.

    Args:
        rows: number of prompts.
        answer: number of last tokens with labels; 0 for none.
        seed: of the values.
    """
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
    """Return the largest absolute value."""
    return difference.abs().max().item()


def from_components(folder: Path, text: PreTrainedModel, **settings: Any) -> SamfForConditionalGeneration:
    """Save a language model and a tiny ViT, and build SAMF from the two as a user does.

    Args:
        folder: where they are saved.
        text: the language model.
        settings: further arguments of `from_component_pretrained`.
    """
    text.save_pretrained(folder / "text")
    randomise(AutoModel.from_config(vision_config("vit"))).save_pretrained(folder / "encoder")
    options = {"image_token_id": IMAGE_ID, "num_image_tokens": IMAGE_TOKENS, "volume_dim": 16, **settings}
    return SamfForConditionalGeneration.from_component_pretrained(
        str(folder / "encoder"), str(folder / "text"), dtype="float32", **options
    )


def reloaded(model: SamfForConditionalGeneration, folder: Path) -> SamfForConditionalGeneration:
    """Save a model and load it again."""
    model.save_pretrained(folder / "samf")
    return SamfForConditionalGeneration.from_pretrained(folder / "samf").eval()


@torch.no_grad()
def text_difference(own: PreTrainedModel, model: SamfForConditionalGeneration) -> float:
    """Return the largest difference of SAMF's logits, loss and router loss on plain text from the language model's own."""
    input_ids = torch.randint(6, VOCABULARY, (2, 50), generator=torch.Generator().manual_seed(3))
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids}
    expected, actual = own(**inputs), model(**inputs)
    differences = [largest(expected[name] - actual[name]) for name in ("logits", "loss")]
    if expected.get("aux_loss") is not None:
        differences.append(largest(expected["aux_loss"] - actual["aux_loss"]))
    return max(differences)


def cache_difference(model: SamfForConditionalGeneration) -> float:
    """Return the largest difference of the logits of greedy tokens with and without the cache, past every switch."""
    batch = volume_batch(rows=1)
    greedy = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False, "suppress_tokens": [IMAGE_ID]}
    greedy |= {"output_logits": True, "return_dict_in_generate": True}
    with_cache, without = (model.generate(**batch, **greedy, use_cache=use) for use in (True, False))
    return max(largest(on - off) for on, off in zip(with_cache.logits, without.logits, strict=True))


@torch.no_grad()
def reload_difference(model: SamfForConditionalGeneration, folder: Path) -> float:
    """Return the largest difference of a volume's logits before and after save and load."""
    batch = volume_batch()
    return largest(model(**batch).logits - reloaded(model, folder)(**batch).logits)


def try_language_model(name: str) -> dict[str, str]:
    """Return a language model's row of the table, without the training steps."""
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
    """Return the largest difference of z_2d from what the encoder's own class returns slice by slice."""
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
    """Return a slice encoder's row of the table, without the training steps."""
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
    """Train a new model for two steps under DistributedDataParallel; return "yes" or what failed."""
    torch.manual_seed(0)
    model = SamfForConditionalGeneration(config).train()
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    try:
        for step in range(2):
            rank = torch.distributed.get_rank()
            parallel(**volume_batch(answer=ANSWER, seed=_PROCESSES * step + rank)).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    except RuntimeError as error:
        return str(error).splitlines()[0][:80]
    sums = torch.stack([parameter.detach().double().sum() for parameter in model.parameters()])
    gathered = [torch.empty_like(sums) for _ in range(_PROCESSES)]
    torch.distributed.all_gather(gathered, sums)
    return "yes" if torch.equal(*gathered) else "the processes' weights differ"


def _train_all(rank: int, port: int, names: Sequence[tuple[str, str]], folder: str) -> None:
    transformers.utils.logging.set_verbosity_error()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=_PROCESSES)
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
        torch.multiprocessing.spawn(_train_all, (port, list(names), folder), nprocs=_PROCESSES)
        return torch.load(Path(folder) / "results.pt")


def table(rows: Sequence[Mapping[str, str]], columns: Mapping[str, str]) -> str:
    """Return rows as a Markdown table, and refused models as a list below it; `columns` maps keys to headings."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        if "refused" not in row:
            lines.append("| " + " | ".join(row[key] for key in columns) + " |")
    lines += ["", "Refused:", ""]
    for row in rows:
        if "refused" in row:
            lines.append(f"- `{row['model']}` ({row['class']}): {row['refused']}")
    return "\n".join(lines)


_LANGUAGE_COLUMNS = {
    "model": "language model",
    "class": "class",
    "text": "difference of logits and loss on text, to its own class",
    "cache": "difference with the cache on, to off",
    "reload": "difference after save and load",
    "steps": "two DDP steps",
}
_ENCODER_COLUMNS = {
    "model": "slice encoder",
    "class": "class",
    "pooling": "default `slice_pooling`",
    "own": "difference of z_2d, to its own class",
    "same twice": "repeatable",
    "bfloat16": "float32 pixels into bfloat16",
    "reload": "difference after save and load",
    "steps": "two DDP steps",
}


def run(only: Sequence[str]) -> str:
    """Return the two tables; `only` has parts of the names of the models to try, none for all."""

    def wanted(names: Iterable[str]) -> list[str]:
        return [name for name in names if not only or any(part in name for part in only)]

    parts: list[tuple[str, Callable[[str], dict[str, str]], list[str]]] = [
        ("text", try_language_model, wanted(LANGUAGE_MODELS)),
        ("vision", try_slice_encoder, wanted(SLICE_ENCODERS)),
    ]
    rows: dict[str, list[dict[str, str]]] = {}
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
    return f"{table(rows['text'], _LANGUAGE_COLUMNS)}\n\n{table(rows['vision'], _ENCODER_COLUMNS)}\n"


def main() -> None:
    """Try the models that the command line names."""
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
